"""What a reward function receives and returns (design: rewards as a [B, G, K] array with a validity mask)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Samples:
    """The captions of one rollout batch on the host, in plain text.

    `example_ids`, `references`, `reference_units`, `metadata` have length B; `captions` is [B][G];
    `images` is uint8 [B, height, width, 3] or None.
    """

    example_ids: Sequence[str]
    captions: Sequence[Sequence[str]]
    references: Sequence[str]
    reference_units: Sequence[Sequence[str]]
    images: np.ndarray | None
    metadata: Sequence[Mapping[str, Any]]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.captions), len(self.captions[0])


@dataclasses.dataclass(frozen=True)
class Scores:
    """`rewards` [B, G, K] float32 (0 where not valid), `valid` [B, G, K] bool, `detail` [B][G] JSON-able dicts.

    A detail holds what a report shows of a caption: the judge's verdicts, and under "failures" {objective: reason}
    for each missing value.
    """

    rewards: np.ndarray
    valid: np.ndarray
    detail: Sequence[Sequence[Mapping[str, Any]]]


class RewardFn(Protocol):
    """K objectives; `gated[k]` says whether the length gate multiplies objective k (only the linguistic one)."""

    names: tuple[str, ...]
    gated: tuple[bool, ...]

    def __call__(self, samples: Samples) -> Scores: ...


def count_words(text: str) -> int:
    """Whitespace words: the length unit of the gate (and of CapArena's published lengths)."""
    return len(text.split())
