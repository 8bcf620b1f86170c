"""A model on disk: `model.json` (family and sizes), `params/` (Orbax) and the tokenizer's own files.

A model that came from a Hugging Face checkpoint has that checkpoint's other small files beside them (config.json, the
processor's, generation_config.json ...). For the way back `hf_names.json` holds the names of its tensors.
"""

import contextlib
import itertools
import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import make_directory, read_json, read_json_object, rename_directory, resolved, sync_tree
from balcap_jax.models import fields as model_fields
from balcap_jax.models import llava, qwen2_5_vl
from balcap_jax.models.fields import DEFAULTS
from balcap_jax.models.formats import hf, orbax, safetensors
from balcap_jax.models.formats.orbax import reason_of, remove_unfinished
from balcap_jax.models.llava import hf as llava_hf
from balcap_jax.models.policy import Params, Policy
from balcap_jax.models.prompting import PromptProcessor
from balcap_jax.models.qwen2_5_vl import hf as qwen2_5_vl_hf
from balcap_jax.parallel import sharding

FAMILIES = {"llava": llava.build, "qwen2_5_vl": qwen2_5_vl.build}
CHECKPOINTS = {"llava": llava_hf, "qwen2_5_vl": qwen2_5_vl_hf}

MODEL = "model.json"
PARAMS = "params"
NAMES = "hf_names.json"
GENERATION = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CARRIED = (".json", ".jinja", ".txt", ".model")
_CONVERT_AGAIN = "convert or save the model again"
_COPY_AGAIN = "copy the file there again"


def build(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Policy, PromptProcessor]:
    """Policy and processor of the config group `model`; parameters come from `policy.init` or from `load`."""
    template = (model["template"],) if model.get("template") else ()  # An empty one is the family's own.
    return FAMILIES[model["family"]](model, tokenizer, *template)


# ------------------------------------------------------------------------------------------------- writing


def save(
    path: str | os.PathLike,
    model: Mapping[str, Any],
    params: Params,
    processor: PromptProcessor,
    *,
    source: str | os.PathLike = "",
) -> Path:
    """Writes a model directory that `load` reads; it replaces an existing one only once it is complete.

    `source` is the directory that the model came from, if any: the new directory carries on what it holds for export.

    Raises:
      UserError: the model cannot be written, or `source` is gone.
    """
    path, source = resolved(path).absolute(), source and resolved(source)
    if source and not source.is_dir():
        raise UserError(f"{source}, which the model was loaded from, is gone; put it back and save again")
    with written_aside(path, "the model") as aside:
        orbax.write_tree(aside / PARAMS, params)
        processor.tokenizer.save_pretrained(aside)
        if source:
            carry_files(source, aside)
            if names := source_names(source):
                write_json(aside / NAMES, names)
        fields = {name: value for name, value in dict(model).items() if name != "path"}
        write_json(aside / MODEL, fields | {"template": processor.template})
    return path


