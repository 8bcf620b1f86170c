"""LoRA adapters as files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

A module of transformers called M with weight [out, in] has two tensors, `base_model.model.M.lora_A.weight` [r, in] and
`base_model.model.M.lora_B.weight` [out, r]; its output gains scale * x A^T B^T, with scale = lora_alpha / r. Ours are
`lora_a` = A^T and `lora_b` = B^T, stacked over layers (`models.lora`).
"""

import contextlib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import read_json_object, resolved
from balcap_jax.models.formats import hf
from balcap_jax.models.formats.safetensors import NewTensor, Tensor, fetch, read_file, write_file
from balcap_jax.models.formats.slices import row_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_NAME = "base_model.model.{}.lora_{}.weight"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # a name on the hub, and never a path
_REMEDY = "give an adapter of LoRA alone, or merge it with peft"
# What changes more than the products of A and B, unless it is empty or false.
_OTHER_METHODS = (
    *("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "use_qalora", "alora_invocation_tokens", "velora_config", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config", "megatron_config"),
)
# Ways to begin that leave the base as it is; others change it, and the adapter alone says nothing.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class Origin(NamedTuple):
    """Where adapters belong: the directory of their base, and alpha and rank, whose quotient is their scale."""

    base: str
    alpha: float
    rank: int


class Pair(NamedTuple):
    """The adapter of one module: A [r, in], B [out, r] and the scale of their product."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> np.ndarray:
        """What the module's weight gains, fp32 [out, in]."""
        return self.scale * (self.b.read().astype(np.float32) @ self.a.read().astype(np.float32))


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


# ------------------------------------------------------------------------------------------------- reading


def find_base(directory: Path) -> Path:
    """The directory of the model that an adapter belongs to; a relative name counts from here, or from the adapter.

    Raises:
      UserError: its file names none that is there, or another adapter.
    """
    base = _config(directory).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{directory / CONFIG} names no base (base_model_name_or_path is {shown(base)}); write its directory there"
        )
    places: list[Path] = []
    with contextlib.suppress(UserError):  # No name that a disk can have, such as an address.
        places = [resolved(base).absolute(), resolved(directory / base)]
    places = [fetch(place) for place in places]
    if place := next(filter(hf.is_checkpoint, places), None):
        return place
    if place := next(filter(is_adapter, places), None):
        raise UserError(
            f"{directory / CONFIG} is of {shown(base)}, which is an adapter itself; merge that one first with "
            f"`python -m balcap_jax.convert --from={place} --out=NEW_DIRECTORY`, and write NEW_DIRECTORY there"
        )
    download = f" (one of the hub is downloaded by `hf download {base} --local-dir DIRECTORY`)"
    raise UserError(
        f"{directory / CONFIG} is of {shown(base)}, and there is no such model directory; write the base's directory "
        f"there{download if _REPOSITORY.fullmatch(base) else ''}, or merge the two with "
        f"`python -m balcap_jax.convert --from=BASE --adapter={directory} --out=NEW_DIRECTORY`"
    )


def read_modules(directory: Path, family: ModuleType, shapes: hf.Shapes) -> dict[str, Pair]:
    """{tensor that an adapter adds to, by its name in the modules of transformers 5: the adapter}.

    `shapes` are those of the model's parameters.

    Raises:
      UserError: the adapter is of another method than LoRA, damaged, or of another model.
    """
    config = _read_config(directory)
    if not storage.is_file(directory / WEIGHTS):
        pickle = " (a pickle, which can run code when it is read, is not)" if (directory / _PICKLE).exists() else ""
        raise UserError(f"{directory / WEIGHTS} is missing{pickle}; save the adapter again with safetensors")
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in read_file(directory / WEIGHTS):
        match = _TENSOR.fullmatch(tensor.name)
        if match is None:
            raise UserError(f"{directory / WEIGHTS} holds {tensor.name}, which is no LoRA matrix; {_REMEDY}")
        if match[2] in (pair := halves.setdefault(match[1], {})):
            raise UserError(f"{directory / WEIGHTS} has two adapters of {match[1]}; save it again")
        pair[match[2]] = tensor
    pieces = hf.plan(family.TABLE, shapes)
    found = {}
    for module, pair in halves.items():
        name = hf.rename(f"{module}.weight", family.RENAMES)
        if set(pair) != {"A", "B"}:
            raise UserError(f"{directory / WEIGHTS} has one half of the adapter of {module} alone; save it again")
        if name not in pieces or not pieces[name][0].path.endswith("/kernel") or len(pieces[name][0].hf_shape) != 2:
            raise UserError(
                f"{directory / WEIGHTS} adapts {module}, which is no dense layer of the model; give the adapter that "
                f"belongs to it"
            )
        if name in found:
            raise UserError(f"{directory / WEIGHTS} has two adapters of {module}; save it again")
        a, b = pair["A"], pair["B"]
        size_out, size_in = pieces[name][0].hf_shape
        if len(a.shape) != 2 or not a.shape[0] or a.shape[1] != size_in or b.shape != (size_out, a.shape[0]):
            raise UserError(
                f"{directory / WEIGHTS} adapts {module} by {list(a.shape)} and {list(b.shape)}, its weight is "
                f"[{size_out}, {size_in}]; give the adapter that belongs to the model"
            )
        found[name] = Pair(a, b, _scale(config, module, a.shape[0]))
    return found


