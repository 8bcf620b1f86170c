"""Reading a model: a directory as the Hugging Face hub has it, or an adapter directory of PEFT beside it.

A checkpoint holds config.json, safetensors, and the files of its tokenizer and processor. `balcap_jax.json` says what
those have no place for: the prompt and limits of training, the compute type (`fields.OWN`). It may be missing.
"""

import concurrent.futures
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import read_json_object, resolved
from balcap_jax.models import fields as model_fields
from balcap_jax.models import llava, lora, qwen2_5_vl, qwen3_vl
from balcap_jax.models.fields import DEFAULTS, OWN
from balcap_jax.models.formats import hf, peft, safetensors
from balcap_jax.models.formats.slices import Index, read_slice
from balcap_jax.models.llava import hf as llava_hf
from balcap_jax.models.policy import Params, Policy
from balcap_jax.models.prompting import PromptProcessor
from balcap_jax.models.qwen2_5_vl import hf as qwen2_5_vl_hf
from balcap_jax.models.qwen3_vl import hf as qwen3_vl_hf
from balcap_jax.parallel import sharding

FAMILIES = {"llava": llava.build, "qwen2_5_vl": qwen2_5_vl.build, "qwen3_vl": qwen3_vl.build}
CHECKPOINTS = {"llava": llava_hf, "qwen2_5_vl": qwen2_5_vl_hf, "qwen3_vl": qwen3_vl_hf}

OWN_FILE = "balcap_jax.json"
GENERATION = "generation_config.json"
EARLIER, EARLIER_NAMES = "model.json", "hf_names.json"
"""What the directories of earlier versions hold; `convert` reads them (`earlier`)."""
SOURCE_PROCESSOR = "source_processor"
"""The entry of OWN_FILE with {file: content} of the processor's files as they were before training."""

CARRIED = (".json", ".jinja", ".txt", ".model")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_COPY_AGAIN = "copy the file there again"
_MEND = "mend or delete that file"
_READERS = 8  # threads that read layers


def build(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Policy, PromptProcessor]:
    """Policy and processor of the config group `model`; parameters come from `policy.init` or from `load`."""
    template = (model["template"],) if model.get("template") else ()  # An empty one is the family's own.
    return FAMILIES[model["family"]](model, tokenizer, *template)


class Place(NamedTuple):
    """Where a model lies: its checkpoint, and the adapter to be merged into it, if any."""

    checkpoint: Path
    adapter: Path | None = None


def find(path_or_name: str | os.PathLike) -> Place:
    """The checkpoint directory that this is, or the adapter directory with the checkpoint that its file names.

    Raises:
      UserError: it is neither.
    """
    path = safetensors.fetch(resolved(path_or_name).absolute())
    if hf.is_checkpoint(path) and not (path / EARLIER).is_file():
        return Place(path)
    if peft.is_adapter(path):
        return Place(peft.find_base(path), path)
    if (path / EARLIER).is_file():
        raise UserError(
            f"{path} holds a model of an earlier version ({EARLIER}); turn it into one that is read with "
            f"`python -m balcap_jax.convert --from={path} --out=NEW_DIRECTORY`"
        )
    what = "a directory of a Hugging Face checkpoint, of an adapter, or one that training wrote"
    repository = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    if not path.exists() and not path.parent.exists() and len(repository.parts) == 2:
        what = f"{what}; a model of the hub is downloaded by `hf download {repository} --local-dir DIRECTORY`"
    raise UserError(f"no model at {path}: {hf.CONFIG} is missing; give {what}")


class Opened(NamedTuple):
    """A model whose parameters are not read: all but them, and `like`, their shapes and types."""

    place: Place
    fields: dict[str, Any]
    policy: Policy
    processor: PromptProcessor
    checkpoint: hf.Checkpoint
    like: Params


def open_model(path_or_name: str | os.PathLike, **overrides: Any) -> Opened:
    """What `load` knows of a directory before it reads a weight; arguments and errors are those of `load`.

    Headers of shards are read, and compared with the names and shapes that the model needs by `read_parameters`.
    """
    place = find(path_or_name)
    path = place.adapter or place.checkpoint
    fields = read_fields(path)
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise UserError(f"unknown model field {unknown[0]!r}; the model at {path} has {', '.join(sorted(fields))}")
    fields |= overrides
    model_fields.check(fields, f"the model at {path} cannot be changed so", "change the fields that load was given")
    policy, processor = build_saved(place.checkpoint, fields)
    checkpoint = open_checkpoint(place.checkpoint)
    check_image_token(checkpoint, policy)
    return Opened(place, fields, policy, processor, checkpoint, jax.eval_shape(policy.init, jax.random.key(0)))


def load(
    path_or_name: str | os.PathLike, *, mesh: Mesh | None = None, param_dtype: str | None = "float32", **overrides: Any
) -> tuple[Policy, Params, PromptProcessor]:
    """Loads a checkpoint directory of Hugging Face or of `save`; of an adapter directory, the model merged with it.

    Each process reads what its own devices hold, and the host keeps no copy.

    Args:
      path_or_name: the directory.
      mesh: the devices for every parameter, by `sharding.PARAMETER_AXES`.
      param_dtype: type of the parameters; None = that on the disk.
      overrides: fields of the config group `model` to change, for example dtype="bfloat16" or prompt_tokens=64.

    Returns:
      (policy, parameters, processor).

    Raises:
      UserError: the directory is missing or no model, an override changes a parameter's shape, or the installed jaxlib
        is wrong on this machine.
    """
    sharding.check_jaxlib(jax.devices())
    place, _, policy, processor, checkpoint, like = open_model(path_or_name, **overrides)
    dtype = None if param_dtype is None else np.dtype(param_dtype)
    params = read_parameters(checkpoint, like, mesh, dtype)
    if place.adapter:
        adapters = peft.read(place.adapter, checkpoint.family, flat_shapes(like))
        flat = flatten_dict(params, sep="/") | {path: _place(path, array, mesh) for path, array in adapters.items()}
        params = lora.merge(unflatten_dict(flat, sep="/"), scale=1.0)
        if mesh is not None:
            params = jax.tree.map(_moved, params, sharding.tree_shardings(mesh, params))
    return policy, params, processor


