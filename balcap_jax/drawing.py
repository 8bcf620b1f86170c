"""How a response's tokens are drawn from logits."""

import dataclasses

import jax
import jax.numpy as jnp

_BLOCK = 256  # tokens of a block in `categorical`; near the square root of a large vocabulary


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The sampling of responses. `top_k` 0 and `top_p` 1 mean no truncation; `greedy` ignores these and `temperature`.

    `parts`: the batch is sampled in so many parts, one after the other, and the tokens are the same. The cache then
    takes memory for one part, and the weights are read anew for the steps of each.
    """

    group_size: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    parts: int = 1
    refill: bool = False


def draw(sampling: Sampling, logits: jax.Array, keys: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [...] at index `t`, one for all or [...], of the branches with `keys` [...], from `logits` [..., V].

    With them come their log-probabilities [...] under the temperature alone.
    """
    if sampling.greedy:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, log_prob(logits, tokens)
    fold_in = jax.random.fold_in
    for _ in keys.shape:
        fold_in = jax.vmap(fold_in)
    scaled = logits / sampling.temperature
    step_keys = fold_in(keys, jnp.broadcast_to(t, keys.shape))
    tokens = categorical(step_keys, truncate(scaled, sampling.top_p, sampling.top_k))
    return tokens, log_prob(scaled, tokens)


def categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """A sample int32 [...] of softmax(logits [..., V]) for each of the PRNG keys [...].

    Inversion in two steps draws first a block of tokens and then a token of it, with a uniform number for each. That
    takes two random numbers, where the Gumbel maximum of `jax.random.categorical` takes V. The second step restores the
    resolution that fp32 sums over a large V would lose. No sample has probability 0.
    """
    vocab = logits.shape[-1]
    blocks = -(-vocab // _BLOCK)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * _BLOCK - vocab)]
    mass = jnp.exp(logits - logits.max(-1, keepdims=True))
    mass = jnp.pad(mass, padding).reshape(*logits.shape[:-1], blocks, _BLOCK)
    uniform = jax.random.uniform
    for _ in keys.shape:
        uniform = jax.vmap(uniform, in_axes=(0, None))
    draws = uniform(keys, (2,))
    block = _invert(mass.sum(-1), draws[..., 0])
    within = jnp.take_along_axis(mass, block[..., None, None], axis=-2)[..., 0, :]
    return (block * _BLOCK + _invert(within, draws[..., 1])).astype(jnp.int32)


def _invert(mass: jax.Array, draw: jax.Array) -> jax.Array:
    """The index [...] at which the running sum of `mass` [..., N] passes the share `draw` [...] of the total."""
    cumulative = jnp.cumsum(mass, axis=-1)
    passed = cumulative > draw[..., None] * cumulative[..., -1:]
    # Rounding may let a sum pass at an entry without mass, or nowhere: then the largest entry.
    index = jnp.argmax(passed & (mass > 0), axis=-1)
    has_mass = jnp.take_along_axis(mass, index[..., None], axis=-1)[..., 0] > 0
    return jnp.where(has_mass, index, jnp.argmax(mass, axis=-1))


def truncate(logits: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """Keeps the `top_k` likeliest tokens (0: all), then the smallest set of them that holds mass `top_p`.

    The set includes the token that crosses `top_p` (nucleus sampling, Holtzman et al., arXiv 1904.09751) and ties at
    the border. All other logits become -inf.
    """
    if top_k:
        lowest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(probs, axis=-1) - probs < top_p
        lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability [...] of `tokens` [...] under softmax of `logits` [..., V]."""
    token_logits = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return token_logits - jax.nn.logsumexp(logits, axis=-1)
