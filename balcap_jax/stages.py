"""What a step of each stage does between a batch of examples and the compiled update.

    vision   classes of image tokens -> update
    align    references -> update
    SFT      target captions -> update
    RL       rollout (compiled) -> judge (host) -> update (compiled)

A stage owns its compiled programs. All of them are compiled before its first step, one update per length bucket, so
that no later step can meet a shape for the first time.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax import sharding, train_step
from balcap_jax.data.scenes import labels
from balcap_jax.data.scenes.world import Scene
from balcap_jax.errors import UserError
from balcap_jax.evals.bcapscore import b_capscore
from balcap_jax.evals.held_out import Judged, summarise, to_samples
from balcap_jax.metrics import PhaseClock, finalise
from balcap_jax.models.llava.processing import LlavaProcessor
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.rewards import RewardFn, count_words
from balcap_jax.rollout import Sampling, example_keys, make_rollout
from balcap_jax.train_step import RLBatch, SFTBatch, TrainState, VisionBatch

Examples = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What all stages of a run share."""

    config: ConfigDict
    mesh: Mesh
    policy: Policy
    processor: LlavaProcessor
    reward: RewardFn
    clock: PhaseClock

    def put(self, tree: Any) -> Any:
        """Host arrays with a leading B axis to the devices of the mesh."""
        return jax.device_put(tree, sharding.batch_sharding(self.mesh))

    def put_scalar(self, value: int) -> jax.Array:
        return jax.device_put(np.uint32(value), sharding.replicated(self.mesh))

    def prompt(self, examples: Examples) -> Prompt:
        texts = [self.config.data.prompt or text for text in examples["prompt"]]
        return self.put(self.processor(examples["image"], texts, examples["id"]))

    def captions(self, tokens: np.ndarray) -> list[list[str]]:
        """Tokens [B, G, R] to texts [B][G]."""
        texts, group = self.processor.decode(tokens), tokens.shape[1]
        return [texts[i : i + group] for i in range(0, len(texts), group)]


def make_optimizer(config: ConfigDict, stage: str) -> optax.GradientTransformation:
    """AdamW with linear warm-up, a constant or cosine rate, and clipping by the global norm."""
    settings, optim = config.stages[stage], config.optim
    rate, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, settings.steps)
    elif warmup:
        # The first update is 1/warmup of the rate, not 0: a step that changes nothing is a step lost.
        schedule = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    else:
        schedule = optax.constant_schedule(rate)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(schedule, optim.b1, optim.b2, optim.eps, weight_decay=optim.weight_decay),
    )


def start_state(job: Job, params: Params, stage: str) -> TrainState:
    """The state before the first update of `stage`, placed on the mesh."""
    freeze = job.config.stages[stage].freeze
    optimizer = make_optimizer(job.config, stage)
    abstract = jax.eval_shape(lambda p: train_step.init_state(p, optimizer, freeze), params)
    placed = state_shardings(job.mesh, abstract)
    params = jax.device_put(params, placed.params)
    return jax.jit(lambda p: train_step.init_state(p, optimizer, freeze), out_shardings=placed)(params)


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Shardings of an (abstract) state: moments live where their parameters live, counters everywhere."""
    params = sharding.tree_shardings(mesh, state.params)

    def moment(path, leaf):
        # The last key of a moment's path is its parameter's path: the optimiser sees a flat dict.
        name = getattr(path[-1], "key", None) if path else None
        return sharding.tree_shardings(mesh, {name: leaf})[name] if isinstance(name, str) else sharding.replicated(mesh)

    opt_state = jax.tree_util.tree_map_with_path(moment, state.opt_state)
    return TrainState(sharding.replicated(mesh), params, opt_state, sharding.replicated(mesh))


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


class VisionStage:
    """Pretraining of the vision tower on what is seen where, the miniature's stand-in for CLIP."""

    phases = ("update",)
    writes_captions = False

    def __init__(self, job: Job, reference: Params | None = None):
        del reference
        settings = job.config.stages.vision
        self.job = job
        width, needed = job.config.model.vision_width, sum(labels.CLASSES)
        if not job.config.model.path and width < needed:
            raise UserError(
                f"config field 'model.vision_width' is {width}, but the stage vision tells {needed} classes apart and "
                f"needs at least as many features; raise it to {needed} or more, or leave the stage out"
            )
        self._step = train_step.make_vision_step(
            job.policy,
            make_optimizer(job.config, "vision"),
            labels.CLASSES,
            freeze=settings.freeze,
            micro_batches=settings.micro_batches,
        )
        self._program: Any = None

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], None]:
        """One update on the examples' images. -> (state, values for the log, no samples)"""
        job = self.job
        side = math.isqrt(job.processor.image_tokens)
        classes = np.stack([labels.of_tokens(Scene.from_json(text), side) for text in examples["scene"]])
        batch = VisionBatch(job.put(examples["image"]), job.put(classes))
        if self._program is None:
            with job.clock.phase("compile"):
                self._program = self._step.lower(state, batch).compile()
        with job.clock.phase("update"):
            state, metrics = self._program(state, batch)
            values = finalise(metrics)
        return state, values | {"tokens": float(classes[..., 0].size)}, None


