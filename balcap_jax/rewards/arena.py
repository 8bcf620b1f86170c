"""An arena among the captions of one picture: a caption is worth the share of its comparisons that it wins.

The field's evaluation by preferences (CapArena, arXiv 2503.12329) as a reward: no reference, no units, and a scale that
moves with the policy. `BalCapArenaReward` has it beside BalCap's three objectives.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from balcap_jax.judges.schema import Failure, Judge, LeftOut, PreferenceQuestion, PreferenceVerdict
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import Joined, RewardFn, Samples, Scored, Scores, ask_kinds, collect

REFERENCE = -1  # stands for the reference among the places of a group
OPPONENTS = 2
_WON, _TIED, _LOST = 1.0, 0.5, 0.0


class ArenaReward(RewardFn):
    """K = 1 in [0, 1]: the mean of 1 for a comparison won, 1/2 for a tie, 0 for one lost.

    A group of G stands in a circle, in an order of the run's seed and the example. Each caption is compared with the
    next `settings["opponents"]` of it, and is shown first; so it is shown second as often, and a judge that prefers a
    place moves no caption. G * opponents questions give each caption 2 * opponents comparisons.

    Within a group the mean is 1/2 whatever the captions are worth. A caption that is alone in its group is therefore
    compared with the reference, in both orders, and so are all in evaluations (`measured`).
    """

    names: tuple[str, ...] = ("preference",)
    gated: tuple[bool, ...] = (False,)
    asks: tuple[str, ...] = ("preference",)

    def __init__(self, judge: Judge, settings: Mapping[str, Any] | None = None):
        super().__init__(judge, settings)
        self._with_reference = False

    def measured(self) -> "ArenaReward":
        measured = copy.copy(self)
        measured._with_reference = True
        return measured

    def __call__(self, samples: Samples) -> Scores:
        """A detail holds "compared", [{"with": place in the group or "reference", "first", "score"}]. Calls that failed
        are left out of the mean; the value is missing where more than half of them did."""
        pairs = [(b, *pair) for b in range(samples.shape[0]) for pair in self._pairs(samples, b)]
        (verdicts,) = ask_kinds(self.judge, preference=[_question(samples, *pair) for pair in pairs])
        compared: dict[tuple[int, int], list[tuple[int, bool, float | Failure]]] = {}
        for (b, first, second), verdict in zip(pairs, verdicts, strict=True):
            for place, other, number in ((first, second, 1), (second, first, 2)):
                compared.setdefault((b, place), []).append((other, number == 1, _score(verdict, number)))
        left_out = samples.left_out.get("preference", np.zeros(samples.shape, bool))
        scored = [
            [(LeftOut(), {}) if left_out[b, g] else score_comparisons(compared.get((b, g), []))]
            for b, g in samples.where
        ]
        return collect(self, samples, scored, self.judge)

    def _pairs(self, samples: Samples, b: int) -> list[tuple[int, int]]:
        """(first, second) of each comparison: places in the group, or REFERENCE."""
        group = samples.shape[1]
        if self._with_reference or group == 1:
            return [pair for g in range(group) for pair in ((g, REFERENCE), (REFERENCE, g))]
        members = np.arange(group)
        if "preference" in samples.left_out:
            members = members[~samples.left_out["preference"][b]]
        seed = "\x1f".join((str(self.settings.get("seed", 0)), "arena", samples.example_ids[b]))
        digest = hashlib.blake2b(seed.encode(errors="replace"), digest_size=16).digest()
        circle = np.random.default_rng(int.from_bytes(digest, "big")).permutation(members)
        return circular_pairs(circle.tolist(), self.settings.get("opponents", OPPONENTS))


class BalCapArenaReward(Joined):
    """K = 4: BalCap's three objectives, and the arena's."""

    names = BalCapReward.names + ArenaReward.names
    gated = BalCapReward.gated + ArenaReward.gated
    needs = BalCapReward.needs
    asks = BalCapReward.asks + ArenaReward.asks

    def __init__(self, judge: Judge, settings: Mapping[str, Any] | None = None):
        super().__init__(BalCapReward(judge, settings), ArenaReward(judge, settings))


def circular_pairs(circle: Sequence[int], opponents: int) -> list[tuple[int, int]]:
    """(first, second) of each member with the next ones on the circle, fewer where there are fewer."""
    count = len(circle)
    return [
        (member, circle[(i + step) % count])
        for step in range(1, min(opponents, count - 1) + 1)
        for i, member in enumerate(circle)
    ]


def _question(samples: Samples, b: int, first: int, second: int) -> PreferenceQuestion:
    def text(place: int) -> str:
        return samples.references[b] if place == REFERENCE else samples.captions[b][place]

    image = None if samples.images is None else samples.images[b]
    return PreferenceQuestion(text(first), text(second), image, samples.metadata[b], tuple(samples.reference_units[b]))


def _score(verdict: PreferenceVerdict | Failure, number: int) -> float | Failure:
    if isinstance(verdict, Failure):
        return verdict
    return _TIED if not verdict.winner else _WON if verdict.winner == number else _LOST


def score_comparisons(compared: Sequence[tuple[int, bool, float | Failure]]) -> Scored:
    """The mean score of (other place, shown first, score); missing where more than half of the calls failed."""
    failures = [score for _, _, score in compared if isinstance(score, Failure)]
    if 2 * len(failures) > len(compared):
        return failures[0], {}
    if not compared:
        return Failure("a caption alone in its group has nothing to be compared with"), {}
    known = [
        {"with": "reference" if other == REFERENCE else other, "first": first, "score": score}
        for other, first, score in compared
        if not isinstance(score, Failure)
    ]
    parts: dict[str, Any] = {"compared": known} | ({"failed_comparisons": failures[0].reason} if failures else {})
    return sum(each["score"] for each in known) / len(known), parts
