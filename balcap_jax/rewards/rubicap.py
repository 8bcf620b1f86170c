"""RubiCap (arXiv 2603.09160): weighted binary criteria, written offline for each picture and judged from text alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.judges.schema import Failure, Judge, RubricQuestion, RubricVerdict
from balcap_jax.rewards.base import Samples, Scored, Scores, ask_all, collect


class RubicapReward:
    """K = 1: the weights of the criteria that a caption meets over all weights, in [0, 1]."""

    names: tuple[str, ...] = ("rubric",)
    gated: tuple[bool, ...] = (False,)
    needs: tuple[str, ...] = ("rubrics",)
    asks: tuple[str, ...] = ("rubric",)

    def __init__(self, judge: Judge, settings: Mapping[str, Any] | None = None):
        del settings
        self.judge = judge

    def __call__(self, samples: Samples) -> Scores:
        """A detail holds "rubric", [{"criterion", "weight", "passed"}]."""
        rubrics = [json.loads(metadata.get("rubrics") or "[]") for metadata in samples.metadata]
        asked = [(b, g) for b, g in samples.where if rubrics[b]]
        questions = [RubricQuestion(samples.captions[b][g], [one["criterion"] for one in rubrics[b]]) for b, g in asked]
        verdicts = dict(zip(asked, ask_all(self.judge.rubric, questions), strict=True))
        none = [Failure(f"example {name} has no rubrics") for name in samples.example_ids]
        scored = [[score_rubric(verdicts.get((b, g), none[b]), rubrics[b])] for b, g in samples.where]
        return collect(self, samples, scored, self.judge)


def score_rubric(verdict: RubricVerdict | Failure, rubrics: Sequence[Mapping[str, Any]]) -> Scored:
    """sum(weight of what passed) / sum(weight); an answer of another length cannot be matched: a failure."""
    if isinstance(verdict, Failure):
        return verdict, {}
    if len(verdict.passed) != len(rubrics):
        return Failure(f"the judge answered on {len(verdict.passed)} criteria, {len(rubrics)} were asked"), {}
    shown = [
        {"criterion": one["criterion"], "weight": float(one["weight"]), "passed": passed}
        for one, passed in zip(rubrics, verdict.passed, strict=True)
    ]
    total = sum(one["weight"] for one in shown)
    return sum(one["weight"] for one in shown if one["passed"]) / total, {"rubric": shown}
