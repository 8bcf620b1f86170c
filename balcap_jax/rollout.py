"""Sampling of G captions per image: encode the image once, prefill the prompt once, decode G branches.

One compiled program of a few loops, each over fewer rows than the one before (`staging`); the last ends when every
branch has ended. `sample` has the loops, `make_rollout` is its face. With `refill` it is one loop of `refill.sample`.
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

from balcap_jax import refill, staging
from balcap_jax.drawing import Sampling, draw
from balcap_jax.models.decoder import Branch, Params, Prefix
from balcap_jax.models.policy import Policy, Prompt
from balcap_jax.parallel import sharding
from balcap_jax.staging import Moves, Stage


class Rollout(NamedTuple):
    """G responses per prompt.

    tokens [B, G, R] int32, padding after the end token; mask [B, G, R] bool, end token included.
    policy_log_probs [B, G, R]: under the temperature alone, without top-k and top-p, as the trainer recomputes them.
    They are the denominator of the surrogate's ratio, and 0 outside the mask.
    lengths [B, G] int32 tokens, end token included; truncated [B, G] bool, no end token within R.
    slots [B] float32: tokens that were computed for the batch, useful or not, an even share for each prompt.
    image_embeds [B, I, D]: so that a frozen vision tower need not run again in the update.
    """

    tokens: jax.Array
    mask: jax.Array
    policy_log_probs: jax.Array
    lengths: jax.Array
    truncated: jax.Array
    slots: jax.Array
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
        members = jnp.arange(sampling.group_size)

        def of_branches(sampler: Callable[..., Rollout], prompt: Prompt, keys: jax.Array) -> Rollout:
            prompt_keys = jax.vmap(lambda key: jax.random.fold_in(base, key))(keys)
            branch_keys = jax.vmap(lambda key: jax.vmap(lambda g: jax.random.fold_in(key, g))(members))(prompt_keys)
            return sampler(policy, params, prompt, branch_keys, sampling, mesh)

        with sharding.layout(mesh, sharding.SAMPLING):
            if sampling.refill and sampling.parts > 1:
                return of_branches(refilled, prompt, keys)
            found: Rollout = sharding.in_parts(functools.partial(of_branches, sample), (prompt, keys), sampling.parts)
            return found

    return RolloutProgram(rollout)


class RolloutProgram:
    """jit of `rollout(mesh, params, ...)` for the mesh that the parameters lie on."""

    def __init__(self, rollout: Callable[..., Rollout]):
        self._rollout, self._jit = rollout, jax.jit(rollout, static_argnums=0)
        self._lowered: dict[tuple[Any, ...], jax.stages.Lowered] = {}

    def __call__(self, params: Params, *inputs: Any) -> Rollout:
        found: Rollout = self._jit(sharding.mesh_of(params), params, *inputs)
        return found

    def lower(self, params: Params, *inputs: Any) -> jax.stages.Lowered:
        return self._jit.lower(sharding.mesh_of(params), params, *inputs)

    def lower_on(self, mesh: Mesh, params: Params, *inputs: Any) -> jax.stages.Lowered:
        """`lower` with `mesh` for sampling, where arguments may lie on another mesh of its devices.

        For arguments alike it is the same object, which is compiled once.
        """

        def rollout(*arguments: Any) -> Rollout:
            return self._rollout(mesh, *arguments)

        leaves, structure = jax.tree.flatten((params, *inputs))
        places = [getattr(leaf, "sharding", None) for leaf in leaves]
        # A traced array would carry the mesh of its argument, and JAX lets no two meshes meet in an operation.
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        key = (mesh, structure, *places, *shapes)
        if key not in self._lowered:
            program = jax.jit(rollout, in_shardings=jax.tree.unflatten(structure, places))
            self._lowered[key] = program.lower(*jax.tree.unflatten(structure, shapes))
        return self._lowered[key]


class LoweredRollout(NamedTuple):
    """The two programs of a rollout, traced and not compiled yet.

    layout: brings what `relay` takes of the decoder to the layout of sampling and to the compute type; both are None
    where nothing has to be. program: the rollout from the parameters in that layout.
    """

    relay: sharding.Relay | None
    layout: jax.stages.Lowered | None
    program: jax.stages.Lowered

    def compile(self) -> "CompiledRollout":
        layout = None if self.layout is None else self.layout.compile()
        return CompiledRollout(self.relay, layout, self.program.compile())


@dataclasses.dataclass(frozen=True)
class CompiledRollout:
    """A rollout to be called with parameters as they are trained.

    Each call first brings the decoder's parameters to the layout of sampling. That copy lives as long as the call.
    """

    relay: sharding.Relay | None
    layout: jax.stages.Compiled | None
    program: jax.stages.Compiled

    def __call__(self, params: Params, *inputs: Any) -> Rollout:
        if self.relay is not None and self.layout is not None:
            params = self.relay.join(params, self.layout(self.relay.take(params)))
        found: Rollout = self.program(params, *inputs)
        return found

    @property
    def new_bytes(self) -> int:
        """Bytes of a device that a call takes beside its arguments, at most."""
        memory: Any = self.program.memory_analysis()  # None for backends that are not JAX's own.
        beside: int = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        beside += memory.generated_code_size_in_bytes
        if self.layout is None:
            return beside
        move: Any = self.layout.memory_analysis()
        most: int = move.output_size_in_bytes + max(beside, move.temp_size_in_bytes)
        return most


def lower_rollout(
    policy: Policy, sampling: Sampling, dtype: str, params: Params, *inputs: Any, mesh: Mesh | None = None
) -> LoweredRollout:
    """The rollout for (abstract) arguments like these.

    `dtype` is the compute type, and `mesh` that of sampling (`sharding.sampling_mesh`), the parameters' own by default.
    """
    program, trained_on = make_rollout(policy, sampling), sharding.mesh_of(params)
    if trained_on is None:
        return LoweredRollout(None, None, program.lower(params, *inputs))
    mesh, layout = mesh or trained_on, None
    relay = sharding.make_relay(trained_on, params, dtype, mesh)
    if relay is not None:
        layout = relay.lower(params)
        params = relay.join(params, sharding.abstract(layout.out_info, relay.targets))
    return LoweredRollout(relay, layout, program.lower_on(mesh, params, *inputs))


def compile_rollout(
    policy: Policy, sampling: Sampling, dtype: str, params: Params, *inputs: Any, mesh: Mesh | None = None
) -> CompiledRollout:
    """`lower_rollout`, compiled."""
    return lower_rollout(policy, sampling, dtype, params, *inputs, mesh=mesh).compile()


class _Branches(NamedTuple):
    """What goes with each branch that is decoded, [lines, g, ...]; all parts' lines, part by part.

    place: its index among its part's places in the batch's order, that many for rows without a branch. limit: tokens
    after which it ends. tokens: the last one. written: `_Written` [lines, g, R].
    """

    key: jax.Array
    place: jax.Array
    limit: jax.Array
    tokens: jax.Array
    done: jax.Array
    written: "_Written"


class _Written(NamedTuple):
    """The first three fields of `Rollout`."""

    tokens: jax.Array
    mask: jax.Array
    policy_log_probs: jax.Array


_Carry = tuple[jax.Array, Branch, _Branches]  # of a decoding loop: the index t, the cache, the branches


def sample(
    policy: Policy,
    params: Params,
    prompt: Prompt,
    keys: jax.Array,
    sampling: Sampling,
    mesh: Mesh | None = None,
    *,
    limits: jax.Array | None = None,
    stages: Sequence[Stage] | None = None,
) -> Rollout:
    """The decoding loops, one for each stage; `keys` [B, G] are PRNG keys, one per branch.

    limits: [B, G] int32, tokens after which a branch ends whatever it says: for benchmarks and tests, to which lengths
    are given. stages: those of each part, the first one whole; None is `staging.plan`. They change no sample.
    """
    batch, group = keys.shape
    length = sampling.max_tokens
    with sharding.layout(mesh, sharding.TRAINING):  # A whole prompt is more than the weights that it meets.
        image_embeds = policy.encode(params, prompt.images)
        prefix, logits = policy.prefill(params, prompt, image_embeds)
        cache = policy.empty_branch(batch, group, length)
        parts = sharding.batch_parts(batch)
    prompts = batch // parts
    stages = staging.plan(prompts, group, length) if stages is None else stages
    ends = jnp.array(policy.end_tokens, jnp.int32)

    @jax.named_scope("sample")
    def extended(branches: _Branches, logits: jax.Array, t: jax.Array) -> _Branches:
        """Draws index t of the branches from `logits` [lines, g, V], and writes it for those that are not done."""
        done, (tokens, log_probs) = branches.done, draw(sampling, logits, branches.key, t)
        tokens = jnp.where(done, policy.pad_token, tokens)
        new = _Written(tokens, ~done, jnp.where(done, 0.0, log_probs))
        written = jax.tree.map(lambda old, new: old.at[:, :, t].set(new), branches.written, new)
        done = done | (tokens[..., None] == ends).any(-1) | (t + 1 >= branches.limit)
        return branches._replace(tokens=tokens, done=done, written=written)

    shape = (batch, group, length)
    written = _Written(
        jnp.full(shape, policy.pad_token, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32)
    )
    place = jnp.broadcast_to(jnp.arange(prompts * group).reshape(prompts, group), (parts, prompts, group))
    limits = jnp.full((batch, group), length) if limits is None else limits
    nothing = jnp.zeros((batch, group), jnp.int32)
    branches = _Branches(keys, place.reshape(batch, group), limits, nothing, nothing > 0, written)
    # A copy per branch rather than a broadcast, so that the first draw costs the same as any other.
    branches = extended(branches, jnp.repeat(logits[:, None], group, axis=1), jnp.zeros((), jnp.int32))
    owner = jnp.broadcast_to(jnp.arange(prompts), (parts, prompts))
    t, slots = jnp.ones((), jnp.int32), jnp.full((), prompts * group, jnp.float32)

    for index, (stage, following) in enumerate(zip(stages, (*stages[1:], None), strict=True)):
        if index:
            # Until the first move everything is in the batch's order.
            written = _collected(written, branches, parts) if index > 1 else branches.written
            going = ~branches.done.reshape(parts, -1, branches.done.shape[-1])
            moves = staging.moves(going, owner, prompts, stage)
            moved = jnp.where(jnp.any(going), t, 0)
            with sharding.layout(mesh, sharding.SAMPLING):
                prefix, cache = policy.regroup(prefix, cache, moves.lines, moves.places, moved)
            branches, owner = _moved(branches, moves, stage, prompts * group), moves.owner

        def unfinished(carry: _Carry, following: Stage | None = following, owner: jax.Array = owner) -> jax.Array:
            t, _, branches = carry
            if following is None:
                going = jnp.any(~branches.done)
            else:
                lines = ~branches.done.reshape(parts, -1, branches.done.shape[-1])
                going = jnp.any(staging.lines_needed(lines, owner, prompts, following.group) > following.lines)
            goes_on: jax.Array = (t < length) & going
            return goes_on

        def extend(carry: _Carry, prefix: Prefix = prefix) -> _Carry:
            t, cache, branches = carry
            with sharding.layout(mesh, sharding.SAMPLING):
                cache, logits = policy.decode(params, prefix, cache, branches.tokens, t - 1)
            return t + 1, cache, extended(branches, logits, t)

        start = t
        t, cache, branches = jax.lax.while_loop(unfinished, extend, (t, cache, branches))
        slots += (t - start) * float(stage.rows)

    written = _collected(written, branches, parts) if len(stages) > 1 else branches.written
    return _finished(policy, written, slots / prompts, image_embeds, mesh)


def refilled(
    policy: Policy,
    params: Params,
    prompt: Prompt,
    keys: jax.Array,
    sampling: Sampling,
    mesh: Mesh | None = None,
    *,
    limits: jax.Array | None = None,
) -> Rollout:
    """`sample` of the whole batch, in the rows of one of `sampling.parts`, see `refill`."""
    with sharding.layout(mesh, sharding.SAMPLING):
        found = refill.sample(policy, params, prompt, keys, sampling, mesh, limits=limits)
    return _finished(policy, _Written(*found[:3]), found.slots, found.image_embeds, mesh)


def _finished(
    policy: Policy, written: _Written, slots: jax.Array, image_embeds: jax.Array, mesh: Mesh | None
) -> Rollout:
    """The rollout of what is written; slots []: those of each prompt."""
    lengths = written.mask.sum(-1, dtype=jnp.int32)
    last = jnp.take_along_axis(written.tokens, lengths[..., None] - 1, axis=-1)
    truncated = ~(last == jnp.array(policy.end_tokens, jnp.int32)).any(-1)
    with sharding.layout(mesh, sharding.SAMPLING):
        slots = sharding.constrain(jnp.full(len(lengths), slots), "batch")
    return Rollout(*written, lengths, truncated, slots, image_embeds)


def _collected(written: _Written, branches: _Branches, parts: int) -> _Written:
    """`written` [B, G, R] of the batch, with what `branches` have written in their places."""

    def put(whole: jax.Array, rows: jax.Array) -> jax.Array:
        of_parts, rows = whole.reshape(parts, -1, whole.shape[-1]), rows.reshape(parts, -1, whole.shape[-1])
        place = branches.place.reshape(parts, -1)

        def put_part(whole: jax.Array, place: jax.Array, rows: jax.Array) -> jax.Array:
            return whole.at[place].set(rows, mode="drop")

        return jax.vmap(put_part)(of_parts, place, rows).reshape(whole.shape)

    collected: _Written = jax.tree.map(put, written, branches.written)
    return collected


def _moved(branches: _Branches, moves: Moves, stage: Stage, nowhere: int) -> _Branches:
    """The branches in the rows of the next stage; rows without a branch are done and have the place `nowhere`."""
    parts = len(moves.places)

    def take(rows: jax.Array) -> jax.Array:
        found: jax.Array = jax.vmap(lambda rows, i: rows[i])(rows.reshape(parts, -1, *rows.shape[2:]), moves.places)
        return found.reshape(-1, stage.group, *rows.shape[2:])

    moved: _Branches = jax.tree.map(take, branches)
    real = moves.real.reshape(-1, stage.group)
    return moved._replace(place=jnp.where(real, moved.place, nowhere), done=moved.done | ~real)
