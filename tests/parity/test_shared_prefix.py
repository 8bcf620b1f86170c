"""Shared-prefix attention, cached decoding and the update's log-probabilities against the plain repeated path."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import plain_llava
import pytest
from tiny_llava import EOS, PAD, B, G, R, make_params, make_policy, make_prompt, make_responses, make_rows

from balcap_jax.rollout import Sampling, make_rollout


def plain_log_probs(policy, params, temperature=1.0):
    """[B, G, R] of `make_prompt` and `make_responses` by the plain path, compiled."""
    responses, _ = make_responses()
    rows, images = make_rows(policy), make_prompt(policy).images
    plain = jax.jit(lambda params: plain_llava.log_probs(policy, params, rows, images, responses, temperature))
    return plain(params)


def our_log_probs(policy, params, prompt, responses, temperature=1.0):
    return policy.log_probs(params, prompt, policy.encode(params, prompt.images), responses, temperature=temperature)


def relative_error(ours, reference, mask) -> float:
    ours, reference = np.asarray(ours)[mask], np.asarray(reference)[mask]
    return float(np.max(np.abs(ours - reference)) / np.max(np.abs(reference)))


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True, "tied_embeddings": True}, {"remat": "full"}, {"remat": "dots"}], ids=str
)
def test_log_probs_equal_the_repeated_path(changes):
    policy = make_policy(**changes)
    params, (responses, mask) = make_params(policy), make_responses()
    ours = jax.jit(lambda params, prompt: our_log_probs(policy, params, prompt, responses, 0.7))
    plain = plain_log_probs(policy, params, 0.7)
    for side in ("right", "left"):
        assert relative_error(ours(params, make_prompt(policy, side)), plain, mask) < 1e-5, side


def test_gradients_equal_the_repeated_path():
    # The decoder without biases, ties and rematerialisation: tests/method/test_train_step.py, on the whole step.
    policy = make_policy(qkv_bias=True, tied_embeddings=True, remat="full")
    params, prompt, (responses, mask) = make_params(policy), make_prompt(policy), make_responses()
    cotangent = jax.random.normal(jax.random.key(5), (B, G, R))

    def ours(params):
        return jnp.sum(jnp.where(mask, cotangent * our_log_probs(policy, params, prompt, responses), 0.0))

    def plain(params):
        log_probs = plain_llava.log_probs(policy, params, make_rows(policy), prompt.images, responses)
        return jnp.sum(jnp.where(mask, cotangent * log_probs, 0.0))

    got = flax.traverse_util.flatten_dict(jax.jit(jax.grad(ours))(params), sep="/")
    want = flax.traverse_util.flatten_dict(jax.jit(jax.grad(plain))(params), sep="/")
    assert got.keys() == want.keys()
    # A key's bias moves all logits of a softmax row alike (in the decoder only before the rotation turns it): its
    # gradient is zero but for rounding, so it is measured against that of the kernel beside it.
    scale = {path: want[path.replace("vision/layers/k/bias", "vision/layers/k/kernel")] for path in want}
    errors = {path: float(jnp.max(jnp.abs(got[path] - want[path])) / jnp.max(jnp.abs(scale[path]))) for path in want}
    assert max(errors.values()) < 1e-5, errors


def test_cached_decoding_equals_the_full_forward():
    policy = make_policy()
    params, (responses, mask) = make_params(policy), make_responses()
    plain = plain_log_probs(policy, params)

    @jax.jit
    def cached_log_probs(params, prompt):
        prefix, logits = policy.prefill(params, prompt, policy.encode(params, prompt.images))

        def step(carry, t):
            branch, logits = carry
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), responses[:, :, t, None], -1)[..., 0]
            return policy.decode(params, prefix, branch, responses[:, :, t], t), chosen

        start = (policy.empty_branch(B, G, R), jnp.repeat(logits[:, None], G, 1))
        return jnp.moveaxis(jax.lax.scan(step, start, jnp.arange(R))[1], 0, -1)

    for side in ("right", "left"):
        assert relative_error(cached_log_probs(params, make_prompt(policy, side)), plain, mask) < 1e-5, side


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_on_policy_ratio_is_one(temperature):
    policy = make_policy()
    params, prompt = make_params(policy), make_prompt(policy)
    rollout = make_rollout(policy, Sampling(G, R, temperature=temperature))
    out = rollout(params, prompt, jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(0))
    again = jax.jit(lambda params: our_log_probs(policy, params, prompt, out.tokens, temperature))(params)
    ratio = jnp.exp(jnp.where(out.mask, again - out.policy_log_probs, 0.0))
    assert float(jnp.max(jnp.abs(ratio - 1))) < 1e-5


def test_greedy_follows_the_repeated_path_token_for_token():
    policy = make_policy()
    params, prompt, rows = make_params(policy), make_prompt(policy), make_rows(policy)
    rollout = make_rollout(policy, Sampling(1, R, greedy=True))
    out = rollout(params, prompt, jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(0))
    plain_logits = jax.jit(lambda params, tokens, image: plain_llava.logits(policy, params, tokens, image))
    longest = max(map(len, rows)) + R
    for b, row in enumerate(rows):
        said = []
        while len(said) < R and (not said or said[-1] != EOS):
            so_far = [*row, *said]
            tokens = np.array(so_far + [PAD] * (longest - len(so_far)), np.int32)
            said.append(int(np.argmax(plain_logits(params, tokens, prompt.images[b])[len(so_far) - 1])))
        assert list(np.asarray(out.tokens[b, 0])) == said + [PAD] * (R - len(said))
