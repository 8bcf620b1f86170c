"""What a step of each stage does between a batch of examples and the compiled update.

    align    references -> update
    SFT      target captions -> update
    RL       rollout (compiled) -> judge (host) -> update (compiled); `pipeline` has another order of them

A stage owns its compiled programs. Its first step compiles all of them, one update per bucket of lengths and of tokens:
no later step can meet a shape for the first time.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from balcap_jax.advantages import Advantages
from balcap_jax.models.policy import Params
from balcap_jax.parallel import distributed, sharding
from balcap_jax.rewards import count_words
from balcap_jax.rewards.bcapscore import b_capscore, three_of
from balcap_jax.rollout import Rollout
from balcap_jax.train_step import RLBatch, SFTBatch, TrainState
from balcap_jax.training.job import Examples, Job, Judged, Stage
from balcap_jax.training.pipeline import Flight, Judging
from balcap_jax.training.progress import HIDDEN


def true_values(scores: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """What the log has of exact scores [B, G, K] beside those of a judge that is wrong on purpose."""
    values = {f"true/{name}": float(scores[..., k].mean()) for k, name in enumerate(names)}
    every = np.ones(scores.shape, bool)
    return values | {"true/b_capscore": b_capscore(*three_of(scores, every, names))}


class SFTStage(Stage):
    """Cross-entropy on captions of the data set, G targets per image over one shared prompt.

    The captions have their habits and faults: they are what the base policy of RL imitates.
    """

    name = "sft"
    writes_captions = True

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], None]:
        """One update on the examples' captions. -> (state, values for the log, no samples)"""
        job, rows = self.job, self.rows
        targets = examples["captions"] if self.writes_captions else [[text] for text in examples["reference"]]
        tokens, mask = job.processor.encode_responses(targets, job.config.rollout.max_tokens)
        # Photographs have as many captions as they come with, whatever the config says.
        self.compile_updates(state, group=mask.shape[1])
        shape = self.shape_for(rows.gather(mask.sum(-1)[rows.own]))
        length = shape.length
        batch = SFTBatch(*rows.put((job.prompt(examples), tokens[..., :length], mask[..., :length])))
        with job.clock.phase("update"):
            state, values = self.run_update(state, batch, shape)
        return state, values | {"tokens": values["length/tokens_mean"] * rows.size * mask.shape[1]}, None


class AlignStage(SFTStage):
    """As `SFTStage`, on the references: LLaVA first aligns its projector on plain captions."""

    name = "align"
    writes_captions = False


