"""What a step of each stage does between a batch of examples and the compiled update.

    vision   classes of image tokens -> update
    align    references -> update
    SFT      target captions -> update
    RL       rollout (compiled) -> judge (host) -> update (compiled); `pipeline` has another order of them

A stage owns its compiled programs. All of them are compiled before its first step, one update per length bucket, so
that no later step can meet a shape for the first time.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from balcap_jax import train_step
from balcap_jax.models.policy import Params
from balcap_jax.parallel import distributed
from balcap_jax.rewards import count_words
from balcap_jax.rewards.bcapscore import b_capscore, three_of
from balcap_jax.rollout import Rollout, compile_rollout, example_keys
from balcap_jax.train_step import RLBatch, SFTBatch, TrainState, finalise
from balcap_jax.training.job import Examples, Job, Judged, Settle, freeze_of, make_optimizer, sampling_of
from balcap_jax.training.pipeline import Flight, Judging, kept
from balcap_jax.training.progress import HIDDEN


def with_length(batch: Any, fields: Sequence[str], length: int) -> Any:
    """The abstract form of `batch` with the R axis of `fields` set to `length`."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    changed = {
        name: jax.ShapeDtypeStruct(
            (*getattr(abstract, name).shape[:-1], length),
            getattr(abstract, name).dtype,
            sharding=getattr(abstract, name).sharding,
        )
        for name in fields
    }
    return abstract._replace(**changed)


def bucket_of(buckets: Sequence[int], longest: int) -> int:
    """The smallest bucket that holds `longest` tokens."""
    return next(bucket for bucket in buckets if bucket >= longest)


class SFTStage:
    """Cross-entropy on captions of the data set, G targets per image over one shared prompt.

    As the stage "align" the targets are the references, as LLaVA first aligns its projector on plain captions; as
    "sft" they are the data set's captions, faults included: what the base policy of RL imitates.
    """

    phases = ("update",)
    depth = 0

    def __init__(self, job: Job, reference: Params | None = None, settle: Settle | None = None, *, name: str = "sft"):
        del reference, settle
        settings = job.config.stages[name]
        self.job = job
        self.rows = job.rows(settings.batch_size)
        self.writes_captions = name == "sft"
        self._step = train_step.make_sft_step(
            job.policy,
            make_optimizer(job.config, name),
            freeze=freeze_of(job.config, name),
            micro_batches=settings.micro_batches,
        )
        self._programs: dict[int, Any] = {}

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], None]:
        """One update on the examples' captions. -> (state, values for the log, no samples)"""
        job, buckets = self.job, self.job.config.rollout.buckets
        targets = examples["captions"] if self.writes_captions else [[text] for text in examples["reference"]]
        tokens, mask = job.processor.encode_responses(targets, buckets[-1])
        length = bucket_of(buckets, distributed.largest(mask.sum(-1).max()))
        batch = SFTBatch(*self.rows.put((job.prompt(examples), tokens[..., :length], mask[..., :length])))
        if not self._programs:
            with job.clock.phase("compile"):
                for bucket in buckets:
                    abstract = with_length(batch, ("responses", "mask"), bucket)
                    self._programs[bucket] = self._step.lower(state, abstract).compile()
        with job.clock.phase("update"):
            state, metrics = self._programs[length](state, batch)
            values = finalise(metrics)
        return state, values | {"tokens": values["length/tokens_mean"] * math.prod(batch.mask.shape[:2])}, None


