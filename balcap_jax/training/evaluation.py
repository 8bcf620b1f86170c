"""Captions and scores of held-out images during training, and the best checkpoint by one of their metrics.

The best step is chosen on validation images; the images that evaluations show and report choose nothing.
"""

import hashlib
import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from balcap_jax import judges, rewards
from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import write_bytes, write_text
from balcap_jax.config.recipes import stage_order
from balcap_jax.data.input import as_columns, examples
from balcap_jax.data.scenes.habits import HABITS
from balcap_jax.data.words import count_words
from balcap_jax.judges.schema import Judge
from balcap_jax.models.policy import Params
from balcap_jax.parallel import sharding
from balcap_jax.parallel.host_batch import Rows, take
from balcap_jax.rewards.base import RewardFn, Samples
from balcap_jax.rewards.bcapscore import OBJECTIVES, b_capscore, corpus_b_capscore
from balcap_jax.rewards.miniature import with_miniature
from balcap_jax.rollout import Sampling
from balcap_jax.training.job import Examples, Job, picture_file, to_samples
from balcap_jax.training.programs import Programs

SHOWN_PIXELS = 512  # longer side of a picture that is kept beside its captions
# Evaluations in summary.json: of greedy captions, and of sampled ones; and the files of samples/ that hold them.
KINDS = ("greedy", "evaluations")
_FILES = {"greedy": "greedy-{}.jsonl", "evaluations": "eval-{}.jsonl"}
# Samples of evaluations draw from a stream of their own: no training step has this number.
EVALUATION_STEP = 2**31 - 1


