"""Every setting of a run: one table with type, default, range and meaning, checked before anything is built.

    python -m balcap_jax.config                                                   prints the table
    python -m balcap_jax.config --config=configs/scenes.py --config.seed=1        prints the resolved settings

A recipe is a short Python file whose `get_config(variant)` starts from `default_config()` and overrides fields.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import numbers
import re
import shutil
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.errors import UserError, exit_on_user_error

STAGES = ("vision", "align", "sft", "rl")
"""Stages that `stages.order` may name."""

OBJECTIVES = {"balcap": ("precision", "recall", "linguistic")}
"""Objective names per `rewards.name`, in the order of `rewards.weights`."""

_OVERRIDE = "--config."
_SIMILAR = 0.6  # difflib ratio from which a name counts as a misspelling of another
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "True or False",
    "str": "a string",
    "ints": "a tuple of integers",
    "floats": "a tuple of numbers",
}
_TYPE_NAMES = {"ints": "int, ..", "floats": "float, .."}


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    `kind` is a key of `_KINDS`; `low`/`high` bound a number or each entry of a tuple (exclusive with `open_low` or
    `open_high`); `choices` lists the values of a string. `resumable` fields may change when a run is resumed.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None  # only together with low
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    resumable: bool = False

    @property
    def range_text(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        if self.low is None:
            return ""
        if self.high is None:
            return f"{'>' if self.open_low else '>='} {self.low}"
        return f"{'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"

    def holds(self, number: float) -> bool:
        above = self.low is None or number > self.low or (number == self.low and not self.open_low)
        below = self.high is None or number < self.high or (number == self.high and not self.open_high)
        return above and below


def _stage_fields(stage: str, what: str, *, steps: int, batch_size: int, rate: float, warmup: int) -> tuple[Field, ...]:
    group = f"stages.{stage}"
    return (
        Field(f"{group}.steps", "int", steps, f"updates of the {what} stage; 0 skips it", low=0),
        Field(f"{group}.batch_size", "int", batch_size, "prompts (images) per update, B, over all devices", low=1),
        Field(f"{group}.micro_batches", "int", 1, "parts of B whose gradients are accumulated; lowers memory", low=1),
        Field(f"{group}.learning_rate", "float", rate, "peak AdamW learning rate", low=0),
        Field(f"{group}.warmup_steps", "int", warmup, "updates of linear warm-up from 0", low=0),
        Field(f"{group}.schedule", "str", "constant", "learning rate after warm-up", choices=("constant", "cosine")),
        Field(f"{group}.freeze", "str", "", "regex searched in parameter paths; matches are not trained; empty = none"),
        Field(f"{group}.eval_every", "int", 0, "updates between evaluations on held-out images; 0 = ends only", low=0),
    )


FIELDS: tuple[Field, ...] = (
    Field("name", "str", "", "label of the run in reports and logs; empty = the workdir's name"),
    Field("seed", "int", 0, "seed of initial parameters, data order and sampling", low=0, high=2**31 - 1),
    # model: the sizes are those of the random initialisation; a saved model brings its own.
    Field("model.family", "str", "llava", "architecture of the policy", choices=("llava",)),
    Field("model.path", "str", "", "directory of a saved model; empty = random initialisation with the sizes below"),
    Field("model.image_size", "int", 96, "height and width of the square input image, pixels", low=1),
    Field("model.patch_size", "int", 16, "height and width of a vision patch, pixels; divides image_size", low=1),
    Field("model.vision_width", "int", 128, "features of a vision token", low=1),
    Field("model.vision_layers", "int", 4, "vision transformer layers", low=1),
    Field("model.vision_heads", "int", 4, "vision attention heads; divides vision_width", low=1),
    Field("model.vision_mlp", "int", 512, "hidden features of the vision MLP", low=1),
    Field("model.feature_layer", "int", -2, "vision hidden state given to the decoder; -1 = last layer"),
    Field("model.width", "int", 128, "features of a decoder token, D", low=1),
    Field("model.layers", "int", 4, "decoder layers, L", low=1),
    Field("model.heads", "int", 4, "decoder query heads, N", low=1),
    Field("model.kv_heads", "int", 4, "decoder key/value heads, M; divides heads", low=1),
    Field("model.head_size", "int", 32, "features of a decoder head, H; even (rotary pairs)", low=2),
    Field("model.mlp", "int", 384, "hidden features of the decoder MLP", low=1),
    Field("model.rope_theta", "float", 10000.0, "base wavelength of the rotary positions", low=0, open_low=True),
    Field("model.norm_eps", "float", 1e-5, "added to the variance in RMSNorm and LayerNorm", low=0, open_low=True),
    Field("model.tied_embeddings", "bool", False, "output projection = transposed token embedding"),
    Field("model.dtype", "str", "float32", "compute type; parameters stay float32", choices=("float32", "bfloat16")),
    Field(
        "model.remat", "str", "none", "activations recomputed in the backward pass", choices=("none", "full", "dots")
    ),
    Field("model.logits_chunk", "int", 512, "response tokens whose [V] logits exist at once, in the update", low=1),
    Field("model.prompt_tokens", "int", 48, "padded prompt length with image tokens, P; longer is refused", low=1),
    # data
    Field("data.name", "str", "scenes", "data set to train and evaluate on", choices=("scenes",)),
    Field("data.data_dir", "str", "~/.cache/balcap_jax", "where data sets are built and read; ~ is expanded"),
    Field("data.train_size", "int", 4096, "training images to build", low=1),
    Field("data.validation_size", "int", 64, "validation images to build", low=1),
    Field("data.test_size", "int", 128, "test images to build", low=1),
    Field("data.captions_per_image", "int", 4, "captions with faults per training image, for SFT", low=1),
    Field("data.seed", "int", 0, "seed of the built images and captions", low=0, high=2**31 - 1),
    Field("data.prompt", "str", "", "prompt for every image; empty = each sample's own"),
    Field("data.read_threads", "int", 2, "host threads that read images; 0 = none", low=0, resumable=True),
    # stages
    Field("stages.order", "str", "sft,rl", "stages to run, comma-separated: vision, align, sft, rl"),
    *_stage_fields("vision", "vision pretraining", steps=600, batch_size=64, rate=2e-3, warmup=50),
    *_stage_fields("align", "alignment (references as targets)", steps=400, batch_size=16, rate=2e-3, warmup=20),
    *_stage_fields("sft", "supervised", steps=400, batch_size=32, rate=1e-3, warmup=20),
    *_stage_fields("rl", "reinforcement", steps=100, batch_size=16, rate=1e-4, warmup=5),
    # rollout
    Field("rollout.group_size", "int", 8, "samples per prompt, G; a group needs at least 2 samples for rl", low=1),
    Field("rollout.max_tokens", "int", 96, "longest response, tokens, R; longer ones are truncated", low=1),
    Field("rollout.buckets", "ints", (96,), "response lengths that updates are compiled for; last = max_tokens", low=1),
    Field("rollout.temperature", "float", 1.0, "sampling temperature in training", low=0, open_low=True),
    Field("rollout.top_p", "float", 1.0, "nucleus: fewest tokens with this mass", low=0, high=1, open_low=True),
    Field("rollout.top_k", "int", 0, "only the k likeliest tokens; 0 = all", low=0),
    Field("rollout.eval_temperature", "float", 1.0, "sampling temperature in evaluations; 0 = greedy", low=0),
    # rewards
    Field("rewards.name", "str", "balcap", "reward function", choices=tuple(OBJECTIVES)),
    Field("rewards.weights", "floats", (1.0, 1.0, 1.0), "weight per objective: precision, recall, linguistic", low=0),
    Field("rewards.gate", "bool", True, "zero the linguistic reward outside the length band"),
    Field("rewards.gate_low", "float", 0.5, "shortest caption in the band, words over reference words", low=0),
    Field("rewards.gate_high", "float", 2.0, "longest caption in the band, words over reference words", low=0),
    # judge
    Field("judge.name", "str", "oracle", "who judges captions", choices=("oracle",)),
    Field("judge.failure_rate", "float", 0.0, "share of oracle calls made to fail, as a drill", low=0, high=1),
    Field("judge.max_failure_rate", "float", 0.2, "share of failed calls at which the run stops", low=0, high=1),
    Field("judge.failure_window", "int", 20, "steps over which that share is measured", low=1),
    # advantage
    Field(
        "advantage.estimator",
        "str",
        "c_gdpo",
        "how K rewards become one advantage",
        choices=("c_gdpo", "gdpo", "grpo", "dr_grpo", "rloo"),
    ),
    Field(
        "advantage.batch_norm",
        "str",
        "sequence",
        "second normalisation, over the batch (GDPO family)",
        choices=("sequence", "none"),
    ),
    Field("advantage.eps_group", "float", 1e-4, "added to the std of a group", low=0),
    Field("advantage.eps_batch", "float", 1e-4, "added to the std of the batch", low=0),
    Field("advantage.ddof", "int", 1, "0 = population std, 1 = sample std", low=0, high=1),
    Field("advantage.exclude_truncated", "bool", False, "leave truncated responses out of groups and loss"),
    # loss
    Field(
        "loss.clip_low",
        "float",
        0.2,
        "ratio is clipped below 1 - clip_low",
        low=0,
        high=1,
        open_low=True,
        open_high=True,
    ),
    Field("loss.clip_high", "float", 0.2, "ratio is clipped above 1 + clip_high", low=0, open_low=True),
    Field(
        "loss.normaliser",
        "str",
        "sequence",
        "mean of token means, mean over all tokens, or sum over a constant",
        choices=("sequence", "token", "constant"),
    ),
    Field("loss.kl_coef", "float", 0.0, "weight of the k3 KL to the policy at the stage's start; 0 = off", low=0),
    Field("loss.log_ratio_clamp", "float", 20.0, "log-ratios are clamped to +- this before exp", low=0, open_low=True),
    # optim
    Field("optim.b1", "float", 0.9, "AdamW first-moment decay", low=0, high=1, open_high=True),
    Field("optim.b2", "float", 0.95, "AdamW second-moment decay", low=0, high=1, open_high=True),
    Field("optim.eps", "float", 1e-8, "AdamW denominator epsilon", low=0, open_low=True),
    Field("optim.weight_decay", "float", 0.0, "AdamW decoupled weight decay", low=0),
    Field("optim.clip_norm", "float", 1.0, "gradients are scaled down to this global norm", low=0, open_low=True),
    Field("optim.max_nonfinite", "int", 3, "skipped non-finite updates in a row that stop the run", low=1),
    # mesh
    Field("mesh.replica", "int", 1, "devices along replica (across slices)", low=1),
    Field("mesh.data", "int", -1, "devices along data; -1 = all that are left"),
    Field("mesh.fsdp", "int", 1, "devices that parameters are sharded over", low=1),
    Field("mesh.tensor", "int", 1, "devices that heads and MLP features are split over", low=1),
    # checkpoint
    Field("checkpoint.every", "int", 50, "updates between checkpoints; 0 = only at stage ends", low=0, resumable=True),
    Field("checkpoint.keep", "int", 2, "newest checkpoints kept, besides the stage ends", low=1, resumable=True),
    Field("checkpoint.asynchronous", "bool", True, "write while training goes on", resumable=True),
    # log
    Field("log.every", "int", 1, "updates between lines of metrics.jsonl", low=1, resumable=True),
    Field("log.samples_every", "int", 20, "updates between saved captions; 0 = off", low=0, resumable=True),
    Field("log.tensorboard", "bool", True, "write TensorBoard events", resumable=True),
    Field("log.wandb", "str", "", "Weights & Biases project; empty = off", resumable=True),
    Field("log.eval_images", "int", 48, "held-out images of an evaluation", low=1),
    Field("log.eval_samples", "int", 4, "captions per image of an evaluation", low=1),
)  # fmt: skip

_BY_NAME = {field.name: field for field in FIELDS}
_GROUPS = {name.rsplit(".", depth)[0] for name in _BY_NAME for depth in range(1, name.count(".") + 1)}


# ---- building -------------------------------------------------------------------------------------------------------


def default_config() -> ConfigDict:
    """The full configuration with every field at its default; recipes override fields of it."""
    # Not type-safe on purpose: `check` then reports an ill-typed field in our words, with the field's full name.
    return _build({field.name: field.default for field in FIELDS})


def _build(values: Mapping[str, Any]) -> ConfigDict:
    config = ConfigDict(type_safe=False)
    for name, value in values.items():
        *groups, leaf = name.split(".")
        at = config
        for group in groups:
            if group not in at:
                at[group] = ConfigDict(type_safe=False)
            at = at[group]
        at[leaf] = value
    return config


def _leaves(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf; an empty unknown group counts as a leaf, so that it is reported."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping | ConfigDict) and name not in _BY_NAME and (len(value) or name in _GROUPS):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def stage_order(config: ConfigDict) -> tuple[str, ...]:
    """Stages to run, in order."""
    return tuple(part.strip() for part in config.stages.order.split(","))


# ---- checking -------------------------------------------------------------------------------------------------------


def check(config: ConfigDict) -> None:
    """Checks names, types, ranges and what fields demand of each other.

    Raises:
      UserError: one line that names the field, what it must be and what it was.
    """
    _canonical(config)


def _canonical(config: ConfigDict) -> ConfigDict:
    """A checked copy in which a float field holds a float and a tuple field a tuple, whatever the recipe wrote."""
    given = dict(_leaves(config))
    for name in given:
        if name not in _BY_NAME:
            raise _unknown(name, given[name])
    missing = [name for name in _BY_NAME if name not in given]
    if missing:
        raise UserError(f"config field {missing[0]!r} is missing; a recipe starts from config.default_config()")
    values = {field.name: _typed(field, given[field.name]) for field in FIELDS}
    for field in FIELDS:
        _check_range(field, values[field.name])
    checked = _build(values)
    for problem in _cross_problems(checked):
        raise UserError(problem)
    return checked.lock()


def _unknown(name: str, value: Any = None) -> UserError:
    if name in _GROUPS:
        members = [known.removeprefix(f"{name}.") for known in _BY_NAME if known.startswith(f"{name}.")]
        return UserError(f"config field {name!r} is a group ({', '.join(members)}), it can't be set to {value!r}")
    near = nearest(name, _BY_NAME)
    hint = f"did you mean {near!r}?" if near else "`python -m balcap_jax.config` lists all fields"
    return UserError(f"unknown config field {name!r}; {hint}")


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The known dotted name most like `name`, by the whole name or by its last part alone; None if none is alike."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= _SIMILAR else None


def _typed(field: Field, value: Any) -> Any:
    """The value as the field's Python type, without any change of meaning (no 1.5 -> 1, no "1" -> 1, no True -> 1)."""
    kind = field.kind
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind in ("ints", "floats") and isinstance(value, tuple | list) and value:
        entries = [_number(kind.removesuffix("s"), entry) for entry in value]
        if None not in entries:
            return tuple(entries)
    if kind in ("int", "float"):
        number = _number(kind, value)
        if number is not None:
            return number
    raise UserError(f"config field {field.name!r} must be {_KINDS[kind]}, got {value!r} ({field.meaning})")


