"""Attention of a group's responses over one shared prompt: softmax over (prefix keys, own earlier branch keys).

Keys and values are head-major ([..., heads, positions, head size]), so that the matmul of each head reads contiguous
memory in the decode loop.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row without any allowed key (a padding query) stays finite instead of becoming NaN.
MASKED = -1e30


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
    self_kv: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of T response tokens per branch; the prefix is never repeated over G.

    The parts share one maximum and one denominator, so the result is the softmax over their concatenation, which is
    never built.

    Args:
      q: [B, G, T, N, H], T = 1 while decoding and R in the update.
      prefix_k, prefix_v: [B, M, P, H]; prefix_mask: [B, P] bool.
      branch_k, branch_v: [B, G, M, S, H]; branch_mask: [T, S] bool, True where the key may be seen.
      self_kv: key and value [B, G, M, T, H] of each token itself, where the branch does not hold them yet. That is so
        in decoding, where the cache is only read here and written once per token.

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
    if self_kv is not None:
        self_k = self_kv[0].swapaxes(2, 3)[..., None, :].astype(jnp.float32)
        self_logits = (q.astype(jnp.float32) * self_k).sum(-1).swapaxes(2, 3)
        max_logit = jnp.maximum(max_logit, self_logits)
    max_logit = jax.lax.stop_gradient(max_logit)
    prefix_weights = jnp.exp(prefix_logits - max_logit.swapaxes(1, 2)[..., None])
    branch_weights = jnp.exp(branch_logits - max_logit[..., None])
    denominator = prefix_weights.sum(-1).swapaxes(1, 2) + branch_weights.sum(-1)

    # With the axes of the result in the operands' order it is one plain matmul per head.
    prefix_out = jnp.einsum("bmgtrp,bmph->bmgtrh", prefix_weights.astype(prefix_v.dtype), prefix_v).swapaxes(1, 2)
    out = prefix_out + jnp.einsum("bgmtrs,bgmsh->bgmtrh", branch_weights.astype(branch_v.dtype), branch_v)
    if self_kv is not None:
        self_weights = jnp.exp(self_logits - max_logit)
        denominator += self_weights
        out += self_weights[..., None].astype(prefix_v.dtype) * self_kv[1][:, :, :, :, None]
    out = out / denominator[..., None].astype(prefix_v.dtype)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(batch, group, length, heads, size)
