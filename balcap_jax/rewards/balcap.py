"""The three rewards of BalCapRL: precision with pointability, recall of reference units, linguistic quality.

The length gate is not applied here but in the compiled step, where the raw reward, the gate and the advantage meet.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from balcap_jax.judges.schema import (
    Failure,
    Judge,
    LinguisticQuestion,
    LinguisticVerdict,
    PrecisionQuestion,
    PrecisionVerdict,
    RecallQuestion,
    RecallVerdict,
)
from balcap_jax.rewards.base import Samples, Scores

HIGHEST_MARK = 5


class BalCapReward:
    """A RewardFn with K = 3 objectives in [0, 1], scored by `judge`.

    A Failure of the judge makes one objective of one sample a missing value, with its reason in the detail.
    """

    names: tuple[str, ...] = ("precision", "recall", "linguistic")
    gated: tuple[bool, ...] = (False, False, True)

    def __init__(self, judge: Judge):
        self.judge = judge

    def __call__(self, samples: Samples) -> Scores:
        """Rewards [B, G, 3]. A detail is {"assertions", "covered", "clarity", "fluency", "coherency", "failures"};
        the parts of a failed objective are left out. Raises ValueError when the judge loses an answer."""
        prompts, group = samples.shape
        where = [(b, g) for b in range(prompts) for g in range(group)]
        captions = [samples.captions[b][g] for b, g in where]
        images = [None if samples.images is None else samples.images[b] for b, _ in where]
        precision = _ask(
            self.judge.precision,
            [
                PrecisionQuestion(caption, image, samples.metadata[b])
                for caption, image, (b, _) in zip(captions, images, where, strict=True)
            ],
        )
        # Samples without reference units have no recall: there is nothing to ask.
        asked = [i for i, (b, _) in enumerate(where) if len(samples.reference_units[b])]
        answers = _ask(
            self.judge.recall,
            [RecallQuestion(captions[i], samples.reference_units[where[i][0]]) for i in asked],
        )
        recall: list = [None] * len(where)
        for i, answer in zip(asked, answers, strict=True):
            recall[i] = answer
        linguistic = _ask(self.judge.linguistic, [LinguisticQuestion(caption) for caption in captions])

        rewards = np.zeros((prompts, group, len(self.names)), np.float32)
        valid = np.zeros((prompts, group, len(self.names)), bool)
        detail: list[list[dict[str, Any]]] = [[{"failures": {}} for _ in range(group)] for _ in range(prompts)]
        for i, (b, g) in enumerate(where):
            units = samples.reference_units[b]
            scored = (
                score_precision(precision[i]),
                score_recall(recall[i], len(units), samples.example_ids[b]),
                score_linguistic(linguistic[i]),
            )
            for k, (value, parts) in enumerate(scored):
                if isinstance(value, Failure):
                    detail[b][g]["failures"][self.names[k]] = value.reason
                else:
                    rewards[b, g, k] = value
                    valid[b, g, k] = True
                    detail[b][g].update(parts)
        return Scores(rewards, valid, detail)


Scored = tuple[float | Failure, dict[str, Any]]  # the reward, or why there is none; and what a report shows of it


def score_precision(verdict: PrecisionVerdict | Failure) -> Scored:
    """Assertions that are both verified and pointable over all assertions; a caption that asserts nothing gets 0."""
    if isinstance(verdict, Failure):
        return verdict, {}
    held = sum(one.verified and one.pointable for one in verdict.assertions)
    assertions = [
        {"text": one.text, "verified": one.verified, "pointable": one.pointable, "why": one.why}
        for one in verdict.assertions
    ]
    return held / max(len(assertions), 1), {"assertions": assertions}


def score_recall(verdict: RecallVerdict | Failure | None, units: int, example_id: str) -> Scored:
    """Covered reference units over all units; an answer of the wrong length cannot be matched to them: a failure."""
    if not units:
        return Failure(f"example {example_id} has no reference units"), {}
    if isinstance(verdict, Failure):
        return verdict, {}
    covered = list(verdict.covered)
    if len(covered) != units:
        return Failure(f"the judge answered on {len(covered)} reference units, {units} were asked"), {}
    return sum(covered) / units, {"covered": covered}


def score_linguistic(verdict: LinguisticVerdict | Failure) -> Scored:
    """The mean of the three marks, each mapped from 1-5 to mark / 5."""
    if isinstance(verdict, Failure):
        return verdict, {}
    marks = {"clarity": verdict.clarity, "fluency": verdict.fluency, "coherency": verdict.coherency}
    return sum(marks.values()) / (HIGHEST_MARK * len(marks)), marks


def _ask(ask, questions: Sequence) -> list:
    """One answer per question, or a ValueError: a judge that loses answers would shift every score after them."""
    if not questions:
        return []
    answers = list(ask(questions))
    if len(answers) != len(questions):
        raise ValueError(f"{ask.__qualname__} returned {len(answers)} answers to {len(questions)} questions")
    return answers
