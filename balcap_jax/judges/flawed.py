"""Deliberately wrong judges around the exact one of scenes, to see what training makes of them: `judge.flaws`.

    false_accept:p   what does not hold is accepted with probability p
    length:x         ... with probability min(1, x words / 50); marks go as far of their way to 5
    praise:x         ... with probability 1 - (1 - x)^r for r remarks that point at nothing; marks likewise
    failed:p         a call fails with probability p

What does not hold is an assertion that the scene refutes, a unit that is not covered, a criterion that is not met. What
points at nothing stays so, whoever accepts it. Of two captions, `length` and `praise` favour the one to which they are
more lenient. Answers to questions of several choices only fail. Flaws of the scores, and not of single verdicts, are in
`rewards.flawed`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from balcap_jax.data.scenes.reading import parse
from balcap_jax.judges import schema
from balcap_jax.judges.draws import uniform
from balcap_jax.judges.oracle import CRITERIA, TIE, OracleJudge, scene_of, worth
from balcap_jax.judges.schema import (
    ChoiceVerdict,
    Failure,
    Judge,
    LinguisticVerdict,
    PrecisionVerdict,
    PreferenceVerdict,
    RecallVerdict,
    RubricVerdict,
)

_USUAL_WORDS = 50  # of a caption of scenes: references have 46 on average
_HIGHEST_MARK = 5
_APART = 1_000_003  # between the seeds of two votes: runs of neighbouring seeds share no draw


class FlawedJudge(Judge):
    """The judge of scenes with `flaws` {name: amount}, whose verdict is that of the majority of `votes` (odd) votes.

    A draw follows from `seed`, the vote and the question with the caption: a resumed run meets the same errors. Votes
    are drawn apart from each other. Those that fail have no say; a question fails where all of them do.
    """

    def __init__(self, flaws: Mapping[str, float], votes: int = 1, seed: int = 0):
        self.flaws, self.votes = dict(flaws), votes
        self._voters = [OracleJudge(self.flaws.get("failed", 0.0), seed + vote * _APART) for vote in range(votes)]
        self._exact = OracleJudge()
        text = ", ".join(f"{name}:{amount:g}" for name, amount in self.flaws.items())
        self.about = {"model": f"oracle with {text}" + (f", {votes} votes" if votes > 1 else "")}

    def exact(self) -> Judge:
        return self._exact

    def precision(self, questions: Sequence[schema.PrecisionQuestion]) -> list[PrecisionVerdict | Failure]:
        def joined(question: schema.PrecisionQuestion, votes: Sequence[tuple[OracleJudge, PrecisionVerdict]]):
            place = str(scene_of(question.metadata).seed)
            assertions = [
                each.model_copy(
                    update={
                        "verified": self._is_accepted(
                            [(voter, verdict.assertions[i].verified) for voter, verdict in votes],
                            question.caption,
                            *("precision", place, str(i), each.text),
                        )
                    }
                )
                for i, each in enumerate(votes[0][1].assertions)
            ]
            return PrecisionVerdict(assertions=assertions)

        return self._voted("precision", questions, joined)

    def recall(self, questions: Sequence[schema.RecallQuestion]) -> list[RecallVerdict | Failure]:
        def joined(question: schema.RecallQuestion, votes: Sequence[tuple[OracleJudge, RecallVerdict]]):
            return RecallVerdict(
                covered=[
                    self._is_accepted(
                        [(voter, verdict.covered[i]) for voter, verdict in votes], question.caption, "recall", unit
                    )
                    for i, unit in enumerate(question.units)
                ]
            )

        return self._voted("recall", questions, joined)

    def rubric(self, questions: Sequence[schema.RubricQuestion]) -> list[RubricVerdict | Failure]:
        def joined(question: schema.RubricQuestion, votes: Sequence[tuple[OracleJudge, RubricVerdict]]):
            return RubricVerdict(
                passed=[
                    self._is_accepted(
                        [(voter, verdict.passed[i]) for voter, verdict in votes], question.caption, "rubric", criterion
                    )
                    for i, criterion in enumerate(question.criteria)
                ]
            )

        return self._voted("rubric", questions, joined)

    def linguistic(self, questions: Sequence[schema.LinguisticQuestion]) -> list[LinguisticVerdict | Failure]:
        def joined(question: schema.LinguisticQuestion, votes: Sequence[tuple[OracleJudge, LinguisticVerdict]]):
            lenience, verdict = self._lenience(question.caption), votes[0][1]
            marks = {name: getattr(verdict, name) for name in CRITERIA}
            if not lenience:
                return verdict
            return LinguisticVerdict(**{name: mark + lenience * (_HIGHEST_MARK - mark) for name, mark in marks.items()})

        return self._voted("linguistic", questions, joined)

    def choice(self, questions: Sequence[schema.ChoiceQuestion]) -> list[ChoiceVerdict | Failure]:
        return self._voted("choice", questions, lambda _, votes: votes[0][1])

    def preference(self, questions: Sequence[schema.PreferenceQuestion]) -> list[PreferenceVerdict | Failure]:
        def joined(question: schema.PreferenceQuestion, votes: Sequence[tuple[OracleJudge, PreferenceVerdict]]):
            bias = self._lenience(question.first) - self._lenience(question.second)
            if not bias:
                return votes[0][1]
            scene = scene_of(question.metadata)
            first, second = (worth(text, scene, question.units) for text in (question.first, question.second))
            margin = first - second + bias
            return PreferenceVerdict(winner=1 if margin > TIE else 2 if margin < -TIE else 0)

        return self._voted("preference", questions, joined)

    def _voted(self, method: str, questions: Sequence, joined: Callable[[Any, Sequence], Any]) -> list:
        """For each question what `joined` makes of the votes that did not fail, or the first failure."""
        answers = [getattr(voter, method)(questions) for voter in self._voters]
        verdicts = []
        for question, of_question in zip(questions, zip(*answers, strict=True), strict=True):
            votes = [
                (voter, answer)
                for voter, answer in zip(self._voters, of_question, strict=True)
                if not isinstance(answer, Failure)
            ]
            verdicts.append(joined(question, votes) if votes else of_question[0])
        return verdicts

    def _is_accepted(self, votes: Sequence[tuple[OracleJudge, bool]], caption: str, *about: str) -> bool:
        """The majority of `votes` (voter, what is true) on what `about` names; of a tie the first vote decides."""
        chance = 1 - (1 - self.flaws.get("false_accept", 0.0)) * (1 - self._lenience(caption))
        accepted = [
            holds or uniform(str(voter.seed), "false accept", *about, caption) < chance for voter, holds in votes
        ]
        balance = 2 * sum(accepted) - len(accepted)
        return balance > 0 if balance else accepted[0]

    def _lenience(self, caption: str) -> float:
        """The probability in [0, 1] of forgiving what is wrong, for what the caption is like as a whole."""
        length, praise = self.flaws.get("length", 0.0), self.flaws.get("praise", 0.0)
        by_length = min(1.0, length * len(caption.split()) / _USUAL_WORDS) if length else 0.0
        remarks = sum(claim.kind == "remark" for claim in parse(caption).claims) if praise else 0
        return 1 - (1 - by_length) * (1 - praise) ** remarks