class RLStage(Stage):
    """Rollout, judgement and the BalCapRL update.

    With `depth` 1 a batch is always in flight between two steps: sampled, and being judged unless `job.settle` forbade
    it. With the estimator `best_of` the policy of the stage's start samples all of them, and the update imitates the
    best of each group.
    """

    name = "rl"
    phases = ("rollout", "judge", "update")
    writes_captions = True

    def __init__(self, job: Job):
        super().__init__(job)
        self.depth = job.config.pipeline.depth
        self._reference: Params | None = None
        self._flight: Flight | None = None
        self._restored: Rollout | None = None
        self._rollout: Any = None
        self._advantages: Any = None

    def arrays(self, state: TrainState) -> dict[str, Any]:
        parts = {"state": state, "reference": self._reference, "in_flight": self._flight.out if self.depth else None}
        return {name: part for name, part in parts.items() if part is not None}

    def load(self, arrays: Mapping[str, Any]) -> TrainState:
        state = arrays["state"]
        self._reference, self._restored = arrays.get("reference"), arrays.get("in_flight")
        if self._reference is None:  # The update consumes the state's arrays.
            self._reference = jax.tree.map(lambda x: x.copy(), self.programs.reference(state))
        return state

    def begin(self, state: TrainState, examples: Examples, step: int) -> None:
        """Puts the batch of `step`, the next one, in flight: sampled now, or as a checkpoint held it."""
        if self._restored is None:
            self._flight = self._sample(state.params, examples, step)
        else:  # Not held here any longer: the flight lets go of it after its update.
            out, self._restored = self._restored, None
            prompt = self.rows.put(self.job.prompt(examples))
            self._flight = Flight(examples, prompt, out, self.rows.fetch(out._replace(image_embeds=None)))
        self._judge_aside(self._flight)

    def finish_judging(self) -> None:
        if self._flight is not None and self._flight.judging is not None:
            with self.job.clock.phase("judge"):
                self._flight.judging.wait()

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], Judged]:
        """Samples G captions per example, has them judged, and updates.

        With `depth` 1, `examples` are those of step + 1, and the update is on the batch in flight.

        Returns the state, values for the log, and the captions that this process has judged.
        """
        job, clock, rows = self.job, self.job.clock, self.rows
        if self.depth:
            flight = self._flight
            self._judge_aside(flight)
            self._flight = self._sample(state.params, examples, step + 1)
        else:
            flight = self._sample(state.params, examples, step)

        with clock.phase("judge"):
            judged = flight.judging.wait() if flight.judging else self._judge(flight)()
            words = [[count_words(text) for text in group] for group in judged.captions]
            # From here on every process knows the scores of the whole batch.
            references = [count_words(text) for text in judged.examples["reference"]]
            scores, valid, left_out, words, references, truncated, lengths, slots = rows.gather(
                (
                    judged.scores.rewards,
                    judged.scores.valid,
                    judged.scores.unasked(),
                    np.array(words, np.int32).reshape(judged.tokens.shape),
                    np.array(references, np.int32),
                    judged.truncated,
                    judged.tokens,
                    flight.samples.slots[rows.own],
                )
            )
        failed, calls = int((~valid & ~left_out).sum()), int((~left_out).sum())
        if job.settle(step, failed, calls) and self.depth:
            self._judge_aside(self._flight)

        self.compile_updates(state, reference=self._reference)
        if job.config.log.samples_every and self._advantages is None:
            with clock.phase("compile"):
                self._advantages = self.programs.compile_advantages(*scores.shape[:2])
        shape, samples = self.shape_for(lengths), flight.samples
        length = shape.length
        batch = RLBatch(
            flight.prompt,
            flight.out.image_embeds,
            *rows.put(
                (
                    samples.tokens[..., :length],
                    samples.mask[..., :length],
                    samples.policy_log_probs[..., :length],
                    scores[rows.held],
                    valid[rows.held],
                    words[rows.held],
                    references[rows.held],
                    truncated[rows.held],
                )
            ),
        )
        with clock.phase("update"):
            state, values = self.run_update(state, batch, shape, self._reference)

        values["b_capscore"] = b_capscore(*three_of(scores, valid, job.reward.names))
        if job.is_kept(step):
            shown = self._advantages_of(scores, valid, words, references, truncated)
            judged = dataclasses.replace(judged, advantages=shown)
        if judged.true is not None:
            values |= true_values(rows.gather(judged.true.rewards), job.truth.names)
        values["tokens"] = float(lengths.sum())
        values["padding/rollout_useful"] = float(lengths.sum() / slots.sum())
        values["failed_calls"], values["calls"] = failed, calls
        values["judge/failure_rate"] = failed / max(calls, 1)
        if job.config.judge.ask:
            values["judge/left_out"] = float(left_out.sum())
        if flight.judging is not None:
            values[HIDDEN] = flight.judging.hidden
        return state, values, judged

    def _advantages_of(self, scores, valid, words, references, truncated) -> Advantages:
        """What the update made of the scores [B, G, K] of the whole batch: the rows that this process judged.

        They are computed once more: the update keeps its own to itself, in the order in which it packed the prompts.
        """
        batch = (scores, valid, words, references, truncated)
        names = ("rewards", "valid", "words", "reference_words", "truncated")
        found = self._advantages(**dict(zip(names, jax.device_put(batch), strict=True)))
        parts = jax.device_get((found.combined, found.per_objective, found.contributes))
        combined, per_objective, contributes = (part[self.rows.held[self.rows.own]] for part in parts)
        return Advantages(combined, per_objective, {}, contributes)

    def _sample(self, params: Params, examples: Examples, step: int) -> Flight:
        """Draws G captions per example, with the random numbers of `step`; `params` are the newest."""
        job, programs, clock = self.job, self.programs, self.job.clock
        params = programs.sampler(params, self._reference)
        inputs = job.rollout_inputs(self.rows, examples, step)
        if self._rollout is None:
            with clock.phase("compile"):
                fit, self._rollout = programs.compile_rollout(params, inputs)
            if distributed.is_first() and job.config.rollout.parts != 1:
                print(f"rollout of {programs.settings.batch_size} prompts {fit}", flush=True)
        with clock.phase("rollout"):
            # Laid out as a checkpoint is restored: programs are compiled for one layout.
            out = jax.device_put(self._rollout(params, *inputs), sharding.batch_sharding(job.mesh))
            # The small arrays come to the host whole: cut to their bucket there, they need no compiled slice here.
            samples = self.rows.fetch(out._replace(image_embeds=None))
        return Flight(examples, inputs[0], out, samples)

    def _judge_aside(self, flight: Flight) -> None:
        if flight.judging is None:
            with self.job.clock.phase("judge"):
                flight.judging = Judging(self._judge(flight))

    def _judge(self, flight: Flight) -> Callable[[], Judged]:
        return self.job.judging(self.rows, flight.examples, flight.samples, self.job.reward)
