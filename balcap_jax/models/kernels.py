"""Attention by library kernels where whole sequences meet, in prefill and update, with `attention` as the reference.

A kernel returns one softmax and not its denominator, so one array holds the prompt's keys and then the branch's own.
It exists per layer and only while that runs: a few MB, where the logits that a kernel never stores take hundreds.
Token-by-token decoding keeps the two-part form of `attention`, which reads the prompt's keys once for all G branches.
"""

import functools

import jax
import jax.numpy as jnp

from balcap_jax.cli.errors import UserError
from balcap_jax.models import attention, packed_attention
from balcap_jax.models.packing import Places, pack, unpack
from balcap_jax.parallel import sharding
from balcap_jax.parallel.sharding import constrain

KINDS = ("auto", "einsum", "dot_product", "splash")
LANES = 128  # The kernel's blocks and its sequences are multiples of it.


def resolve(kind: str, head_size: int, dtype: str, *, packed: bool = False) -> str:
    """The kernel that `auto` means on the program's devices: splash on TPU, cuDNN's on GPU, else einsum.

    Packed responses are einsum on TPU: the kernel meets the padding again, as much attention as the padded update has.

    Raises:
      UserError: `kind` is splash, and on a TPU it does not take heads of this size.
    """
    platform = sharding.platform()
    if kind == "auto":
        if platform == "tpu":
            return "einsum" if packed or head_size % LANES else "splash"
        return "dot_product" if platform in ("gpu", "cuda") and dtype in ("bfloat16", "float16") else "einsum"
    if kind == "splash" and platform == "tpu" and head_size % LANES:
        raise UserError(
            f"model.attention = splash takes heads of a multiple of {LANES} features, here they have {head_size}; "
            "choose einsum"
        )
    return kind


