"""What the fields of a configuration demand of each other."""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from balcap_jax import rewards as reward_functions
from balcap_jax.cli.files import resolved
from balcap_jax.config import judge as judge_settings
from balcap_jax.config.schema import FIELDS, STAGES

_LEAST = 0.01  # of a temperature or of the largest weight: below, fp32 and the epsilons decide the result
_DATA_DIR = next(field.default for field in FIELDS if field.name == "data.data_dir")


def problems(config: ConfigDict, order: Sequence[str]) -> Iterator[str]:
    """What is wrong between fields, one line each; lazily, because later checks rely on earlier ones.

    Every field of `config` has its type and range already; `order` is the stages to run.
    """
    for stage in order:
        if stage not in STAGES:
            yield f"config field 'stages.order' names the stage {stage!r}; stages are {', '.join(STAGES)}"
    if len(set(order)) < len(order):
        yield f"config field 'stages.order' names a stage twice, got {config.stages.order!r}"

    group_size, rollout = config.rollout.group_size, config.rollout
    if "rl" in order and group_size < 2:
        yield (
            f"config field 'rollout.group_size' is {group_size}: a group needs at least 2 samples, "
            "because rl compares the samples of a prompt with each other"
        )
    buckets = rollout.buckets
    if any(a >= b for a, b in itertools.pairwise(buckets)):
        yield f"config field 'rollout.buckets' must be ascending, got {buckets}"
    if buckets[-1] != rollout.max_tokens:
        fitting = (*(bucket for bucket in buckets if bucket < rollout.max_tokens), rollout.max_tokens)
        listed = ",".join(map(str, fitting))
        yield (
            f"config field 'rollout.buckets' must end with rollout.max_tokens ({rollout.max_tokens}), got {buckets}; "
            f"try --config.rollout.buckets={listed}"
        )

    for stage in order:
        settings = config.stages[stage]
        if settings.batch_size % settings.micro_batches:
            yield (
                f"config field 'stages.{stage}.batch_size' ({settings.batch_size}) must be divisible by "
                f"stages.{stage}.micro_batches ({settings.micro_batches})"
            )
        if config.data.name == "scenes" and settings.batch_size > config.data.train_size:
            yield (
                f"config field 'stages.{stage}.batch_size' ({settings.batch_size}) is more than "
                f"data.train_size ({config.data.train_size})"
            )
        if settings.schedule == "cosine" and 0 < settings.steps <= settings.warmup_steps:
            yield (
                f"config fields 'stages.{stage}.steps' ({settings.steps}) and 'stages.{stage}.warmup_steps' "
                f"({settings.warmup_steps}) do not fit: the cosine schedule needs more steps than its warm-up; raise "
                "the one or lower the other"
            )
        try:
            re.compile(settings.freeze)
        except re.error as error:
            yield f"config field 'stages.{stage}.freeze' is no regular expression: {error}, got {settings.freeze!r}"

    if config.lora.rank:
        adapted = [stage in ("sft", "rl") for stage in order]
        if not any(adapted) or adapted != sorted(adapted):
            yield (
                "config field 'lora.rank' is above 0: adapters are trained by sft and rl, which must be in "
                f"config field 'stages.order' and come after all others, got {config.stages.order!r}"
            )
        try:
            re.compile(config.lora.targets)
        except re.error as error:
            yield f"config field 'lora.targets' is no regular expression: {error}, got {config.lora.targets!r}"

    rewards = config.rewards
    if not rewards.gate_low < rewards.gate_high:
        yield (
            f"config field 'rewards.gate_low' ({rewards.gate_low}) must be less than "
            f"rewards.gate_high ({rewards.gate_high})"
        )
    objectives = reward_functions.objectives(rewards)
    if len(rewards.weights) != len(objectives):
        yield (
            f"config field 'rewards.weights' needs {len(objectives)} numbers for {rewards.name} "
            f"({', '.join(objectives)}), got {rewards.weights}"
        )
    if max(rewards.weights) < _LEAST:
        yield f"config field 'rewards.weights' must have a weight above 0 (at least {_LEAST:g}), got {rewards.weights}"
    if not rewards.length_start < rewards.length_end:
        yield (
            f"config field 'rewards.length_start' ({rewards.length_start}) must be less than rewards.length_end "
            f"({rewards.length_end})"
        )
    if 0 < rollout.eval_temperature < _LEAST:
        yield (
            f"config field 'rollout.eval_temperature' must be 0 (greedy) or at least {_LEAST:g}, got "
            f"{rollout.eval_temperature}"
        )
    if config.checkpoint.best_metric and not (order[-1] == "rl" and config.stages.rl.eval_every):
        yield (
            "config field 'checkpoint.best_metric' needs stages.rl.eval_every above 0, and rl as the last of "
            f"stages.order, got {config.stages.rl.eval_every} and {config.stages.order!r}"
        )
    for field in FIELDS:
        if field.is_path:
            resolved(functools.reduce(getattr, field.name.split("."), config), f"config field '{field.name}'")
    yield from _data_problems(config, order)
    if config.judge.failure_rate and config.judge.name != "oracle":
        yield f"config field 'judge.failure_rate' is for the oracle judge only, and judge.name is {config.judge.name!r}"

    if config.judge.name == "remote":
        yield from judge_settings.problems(config.judge)
    if config.judge.name == "policy":
        yield from judge_settings.policy_problems(config.judge)
        if config.pipeline.depth:
            yield (
                "config field 'pipeline.depth' is 1 and judge.name is policy: a judge on the devices that sample has "
                "nothing to run beside; set pipeline.depth to 0"
            )

    for axis, size in config.mesh.items():
        if size != -1 and size < 1:
            yield f"config field 'mesh.{axis}' must be >= 1, or -1 for all devices left, got {size}"
    if sum(size == -1 for size in config.mesh.values()) > 1:
        yield f"only one of the config fields 'mesh.*' may be -1, got {config.mesh.to_dict()}"
    if not config.model.path:
        yield from _size_problems(config.model)