class HeldOut:
    """Held-out images of a run: test images, whose captions are shown and reported, and validation images.

    Their captions are drawn from the current parameters and judged. A rollout is compiled once for each type of them.
    Raises UserError where a prompt is too long.
    """

    def __init__(self, job: Job, shown: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]):
        self._job, config = job, job.config
        self.images = {example["id"]: example["image"] for example in shown}
        # Batches are of the last stage's size, and at most of as many images as there are.
        parts = math.prod(job.mesh.shape[axis] for axis in sharding.BATCH_AXES)
        size = min(-(-len(shown) // parts) * parts, config.stages[stage_order(config)[-1]].batch_size)
        self._shown, self._validation = (batches(images, size) for images in (shown, validation))
        for columns, _ in (*self._shown, *self._validation):
            job.prompt(columns)
        length, temperature = config.rollout.max_tokens, config.rollout.eval_temperature
        sampled = Sampling(config.log.eval_samples, length, temperature or 1.0, greedy=not temperature)
        greedy = Sampling(1, length, temperature or 1.0, greedy=True)
        self._samplings = {"greedy": greedy, "evaluations": sampled}
        self._programs = Programs(config, stage_order(config)[-1], job.mesh, job.policy, job.processor)
        self._rollouts: dict[tuple, Any] = {}

    def evaluate(self, params: Params) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
        """(kind, means, records per image) of the test images, for each of KINDS."""
        for kind in KINDS:
            yield kind, *self._judged(kind, params, self._shown)

    def score(self, params: Params) -> dict[str, Any]:
        """Means of greedy captions of the validation images."""
        return self._judged("greedy", params, self._validation)[0]

    def _judged(self, kind: str, params: Params, batches: Sequence[tuple[Examples, int]]) -> tuple[dict, list[dict]]:
        """Judges captions of `batches` (columns and number of real rows each). -> (summary, records per image)

        All processes are given all batches, caption a part of each, and get all of the result.
        """
        job, config = self._job, self._job.config
        gate = (config.rewards.gate_low, config.rewards.gate_high)
        measure, records = job.measure or job.reward, []
        # A stage may keep what it freezes in another type than the one before it did.
        key = (kind, *(leaf.dtype for leaf in jax.tree.leaves(params)))
        for columns, real in batches:
            rows = Rows(job.mesh, len(columns["id"]))
            examples = take(columns, rows.held)
            inputs = (params, *job.rollout_inputs(rows, examples, EVALUATION_STEP))
            if key not in self._rollouts:
                with job.clock.phase("compile"):
                    _, self._rollouts[key] = self._programs.compile_rollout(params, inputs[1:], self._samplings[kind])
            out = self._rollouts[key](*inputs)
            samples = rows.fetch(out._replace(image_embeds=None, mask=None, policy_log_probs=None))
            judged = job.judging(rows, examples, samples, measure)()
            records += rows.gather_list(judged.records(measure.names, gate))[:real]
        return summarise(records, measure.names), records


def held_out(source: Sequence[Mapping[str, Any]], limit: int, split: str) -> list[dict[str, Any]]:
    """The first `limit` images of a split that can be read. One printed line says so where there are fewer.

    Raises:
      UserError: there are some, and none can be read.
    """
    found, wanted = examples(source, limit), min(limit, len(source))
    if len(found) < wanted:
        text = f"held out: {len(found)} of {wanted} pictures of {split} can be read"
        print(f"{text}; evaluations are of these", flush=True)
    return found


def measured(config: ConfigDict, judge: Judge, reward: RewardFn, fields: Collection[str]) -> RewardFn:
    """What evaluations score, for the `reward` of the config by its `judge`; `fields` are those of the examples.

    They ask everything, and no judge that is wrong on purpose.
    """
    exact = judge.exact()
    reward = reward if exact is judge else rewards.build(config.rewards, exact, config.seed)
    return with_miniature(rewards.measure(reward, exact, fields), exact, fields)


def measured_names(config: ConfigDict, fields: Collection[str]) -> tuple[str, ...]:
    """The names of what evaluations score, without a judge that is connected.

    Raises:
      UserError: there is no such reward.
    """
    if config.judge.name != "oracle":  # Only what is exact is asked for more than the reward's own objectives.
        return rewards.objectives(config.rewards)
    judge = judges.build(config.judge, config.seed)
    return tuple(measured(config, judge, rewards.build(config.rewards, judge, config.seed), fields).names)


def check_best_metric(metric: str, measured: Sequence[str], images: int) -> None:
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
        known = {step: score for step, score in self.scores.items() if score is not None and math.isfinite(score)}
        return max(sorted(known), key=known.get, default=None)

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
        best = {"metric": self.metric, "step": self.step, "score": self.scores[self.step], "scores": self.state()}
        return {"best": best}


def references_as_samples(examples: Sequence[Mapping[str, Any]]) -> Samples:
    """Samples of two examples (of the only one, twice), with their references as three captions of each."""
    ((batch, _),) = batches(examples[:2], 2)
    captions = [[text] * 3 for text in batch["reference"]]
    return to_samples(batch, captions, np.array([list(map(count_words, group)) for group in captions]))


def summarise(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Means of an evaluation: {name: {"mean", "std"}} with the spread over captions, "n" captions, "invalid" scores.

    Where captions are compared with their scenes, "habits" is {habit: {"share", "n"}}: of the n captions in which the
    habit could occur, the share that has it. "digest" is that of the captions' texts: equal captions have equal ones.
    """
    captions = [caption for record in records for caption in record["captions"]]
    columns = {name: [caption["rewards"][name] for caption in captions] for name in names}
    invalid = sum(None in scores for scores in zip(*columns.values(), strict=True))
    for name in ("b_capscore", "words", "tokens", "in_band", "truncated"):
        columns[name] = [caption[name] for caption in captions]
    summary: dict[str, Any] = {
        name: _spread([float(value) for value in column if value is not None]) for name, column in columns.items()
    }
    if set(OBJECTIVES) <= set(names):
        # Equal to the mean of the captions' own scores up to rounding; kept as the metric's one definition.
        objectives = [columns[name] for name in OBJECTIVES]
        values = [np.array([value or 0.0 for value in column]) for column in objectives]
        complete = np.array([None not in scores for scores in zip(*objectives, strict=True)])
        summary["b_capscore"]["mean"] = _finite(b_capscore(*values, complete))
        summary["corpus_b_capscore"] = {"mean": _finite(corpus_b_capscore(*values, complete)), "std": None}
    summary |= {"n": len(captions), "images": len(records), "invalid": invalid}
    texts = json_text.dumps([caption.get("caption") for caption in captions])
    summary["digest"] = hashlib.sha256(texts.encode()).hexdigest()[:16]
    habits = _count_habits(captions)
    return summary | ({"habits": habits} if habits else {})


def _count_habits(captions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """In the order of HABITS; those that could occur in none of the captions are left out."""
    counted = {}
    details = [caption.get("habits") for caption in captions]
    details = [detail for detail in details if isinstance(detail, Mapping)]  # A user's own reward may use the name.
    for name in HABITS:
        found = [detail[name] for detail in details if isinstance(detail.get(name), bool)]
        if found:
            counted[name] = {"share": sum(found) / len(found), "n": len(found)}
    return counted


def captions_file(workdir: Path, kind: str, label: str) -> Path:
    """The file of samples/ that holds the captions of an evaluation."""
    return workdir / "samples" / _FILES[kind].format(label)


def write(
    workdir: Path, kind: str, label: str, records: Sequence[Mapping[str, Any]], images: Mapping[str, np.ndarray]
) -> None:
    """Writes the captions of an evaluation and the pictures that they name, where these are not there yet.

    Photographs are shrunk to SHOWN_PIXELS: they are there to be looked at in the report.
    """
    for name, image in images.items():
        path = workdir / "samples" / "images" / picture_file(name)
        if not path.exists():
            file = io.BytesIO()
            picture = Image.fromarray(np.asarray(image))
            if max(picture.size) > SHOWN_PIXELS:
                picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
            picture.save(file, format="PNG")
            write_bytes(path, file.getvalue())
    write_text(captions_file(workdir, kind, label), json_text.lines(records))


def batches(examples: Sequence[Mapping[str, Any]], size: int) -> list[tuple[Mapping[str, Any], int]]:
    """Columns of `size` examples at a time; the last is filled up with its first examples. -> [(columns, real rows)]"""
    result = []
    for start in range(0, len(examples), size):
        rows = list(examples[start : start + size])
        filled = rows + [rows[i % len(rows)] for i in range(size - len(rows))]
        result.append((as_columns(filled), len(rows)))
    return result


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
