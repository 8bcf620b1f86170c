"""What a reward function receives and returns (design: rewards as a [B, G, K] array with a validity mask)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from balcap_jax.judges.injection import suspicious
from balcap_jax.judges.schema import Failure, Judge


@dataclasses.dataclass(frozen=True)
class Samples:
    """The captions of one rollout batch on the host, in plain text.

    `example_ids`, `references`, `reference_units`, `metadata` have length B; `captions` is [B][G];
    `images` is uint8 [B, height, width, 3], a list of B such pictures of different sizes, or None;
    `tokens` [B, G] is how long the captions are, or None where nobody counted.
    `metadata` is what else the data set stores beside an example: scene, questions, rubrics.
    """

    example_ids: Sequence[str]
    captions: Sequence[Sequence[str]]
    references: Sequence[str]
    reference_units: Sequence[Sequence[str]]
    images: np.ndarray | Sequence[np.ndarray] | None
    metadata: Sequence[Mapping[str, Any]]
    tokens: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.captions), len(self.captions[0])

    @property
    def where(self) -> list[tuple[int, int]]:
        """(b, g) of every caption, in the order in which questions are asked."""
        prompts, group = self.shape
        return [(b, g) for b in range(prompts) for g in range(group)]


@dataclasses.dataclass(frozen=True)
class Scores:
    """`rewards` [B, G, K] float32 (0 where not valid), `valid` [B, G, K] bool, `detail` [B][G] JSON-able dicts.

    Of a user's own reward any NumPy numbers are taken, and a valid one that is NaN or infinite becomes a missing value.

    A detail holds what a report shows of a caption: the judge's verdicts, and under "failures" {objective: reason}
    for each missing value.
    """

    rewards: np.ndarray
    valid: np.ndarray
    detail: Sequence[Sequence[Mapping[str, Any]]]


class RewardFn(Protocol):
    """K objectives. A class of this form is all that a new reward is: see `balcap_jax.rewards`.

    names: of the objectives. gated[k]: whether the length gate multiplies objective k.
    needs: fields of an example that it reads beside image, prompt and reference; a data set without them is refused.
    asks: methods of the judge that it calls; () = it needs no judge.
    It is made from the judge and the config group `rewards`, with the run's "seed" in it.
    """

    names: tuple[str, ...]
    gated: tuple[bool, ...]
    needs: tuple[str, ...]
    asks: tuple[str, ...]

    def __call__(self, samples: Samples) -> Scores: ...


Scored = tuple[float | Failure, dict[str, Any]]  # the reward, or why there is none; and what a report shows of it


def collect(reward: "RewardFn", samples: Samples, scored: Sequence[Sequence[Scored]], judge: Judge | None) -> Scores:
    """Scores from one Scored per objective for each caption, in the order of `samples.where`.

    A Failure becomes a missing value with its reason, and so does a number that is not finite. A detail says also what
    the judge says of itself and of the prompts that `reward` asks, under "judge", and where a caption speaks to its
    judge, under "suspicious".
    """
    names = reward.names
    shape = (*samples.shape, len(names))
    rewards, valid = np.zeros(shape, np.float32), np.zeros(shape, bool)
    told = {} if judge is None else judge.about
    about = {name: told[name] for name in ("model", *reward.asks) if name in told}
    detail: list[list[dict[str, Any]]] = [[{} for _ in group] for group in samples.captions]
    for (b, g), values in zip(samples.where, scored, strict=True):
        flags = [] if judge is None else suspicious(samples.captions[b][g])
        entry: dict[str, Any] = {"failures": {}}
        entry |= ({"judge": about} if about else {}) | ({"suspicious": flags} if flags else {})
        for k, (value, parts) in enumerate(values):
            if isinstance(value, Failure):
                entry["failures"][names[k]] = value.reason
            else:
                rewards[b, g, k], valid[b, g, k] = value, True
                entry |= parts
        detail[b][g] = entry
    return without_nonfinite(Scores(rewards, valid, detail), names)


def without_nonfinite(scores: Scores, names: Sequence[str]) -> Scores:
    """`scores` in which a valid reward that is NaN or infinite is a missing value, with its reason in the detail."""
    valid = scores.valid & np.isfinite(scores.rewards)
    detail = [[dict(entry) for entry in group] for group in scores.detail]
    for b, g, k in np.argwhere(scores.valid & ~valid):
        reason = {names[k]: f"the reward is {scores.rewards[b, g, k]}, which is no finite number"}
        detail[b][g]["failures"] = dict(detail[b][g].get("failures", {})) | reason
    return Scores(np.where(valid, scores.rewards, np.float32(0)), valid, detail)


def ask_all(ask: Callable[[Sequence], Sequence], questions: Sequence) -> list:
    """One answer per question, or a ValueError: a judge that loses answers would shift every score after them."""
    if not questions:
        return []
    answers = list(ask(questions))
    if len(answers) != len(questions):
        raise ValueError(f"{ask.__qualname__} returned {len(answers)} answers to {len(questions)} questions")
    return answers


def ask_kinds(judge: Judge, **questions: Sequence) -> list[list]:
    """For each keyword, which names a method of the judge, what `ask_all` gives.

    A judge that has `mixed` gets all kinds at once, so that a slow answer of one kind delays no question of another.
    """
    if not hasattr(judge, "mixed"):
        return [ask_all(getattr(judge, kind), asked) for kind, asked in questions.items()]
    answers = iter(ask_all(judge.mixed, [one for asked in questions.values() for one in asked]))
    return [[next(answers) for _ in asked] for asked in questions.values()]
