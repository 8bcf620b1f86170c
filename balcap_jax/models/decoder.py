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

from balcap_jax.models import attention, deepstack, kernels
from balcap_jax.models.packing import UNIT, Places
from balcap_jax.models.seats import Seats
from balcap_jax.parallel.sharding import batch_parts, constrain

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
    PATCHES_PER_TOKEN: ClassVar[int] = 1

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
    that sum to head_size / 2, and positions carry a trailing axis of 3. The frequencies of an axis lie side by side
    (Qwen2.5-VL), or those of the three axes take turns (Qwen3-VL: `mrope_interleaved`). `qk_norm`: RMS norms over the
    features of each query and key head (Qwen3). `remat`: none | dots | full. `attention`: one of kernels.KINDS, in
    prefill and update.
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
    mrope_interleaved: bool = False
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
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
    """Keys and values of all branches, [L, Q, places, M, R, H]; written position by position.

    Q is the number of parts that a batch is in (sharding.batch_parts), each with B / Q * G places. What decodes lies in
    the first places: B' / Q lines of G' branches, a line's side by side.
    """

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
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)
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
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
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
        if config.mrope_interleaved:
            # Rows and columns have every third frequency up to their count; all others are time's.
            turn, number = np.arange(half) % 3, np.arange(half) // 3
            axis = np.where(number < np.array(config.mrope_section)[turn], turn, 0)
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
      x: [B, P, D] input embeddings, or [B, P, (1 + n) D], see `deepstack.split`.
      mask: [B, P] bool; positions: [B, P] or [B, P, 3] int32.

    Returns:
      The normed hidden state [B, D] of each prompt's last real token, and the Prefix.
    """
    block = Block(config)
    rope = rope_table(config, positions)
    x, deepen = deepstack.split(x, config.width)

    def layer(x, inputs):
        weights, number = inputs
        q, k, v = block.apply({"params": weights}, x, rope, method="qkv")
        attended = kernels.causal(config.attention, q, k, v, mask)
        return deepen(block.apply({"params": weights}, x, attended, method="output"), number), (k, v)

    x, (keys, values) = jax.lax.scan(layer, x, (params["layers"], np.arange(config.layers)))
    last = jnp.take_along_axis(x, last_real(mask)[:, None, None], axis=1)[:, 0]
    return _final_norm(config, params, last), Prefix(keys, values, mask, _next_position(config, mask, positions))


def empty_branch(config: DecoderConfig, batch: int, group: int, length: int) -> Branch:
    """An unwritten Branch for `length` response tokens, in whole blocks."""
    parts = batch_parts(batch)
    span = attention.block_of(length)
    length = -(-length // span) * span
    shape = (config.layers, parts, batch // parts * group, config.kv_heads, length, config.head_size)
    empty = jnp.zeros(shape, jnp.dtype(config.dtype))
    return Branch(*(constrain(empty, None, "batch", None, "heads") for _ in Branch._fields))


def decode(
    config: DecoderConfig,
    params: Params,
    prefix: Prefix,
    branch: Branch,
    x: jax.Array,
    t: jax.Array | Seats,
) -> tuple[jax.Array, Branch]:
    """Runs response token `t` of every line of branches: x [B', G', D] -> normed hidden [B', G', D], extended branch.

    The layer scan only reads the cache, as many blocks of it as hold the positions before t. One write after the scan
    adds the keys and values of all layers, in place. A write inside the scan would copy the cache at each layer, or out
    of the scan at each token.

    With `Seats` the branches are rows, B' of one each, and the lines of the prefix are those of the seats.
    """
    block = Block(config)
    lines, group = x.shape[:2]
    _, parts, _, kv_heads, length, size = branch.keys.shape
    span = attention.block_of(length)
    seats = t if isinstance(t, Seats) else None
    if seats is None:
        start, at, first, blocks = prefix.next_position + t, t, 0, -(-t // span)
    else:
        start, at = seats.to_each(prefix.next_position) + seats.t, seats.step % length
        first, blocks = seats.written(length, span)
    blocks = blocks if length > span else None
    rope = _response_rope(config, start, jnp.zeros(1, jnp.int32))

    def layer(x, inputs):
        weights, prefix_k, prefix_v, number = inputs
        q, k, v = block.apply({"params": weights}, x, rope, method="qkv")

        def read(index):
            place = (first + index) * span % length
            start, sizes = (number, 0, 0, 0, place, 0), (1, parts, lines // parts * group, kv_heads, span, size)
            found = (jax.lax.dynamic_slice(array, start, sizes) for array in branch)
            keys, values = (array.reshape(lines, group, kv_heads, span, size) for array in found)
            positions = place + jnp.arange(span)
            return keys, values, positions < t if seats is None else seats.counts(positions, length)

        own = k[..., 0, :], v[..., 0, :]
        attended = attention.of_one_token(q[:, :, 0], prefix_k, prefix_v, prefix.mask, *own, read, blocks, seats)
        return block.apply({"params": weights}, x, attended[:, :, None], method="output"), (k, v)

    inputs = (params["layers"], prefix.keys, prefix.values, jnp.arange(config.layers))
    x, new = jax.lax.scan(layer, x[:, :, None], inputs)
    new = (array.reshape(config.layers, parts, lines // parts * group, *array.shape[3:]) for array in new)
    at = (0, 0, 0, 0, at, 0)
    branch = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, at), branch, Branch(*new))
    return _final_norm(config, params, x[:, :, 0]), branch


def regroup(
    prefix: Prefix, branch: Branch, lines: jax.Array, places: jax.Array, written: jax.Array
) -> tuple[Prefix, Branch]:
    """Brings branches to other places of their part: those that decode next come to lie in the first ones.

    Args:
      lines: [Q, new lines] for each new line a line of now, by its number in the part, that has the same prompt.
      places: [Q, new places] for each new place the place where its branch is now.
      written: positions of the cache that are written. Others are not moved; 0 moves none.

    Returns:
      The prefix of the new lines, and the branch.
    """
    parts, count = lines.shape

    def take(array: jax.Array, axis: int) -> jax.Array:
        of_parts = array.reshape(*array.shape[:axis], parts, -1, *array.shape[axis + 1 :])
        found = jax.vmap(lambda x, i: jnp.take(x, i, axis), (axis, 0), axis)(of_parts, lines)
        found = found.reshape(*array.shape[:axis], parts * count, *array.shape[axis + 1 :])
        # Of what is stacked by layer, the heads are split too.
        return constrain(found, *((None, "batch", "heads") if axis else ("batch",)))

    prefix = Prefix(take(prefix.keys, 1), take(prefix.values, 1), take(prefix.mask, 0), take(prefix.next_position, 0))
    layers, length = branch.keys.shape[0], branch.keys.shape[4]
    span = attention.block_of(length)

    def move(turn: jax.Array, array: jax.Array) -> jax.Array:
        """Layer by layer and block by block, so that no second cache exists."""
        start = (turn % layers, 0, 0, 0, turn // layers * span, 0)
        old = jax.lax.dynamic_slice(array, start, (1, *array.shape[1:4], span, array.shape[5]))[0]
        new = jax.vmap(lambda x, i: jnp.take(x, i, axis=0))(old, places)[None]
        return jax.lax.dynamic_update_slice(array, constrain(new, None, "batch", None, "heads"), start)

    turns = layers * -(-written // span)
    return prefix, Branch(*(jax.lax.fori_loop(0, turns, move, array) for array in branch))


def forward(
    config: DecoderConfig, params: Params, x: jax.Array, mask: jax.Array, positions: jax.Array, responses: jax.Array
) -> jax.Array:
    """Runs prompts and their responses side by side; each prompt runs once.

    Args:
      x: [B, P, D] prompt embeddings, or [B, P, (1 + n) D], see `deepstack.split`.
      mask: [B, P]; positions: [B, P] or [B, P, 3].
      responses: [B, G, R, D] response embeddings, padding (if any) at the end.

    Returns:
      Normed hidden states [B, G, R, D] that predict response tokens 0..R-1: the prompt's last state, then those of
      response tokens 0..R-2.
    """
    length = responses.shape[2]
    rope = _response_rope(config, _next_position(config, mask, positions), jnp.arange(length))

    def attend(q, prefix_k, prefix_v, k, v):
        return kernels.over_prompt(config.attention, q, prefix_k, prefix_v, mask, k, v)

    x, y = _side_by_side(config, params, x, mask, positions, responses, rope, attend)
    last = jnp.take_along_axis(x, last_real(mask)[:, None, None], axis=1)
    first = jnp.broadcast_to(last[:, :, None], (y.shape[0], y.shape[1], 1, y.shape[3]))
    return _final_norm(config, params, jnp.concatenate([first, y[:, :, :-1]], axis=2))


def forward_packed(
    config: DecoderConfig,
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    responses: jax.Array,
    at: Places,
    length: int,
) -> jax.Array:
    """`forward` of packed responses, of at most `length` tokens each.

    Args:
      x, mask, positions: as of `forward`; the prompts of each of the Q parts lie together.
      responses: [Q, S, D] response embeddings at the places `at`.

    Returns:
      Normed hidden states [Q, S, D] that predict the token of each place.
    """
    parts, size, width = responses.shape
    start = _next_position(config, mask, positions).reshape(parts, -1)
    offset = at.chunk[..., None] * UNIT + jnp.arange(UNIT)  # [Q, K, UNIT]
    where = (jnp.take_along_axis(start, at.prompt, axis=1)[..., None] + offset).reshape(parts, size)
    if config.mrope_section:
        where = jnp.broadcast_to(where[..., None], (*where.shape, 3))

    def attend(q, prefix_k, prefix_v, k, v):
        return kernels.over_prompt_packed(config.attention, q, prefix_k, prefix_v, mask, k, v, at, length)

    x, y = _side_by_side(config, params, x, mask, positions, responses, rope_table(config, where), attend)
    last = jnp.take_along_axis(x, last_real(mask)[:, None, None], axis=1).reshape(parts, -1, width)
    # A unit's first token is predicted by what lies before it, that of a response by its prompt.
    before = jnp.pad(y, [(0, 0), (1, 0), (0, 0)])[:, :-1].reshape(parts, -1, UNIT, width)
    first = jnp.where(
        (at.chunk == 0)[..., None], jnp.take_along_axis(last, at.prompt[..., None], axis=1), before[:, :, 0]
    )
    hidden = before.at[:, :, 0].set(first).reshape(parts, size, width)
    return _final_norm(config, params, hidden)


def _side_by_side(
    config: DecoderConfig,
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    y: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    attend: Callable[..., jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The last layer's outputs of prompts x [B, P, D] and of responses y [..., S, D] with the table `rope`.

    attend: (q, prefix_k, prefix_v, k, v) -> what the responses read, of the shape of q.
    """
    block, prompt_rope = Block(config), rope_table(config, positions)
    x, deepen = deepstack.split(x, config.width)

    def layer(carry, inputs):
        (x, y), (weights, number) = carry, inputs
        variables = {"params": weights}
        prefix_q, prefix_k, prefix_v = block.apply(variables, x, prompt_rope, method="qkv")
        q, k, v = block.apply(variables, y, rope, method="qkv")
        attended = attend(q, prefix_k, prefix_v, k, v)
        prompt_attended = kernels.causal(config.attention, prefix_q, prefix_k, prefix_v, mask)
        x = block.apply(variables, x, prompt_attended, method="output")
        return (deepen(x, number), block.apply(variables, y, attended, method="output")), None

    layers = (params["layers"], np.arange(config.layers))
    return jax.lax.scan(remat(layer, config.remat), (x, y), layers)[0]


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
