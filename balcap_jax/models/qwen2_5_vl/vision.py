"""The vision tower of Qwen2.5-VL over window-major slots (see `windows`), and the merger to the decoder's width.

What the towers of both Qwen families have in common is here too: `QwenTower`, `QwenImages`, `PatchEmbedding`, `joined`.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models import decoder
from balcap_jax.models.attention import MASKED
from balcap_jax.models.decoder import Params, RMSNorm, TowerSizes
from balcap_jax.models.image_attention import few_at_a_time
from balcap_jax.models.policy import Projector
from balcap_jax.models.prompting import PIXEL_MEAN, PIXEL_STD
from balcap_jax.models.qwen2_5_vl.windows import MERGE, windows_needed
from balcap_jax.parallel.sharding import constrain

# Fixed in the architecture, not part of published configurations.
FRAMES = 2
NORM_EPS = 1e-6
ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenTower(TowerSizes):
    """What both families' towers say of images: I is `max_image_tokens`; a family adds `window_side` and `windows`."""

    PIXEL_MEAN: ClassVar[np.ndarray] = PIXEL_MEAN
    PIXEL_STD: ClassVar[np.ndarray] = PIXEL_STD
    PATCHES_PER_TOKEN: ClassVar = MERGE**2

    max_image_tokens: int
    max_aspect: float = 4.0

    @property
    def slots(self) -> int:
        """S: patches of a window."""
        return (self.window_side * MERGE) ** 2

    @property
    def patch_features(self) -> int:
        return 3 * self.patch_size**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(QwenTower):
    """Sizes of the tower. `full_attention_layers` (from 0) attend to the whole image, the others within windows.

    `window_size` is in pixels.
    """

    window_size: int
    full_attention_layers: tuple[int, ...]

    @property
    def window_side(self) -> int:
        """Merged tokens along a window's side."""
        return self.window_size // MERGE // self.patch_size

    @property
    def windows(self) -> int:
        """W."""
        return windows_needed(self.max_image_tokens, self.max_aspect, self.window_side)


class QwenImages(NamedTuple):
    """B images in window-major slots.

    patches uint8 [B, W, S, 3 * patch * patch] (channel, row, column); mask [B, W, S] bool, False where a slot is empty;
    positions int32 [B, W, S, 2], row and column in patches; back int32 [B, I], where each merged token of the raster
    lies among the W * S / 4 merged slots; token_mask [B, I] bool.
    """

    patches: jax.Array
    mask: jax.Array
    positions: jax.Array
    back: jax.Array
    token_mask: jax.Array


class PatchEmbedding(nn.Module):
    """uint8 patches [..., 3 * patch * patch] -> [..., width].

    The reference convolves FRAMES frames, which are the same for an image: hence the sum of the kernel over them.
    """

    config: QwenTower
    bias: bool = False

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        c = self.config
        initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2)
        kernel = self.param("kernel", initializer, (FRAMES, c.patch_features, c.width))
        channels = patches.reshape(*patches.shape[:-1], 3, -1).astype(jnp.float32) / 255.0
        pixels = (channels - c.PIXEL_MEAN[:, None]) / c.PIXEL_STD[:, None]
        dtype = jnp.dtype(c.dtype)
        x = pixels.reshape(patches.shape).astype(dtype) @ kernel.sum(0).astype(dtype)
        return x + self.param("bias", nn.initializers.zeros, (c.width,)).astype(dtype) if self.bias else x


class VisionBlock(nn.Module):
    """Pre-norm transformer layer: windowed or full attention, SwiGLU, biases everywhere."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array, is_full: jax.Array | bool
    ) -> jax.Array:
        """x [B, W, S, width], rope of [B, W, S] (see `rope_table`), mask [B, W, S] -> [B, W, S, width]."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        heads = (c.heads, c.width // c.heads)
        shape, x = x.shape, x.reshape(-1, c.width)
        with jax.named_scope("attention"):
            h = RMSNorm(NORM_EPS, name="attention_norm")(x)
            denses = [nn.DenseGeneral(heads, dtype=dtype, name=name) for name in ("q", "k", "v")]
            q, k, v = (dense(h).reshape(*shape[:-1], *heads) for dense in denses)
            out = attend(c, decoder.rotate(q, rope), decoder.rotate(k, rope), v, mask, is_full)
            x = x + nn.DenseGeneral(c.width, axis=(-2, -1), dtype=dtype, name="o")(out.reshape(-1, *heads))
        with jax.named_scope("mlp"):
            h = RMSNorm(NORM_EPS, name="mlp_norm")(x)
            gate, up = (nn.Dense(c.mlp, dtype=dtype, name=name)(h) for name in ("gate", "up"))
            return (x + nn.Dense(c.width, dtype=dtype, name="down")(nn.silu(gate) * up)).reshape(shape)


