"""Attention of a group's responses over one shared prompt: softmax over (prefix keys, own earlier branch keys).

Keys and values are head-major ([..., heads, positions, head size]), so that the matmul of each head reads contiguous
memory in the decode loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from balcap_jax.models.seats import Seats
from balcap_jax.parallel.sharding import constrain

# Finite, so that a row without any allowed key (a padding query) stays finite instead of becoming NaN.
MASKED = -1e30

CACHE_BLOCK = 128  # most positions of the branches' cache that a decoding step reads at once


def block_of(length: int) -> int:
    """Positions that are read at once of a cache of `length`: a quarter of it, at least 16 and at most CACHE_BLOCK.

    On a CPU each read copies its block, and what is not written yet would be copied too (docs/performance.md).
    """
    quarter = -(-length // 32) * 8
    return min(CACHE_BLOCK, max(16, quarter), length)


def bias(allowed: jax.Array) -> jax.Array:
    """The addend of fp32 attention logits: 0 where `allowed`, else MASKED, which swallows any logit.

    A selection between logits and a constant would keep that constant, as large as the logits, and the selection's
    condition through the whole update: both are the same in every layer, so XLA moves them out of the layer scan.
    """
    return jnp.where(allowed, 0.0, MASKED)


@jax.named_scope("attention")
def causal(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Causal attention inside the prompt.

    Args:
      q: [B, P, N, H]; k, v: [B, M, P, H] with N a multiple of M.
      mask: [B, P] bool, False for padding keys.

    Returns:
      [B, P, N, H].
    """
    batch, length, heads, size = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, length, groups, heads // groups, size)
    logits = jnp.einsum("bqmrh,bmkh->bmrqk", q, k, preferred_element_type=jnp.float32) * size**-0.5
    allowed = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, :]
    logits = logits + bias(allowed)[:, None, None]
    # The division follows the sum over values: the backward pass keeps one array of the logits' size, not three.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    denominator = weights.sum(-1)[..., None].astype(v.dtype)
    out = jnp.einsum("bmrqk,bmkh->bmrqh", weights.astype(v.dtype), v) / denominator
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


