"""Shared-prefix attention, cached decoding and the update's log-probabilities against the plain repeated path."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import plain_llava
import pytest

from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava.modeling import Llava
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.models.policy import Prompt
from balcap_jax.rollout import Sampling, make_rollout

B, G, P, R, V = 3, 4, 14, 9, 23
IMAGE, PAD, EOS = 3, 0, 2


def make_policy(**changes) -> Llava:
    tower = VisionConfig(image_size=12, patch_size=4, width=16, layers=3, heads=2, mlp=24)
    language = DecoderConfig(vocab=V, width=24, layers=3, heads=4, kv_heads=2, head_size=6, mlp=32)
    language = dataclasses.replace(language, **changes)
    return Llava(tower, language, IMAGE, PAD, EOS, forbidden=(PAD, 1, IMAGE), logits_chunk=10)


def make_prompt(policy: Llava, side: str = "right") -> tuple[Prompt, list[list[int]]]:
    """Prompts of different lengths with text before and after the image, padded on either side."""
    rng = np.random.default_rng(0)
    rows = [[1, *rng.integers(4, V, before), *[IMAGE] * policy.image_tokens, *rng.integers(4, V, after)]
            for before, after in ((0, 1), (2, 2), (1, 3))]  # fmt: skip
    tokens, mask, positions = np.full((B, P), PAD, np.int32), np.zeros((B, P), bool), np.zeros((B, P), np.int32)
    for b, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(P - len(row), P)
        tokens[b, where], mask[b, where], positions[b, where] = row, True, np.arange(len(row))
    images = rng.integers(0, 256, (B, 12, 12, 3)).astype(np.uint8)
    return Prompt(*map(jnp.asarray, (tokens, mask, positions, images))), rows


def make_responses() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(4, V, (B, G, R)).astype(np.int32))


def randomised(policy: Llava):
    """Initial parameters with every zero and one (biases, norms) disturbed, so that none can be forgotten unseen."""
    params = policy.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


def plain_log_probs(policy, params, rows, images, responses, temperature=1.0):
    def of_prompt(params, row, image, responses):
        return jax.vmap(lambda r: plain_llava.log_probs_one(policy, params, row, image, r, temperature))(responses)

    return jnp.stack([of_prompt(params, rows[b], images[b], responses[b]) for b in range(B)])


def relative_error(ours, reference) -> float:
    return float(jnp.max(jnp.abs(ours - reference)) / jnp.max(jnp.abs(reference)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tied_embeddings": True}, {"remat": "full"}])
def test_log_probs_equal_the_repeated_path(side, changes):
    policy = make_policy(**changes)
    params, (prompt, rows), responses = randomised(policy), make_prompt(policy, side), make_responses()
    embeds = policy.encode(params, prompt.images)
    ours = policy.log_probs(params, prompt, embeds, responses, temperature=0.7)
    plain = jax.jit(lambda p: plain_log_probs(policy, p, rows, prompt.images, responses, 0.7))(params)
    assert relative_error(ours, plain) < 1e-5


def test_gradients_equal_the_repeated_path():
    policy = make_policy()
    params, (prompt, rows), responses = randomised(policy), make_prompt(policy), make_responses()
    cotangent = jax.random.normal(jax.random.key(5), (B, G, R))

    def ours(params):
        embeds = policy.encode(params, prompt.images)
        return jnp.sum(cotangent * policy.log_probs(params, prompt, embeds, responses))

    def plain(params):
        return jnp.sum(cotangent * plain_log_probs(policy, params, rows, prompt.images, responses))

    got = flax.traverse_util.flatten_dict(jax.jit(jax.grad(ours))(params), sep="/")
    want = flax.traverse_util.flatten_dict(jax.jit(jax.grad(plain))(params), sep="/")
    assert got.keys() == want.keys()
    # A key's bias moves all logits of a softmax row alike: its gradient is zero but for rounding, so it is measured
    # against that of the kernel beside it.
    scale = {path: want[path.replace("vision/layers/k/bias", "vision/layers/k/kernel")] for path in want}
    errors = {path: float(jnp.max(jnp.abs(got[path] - want[path])) / jnp.max(jnp.abs(scale[path]))) for path in want}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("side", ["right", "left"])
def test_cached_decoding_equals_the_full_forward(side):
    policy = make_policy()
    params, (prompt, rows), responses = randomised(policy), make_prompt(policy, side), make_responses()
    prefix, logits = policy.prefill(params, prompt, policy.encode(params, prompt.images))
    branch = policy.empty_branch(B, G, R)
    decode = jax.jit(policy.decode)
    steps = [jax.nn.log_softmax(jnp.repeat(logits[:, None], G, 1))]
    for t in range(R - 1):
        branch, logits = decode(params, prefix, branch, responses[:, :, t], jnp.asarray(t))
        steps.append(jax.nn.log_softmax(logits))
    cached = jnp.take_along_axis(jnp.stack(steps, 2), responses[..., None], -1)[..., 0]
    plain = jax.jit(lambda p: plain_log_probs(policy, p, rows, prompt.images, responses))(params)
    assert relative_error(cached, plain) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_on_policy_ratio_is_one(temperature):
    policy = make_policy()
    params, (prompt, _) = randomised(policy), make_prompt(policy)
    rollout = make_rollout(policy, Sampling(G, R, temperature=temperature))
    out = rollout(params, prompt, jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(0))
    again = policy.log_probs(params, prompt, out.image_embeds, out.tokens, temperature=temperature)
    ratio = jnp.exp(jnp.where(out.mask, again - out.policy_log_probs, 0.0))
    assert float(jnp.max(jnp.abs(ratio - 1))) < 1e-5
    np.testing.assert_array_equal(out.log_probs, out.policy_log_probs)


def test_greedy_follows_the_repeated_path_token_for_token():
    policy = make_policy()
    params, (prompt, rows) = randomised(policy), make_prompt(policy)
    rollout = make_rollout(policy, Sampling(1, R, greedy=True))
    out = rollout(params, prompt, jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(0))
    for b in range(B):
        said = []
        while len(said) < R and (not said or said[-1] != EOS):
            continuations = jnp.array([[*said, v] for v in range(V)])
            log_probs = jax.vmap(
                lambda r: plain_llava.log_probs_one(policy, params, rows[b], prompt.images[b], r)[-1]  # noqa: B023
            )(continuations)
            said.append(int(jnp.argmax(log_probs)))
        assert list(np.asarray(out.tokens[b, 0])) == said + [PAD] * (R - len(said))