class SFTStage:
    """Cross-entropy on captions of the data set, G targets per image over one shared prompt.

    As the stage "align" the targets are the references, as LLaVA first aligns its projector on plain captions; as
    "sft" they are the data set's captions, faults included: what the base policy of RL imitates.
    """

    phases = ("update",)

    def __init__(self, job: Job, reference: Params | None = None, *, name: str = "sft"):
        del reference
        settings = job.config.stages[name]
        self.job = job
        self.writes_captions = name == "sft"
        self._step = train_step.make_sft_step(
            job.policy, make_optimizer(job.config, name), freeze=settings.freeze, micro_batches=settings.micro_batches
        )
        self._programs: dict[int, Any] = {}

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], None]:
        """One update on the examples' captions. -> (state, values for the log, no samples)"""
        job, buckets = self.job, self.job.config.rollout.buckets
        targets = examples["captions"] if self.writes_captions else [[text] for text in examples["reference"]]
        tokens, mask = job.processor.encode_responses(targets, buckets[-1])
        length = bucket_of(buckets, int(mask.sum(-1).max()))
        batch = SFTBatch(job.prompt(examples), job.put(tokens[..., :length]), job.put(mask[..., :length]))
        if not self._programs:
            with job.clock.phase("compile"):
                for bucket in buckets:
                    abstract = with_length(batch, ("responses", "mask"), bucket)
                    self._programs[bucket] = self._step.lower(state, abstract).compile()
        with job.clock.phase("update"):
            state, metrics = self._programs[length](state, batch)
            values = finalise(metrics)
        return state, values | {"tokens": float(mask.sum())}, None


class RLStage:
    """Rollout, judgement and the BalCapRL update."""

    phases = ("rollout", "judge", "update")
    writes_captions = True

    def __init__(self, job: Job, reference: Params | None = None):
        config = job.config
        settings, rollout = config.stages.rl, config.rollout
        self.job = job
        self._reference = reference
        self._rollout_step = make_rollout(
            job.policy,
            Sampling(rollout.group_size, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k),
        )
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
            freeze=settings.freeze,
            micro_batches=settings.micro_batches,
        )
        self._rollout: Any = None
        self._programs: dict[int, Any] = {}

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], Judged]:
        """Samples G captions per example, has them judged, and updates. -> (state, values for the log, captions)"""
        job, config, clock = self.job, self.job.config, self.job.clock
        prompt = job.prompt(examples)
        keys = job.put(example_keys(examples["id"]))
        draw = (state.params, prompt, keys, job.put_scalar(config.seed), job.put_scalar(step))
        if self._rollout is None:
            with clock.phase("compile"):
                self._rollout = self._rollout_step.lower(*draw).compile()
        with clock.phase("rollout"):
            out = self._rollout(*draw)
            # The small arrays come to the host whole: cut to their bucket there, they need no compiled slice here.
            drawn = jax.device_get(out._replace(image_embeds=None))

        with clock.phase("judge"):
            captions = job.captions(drawn.tokens)
            scores = job.reward(to_samples(examples, captions))

        length = bucket_of(config.rollout.buckets, int(drawn.lengths.max()))
        batch = RLBatch(
            prompt,
            out.image_embeds,
            *job.put(
                (
                    drawn.tokens[..., :length],
                    drawn.mask[..., :length],
                    drawn.policy_log_probs[..., :length],
                    scores.rewards,
                    scores.valid,
                    np.array([[count_words(text) for text in members] for members in captions], np.int32),
                    np.array([count_words(text) for text in examples["reference"]], np.int32),
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

        values["b_capscore"] = b_capscore(*np.moveaxis(scores.rewards, -1, 0), scores.valid.all(-1))
        values["tokens"] = float(drawn.lengths.sum())
        return state, values, Judged(examples, captions, drawn.lengths, drawn.truncated, scores)


class Evaluator:
    """Captions held-out images with the current parameters and has them judged; compiled once per run."""

    def __init__(self, job: Job, *, greedy: bool):
        config = job.config
        self.job = job
        self.samples = 1 if greedy else config.log.eval_samples
        temperature = config.rollout.eval_temperature
        self._rollout_step = make_rollout(
            job.policy,
            Sampling(
                self.samples,
                config.rollout.max_tokens,
                temperature or 1.0,
                greedy=greedy or not temperature,
            ),
        )
        self._rollout: Any = None

    def __call__(self, params: Params, batches: Sequence[tuple[Examples, int]], step: int) -> tuple[dict, list[dict]]:
        """Judges captions of `batches` (columns and number of real rows each). -> (summary, records per image)"""
        job, config = self.job, self.job.config
        gate = (config.rewards.gate_low, config.rewards.gate_high)
        records = []
        for examples, rows in batches:
            prompt, keys = job.prompt(examples), job.put(example_keys(examples["id"]))
            draw = (params, prompt, keys, job.put_scalar(config.seed), job.put_scalar(step))
            if self._rollout is None:
                with job.clock.phase("compile"):
                    self._rollout = self._rollout_step.lower(*draw).compile()
            out = self._rollout(*draw)
            tokens, lengths, truncated = jax.device_get((out.tokens, out.lengths, out.truncated))
            captions = job.captions(tokens)
            scores = job.reward(to_samples(examples, captions))
            judged = Judged(examples, captions, lengths, truncated, scores)
            records += judged.records(job.reward.names, gate)[:rows]
        return summarise(records, job.reward.names), records
