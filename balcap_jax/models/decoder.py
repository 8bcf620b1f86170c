"""The language decoder of every family (Llama and Qwen2 shape), with the prompt shared by the G samples of a group.

A Linen module holds one layer; the functions below scan it over the stacked layer parameters. A prompt runs once:
`prefill` keeps its keys and values as the un-repeated `Prefix`. `decode` extends the per-sample `Branch` in place.
`forward` runs prompt and responses side by side for the update. All three use the same layer and the same attention.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models import attention, kernels
from balcap_jax.parallel.sharding import constrain

Params = dict[str, Any]


class Sizes:
    """Base of a configuration whose fields are fields of the config group `model`, PREFIXED ones with "vision_"."""

    PREFIXED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, model: Mapping[str, Any], **known: Any) -> Self:
        """The sizes of `model`, `known` ones in place of its own. Raises KeyError for a field that it lacks."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in known]
        values = {name: model[f"vision_{name}" if name in cls.PREFIXED else name] for name in names}
        # Lists come from JSON; a configuration must be hashable.
        return cls(**known, **{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerSizes(Sizes):
    """The sizes of every family's vision tower. `remat`: none | dots | full."""

    PREFIXED: ClassVar = ("width", "layers", "heads", "mlp")

    patch_size: int
    width: int
    layers: int
    heads: int
    mlp: int
    dtype: str = "float32"
    remat: str = "none"


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Sizes):
    """Sizes of the decoder.

    `mrope_section` empty means ordinary rotary positions; else three counts of frequencies (temporal, height, width)
    that sum to head_size / 2, and positions carry a trailing axis of 3 (Qwen2.5-VL). `remat`: none | dots | full.
    `attention`: one of kernels.KINDS, in prefill and update.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_embeddings: bool = False
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"


class Prefix(NamedTuple):
    """What the branches need of the prompt. keys, values [L, B, M, P, H]; mask [B, P]; next_position [B]."""

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    next_position: jax.Array


class Branch(NamedTuple):
    """Keys and values of the G samples of each prompt, [L, B, G, M, R, H]; written position by position."""

    keys: jax.Array
    values: jax.Array


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 whatever the compute dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        # Llama multiplies after the cast back (modeling_llama.LlamaRMSNorm); parity in bf16 depends on it.
        return scale.astype(x.dtype) * x32.astype(x.dtype)


class Block(nn.Module):
    """One decoder layer, cut around its attention: `qkv` before, `output` after."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.attention_norm = RMSNorm(c.norm_eps)
        self.q = nn.DenseGeneral((c.heads, c.head_size), use_bias=c.qkv_bias, dtype=dtype)
        self.k = nn.DenseGeneral((c.kv_heads, c.head_size), use_bias=c.qkv_bias, dtype=dtype)
        self.v = nn.DenseGeneral((c.kv_heads, c.head_size), use_bias=c.qkv_bias, dtype=dtype)
        # Scaled down by the number of summands of the residual stream (GPT-2, Radford et al. 2019).
        residual = nn.initializers.variance_scaling(0.5 / c.layers, "fan_in", "truncated_normal")
        self.o = nn.DenseGeneral(c.width, axis=(-2, -1), use_bias=False, dtype=dtype, kernel_init=residual)
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.gate = nn.Dense(c.mlp, use_bias=False, dtype=dtype)
        self.up = nn.Dense(c.mlp, use_bias=False, dtype=dtype)
        self.down = nn.Dense(c.width, use_bias=False, dtype=dtype, kernel_init=residual)

    @jax.named_scope("attention")
    def qkv(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., S, D] -> q [..., S, N, H], k and v [..., M, S, H] (head-major, as the caches keep them)."""
        # Dense layers see [tokens, D]: on CPU the weight gradient of a matmul with one token axis is 1.5x faster than
        # with three, elsewhere it is the same program.
        h = self.attention_norm(constrain(x, "rows")).reshape(-1, x.shape[-1])

        def project(dense: nn.Module) -> jax.Array:
            # First where the weight is, then where the sequences are: with the latter alone, XLA would move the weight.
            y = constrain(dense(h), "rows", "heads", "head_size").reshape(*x.shape[:-1], -1, self.config.head_size)
            return constrain(y, "batch", *(None,) * (x.ndim - 2), "heads")

        q, k, v = project(self.q), project(self.k), project(self.v)
        return rotate(q, rope), rotate(k, rope).swapaxes(-3, -2), v.swapaxes(-3, -2)

    def output(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """x [..., S, D] and attention output [..., S, N, H] -> the layer's output [..., S, D]."""
        shape = x.shape
        with jax.named_scope("attention"):
            attended = constrain(attended, "rows", *(None,) * (x.ndim - 2), "heads", "head_size")
            x = constrain(x + self.o(attended.reshape(-1, *attended.shape[-2:])).reshape(shape), "rows")
        with jax.named_scope("mlp"):
            h = self.mlp_norm(x).reshape(-1, shape[-1])
            return constrain(x + self.down(nn.silu(self.gate(h)) * self.up(h)).reshape(shape), "rows")

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Touches every parameter once, for the initialisation alone."""
        q, _, _ = self.qkv(x, rope)
        return self.output(x, q)


def rope_table(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., S, 1, H/2] in fp32 of `positions` [..., S] (or [..., S, 3] with M-RoPE)."""
    half = config.head_size // 2
    frequency = config.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
    positions = positions.astype(jnp.float32)
    if config.mrope_section:
        axis = np.repeat(np.arange(3), config.mrope_section)
        angles = positions[..., axis] * frequency
    else:
        angles = positions[..., None] * frequency
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the halves of x [..., S, N, H] by the table's angles."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def init(config: DecoderConfig, rng: jax.Array) -> Params:
    """Random parameters: `embed` [V, D], `layers` stacked over L, `norm`, and `head` [D, V] unless tied."""
    embed_key, layer_key, head_key = jax.random.split(rng, 3)
    block = Block(config)
    x = jnp.zeros((1, 1, config.width), jnp.dtype(config.dtype))
    positions = jnp.zeros((1, 1, 3) if config.mrope_section else (1, 1))
    rope = rope_table(config, positions)
    layers = jax.vmap(lambda key: block.init(key, x, rope)["params"])(jax.random.split(layer_key, config.layers))
    # Token embeddings start as large as image embeddings, which share the residual stream with them; tied ones are
    # also the output kernel and must give logits of order 1.
    scale = config.width**-0.5 if config.tied_embeddings else 1.0
    params = {
        "embed": jax.random.normal(embed_key, (config.vocab, config.width)) * scale,
        "layers": layers,
        "norm": {"scale": jnp.ones(config.width)},
    }
    if not config.tied_embeddings:
        params["head"] = jax.random.normal(head_key, (config.width, config.vocab)) * config.width**-0.5
    return params


@jax.named_scope("embed")
def embed(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """tokens [...] -> [..., D] in the compute dtype."""
    return constrain(params["embed"].astype(jnp.dtype(config.dtype))[tokens], "rows")


@jax.named_scope("logits")
def logits(config: DecoderConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Normed hidden states [..., D] -> logits [..., V] in fp32.

    The product takes tied embeddings as they are stored, [V, D]: a transposed copy of them, and one of their gradient,
    would be the largest arrays of a small model's update.
    """
    if config.tied_embeddings:
        kernel, spec = params["embed"], "...d,vd->...v"
    else:
        kernel, spec = params["head"], "...d,dv->...v"
    kernel = kernel.astype(jnp.dtype(config.dtype))
    return jnp.einsum(spec, hidden, kernel, preferred_element_type=jnp.float32)


def split_output(params: Params) -> Params:
    """The output projection, its vocabulary split over the devices that will receive the hidden states."""
    if "head" in params:
        return {"head": constrain(params["head"], None, "output_vocab")}
    return {"embed": constrain(params["embed"], "output_vocab")}


def last_real(mask: jax.Array) -> jax.Array:
    """Index [B] of the last real token of each row of `mask` [B, P], wherever the padding is."""
    return mask.shape[-1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)


def prefill(
    config: DecoderConfig, params: Params, x: jax.Array, mask: jax.Array, positions: jax.Array
) -> tuple[jax.Array, Prefix]:
    """Runs the prompt once.

    Args:
      x: [B, P, D] input embeddings; mask: [B, P] bool; positions: [B, P] or [B, P, 3] int32.

    Returns:
      The normed hidden state [B, D] of each prompt's last real token, and the Prefix.
    """
    block = Block(config)
    rope = rope_table(config, positions)

    def layer(x, weights):
        q, k, v = block.apply({"params": weights}, x, rope, method="qkv")
        attended = kernels.causal(config.attention, q, k, v, mask)
        return block.apply({"params": weights}, x, attended, method="output"), (k, v)

    x, (keys, values) = jax.lax.scan(layer, x, params["layers"])
    last = jnp.take_along_axis(x, last_real(mask)[:, None, None], axis=1)[:, 0]
    return _final_norm(config, params, last), Prefix(keys, values, mask, _next_position(config, mask, positions))


def empty_branch(config: DecoderConfig, batch: int, group: int, length: int) -> Branch:
    """An unwritten Branch for `length` response tokens."""
    shape = (config.layers, batch, group, config.kv_heads, length, config.head_size)
    empty = jnp.zeros(shape, jnp.dtype(config.dtype))
    return Branch(*(constrain(empty, None, "batch", None, "heads") for _ in Branch._fields))


def decode(
    config: DecoderConfig, params: Params, prefix: Prefix, branch: Branch, x: jax.Array, t: jax.Array
) -> tuple[jax.Array, Branch]:
    """Runs response token `t` of every sample: x [B, G, D] -> normed hidden [B, G, D], and the extended branch.

    The layer scan only reads the cache. One write after the scan adds the keys and values of all layers, in place.
    A write inside the scan would copy the cache at each layer, or out of the scan at each token.
    """
    block = Block(config)
    rope = _response_rope(config, prefix.next_position, t[None])
    earlier = (jnp.arange(branch.keys.shape[-2]) < t)[None]

    def layer(x, inputs):
        weights, prefix_k, prefix_v, branch_k, branch_v = inputs
        q, k, v = block.apply({"params": weights}, x, rope, method="qkv")
        attended = attention.prefix_and_branch(
            q, prefix_k, prefix_v, prefix.mask, branch_k, branch_v, earlier, self_kv=(k, v)
        )
        return block.apply({"params": weights}, x, attended, method="output"), (k, v)

    x, (keys, values) = jax.lax.scan(layer, x[:, :, None], (params["layers"], prefix.keys, prefix.values, *branch))
    at = (0, 0, 0, 0, t, 0)
    branch = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, at), branch, Branch(keys, values))
    return _final_norm(config, params, x[:, :, 0]), branch


def forward(
    config: DecoderConfig, params: Params, x: jax.Array, mask: jax.Array, positions: jax.Array, responses: jax.Array
) -> jax.Array:
    """Runs prompts and their responses side by side; each prompt runs once.

    Args:
      x: [B, P, D] prompt embeddings; mask: [B, P]; positions: [B, P] or [B, P, 3].
      responses: [B, G, R, D] response embeddings, padding (if any) at the end.

    Returns:
      Normed hidden states [B, G, R, D] that predict response tokens 0..R-1: the prompt's last state, then those of
      response tokens 0..R-2.
    """
    block = Block(config)
    rope = rope_table(config, positions)
    length = responses.shape[2]
    response_rope = _response_rope(config, _next_position(config, mask, positions), jnp.arange(length))

    def layer(carry, weights):
        x, y = carry
        variables = {"params": weights}
        q, k, v = block.apply(variables, x, rope, method="qkv")
        branch_q, branch_k, branch_v = block.apply(variables, y, response_rope, method="qkv")
        attended = kernels.over_prompt(config.attention, branch_q, k, v, mask, branch_k, branch_v)
        x = block.apply(variables, x, kernels.causal(config.attention, q, k, v, mask), method="output")
        return (x, block.apply(variables, y, attended, method="output")), None

    (x, y), _ = jax.lax.scan(remat(layer, config.remat), (x, responses), params["layers"])
    last = jnp.take_along_axis(x, last_real(mask)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, :, None], (y.shape[0], y.shape[1], 1, y.shape[3]))
    return _final_norm(config, params, jnp.concatenate([first, y[:, :, :-1]], axis=2))


def _final_norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    return RMSNorm(config.norm_eps).apply({"params": params["norm"]}, x)


def _next_position(config: DecoderConfig, mask: jax.Array, positions: jax.Array) -> jax.Array:
    """[B]: one past the largest position of the prompt (Qwen2.5-VL: over all three axes)."""
    real = mask[..., None] if config.mrope_section else mask
    return jnp.where(real, positions, 0).reshape(mask.shape[0], -1).max(-1) + 1


def _response_rope(config: DecoderConfig, start: jax.Array, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Table for response tokens at start [B] + offsets [T], shaped to broadcast against [B, G, T, N, H/2]."""
    positions = (start[:, None] + offsets)[:, None]
    if config.mrope_section:
        positions = jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
    return rope_table(config, positions)


def remat(layer: Callable, kind: str) -> Callable:
    """`layer` with its activations recomputed in the backward pass; `kind`: none | dots (kept) | full."""
    if kind == "none":
        return layer
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if kind == "dots" else None
    return jax.checkpoint(layer, policy=policy)
