"""CLIP's vision transformer: uint8 pixels in, patch features out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from balcap_jax.models import decoder
from balcap_jax.models.decoder import Params, TowerSizes
from balcap_jax.models.image_attention import few_at_a_time
from balcap_jax.models.prompting import PIXEL_MEAN, PIXEL_STD
from balcap_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerSizes):
    """Sizes of the tower. `feature_layer` counts hidden states as LLaVA does: -2 is the input of the last layer.

    `keep_unused` gives the layers behind `feature_layer` and the last norm a place in the parameters, though nothing
    runs them: the export of a converted checkpoint then has every tensor that the import had.
    """

    image_size: int
    feature_layer: int = -2
    norm_eps: float = 1e-5
    keep_unused: bool = False

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def used_layers(self) -> int:
        """Layers that the features depend on; later ones are never run."""
        return self.layers + 1 + self.feature_layer if self.feature_layer < 0 else self.feature_layer


class VisionBlock(nn.Module):
    """Pre-norm transformer layer with CLIP's quick GELU."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        size = c.width // c.heads
        with jax.named_scope("attention"):
            h = nn.LayerNorm(epsilon=c.norm_eps, dtype=dtype, name="attention_norm")(x)
            q, k, v = (nn.DenseGeneral((c.heads, size), dtype=dtype, name=name)(h) for name in ("q", "k", "v"))
            out = few_at_a_time(_attend, (q, k, v), c.heads * x.shape[1] ** 2)
            x = x + nn.DenseGeneral(c.width, axis=(-2, -1), dtype=dtype, name="o")(out)
        with jax.named_scope("mlp"):
            h = nn.LayerNorm(epsilon=c.norm_eps, dtype=dtype, name="mlp_norm")(x)
            h = nn.Dense(c.mlp, dtype=dtype, name="up")(h)
            return x + nn.Dense(c.width, dtype=dtype, name="down")(h * nn.sigmoid(1.702 * h))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of q, k, v [B, S, N, H] over the whole image."""
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(logits).astype(v.dtype), v)


class Patches(nn.Module):
    """Patch embedding, class token, positions and the first norm: uint8 [B, S, S, 3] -> [B, 1 + I, width]."""

    config: VisionConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        pixels = (images.astype(jnp.float32) / 255.0 - PIXEL_MEAN) / PIXEL_STD
        side = c.image_size // c.patch_size
        grid = pixels.reshape(-1, side, c.patch_size, side, c.patch_size, 3)
        grid = grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side, c.patch_size**2 * 3)
        x = nn.Dense(c.width, use_bias=False, dtype=dtype, name="patch")(grid.astype(dtype))
        token = self.param("class_token", nn.initializers.normal(c.width**-0.5), (c.width,))
        x = jnp.concatenate([jnp.broadcast_to(token.astype(dtype), (x.shape[0], 1, c.width)), x], axis=1)
        # As large as a patch's own contribution: its place must be as plain as its content, or a tower trained from
        # scratch needs thousands of updates before it can tell places apart.
        positions = self.param("positions", nn.initializers.normal(1.0), (side * side + 1, c.width))
        return nn.LayerNorm(epsilon=c.norm_eps, dtype=dtype, name="norm")(x + positions.astype(dtype))


def init(config: VisionConfig, rng: jax.Array) -> Params:
    """Random parameters of the tower: `patches`, `layers` stacked over the used layers, and `unused` where kept."""
    patch_key, layer_key = jax.random.split(rng)
    images = jnp.zeros((1, config.image_size, config.image_size, 3), jnp.uint8)
    x = jnp.zeros((1, config.image_tokens + 1, config.width), jnp.dtype(config.dtype))
    block = VisionBlock(config)

    def layers(key: jax.Array, count: int) -> Params:
        return jax.vmap(lambda key: block.init(key, x)["params"])(jax.random.split(key, count))

    params = {
        "patches": Patches(config).init(patch_key, images)["params"],
        "layers": layers(layer_key, config.used_layers),
    }
    if config.keep_unused:
        params["unused"] = {"norm": {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)}}
        if config.used_layers < config.layers:
            params["unused"]["layers"] = layers(jax.random.fold_in(layer_key, 1), config.layers - config.used_layers)
    return params


@jax.named_scope("vision_tower")
def encode(config: VisionConfig, params: Params, images: jax.Array) -> jax.Array:
    """Image features of `feature_layer` without the class token: uint8 [B, S, S, 3] -> [B, I, width]."""
    x = Patches(config).apply({"params": params["patches"]}, images)
    block = VisionBlock(config)

    def layer(x, weights):
        return block.apply({"params": weights}, constrain(x, "rows")), None

    x, _ = jax.lax.scan(decoder.remat(layer, config.remat), x, params["layers"])
    return x[:, 1:]
