"""The vision tower of Qwen3-VL and its mergers: learned positions, rotary attention over the whole image, DeepStack.

An image lies in slots as in Qwen2.5-VL, with windows of one merged token: slots are the patches of the raster of merged
tokens, and every layer attends to all of them.
"""

import dataclasses
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models import decoder
from balcap_jax.models.attention import bias
from balcap_jax.models.decoder import Params
from balcap_jax.models.image_attention import few_at_a_time
from balcap_jax.models.qwen2_5_vl.vision import (
    NORM_EPS,
    PatchEmbedding,
    QwenImages,
    QwenTower,
    joined,
    merger,
    rope_table,
)
from balcap_jax.models.qwen2_5_vl.windows import MERGE
from balcap_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(QwenTower):
    """Sizes of the tower. `positions` is the number of learned position embeddings, a square.

    `deepstack_layers` (ascending, from 0) are those whose outputs the first decoder layers get, beside the last one's.
    """

    PREFIXED: ClassVar = (*QwenTower.PREFIXED, "positions")
    PIXEL_MEAN: ClassVar[np.ndarray] = np.full(3, 0.5, np.float32)
    PIXEL_STD: ClassVar[np.ndarray] = np.full(3, 0.5, np.float32)
    window_side: ClassVar[int] = 1

    positions: int
    deepstack_layers: tuple[int, ...]

    @property
    def windows(self) -> int:
        """W."""
        return self.max_image_tokens


