"""Recall and language alone: what a judge can say of captions that sees no pictures."""

from collections.abc import Mapping
from typing import Any

from balcap_jax.judges.schema import Judge
from balcap_jax.rewards.balcap import ask_about, score_linguistic, score_recall
from balcap_jax.rewards.base import Samples, Scores, collect


class TextReward:
    """K = 2: BalCap without precision, for a judge that is a language model without eyes.

    Nothing holds invented things back: a caption that says everything scores. It is there for what can be had without
    a vision model, not as a method.
    """

    names: tuple[str, ...] = ("recall", "linguistic")
    gated: tuple[bool, ...] = (False, True)
    needs: tuple[str, ...] = ("reference_units",)
    asks: tuple[str, ...] = ("recall", "linguistic")

    def __init__(self, judge: Judge, settings: Mapping[str, Any] | None = None):
        del settings
        self.judge = judge

    def __call__(self, samples: Samples) -> Scores:
        """Rewards [B, G, 2]; a detail is that of `BalCapReward` without its assertions."""
        recall, linguistic = ask_about(self.judge, samples)
        scored = [
            (
                score_recall(recall[i], len(samples.reference_units[b]), samples.example_ids[b]),
                score_linguistic(linguistic[i]),
            )
            for i, (b, _) in enumerate(samples.where)
        ]
        return collect(self, samples, scored, self.judge)
