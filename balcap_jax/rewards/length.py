"""The linear length penalties to which the gate is compared, as one more objective beside those of any reward.

two_sided       max(0, 1 - |rho - 1|), rho = words of the caption over words of the reference
ramp            1 up to `length_start` tokens, 0 from `length_end` on, linear in between (CapRL++)
ramp_reference  the same ramp in words, from the reference's length to twice that
"""

from collections.abc import Mapping
from typing import Any

from balcap_jax.data.words import count_words
from balcap_jax.judges.schema import Failure
from balcap_jax.rewards.base import Joined, RewardFn, Samples, Scores, collect

KINDS = ("none", "two_sided", "ramp", "ramp_reference")
LENGTH = "length"  # the objective's name


class LengthPenalised(Joined):
    """The objectives of `reward`, and "length" after them."""

    def __init__(self, reward: RewardFn, settings: Mapping[str, Any]):
        super().__init__(reward, Length(settings=settings))


class Length(RewardFn):
    """K = 1: the penalty that the setting `length` names."""

    names: tuple[str, ...] = (LENGTH,)
    gated: tuple[bool, ...] = (False,)

    def __call__(self, samples: Samples) -> Scores:
        """Raises ValueError where `ramp` is asked for captions whose tokens nobody counted."""
        return collect(self, samples, [[(self._score(samples, b, g), {})] for b, g in samples.where], None)

    def _score(self, samples: Samples, b: int, g: int) -> float | Failure:
        kind = self.settings["length"]
        if kind == "ramp":
            if samples.tokens is None:
                raise ValueError("the ramp in tokens needs Samples.tokens")
            return ramp(float(samples.tokens[b, g]), self.settings["length_start"], self.settings["length_end"])
        words, reference = count_words(samples.captions[b][g]), count_words(samples.references[b])
        if not reference:
            return Failure(f"example {samples.example_ids[b]} has an empty reference")
        return two_sided(words / reference) if kind == "two_sided" else ramp(words, reference, 2 * reference)


def two_sided(ratio: float) -> float:
    return max(0.0, 1.0 - abs(ratio - 1.0))


def ramp(length: float, start: float, end: float) -> float:
    """1 up to `start`, 0 from `end` on."""
    return min(1.0, max(0.0, (end - length) / (end - start)))
