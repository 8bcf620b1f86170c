"""Refill: the branches of a batch wait in a queue, and a row whose branch has ended takes the next one.

All prompts are prefilled first. Then one loop decodes a fixed number of rows, each at a token of its own branch. Every
part of the batch (what one device holds) has its own rows and its own queue, and nothing moves between parts.

The keys and values of the prompts that have a row lie in lines, copied there when the first branch of a prompt is
taken. A prompt waits while all lines are in use. Rows and lines meet as `models.seats` has it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from balcap_jax.drawing import Sampling, draw
from balcap_jax.models.decoder import Prefix
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.models.seats import Seats
from balcap_jax.parallel import sharding

SPARE = 2
"""Lines beside two for each G rows: with fewer, stragglers keep prompts waiting (docs/performance.md)."""


class Refilled(NamedTuple):
    """tokens, mask, policy_log_probs [B, G, R], slots [] and image_embeds [B, I, D], see `rollout.Rollout`."""

    tokens: jax.Array
    mask: jax.Array
    policy_log_probs: jax.Array
    slots: jax.Array
    image_embeds: jax.Array


class _Queue(NamedTuple):
    """A part's branches that go on after their first token, prompt by prompt; `taken` of `count` have had a row.

    branches [Q, S]: indices in the part. turn [Q, prompts]: how many of the prompts with such branches come before
    each one; prompts [Q, prompts] in that order. opened [Q]: prompts that have had a line. taken, count [Q].
    """

    branches: jax.Array
    turn: jax.Array
    prompts: jax.Array
    opened: jax.Array
    taken: jax.Array
    count: jax.Array


class _Rows(NamedTuple):
    """What the rows decode, [Q, W] each, and the prompts of the lines, [Q, A].

    branch: index in the part. start: steps before the branch's first one. tokens: the last one. ended: also rows
    without a branch.
    """

    branch: jax.Array
    start: jax.Array
    tokens: jax.Array
    ended: jax.Array
    lines: jax.Array


class _Written(NamedTuple):
    """[Q, S, R] of all branches; tokens are -1 where nothing is written."""

    tokens: jax.Array
    log_probs: jax.Array


def sample(
    policy: Policy,
    params: Params,
    prompt: Prompt,
    keys: jax.Array,
    sampling: Sampling,
    mesh: Mesh | None = None,
    *,
    limits: jax.Array | None = None,
) -> Refilled:
    """As `rollout.sample`, for the whole batch at once and with the rows of one of `sampling.parts`."""
    batch, group = keys.shape
    length = sampling.max_tokens
    limits = jnp.full((batch, group), length) if limits is None else limits
    ends = jnp.array(policy.end_tokens, jnp.int32)
    parts = sharding.batch_parts(batch)
    prompts, size = batch // parts, batch // parts * group
    width = size // sampling.parts

    def begin(prompt: Prompt, keys: jax.Array, limits: jax.Array):
        with sharding.layout(mesh, sharding.TRAINING):
            image_embeds = policy.encode(params, prompt.images)
            prefix, logits = policy.prefill(params, prompt, image_embeds)
        with jax.named_scope("sample"):
            tokens, log_probs = draw(sampling, jnp.repeat(logits[:, None], group, axis=1), keys, 0)
        ended = (tokens[..., None] == ends).any(-1) | (limits <= 1)
        return prefix, (image_embeds, tokens, log_probs, ended)

    # The prefix stays in its parts: the rows alone read it.
    prefix, whole = sharding.stacked_parts(begin, (prompt, keys, limits), sampling.parts)
    image_embeds, *firsts = sharding.join_parts(whole)
    keys, limits, first, first_log_probs, ended = (x.reshape(parts, size) for x in (keys, limits, *firsts))
    mask, next_position = (x.reshape(parts, prompts, *x.shape[1:]) for x in sharding.join_parts(prefix[2:]))

    none = jnp.zeros((parts, width), jnp.int32)
    lines = lines_of(prompts, group, width)
    rows = _Rows(none, none, none, none == 0, jnp.full((parts, lines), -1))
    queue = _queue(ended, group)
    written = _Written(
        jnp.full((parts, size, length), -1).at[..., 0].set(first),
        jnp.zeros((parts, size, length)).at[..., 0].set(first_log_probs),
    )
    cache = policy.empty_branch(parts * width, 1, length)
    _, layers, _, *shape = prefix.keys.shape
    own = sharding.constrain(jnp.zeros((layers, parts * lines, *shape), prefix.keys.dtype), None, "batch", "heads")

    def extend(carry):
        """Gives the next branches to rows that have ended, and runs a token of each row's branch."""
        step, queue, rows, keys_of, values_of, cache, written = carry
        opens, queue, rows = _take(queue, rows, step, first, group)
        keys_of = _copied(keys_of, prefix.keys, rows.lines, opens)
        values_of = _copied(values_of, prefix.values, rows.lines, opens)
        of_lines = (x.reshape(parts * lines, *x.shape[2:]) for x in _at((mask, next_position), rows.lines))
        t = jnp.where(rows.ended, 0, step - rows.start)
        seats = _seats(rows, step, t, group)
        with sharding.layout(mesh, sharding.SAMPLING):
            cache, logits = policy.decode(
                params, Prefix(keys_of, values_of, *of_lines), cache, rows.tokens.reshape(-1, 1), seats
            )
        with jax.named_scope("sample"):
            row_keys, row_limits = _at((keys, limits), rows.branch)
            tokens, log_probs = draw(sampling, logits.reshape(parts, width, -1), row_keys, t + 1)
            branch = jnp.where(rows.ended, size, rows.branch)
            written = jax.tree.map(lambda x, new: _put(x, branch, t + 1, new), written, _Written(tokens, log_probs))
            ended = rows.ended | (tokens[..., None] == ends).any(-1) | (t + 2 >= row_limits)
        return step + 1, queue, rows._replace(tokens=tokens, ended=ended), keys_of, values_of, cache, written

    def unfinished(carry):
        _, queue, rows, *_ = carry
        return jnp.any(~rows.ended) | jnp.any(queue.taken < queue.count)

    carry = (jnp.zeros((), jnp.int32), queue, rows, own, own, cache, written)
    step, *_, written = jax.lax.while_loop(unfinished, extend, carry)
    tokens, log_probs = (sharding.constrain(x.reshape(batch, group, length), "batch") for x in written)
    mask = tokens >= 0
    slots = (size + step * width) / jnp.float32(prompts)
    return Refilled(jnp.where(mask, tokens, policy.pad_token), mask, log_probs, slots, image_embeds)