def read(directory: Path, family: ModuleType, shapes: hf.Shapes) -> dict[str, np.ndarray]:
    """{path of an adapter parameter: fp32 array} beside parameters of `shapes`, to be added with a scale of 1.

    Layers of another rank than the largest, or without an adapter, are filled up with 0. Raises as `read_modules` does.
    """
    modules = read_modules(directory, family, shapes)
    by_path: dict[str, list[tuple[int | None, np.ndarray, np.ndarray]]] = {}
    for name, parts in hf.plan(family.TABLE, shapes).items():
        if name not in modules:
            continue
        pair = modules[name]
        a, b = pair.a.read().astype(np.float32).T, pair.scale * pair.b.read().astype(np.float32).T
        for piece in parts:
            i, count = piece.row.part
            layer = piece.path.removesuffix("/kernel")
            by_path.setdefault(layer, []).append((piece.layer, a, np.split(b, count, axis=1)[i]))
    found = {}
    for path, adapters in by_path.items():
        rank = max(a.shape[1] for _, a, _ in adapters)
        _, first_a, first_b = adapters[0]
        stack = (shapes[f"{path}/kernel"][0],) if hf.is_stacked(path) else ()
        lora_a = np.zeros((*stack, first_a.shape[0], rank), np.float32)
        lora_b = np.zeros((*stack, rank, first_b.shape[1]), np.float32)
        for layer, a, b in adapters:
            where = ... if layer is None else layer
            lora_a[where][:, : a.shape[1]], lora_b[where][: b.shape[0]] = a, b
        found |= {f"{path}/lora_a": lora_a, f"{path}/lora_b": lora_b}
    return found


def _config(directory: Path) -> dict[str, Any]:
    try:
        return read_json_object(directory / CONFIG, _REMEDY)
    except FileNotFoundError as error:
        raise UserError(f"{directory / CONFIG} is missing; {_REMEDY}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    config = _config(directory)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} is of the method {shown(config.get('peft_type'))}; {_REMEDY}")
    for name in _OTHER_METHODS:
        if config.get(name):
            raise UserError(f"{path}: {name} is {shown(config[name])}, which is not built; {_REMEDY}")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {shown(config['bias'])}, only 'none' is built; {_REMEDY}")
    if config.get("init_lora_weights") not in _BEGINNINGS:
        raise UserError(
            f"{path}: init_lora_weights is {shown(config['init_lora_weights'])}, whose base is not the published one; "
            f"save it with peft's path_initial_model_for_weight_conversion"
        )
    patterns = config.get("alpha_pattern") or {}
    numbers = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(json_text.is_number(number) for number in numbers):
        raise UserError(f"{path}: lora_alpha and alpha_pattern must be numbers, got {shown(numbers)}; {_REMEDY}")
    try:
        return config | {"alpha_pattern": [(re.compile(rf"(.*\.)?({key})$"), patterns[key]) for key in patterns]}
    except re.error as error:
        raise UserError(f"{path}: alpha_pattern holds no regular expression ({error}); {_REMEDY}") from error


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """lora_alpha / r of a module; with rsLoRA (arXiv 2312.03732) lora_alpha / sqrt(r)."""
    # As peft finds it: by the first pattern that fits.
    alpha = next((value for pattern, value in config["alpha_pattern"] if pattern.match(module)), config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


# ------------------------------------------------------------------------------------------------- writing


def write(directory: Path, family: ModuleType, shapes: hf.Shapes, adapters: Mapping[str, Any], origin: Origin) -> None:
    """Writes the adapters {path of `models.lora`: array} of a model with parameters of `shapes`.

    A matrix that is one tensor there and several here (queries, keys and values of Qwen2.5-VL's tower) gets their
    adapters one beside the other, with a rank and an alpha of its own. Leaves are read layer by layer.
    """
    tensors: list[NewTensor] = []
    modules, ranks = [], {}
    for name, parts in hf.plan(family.TABLE, shapes).items():
        layers = [piece.path.removesuffix("/kernel") for piece in parts]
        present = [i for i, layer in enumerate(layers) if f"{layer}/lora_a" in adapters]
        if not present:
            continue
        module, (size_out, size_in) = name.removesuffix(".weight"), parts[0].hf_shape
        rank = sum(adapters[f"{layers[i]}/lora_a"].shape[-1] for i in present)
        modules.append(module)
        if rank != origin.rank:
            ranks[module] = rank
        read = functools.partial(_module, adapters, [(layers[i], parts[i]) for i in present], size_out)
        for half, shape in (("A", (rank, size_in)), ("B", (size_out, rank))):
            produce = functools.partial(read, half)
            tensors.append(NewTensor(_NAME.format(module, half), np.dtype(np.float32), shape, produce))
    write_file(directory / WEIGHTS, tensors)
    alpha = int(origin.alpha) if float(origin.alpha).is_integer() else origin.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.fspath(origin.base),
        "r": origin.rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {module: alpha * rank / origin.rank for module, rank in ranks.items()},
        # By their whole names: the short ones would fit layers of the vision tower too.
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json_text.dumps(config, indent=2) + "\n")


def _module(adapters: Mapping[str, Any], parts: list[tuple[str, hf.Piece]], size_out: int, half: str) -> np.ndarray:
    """A [r, in] or B [out, r] of a module, from those of its parts."""

    def array(layer: str, piece: hf.Piece, leaf: str) -> np.ndarray:
        whole = adapters[f"{layer}/{leaf}"]
        return np.asarray(whole if piece.layer is None else row_of(whole, piece.layer), np.float32).T

    if half == "A":
        return np.concatenate([array(layer, piece, "lora_a") for layer, piece in parts])
    blocks, column = [array(layer, piece, "lora_b") for layer, piece in parts], 0
    b = np.zeros((size_out, sum(block.shape[1] for block in blocks)), np.float32)
    for (_, piece), block in zip(parts, blocks, strict=True):
        row = piece.row.part[0] * block.shape[0]
        b[row : row + block.shape[0], column : column + block.shape[1]] = block
        column += block.shape[1]
    return b
