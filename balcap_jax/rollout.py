"""Sampling of G captions per image: encode the image once, prefill the prompt once, decode G branches.

One compiled program; the loop ends when every branch has ended. `sample` is the loop, `make_rollout` its face.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.parallel import sharding

_BLOCK = 256  # tokens of a block in `categorical`; near the square root of a large vocabulary


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The sampling of responses. `top_k` 0 and `top_p` 1 mean no truncation; `greedy` ignores the other three."""

    group_size: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


class Rollout(NamedTuple):
    """G responses per prompt.

    tokens [B, G, R] int32, padding after the end token; mask [B, G, R] bool, end token included.
    policy_log_probs [B, G, R]: under the temperature alone, without top-k and top-p, as the trainer recomputes them.
    They are the denominator of the surrogate's ratio, and 0 outside the mask.
    lengths [B, G] int32 tokens, end token included; truncated [B, G] bool, no end token within R.
    image_embeds [B, I, D]: so that a frozen vision tower need not run again in the update.
    """

    tokens: jax.Array
    mask: jax.Array
    policy_log_probs: jax.Array
    lengths: jax.Array
    truncated: jax.Array
    image_embeds: jax.Array


def example_keys(ids: Sequence[str]) -> np.ndarray:
    """Stable 32-bit keys [B] of example ids: a sample depends on its example, not on the place in the batch."""
    return np.array([zlib.crc32(name.encode()) for name in ids], np.uint32)


@functools.lru_cache(maxsize=16)
def make_rollout(policy: Policy, sampling: Sampling) -> "RolloutProgram":
    """The compiled rollout: `rollout(params, prompt, keys [B] uint32, seed uint32, step uint32) -> Rollout`.

    The same arguments give the same program, so that an evaluation that samples as training does needs no new trace.
    The cache holds the last 16, with what they have compiled when they are called, and without parameters.

    Sample g of an example depends on a key made of (seed, step, example key, g) only, so it is the same on any mesh,
    in any batch and at any batch size.
    """

    def rollout(
        mesh: Mesh | None, params: Params, prompt: Prompt, keys: jax.Array, seed: jax.Array, step: jax.Array
    ) -> Rollout:
        base = jax.random.fold_in(jax.random.key(seed), step)
        prompt_keys = jax.vmap(lambda key: jax.random.fold_in(base, key))(keys)
        members = jnp.arange(sampling.group_size)
        branch_keys = jax.vmap(lambda key: jax.vmap(lambda g: jax.random.fold_in(key, g))(members))(prompt_keys)
        return sample(policy, params, prompt, branch_keys, sampling, mesh)

    return RolloutProgram(rollout)


class RolloutProgram:
    """jit of `rollout(mesh, params, ...)` for the mesh that the parameters lie on."""

    def __init__(self, rollout: Callable[..., Rollout]):
        self._jit = jax.jit(rollout, static_argnums=0)

    def __call__(self, params: Params, *inputs: Any) -> Rollout:
        return self._jit(sharding.mesh_of(params), params, *inputs)

    def lower(self, params: Params, *inputs: Any) -> jax.stages.Lowered:
        return self._jit.lower(sharding.mesh_of(params), params, *inputs)


def lower_rollout(
    policy: Policy, sampling: Sampling, dtype: str, params: Params, *inputs: Any
) -> tuple[jax.stages.Lowered | None, jax.stages.Lowered]:
    """The two programs of a rollout for (abstract) arguments like these, traced and not compiled yet.

    The first brings {"decoder": parameters} to the layout of sampling and to `dtype`, the compute type. It is None
    where they are in both already. The second is the rollout from the parameters in that layout.
    """
    program, mesh = make_rollout(policy, sampling), sharding.mesh_of(params)
    relay = sharding.make_relay(mesh, params, dtype) if mesh is not None else None
    if relay is None:
        return None, program.lower(params, *inputs)
    lowered = relay.lower({"decoder": params["decoder"]})
    sampled = sharding.abstract(lowered.out_info, sharding.sampling_shardings(mesh, lowered.out_info))
    return lowered, program.lower({**params, **sampled}, *inputs)


