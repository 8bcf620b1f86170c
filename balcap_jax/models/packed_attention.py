"""Attention of packed responses: blocks of units of one prompt meet its prefix, and the responses that they belong to.

As in FlashAttention (Dao et al., arXiv 2205.14135) the logits of one block exist at a time, and the backward pass
computes them again. Each prompt's first unit begins a block, so that a block needs one row of prefix keys, and their
gradients add up inside a matmul. The last block of a prompt may run on into the next prompt's units: what it finds for
them is not kept. The loop over responses' keys takes as many turns as each block needs: no unit meets the padding of
another's length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from balcap_jax.models.attention import bias
from balcap_jax.models.packing import UNIT, Places
from balcap_jax.parallel import sharding

_UNITS = 2  # units of a block
_BLOCK = _UNITS * UNIT  # tokens of a block
TILE = 4 * UNIT  # keys of responses that a turn of the inner loop takes


class _Blocks(NamedTuple):
    """What T blocks hold; those behind the last prompt's have no unit.

    prompt, start, units, keys [T] int32: the row of the prompt, the first unit, the units of that prompt from there on,
      and the first unit of the response that the block begins in.
    response [S / UNIT + _UNITS]: the first unit of each unit's response.
    """

    prompt: jax.Array
    start: jax.Array
    units: jax.Array
    keys: jax.Array
    response: jax.Array


def _blocks(units: jax.Array, first: jax.Array) -> _Blocks:
    """The blocks of Q parts of b prompts with `units` [Q, b]; first [Q, K] as of `Places`."""
    (parts, prompts), size = units.shape, first.shape[1]
    part = jnp.arange(parts, dtype=jnp.int32)[:, None] * size
    place = (part + jnp.cumsum(units, axis=1) - units).reshape(-1)
    units = units.reshape(-1)
    of_prompt = -(-units // _UNITS)
    end = jnp.cumsum(of_prompt)
    most = parts * ((size + prompts * (_UNITS - 1)) // _UNITS)
    block = jnp.arange(most, dtype=jnp.int32)
    prompt = jnp.minimum((end <= block[:, None]).sum(-1, dtype=jnp.int32), len(units) - 1)
    done = (block - end[prompt] + of_prompt[prompt]) * _UNITS
    # Of a part that does not fit, units lie behind the last place: then the numbers mean nothing, and must be finite.
    start = jnp.minimum(place[prompt] + done, parts * size)
    response = jnp.pad((part + first).reshape(-1), (0, _UNITS))
    left = jnp.clip(units[prompt] - done, 0, _UNITS)
    # A block without units has no keys of responses to go through.
    return _Blocks(prompt, start, left, jnp.where(left > 0, response[start], start), response)


@jax.named_scope("attention")
def over_prompt(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: Places,
) -> jax.Array:
    """`attention.prefix_and_branch` of whole packed responses, causal in themselves.

    Args:
      q: [Q, S, N, H] with S = K * UNIT; k, v: [Q, M, S, H].
      prefix_k, prefix_v: [B, M, P, H], the prompts of all parts in their order; prefix_mask: [B, P] bool.
      at: the places of the units.

    Returns:
      [Q, S, N, H]; of empty places finite numbers without a meaning.
    """

    def of_device(q, k, v, prefix_k, prefix_v, prefix_mask, units, first):
        parts, length, heads, size = q.shape
        kv_heads = k.shape[1]
        q = (q * size**-0.5).reshape(parts * length, kv_heads, -1, size).swapaxes(0, 1)
        # One row of queries and of keys for all parts; behind it what the last block and tile run on into.
        q = jnp.pad(q, [(0, 0), (0, _BLOCK), (0, 0), (0, 0)]).reshape(kv_heads, -1, size)
        k, v = (jnp.pad(x.swapaxes(0, 1).reshape(kv_heads, -1, size), [(0, 0), (0, TILE), (0, 0)]) for x in (k, v))
        read = _attend(q, k, v, prefix_k, prefix_v, prefix_mask, _blocks(units, first))
        read = read.reshape(kv_heads, parts * length + _BLOCK, -1, size)[:, : parts * length]
        return read.swapaxes(0, 1).reshape(parts, length, heads, size)

    arrays = (q, k, v, prefix_k, prefix_v, prefix_mask, at.units, at.first)
    heads = [("batch", None, "heads")] + [("batch", "heads")] * 4
    return sharding.shard_mapped(of_device, arrays, (*heads, *[("batch",)] * 3))(*arrays)


# N / M queries of a token share a key head: they lie side by side, Z of all places and X of a block. S keys.


@jax.custom_vjp
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, prefix_k: jax.Array, prefix_v: jax.Array, mask: jax.Array, blocks: _Blocks
) -> jax.Array:
    """q [M, Z, H], scaled; k, v [M, S, H]; prefix_k, prefix_v [B, M, P, H]; mask [B, P] -> [M, Z, H]."""
    return _forward(q, k, v, prefix_k, prefix_v, mask, blocks)[0]


def _forward(q, k, v, prefix_k, prefix_v, mask, blocks):
    """-> what is read, and the logarithm [M, Z] of each query's sum of exponentials."""
    share = _share(q, blocks)

    def block(t, found):
        rows = _cut(q, blocks.start[t] * UNIT * share, _BLOCK * share)
        logits = _prefix_logits(rows, prefix_k, mask, blocks.prompt[t])
        top = logits.max(-1)
        weights = jnp.exp(logits - top[..., None])
        start = top, weights.sum(-1), _read(weights, _row(prefix_v, blocks.prompt[t]))

        def tile(j, carry):
            top, total, read = carry
            place = blocks.keys[t] * UNIT + j * TILE
            logits = _own_logits(rows, _cut(k, place, TILE), blocks, t, place)
            higher = jnp.maximum(top, logits.max(-1))
            weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            read = read * shrink[..., None] + _read(weights, _cut(v, place, TILE))
            return higher, total * shrink + weights.sum(-1), read

        top, total, read = jax.lax.fori_loop(0, _turns(blocks, t), tile, start)
        # In order: the next prompt's first block puts its own in the place of what this one found of it.
        new = (read / total[..., None]).astype(v.dtype), top + jnp.log(total)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, x, blocks.start[t] * UNIT * share, 1)
            for old, x in zip(found, new, strict=True)
        )

    empty = jnp.zeros(q.shape, v.dtype), jnp.zeros(q.shape[:2], jnp.float32)
    return jax.lax.fori_loop(0, len(blocks.start), block, empty)