def _data_problems(config: ConfigDict, order: Sequence[str]) -> Iterator[str]:
    name = config.data.name
    if name == "scenes":
        return
    if "vision" in order:
        yield (
            "config field 'stages.order' names the stage vision, which learns from scene graphs: the data set "
            f"{name!r} has none; leave the stage out"
        )
    if config.judge.name == "oracle" and reward_functions.resolve(config.rewards.name).asks:
        yield (
            f"config field 'judge.name' is oracle, which knows the scenes only: with data.name {name!r} set it to "
            "remote, or rewards.name to lexical, which needs no judge"
        )
    if name == "sharegpt4v" and not config.data.manual_dir:
        yield (
            "config field 'data.manual_dir' is empty: sharegpt4v needs the folder that holds its JSON and its images"
        )
    if config.data.name == "photos" and config.data.data_dir == _DATA_DIR:
        yield "config field 'data.data_dir' must be the folder, or the JSONL file, of your photographs"


def _size_problems(model: ConfigDict) -> Iterator[str]:
    fixed_size = model.family == "llava"  # Others resize an image to what its own size asks for.
    divisors = [("vision_width", "vision_heads"), ("heads", "kv_heads")]
    for name, divisor in [("image_size", "patch_size"), *divisors] if fixed_size else divisors:
        if model[name] % model[divisor]:
            yield f"config field 'model.{name}' ({model[name]}) must be divisible by model.{divisor} ({model[divisor]})"
    if model.head_size % 2:
        yield f"config field 'model.head_size' must be even for rotary positions, got {model.head_size}"
    if fixed_size and not 1 <= abs(model.feature_layer) <= model.vision_layers:
        yield (
            f"config field 'model.feature_layer' must be in [-{model.vision_layers}, -1] or [1, {model.vision_layers}] "
            f"for {model.vision_layers} vision layers, got {model.feature_layer}"
        )
    image_tokens, why = model.max_image_tokens, "max_image_tokens"
    if fixed_size:
        image_tokens, why = (model.image_size // model.patch_size) ** 2, "image_size / patch_size, squared"
    if model.prompt_tokens <= image_tokens:
        yield (
            f"config field 'model.prompt_tokens' ({model.prompt_tokens}) leaves no room for text beside the "
            f"{image_tokens} image tokens ({why})"
        )
