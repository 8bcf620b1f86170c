"""The arguments and results of a reward function: rewards are a [B, G, K] array with a validity mask."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from balcap_jax.judges.injection import suspicious
from balcap_jax.judges.schema import Failure, Judge, LeftOut, ask_all


@dataclasses.dataclass(frozen=True)
class Samples:
    """The captions of one rollout batch on the host, as plain text.

    `example_ids`, `references`, `reference_units`, `metadata` have length B; `captions` is `[B][G]`;
    `images` is uint8 [B, height, width, 3], a list of B such pictures of different sizes, or None;
    `tokens` [B, G] are the captions' lengths, or None where nobody counted them.
    `metadata` holds the other fields of an example: scene, questions, rubrics.
    `left_out` {method of the judge: [B, G] bool} are the captions that it is not to be asked about, see `sparing`.
    """

    example_ids: Sequence[str]
    captions: Sequence[Sequence[str]]
    references: Sequence[str]
    reference_units: Sequence[Sequence[str]]
    images: np.ndarray | Sequence[np.ndarray] | None
    metadata: Sequence[Mapping[str, Any]]
    tokens: np.ndarray | None = None
    left_out: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def asked(self, method: str, b: int, g: int, question: Any) -> Any:
        """`question`, about caption `[b][g]`, or what stands for it where it is left out."""
        return LeftOut() if method in self.left_out and self.left_out[method][b, g] else question

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
    """`rewards` [B, G, K] float32 (0 where not valid), `valid` [B, G, K] bool, `detail` `[B][G]` JSON-able dicts.

    A user's own reward may give any NumPy numbers; a valid one that is NaN or infinite becomes a missing value.

    A detail holds what a report shows of a caption: the judge's verdicts, and under "failures" {objective: reason}
    for each missing value. `left_out` [B, G, K] bool are missing values that were not asked for, and no failures;
    None = there are none. A detail lists them under "left_out".
    """

    rewards: np.ndarray
    valid: np.ndarray
    detail: Sequence[Sequence[Mapping[str, Any]]]
    left_out: np.ndarray | None = None

    def unasked(self) -> np.ndarray:
        """`left_out` [B, G, K], all False where it is None."""
        return np.zeros(self.valid.shape, bool) if self.left_out is None else self.left_out


class RewardFn:
    """K objectives. A new reward is a class of this form and no more, derived from this one or not: see
    `balcap_jax.rewards`.

    names: of the objectives. gated[k]: whether the length gate multiplies objective k.
    needs: fields of an example that it reads beside image, prompt and reference; a data set without them is refused.
    asks: methods of the judge that it calls; () = it needs no judge.
    Its arguments are the judge and the config group `rewards`, with the run's "seed" in it.
    """

    names: tuple[str, ...]
    gated: tuple[bool, ...]
    needs: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()

    def __init__(self, judge: Judge | None = None, settings: Mapping[str, Any] | None = None):
        self.judge, self.settings = judge, settings or {}

    def __call__(self, samples: Samples) -> Scores:
        raise NotImplementedError

    def measured(self) -> "RewardFn":
        """The form of the reward that evaluations score: another where it compares captions with their own group."""
        return self


Scored = tuple[float | Failure, dict[str, Any]]  # the reward, or why there is none; and what a report shows of it


def collect(reward: RewardFn, samples: Samples, scored: Sequence[Sequence[Scored]], judge: Judge | None) -> Scores:
    """Scores from one Scored per objective for each caption, in the order of `samples.where`.

    A Failure becomes a missing value with its reason, and so does a number that is not finite. A detail also holds
    under "judge" what the judge's `about` has on the model and on the prompts that `reward` asks. Under "suspicious" it
    holds where a caption speaks to its judge.
    """
    names = reward.names
    shape = (*samples.shape, len(names))
    rewards, valid, left_out = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, bool)
    about = {} if judge is None else judge.about
    about = {name: about[name] for name in ("model", *reward.asks) if name in about}
    detail: list[list[dict[str, Any]]] = [[{} for _ in group] for group in samples.captions]
    for (b, g), values in zip(samples.where, scored, strict=True):
        flags = [] if judge is None else suspicious(samples.captions[b][g])
        entry: dict[str, Any] = {"failures": {}}
        entry |= ({"judge": about} if about else {}) | ({"suspicious": flags} if flags else {})
        for k, (value, parts) in enumerate(values):
            if isinstance(value, LeftOut):
                left_out[b, g, k] = True
                entry.setdefault("left_out", []).append(names[k])
            elif isinstance(value, Failure):
                entry["failures"][names[k]] = value.reason
            else:
                rewards[b, g, k], valid[b, g, k] = value, True
                entry |= parts
        detail[b][g] = entry
    return without_nonfinite(Scores(rewards, valid, detail, left_out), names)


def without_nonfinite(scores: Scores, names: Sequence[str]) -> Scores:
    """`scores` in which a valid reward that is NaN or infinite is a missing value, with its reason in the detail."""
    valid = scores.valid & np.isfinite(scores.rewards)
    detail = [[dict(entry) for entry in group] for group in scores.detail]
    for b, g, k in np.argwhere(scores.valid & ~valid):
        reason = {names[k]: f"the reward is {scores.rewards[b, g, k]}, which is no finite number"}
        detail[b][g]["failures"] = dict(detail[b][g].get("failures", {})) | reason
    return Scores(np.where(valid, scores.rewards, np.float32(0)), valid, detail, scores.left_out)


class Joined(RewardFn):
    """Two rewards on the same captions: the objectives of `first`, and those of `second` that it lacks."""

    def __init__(self, first: RewardFn, second: RewardFn):
        self.first, self.second = first, second
        self._columns = [k for k, name in enumerate(second.names) if name not in first.names]
        self.names = first.names + tuple(second.names[k] for k in self._columns)
        self.gated = first.gated + tuple(second.gated[k] for k in self._columns)
        self.needs = tuple(dict.fromkeys(first.needs + second.needs))
        self.asks = tuple(dict.fromkeys(first.asks + second.asks))

    def __call__(self, samples: Samples) -> Scores:
        first, second = self.first(samples), self.second(samples)
        detail = [
            [_joined(a, b) for a, b in zip(group, more, strict=True)]
            for group, more in zip(first.detail, second.detail, strict=True)
        ]
        return Scores(
            np.concatenate([first.rewards, second.rewards[..., self._columns]], -1),
            np.concatenate([first.valid, second.valid[..., self._columns]], -1),
            detail,
            np.concatenate([first.unasked(), second.unasked()[..., self._columns]], -1),
        )

    def measured(self) -> RewardFn:
        return Joined(self.first.measured(), self.second.measured())


def _joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """One detail of two, of which `a` wins; both name what is missing."""
    left_out = [*a.get("left_out", ()), *b.get("left_out", ())]
    joined = {**b, **a, "failures": dict(b.get("failures", {})) | dict(a.get("failures", {}))}
    return joined | ({"left_out": list(dict.fromkeys(left_out))} if left_out else {})


def ask_kinds(judge: Judge, **questions: Sequence[Any]) -> list[list[Any]]:
    """For each keyword, which names a method of the judge, one answer per question; a slow one delays no other kind.

    A question that is left out is its own answer.
    """
    asked = [each for kind in questions.values() for each in kind if not isinstance(each, LeftOut)]
    ask = getattr(judge, next(iter(questions))) if len(questions) == 1 else judge.mixed
    answers = iter(ask_all(ask, asked))
    return [[each if isinstance(each, LeftOut) else next(answers) for each in kind] for kind in questions.values()]
