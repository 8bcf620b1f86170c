"""Changes of held-out captions with their uncertainty, by a paired bootstrap over pictures.

A spread over captions says how much pictures differ, and nothing of whether the same pictures' captions have changed.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from balcap_jax.report.run import JudgedCaption, JudgedImage, Row, is_number

DRAWS = 2000  # resamples of the pictures
COVERAGE = 0.95
_APART = 0.5  # points by which a mean may differ from the one that the captions on disk have


class Change(NamedTuple):
    """A mean difference over `images` pictures, and its interval, in what is shown."""

    mean: float
    low: float
    high: float
    images: int


def value_of(caption: JudgedCaption, row: Row) -> float | None:
    """What the row shows of one caption."""
    value = caption.rewards.get(row.key)
    if value is None and row.key in ("b_capscore", "words", "in_band", "truncated"):
        value = getattr(caption, row.key)
    if isinstance(value, bool):
        value = float(value)
    return row.scale * value if is_number(value) else None


def means_of(images: Mapping[str, JudgedImage], row: Row) -> dict[str, float]:
    """By picture: the mean over its captions that have a value."""
    means = {}
    for name, image in images.items():
        values = [value for caption in image.captions if (value := value_of(caption, row)) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


@functools.lru_cache(maxsize=8)
def _weights(count: int) -> np.ndarray:
    """How often each of `count` pictures is drawn, over `count` [DRAWS, count]; the same in every page."""
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return draws / count


def change(
    before: Mapping[str, JudgedImage], after: Mapping[str, JudgedImage], row: Row, expected: float | None = None
) -> Change | None:
    """The change from `before` to `after` over the pictures in both; None where fewer than two have a value.

    It is None too where it is not the `expected` one: the captions on disk are not those that were counted.
    """
    first, last = means_of(before, row), means_of(after, row)
    both = [name for name in first if name in last]
    if len(both) < 2:
        return None
    differences = np.array([last[name] - first[name] for name in both])
    mean = float(differences.mean())
    if expected is not None and abs(mean - expected) > _APART:
        return None
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(_weights(len(both)) @ differences, [tail, 1 - tail])
    return Change(mean, float(low), float(high), len(both))