def _attend_forward(*arguments):
    read, log_total = _forward(*arguments)
    return read, (*arguments, read, log_total)


@jax.named_scope("attention")
def _attend_backward(saved, gradient):
    q, k, v, prefix_k, prefix_v, mask, blocks, read, log_total = saved
    share = _share(q, blocks)
    # The gradient of a softmax row p by its logits is p * (g - sum(p g)), and sum(p g) is that of what was read.
    mean = (read.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1)

    def block(t, sums):
        to_q, own_k, own_v, of_prefix_k, of_prefix_v = sums
        start, prompt = blocks.start[t] * UNIT * share, blocks.prompt[t]
        rows, to_read, means, totals = (_cut(x, start, _BLOCK * share) for x in (q, gradient, mean, log_total))
        # Rows of the next prompt have no weights here.
        is_own = jnp.arange(_BLOCK * share) < blocks.units[t] * UNIT * share
        totals = jnp.where(is_own, totals, jnp.inf)

        def of(logits, keys, values):
            """Gradients of q [M, X, H] and of keys and values [M, S, H]."""
            weights = jnp.exp(logits - totals[..., None])
            to_weights = jnp.einsum("mxh,msh->mxs", to_read, values, preferred_element_type=jnp.float32)
            to_logits = (weights * (to_weights - means[..., None])).astype(q.dtype)
            return (
                jnp.einsum("mxs,msh->mxh", to_logits, keys, preferred_element_type=jnp.float32),
                jnp.einsum("mxs,mxh->msh", to_logits, rows, preferred_element_type=jnp.float32),
                jnp.einsum("mxs,mxh->msh", weights.astype(q.dtype), to_read, preferred_element_type=jnp.float32),
            )

        prefix = _row(prefix_k, prompt), _row(prefix_v, prompt)
        to_rows, to_k, to_v = of(_prefix_logits(rows, prefix_k, mask, prompt), *prefix)
        of_prefix_k = _added(of_prefix_k, to_k[None], prompt, 0)
        of_prefix_v = _added(of_prefix_v, to_v[None], prompt, 0)

        def tile(j, carry):
            to_rows, own_k, own_v = carry
            place = blocks.keys[t] * UNIT + j * TILE
            keys, values = _cut(k, place, TILE), _cut(v, place, TILE)
            more, to_k, to_v = of(_own_logits(rows, keys, blocks, t, place), keys, values)
            return to_rows + more, _added(own_k, to_k, place, 1), _added(own_v, to_v, place, 1)

        to_rows, own_k, own_v = jax.lax.fori_loop(0, _turns(blocks, t), tile, (to_rows, own_k, own_v))
        to_q = jax.lax.dynamic_update_slice_in_dim(to_q, to_rows.astype(q.dtype), start, 1)
        return to_q, own_k, own_v, of_prefix_k, of_prefix_v

    arrays = k, v, prefix_k, prefix_v
    zero = (jnp.zeros_like(q), *(jnp.zeros(x.shape, jnp.float32) for x in arrays))
    to_q, *sums = jax.lax.fori_loop(0, len(blocks.start), block, zero)
    return to_q, *(total.astype(x.dtype) for total, x in zip(sums, arrays, strict=True)), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _share(q: jax.Array, blocks: _Blocks) -> int:
    """Queries of a token that share a key head."""
    return q.shape[1] // (len(blocks.response) * UNIT)