class VisionBlock(nn.Module):
    """Pre-norm transformer layer: full attention, MLP with the tanh form of GELU, biases everywhere."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array) -> jax.Array:
        """x [B, S, width], rope of [B, S] (see `rope_table`), mask [B, S] -> [B, S, width]."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        heads = (c.heads, c.width // c.heads)
        with jax.named_scope("attention"):
            h = nn.LayerNorm(epsilon=NORM_EPS, dtype=dtype, name="attention_norm")(x)
            q, k, v = (nn.DenseGeneral(heads, dtype=dtype, name=name)(h) for name in ("q", "k", "v"))
            arrays = (decoder.rotate(q, rope), decoder.rotate(k, rope), v, mask)
            out = few_at_a_time(_attend, arrays, c.heads * x.shape[1] ** 2)
            x = x + nn.DenseGeneral(c.width, axis=(-2, -1), dtype=dtype, name="o")(out)
        with jax.named_scope("mlp"):
            h = nn.LayerNorm(epsilon=NORM_EPS, dtype=dtype, name="mlp_norm")(x)
            h = nn.gelu(nn.Dense(c.mlp, dtype=dtype, name="up")(h), approximate=True)
            return x + nn.Dense(c.width, dtype=dtype, name="down")(h)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of q, k, v [B, S, N, H] to the keys of the whole image that are in `mask` [B, S]."""
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits + bias(mask)[:, None, None], axis=-1)
    return jnp.einsum("bnqk,bknh->bqnh", weights.astype(v.dtype), v)


def position_embeddings(config: VisionConfig, table: jax.Array, images: QwenImages) -> jax.Array:
    """The square `table` [positions, width] stretched over each image, corner on corner: fp32 [B, W, S, width].

    Bilinear interpolation as a product with each patch's weights: a gather's gradient would be a scatter.
    """
    side = math.isqrt(config.positions)
    # The last patch of an image is in its last row and column; an image has at least MERGE of each.
    last = images.positions.max(axis=(1, 2), keepdims=True)
    place = images.positions.astype(jnp.float32) * (side - 1) / jnp.maximum(last, 1)
    row, column = jnp.unstack(jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(side)), 0), axis=-2)
    weights = (row[..., :, None] * column[..., None, :]).reshape(*row.shape[:-1], side * side)
    return jnp.matmul(weights, table.astype(jnp.float32), precision="highest")


def init(config: VisionConfig, rng: jax.Array) -> Params:
    """Random parameters of the tower: `patch`, `positions`, and `layers` stacked over L."""
    patch_key, position_key, layer_key = jax.random.split(rng, 3)
    x = jnp.zeros((1, 1, config.width), jnp.dtype(config.dtype))
    rope = rope_table(config, jnp.zeros((1, 1, 2)))
    block, mask = VisionBlock(config), jnp.ones((1, 1), bool)
    return {
        "patch": PatchEmbedding(config, bias=True).init(
            patch_key, jnp.zeros((1, 1, 1, config.patch_features), jnp.uint8)
        )["params"],
        # As large as a patch's own contribution, as in CLIP's tower (`llava.vision`).
        "positions": jax.random.normal(position_key, (config.positions, config.width)),
        "layers": jax.vmap(lambda key: block.init(key, x, rope, mask)["params"])(
            jax.random.split(layer_key, config.layers)
        ),
    }


def init_mergers(config: VisionConfig, width: int, rng: jax.Array) -> tuple[Params, Params]:
    """Random parameters of the merger to the decoder's `width`, and of DeepStack's, stacked under `layers`.

    The norms of the latter are over joined patches, that of the former over each.
    """
    joined_width = MERGE**2 * config.width

    def make(key: jax.Array, normed: int) -> Params:
        layers = merger(config, width).init(key, jnp.zeros((1, joined_width)))["params"]
        return {"norm": {"scale": jnp.ones(normed), "bias": jnp.zeros(normed)}, **layers}

    key, *keys = jax.random.split(rng, 1 + len(config.deepstack_layers))
    return make(key, config.width), {"layers": jax.vmap(lambda key: make(key, joined_width))(jnp.stack(keys))}


@jax.named_scope("vision_tower")
def encode(config: VisionConfig, params: Params, images: QwenImages) -> tuple[jax.Array, jax.Array]:
    """The tower's output [B, S, width], and those of `deepstack_layers` [n, B, S, width]; S counts all slots.

    Empty slots hold finite noise that no other slot has seen.
    """
    x = PatchEmbedding(config, bias=True).apply({"params": params["patch"]}, images.patches)
    x = x + position_embeddings(config, params["positions"], images).astype(x.dtype)
    x, mask = (array.reshape(array.shape[0], -1, *array.shape[3:]) for array in (x, images.mask))
    rope = rope_table(config, images.positions.reshape(*mask.shape, 2))
    block = VisionBlock(config)
    step = decoder.remat(
        lambda x, weights: block.apply({"params": weights}, constrain(x, "rows"), rope, mask), config.remat
    )

    def layer(carry, inputs):
        (x, taken), (weights, place) = carry, inputs
        x = step(x, weights)
        return (x, jax.lax.dynamic_update_index_in_dim(taken, x, place, 0)), None

    # Layers that nobody asks for write over each other in a last place.
    count = len(config.deepstack_layers)
    places = np.full(config.layers, count)
    places[list(config.deepstack_layers)] = np.arange(count)
    taken = jnp.zeros((count + 1, *x.shape), x.dtype)
    (x, taken), _ = jax.lax.scan(layer, (x, taken), (params["layers"], places))
    return x, taken[:count]


@jax.named_scope("merger")
def features(config: VisionConfig, params: Params, images: QwenImages, x: jax.Array) -> jax.Array:
    """The tower's output [B, S, width] -> features [B, I, 4 * width]: normed, then joined; `params`: the merger's."""
    return joined(config, images, _norm(config, params["norm"], x))


@jax.named_scope("deepstack")
def deepstack(config: VisionConfig, params: Params, width: int, images: QwenImages, taken: jax.Array) -> jax.Array:
    """Outputs of tower layers [n, B, S, width] -> [n, B, I, D], D = `width`: joined, normed, each merged by its own."""

    def merge(params: Params, x: jax.Array) -> jax.Array:
        layers = {name: params[name] for name in ("first", "second")}
        x = _norm(config, params["norm"], joined(config, images, x))
        return merger(config, width).apply({"params": layers}, x)

    return jax.vmap(merge)(params["layers"], taken)


def _norm(config: VisionConfig, params: Params, x: jax.Array) -> jax.Array:
    return nn.LayerNorm(epsilon=NORM_EPS, dtype=jnp.dtype(config.dtype)).apply({"params": params}, x)
