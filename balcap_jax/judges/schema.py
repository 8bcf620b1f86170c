"""What a judge is asked and what it answers, whoever answers: the oracle, a hosted model or a policy on the mesh."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import pydantic


def _plain(value: Any) -> Any:
    """Pydantic takes True as 1, and the text 0_4 as 4."""
    if isinstance(value, bool) or (isinstance(value, str) and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,20})?", value)):
        raise ValueError("no plain number")
    return value


PLAIN = pydantic.BeforeValidator(_plain)
"""Of a number: models may write it as text, in plain digits, and no flag is one."""

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
class Usage:
    """What judging took, as counts that add up.

    calls: questions, of which `cached` were answered without a request. tokens_in, tokens_out: of all requests, those
    of unusable answers too. failures: {"where: reason": questions that ended without an answer for it}.
    """

    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    failures: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def __add__(self, other: "Usage") -> "Usage":
        failures = self.failures + other.failures if other.failures else self.failures
        return Usage(
            self.calls + other.calls,
            self.cached + other.cached,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            failures,
        )


@dataclasses.dataclass(frozen=True)
class PrecisionQuestion:
    """`image` uint8 [height, width, 3]; `metadata` is whatever the data set stores beside the example.

    Without `pointability` nobody looks at that flag, and a judge may take as verified what nothing could refute.
    """

    caption: str
    image: np.ndarray | None
    metadata: Mapping[str, Any]
    pointability: bool = True


@dataclasses.dataclass(frozen=True)
class RecallQuestion:
    caption: str
    units: Sequence[str]


@dataclasses.dataclass(frozen=True)
class LinguisticQuestion:
    caption: str


@dataclasses.dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question that is to be answered from the caption alone.

    `options` are (letter, text) as they are shown. `draw` numbers repetitions of a question, to be answered anew.
    `query` says the same as the question in a form that needs no parsing, where the data set has one.
    """

    caption: str
    question: str
    options: tuple[tuple[str, str], ...]
    draw: int = 0
    query: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)


class ChoiceVerdict(pydantic.BaseModel):
    """What was answered, as text; whoever asked looks for the letter in it."""

    answer: str


@dataclasses.dataclass(frozen=True)
class RubricQuestion:
    """Which of the binary `criteria` a caption meets, judged from text alone."""

    caption: str
    criteria: Sequence[str]


class RubricVerdict(pydantic.BaseModel):
    """`passed[m]` says whether the caption meets criterion m; same order and length as the criteria asked."""

    passed: list[bool]


class Judge(Protocol):
    """Answers in batches so that an implementation may run them concurrently; one answer or Failure per question.

    `about` is what records say of the judge: its "model", and the prompt behind each method; empty where there is
    nothing to say. A judge may lack methods: which of them a reward calls is in its `asks`, and one that is missing is
    found at the start. It may have one more, `mixed`, which takes questions of all kinds at once.
    """

    about: Mapping[str, str]

    def precision(self, questions: Sequence[PrecisionQuestion]) -> "list[PrecisionVerdict | Failure]": ...

    def recall(self, questions: Sequence[RecallQuestion]) -> "list[RecallVerdict | Failure]": ...

    def linguistic(self, questions: Sequence[LinguisticQuestion]) -> "list[LinguisticVerdict | Failure]": ...

    def choice(self, questions: Sequence[ChoiceQuestion]) -> "list[ChoiceVerdict | Failure]": ...

    def rubric(self, questions: Sequence[RubricQuestion]) -> "list[RubricVerdict | Failure]": ...

    def usage(self) -> Usage: ...

    def close(self) -> None: ...
