"""A LLaVA policy of toy sizes, prompts and responses for it: what the tests of the compiled programs run on.

Every size is another number, so that an axis taken for another one fails; prompts differ in length and have text on
both sides of the image.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava import Llava
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.models.policy import Params, Prompt

B, G, P, R, V = 3, 4, 14, 9, 23
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3


def make_policy(*, tower: dict | None = None, logits_chunk: int = 10, **language) -> Llava:
    """The toy policy; `tower` and the other keywords change sizes of the vision tower and of the decoder."""
    sizes = VisionConfig(image_size=12, patch_size=4, width=16, layers=3, heads=2, mlp=24)
    decoder = DecoderConfig(vocab=V, width=24, layers=3, heads=4, kv_heads=2, head_size=6, mlp=32)
    return Llava(
        dataclasses.replace(sizes, **(tower or {})),
        dataclasses.replace(decoder, **language),
        IMAGE,
        PAD,
        (EOS,),
        forbidden=(PAD, BOS, IMAGE),
        logits_chunk=logits_chunk,
    )


def make_rows(policy: Llava, batch: int = B) -> list[list[int]]:
    """Un-padded prompts, three lengths in turn, text before and after the image."""
    rng = np.random.default_rng(0)
    texts = [((0, 1), (2, 2), (1, 3))[b % 3] for b in range(batch)]
    return [
        [BOS, *rng.integers(4, policy.vocab, before), *[IMAGE] * policy.image_tokens, *rng.integers(4, V, after)]
        for before, after in texts
    ]


def make_prompt(policy: Llava, side: str = "right", batch: int = B) -> Prompt:
    """The prompts of `make_rows` with noise for images, padded on either side."""
    shape = (batch, P)
    tokens, mask, positions = np.full(shape, PAD, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32)
    for b, row in enumerate(make_rows(policy, batch)):
        where = slice(0, len(row)) if side == "right" else slice(P - len(row), P)
        tokens[b, where], mask[b, where], positions[b, where] = row, True, np.arange(len(row))
    side_length = policy.vision.image_size
    images = np.random.default_rng(2).integers(0, 256, (batch, side_length, side_length, 3)).astype(np.uint8)
    return Prompt(*map(jnp.asarray, (tokens, mask, positions, images)))


def make_responses(batch: int = B, group: int = G, length: int = R) -> tuple[jax.Array, jax.Array]:
    """Random response tokens [B, G, R] of various lengths that end in EOS (one is cut), and their mask."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(4, V, (batch, group, length)).astype(np.int32)
    lengths = rng.integers(2, length + 1, (batch, group))
    tokens[np.arange(batch)[:, None], np.arange(group), lengths - 1] = EOS
    lengths[0, 0], tokens[0, 0, -1] = length, 5
    mask = np.arange(length) < lengths[..., None]
    return jnp.asarray(np.where(mask, tokens, PAD)), jnp.asarray(mask)


@functools.cache
def shapes_of(policy: Llava) -> Params:
    """The parameters' shapes; tracing `init` for them takes longer than drawing the numbers."""
    return jax.eval_shape(policy.init, jax.random.key(0))


def make_params(policy: Llava) -> Params:
    """Random parameters of the policy's shapes; no bias is 0 and no norm's scale 1, so that none is forgotten unseen.

    Fresh arrays at each call: a train step may consume them.
    """
    rng = np.random.default_rng(3)

    def random(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(random, shapes_of(policy))
