"""The linear length penalties to which the gate is compared, as one more objective beside those of any reward.

two_sided       max(0, 1 - |rho - 1|), rho = words of the caption over words of the reference
ramp            1 up to `length_start` tokens, 0 from `length_end` on, linear in between (CapRL++)
ramp_reference  the same ramp in words, from the reference's length to twice that
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from balcap_jax.data.words import count_words
from balcap_jax.judges.schema import Failure
from balcap_jax.rewards.base import RewardFn, Samples, Scores

KINDS = ("none", "two_sided", "ramp", "ramp_reference")


class LengthPenalised:
    """The objectives of `reward`, and "length" after them."""

    def __init__(self, reward: RewardFn, settings: Mapping[str, Any]):
        self.reward, self.kind = reward, settings["length"]
        self.start, self.end = settings["length_start"], settings["length_end"]
        self.names = (*reward.names, "length")
        self.gated = (*reward.gated, False)
        self.needs, self.asks = reward.needs, reward.asks

    def __call__(self, samples: Samples) -> Scores:
        """Raises ValueError where `ramp` is asked for captions whose tokens nobody counted."""
        scores = self.reward(samples)
        length = np.zeros((*samples.shape, 1), np.float32)
        valid = np.ones(length.shape, bool)
        detail = [[dict(entry) for entry in group] for group in scores.detail]
        for b, g in samples.where:
            value = self._score(samples, b, g)
            if isinstance(value, Failure):
                valid[b, g] = False
                detail[b][g]["failures"] = dict(detail[b][g].get("failures", {})) | {"length": value.reason}
            else:
                length[b, g] = value
        return Scores(np.concatenate([scores.rewards, length], -1), np.concatenate([scores.valid, valid], -1), detail)

    def _score(self, samples: Samples, b: int, g: int) -> float | Failure:
        if self.kind == "ramp":
            if samples.tokens is None:
                raise ValueError("the ramp in tokens needs Samples.tokens")
            return ramp(float(samples.tokens[b, g]), self.start, self.end)
        words, reference = count_words(samples.captions[b][g]), count_words(samples.references[b])
        if not reference:
            return Failure(f"example {samples.example_ids[b]} has an empty reference")
        return two_sided(words / reference) if self.kind == "two_sided" else ramp(words, reference, 2 * reference)


def two_sided(ratio: float) -> float:
    return max(0.0, 1.0 - abs(ratio - 1.0))


def ramp(length: float, start: float, end: float) -> float:
    """1 up to `start`, 0 from `end` on."""
    return min(1.0, max(0.0, (end - length) / (end - start)))
