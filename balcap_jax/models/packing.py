"""Responses packed end to end for the update, so that dense layers and logits see real tokens alone.

A response of n tokens is ceil(n / UNIT) units of UNIT tokens. A part is what one device holds in one micro-batch. The
units of all its responses lie one after the other in a static number of places, its capacity. The program itself
computes from the lengths where each unit belongs. Everything that moves does so in whole units and by gathers, in the
backward pass too.

The host picks the program: `choose` deals the prompts out to the parts and finds the smallest capacity that holds each.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.config.schema import UNIT as UNIT
from balcap_jax.config.schema import WORTH

# ------------------------------------------------------------------------------------------------- on the host


def units_of(lengths: np.ndarray) -> np.ndarray:
    """Units that responses of `lengths` tokens take, in the same shape."""
    return -(-lengths // UNIT)


def capacity(bucket: int, responses: int) -> int:
    """Units of a part that holds `responses` responses of `bucket` tokens on average."""
    return -(-bucket * responses // UNIT)


def micro_batches_of(bucket: int, micro_batches: int, *, prompt: int, group: int, length: int) -> int:
    """The fewest parts of a batch, a divisor of `micro_batches`, that compute no more positions at once than padding.

    A packed update of the padded one's micro-batches would hold few prompts, and its capacity must hold the longest.

    Args:
      bucket: tokens per response. micro_batches, length: of the padded update of the longest responses.
      prompt: P. group: G.
    """
    most = (prompt + group * length) / micro_batches
    divisors = (parts for parts in range(1, micro_batches + 1) if micro_batches % parts == 0)
    return next(parts for parts in divisors if (prompt + group * bucket) / parts <= most)


def part_of_rows(batch: int, devices: int, micro_batches: int) -> np.ndarray:
    """[B]: the part that each row of a batch is in, from 0.

    Rows lie on the devices in contiguous blocks, and a micro-batch is every micro_batches-th of them, see
    `train_step.accumulate`.
    """
    rows = np.arange(batch)
    return rows // (batch // devices) * micro_batches + rows % micro_batches


def deal(units: np.ndarray, devices: int, micro_batches: int) -> np.ndarray:
    """The order [B] of prompts that evens out the parts: row i of the batch is to be prompt order[i].

    The largest prompt goes first, each to the emptiest part that has room (longest processing time first, Graham 1969).
    The same numbers give the same order in every process.

    Args:
      units: [B], the units of all responses of each prompt.
      devices: parts that B is split over. micro_batches: parts of a device's rows.
    """
    part = part_of_rows(len(units), devices, micro_batches)
    rows = [list(np.flatnonzero(part == p)) for p in range(devices * micro_batches)]
    filled = np.zeros(len(rows), np.int64)
    order = np.empty(len(units), np.int32)
    for prompt in np.argsort(-units, kind="stable"):
        open_parts = [p for p, free in enumerate(rows) if free]
        emptiest = min(open_parts, key=lambda p: (filled[p], p))
        order[rows[emptiest].pop(0)] = prompt
        filled[emptiest] += units[prompt]
    return order


def largest_part(units: np.ndarray, devices: int, micro_batches: int) -> int:
    """Units of the fullest part of a batch whose prompts, in this order, have `units` [B]."""
    part = part_of_rows(len(units), devices, micro_batches)
    return int(np.bincount(part, weights=units).max())


class Choice(NamedTuple):
    """A packed update: its token bucket, and the order [B] to deal the prompts out in; None where there is one part."""

    bucket: int
    order: np.ndarray | None


def choose(lengths: np.ndarray, micro_batches: Mapping[int, int], devices: int, padded: int) -> Choice | None:
    """The smallest packed update that holds a batch, its prompts dealt out; None where padding is better.

    Args:
      lengths: [B, G] tokens.
      micro_batches: of the update of each token bucket. devices: parts that B is split over.
      padded: tokens per response that the padded update would compute.
    """
    units = units_of(lengths).sum(1)
    for bucket in sorted(bucket for bucket in micro_batches if bucket <= WORTH * padded):
        parts = devices, micro_batches[bucket]
        order = deal(units, *parts)
        if largest_part(units[order], *parts) <= capacity(bucket, lengths.size // math.prod(parts)):
            return Choice(bucket, order if math.prod(parts) > 1 else None)
    return None


# ------------------------------------------------------------------------------------------------- in the program


class Places(NamedTuple):
    """Where the units of Q parts lie: K places each, for the G responses of b prompts, of at most C units each.

    prompt, chunk, first [Q, K] int32: of the unit there its prompt among the part's, its number in its response, and
      the place of that response's first unit. An empty place is a response of its own.
    source [Q, K]: the unit of the padded form [b * G * C] that lies there, b * G * C for none.
    target [Q, b, G, C]: the place of each unit of the padded form, K for padding.
    units [Q, b]: the units of each prompt, which lie side by side.
    fits [Q] bool: whether all units of the part have a place.
    """

    prompt: jax.Array
    chunk: jax.Array
    first: jax.Array
    source: jax.Array
    target: jax.Array
    units: jax.Array
    fits: jax.Array


def places(lengths: jax.Array, length: int, bucket: int) -> Places:
    """The places of responses of `lengths` [Q, b, G] tokens, of at most `length`; `bucket` as of `capacity`."""
    parts, prompts, group = lengths.shape
    chunks, size = -(-length // UNIT), capacity(bucket, prompts * group)
    count = ((jnp.asarray(lengths) + UNIT - 1) // UNIT).reshape(parts, -1)
    end = jnp.cumsum(count, axis=1)
    start = end - count
    place = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (parts, size))
    real = place < end[:, -1:]
    # Responses that end at or before a place precede its own.
    response = jnp.where(real, (end[:, None, :] <= place[..., None]).sum(-1, dtype=jnp.int32), 0)
    first = jnp.where(real, jnp.take_along_axis(start, response, axis=1), place)
    chunk = place - first
    source = jnp.where(real, response * chunks + chunk, prompts * group * chunks)
    nth = jnp.arange(chunks, dtype=jnp.int32)
    target = start[..., None] + nth
    target = jnp.where((nth < count[..., None]) & (target < size), target, size)
    target, units = target.reshape(*lengths.shape, chunks), count.reshape(lengths.shape).sum(-1)
    return Places(response // group, chunk, first, source, target, units, end[:, -1] <= size)


def pack(x: jax.Array, at: Places) -> jax.Array:
    """[B, G, R, ...] -> [Q, K * UNIT, ...]; 0 in empty places."""
    parts, chunks, length = at.source.shape[0], at.target.shape[-1], x.shape[2]
    padding = [(0, 0), (0, 0), (0, chunks * UNIT - length)] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, padding).reshape(parts, -1, UNIT, *x.shape[3:])
    return _moved(x, at.source, at.target.reshape(parts, -1)).reshape(parts, -1, *x.shape[3:])


def unpack(x: jax.Array, at: Places, length: int) -> jax.Array:
    """[Q, K * UNIT, ...] -> [B, G, R, ...] with R = `length`; 0 in units of padding."""
    parts, group = at.target.shape[0], at.target.shape[2]
    x = x.reshape(parts, -1, UNIT, *x.shape[2:])
    x = _moved(x, at.target.reshape(parts, -1), at.source)
    return x.reshape(-1, group, at.target.shape[-1] * UNIT, *x.shape[3:])[:, :, :length]


@jax.custom_vjp
def _moved(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x [Q, S, ...] at index [Q, T] -> [Q, T, ...], 0 where it is S; `inverse` [Q, S] is the way back.

    An entry goes to one place at most, so the transpose is a gather too, where that of indexing is a scatter.
    """
    del inverse
    return jax.vmap(lambda part, i: part.at[i].get(mode="fill", fill_value=0))(x, index)


_moved.defvjp(
    lambda x, index, inverse: (_moved(x, index, inverse), (index, inverse)),
    lambda indices, gradient: (_moved(gradient, indices[1], indices[0]), None, None),
)