def lines_of(prompts: int, group: int, width: int) -> int:
    """Lines for `width` rows of a part with so many prompts of `group` branches each."""
    return min(2 * -(-width // group) + SPARE, prompts)


def _queue(ended: jax.Array, group: int) -> _Queue:
    """The queue of branches [Q, S] that have not ended."""
    parts = len(ended)
    has_some = ~ended.reshape(parts, -1, group).all(-1)
    nothing = jnp.zeros(parts, jnp.int32)
    branches, prompts = (jnp.argsort(~some, axis=1, stable=True) for some in (~ended, has_some))
    return _Queue(
        branches, jnp.cumsum(has_some, axis=1) - 1, prompts, nothing, nothing, (~ended).sum(1, dtype=jnp.int32)
    )


def _take(queue: _Queue, rows: _Rows, step: jax.Array, first: jax.Array, group: int) -> tuple[jax.Array, _Queue, _Rows]:
    """Which lines take a prompt [Q, A], and the queue and the rows after each free row has taken a branch.

    A branch waits where its prompt has no line yet and none is free. first [Q, S]: the branches' first tokens.
    """

    def of_part(queue: _Queue, rows: _Rows, first: jax.Array) -> tuple[jax.Array, _Queue, _Rows]:
        following = queue.branches[jnp.minimum(queue.taken, queue.count - 1)] // group
        going = (rows.lines[:, None] == rows.branch // group) & ~rows.ended
        free = ~going.any(1) & ~((rows.lines == following) & (queue.taken < queue.count))
        place = queue.taken + jnp.cumsum(rows.ended) - 1
        branch = queue.branches[jnp.where(rows.ended, place, 0)]
        turn = queue.turn[branch // group]
        takes = rows.ended & (place < queue.count) & (turn < queue.opened + free.sum())
        opened = jnp.maximum(queue.opened, jnp.where(takes, turn + 1, 0).max())
        turn = queue.opened + jnp.cumsum(free) - 1
        opens = free & (turn < opened)
        lines = jnp.where(opens, queue.prompts[jnp.where(opens, turn, 0)], rows.lines)
        branch = jnp.where(takes, branch, rows.branch)
        start, tokens = jnp.where(takes, step, rows.start), jnp.where(takes, first[branch], rows.tokens)
        queue = queue._replace(opened=opened, taken=queue.taken + takes.sum(dtype=jnp.int32))
        return opens, queue, _Rows(branch, start, tokens, rows.ended & ~takes, lines)

    return jax.vmap(of_part)(queue, rows, first)


def _seats(rows: _Rows, step: jax.Array, t: jax.Array, group: int) -> Seats:
    """The seats of `rows` that are at tokens t [Q, W]."""

    def of_part(rows: _Rows) -> tuple[jax.Array, jax.Array]:
        line = jnp.argmax(rows.lines == (rows.branch // group)[:, None], axis=1)
        place, places = line * group + rows.branch % group, rows.lines.size * group
        # Rows that have ended keep a place that may be another's.
        taken = jnp.where(rows.ended, places, place)
        return jnp.zeros(places, jnp.int32).at[taken].set(jnp.arange(len(place)), mode="drop"), place

    return Seats(step, t.reshape(-1), *jax.vmap(of_part)(rows))


def _copied(own: jax.Array, prefix: jax.Array, of_line: jax.Array, opens: jax.Array) -> jax.Array:
    """`own` [L, Q A, M, P, H] with the keys or values of its prompt in each line that opens.

    prefix: [n, L, B / n, M, P, H]; of a device's prompts in the batch's order, part j has every n-th, from the j-th on.
    of_line, opens: [Q, A].
    """
    count, layers = prefix.shape[:2]

    def on_device(own: jax.Array, prefix: jax.Array, of_line: jax.Array, opens: jax.Array) -> jax.Array:
        order = jnp.argsort(~opens[0])

        def copy(index: jax.Array, own: jax.Array) -> jax.Array:
            line = order[index]
            number = of_line[0, line]
            start = (number % count, 0, number // count, 0, 0, 0)
            found = jax.lax.dynamic_slice(prefix, start, (1, layers, 1, *prefix.shape[3:]))[0]
            return jax.lax.dynamic_update_slice(own, found, (0, line, 0, 0, 0))

        return jax.lax.fori_loop(0, opens[0].sum(dtype=jnp.int32), copy, own)

    arrays = (own, prefix, of_line, opens)
    axes = ((None, "batch", "heads"), (None, None, "batch", "heads"), ("batch",), ("batch",))
    return sharding.shard_mapped(on_device, arrays, axes)(*arrays)


def _at(arrays: Any, index: jax.Array) -> Any:
    """A tree of arrays [Q, S, ...] at index [Q, W] -> [Q, W, ...]."""
    return jax.tree.map(lambda array: jax.vmap(lambda x, i: x[i])(array, index), arrays)


def _put(array: jax.Array, branch: jax.Array, t: jax.Array, new: jax.Array) -> jax.Array:
    """array [Q, S, R] with `new` [Q, W] at index t [Q, W] of the branches [Q, W]; a branch S is none."""
    return jax.vmap(lambda x, i, t, new: x.at[i, t].set(new, mode="drop"))(array, branch, t, new)