def _number(kind: str, value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if kind == "int":
        return int(value) if isinstance(value, numbers.Integral) else None
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


def _check_range(field: Field, value: Any) -> None:
    if field.choices and value not in field.choices:
        near = difflib.get_close_matches(value, field.choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config field {field.name!r} must be one of {', '.join(field.choices)}, got {value!r}{hint}")
    if field.kind in ("int", "float", "ints", "floats"):
        for number in value if isinstance(value, tuple) else (value,):
            if not field.holds(number):
                demand = field.range_text if field.high is None else f"in {field.range_text}"
                raise UserError(f"config field {field.name!r} must be {demand}, got {value!r} ({field.meaning})")


def _cross_problems(config: ConfigDict) -> Iterator[str]:
    """What is wrong between fields, one line each; lazily, because later checks rely on earlier ones."""
    order = stage_order(config)
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
        yield (
            f"config field 'rollout.buckets' must end with rollout.max_tokens ({rollout.max_tokens}), got {buckets}; "
            f"try --config.rollout.buckets={_show(fitting)}"
        )

    for stage in order:
        settings = config.stages[stage]
        if settings.batch_size % settings.micro_batches:
            yield (
                f"config field 'stages.{stage}.batch_size' ({settings.batch_size}) must be divisible by "
                f"stages.{stage}.micro_batches ({settings.micro_batches})"
            )
        if settings.batch_size > config.data.train_size:
            yield (
                f"config field 'stages.{stage}.batch_size' ({settings.batch_size}) is more than "
                f"data.train_size ({config.data.train_size})"
            )
        if settings.schedule == "cosine" and 0 < settings.steps <= settings.warmup_steps:
            yield (
                f"config field 'stages.{stage}.warmup_steps' ({settings.warmup_steps}) must be less than "
                f"stages.{stage}.steps ({settings.steps}) with the cosine schedule"
            )
        try:
            re.compile(settings.freeze)
        except re.error as error:
            yield f"config field 'stages.{stage}.freeze' is no regular expression: {error}, got {settings.freeze!r}"

    rewards = config.rewards
    if not rewards.gate_low < rewards.gate_high:
        yield (
            f"config field 'rewards.gate_low' ({rewards.gate_low}) must be less than "
            f"rewards.gate_high ({rewards.gate_high})"
        )
    objectives = OBJECTIVES[rewards.name]
    if len(rewards.weights) != len(objectives):
        yield (
            f"config field 'rewards.weights' needs {len(objectives)} numbers for {rewards.name} "
            f"({', '.join(objectives)}), got {rewards.weights}"
        )
    if not any(rewards.weights):
        yield f"config field 'rewards.weights' must have a weight above 0, got {rewards.weights}"
    if config.judge.failure_rate and config.judge.name != "oracle":
        yield f"config field 'judge.failure_rate' is for the oracle judge only, and judge.name is {config.judge.name!r}"

    if config.mesh.data != -1 and config.mesh.data < 1:
        yield f"config field 'mesh.data' must be >= 1, or -1 for all devices left, got {config.mesh.data}"
    if not config.model.path:
        yield from _size_problems(config.model)


def _size_problems(model: ConfigDict) -> Iterator[str]:
    for name, divisor in (("image_size", "patch_size"), ("vision_width", "vision_heads"), ("heads", "kv_heads")):
        if model[name] % model[divisor]:
            yield f"config field 'model.{name}' ({model[name]}) must be divisible by model.{divisor} ({model[divisor]})"
    if model.head_size % 2:
        yield f"config field 'model.head_size' must be even for rotary positions, got {model.head_size}"
    if not 1 <= abs(model.feature_layer) <= model.vision_layers:
        yield (
            f"config field 'model.feature_layer' must be in [-{model.vision_layers}, -1] or [1, {model.vision_layers}] "
            f"for {model.vision_layers} vision layers, got {model.feature_layer}"
        )
    image_tokens = (model.image_size // model.patch_size) ** 2
    if model.prompt_tokens <= image_tokens:
        yield (
            f"config field 'model.prompt_tokens' ({model.prompt_tokens}) leaves no room for text beside the "
            f"{image_tokens} image tokens (image_size / patch_size, squared)"
        )


# ---- recipes and the command line -----------------------------------------------------------------------------------


def load(recipe: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Runs a recipe, applies overrides and checks the result.

    Args:
      recipe: path of a Python file, with ":variant" for `get_config("variant")`.
      overrides: dotted field name -> text, as in `--config.rollout.buckets=64,96`.

    Raises:
      UserError: the recipe is missing or fails, or `check` fails.
    """
    config = _run_recipe(recipe)
    for name, text in (overrides or {}).items():
        if name not in _BY_NAME:
            raise _unknown(name, text)
        *groups, leaf = name.split(".")
        at = config
        for depth, group in enumerate(groups):
            at = at.get(group)
            if not isinstance(at, ConfigDict):
                raise UserError(f"recipe {recipe}: config group {'.'.join(groups[: depth + 1])!r} is missing")
        at[leaf] = _parse(_BY_NAME[name], text)
    return _canonical(config)


def _run_recipe(recipe: str) -> ConfigDict:
    path, variant = _split_variant(recipe)
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"recipe {path}: {reason}; --config takes a Python file such as configs/scenes.py") from error
    # Executed rather than imported: no byte code is left beside the recipe, and two recipes may share a file name.
    module = types.ModuleType("recipe")
    module.__file__ = path
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        raise _recipe_error(path, error) from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"recipe {path} has no function get_config; copy configs/forkme.py for the form of a recipe")
    accepts_variant = bool(inspect.signature(get_config).parameters)
    if variant is not None and not accepts_variant:
        raise UserError(f"recipe {path} has no variants (its get_config takes no argument), got {variant!r}")
    try:
        config = get_config(variant or "") if accepts_variant else get_config()
    except Exception as error:
        raise _recipe_error(path, error) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"recipe {path}: get_config must return a ConfigDict, got {type(config).__name__}")
    return config


def _split_variant(recipe: str) -> tuple[str, str | None]:
    path, colon, variant = recipe.rpartition(":")
    return (path, variant) if colon and path.endswith(".py") else (recipe, None)


def _recipe_error(path: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return UserError(f"recipe {path}: {error}")
    if isinstance(error, SyntaxError):
        return UserError(f"recipe {path}, line {error.lineno}: {error.msg}")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f", line {lines[-1]}" if lines else ""
    message = " ".join(str(error).split())
    return UserError(f"recipe {path}{where}: {type(error).__name__}: {message}")


def _parse(field: Field, text: str) -> Any:
    """A command line's text as the field's type; what is no such value stays text, for `check` to name."""
    if field.kind == "str":
        return text
    if field.kind == "bool":
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    if field.kind in ("ints", "floats"):
        parts = text.strip().removeprefix("(").removesuffix(")").removesuffix(",").split(",")
        numbers_ = [_parse_number(field.kind.removesuffix("s"), part) for part in parts]
        return text if None in numbers_ else tuple(numbers_)
    number = _parse_number(field.kind, text)
    return text if number is None else number


def _parse_number(kind: str, text: str) -> int | float | None:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    if kind == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e3 steps
    return _number(kind, value)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors: one line, exit status 2 through `exit_on_user_error`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --config and documents --config.FIELD=VALUE, which `split_overrides` takes out before argparse sees it."""
    parser.add_argument(
        "--config",
        metavar="FILE.py[:VARIANT]",
        required=required,
        help="recipe; any field of it is overridden by --config.FIELD=VALUE, for example "
        "--config.rollout.temperature=0.8 (`python -m balcap_jax.config` lists the fields)",
    )


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.FIELD=VALUE` and `--config.FIELD VALUE` out of a command line.

    Returns:
      (other arguments, {FIELD: VALUE}); the last value of a repeated field wins.
    """
    rest, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(_OVERRIDE):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix(_OVERRIDE).partition("=")
        if not equals:
            value = next(arguments, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
        overrides[name] = value
    return rest, overrides


def parse_command_line(
    argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses `--config=RECIPE --workdir=D --config.a.b=v ...` and loads the configuration.

    Args:
      argv: arguments without the program's name; None = those of this process.
      parser: a command's own parser, with `add_arguments` already applied; None = one with --config and --workdir.

    Returns:
      (checked configuration, the other arguments).

    Raises:
      UserError: a bad recipe, field or argument.
    """
    if parser is None:
        parser = CommandParser()
        add_arguments(parser)
        parser.add_argument(
            "--workdir", metavar="DIR", required=True, help="where the run is written, and resumed from"
        )
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(rest)
    for argument in unknown:
        name = argument.partition("=")[0].lstrip("-")
        if name in _BY_NAME:
            raise UserError(f"unknown argument {argument}; did you mean --config.{argument.lstrip('-')}?")
        raise UserError(f"unknown argument {argument} (see {parser.prog} --help)")
    return load(args.config, overrides), args


# ---- text form and resuming -----------------------------------------------------------------------------------------


def to_text(config: ConfigDict) -> str:
    """The checked configuration as JSON with sorted keys: equal configurations give equal text."""
    return json.dumps(_canonical(config).to_dict(), indent=2, sort_keys=True) + "\n"


def from_text(text: str) -> ConfigDict:
    """The inverse of `to_text`. Fields are not checked, so that an older version's text can still be compared.

    Raises:
      UserError: the text is no JSON object.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not the JSON text of a configuration: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"not the JSON text of a configuration: {text[:40]!r}")
    return _build({name: tuple(value) if isinstance(value, list) else value for name, value in _leaves(tree)})


def differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """What keeps `current` from resuming the run of `saved`: one "field: old -> new" each; empty = it may resume.

    Fields that change neither what is learnt nor how it is evaluated (`Field.resumable`: most of log.*, checkpoint.*,
    reader threads) may differ. The last stage may grow, unless its schedule depends on its length: the steps already
    made would have been others.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(current))
    last = stage_order(current)[-1]
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name in _BY_NAME and _BY_NAME[name].resumable:
            continue
        if name not in old or name not in new:
            found.append(f"{name}: only in the {'saved' if name in old else 'new'} configuration")
        elif old[name] != new[name]:
            grows = name == f"stages.{last}.steps" and new[name] > old[name]
            if grows and current.stages[last].schedule == "constant":
                continue
            why = " (the cosine schedule depends on it)" if grows else ""
            found.append(f"{name}: {old[name]!r} -> {new[name]!r}{why}")
    return found


# ---- python -m balcap_jax.config ------------------------------------------------------------------------------------


def table(width: int = 160) -> str:
    """All fields as aligned text: name, type, default, range, meaning (wrapped at `width` characters)."""
    rows = [(f.name, _TYPE_NAMES.get(f.kind, f.kind), _show(f.default), f.range_text, f.meaning) for f in FIELDS]
    header = ("field", "type", "default", "range", "meaning")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(4)]
    indent = sum(widths) + 2 * len(widths)
    lines, group = [], None
    for row in [header, *rows]:
        if row is not header and row[0].rpartition(".")[0] != group:
            group = row[0].rpartition(".")[0]
            lines.append("")
        left = "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=False))
        meaning = textwrap.wrap(row[4], max(30, width - indent))
        lines.append(f"{left}  {meaning[0]}")
        lines += [" " * indent + more for more in meaning[1:]]
    return "\n".join(lines)


def _show(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(_show(entry) for entry in value)
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m balcap_jax.config",
        description="Prints every field of a configuration; with --config, the resolved values of a recipe.",
    )
    add_arguments(parser, required=False)
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not any(argument.startswith("--config") for argument in arguments):
        parser.parse_args(arguments)
        print(table(max(100, shutil.get_terminal_size((160, 24)).columns)))
        return
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        raise UserError("overrides need a recipe: --config=FILE.py")
    config, _ = parse_command_line(arguments, parser)
    values = dict(_leaves(config))
    lines = []
    for field in FIELDS:
        value = values[field.name]
        changed = f"    (default {_show(field.default)})" if value != field.default else ""
        lines.append(f"{field.name} = {_show(value)}{changed}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
