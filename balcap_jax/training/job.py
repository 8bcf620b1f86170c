"""What the stages of training share: the job, the form of a stage, and judged captions."""

import dataclasses
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax.advantages import Advantages
from balcap_jax.data.words import count_words
from balcap_jax.models import packing
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.models.prompting import PromptProcessor
from balcap_jax.parallel import sharding
from balcap_jax.parallel.host_batch import Rows, take
from balcap_jax.rewards import RewardFn
from balcap_jax.rewards.base import Samples, Scores
from balcap_jax.rewards.bcapscore import harmonic_mean, three_of
from balcap_jax.rollout import Rollout, example_keys
from balcap_jax.train_step import TrainState, finalise
from balcap_jax.training.programs import Programs
from balcap_jax.training.progress import PhaseClock


def to_samples(
    examples: Mapping[str, Sequence], captions: Sequence[Sequence[str]], tokens: np.ndarray | None = None
) -> Samples:
    """Columns of B examples and their captions [B][G], of `tokens` [B, G] each, as a reward function takes them."""
    known = ("id", "image", "reference", "reference_units", "prompt", "captions")
    rows = range(len(captions))
    return Samples(
        example_ids=examples["id"],
        captions=captions,
        references=examples["reference"],
        reference_units=examples["reference_units"],
        images=examples["image"],
        metadata=[{name: examples[name][i] for name in examples if name not in known} for i in rows],
        tokens=tokens,
    )


@dataclasses.dataclass(frozen=True)
class Judged:
    """Captions [B][G] of B examples (columns) with their scores; tokens, truncated [B, G].

    `true` are the exact scores of BalCap's objectives, where `scores` are those of a judge that is wrong on purpose.
    `advantages` [B, G, ...] are what the update made of the scores, on the host; of captions that are not kept, None.
    """

    examples: Mapping[str, Sequence]
    captions: Sequence[Sequence[str]]
    tokens: np.ndarray
    truncated: np.ndarray
    scores: Scores
    true: Scores | None = None
    advantages: Advantages | None = None

    def records(self, names: Sequence[str], gate: tuple[float, float]) -> list[dict[str, Any]]:
        """One JSON-able record per image, as the report reads them.

        The b-CapScore of a caption uses the ungated rewards and is None where a score is missing. `gate` are the bounds
        of the length band. Captions of an update have its combined advantage, that of each objective before weights,
        and whether they have a part in the loss.
        """
        examples, scores = self.examples, self.scores
        words = np.array([[count_words(text) for text in group] for group in self.captions])
        reference_words = np.array([count_words(text) for text in examples["reference"]])
        inside = in_band(words, reference_words, *gate)
        *objectives, complete = three_of(scores.rewards, scores.valid, names)
        balanced = 100.0 * harmonic_mean(*objectives)

        def caption(b: int, g: int) -> dict[str, Any]:
            valid, rewards = scores.valid[b, g], scores.rewards[b, g]
            record = {
                "caption": self.captions[b][g],
                "words": int(words[b, g]),
                "tokens": int(self.tokens[b, g]),
                "truncated": bool(self.truncated[b, g]),
                "in_band": bool(inside[b, g]),
                "rewards": {name: float(rewards[k]) if valid[k] else None for k, name in enumerate(names)},
                "b_capscore": float(balanced[b, g]) if complete[b, g] else None,
            }
            if self.advantages is not None:
                each = self.advantages.per_objective[b, g]
                record["advantage"] = float(self.advantages.combined[b, g])
                record["advantages"] = {name: float(each[k]) for k, name in enumerate(names)}
                record["contributes"] = bool(self.advantages.contributes[b, g])
            return record | scores.detail[b][g] | record  # A detail may use these names, and must not win.

        return [
            {
                "id": examples["id"][b],
                "image": f"images/{picture_file(examples['id'][b])}",
                "prompt": examples["prompt"][b],
                "reference": examples["reference"][b],
                "reference_units": list(examples["reference_units"][b]),
                "captions": [caption(b, g) for g in range(len(group))],
            }
            for b, group in enumerate(self.captions)
        ]


def in_band(words: np.ndarray, reference_words: np.ndarray, low: float, high: float) -> np.ndarray:
    """`advantages.length_gate` of words [B, G] and [B] as bool, on the host: there it would be compiled for each shape,
    in the middle of training."""
    slack = 1e-6  # As there: the bounds are inclusive whatever the rounding.
    reference = reference_words[:, None].astype(float)
    inside = (words >= low * reference * (1 - slack)) & (words <= high * reference * (1 + slack))
    return inside & (reference > 0)


def picture_file(example_id: str) -> str:
    """The file of an example's picture: ids are a data set's own, and may hold slashes."""
    return urllib.parse.quote(example_id, safe="") + ".png"


