"""Rank correlations, of models by two metrics."""

from collections.abc import Sequence

import numpy as np


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties share the mean of theirs."""
    values = np.asarray(values, float)
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return below + (equal + 1) / 2


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's correlation of the ranks. Raises ValueError for fewer than two values, or all equal ones."""
    first, second = (ranks(values) - np.mean(ranks(values)) for values in _pair(one, other))
    spread = np.sqrt((first**2).sum() * (second**2).sum())
    if not spread:
        raise ValueError("all values of one side are equal: they have no order")
    return float((first * second).sum() / spread)


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b. Raises ValueError as `spearman` does."""
    first, second = (np.sign(np.subtract.outer(values, values)) for values in _pair(one, other))
    spread = np.sqrt((first**2).sum() * (second**2).sum())
    if not spread:
        raise ValueError("all values of one side are equal: they have no order")
    return float((first * second).sum() / spread)


def _pair(one: Sequence[float], other: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(one, float), np.asarray(other, float)
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} values have no rank correlation")
    return first, second
