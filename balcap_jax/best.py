"""The best checkpoint of a run: which step's greedy captions of validation images score highest in one metric.

The images that evaluations show and report are those of the test split; they choose nothing.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from balcap_jax.errors import UserError
from balcap_jax.evals.bcapscore import OBJECTIVES


def check(metric: str, measured: Sequence[str], images: int) -> None:
    """Raises UserError where `metric` is none of what is `measured`, or there are no validation `images`."""
    if not metric:
        return
    known = [*measured, *(("b_capscore", "corpus_b_capscore") if set(OBJECTIVES) <= set(measured) else ())]
    if metric not in known:
        raise UserError(f"config field 'checkpoint.best_metric' must be one of {', '.join(known)}, got {metric!r}")
    if not images:
        raise UserError(
            f"config field 'checkpoint.best_metric' is {metric!r}, but there are no validation images to measure it "
            "on; raise data.validation_share, or leave the field empty"
        )


class Best:
    """Scores of the steps so far, {step: score}, higher is better; None where no judge answered.

    `evaluate(params)` gives the means of an evaluation, {name: {"mean"}}. Without a `metric` no step is ever due.
    """

    def __init__(self, metric: str, evaluate: Callable[[Any], Mapping[str, Any]]):
        self.metric, self._evaluate = metric, evaluate
        self.scores: dict[int, float | None] = {}

    def is_due(self, stage: str, step: int, every: int, last: int) -> bool:
        """Every `every` updates of rl, and at its end."""
        return bool(self.metric) and stage == "rl" and (step == last or (every > 0 and step % every == 0))

    def measure(self, step: int, params: Any) -> None:
        if step not in self.scores:
            self.scores[step] = self._evaluate(params)[self.metric]["mean"]

    @property
    def step(self) -> int | None:
        """The step with the highest score, the first of equals; None while there is none."""
        found = {step: score for step, score in self.scores.items() if score is not None and math.isfinite(score)}
        return max(sorted(found), key=found.get) if found else None

    def state(self) -> dict[str, float | None]:
        """JSON-able; `restore` takes it."""
        return {str(step): score for step, score in self.scores.items()}

    def restore(self, state: Mapping[str, float | None], whole: Collection[int]) -> int | None:
        """The best of the steps that are `whole` on disk; better ones that are not are forgotten."""
        self.scores = {int(step): score for step, score in state.items()}
        while self.step is not None and self.step not in whole:
            del self.scores[self.step]
        return self.step

    def summary(self) -> dict[str, Any]:
        """{"best": what is known of it}, empty while there is none."""
        if self.step is None:
            return {}
        found = {"metric": self.metric, "step": self.step, "score": self.scores[self.step], "scores": self.state()}
        return {"best": found}
