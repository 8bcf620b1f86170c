"""Attention of a group's responses over one shared prompt: softmax over (prefix keys, own earlier branch keys).

Keys and values are kept head-major ([..., heads, positions, head size]), so that the matmul of each head reads
contiguous memory in the decode loop.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row without any allowed key (a padding query) stays finite instead of becoming NaN.
MASKED = -1e30


def bias(allowed: jax.Array) -> jax.Array:
    """What is added to fp32 attention logits: 0 where `allowed`, else MASKED, which swallows any logit.

    A selection between logits and a constant would have that constant, as large as the logits, and the selection's
    condition kept through the whole update: both are the same in every layer, so they are taken out of the layer scan.
    """
    return jnp.where(allowed, 0.0, MASKED)


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
    # Normalised after the values are read: the backward pass keeps one array of the logits' size, not three.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1)[..., None].astype(v.dtype)
    read = jnp.einsum("bmrqk,bmkh->bmrqh", weights.astype(v.dtype), v) / total
    return read.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def prefix_and_branch(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    prefix_mask: jax.Array,
    branch_k: jax.Array,
    branch_v: jax.Array,
    branch_mask: jax.Array,
    own: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of T response tokens per branch; the prefix is never repeated over G.

    The parts share one maximum and one normaliser, so the result is the softmax over their concatenation without
    building it.

    Args:
      q: [B, G, T, N, H], T = 1 while decoding and R in the update.
      prefix_k, prefix_v: [B, M, P, H]; prefix_mask: [B, P] bool.
      branch_k, branch_v: [B, G, M, S, H]; branch_mask: [T, S] bool, True where the key may be seen.
      own: key and value [B, G, M, T, H] of each token itself, where the branch does not hold them (yet): in decoding,
        so that the cache is only read here and written once per token.

    Returns:
      [B, G, T, N, H].
    """
    batch, group, length, heads, size = q.shape
    kv_heads = prefix_k.shape[1]
    q = (q * size**-0.5).reshape(batch, group, length, kv_heads, heads // kv_heads, size)
    over_prefix = jnp.einsum("bgtmrh,bmph->bmgtrp", q, prefix_k, preferred_element_type=jnp.float32)
    over_prefix = over_prefix + bias(prefix_mask)[:, None, None, None, None, :]
    over_branch = jnp.einsum("bgtmrh,bgmsh->bgmtrs", q, branch_k, preferred_element_type=jnp.float32)
    over_branch = over_branch + bias(branch_mask)[:, None, :]

    # [B, M, G, T, rep] and [B, G, M, T, rep]; the maximum only guards against overflow, so no gradient goes through it.
    top = jnp.maximum(over_prefix.max(-1).swapaxes(1, 2), over_branch.max(-1))
    if own is not None:
        own_k = own[0].swapaxes(2, 3)[..., None, :].astype(jnp.float32)
        over_own = (q.astype(jnp.float32) * own_k).sum(-1).swapaxes(2, 3)
        top = jnp.maximum(top, over_own)
    top = jax.lax.stop_gradient(top)
    from_prefix = jnp.exp(over_prefix - top.swapaxes(1, 2)[..., None])
    from_branch = jnp.exp(over_branch - top[..., None])
    total = from_prefix.sum(-1).swapaxes(1, 2) + from_branch.sum(-1)

    # With the axes of the result in the operands' order it is one plain matmul per head.
    read_prefix = jnp.einsum("bmgtrp,bmph->bmgtrh", from_prefix.astype(prefix_v.dtype), prefix_v).swapaxes(1, 2)
    read_branch = jnp.einsum("bgmtrs,bgmsh->bgmtrh", from_branch.astype(branch_v.dtype), branch_v)
    read = read_prefix + read_branch
    if own is not None:
        from_own = jnp.exp(over_own - top)
        total += from_own
        read += from_own[..., None].astype(prefix_v.dtype) * own[1][:, :, :, :, None]
    read = read / total[..., None].astype(prefix_v.dtype)
    return read.transpose(0, 1, 3, 2, 4, 5).reshape(batch, group, length, heads, size)
