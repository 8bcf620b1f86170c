"""Stages of a rollout: as branches end, those that go on move together, and fewer rows are decoded.

A stage decodes lines of `group` branches, the branches of a line side by side and of one prompt, whose keys they share.
A prompt with more branches than that takes several lines. Every part of the batch (what one device holds) has as many
lines, and nothing moves between parts, so that a stage ends when the branches of each part fit the next one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SHORTEST = 256
"""Responses of fewer tokens are decoded in one stage: there is too little to save for what more programs take."""
SHRINK = 4
"""A stage has this many times fewer rows than the one before."""
MOST = 3
"""Stages of a rollout: each is a loop of its own to compile, and a fourth saved nothing (docs/performance.md)."""
LEAST_ROWS = 2
"""A matmul of one row takes other code on CPUs, and longer than one of two."""


class Stage(NamedTuple):
    """`lines` of `group` branches in each part."""

    lines: int
    group: int

    @property
    def rows(self) -> int:
        return self.lines * self.group


def plan(prompts: int, group: int, length: int) -> tuple[Stage, ...]:
    """The stages for `prompts` of a part, `group` branches each, of at most `length` tokens.

    First lines get shorter, as every prompt has fewer branches left, then there are fewer of them.
    """
    stages = [Stage(prompts, group)]
    while length >= SHORTEST and len(stages) < MOST and stages[-1].rows >= 2 * LEAST_ROWS:
        rows = max(stages[-1].rows // SHRINK, LEAST_ROWS)
        stages.append(Stage(prompts, -(-rows // prompts)) if rows > prompts else Stage(rows, 1))
    return tuple(stages)


def lines_needed(going: jax.Array, owner: jax.Array, prompts: int, size: int) -> jax.Array:
    """Lines of `size` branches that the branches which are going need in all, of each part.

    going: [Q, lines, g] bool; owner: [Q, lines] the prompt of each line -> [Q] int32.
    """
    of_line = going.sum(-1, dtype=jnp.int32)
    if size == 1:
        return of_line.sum(-1)
    of_prompt = jnp.where(owner[..., None] == jnp.arange(prompts), of_line[..., None], 0).sum(1)
    return (-(-of_prompt // size)).sum(-1)


class Moves(NamedTuple):
    """Where a part's next stage takes its lines and branches from.

    owner: [Q, lines] the prompt of each new line. lines: [Q, lines] a line of now with that prompt. places: [Q, rows]
    for each new row the row of now. real: [Q, rows] False for rows that are left over; they take the first row's place.
    """

    owner: jax.Array
    lines: jax.Array
    places: jax.Array
    real: jax.Array


def moves(going: jax.Array, owner: jax.Array, prompts: int, stage: Stage) -> Moves:
    """Gathers what goes on into the lines of `stage`, which must hold them; the order of prompts and branches stays.

    going: [Q, lines, g] bool; owner: [Q, lines] the prompt of each line, ascending.
    """

    def of_part(going: jax.Array, owner: jax.Array) -> Moves:
        rows, group = going.size, going.shape[-1]
        prompt, going = jnp.repeat(owner, group), going.ravel()
        count = jnp.zeros(prompts, jnp.int32).at[prompt].add(going)
        need = -(-count // stage.group)
        rank = jnp.cumsum(going) - 1 - (jnp.cumsum(count) - count)[prompt]  # among the prompt's own
        line = (jnp.cumsum(need) - need)[prompt] + rank // stage.group
        target = jnp.where(going, line * stage.group + rank % stage.group, stage.rows)
        places = jnp.full(stage.rows, rows).at[target].set(jnp.arange(rows), mode="drop")
        new_owner = (jnp.cumsum(need) <= jnp.arange(stage.lines)[:, None]).sum(-1)
        new_owner = jnp.minimum(new_owner, prompts - 1)
        lines = jnp.argmax(owner == new_owner[:, None], axis=-1)
        return Moves(new_owner, lines, jnp.where(places < rows, places, 0), places < rows)

    return jax.vmap(of_part)(going, owner)
