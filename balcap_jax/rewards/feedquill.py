"""FEEDQUILL's two scores as rewards (arXiv 2503.07906): how much of a caption is true, and how much truth it holds.

The paper trains reward models on them; here the judge that splits and verifies captions for BalCap gives them directly.
"""

from balcap_jax.judges.schema import Failure, PrecisionVerdict
from balcap_jax.rewards.balcap import precision_questions, shown_assertions
from balcap_jax.rewards.base import RewardFn, Samples, Scored, Scores, ask_kinds, collect


class FeedquillReward(RewardFn):
    """K = 2: the share of verified units in [0, 1], and their number. Whether they are pointable is not asked."""

    names: tuple[str, ...] = ("verified_fraction", "verified_count")
    gated: tuple[bool, ...] = (False, False)
    asks: tuple[str, ...] = ("precision",)

    def __call__(self, samples: Samples) -> Scores:
        (verdicts,) = ask_kinds(self.judge, precision=precision_questions(samples, pointability=False))
        return collect(self, samples, [score_units(verdict) for verdict in verdicts], self.judge)


def score_units(verdict: PrecisionVerdict | Failure) -> tuple[Scored, Scored]:
    """Verified units over all, and their number; both 0 for a caption that states nothing."""
    if isinstance(verdict, Failure):
        return (verdict, {}), (verdict, {})
    true = sum(assertion.verified for assertion in verdict.assertions)
    parts = {"assertions": shown_assertions(verdict)}
    return (true / max(len(verdict.assertions), 1), parts), (float(true), parts)