@jax.named_scope("attention")
def prefix_and_branch(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    branch_k: jax.Array,
    branch_v: jax.Array,
    branch_mask: jax.Array,
) -> jax.Array:
    """Attention of whole responses, R tokens per branch; the prefix is never repeated over G.

    The parts share one maximum and one denominator, so the result is the softmax over their concatenation, which is
    never built.

    Args:
      q: [B, G, T, N, H].
      prefix_k, prefix_v: [B, M, P, H]; prefix_mask: [B, P] bool.
      branch_k, branch_v: [B, G, M, S, H]; branch_mask: [T, S] bool, True where the key may be seen.

    Returns:
      [B, G, T, N, H].
    """
    batch, group, length, heads, size = q.shape
    kv_heads = prefix_k.shape[1]
    q = (q * size**-0.5).reshape(batch, group, length, kv_heads, heads // kv_heads, size)
    prefix_logits = jnp.einsum("bgtmrh,bmph->bmgtrp", q, prefix_k, preferred_element_type=jnp.float32)
    prefix_logits = prefix_logits + bias(prefix_mask)[:, None, None, None, None, :]
    branch_logits = jnp.einsum("bgtmrh,bgmsh->bgmtrs", q, branch_k, preferred_element_type=jnp.float32)
    branch_logits = branch_logits + bias(branch_mask)[:, None, :]

    # [B, M, G, T, rep] and [B, G, M, T, rep]; the maximum only guards against overflow, so no gradient goes through it.
    max_logit = jnp.maximum(prefix_logits.max(-1).swapaxes(1, 2), branch_logits.max(-1))
    max_logit = jax.lax.stop_gradient(max_logit)
    prefix_weights = jnp.exp(prefix_logits - max_logit.swapaxes(1, 2)[..., None])
    branch_weights = jnp.exp(branch_logits - max_logit[..., None])
    denominator = prefix_weights.sum(-1).swapaxes(1, 2) + branch_weights.sum(-1)

    # With the axes of the result in the operands' order it is one plain matmul per head.
    prefix_out = jnp.einsum("bmgtrp,bmph->bmgtrh", prefix_weights.astype(prefix_v.dtype), prefix_v).swapaxes(1, 2)
    out = prefix_out + jnp.einsum("bgmtrs,bgmsh->bgmtrh", branch_weights.astype(branch_v.dtype), branch_v)
    out = out / denominator[..., None].astype(prefix_v.dtype)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(batch, group, length, heads, size)


@jax.named_scope("attention")
def of_one_token(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    blocks: jax.Array | None,
    seats: Seats | None = None,
) -> jax.Array:
    """Attention of one response token per branch, over its prompt, itself and the first `blocks` blocks of its cache.

    The softmax is kept up block by block (Milakov and Gimelshein, arXiv 1805.02867), so that only what is written of
    the cache is read. `blocks` None: the cache is one block, which takes no loop.

    Args:
      q: [B, G, N, H].
      prefix_k, prefix_v: [B, M, P, H]; prefix_mask: [B, P] bool.
      own_k, own_v: [B, G, M, H] of the token itself, which the cache does not hold yet.
      read: block number -> keys and values [B, G, M, S, H] and which of them count, [S] or [B, G, 1, 1, S] bool.
      seats: the rows that [B, G] are then, and the lines that prefix_k, prefix_v and prefix_mask are of.

    Returns:
      [B, G, N, H].
    """
    batch, group, heads, size = q.shape
    kv_heads = prefix_k.shape[1]
    q = (q * size**-0.5).reshape(batch, group, kv_heads, heads // kv_heads, size)

    def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=jnp.float32)

    def split(x: jax.Array) -> jax.Array:
        return constrain(x, "batch", None, "heads")

    def to_lines(x: jax.Array) -> jax.Array:
        return x if seats is None else seats.to_lines(x, len(prefix_mask))

    def to_rows(x: jax.Array) -> jax.Array:
        return x if seats is None else seats.to_rows(x)

    own_logits = (q.astype(jnp.float32) * own_k[..., None, :].astype(jnp.float32)).sum(-1)
    # [B, M, G, rep, P]: as the operands have their axes, it is one plain matmul per head for all branches.
    prefix_logits = dot("bgmrh,bmph->bmgrp", to_lines(q), prefix_k) + bias(prefix_mask)[:, None, None, None]
    top = jnp.maximum(prefix_logits.max(-1).swapaxes(1, 2), to_lines(own_logits))
    prefix_weights = jnp.exp(prefix_logits - top.swapaxes(1, 2)[..., None])
    prefix_out = dot("bmgrp,bmph->bmgrh", prefix_weights, prefix_v).swapaxes(1, 2)
    top, denominator, out = map(to_rows, (top, prefix_weights.sum(-1).swapaxes(1, 2), prefix_out))
    own_weights = jnp.exp(own_logits - top)
    denominator += own_weights
    out += own_weights[..., None] * own_v[..., None, :].astype(jnp.float32)

    def add(block: jax.Array | int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        top, denominator, out = state
        keys, values, counts = read(block)
        logits = dot("bgmrh,bgmsh->bgmrs", q, keys) + bias(counts)
        new_top = jnp.maximum(top, logits.max(-1))
        weights, scale = jnp.exp(logits - new_top[..., None]), jnp.exp(top - new_top)
        out = out * scale[..., None] + dot("bgmrs,bgmsh->bgmrh", weights, values)
        return split(new_top), split(denominator * scale + weights.sum(-1)), split(out)

    state = (split(top), split(denominator), split(out))
    state = add(0, state) if blocks is None else jax.lax.fori_loop(0, blocks, add, state)
    _, denominator, out = state
    return (out / denominator[..., None]).astype(own_v.dtype).reshape(batch, group, heads, size)
