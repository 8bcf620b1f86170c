"""Policies of both Qwen families at toy sizes, and their images: what the tests of these families run on.

Images have at most 40 merged tokens. Qwen2.5-VL: two window layers, a full one, a window layer, a full one, in windows
of 4 x 4 tokens. Qwen3-VL: positions learned on a grid of 5 x 5, DeepStack from three of five tower layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.models.qwen2_5_vl import Qwen25VL
from balcap_jax.models.qwen2_5_vl.processing import mrope_positions
from balcap_jax.models.qwen2_5_vl.vision import QwenImages, VisionConfig
from balcap_jax.models.qwen2_5_vl.windows import plan
from balcap_jax.models.qwen3_vl import Qwen3VL
from balcap_jax.models.qwen3_vl.vision import VisionConfig as Qwen3VisionConfig

V = 41
PAD, EOS, IMAGE, START = 0, 1, 2, 3


FAMILIES = ("qwen2_5_vl", "qwen3_vl")
TOWER = {"patch_size": 4, "width": 32, "layers": 5, "heads": 2, "mlp": 24, "max_image_tokens": 40}


def make_policy(family: str = "qwen2_5_vl", *, tower: dict | None = None, logits_chunk: int = 10, **language) -> Policy:
    """The toy policy; `tower` and the other keywords change sizes of the vision tower and of the decoder."""
    decoder = DecoderConfig(
        vocab=V,
        width=48,
        layers=3,
        heads=4,
        kv_heads=2,
        head_size=12,
        mlp=40,
        rope_theta=1e6,
        mrope_section=(2, 2, 2),
        norm_eps=1e-6,
        qkv_bias=True,
    )
    sizes, kind = VisionConfig(**TOWER, window_size=32, full_attention_layers=(2, 4)), Qwen25VL
    if family == "qwen3_vl":
        # One layer more than DeepStack's; heads wider than their share of the width; unequal rotary sections.
        own = {"layers": 4, "head_size": 16, "mrope_section": (4, 3, 1), "mrope_interleaved": True}
        decoder = dataclasses.replace(decoder, **own, qkv_bias=False, qk_norm=True)
        sizes, kind = Qwen3VisionConfig(**TOWER, positions=25, deepstack_layers=(0, 2, 3)), Qwen3VL
    return kind(
        dataclasses.replace(sizes, **(tower or {})),
        dataclasses.replace(decoder, **language),
        IMAGE,
        PAD,
        (EOS,),
        forbidden=(PAD, IMAGE, START),
        logits_chunk=logits_chunk,
    )


def make_images(policy: Policy, grids: list[tuple[int, int]], seed: int = 0) -> tuple[QwenImages, list[np.ndarray]]:
    """Noise of `grids` (rows, columns of merged tokens), laid out; and the patches in the reference's order."""
    c, rng = policy.vision, np.random.default_rng(seed)
    patches, laid_out = [], []
    for rows, columns in grids:
        where = plan(rows, columns, side=c.window_side, windows=c.windows, tokens=c.max_image_tokens)
        patches.append(rng.integers(0, 256, (4 * rows * columns, c.patch_features)).astype(np.uint8))
        # Empty slots hold noise too: nothing may depend on it.
        noise = rng.integers(0, 256, (c.windows, c.slots, c.patch_features)).astype(np.uint8)
        slots = np.where(where.mask[..., None], patches[-1][where.slot], noise)
        laid_out.append(QwenImages(slots, where.mask, where.positions, where.back, where.token_mask))
    return QwenImages(*map(np.stack, zip(*laid_out, strict=True))), patches


@functools.cache
def shapes_of(policy: Policy) -> Params:
    """The parameters' shapes; tracing `init` for them takes longer than drawing the numbers."""
    return jax.eval_shape(policy.init, jax.random.key(0))


def make_prompt(policy: Policy, grids: list[tuple[int, int]], length: int) -> Prompt:
    """Prompts of `length` tokens with an image each and one to three words before and behind it; padded on the left."""
    rng, shape = np.random.default_rng(1), (len(grids), length)
    tokens, mask = np.full(shape, PAD, np.int32), np.zeros(shape, bool)
    for b, (rows, columns) in enumerate(grids):
        before, behind = (rng.integers(START + 1, V, 1 + (b + turn) % 3) for turn in (0, 1))
        row = [*before, *[IMAGE] * (rows * columns), *behind]
        tokens[b, length - len(row) :], mask[b, length - len(row) :] = row, True
    positions = mrope_positions(tokens == IMAGE, mask, np.array(grids))
    return jax.tree.map(jnp.asarray, Prompt(tokens, mask, positions, make_images(policy, grids)[0]))


def make_params(policy: Policy, scale: float = 0.2) -> Params:
    """Random parameters of the policy's shapes; no bias is 0 and no norm's scale 1."""
    rng = np.random.default_rng(3)

    def random(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(random, shapes_of(policy))