def _prefix_logits(rows: jax.Array, prefix_k: jax.Array, mask: jax.Array, prompt: jax.Array) -> jax.Array:
    """[M, X, P]"""
    logits = jnp.einsum("mxh,mph->mxp", rows, _row(prefix_k, prompt), preferred_element_type=jnp.float32)
    return logits + bias(_row(mask, prompt))


def _own_logits(rows: jax.Array, keys: jax.Array, blocks: _Blocks, t: jax.Array, place: jax.Array) -> jax.Array:
    """[M, X, TILE], of the keys from token `place` on"""
    logits = jnp.einsum("mxh,msh->mxs", rows, keys, preferred_element_type=jnp.float32)
    start = blocks.start[t]
    key, query = place + jnp.arange(TILE), start * UNIT + jnp.arange(_BLOCK)
    response = jnp.repeat(jax.lax.dynamic_slice_in_dim(blocks.response, start, _UNITS) * UNIT, UNIT)
    seen = (key <= query[:, None]) & (key >= response[:, None])
    heads, queries, _ = logits.shape
    return (logits.reshape(heads, _BLOCK, -1, TILE) + bias(seen)[:, None]).reshape(heads, queries, TILE)


def _read(weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("mxs,msh->mxh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _turns(blocks: _Blocks, t: jax.Array) -> jax.Array:
    """Tiles from the first key of the block's responses to its own last token."""
    return -(-(blocks.start[t] + blocks.units[t] - blocks.keys[t]) * UNIT // TILE)


def _row(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """x [M, S, ...] -> [M, size, ...]"""
    return jax.lax.dynamic_slice_in_dim(x, start, size, 1)


def _added(sums: jax.Array, x: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """`sums` with x added from `start` on, in place."""
    old = jax.lax.dynamic_slice_in_dim(sums, start, x.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(sums, old + x, start, axis)