def _moved(leaf: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    """`leaf` where parameters belong: the partitioner may leave the sum of a kernel and its adapter elsewhere."""
    if leaf.sharding.is_equivalent_to(place, leaf.ndim):
        return leaf
    return jax.jit(lambda x: x, out_shardings=place)(leaf)


def _place(path: str, array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.numpy.asarray(array)
    return _on_devices(array.shape, sharding.tree_shardings(mesh, {path: array})[path], array.__getitem__)


def read_parameters(checkpoint: hf.Checkpoint, like: Params, mesh: Mesh | None, dtype: np.dtype | None) -> Params:
    """The parameters of a checkpoint, one after the other; of each the parts that devices of this process hold."""
    shapes = flat_shapes(like)
    pieces = hf.check(checkpoint, shapes, cast=dtype is not None)
    places = flatten_dict(sharding.tree_shardings(mesh, like), sep="/") if mesh is not None else {}
    arrays: dict[str, jax.Array] = {}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for path, entries in hf.by_parameter(checkpoint, pieces).items():
            shape = shapes[path]

            def part(index: Index, entries=entries, shape=shape) -> np.ndarray:
                return read_slice(entries, shape, index, dtype, pool)

            if path in places:
                arrays[path] = _on_devices(shape, places[path], part)
            else:
                arrays[path] = jax.numpy.asarray(part((slice(None),) * len(shape)))
    return unflatten_dict(arrays, sep="/")


def _on_devices(shape: tuple[int, ...], where: jax.sharding.Sharding, part: Callable[[Index], np.ndarray]) -> jax.Array:
    """The array of `shape` on the devices of `where`, of which `part` gives what one of them holds.

    A part leaves the host before the next is read: `jax.make_array_from_callback` would keep all of them until the end.
    """
    holders: dict[tuple, list[tuple[jax.Device, Index]]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        key = tuple(cut.indices(size) for cut, size in zip(index, shape, strict=True))
        holders.setdefault(key, []).append((device, index))
    found: list[jax.Array] = []
    for same in holders.values():
        held = part(same[0][1])
        found += jax.block_until_ready([jax.device_put(held, device) for device, _ in same])
        del held
    return jax.make_array_from_single_device_arrays(shape, where, found)


def build_saved(path: Path, fields: Mapping[str, Any]) -> tuple[Policy, PromptProcessor]:
    """Policy and processor of the checkpoint directory `path` with the fields `fields`.

    Raises:
      UserError: the tokenizer cannot be read or does not fit, or the family can't have such fields.
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
    except UserError as error:
        raise UserError(
            f"{path} can't be built: {error}; mend your own setting of it, or give another model"
        ) from error


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
        if file.suffix in CARRIED and file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"the tokenizer at {path} cannot be read: {file.name} is no regular file; copy it there")
        if file.suffix in CARRIED and file.is_file():
            storage.refuse_pointer(file)
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
    """The config group `model` of a model, with its prompt template, and "prompt" and "max_tokens" where it has them.

    Raises:
      UserError: the directory is missing or no model.
    """
    place = find(path_or_name)
    fields = DEFAULTS | hf.read_fields(place.checkpoint, tuple(CHECKPOINTS.values()))[1]
    for directory in filter(None, place):
        own = read_own(directory)
        own.pop(SOURCE_PROCESSOR, None)
        fields |= own
        model_fields.check(fields, str(directory / OWN_FILE), _MEND)
    return fields


def read_own(directory: Path) -> dict[str, Any]:
    """What OWN_FILE says; {} where there is none.

    Raises:
      UserError: it is torn, or has an entry that is none.
    """
    path = directory / OWN_FILE
    try:
        own = read_json_object(path, _MEND)
    except FileNotFoundError:
        return {}
    if unknown := sorted(own.keys() - {*OWN, SOURCE_PROCESSOR}):
        known = ", ".join(OWN)
        raise UserError(f"{path} has an entry {shown(unknown[0])}, which is none of {known}; {_MEND}")
    originals = own.get(SOURCE_PROCESSOR, {})
    if not isinstance(originals, dict) or not all(
        name in hf.PROCESSORS and isinstance(content, dict) for name, content in originals.items()
    ):
        raise UserError(f"{path}: {SOURCE_PROCESSOR} must hold the files {' and '.join(hf.PROCESSORS)}; {_MEND}")
    return own


def open_checkpoint(directory: Path) -> hf.Checkpoint:
    """A Hugging Face checkpoint directory of any family; raises UserError as `hf.open_checkpoint` does."""
    return hf.open_checkpoint(directory, tuple(CHECKPOINTS.values()))


def is_whole(directory: Path, shapes: hf.Shapes) -> bool:
    """Whether `directory` holds a model with parameters of these shapes; what they hold is not read."""
    try:
        read_fields(directory)
        read_tokenizer(directory)
        hf.check(open_checkpoint(directory), shapes, cast=True)
    except UserError:
        return False
    return True


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
