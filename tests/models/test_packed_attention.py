"""Attention over packed places against one softmax over all keys of a part, most of them masked."""

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models import packed_attention, packing
from balcap_jax.models.packing import UNIT

PARTS, PROMPTS, GROUP, R, P, N, M, H = 2, 3, 2, 300, 5, 4, 2, 8
# Odd numbers of units, so that blocks run on into the next prompt; a prompt of none; a response of three tiles of keys.
# The first part is full, the second has an empty place.
LENGTHS = np.array([[[5, 1], [33, 300], [0, 65]], [[70, 0], [0, 0], [200, 64]]])
BUCKET = 90  # 17 places


def dense(q, prefix_k, prefix_v, k, v, at, prompt_mask):
    """[Q, S, N, H], with all keys of a part in one row."""
    size = q.shape[1]
    prompt, first = (np.repeat(np.asarray(x), UNIT, axis=1) for x in (at.prompt, at.first))
    token = np.arange(size)
    own = (token <= token[:, None]) & (first[:, None, :] == first[..., None])  # [Q, S, S]
    of_prefix = (np.arange(PROMPTS) == prompt[..., None])[..., None] & prompt_mask.reshape(PARTS, 1, PROMPTS, P)
    seen = np.concatenate([of_prefix.reshape(PARTS, size, -1), own], axis=-1)

    def joined(prefix, x):
        prefix = prefix.reshape(PARTS, PROMPTS, M, P, H).swapaxes(1, 2).reshape(PARTS, M, -1, H)
        return jnp.repeat(jnp.concatenate([prefix, x], axis=2), N // M, axis=1)

    logits = jnp.einsum("qsnh,qnkh->qnsk", q, joined(prefix_k, k)) * H**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("qnsk,qnkh->qsnh", weights, joined(prefix_v, v))


def test_blocks_read_their_own_prompt_and_responses_alone():
    at = packing.places(jnp.asarray(LENGTHS), R, BUCKET)
    assert at.fits.tolist() == [True, True]
    assert at.units.tolist() == [[2, 12, 3], [3, 0, 9]]
    size = at.source.shape[1] * UNIT
    shapes = [(PARTS, size, N, H), *[(PARTS * PROMPTS, M, P, H)] * 2, *[(PARTS, M, size, H)] * 2]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(3 * rng.normal(size=shape), jnp.float32) for shape in shapes]
    prompt_mask = np.arange(P) >= np.array([0, 1, 2, 0, 3, 4])[:, None]
    real = np.repeat(np.asarray(at.source) < PROMPTS * GROUP * -(-R // UNIT), UNIT, axis=1)[..., None, None]
    weight = rng.normal(size=shapes[0]) * real

    def pull(attend):
        def product(*arrays):
            read = attend(*arrays)
            return jnp.sum(read * weight), read * real

        return jax.jit(jax.grad(product, range(5), has_aux=True))(*arrays)

    def packed(q, prefix_k, prefix_v, k, v):
        return packed_attention.over_prompt(q, prefix_k, prefix_v, jnp.asarray(prompt_mask), k, v, at)

    gradients, got = pull(packed)
    wanted_gradients, want = pull(lambda *arrays: dense(*arrays, at, prompt_mask))
    np.testing.assert_allclose(got, want, atol=2e-5)
    for name, gradient, wanted in zip(
        ("q", "prefix_k", "prefix_v", "k", "v"), gradients, wanted_gradients, strict=True
    ):
        assert float(jnp.abs(gradient - wanted).max()) < 1e-5 * float(jnp.abs(wanted).max()), name
