"""Questions to a judge and its verdicts, whoever answers: the oracle, a hosted model or a policy on the mesh."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic


def _plain(value: Any) -> Any:
    """Refuses what pydantic would take: True as 1, and the text 0_4 as 4."""
    if isinstance(value, bool) or (isinstance(value, str) and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,20})?", value)):
        raise ValueError("no plain number")
    return value


PLAIN = pydantic.BeforeValidator(_plain)
"""For a number: models may write it as text, in plain digits, and a flag is no number."""

Mark = Annotated[int, pydantic.Field(ge=1, le=5), PLAIN]
_MeanMark = Annotated[int | float, pydantic.Field(ge=1, le=5), PLAIN]


class Assertion(pydantic.BaseModel):
    """One atomic statement of a caption. It is a true positive only when `verified` and `pointable` both hold."""

    text: str
    why: str = ""
    verified: bool
    pointable: bool


class PrecisionVerdict(pydantic.BaseModel):
    assertions: list[Assertion]


class RecallVerdict(pydantic.BaseModel):
    """`covered[u]` says whether the caption states reference unit u; same order and length as the units asked."""

    covered: list[bool]


class LinguisticVerdict(pydantic.BaseModel):
    """Marks 1 (worst) to 5 (best): whole numbers, or the means of a judge that gives each mark a probability."""

    clarity: _MeanMark
    fluency: _MeanMark
    coherency: _MeanMark


@dataclasses.dataclass(frozen=True)
class Failure:
    """A judge call that gave no usable answer after bounded retries: a missing value, never a score."""

    reason: str


@dataclasses.dataclass(frozen=True)
class LeftOut(Failure):
    """Stands for a question that `judge.ask` leaves out, and is its answer too: a missing value, but no failed call."""

    reason: str = "left out by judge.ask"


@dataclasses.dataclass(frozen=True)
class Usage:
    """Counts of what judging took; they add up.

    calls: questions, of which `cached` were answered without a request. tokens_in, tokens_out: of all requests, those
    of unusable answers too. failures: {"where: reason": questions that ended without an answer for it}.
    """

    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    failures: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(mine + theirs for mine, theirs in zip(self._values, other._values, strict=True)))

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(*(mine - theirs for mine, theirs in zip(self._values, other._values, strict=True)))

    @property
    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class PrecisionQuestion:
    """`image` uint8 [height, width, 3]; `metadata` is whatever the data set stores beside the example.

    Without `pointability` nobody reads that flag, and a judge may take as verified what nothing could refute.
    """

    method: ClassVar[str] = "precision"
    caption: str
    image: np.ndarray | None
    metadata: Mapping[str, Any]
    pointability: bool = True


@dataclasses.dataclass(frozen=True)
class RecallQuestion:
    method: ClassVar[str] = "recall"
    caption: str
    units: Sequence[str]


@dataclasses.dataclass(frozen=True)
class LinguisticQuestion:
    method: ClassVar[str] = "linguistic"
    caption: str


@dataclasses.dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question that is to be answered from the caption alone.

    `options` are (letter, text) as they are shown. `draw` is the number of a repetition, which is answered anew.
    `query` is the question in a form that needs no parsing, where the data set has one.
    """

    method: ClassVar[str] = "choice"
    caption: str
    question: str
    options: tuple[tuple[str, str], ...]
    draw: int = 0
    query: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)


class ChoiceVerdict(pydantic.BaseModel):
    """The answer as text; the caller looks for the letter in it."""

    answer: str


@dataclasses.dataclass(frozen=True)
class RubricQuestion:
    """Which of the binary `criteria` a caption meets, judged from text alone."""

    method: ClassVar[str] = "rubric"
    caption: str
    criteria: Sequence[str]


class RubricVerdict(pydantic.BaseModel):
    """`passed[m]` says whether the caption meets criterion m; same order and length as the criteria asked."""

    passed: list[bool]


@dataclasses.dataclass(frozen=True)
class PreferenceQuestion:
    """Which of two captions of a picture describes it better, `first` being shown first.

    `image` and `metadata` are those of a PrecisionQuestion; `units` are the reference's, for the judge of scenes alone.
    """

    method: ClassVar[str] = "preference"
    first: str
    second: str
    image: np.ndarray | None
    metadata: Mapping[str, Any]
    units: Sequence[str] = ()


class PreferenceVerdict(pydantic.BaseModel):
    """1 or 2 for the better caption, 0 for a tie."""

    winner: Literal[0, 1, 2]


class Judge:
    """Answers in batches so that an implementation may run them concurrently; one answer or Failure per question.

    A judge has a method for each kind of question that it answers, of the form
    `precision(questions: Sequence[PrecisionQuestion]) -> list[PrecisionVerdict | Failure]`; the others are `recall`,
    `linguistic`, `choice`, `rubric` and `preference`. It may lack some: a reward names in its `asks` which it calls,
    and one that is missing is found at the start.

    about: what records hold of the judge: its "model", and the prompt behind each method; empty where there is none.
    is_exact: its verdicts are exact and free, so that evaluations ask it more than the reward does.
    exact: the judge that evaluations ask: itself, but for one that is wrong on purpose.
    """

    about: Mapping[str, str] = {}
    is_exact = False

    def mixed(self, questions: Sequence[Any]) -> list[Any]:
        """One answer per question, of questions of any kinds; a judge that can asks all of them at once."""
        answers: list[Any] = []
        for method, run in itertools.groupby(questions, key=lambda question: question.method):
            answers += ask_all(getattr(self, method), list(run))
        return answers

    def exact(self) -> "Judge":
        return self

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        """Ends what the judge has begun."""


def ask_all(ask: Callable[[Sequence], Sequence], questions: Sequence) -> list:
    """One answer per question, or a ValueError: a judge that loses answers would shift every score after them."""
    if not questions:
        return []
    answers = list(ask(questions))
    if len(answers) != len(questions):
        raise ValueError(f"{ask.__qualname__} returned {len(answers)} answers to {len(questions)} questions")
    return answers


def preferred_unseen(question: PreferenceQuestion) -> PreferenceVerdict | None:
    """The verdict on equal captions, and where one is empty; None where somebody has to look."""
    first, second = question.first.strip(), question.second.strip()
    if first == second:
        return PreferenceVerdict(winner=0)
    return None if first and second else PreferenceVerdict(winner=1 if first else 2)