def causal(kind: str, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attention.causal` by the kernel `kind`. The outputs of padding queries differ; no real token sees them.

    q [B, P, N, H]; k, v [B, M, P, H]; mask [B, P] bool -> [B, P, N, H].
    """
    kind = resolve(kind, q.shape[-1], q.dtype.name)
    if kind == "einsum":
        return attention.causal(q, k, v, mask)
    if kind == "dot_product":
        length = q.shape[1]
        # A padding query sees itself: a row without any key has no softmax.
        allowed = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, :] | jnp.eye(length, dtype=bool)
        return _dot_product(q, k, v, allowed)
    segments = _padded(mask, 1)
    q, k, v = (_padded(x, axis)[:, None] for x, axis in ((q, 1), (k, 2), (v, 2)))
    return _splash(q, k, v, segments, segments, offset=0)[:, 0, : mask.shape[1]]


def over_prompt(
    kind: str,
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    branch_k: jax.Array,
    branch_v: jax.Array,
) -> jax.Array:
    """`attention.prefix_and_branch` of whole branches, causal in themselves, by the kernel `kind`.

    q [B, G, R, N, H]; prefix_k, prefix_v [B, M, P, H]; prefix_mask [B, P] bool; branch_k, branch_v [B, G, M, R, H] ->
    [B, G, R, N, H].
    """
    kind = resolve(kind, q.shape[-1], q.dtype.name)
    batch, group, length = q.shape[:3]
    if kind == "einsum":
        visible = jnp.tril(jnp.ones((length, length), bool))
        return attention.prefix_and_branch(q, prefix_k, prefix_v, prefix_mask, branch_k, branch_v, visible)

    def joined(prefix: jax.Array, branch: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(prefix[:, None], (batch, group, *prefix.shape[1:]))
        return jnp.concatenate([repeated, branch], axis=-2)

    if kind == "dot_product":
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (joined(prefix_k, branch_k), joined(prefix_v, branch_v)))
        sees_prefix = jnp.broadcast_to(prefix_mask[:, None, None], (batch, group, length, prefix_mask.shape[1]))
        sees_branch = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, group, length, length))
        allowed = jnp.concatenate([sees_prefix, sees_branch], -1).reshape(batch * group, length, -1)
        return _dot_product(q.reshape(-1, *q.shape[2:]), k, v, allowed).reshape(q.shape)
    prefix_k, prefix_v, branch_k, branch_v = (_padded(x, -2) for x in (prefix_k, prefix_v, branch_k, branch_v))
    prefix_segments = _padded(prefix_mask, 1)
    branch_segments = jnp.ones((batch, branch_k.shape[-2]), prefix_segments.dtype)
    segments = jnp.concatenate([prefix_segments, branch_segments], axis=1)
    k, v = joined(prefix_k, branch_k), joined(prefix_v, branch_v)
    offset = prefix_segments.shape[1]
    return _splash(_padded(q, 2), k, v, branch_segments, segments, offset=offset)[:, :, :length]


def over_prompt_packed(
    kind: str,
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: Places,
    length: int,
) -> jax.Array:
    """`over_prompt` of packed responses of at most `length` tokens; a library's kernel sees them unpacked.

    q [Q, S, N, H]; prefix_k, prefix_v [B, M, P, H]; prefix_mask [B, P] bool; k, v [Q, M, S, H] -> [Q, S, N, H].
    """
    if resolve(kind, q.shape[-1], q.dtype.name, packed=True) == "einsum":
        return packed_attention.over_prompt(q, prefix_k, prefix_v, prefix_mask, k, v, at)

    def rows(x: jax.Array) -> jax.Array:
        """[Q, S, heads, H] -> [B, G, R, heads, H]"""
        return constrain(unpack(x, at, length), "batch", None, None, "heads")

    own_k, own_v = (rows(x.swapaxes(1, 2)).swapaxes(2, 3) for x in (k, v))
    return pack(over_prompt(kind, rows(q), prefix_k, prefix_v, prefix_mask, own_k, own_v), at)


@jax.named_scope("attention")
def _dot_product(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
    """q [B, T, N, H]; k, v [B, M, S, H]; allowed [B, T, S]."""
    cudnn = sharding.platform() in ("gpu", "cuda") and q.dtype in (jnp.bfloat16, jnp.float16)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        q, k, v, mask=allowed[:, None], implementation="cudnn" if cudnn else "xla"
    ).astype(q.dtype)


def _padded(x: jax.Array, axis: int) -> jax.Array:
    """Pads `axis` of `x` to a multiple of LANES; a mask becomes int32 segments, 1 for real tokens."""
    x = x.astype(jnp.int32) if x.dtype == bool else x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, padding)


@jax.named_scope("attention")
def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, k_segments: jax.Array, offset: int
) -> jax.Array:
    """Query t sees keys up to t + offset of its own segment.

    q [B, G, T, N, H]; k, v [B, G, M, S, H]; q_segments [B, T], k_segments [B, S] int32 -> [B, G, T, N, H].
    """
    q = (q * q.shape[-1] ** -0.5).swapaxes(2, 3)

    def attend(q, k, v, q_segments, k_segments):
        kernel = _kernel(q.shape[2], q.shape[3], k.shape[3], offset, sharding.platform() != "tpu")
        over_group = jax.vmap(kernel, in_axes=(0, 0, 0, None, None))
        return jax.vmap(over_group)(q, k, v, q_segments, k_segments)

    # The partitioner cannot split a kernel, so each device gets its part explicitly.
    arrays = (q, k, v, q_segments, k_segments)
    split = sharding.shard_mapped(attend, arrays, (("batch", None, "heads"),) * 3 + (("batch",),) * 2)
    return split(*arrays).swapaxes(2, 3)


@functools.cache
def _kernel(heads: int, queries: int, keys: int, offset: int, interpret: bool):
    # The imports are here because they take a second, and other machines have no use for them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, columns = _block(queries), _block(keys)
    of_queries = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), rows)
    of_keys = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")
    sizes = library.BlockSizes(**of_queries, **dict.fromkeys(of_keys, columns))
    mask = masks.MultiHeadMask([masks.CausalMask((queries, keys), offset) for _ in range(heads)])
    with jax.ensure_compile_time_eval():  # Its tables are constants, not values of the program being traced.
        kernel = library.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    return lambda q, k, v, q_segments, k_segments: kernel(q, k, v, library.SegmentIds(q_segments, k_segments))


def _block(length: int) -> int:
    """The largest block of up to 512 that divides `length`, a multiple of LANES."""
    return next(block for block in (512, 384, 256, 128) if length % block == 0)
