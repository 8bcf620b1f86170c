"""Hugging Face checkpoints to our parameters and back, driven by one table of rows per family.

A row says which tensor of a transformers module a parameter is, and how its numbers lie. Import, export and the
checks run over the same rows: they must use every tensor of the checkpoint and set every parameter exactly once.

A family (`models/<family>/hf.py`) is a module with
    MODEL_TYPE, ARCHITECTURE      its names in config.json
    IMAGE_TOKEN                   the field of config.json with the id of image tokens
    TABLE                         the rows; names are those of the modules of transformers 5
    RENAMES                       (prefix in checkpoints, prefix in the modules), the first that fits; where several
                                  belong to one module prefix, the first is the one of published checkpoints
    fields_from_hf(config)        the config group `model` from a complete config.json
    fields_from_processor(processor, fields)
                                  those of its fields that the image processor's file sets otherwise
    config_to_hf(fields, ids)     and back, for models that came from no checkpoint; `ids` holds vocab, image,
                                  before_image (the token before the image in a prompt), bos, eos and pad
    processor_to_hf(fields)       the same for the files of the processor
    image_limits(fields)          its settings that the fields decide: how many tokens a picture gets
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import read_json_object
from balcap_jax.cli.process import errors_only
from balcap_jax.config.schema import FIELDS
from balcap_jax.models import fields as model_fields
from balcap_jax.models.formats.safetensors import NewTensor, Tensor, read_directory

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""The files with the settings of the image processor; transformers 5 nests them in the second."""

# Buffers of the modules of these families and of the towers and decoders in them, by the end of their names.
_CONSTANT = re.compile(r"(^|\.)(position_ids|(original_)?inv_freq|(cos|sin)_cached|causal_mask|masked_bias)$")
# The triangle of causal attention, [1, 1, N, N]; with fewer axes it is a bias.
_TRIANGLE = re.compile(r"(^|\.)(self_attn|attn|attention)\.bias$")
_DOWNLOAD_AGAIN = "download it again"
_NAMED = 3  # tensors that an error names; it counts the others


# ------------------------------------------------------------------------------------------------- rows


class Form(NamedTuple):
    """A layout: `to_ours(array, shape)` and its inverse `to_hf(array)`; both only transpose and reshape."""

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]


def linear(inputs: int = 1) -> Form:
    """[out, in] of torch's Linear to a Dense kernel that contracts its first `inputs` axes: [in, out] or [N, H, D]."""
    return Form(
        lambda array, shape: array.T.reshape(shape),
        lambda array: array.reshape(math.prod(array.shape[:inputs]), -1).T,
    )


VECTOR = Form(lambda array, shape: array.reshape(shape), lambda array: array.reshape(-1))
MATRIX = Form(lambda array, shape: array, lambda array: array)


