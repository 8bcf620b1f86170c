"""RubiCap (arXiv 2603.09160): weighted binary criteria, written offline for each picture and judged from text alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.judges.schema import Failure, RubricQuestion, RubricVerdict
from balcap_jax.rewards.base import RewardFn, Samples, Scored, Scores, ask_kinds, collect


class RubicapReward(RewardFn):
    """K = 1: the weights of the criteria that a caption meets over all weights, in [0, 1]."""

    names: tuple[str, ...] = ("rubric",)
    gated: tuple[bool, ...] = (False,)
    needs: tuple[str, ...] = ("rubrics",)
    asks: tuple[str, ...] = ("rubric",)

    def __call__(self, samples: Samples) -> Scores:
        """A detail holds "rubric", [{"criterion", "weight", "passed"}]."""
        rubrics = [json.loads(metadata.get("rubrics") or "[]") for metadata in samples.metadata]
        places = [(b, g) for b, g in samples.where if rubrics[b]]
        criteria = [[rubric["criterion"] for rubric in of_example] for of_example in rubrics]
        questions = [
            samples.asked("rubric", b, g, RubricQuestion(samples.captions[b][g], criteria[b])) for b, g in places
        ]
        (answers,) = ask_kinds(self.judge, rubric=questions)
        verdicts = dict(zip(places, answers, strict=True))
        missing = [Failure(f"example {name} has no rubrics") for name in samples.example_ids]
        scored = [[score_rubric(verdicts.get((b, g), missing[b]), rubrics[b])] for b, g in samples.where]
        return collect(self, samples, scored, self.judge)


def score_rubric(verdict: RubricVerdict | Failure, rubrics: Sequence[Mapping[str, Any]]) -> Scored:
    """sum(weights of passed criteria) / sum(weights); an answer of another length cannot be matched: a failure."""
    if isinstance(verdict, Failure):
        return verdict, {}
    if len(verdict.passed) != len(rubrics):
        return Failure(f"the judge answered on {len(verdict.passed)} criteria, {len(rubrics)} were asked"), {}
    criteria = [
        {"criterion": rubric["criterion"], "weight": float(rubric["weight"]), "passed": passed}
        for rubric, passed in zip(rubrics, verdict.passed, strict=True)
    ]
    total = sum(rubric["weight"] for rubric in criteria)
    return sum(rubric["weight"] for rubric in criteria if rubric["passed"]) / total, {"rubric": criteria}
