"""What a judge is asked and what it answers, whoever answers: the oracle, a hosted model or a policy on the mesh."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pydantic


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
    """Integer marks 1 (worst) to 5 (best)."""

    clarity: int = pydantic.Field(ge=1, le=5)
    fluency: int = pydantic.Field(ge=1, le=5)
    coherency: int = pydantic.Field(ge=1, le=5)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A judge call that gave no usable answer after bounded retries: a missing value, never a score."""

    reason: str


@dataclasses.dataclass(frozen=True)
class PrecisionQuestion:
    """`image` uint8 [height, width, 3]; `metadata` is whatever the data set stores beside the example."""

    caption: str
    image: np.ndarray | None
    metadata: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RecallQuestion:
    caption: str
    units: Sequence[str]


@dataclasses.dataclass(frozen=True)
class LinguisticQuestion:
    caption: str


class Judge(Protocol):
    """Answers in batches so that an implementation may run them concurrently; one answer or Failure per question."""

    def precision(self, questions: Sequence[PrecisionQuestion]) -> "list[PrecisionVerdict | Failure]": ...

    def recall(self, questions: Sequence[RecallQuestion]) -> "list[RecallVerdict | Failure]": ...

    def linguistic(self, questions: Sequence[LinguisticQuestion]) -> "list[LinguisticVerdict | Failure]": ...