def patches(*order: int, split: Callable[[Shape], Shape]) -> Form:
    """A convolution's kernel with its axes in `order`; `split(shape)` is the shape in that order for our shape."""
    back = tuple(int(axis) for axis in np.argsort(order))
    return Form(
        lambda array, shape: array.transpose(order).reshape(shape),
        lambda array: array.reshape(split(array.shape)).transpose(back),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter and its tensor.

    `name`: the tensor; `{}` stands for the layer. Rows of one name and different paths divide the layers in order.
    `part` (i, n): the parameter is piece i of the tensor's first axis cut in n.
    `fill`: (value, path of a parameter, first of its axes that counts) for a vector that transformers needs and a model
    may do without; it has an element for each of the parameter's from that axis on, the layer axis aside.
    `repeats`: the tensor that this one may copy in a checkpoint whose model lacks the parameter.
    """

    name: str
    path: str
    form: Form
    part: tuple[int, int] = (0, 1)
    fill: tuple[float, str, int] | None = None
    repeats: str = ""


def dense(name: str, path: str, *, inputs: int = 1, bias: bool = True) -> tuple[Row, ...]:
    """The rows of a linear layer; a bias that the model lacks costs nothing."""
    kernel = Row(f"{name}.weight", f"{path}/kernel", linear(inputs))
    return (kernel, Row(f"{name}.bias", f"{path}/bias", VECTOR)) if bias else (kernel,)


def layer_norm(name: str, path: str) -> tuple[Row, Row]:
    """The rows of a norm with scale and bias."""
    return Row(f"{name}.weight", f"{path}/scale", VECTOR), Row(f"{name}.bias", f"{path}/bias", VECTOR)


def decoder_rows(name: str, *, biases: bool = False) -> tuple[Row, ...]:
    """The decoder of every family, whose layers transformers calls `name`.layers.N.

    `biases`: transformers has biases on queries, keys and values, which are 0 for a model without.
    """
    layer = f"{name}.layers.{{}}"

    def projection(x: str) -> tuple[Row, Row]:
        kernel, bias = dense(f"{layer}.self_attn.{x}_proj", f"decoder/layers/{x}")
        return kernel, dataclasses.replace(bias, fill=(0.0, kernel.path, 1)) if biases else bias

    return (
        Row(f"{name}.embed_tokens.weight", "decoder/embed", MATRIX),
        Row(f"{name}.norm.weight", "decoder/norm/scale", VECTOR),
        # With tied embeddings some trainers save the head all the same.
        Row("lm_head.weight", "decoder/head", linear(), repeats=f"{name}.embed_tokens.weight"),
        Row(f"{layer}.input_layernorm.weight", "decoder/layers/attention_norm/scale", VECTOR),
        Row(f"{layer}.post_attention_layernorm.weight", "decoder/layers/mlp_norm/scale", VECTOR),
        *(row for x in "qkv" for row in projection(x)),
        *(Row(f"{layer}.self_attn.{x}_norm.weight", f"decoder/layers/{x}_norm/scale", VECTOR) for x in "qk"),
        *dense(f"{layer}.self_attn.o_proj", "decoder/layers/o", inputs=2, bias=False),
        *(row for x in ("gate", "up", "down") for row in dense(f"{layer}.mlp.{x}_proj", f"decoder/layers/{x}")),
    )


# ------------------------------------------------------------------------------------------------- the plan


def is_stacked(path: str) -> bool:
    """Whether a parameter has a leading layer axis."""
    return "layers/" in path


class Piece(NamedTuple):
    """A part of a tensor, by `row`: layer `layer` of parameter `path` (all of it if None), of `shape`."""

    row: Row
    path: str
    layer: int | None
    shape: Shape

    @property
    def hf_shape(self) -> Shape:
        """The shape of the whole tensor."""
        # Every stride of the stand-in is 0, so that no reshape of it copies.
        first, *rest = self.row.form.to_hf(np.broadcast_to(np.int8(0), self.shape)).shape
        return (first * self.row.part[1], *rest)


def plan(table: Sequence[Row], shapes: Shapes) -> dict[str, list[Piece]]:
    """{tensor, by its name in the module: the pieces it consists of} for parameters of `shapes`.

    Raises:
      UserError: a parameter that no row or several rows set, or a tensor that is not set whole.
    """
    tensors: dict[str, list[Piece]] = {}
    next_layer: dict[tuple, int] = {}
    rows_of: dict[str, int] = dict.fromkeys(shapes, 0)
    for row in table:
        if row.path not in shapes:
            continue
        rows_of[row.path] += 1
        shape = shapes[row.path]
        if not is_stacked(row.path):
            tensors.setdefault(row.name, []).append(Piece(row, row.path, None, shape))
            continue
        key = (row.name, row.part)
        first = next_layer.get(key, 0)
        next_layer[key] = first + shape[0]
        for layer in range(shape[0]):
            tensors.setdefault(row.name.format(first + layer), []).append(Piece(row, row.path, layer, shape[1:]))
    wrong = [path for path, count in rows_of.items() if count != 1]
    if wrong:
        raise UserError(
            f"{rows_of[wrong[0]]} rows of the family's table set the parameter {_some(wrong)}, it must be one"
        )
    for name, pieces in tensors.items():
        if sorted(piece.row.part for piece in pieces) != [(i, len(pieces)) for i in range(len(pieces))]:
            raise UserError(f"the family's table does not set tensor {name} exactly once: {pieces}")
    return tensors


class Fill(NamedTuple):
    """A tensor [size] of `value` alone, of the type of the parameter `like`; see `Row.fill`."""

    value: float
    size: int
    like: str


def fills(table: Sequence[Row], shapes: Shapes) -> dict[str, Fill]:
    """{tensor: what it is filled with} of those that parameters of `shapes` do without."""
    found = {}
    for row in table:
        if row.fill is None or row.path in shapes or row.fill[1] not in shapes:
            continue
        value, like, axis = row.fill
        stack, shape = ((None,), shapes[like])
        if is_stacked(like):
            stack, shape = range(shape[0]), shape[1:]
        for layer in stack:
            found[row.name.format(layer)] = Fill(value, math.prod(shape[axis:]), like)
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


# ------------------------------------------------------------------------------------------------- checkpoints


class Checkpoint(NamedTuple):
    """A checkpoint directory: its tensors by their names in the modules of transformers, and its configuration."""

    directory: Path
    family: ModuleType
    fields: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def is_checkpoint(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def read_fields(directory: Path, families: Sequence[ModuleType]) -> tuple[ModuleType, dict[str, Any], dict[str, Any]]:
    """(family, config group `model`, complete config) of a checkpoint directory, without a look at its weights.

    Raises:
      UserError: config.json is missing, torn, or describes a model that no family can be.
    """
    path = directory / CONFIG
    try:
        config = read_json_object(path, _DOWNLOAD_AGAIN)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is missing; give the directory of a Hugging Face checkpoint") from error
    model_type = config.get("model_type")
    family = next((family for family in families if model_type == family.MODEL_TYPE), None)
    if family is None:
        known = ", ".join(family.MODEL_TYPE for family in families)
        raise UserError(f"{path} is of the architecture {model_type!r}; only {known} can be read")
    if config.get("quantization_config"):
        raise UserError(
            f"{path} has a quantization_config ({shown(config['quantization_config'])}), which is not built; give the "
            "checkpoint before quantization, or delete that entry if the tensors are plain"
        )
    processors = read_processors(directory)
    try:
        _check_layers(config)
        # Published files leave out what is the default; transformers knows the defaults. The import is here because it
        # imports torch wherever that is installed: most commands can spare that second.
        from transformers import AutoConfig

        with errors_only("transformers"):  # Its warnings of odd fields would stand beside the one line.
            complete = AutoConfig.from_pretrained(directory, trust_remote_code=False).to_dict()
        fields = family.fields_from_hf(complete)
    except Exception as error:  # of odd values transformers raises whatever comes up
        raise UserError(
            f"{path} describes no {family.ARCHITECTURE} that can be read: {_reason(error)}; give another checkpoint"
        ) from error
    model_fields.check(model_fields.DEFAULTS | fields, f"{path} describes no model that can be built", _DOWNLOAD_AGAIN)
    for file, processor in processors.items():
        try:
            fields |= family.fields_from_processor(processor, fields)
        except ValueError as error:
            raise UserError(
                f"{file} describes an image processor that is not built: {error}; give another checkpoint"
            ) from error
        model_fields.check(model_fields.DEFAULTS | fields, f"{file} cannot be used", _DOWNLOAD_AGAIN)
    return family, fields, complete


def read_processors(directory: Path) -> dict[Path, dict[str, Any]]:
    """{file: settings of the image processor that are not null} of the files that exist."""
    processors = {}
    for path in (directory / name for name in PROCESSORS if (directory / name).exists()):
        content = read_json_object(path, _DOWNLOAD_AGAIN)
        settings = content if path.name == PROCESSORS[0] else content.get("image_processor")
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise UserError(f"{path} has no settings of an image processor; {_DOWNLOAD_AGAIN}")
        processors[path] = {name: value for name, value in settings.items() if value is not None}
    return processors


def _check_layers(config: Mapping[str, Any]) -> None:
    """Raises ValueError for numbers of layers out of range: transformers would make a list of that length."""
    schema = FIELDS["model.layers"]
    groups = [config, *(value for value in config.values() if isinstance(value, dict))]
    for name in ("num_hidden_layers", "depth"):
        for layers in (group[name] for group in groups if name in group):
            if type(layers) is not int or not schema.holds(layers):
                raise ValueError(f"{name} is {layers!r}, it must be in {schema.range_text}")


def _reason(error: Exception) -> str:
    """The most telling line of an exception: validators of transformers put the field and the cause on two lines."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return ": ".join(line.rstrip(":") for line in lines[:2]) or type(error).__name__


def open_checkpoint(directory: Path, families: Sequence[ModuleType]) -> Checkpoint:
    """Reads a checkpoint's configuration and the headers of its shards.

    Raises:
      UserError: see `read_fields` and `safetensors.read_directory`.
    """
    family, fields, config = read_fields(directory, families)
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_directory(directory, is_constant).items():
        module_name = rename(name, family.RENAMES)
        if module_name in tensors:
            raise UserError(
                f"{tensor.file}: tensor {name} is the same weight as {tensors[module_name].name}; leave one of them out"
            )
        tensors[module_name] = tensor
    return Checkpoint(directory, family, fields, config, tensors)


def is_constant(name: str, shape: Shape) -> bool:
    """Whether modules compute this tensor: older versions of transformers saved such tensors, newer ones read none."""
    return bool(_CONSTANT.search(name) or (len(shape) == 4 and _TRIANGLE.search(name)))


def rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """The name with its first matching prefix replaced."""
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


# ------------------------------------------------------------------------------------------------- import


def check(checkpoint: Checkpoint, shapes: Shapes, *, cast: bool) -> dict[str, list[Piece]]:
    """The plan of a checkpoint for parameters of `shapes`, checked against its tensors' headers.

    Raises:
      UserError: tensors that are missing, too many, of another shape, or, without `cast`, layers of one parameter that
        differ in type. It names them and their files.
    """
    tensors, directory = checkpoint.tensors, checkpoint.directory
    pieces = plan(checkpoint.family.TABLE, shapes)
    if missing := [name for name in pieces if name not in tensors]:
        raise UserError(f"{directory} lacks {_some(missing)}, which its config.json asks for; download it again")
    copies = copies_in(checkpoint.family, tensors, pieces)
    for name, of in copies.items():
        if not tensors[name].equals(tensors[of]):
            raise UserError(
                f"{tensors[name].file}: {tensors[name].name} differs from {tensors[of].name}, though config.json ties "
                f"the two; set tie_word_embeddings to false there, or leave the tensor out"
            )
    filled = {name for name, fill in fills(checkpoint.family.TABLE, shapes).items() if _is_filled(tensors, name, fill)}
    if many := [tensors[name] for name in tensors if name not in {*pieces, *copies, *filled}]:
        raise UserError(
            f"{many[0].file} holds {_some([tensor.name for tensor in many])}, for which the model of config.json has "
            f"no place; give the checkpoint that belongs to this config.json"
        )
    types: dict[str, Tensor] = {}
    for name, parts in pieces.items():
        tensor = tensors[name]
        for piece in parts:
            if tensor.shape != piece.hf_shape:
                raise UserError(
                    f"{tensor.file}: {tensor.name} is {list(tensor.shape)}, by config.json it is "
                    f"{list(piece.hf_shape)}; give the checkpoint that belongs to this config.json"
                )
            other = types.setdefault(piece.path, tensor)
            if other.dtype != tensor.dtype and not cast:
                raise UserError(
                    f"{tensor.file}: {tensor.name} is {tensor.dtype}, but {other.name} is {other.dtype}; give one "
                    f"type for all with --dtype"
                )
    return pieces


def _is_filled(tensors: Mapping[str, Tensor], name: str, fill: Fill) -> bool:
    return name in tensors and tensors[name].shape == (fill.size,) and bool((tensors[name].read() == fill.value).all())


def copies_in(family: ModuleType, names: Iterable[str], pieces: Collection[str]) -> dict[str, str]:
    """{tensor: the one that it repeats} of those `names` that no parameter stands for; see `Row.repeats`."""
    repeats = {row.name: row.repeats for row in family.TABLE if row.repeats}
    return {name: repeats[name] for name in names if name in repeats and name not in pieces}


def by_parameter(
    checkpoint: Checkpoint, pieces: Mapping[str, Sequence[Piece]]
) -> dict[str, list[tuple[Tensor, Piece]]]:
    """{parameter: the tensors that it consists of, layer by layer}."""
    found: dict[str, list[tuple[Tensor, Piece]]] = {}
    for name, parts in pieces.items():
        for piece in parts:
            found.setdefault(piece.path, []).append((checkpoint.tensors[name], piece))
    return found


# ------------------------------------------------------------------------------------------------- export


def exported_names(family: ModuleType, names: Sequence[str], source: Mapping[str, str]) -> dict[str, str]:
    """{name in the module: name in the file}: `source`'s where it has one, else that of published checkpoints."""
    published: dict[str, str] = {}
    for in_file, in_module in family.RENAMES:
        if in_file != in_module:
            published.setdefault(in_module, in_file)
    return {name: source.get(name) or rename(name, list(published.items())) for name in names}


def new_tensors(
    family: ModuleType,
    shapes: Shapes,
    read: Callable[[str, int | None], np.ndarray],
    *,
    names: Mapping[str, str],
    type_of: Callable[[str, str], np.dtype],
) -> list[NewTensor]:
    """The tensors of a checkpoint of our parameters; each array is made at the time of its write.

    Args:
      shapes: {parameter: shape}.
      read: gives (parameter, layer or None)'s array.
      names: {name in the module: name to write} of the source, in its order; {} means those of published checkpoints.
      type_of: gives the type that (name in the module, one of its parameters) is written in.
    """
    pieces = plan(family.TABLE, shapes)
    filled = fills(family.TABLE, shapes)
    if names:
        _check_names(family, names, {*pieces, *filled}, needed=pieces)
    for name, of in copies_in(family, names, pieces).items():
        pieces[name] = pieces[of]
    written = exported_names(family, [*pieces, *filled], names)
    order = {name: position for position, name in enumerate(names)}
    tensors = []
    for name in sorted(written, key=lambda name: order.get(name, len(order))):
        if name in filled:
            value, size, like = filled[name]
            shape, dtype = (size,), np.dtype(type_of(name, like))
            produce = functools.partial(np.full, shape, value, dtype)
        else:
            first = pieces[name][0]
            shape, dtype = tuple(first.hf_shape), np.dtype(type_of(name, first.path))
            produce = functools.partial(_assemble, pieces[name], read, dtype)
        tensors.append(NewTensor(written[name], dtype, shape, produce))
    return tensors


def _check_names(family: ModuleType, names: Mapping[str, str], known: Collection[str], needed: Iterable[str]) -> None:
    """Raises UserError unless `names` names every tensor `needed`, and only `known` ones."""
    copies = copies_in(family, names, known)
    beyond = [name for name in names if name not in known and name not in copies]
    other = [written for name, written in names.items() if rename(written, family.RENAMES) != name]
    if lacking := [name for name in needed if name not in names]:
        problem = f"lack {_some(lacking)}"
    elif beyond:
        problem = f"have {_some(beyond)}, for which the model has no place"
    elif other:
        problem = f"have {_some(other)}, which are of other tensors"
    else:
        return
    raise UserError(f"the names of the model's tensors {problem}; give the checkpoint that the model came from")


def _assemble(pieces: list[Piece], read: Callable[[str, int | None], np.ndarray], dtype: np.dtype) -> np.ndarray:
    arrays = [piece.row.form.to_hf(read(piece.path, piece.layer)) for piece in pieces]
    with np.errstate(over="ignore"):  # `write_directory` refuses infinity.
        return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).astype(dtype, copy=False)