class RLStage:
    """Rollout, judgement and the BalCapRL update.

    With `depth` 1 a batch is always in flight between two steps: sampled, and being judged unless `settle` forbade it.
    """

    phases = ("rollout", "judge", "update")
    writes_captions = True

    def __init__(self, job: Job, reference: Params | None = None, settle: Settle | None = None):
        config = job.config
        settings, rollout = config.stages.rl, config.rollout
        self.job = job
        self.rows = job.rows(settings.batch_size)
        self.depth = config.pipeline.depth
        self._reference = reference
        self._settle = settle or (lambda *_: True)
        self._flight: Flight | None = None
        self._sampling = sampling_of(config)
        objective = train_step.RLObjective(
            names=job.reward.names,
            weights=tuple(config.rewards.weights),
            gated=job.reward.gated,
            max_tokens=rollout.max_tokens,
            gate=config.rewards.gate,
            gate_low=config.rewards.gate_low,
            gate_high=config.rewards.gate_high,
            temperature=rollout.temperature,
            **config.advantage,
            **config.loss,
        )
        self._step = train_step.make_rl_step(
            job.policy,
            make_optimizer(config, "rl"),
            objective,
            freeze=freeze_of(config, "rl"),
            micro_batches=settings.micro_batches,
        )
        self._rollout: Any = None
        self._programs: dict[int, Any] = {}

    @property
    def in_flight(self) -> Rollout:
        """What a checkpoint must hold of the batch in flight."""
        return self._flight.out

    def begin(self, state: TrainState, examples: Examples, step: int, out: Rollout | None = None) -> None:
        """Puts the batch of `step`, the next one, in flight: sampled now, or `out`, which a checkpoint held."""
        if out is None:
            self._flight = self._sample(state.params, examples, step)
        else:
            prompt = self.rows.put(self.job.prompt(examples))
            self._flight = Flight(examples, prompt, out, self.rows.fetch(out._replace(image_embeds=None)))
        self._judge_aside(self._flight)

    def finish_judging(self) -> None:
        """Returns when nothing is being asked: a judge is asked one thing after the other."""
        if self._flight is not None and self._flight.judging is not None:
            with self.job.clock.phase("judge"):
                self._flight.judging.wait()

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], Judged]:
        """Samples G captions per example, has them judged, and updates.

        With `depth` 1, `examples` are those of step + 1, and the update is on the batch in flight.

        Returns the state, values for the log, and the captions that this process has judged.
        """
        job, config, clock, rows = self.job, self.job.config, self.job.clock, self.rows
        if self.depth:
            flight = self._flight
            self._judge_aside(flight)
            self._flight = self._sample(state.params, examples, step + 1)
        else:
            flight = self._sample(state.params, examples, step)

        with clock.phase("judge"):
            if flight.judging is None:
                judged = job.judge(rows, flight.examples, flight.drawn, job.reward)
            else:
                judged = flight.judging.wait()
            words = [[count_words(text) for text in members] for members in judged.captions]
            # From here on every process knows the scores of the whole batch.
            scores, valid, words, lengths = rows.gather(
                (
                    judged.scores.rewards,
                    judged.scores.valid,
                    np.array(words, np.int32).reshape(judged.tokens.shape),
                    judged.tokens,
                )
            )
        failed, calls = int((~valid).sum()), valid.size
        if self._settle(step, failed, calls) and self.depth:
            self._judge_aside(self._flight)

        length = bucket_of(config.rollout.buckets, int(lengths.max()))
        drawn = flight.drawn
        batch = RLBatch(
            flight.prompt,
            flight.out.image_embeds,
            *rows.put(
                (
                    drawn.tokens[..., :length],
                    drawn.mask[..., :length],
                    drawn.policy_log_probs[..., :length],
                    scores[rows.held],
                    valid[rows.held],
                    words[rows.held],
                    np.array([count_words(text) for text in flight.examples["reference"]], np.int32),
                    drawn.truncated,
                )
            ),
        )
        if not self._programs:
            with clock.phase("compile"):
                for bucket in config.rollout.buckets:
                    abstract = with_length(batch, ("responses", "mask", "old_log_probs"), bucket)
                    self._programs[bucket] = self._step.lower(state, abstract, self._reference).compile()
        with clock.phase("update"):
            state, metrics = self._programs[length](state, batch, self._reference)
            values = finalise(metrics)

        values["b_capscore"] = b_capscore(*three_of(scores, valid, job.reward.names))
        values["tokens"] = float(lengths.sum())
        values["failed_calls"], values["calls"] = failed, calls
        if flight.judging is not None:
            values[HIDDEN] = flight.judging.hidden
        return state, values, judged

    def _sample(self, params: Params, examples: Examples, step: int) -> Flight:
        """Draws G captions per example from `params`, with the random numbers of `step`."""
        job, config, clock, rows = self.job, self.job.config, self.job.clock, self.rows
        prompt, keys = rows.put((job.prompt(examples), example_keys(examples["id"])))
        draw = (params, prompt, keys, job.put_scalar(config.seed), job.put_scalar(step))
        if self._rollout is None:
            with clock.phase("compile"):
                self._rollout = compile_rollout(job.policy, self._sampling, config.model.dtype, *draw)
        with clock.phase("rollout"):
            out = self._rollout(*draw)
            if self.depth:
                out = kept(job.mesh, out)
            # The small arrays come to the host whole: cut to their bucket there, they need no compiled slice here.
            drawn = rows.fetch(out._replace(image_embeds=None))
        return Flight(examples, prompt, out, drawn)

    def _judge_aside(self, flight: Flight) -> None:
        if flight.judging is None:
            job = self.job
            with job.clock.phase("judge"):
                flight.judging = Judging(job.asking(self.rows, flight.examples, flight.drawn, job.reward))
