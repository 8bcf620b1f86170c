"""What a step of each stage does between a batch of examples and the compiled update.

    vision   classes of image tokens -> update
    align    references -> update
    SFT      target captions -> update
    RL       rollout (compiled) -> judge (host) -> update (compiled); `pipeline` has another order of them

A stage owns its compiled programs. All of them are compiled before its first step, one update per length bucket, so
that no later step can meet a shape for the first time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax import distributed, lora, sharding, train_step
from balcap_jax.config import stage_order
from balcap_jax.data.scenes import labels
from balcap_jax.data.scenes.world import Scene
from balcap_jax.errors import UserError
from balcap_jax.evals.bcapscore import b_capscore, three_of
from balcap_jax.evals.held_out import Judged, summarise, to_samples
from balcap_jax.metrics import HIDDEN, PhaseClock, finalise
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.models.prompting import PromptProcessor
from balcap_jax.pipeline import Flight, Judging, kept
from balcap_jax.rewards import RewardFn, Scores, count_words
from balcap_jax.rollout import Rollout, Sampling, compile_rollout, example_keys
from balcap_jax.rows import Rows, take
from balcap_jax.train_step import RLBatch, SFTBatch, TrainState, VisionBatch

Examples = Mapping[str, Any]
# (step, failed, calls): called when the captions of a step are judged and nothing is being asked; whether to ask more.
Settle = Callable[[int, int, int], bool]

# The stages that train adapters, where there are any.
LORA_STAGES = ("sft", "rl")


@dataclasses.dataclass(frozen=True)
class Job:
    """What all stages of a run share."""

    config: ConfigDict
    mesh: Mesh
    policy: Policy
    processor: PromptProcessor
    reward: RewardFn
    clock: PhaseClock
    measure: RewardFn | None = None  # what evaluations score; None = the reward

    def rows(self, batch_size: int) -> Rows:
        """Which rows of a batch this process has; what follows takes and gives those, B being split by process."""
        return Rows(self.mesh, batch_size)

    def put_scalar(self, value: int) -> jax.Array:
        with jax.transfer_guard_host_to_device("allow"):  # To JAX this counts as no explicit transfer.
            return jax.make_array_from_callback((), sharding.replicated(self.mesh), lambda _: np.uint32(value))

    def prompt(self, examples: Examples) -> Prompt:
        """Host arrays of the prompts of `examples`."""
        texts = [self.config.data.prompt or text for text in examples["prompt"]]
        return self.processor(examples["image"], texts, examples["id"])

    def judge(self, rows: Rows, examples: Examples, drawn: Rollout, reward: RewardFn) -> Judged:
        """Has `reward` score this process's own of the held rows, which `examples` and `drawn` (host arrays) hold."""
        return self.asking(rows, examples, drawn, reward)()

    def asking(self, rows: Rows, examples: Examples, drawn: Rollout, reward: RewardFn) -> Callable[[], Judged]:
        """`judge` as a function that any thread may call: what needs the tokenizer, which is not for two, is done."""
        own, tokens = take(examples, rows.own), drawn.tokens[rows.own]
        shape = tokens.shape[:2]
        texts = self.processor.decode(tokens) if tokens.size else []
        captions = [texts[i : i + shape[1]] for i in range(0, len(texts), shape[1])]
        lengths, truncated = drawn.lengths[rows.own], drawn.truncated[rows.own]

        def ask() -> Judged:
            if captions:
                scores = reward(to_samples(own, captions, lengths))
            else:  # All that is held here is another process's to judge.
                nothing = (*shape, len(reward.names))
                scores = Scores(np.zeros(nothing, np.float32), np.zeros(nothing, bool), [])
            return Judged(own, captions, lengths, truncated, scores)

        return ask


def sampling_of(config: ConfigDict) -> Sampling:
    """How captions are drawn in training."""
    rollout = config.rollout
    return Sampling(rollout.group_size, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)


def make_optimizer(config: ConfigDict, stage: str) -> optax.GradientTransformation:
    """AdamW with linear warm-up, a constant or cosine rate, and clipping by the global norm."""
    settings, optim = config.stages[stage], config.optim
    rate, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(settings.steps, warmup) + 1)
    else:
        schedule = optax.linear_schedule(0.0, rate, warmup) if warmup else optax.constant_schedule(rate)
    # Updates count from 1 here: both ends of a schedule are 0, and a step that changes nothing is a step lost.
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            lambda count: schedule(count + 1),
            optim.b1,
            optim.b2,
            optim.eps,
            mu_dtype=optim.mu_dtype,
            weight_decay=optim.weight_decay,
        ),
    )


def freeze_of(config: ConfigDict, stage: str) -> str:
    """What is not trained in `stage`, as a regular expression; with LoRA everything but adapters."""
    freeze = config.stages[stage].freeze
    if not (config.lora.rank and stage in LORA_STAGES):
        return freeze
    return f"{lora.FREEZE_BASE}|{freeze}" if freeze else lora.FREEZE_BASE


def check_freezes(config: ConfigDict, params: Params) -> None:
    """Raises UserError where a stage's `freeze` matches no parameter or leaves none to train; `params` may be abstract.

    Raises it too where lora.targets fit nothing.
    """
    for stage in stage_order(config):
        params = jax.eval_shape(functools.partial(params_of, config, stage=stage), params)
        freeze = config.stages[stage].freeze
        where = f"config field 'stages.{stage}.freeze' ({freeze!r})"
        if freeze and not train_step.split(params, freeze)[1]:
            parts = ", ".join(f"{part}/" for part in params)
            raise UserError(f"{where} matches no parameter; their paths begin with {parts}")
        if not train_step.split(params, freeze_of(config, stage))[0]:
            raise UserError(f"{where} leaves no parameter to train; match fewer, or set stages.{stage}.steps to 0")