def attend(
    config: VisionConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, is_full: jax.Array | bool
) -> jax.Array:
    """Attention of q, k, v [B, W, S, N, H] within each window or, if `is_full`, over all of them; only one runs."""

    def windowed(q, k, v, mask):
        logits = jnp.einsum("bwqnh,bwknh->bwnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        logits = jnp.where(mask[:, :, None, None], logits, MASKED)
        return jnp.einsum("bwnqk,bwknh->bwqnh", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)

    def full(*arrays):
        arrays = tuple(x.reshape(x.shape[0], 1, -1, *x.shape[3:]) for x in arrays)
        slots = q.shape[1] * q.shape[2]
        return few_at_a_time(windowed, arrays, config.heads * slots**2).reshape(q.shape)

    if q.shape[1] == 1 or not config.full_attention_layers:
        return windowed(q, k, v, mask)

    def either(q, k, v, mask, is_full):
        return jax.lax.cond(is_full, full, windowed, q, k, v, mask)

    # A conditional keeps the residuals of both branches for the backward pass: without this every window layer would
    # hold room for the attention weights of a full one.
    either = jax.checkpoint(either) if config.remat == "none" else either
    return either(q, k, v, mask, is_full)


def rope_table(config: QwenTower, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., 1, H/2] of positions [..., 2]: half of them for row and column each."""
    quarter = config.width // config.heads // 4
    frequency = ROPE_THETA ** (-np.arange(quarter, dtype=np.float32) / quarter)
    angles = (positions[..., None].astype(jnp.float32) * frequency).reshape(*positions.shape[:-1], 1, 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


def full_layers(config: VisionConfig) -> np.ndarray:
    """[L] bool: which layers attend to the whole image."""
    return np.isin(np.arange(config.layers), config.full_attention_layers)


def init(config: VisionConfig, rng: jax.Array) -> Params:
    """Random parameters of the tower: `patch`, and `layers` stacked over L."""
    patch_key, layer_key = jax.random.split(rng)
    patches = jnp.zeros((1, 1, 1, config.patch_features), jnp.uint8)
    x = jnp.zeros((1, 1, 1, config.width), jnp.dtype(config.dtype))
    rope = rope_table(config, jnp.zeros((1, 1, 1, 2)))
    block, mask = VisionBlock(config), jnp.ones((1, 1, 1), bool)
    keys = jax.random.split(layer_key, config.layers)
    return {
        "patch": PatchEmbedding(config).init(patch_key, patches)["params"],
        "layers": jax.vmap(lambda key: block.init(key, x, rope, mask, False)["params"])(keys),
    }


def merger(config: QwenTower, width: int) -> Projector:
    """The merger's two layers, from features of MERGE^2 joined patches to the decoder's `width`."""
    return Projector(MERGE**2 * config.width, width, config.dtype)


def init_merger(config: VisionConfig, width: int, rng: jax.Array) -> Params:
    """Random parameters of the merger to the decoder's `width`: `norm` over patches, `first`, `second`."""
    merged = jnp.zeros((1, MERGE**2 * config.width))
    return {"norm": {"scale": jnp.ones(config.width)}} | merger(config, width).init(rng, merged)["params"]


@jax.named_scope("vision_tower")
def encode(config: VisionConfig, params: Params, images: QwenImages) -> jax.Array:
    """The tower's output [B, W, S, width], in slots; empty slots hold finite noise that no other slot has seen."""
    x = PatchEmbedding(config).apply({"params": params["patch"]}, images.patches)
    rope = rope_table(config, images.positions)
    block = VisionBlock(config)

    def layer(x, inputs):
        weights, is_full = inputs
        return block.apply({"params": weights}, constrain(x, "rows"), rope, images.mask, is_full), None

    x, _ = jax.lax.scan(decoder.remat(layer, config.remat), x, (params["layers"], full_layers(config)))
    return x


@jax.named_scope("merger")
def merged_features(config: VisionConfig, params: Params, images: QwenImages, x: jax.Array) -> jax.Array:
    """The tower's output [B, W, S, width] -> features [B, I, 4 * width]: normed and joined; `params`: the merger's."""
    return joined(config, images, RMSNorm(NORM_EPS).apply({"params": params["norm"]}, x))


def joined(config: QwenTower, images: QwenImages, x: jax.Array) -> jax.Array:
    """Slots [B, W, S, width] -> tokens [B, I, 4 * width] in raster order, four patches joined.

    Only the I tokens leave the slots, so that the merger's matrices and the decoder see no padding slots. Tokens
    that an image does not have are 0.
    """
    merged = x.reshape(x.shape[0], -1, MERGE**2 * config.width)
    tokens = jnp.take_along_axis(merged, images.back[..., None], axis=1)
    return jnp.where(images.token_mask[..., None], tokens, 0)