def compile_rollout(
    policy: Policy, sampling: Sampling, dtype: str, params: Params, *inputs: Any
) -> Callable[..., Rollout]:
    """The rollout compiled for arguments like these, to be called with parameters as they are trained.

    Each rollout first brings the decoder's parameters to the layout of sampling, see `lower_rollout`. That copy lives
    as long as the rollout.
    """
    relay, program = lower_rollout(policy, sampling, dtype, params, *inputs)
    compiled = program.compile()
    if relay is None:
        return compiled
    relaid = relay.compile()

    def rollout(params: Params, *inputs: Any) -> Rollout:
        return compiled({**params, **relaid({"decoder": params["decoder"]})}, *inputs)

    return rollout


def sample(
    policy: Policy, params: Params, prompt: Prompt, keys: jax.Array, sampling: Sampling, mesh: Mesh | None = None
) -> Rollout:
    """The decoding loop; `keys` [B, G] are PRNG keys, one per branch."""
    batch, group = keys.shape
    with sharding.layout(mesh, sharding.TRAINING):  # A whole prompt is more than the weights that it meets.
        image_embeds = policy.encode(params, prompt.images)
        prefix, logits = policy.prefill(params, prompt, image_embeds)
        branch = policy.empty_branch(batch, group, sampling.max_tokens)

    @jax.named_scope("sample")
    def draw(logits: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        if sampling.greedy:
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            scaled = logits
        else:
            scaled = logits / sampling.temperature
            step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, t)))(keys)
            tokens = categorical(step_keys, truncate(scaled, sampling.top_p, sampling.top_k))
        return tokens, _log_prob(scaled, tokens)

    def record(buffers, t, tokens, log_probs, done):
        """Writes index t of the unfinished branches; returns (buffers, tokens [B, G], done [B, G])."""
        out_tokens, mask, policy_log_probs = buffers
        tokens = jnp.where(done, policy.pad_token, tokens)
        buffers = (
            out_tokens.at[:, :, t].set(tokens),
            mask.at[:, :, t].set(~done),
            policy_log_probs.at[:, :, t].set(jnp.where(done, 0.0, log_probs)),
        )
        return buffers, tokens, done | (tokens[..., None] == ends).any(-1)

    ends = jnp.array(policy.end_tokens, jnp.int32)
    shape = (batch, group, sampling.max_tokens)
    buffers = (jnp.full(shape, policy.pad_token, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
    # A copy per branch rather than a broadcast, so that the first draw costs the same as any other.
    first_logits = jnp.repeat(logits[:, None], group, axis=1)
    start = jnp.zeros((), jnp.int32)
    buffers, tokens, done = record(buffers, start, *draw(first_logits, start), jnp.zeros((batch, group), bool))

    def unfinished(carry):
        t, _, _, done, _ = carry
        return (t < sampling.max_tokens) & ~jnp.all(done)

    def extend(carry):
        t, branch, tokens, done, buffers = carry
        with sharding.layout(mesh, sharding.SAMPLING):
            branch, logits = policy.decode(params, prefix, branch, tokens, t - 1)
        buffers, tokens, done = record(buffers, t, *draw(logits, t), done)
        return t + 1, branch, tokens, done, buffers

    _, _, _, done, buffers = jax.lax.while_loop(unfinished, extend, (start + 1, branch, tokens, done, buffers))
    out_tokens, mask, policy_log_probs = buffers
    lengths = mask.sum(-1, dtype=jnp.int32)
    return Rollout(out_tokens, mask, policy_log_probs, lengths, ~done, image_embeds)


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


def _log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability [...] of `tokens` [...] under softmax of `logits` [..., V]."""
    token_logits = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return token_logits - jax.nn.logsumexp(logits, axis=-1)
