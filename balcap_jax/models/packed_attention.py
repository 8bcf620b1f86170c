"""Attention of packed responses: each unit's queries meet the prefix of their own prompt and their own response.

As in FlashAttention (Dao et al., arXiv 2205.14135) the logits of a few units exist at a time, and the backward pass
computes them again. Where a few responses are long, the loop over keys takes as many turns as each block of units
needs: no unit meets the padding of another's length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from balcap_jax.models.attention import bias
from balcap_jax.models.packing import UNIT, Places
from balcap_jax.parallel import sharding

_UNITS = 4  # units whose logits exist at once
TILE = 4 * UNIT  # keys of a response that a turn of the inner loop takes


class _Where(NamedTuple):
    """[T, U] int32 for T blocks of U units: the row of the prompt, the response's first token, the unit's number."""

    prompt: jax.Array
    first: jax.Array
    chunk: jax.Array


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
      [Q, S, N, H].
    """

    def of_device(q, k, v, prefix_k, prefix_v, prefix_mask, prompt, first, chunk):
        parts, length, heads, size = q.shape
        kv_heads, prompts = k.shape[1], prefix_mask.shape[0] // parts
        part = jnp.arange(parts, dtype=jnp.int32)[:, None]
        where = _Where(part * prompts + prompt, part * length + first * UNIT, chunk)
        units = parts * length // UNIT
        empty = -units % _UNITS
        # An empty unit at the end of the last block: its queries are 0 and see one response's first keys.
        where = _Where(*(jnp.pad(x.reshape(-1), (0, empty)).reshape(-1, _UNITS) for x in where))
        q = q.reshape(units, UNIT, kv_heads, -1, size).swapaxes(1, 2)
        rows = jnp.pad(q, [(0, empty)] + [(0, 0)] * 4).reshape(-1, _UNITS, kv_heads, UNIT * heads // kv_heads, size)
        # One row of keys for all parts; behind it a tile that no query sees.
        k, v = (jnp.pad(x.swapaxes(0, 1).reshape(kv_heads, -1, size), [(0, 0), (0, TILE), (0, 0)]) for x in (k, v))
        read = _attend(rows * size**-0.5, k, v, prefix_k, prefix_v, prefix_mask, where)
        read = read.reshape(-1, kv_heads, UNIT, heads // kv_heads, size)[:units].swapaxes(1, 2)
        return read.reshape(parts, length, heads, size)

    arrays = (q, k, v, prefix_k, prefix_v, prefix_mask, at.prompt, at.first, at.chunk)
    heads = [("batch", None, "heads")] + [("batch", "heads")] * 4
    return sharding.shard_mapped(of_device, arrays, (*heads, *[("batch",)] * 4))(*arrays)


# X queries of a unit share a key head: UNIT tokens of N / M heads. S keys of all parts, one row.


@jax.custom_vjp
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, prefix_k: jax.Array, prefix_v: jax.Array, mask: jax.Array, where: _Where
) -> jax.Array:
    """q [T, U, M, X, H], scaled; k, v [M, S, H]; prefix_k, prefix_v [B, M, P, H]; mask [B, P] -> [T, U, M, X, H]."""
    return _forward(q, k, v, prefix_k, prefix_v, mask, where)[0]


def _forward(q, k, v, prefix_k, prefix_v, mask, where):
    """-> what is read, and the logarithm [T, U, M, X] of each query's sum of exponentials."""

    def block(_, inputs):
        q, at = inputs
        logits = _prefix_logits(q, prefix_k, mask, at)
        top = logits.max(-1)
        weights = jnp.exp(logits - top[..., None])
        start = top, weights.sum(-1), _read(weights, _rows(prefix_v, at.prompt))

        def tile(j, carry):
            top, total, read = carry
            logits = _own_logits(q, k, at, j)
            higher = jnp.maximum(top, logits.max(-1))
            weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            read = read * shrink[..., None] + _read(weights, _tiles(v, at, j))
            return higher, total * shrink + weights.sum(-1), read

        top, total, read = jax.lax.fori_loop(0, _turns(at), tile, start)
        return None, ((read / total[..., None]).astype(v.dtype), top + jnp.log(total))

    return jax.lax.scan(block, None, (q, where))[1]


def _attend_forward(*arguments):
    read, log_total = _forward(*arguments)
    return read, (*arguments, read, log_total)


@jax.named_scope("attention")
def _attend_backward(saved, gradient):
    q, k, v, prefix_k, prefix_v, mask, where, read, log_total = saved

    def block(sums, inputs):
        q, at, read, log_total, gradient = inputs
        # The gradient of a softmax row p by its logits is p * (g - sum(p g)), and sum(p g) is that of what was read.
        mean = (read.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1)

        def of(logits, keys, values):
            """Gradients of q [U, M, X, H] and of keys and values [U, M, S, H]."""
            weights = jnp.exp(logits - log_total[..., None])
            to_weights = jnp.einsum("umxh,umsh->umxs", gradient, values, preferred_element_type=jnp.float32)
            to_logits = (weights * (to_weights - mean[..., None])).astype(q.dtype)
            return (
                jnp.einsum("umxs,umsh->umxh", to_logits, keys, preferred_element_type=jnp.float32),
                jnp.einsum("umxs,umxh->umsh", to_logits, q, preferred_element_type=jnp.float32),
                jnp.einsum("umxs,umxh->umsh", weights.astype(q.dtype), gradient, preferred_element_type=jnp.float32),
            )

        own_k, own_v, of_prefix_k, of_prefix_v = sums
        logits = _prefix_logits(q, prefix_k, mask, at)
        to_q, to_k, to_v = of(logits, _rows(prefix_k, at.prompt), _rows(prefix_v, at.prompt))
        of_prefix_k, of_prefix_v = _added(of_prefix_k, to_k, at.prompt), _added(of_prefix_v, to_v, at.prompt)

        def tile(j, carry):
            to_q, own_k, own_v = carry
            more, to_k, to_v = of(_own_logits(q, k, at, j), _tiles(k, at, j), _tiles(v, at, j))
            return to_q + more, _added_tiles(own_k, to_k, at, j), _added_tiles(own_v, to_v, at, j)

        to_q, own_k, own_v = jax.lax.fori_loop(0, _turns(at), tile, (to_q, own_k, own_v))
        return (own_k, own_v, of_prefix_k, of_prefix_v), to_q.astype(q.dtype)

    arrays = k, v, prefix_k, prefix_v
    zero = tuple(jnp.zeros(x.shape, jnp.float32) for x in arrays)
    sums, to_q = jax.lax.scan(block, zero, (q, where, read, log_total, gradient))
    return to_q, *(total.astype(x.dtype) for total, x in zip(sums, arrays, strict=True)), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _prefix_logits(q: jax.Array, prefix_k: jax.Array, mask: jax.Array, at: _Where) -> jax.Array:
    """[U, M, X, P]"""
    logits = jnp.einsum("umxh,umph->umxp", q, _rows(prefix_k, at.prompt), preferred_element_type=jnp.float32)
    return logits + bias(mask[at.prompt])[:, None, None]


def _own_logits(q: jax.Array, k: jax.Array, at: _Where, j: jax.Array) -> jax.Array:
    """[U, M, X, TILE], of the keys of turn j"""
    logits = jnp.einsum("umxh,umsh->umxs", q, _tiles(k, at, j), preferred_element_type=jnp.float32)
    key = j * TILE + jnp.arange(TILE)
    seen = key <= (at.chunk[:, None] * UNIT + jnp.arange(UNIT))[..., None]  # [U, UNIT, TILE]
    units, heads, queries, _ = logits.shape
    logits = logits.reshape(units, heads, UNIT, -1, TILE) + bias(seen)[:, None, :, None]
    return logits.reshape(units, heads, queries, TILE)


def _read(weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("umxs,umsh->umxh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _turns(at: _Where) -> jax.Array:
    """Turns over the keys of a response that the last of the block's units needs."""
    return at.chunk.max() // (TILE // UNIT) + 1


# Slices that are written out move as blocks of memory, and the sums are updated in place. Indexing with an array, and
# its transpose, are loops over single rows on some platforms.


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, ...] at index [U]."""
    return jnp.stack([jax.lax.dynamic_index_in_dim(x, index[u], keepdims=False) for u in range(_UNITS)])


def _added(sums: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    for u in range(_UNITS):
        row = jax.lax.dynamic_index_in_dim(sums, index[u], keepdims=False)
        sums = jax.lax.dynamic_update_index_in_dim(sums, row + x[u], index[u], 0)
    return sums


def _tiles(x: jax.Array, at: _Where, j: jax.Array) -> jax.Array:
    """x [M, S, H] -> [U, M, TILE, H], from token j * TILE of each unit's response on."""
    return jnp.stack([jax.lax.dynamic_slice_in_dim(x, at.first[u] + j * TILE, TILE, 1) for u in range(_UNITS)])


def _added_tiles(sums: jax.Array, x: jax.Array, at: _Where, j: jax.Array) -> jax.Array:
    for u in range(_UNITS):
        start = at.first[u] + j * TILE
        old = jax.lax.dynamic_slice_in_dim(sums, start, TILE, 1)
        sums = jax.lax.dynamic_update_slice_in_dim(sums, old + x[u], start, 1)
    return sums