def params_of(config: ConfigDict, params: Params, stage: str) -> Params:
    """The parameters as `stage` holds them, from those that it starts from.

    With LoRA the first stage that imitates or reinforces captions adds the adapters and brings the base to its type.
    Stages before it make a base where there was none, from random numbers, and train all of it. Without, what a stage
    freezes is brought to `optim.frozen_dtype`, and what it trains is float32.
    """
    if not (config.lora.rank and stage in LORA_STAGES):
        trainable, frozen = train_step.split(params, config.stages[stage].freeze)
        trainable = {path: leaf.astype(jnp.float32) for path, leaf in trainable.items()}
        frozen = {path: leaf.astype(config.optim.frozen_dtype) for path, leaf in frozen.items()}
        return train_step.join(trainable, frozen)
    if lora.has_adapters(params):
        return params
    params = lora.add(params, config.lora.rank, config.lora.targets, jax.random.key(config.seed))
    return lora.cast_base(params, config.lora.base_dtype)


def start_state(job: Job, params: Params, stage: str) -> TrainState:
    """The state before the first update of `stage`, placed on the mesh."""
    optimizer, freeze = make_optimizer(job.config, stage), freeze_of(job.config, stage)

    def start(params: Params) -> TrainState:
        return train_step.init_state(params_of(job.config, params, stage), optimizer, freeze)

    placed = state_shardings(job.mesh, jax.eval_shape(start, params))
    params = jax.device_put(params, sharding.tree_shardings(job.mesh, params))
    return jax.jit(start, out_shardings=placed)(params)


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
    depth = 0

    def __init__(self, job: Job, reference: Params | None = None, settle: Settle | None = None):
        del reference, settle
        settings = job.config.stages.vision
        self.job = job
        self.rows = job.rows(settings.batch_size)
        # Families differ in the number of features that a tower of some width gives.
        size, processor = job.config.model.image_size, job.processor
        blank = processor([np.zeros((size, size, 3), np.uint8)], [""])
        params = jax.eval_shape(job.policy.init, jax.random.key(0))
        width, needed = jax.eval_shape(job.policy.features, params, blank.images).shape[-1], sum(labels.CLASSES)
        if width < needed:
            raise UserError(
                f"the vision tower gives {width} features, but the stage vision tells {needed} classes apart and needs "
                f"at least as many; raise model.vision_width ({job.config.model.vision_width}), or leave the stage out"
            )
        placed = int((blank.tokens == processor.tokenizer.convert_tokens_to_ids(processor.image_token)).sum())
        self._side = math.isqrt(placed)
        if not placed == self._side**2 == processor.image_tokens:
            raise UserError(
                f"a picture of {size} x {size} pixels has {placed} image tokens of up to {processor.image_tokens}, but "
                "the stage vision needs as many as there may be, in a square; set model.max_image_tokens to a square "
                "number that the picture fills, or leave the stage out"
            )
        self._step = train_step.make_vision_step(
            job.policy,
            make_optimizer(job.config, "vision"),
            labels.CLASSES,
            freeze=freeze_of(job.config, "vision"),
            micro_batches=settings.micro_batches,
        )
        self._program: Any = None

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], None]:
        """One update on the examples' images. -> (state, values for the log, no samples)"""
        job = self.job
        classes = np.stack([labels.of_tokens(Scene.from_json(text), self._side) for text in examples["scene"]])
        batch = VisionBatch(*self.rows.put((job.prompt(examples).images, classes)))
        if self._program is None:
            with job.clock.phase("compile"):
                self._program = self._step.lower(state, batch).compile()
        with job.clock.phase("update"):
            state, metrics = self._program(state, batch)
            values = finalise(metrics)
        return state, values | {"tokens": float(math.prod(batch.labels.shape[:-1]))}, None


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


class Evaluator:
    """Captions held-out images with the current parameters and has them judged; compiled once for each type of them."""

    def __init__(self, job: Job, *, greedy: bool):
        config = job.config
        self.job = job
        self.samples = 1 if greedy else config.log.eval_samples
        temperature = config.rollout.eval_temperature
        self._sampling = Sampling(
            self.samples, config.rollout.max_tokens, temperature or 1.0, greedy=greedy or not temperature
        )
        self._rollouts: dict[tuple, Any] = {}

    def __call__(self, params: Params, batches: Sequence[tuple[Examples, int]], step: int) -> tuple[dict, list[dict]]:
        """Judges captions of `batches` (columns and number of real rows each). -> (summary, records per image)

        All processes are given all batches, caption a part of each, and get all of the result.
        """
        job, config = self.job, self.job.config
        gate = (config.rewards.gate_low, config.rewards.gate_high)
        measure, records = job.measure or job.reward, []
        for columns, real in batches:
            rows = job.rows(len(columns["id"]))
            examples = take(columns, rows.held)
            prompt, keys = rows.put((job.prompt(examples), example_keys(examples["id"])))
            draw = (params, prompt, keys, job.put_scalar(config.seed), job.put_scalar(step))
            # A stage may keep what it freezes in another type than the one before it did.
            types = tuple(leaf.dtype for leaf in jax.tree.leaves(params))
            if types not in self._rollouts:
                with job.clock.phase("compile"):
                    self._rollouts[types] = compile_rollout(job.policy, self._sampling, config.model.dtype, *draw)
            out = self._rollouts[types](*draw)
            read = out._replace(image_embeds=None, mask=None, log_probs=None, policy_log_probs=None)
            judged = job.judge(rows, examples, rows.fetch(read), measure)
            records += rows.gather_list(judged.records(measure.names, gate))[:real]
        return summarise(records, measure.names), records
