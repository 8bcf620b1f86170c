"""What the stages of training share: the job, its optimiser, what is frozen, and judged captions."""

import dataclasses
import functools
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax import train_step
from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import stage_order
from balcap_jax.data.words import count_words
from balcap_jax.models import lora
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.models.prompting import PromptProcessor
from balcap_jax.parallel import sharding
from balcap_jax.parallel.host_batch import Rows, take
from balcap_jax.rewards import RewardFn
from balcap_jax.rewards.base import Samples, Scores
from balcap_jax.rewards.bcapscore import harmonic_mean, three_of
from balcap_jax.rollout import Rollout, Sampling
from balcap_jax.train_step import TrainState
from balcap_jax.training.progress import PhaseClock

# Samples of evaluations draw from a stream of their own: no training step has this number.
EVALUATION_STEP = 2**31 - 1


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
    """Captions [B][G] of B examples (columns) with their scores; tokens, truncated [B, G]."""

    examples: Mapping[str, Sequence]
    captions: Sequence[Sequence[str]]
    tokens: np.ndarray
    truncated: np.ndarray
    scores: Scores

    def records(self, names: Sequence[str], gate: tuple[float, float]) -> list[dict[str, Any]]:
        """One JSON-able record per image, as the report reads them.

        The b-CapScore of a caption uses the ungated rewards and is None where a score is missing. `gate` are the bounds
        of the length band.
        """
        examples, scores = self.examples, self.scores
        words = np.array([[count_words(text) for text in group] for group in self.captions])
        reference_words = np.array([count_words(text) for text in examples["reference"]])
        inside = in_band(words, reference_words, *gate)
        *three, whole = three_of(scores.rewards, scores.valid, names)
        balanced = 100.0 * harmonic_mean(*three)

        def caption(b: int, g: int) -> dict[str, Any]:
            valid, rewards = scores.valid[b, g], scores.rewards[b, g]
            ours = {
                "caption": self.captions[b][g],
                "words": int(words[b, g]),
                "tokens": int(self.tokens[b, g]),
                "truncated": bool(self.truncated[b, g]),
                "in_band": bool(inside[b, g]),
                "rewards": {name: float(rewards[k]) if valid[k] else None for k, name in enumerate(names)},
                "b_capscore": float(balanced[b, g]) if whole[b, g] else None,
            }
            return {
                **ours,
                **scores.detail[b][g],
                **ours,
            }  # Whatever names a detail uses, these are ours.

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