Examples = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What all stages of a run share.

    measure: what evaluations score; None = the reward.
    truth: what scores the captions of training once more, see `Judged`; None = nothing does.
    settle: (step, failed, calls) -> whether to ask more. It is called when a step's captions are judged and nothing is
      asked.
    """

    config: ConfigDict
    mesh: Mesh
    policy: Policy
    processor: PromptProcessor
    reward: RewardFn
    clock: PhaseClock
    measure: RewardFn | None = None
    settle: Callable[[int, int, int], bool] = lambda *_: True
    truth: RewardFn | None = None

    def prompt(self, examples: Examples) -> Prompt:
        """Host arrays of the prompts of `examples`."""
        texts = [self.config.data.prompt or text for text in examples["prompt"]]
        return self.processor(examples["image"], texts, examples["id"])

    def rollout_inputs(self, rows: Rows, examples: Examples, step: int) -> tuple[Any, ...]:
        """The arguments of a rollout behind the parameters; `step` gives its random numbers."""
        prompt, keys = rows.put((self.prompt(examples), example_keys(examples["id"])))
        return prompt, keys, self._put_scalar(self.config.seed), self._put_scalar(step)

    def is_kept(self, step: int) -> bool:
        """Whether the captions of an update are written to samples/."""
        every = self.config.log.samples_every
        return every > 0 and step % every == 0

    def _put_scalar(self, value: int) -> jax.Array:
        with jax.transfer_guard_host_to_device("allow"):  # To JAX this counts as no explicit transfer.
            return jax.make_array_from_callback((), sharding.replicated(self.mesh), lambda _: np.uint32(value))

    def judging(self, rows: Rows, examples: Examples, samples: Rollout, reward: RewardFn) -> Callable[[], Judged]:
        """The function that has `reward` score those of the held rows that this process judges.

        `examples` and `samples`, on the host, are the held rows. Any thread may call the function: what needs the
        tokenizer, which is not for two threads, is done here.
        """
        own, tokens = take(examples, rows.own), samples.tokens[rows.own]
        shape = tokens.shape[:2]
        texts = self.processor.decode(tokens) if tokens.size else []
        captions = [texts[i : i + shape[1]] for i in range(0, len(texts), shape[1])]
        lengths, truncated = samples.lengths[rows.own], samples.truncated[rows.own]

        def ask() -> Judged:
            truth = self.truth if reward is self.reward else None
            scores = score(reward)
            return Judged(own, captions, lengths, truncated, scores, truth and score(truth))

        def score(reward: RewardFn) -> Scores:
            if captions:
                return reward(to_samples(own, captions, lengths))
            # All that is held here is another process's to judge.
            nothing = (*shape, len(reward.names))
            return Scores(np.zeros(nothing, np.float32), np.zeros(nothing, bool), [])

        return ask


def bucket_of(buckets: Sequence[int], longest: int) -> int:
    """The smallest bucket that holds `longest` tokens."""
    return next(bucket for bucket in buckets if bucket >= longest)


class Shape(NamedTuple):
    """Which update a batch takes: its R, its token bucket (0: it is padded), and the order of prompts, if they move."""

    length: int
    token_bucket: int = 0
    order: np.ndarray | None = None


class Stage:
    """One stage of training. Its defaults are those of a stage that asks no judge.

    job: what it shares with others. programs: what it compiles. rows: which rows of a batch this process has.
    phases: the phases of a step that tokens per second are counted over.
    depth: batches in flight between two steps. writes_captions: whether captions are evaluated at its end.
    """

    name: str
    writes_captions: bool
    phases: tuple[str, ...] = ("update",)
    depth: int = 0

    def __init__(self, job: Job):
        self.job = job
        self.programs = Programs(job.config, self.name, job.mesh, job.policy, job.processor)
        self.rows = Rows(job.mesh, self.programs.settings.batch_size)
        self._updates: dict[tuple[int, int], Any] = {}  # by the shapes of `Programs`
        self._packed: dict[int, int] = {}  # micro-batches by token bucket
        self._reorder: Any = None

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict, Judged | None]:
        """One update. -> (state, values for the log, the captions that this process has judged)"""
        raise NotImplementedError

    def compile_updates(self, state: TrainState, group: int | None = None, **arguments: Any) -> None:
        """Compiles the updates of every shape, once; the arguments are those of `Programs.lower_update`."""
        if self._updates:
            return
        programs, rollout = self.programs, self.job.config.rollout
        with self.job.clock.phase("compile"):
            for length, token_bucket in programs.shapes:
                lowered = programs.lower_update(state, length, token_bucket=token_bucket, group=group, **arguments)
                self._updates[length, token_bucket] = lowered.compile()
            for bucket in rollout.token_buckets:
                self._packed[bucket] = programs.micro_batches(state.params, bucket, group)
            if programs.devices * max(self._packed.values(), default=0) > 1:
                self._reorder = programs.lower_reordering(state, group).compile()

    def shape_for(self, lengths: np.ndarray) -> Shape:
        """The update that a batch with responses of `lengths` [B, G] tokens takes, the same in every process."""
        rollout = self.job.config.rollout
        length = bucket_of(rollout.buckets, int(lengths.max()))
        choice = packing.choose(lengths, self._packed, self.programs.devices, length)
        return Shape(rollout.max_tokens, *choice) if choice else Shape(length)

    def run_update(
        self, state: TrainState, batch: Any, shape: Shape, *reference: Params | None
    ) -> tuple[TrainState, dict[str, float]]:
        """The update of `shape` on a batch on the mesh, which it may consume. -> the state and values for the log"""
        if shape.order is not None:
            batch = self._reorder(batch, self.rows.put(shape.order[self.rows.held]))
        state, metrics = self._updates[shape.length, shape.token_bucket](state, batch, *reference)
        return state, finalise(metrics)

    def arrays(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds; see `Programs.abstract_checkpoint`."""
        return {"state": state}

    def load(self, arrays: Mapping[str, Any]) -> TrainState:
        """Goes on from `arrays` of a checkpoint, or begins from {"state"} alone. -> the state"""
        return arrays["state"]

    def begin(self, state: TrainState, examples: Examples, step: int) -> None:
        """Puts the batch of `step` in flight, in a stage with a depth."""

    def finish_judging(self) -> None:
        """Returns when nothing is being asked: a judge is asked one thing after the other."""
