"""Paired comparisons over seeds: t tests, what they can detect, and Holm's correction for several of them.

Runs of one seed share their base model and their pictures, so a comparison is of one list of differences, one a seed.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ncfdtr, stdtr, stdtrit

ALPHA = 0.05
POWER = 0.8
_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Paired:
    """n differences of paired runs; one difference alone has no standard deviation (None).

    Without a spread there is no test: one difference, or several equal ones, as of a saturated metric, have no p value.
    """

    mean: float
    sd: float | None
    n: int

    def half(self, alpha: float = ALPHA) -> float | None:
        """Half of the 1 - alpha t interval of the mean; None of one difference."""
        if self.sd is None:
            return None
        return float(stdtrit(self.n - 1, 1 - alpha / 2)) * self.sd / math.sqrt(self.n)

    def p(self, null: float = 0.0) -> float | None:
        """Two-sided p value of the t test that the mean is `null`; None without a spread."""
        t = self._t(null)
        return None if t is None else 2 * float(stdtr(self.n - 1, -abs(t)))

    def p_above(self, null: float = 0.0) -> float | None:
        """Twice the one-sided p value, at most 1: the two-sided one where the mean is above `null`."""
        t = self._t(null)
        return None if t is None else min(1.0, 2 * float(stdtr(self.n - 1, -t)))

    def p_below(self, null: float = 0.0) -> float | None:
        """`p_above` of the other direction."""
        return Paired(-self.mean, self.sd, self.n).p_above(-null)

    def detectable(self, power: float = POWER, alpha: float = ALPHA) -> float | None:
        """`detectable` at this sd and number of seeds; None without a spread."""
        return detectable(self.sd, self.n, power, alpha) if self.sd else None

    def _t(self, null: float) -> float | None:
        return (self.mean - null) / (self.sd / math.sqrt(self.n)) if self.sd else None


def paired(differences: Sequence[float]) -> Paired:
    """Mean and sample standard deviation (ddof 1) of at least one difference."""
    values = np.asarray(differences, np.float64)
    return Paired(float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else None, values.size)


def power(effect: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """The probability that a two-sided paired t test of n seeds rejects 0 when the mean difference is `effect`.

    By the noncentral t distribution, whose square is a noncentral F of 1 and n - 1 degrees of freedom. `sd` is that of
    the differences; 0 makes any effect certain.
    """
    if effect == 0:
        return alpha
    if sd == 0:
        return 1.0
    shift, bound = abs(effect) / sd * math.sqrt(n), float(stdtrit(n - 1, 1 - alpha / 2))
    missed = float(ncfdtr(1, n - 1, shift**2, bound**2))
    return 1.0 if math.isnan(missed) else 1 - missed  # SciPy's is NaN where the series of a tiny one underflows.


def detectable(sd: float, n: int, wanted: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest mean difference that a test of n seeds finds with probability `wanted`."""
    if sd == 0:
        return 0.0
    # In units of sd / sqrt(n): the bound of the test, and twice as far, are below and above what is looked for.
    unit, bound = sd / math.sqrt(n), float(stdtrit(n - 1, 1 - alpha / 2))
    least, most = bound * unit / 10, (4 * bound + 10) * unit
    # By halves, as power rises with the effect. `scipy.optimize` would change Python's filters of warnings.
    for _ in range(60):
        middle = (least + most) / 2
        least, most = (middle, most) if power(middle, sd, n, alpha) < wanted else (least, middle)
    return most


def seeds_needed(sd: float, effect: float, wanted: float = POWER, alpha: float = ALPHA) -> int | None:
    """The smallest number of seeds whose test finds a mean difference of `effect` with probability `wanted`.

    None where a thousand do not.
    """
    return next((n for n in range(2, _MOST_SEEDS + 1) if power(effect, sd, n, alpha) >= wanted), None)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down rule, in the order given: each is compared with the level of all."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted
