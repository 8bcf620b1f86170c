"""The three rewards of BalCapRL: precision with pointability, recall of reference units, linguistic quality.

`TextReward` is recall and language alone: the objectives for a judge that sees no pictures.

The length gate is not applied here but in the compiled step, where the raw reward, the gate and the advantage meet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.judges import schema
from balcap_jax.judges.schema import Failure, Judge
from balcap_jax.rewards.base import RewardFn, Samples, Scored, Scores, ask_kinds, collect

HIGHEST_MARK = 5


class BalCapReward(RewardFn):
    """A RewardFn with K = 3 objectives in [0, 1], scored by `judge`.

    A Failure of the judge makes one objective of one sample a missing value, with its reason in the detail.
    It reads one setting, `pointability`: False leaves that test out of precision.
    """

    names: tuple[str, ...] = ("precision", "recall", "linguistic")
    gated: tuple[bool, ...] = (False, False, True)
    needs: tuple[str, ...] = ("reference_units",)
    asks: tuple[str, ...] = ("precision", "recall", "linguistic")

    def __init__(self, judge: Judge, settings: Mapping[str, Any] | None = None):
        super().__init__(judge, settings)
        self.pointability = self.settings.get("pointability", True)

    def __call__(self, samples: Samples) -> Scores:
        """Rewards [B, G, 3]. A detail is {"assertions", "covered", "clarity", "fluency", "coherency", "failures"}, with
        "judge" and "suspicious" as `collect` adds them; it lacks the parts of a failed objective.

        Raises ValueError when the judge loses an answer."""
        questions = precision_questions(samples, pointability=self.pointability)
        precision, recall, linguistic = score_text(self.judge, samples, precision=questions)
        precision = [score_precision(verdict, pointability=self.pointability) for verdict in precision]
        return collect(self, samples, list(zip(precision, recall, linguistic, strict=True)), self.judge)


class TextReward(RewardFn):
    """K = 2: BalCap without precision, for a judge that is a language model without eyes.

    Nothing punishes invention: a caption that names everything scores. It serves where there is no vision model, and
    is no method.
    """

    names: tuple[str, ...] = ("recall", "linguistic")
    gated: tuple[bool, ...] = (False, True)
    needs: tuple[str, ...] = ("reference_units",)
    asks: tuple[str, ...] = ("recall", "linguistic")

    def __call__(self, samples: Samples) -> Scores:
        """Rewards [B, G, 2]; a detail is that of `BalCapReward` without its assertions."""
        return collect(self, samples, list(zip(*score_text(self.judge, samples), strict=True)), self.judge)


def precision_questions(samples: Samples, *, pointability: bool = True) -> list[schema.PrecisionQuestion]:
    """One question per caption, in the order of `samples.where`."""
    images = samples.images
    return [
        samples.asked(
            "precision",
            b,
            g,
            schema.PrecisionQuestion(
                samples.captions[b][g], None if images is None else images[b], samples.metadata[b], pointability
            ),
        )
        for b, g in samples.where
    ]


def score_text(judge: Judge, samples: Samples, **more: Sequence) -> list[list]:
    """The answers to the questions of `more` (see `ask_kinds`), then the scores of recall and of language.

    One per caption, in the order of `samples.where`. A reference without units is not asked about.
    """
    with_units = [(b, g) for b, g in samples.where if len(samples.reference_units[b])]
    captions, units = samples.captions, samples.reference_units
    recall = [samples.asked("recall", b, g, schema.RecallQuestion(captions[b][g], units[b])) for b, g in with_units]
    linguistic = [
        samples.asked("linguistic", b, g, schema.LinguisticQuestion(captions[b][g])) for b, g in samples.where
    ]
    *others, covered, marks = ask_kinds(judge, **more, recall=recall, linguistic=linguistic)
    verdicts = dict(zip(with_units, covered, strict=True))
    recall_scores = [
        score_recall(verdicts.get((b, g)), len(units[b]), samples.example_ids[b]) for b, g in samples.where
    ]
    return [*others, recall_scores, [score_linguistic(verdict) for verdict in marks]]


def score_precision(verdict: schema.PrecisionVerdict | Failure, *, pointability: bool = True) -> Scored:
    """Assertions that are both verified and pointable over all assertions; a caption that asserts nothing gets 0.

    Without `pointability` it is enough that they are verified."""
    if isinstance(verdict, Failure):
        return verdict, {}
    true = sum(each.verified and (each.pointable or not pointability) for each in verdict.assertions)
    return true / max(len(verdict.assertions), 1), {"assertions": shown_assertions(verdict)}


def shown_assertions(verdict: schema.PrecisionVerdict) -> list[dict[str, Any]]:
    """The assertions of a verdict as a detail holds them."""
    return [
        {"text": each.text, "verified": each.verified, "pointable": each.pointable, "why": each.why}
        for each in verdict.assertions
    ]


def score_recall(verdict: schema.RecallVerdict | Failure | None, units: int, example_id: str) -> Scored:
    """Covered reference units over all units; an answer of the wrong length cannot be matched to them: a failure."""
    if not units:
        return Failure(f"example {example_id} has no reference units"), {}
    if isinstance(verdict, Failure):
        return verdict, {}
    covered = list(verdict.covered)
    if len(covered) != units:
        return Failure(f"the judge answered on {len(covered)} reference units, {units} were asked"), {}
    return sum(covered) / units, {"covered": covered}


def score_linguistic(verdict: schema.LinguisticVerdict | Failure) -> Scored:
    """The mean of the three marks, each mapped from 1-5 to mark / 5."""
    if isinstance(verdict, Failure):
        return verdict, {}
    marks = {"clarity": verdict.clarity, "fluency": verdict.fluency, "coherency": verdict.coherency}
    return sum(marks.values()) / (HIGHEST_MARK * len(marks)), marks
