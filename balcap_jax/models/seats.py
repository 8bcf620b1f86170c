"""Where the rows of a refilled rollout sit: branches of any prompts, each at a token of its own.

Prompts lie in lines of G places, one for each of a prompt's branches. What reads the prompt's keys is arranged by
lines, so that the branches of a prompt read them together, and all else by rows.

The cache of the rows is a ring. All rows write the position of the current step, so that a step takes one write
wherever its branches are, and a row that is at token t of its branch reads what it wrote in its last t steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from balcap_jax.parallel.sharding import constrain


class Seats(NamedTuple):
    """W rows and A lines in each of the Q parts of a batch.

    step: [] int32, steps before this one. t: [Q W] int32, the token of its branch that each row is at.
    row: [Q, A G] the row in each place, any row where there is none. place: [Q, W] the place of each row, any place of
    rows without a branch.
    """

    step: jax.Array
    t: jax.Array
    row: jax.Array
    place: jax.Array

    def to_lines(self, x: jax.Array, lines: int) -> jax.Array:
        """x [Q W, 1, ...] -> [lines = Q A, G, ...]."""
        return _taken(x, self.row, lines)

    def to_rows(self, x: jax.Array) -> jax.Array:
        """x [Q A, G, ...] -> [Q W, 1, ...]."""
        return _taken(x, self.place, self.place.size)

    def to_each(self, x: jax.Array) -> jax.Array:
        """What belongs to the rows' prompts: x [Q A] -> [Q W]."""
        parts, places = self.row.shape
        group = places * parts // len(x)
        return jnp.take_along_axis(x.reshape(parts, -1), self.place // group, axis=1).reshape(-1)

    def written(self, length: int, span: int) -> tuple[jax.Array, jax.Array]:
        """The blocks of `span` positions of a ring of `length` that hold what a row may read: (first, number)."""
        first = (self.step - self.t.max()) // span
        # A ring that has come round holds its oldest and its newest positions in one block.
        return first, jnp.minimum(-(-self.step // span) - first, length // span)

    def counts(self, positions: jax.Array, length: int) -> jax.Array:
        """Which positions [S] of a ring of `length` each row may read, [Q W, 1, 1, 1, S] bool."""
        age = (self.step - positions) % length
        return ((age > 0) & (age <= self.t[:, None]))[:, None, None, None]


def _taken(x: jax.Array, index: jax.Array, lines: int) -> jax.Array:
    """x [Q a, b, ...] at index [Q, c] among the a b of each part -> [lines, Q c / lines, ...]."""
    found = jax.vmap(lambda x, i: x[i])(x.reshape(len(index), -1, *x.shape[2:]), index)
    return constrain(found.reshape(lines, -1, *x.shape[2:]), "batch", None, "heads")