@contextlib.contextmanager
def written_aside(path: Path, what: str) -> Iterator[Path]:
    """A new directory beside `path`, which replaces it if the block succeeds and vanishes if it fails.

    Raises:
      UserError: `what` cannot be written there.
    """
    aside = path.with_name(path.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        make_directory(aside)
        yield aside
        sync_tree(aside)
        shutil.rmtree(path, ignore_errors=True)
        rename_directory(aside, path)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        remove_unfinished(aside)
        # On a full disk tokenizers raises a bare Exception, and TensorStore a ValueError.
        if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
            raise
        reason = reason_of(error)
        remedy = "make room there" if "no space left" in reason.lower() else "name another place"
        raise UserError(f"cannot write {what} to {path}: {reason}; {remedy}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json_text.dumps(content, indent=2) + "\n")


def carry_files(source: Path, directory: Path) -> None:
    """Copies `carried_files(source)` over those in `directory`, so that a tokenizer keeps its original files."""
    for path in carried_files(source):
        shutil.copyfile(path, directory / path.name)


def carried_files(source: Path) -> list[Path]:
    """The small files of a checkpoint or model: configuration, tokenizer, processor, chat template, generation.

    Raises:
      UserError: one of them is torn, so that the model could not be loaded with it.
    """
    ours = {MODEL, NAMES, safetensors.INDEX}
    carried = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _CARRIED and path.name not in ours and ".index." not in path.name:
            remedy = "download it again, or delete it where it is not needed"
            if path.name.endswith("config.json"):
                read_json_object(path, remedy)
            elif path.suffix == ".json":
                read_json(path, remedy)
            carried.append(path)
    return carried


def source_names(directory: Path) -> dict[str, str]:
    """{tensor's name in transformers' modules: its name in the checkpoint that `directory` is or came from}."""
    if not (directory / MODEL).is_file():
        return {name: tensor.name for name, tensor in open_checkpoint(directory).tensors.items()}
    path = directory / NAMES
    try:
        names = read_json_object(path, "convert the checkpoint again")
    except FileNotFoundError:
        return {}
    written = list(names.values())
    if not all(isinstance(name, str) and name not in ("", "__metadata__") for name in written):
        raise UserError(f"{path} does not name tensors; convert the checkpoint again")
    if twice := [name for name in written if written.count(name) > 1]:
        raise UserError(f"{path} gives the name {twice[0]} to two tensors; convert the checkpoint again")
    return names


# ------------------------------------------------------------------------------------------------- reading


def load(
    path_or_name: str | os.PathLike, *, mesh: Mesh | None = None, param_dtype: str | None = "float32", **overrides: Any
) -> tuple[Policy, Params, PromptProcessor]:
    """Loads a model directory written by `save` or `convert`, or a Hugging Face checkpoint directory.

    Args:
      path_or_name: the directory.
      mesh: the devices for every parameter, by `sharding.PARAMETER_AXES`; the host holds one parameter at a time.
      param_dtype: type of the parameters; None = that on the disk.
      overrides: fields of the config group `model` to change, for example dtype="bfloat16" or prompt_tokens=64.

    Returns:
      (policy, parameters, processor).

    Raises:
      UserError: the directory is missing or no model, an override changes a parameter's shape, or the installed jaxlib
        is wrong on this machine.
    """
    sharding.check_jaxlib(jax.devices())
    path = resolved(path_or_name).absolute()
    fields = read_fields(path)
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise UserError(f"unknown model field {unknown[0]!r}; the model at {path} has {', '.join(sorted(fields))}")
    fields |= overrides
    model_fields.check(fields, f"the model at {path} cannot be changed so", "change the fields that load was given")
    policy, processor = build_saved(path, fields)
    like = jax.eval_shape(policy.init, jax.random.key(0))
    shardings = sharding.tree_shardings(mesh, like) if mesh is not None else None
    dtype = None if param_dtype is None else np.dtype(param_dtype)
    if (path / MODEL).is_file():
        return policy, _restore(path, like, shardings, dtype), processor
    checkpoint = open_checkpoint(path)
    check_image_token(checkpoint, policy)
    return policy, _read_checkpoint(checkpoint, like, shardings, dtype), processor


def build_saved(path: Path, fields: Mapping[str, Any]) -> tuple[Policy, PromptProcessor]:
    """Policy and processor of the directory `path` with the fields `fields`.

    Raises:
      UserError: a field is missing, or the tokenizer cannot be read or does not fit.
    """
    tokenizer = read_tokenizer(path)
    for kind, token in (("end", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if token is None:
            raise UserError(f"the tokenizer at {path} names no {kind} token; copy its files there again")
    words = len(tokenizer)
    vocab = fields.get("vocab") or words
    if words > vocab:
        raise UserError(
            f"the tokenizer at {path} has {words} words, the model {vocab} embeddings; put the tokenizer there that "
            f"belongs to it"
        )
    ends = _end_tokens(path, vocab)
    try:
        return FAMILIES[fields["family"]]({**fields, "end_tokens": ends}, tokenizer, fields["template"])
    except KeyError as error:
        raise UserError(f"{path / MODEL} lacks the field {error}; {_CONVERT_AGAIN}") from error


def _end_tokens(directory: Path, vocab: int) -> tuple[int, ...]:
    """The ids that end a response by generation_config.json, or by config.json where the first names none; or ().

    transformers looks for `eos_token_id` in the same files. Checkpoints and our models alike carry them.

    Raises:
      UserError: one of the files is torn, or does not name ids below `vocab`.
    """
    for path in (directory / GENERATION, directory / hf.CONFIG):
        content = read_json_object(path, _COPY_AGAIN) if path.is_file() else {}
        for group in (content, content.get("text_config")):
            ids = group.get("eos_token_id") if isinstance(group, dict) else None
            if ids is None:
                continue
            listed = ids if isinstance(ids, list) else [ids]
            if not listed or not all(type(i) is int and 0 <= i < vocab for i in listed):
                raise UserError(
                    f"{path}: eos_token_id is {reprlib.repr(ids)}, it must be one id or several from 0 to {vocab - 1}; "
                    f"{_COPY_AGAIN}"
                )
            return tuple(listed)
    return ()


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    # Without files transformers makes up an empty tokenizer for some classes.
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"the tokenizer at {path} cannot be read: {_TOKENIZERS[0]} is missing; copy the tokenizer's files there"
        )
    for file in path.iterdir():
        if file.suffix in _CARRIED and file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"the tokenizer at {path} cannot be read: {file.name} is no regular file; copy it there")
    try:
        # The import is here because it imports torch wherever that is installed: most commands can spare that second.
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        _ = tokenizer.all_special_ids  # A damaged tokenizer searches its unknown word for ever.
        return tokenizer
    except Exception as error:  # tokenizers raises nothing more special
        reason = shown(error, str) or type(error).__name__
        raise UserError(f"the tokenizer at {path} cannot be read: {reason}; copy its files there again") from error


def read_fields(path_or_name: str | os.PathLike) -> dict[str, Any]:
    """The config group `model` of a saved model or a checkpoint, with its prompt template under "template".

    Raises:
      UserError: the directory is missing or no model.
    """
    path = resolved(path_or_name).absolute()
    if not (path / MODEL).is_file() and hf.is_checkpoint(path):
        return DEFAULTS | hf.read_fields(path, tuple(CHECKPOINTS.values()))[1]
    try:
        fields = read_json_object(path / MODEL, _CONVERT_AGAIN)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no model at {path}: {MODEL} is missing; give a directory that training or convert wrote, or a Hugging "
            f"Face checkpoint"
        ) from error
    model_fields.check(fields, str(path / MODEL), _CONVERT_AGAIN)
    # Models from before there was a choice do not name one.
    return {name: DEFAULTS[name] for name in model_fields.LATER if name in DEFAULTS} | fields


def open_checkpoint(directory: Path) -> hf.Checkpoint:
    """A Hugging Face checkpoint directory of any family; raises UserError as `hf.open_checkpoint` does."""
    return hf.open_checkpoint(directory, tuple(CHECKPOINTS.values()))


def check_image_token(checkpoint: hf.Checkpoint, policy: Policy) -> None:
    """Raises UserError when config.json and the tokenizer disagree on which token stands for the image."""
    image_token = checkpoint.config[checkpoint.family.IMAGE_TOKEN]
    if image_token != policy.image_token:
        raise UserError(
            f"{checkpoint.directory / hf.CONFIG} calls token {image_token} the image's, the tokenizer's is "
            f"{policy.image_token}; put the tokenizer there that belongs to it"
        )


def flat_shapes(like: Params) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a tree."""
    return {path: leaf.shape for path, leaf in flatten_dict(like, sep="/").items()}


def _restore(path: Path, like: Params, shardings: Any, dtype: np.dtype | None) -> Params:
    """The parameters of a model directory."""
    directory = path / PARAMS
    stored = open_params(directory, like)
    places = {} if shardings is None else flatten_dict(shardings, sep="/")
    needed = {
        name: jax.ShapeDtypeStruct(shape, dtype or stored[name].dtype.numpy_dtype, sharding=places.get(name))
        for name, shape in flat_shapes(like).items()
    }
    return orbax.restore(directory, unflatten_dict(needed, sep="/"))


def open_params(directory: Path, like: Params) -> dict[str, Any]:
    """`orbax.open_all` of parameters that must have the paths and shapes of `like`.

    Raises:
      UserError: they cannot be read, or are those of another model.
    """
    stored, needed = orbax.open_all(directory), flat_shapes(like)
    for name in sorted(stored.keys() | needed):
        if name not in stored or name not in needed:
            problem = f"{name} is {'missing' if name not in stored else 'not among them'}"
        elif stored[name].shape != needed[name]:
            problem = f"{name} is {stored[name].shape}, {needed[name]} is needed"
        elif stored[name].dtype.numpy_dtype not in safetensors.DTYPE_NAMES:
            problem = f"{name} holds {stored[name].dtype.name}"
        else:
            continue
        raise UserError(
            f"the parameters at {directory} do not fit its fields: {problem}; leave out overrides of sizes, or put the "
            f"{MODEL} there that belongs to them"
        )
    return stored


def _read_checkpoint(checkpoint: hf.Checkpoint, like: Params, shardings: Any, dtype: np.dtype | None) -> Params:
    """The parameters of a Hugging Face checkpoint, one after the other."""
    shapes = flat_shapes(like)
    pieces = hf.check(checkpoint, shapes, cast=dtype is not None)
    places = None if shardings is None else flatten_dict(shardings, sep="/")
    arrays: dict[str, Any] = {}
    for name, entries in itertools.groupby(hf.read_arrays(checkpoint, pieces), key=lambda entry: entry[0]):
        stack = None
        for _, layer, array in entries:
            if stack is None:
                stack = np.empty(shapes[name], dtype or array.dtype)
            stack[... if layer is None else layer] = array
        if places is None:
            arrays[name] = jax.numpy.asarray(stack)
        else:
            arrays[name] = jax.make_array_from_callback(stack.shape, places[name], stack.__getitem__)
    return unflatten_dict(arrays, sep="/")
