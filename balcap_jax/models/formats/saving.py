"""Writing a model: a directory as transformers, PEFT and servers read it, in the type of the model that it came from.

The files beside the weights are those of the source. What training has changed about them is written: how many tokens a
picture gets, and the prompt's template. A model that came from no checkpoint gets files of its own.
"""

import contextlib
import itertools
import os
import shutil
import string
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.disk_errors import reason_of
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import make_directory, read_json, read_json_object, rename_directory, resolved, sync_tree
from balcap_jax.models import lora
from balcap_jax.models.fields import OWN
from balcap_jax.models.formats import hf, loading, peft, safetensors
from balcap_jax.models.formats.slices import row_of
from balcap_jax.models.policy import Params
from balcap_jax.models.prompting import PromptProcessor, prepends_bos

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
SHARD_GB = 5.0
"""Largest shard; transformers has the same default."""
TOKENIZER = "tokenizer_config.json"
ADAPTER = "adapter"
"""The directory beside the weights with the adapters that were merged into them."""

# The text of the last message; messages are texts or lists of parts.
_CHAT_TEMPLATE = """\
{%- set found = namespace(text="") -%}
{%- for message in messages if message["role"] == "user" -%}
{%- if message["content"] is string -%}{%- set found.text = message["content"] -%}{%- else -%}
{%- for part in message["content"] if part["type"] == "text" -%}{%- set found.text = part["text"] -%}{%- endfor -%}
{%- endif -%}{%- endfor -%}
"""
_DOWNLOAD_AGAIN = "download it again"
_MARKERS = (f"{ADAPTER}/{peft.CONFIG}", hf.CONFIG)  # written last, in this order
_TEMPLATE_FILE = "chat_template.jinja"


def save(
    path: str | os.PathLike,
    model: Mapping[str, Any],
    params: Params,
    processor: PromptProcessor,
    *,
    source: str | os.PathLike = "",
    adapter: peft.Origin | None = None,
) -> Path:
    """Writes a model directory; it replaces an existing one only once it is complete.

    Tensors have the types and names that they have in `source`, the checkpoint that the model came from. Without one
    they are float32 under the names of published checkpoints. The host holds one tensor at a time.

    Args:
      path: the directory.
      model: the config group `model`, and what else is in `fields.OWN`.
      params: what NumPy can read whole, or by layer. They are merged; adapters that are among them are written beside.
      processor: the model's.
      source: the directory that the model came from, if any.
      adapter: where the adapters belong; None leaves them out.

    Raises:
      UserError: the model cannot be written, or `source` is gone.
    """
    path = resolved(path).absolute()
    checkpoint = _open_source(source) if source else None
    flat = flatten_dict(params, sep="/")
    arrays = {name: leaf for name, leaf in flat.items() if not name.endswith(lora.ADAPTERS)}
    tensors = _tensors(model["family"], arrays, checkpoint)
    with written_aside(path, "the model") as aside:
        safetensors.write_directory(aside, tensors, shard_bytes=int(SHARD_GB * 1e9))
        dtype = main_type(checkpoint) if checkpoint else DTYPES["float32"]
        write_files(aside, model, processor, source=checkpoint.directory if checkpoint else None, dtype=dtype)
        if adapter:
            shapes = {name: tuple(leaf.shape) for name, leaf in arrays.items()}
            adapters = {name: leaf for name, leaf in flat.items() if name.endswith(lora.ADAPTERS)}
            (aside / ADAPTER).mkdir()
            peft.write(aside / ADAPTER, loading.CHECKPOINTS[model["family"]], shapes, adapters, adapter)
            write_json(aside / ADAPTER / loading.OWN_FILE, _own(model, processor))
    return path


def _open_source(source: str | os.PathLike) -> hf.Checkpoint:
    directory = safetensors.fetch(resolved(source))
    if not directory.is_dir():
        raise UserError(f"{directory}, which the model was loaded from, is gone; put it back and save again")
    return loading.open_checkpoint(loading.find(directory).checkpoint)


def _tensors(family: str, arrays: Mapping[str, Any], checkpoint: hf.Checkpoint | None) -> list[safetensors.NewTensor]:
    def read(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(arrays[path]) if layer is None else row_of(arrays[path], layer)

    def type_of(name: str, path: str) -> np.dtype:
        del path
        if checkpoint is None:
            return DTYPES["float32"]
        return checkpoint.tensors[name].dtype if name in checkpoint.tensors else main_type(checkpoint)

    names = {name: tensor.name for name, tensor in checkpoint.tensors.items()} if checkpoint else {}
    shapes = {path: tuple(leaf.shape) for path, leaf in arrays.items()}
    return hf.new_tensors(loading.CHECKPOINTS[family], shapes, read, names=names, type_of=type_of)


def main_type(checkpoint: hf.Checkpoint) -> np.dtype:
    """The type of the largest tensor."""
    return max(checkpoint.tensors.values(), key=lambda tensor: tensor.size).dtype


# ------------------------------------------------------------------------------------------------- the directory


@contextlib.contextmanager
def written_aside(path: Path, what: str) -> Iterator[Path]:
    """A new directory beside `path`, which replaces it if the block succeeds and vanishes if it fails.

    In a bucket nothing can be renamed: what is there loses its config.json first, and the new one gets it last. Without
    that file a directory is no model.

    Raises:
      UserError: `what` cannot be written there.
    """
    aside = path.with_name(path.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        make_directory(aside)
        yield aside
        sync_tree(aside)
        remove(path)
        rename_directory(aside, path)
        storage.send(path, last=_MARKERS)
        if storage.url_of(path):  # Weights lie in the bucket now; nobody reads them here.
            for file in path.rglob("*.safetensors"):
                file.unlink()
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        shutil.rmtree(aside, ignore_errors=True)
        # On a full disk tokenizers raises a bare Exception.
        if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
            raise
        reason = reason_of(error)
        remedy = "make room there" if "no space left" in reason.lower() else "name another place"
        raise UserError(f"cannot write {what} to {path}: {reason}; {remedy}") from error


def remove(path: Path) -> None:
    """Deletes a model directory; none of it is a model once the first file is gone. Raises UserError."""
    shutil.rmtree(path, ignore_errors=True)
    storage.remove(path, first=_MARKERS[::-1])


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
    ours = {loading.EARLIER, loading.EARLIER_NAMES, loading.OWN_FILE, peft.CONFIG, safetensors.INDEX}
    carried = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in loading.CARRIED and path.name not in ours and ".index." not in path.name:
            remedy = "download it again, or delete it where it is not needed"
            if path.name.endswith("config.json"):
                read_json_object(path, remedy)
            elif path.suffix == ".json":
                read_json(path, remedy)
            carried.append(path)
    return carried


# ------------------------------------------------------------------------------------------------- its files


def write_files(
    directory: Path, model: Mapping[str, Any], processor: PromptProcessor, *, source: Path | None, dtype: np.dtype
) -> None:
    """Writes all but the weights: `source`'s files with what training changed about them, or files of its own.

    `dtype` is the type of the weights.
    """
    own = _own(model, processor)
    if source is None:
        _write_new_files(directory, model, processor)
    else:
        carry_files(source, directory)
        if hf.read_fields(source, tuple(loading.CHECKPOINTS.values()))[1]["template"] != processor.template:
            _replace_chat_template(directory, processor)
        originals = loading.read_own(source).get(loading.SOURCE_PROCESSOR, {})
        if originals := _write_limits(directory, model, originals):
            own[loading.SOURCE_PROCESSOR] = originals
    write_dtype(directory, dtype)
    add_processor_files(directory, model)
    write_json(directory / loading.OWN_FILE, own)


def _own(model: Mapping[str, Any], processor: PromptProcessor) -> dict[str, Any]:
    return {name: model[name] for name in OWN if name in model} | {"template": processor.template}


def write_dtype(directory: Path, dtype: np.dtype) -> None:
    """Writes the type of the tensors into config.json, wherever it names one."""
    path = directory / hf.CONFIG
    config = read_json_object(path, _DOWNLOAD_AGAIN)
    groups = [config, *(group for group in config.values() if isinstance(group, dict))]
    named = [(group, key) for group in groups for key in ("dtype", "torch_dtype") if key in group]
    if not any(group is config for group, _ in named):
        named += [(config, "dtype"), (config, "torch_dtype")]  # transformers 4 knows the second alone.
    if all(group.get(key) == dtype.name for group, key in named):
        return
    for group, key in named:
        group[key] = dtype.name
    write_json(path, config)


def _write_limits(directory: Path, fields: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Writes how many tokens a picture got into the processor's files.

    Returns {file: content} as they were before any training, of those that differ; `before` is that of the source.
    """
    limits = loading.CHECKPOINTS[fields["family"]].image_limits(fields)
    originals = dict(before)
    for path in hf.read_processors(directory):
        content = read_json_object(path, _DOWNLOAD_AGAIN)
        settings = content if path.name == hf.PROCESSORS[0] else content["image_processor"]
        if limits.items() <= settings.items():
            continue
        originals.setdefault(path.name, json_text.parse_object(path.read_bytes(), str(path), _DOWNLOAD_AGAIN))
        settings |= limits
        write_json(path, content)
    return originals


def add_processor_files(directory: Path, fields: Mapping[str, Any]) -> None:
    """Adds the processor's files that a model lacks: one from a checkpoint may have none, or that of 5 alone."""
    files = dict(zip(hf.PROCESSORS, loading.CHECKPOINTS[fields["family"]].processor_to_hf(fields), strict=False))
    for path, settings in hf.read_processors(directory).items():
        if path.name != hf.PROCESSORS[0]:
            files[hf.PROCESSORS[0]] = settings
    for name, content in files.items():
        if not (directory / name).exists():
            write_json(directory / name, content)


def _write_new_files(directory: Path, fields: Mapping[str, Any], processor: PromptProcessor) -> None:
    """The files of a model that came from no checkpoint."""
    tokenizer = processor.tokenizer
    ids = write_tokenizer(directory, tokenizer, {"image_token": processor.image_token})
    prompt = processor.encode_prompts([""], [1], ["an empty text"])[0][0].tolist()
    ids |= {"image": tokenizer.convert_tokens_to_ids(processor.image_token)}
    ids["vocab"] = fields.get("vocab") or len(tokenizer)
    ids["before_image"] = next((a for a, b in itertools.pairwise(prompt) if b == ids["image"]), None)
    config = loading.CHECKPOINTS[fields["family"]].config_to_hf(fields, ids)
    write_json(directory / hf.CONFIG, config)
    (directory / _TEMPLATE_FILE).write_text(chat_template(processor))


def write_tokenizer(
    directory: Path, tokenizer: PreTrainedTokenizerBase, named: Mapping[str, str] = types.MappingProxyType({})
) -> dict[str, int | None]:
    """Writes the files of a tokenizer, so that transformers 4 reads them too, and generation_config.json.

    `named` are special words that its processors ask for by name. -> the ids bos, eos and pad
    """
    tokenizer.save_pretrained(directory)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    write_json(directory / loading.GENERATION, {f"{name}_token_id": number for name, number in ids.items()})
    path = directory / TOKENIZER
    words = read_json_object(path, "save the model again")
    words["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Transformers 4 has names for these; its processors look for the image's word among the names.
    words["additional_special_tokens"] = words.get("extra_special_tokens", [])
    words["extra_special_tokens"] = dict(named)
    words["model_input_names"] = ["input_ids", "attention_mask"]  # 4 gives token types too, which no model takes.
    write_json(path, words)
    return ids


def _replace_chat_template(directory: Path, processor: PromptProcessor) -> None:
    """Puts the template that the model was trained with in the place of the source's."""
    (directory / "chat_template.json").unlink(missing_ok=True)
    words = read_json_object(directory / TOKENIZER, _DOWNLOAD_AGAIN) if (directory / TOKENIZER).exists() else {}
    if words.pop("chat_template", None) is not None:
        write_json(directory / TOKENIZER, words)
    (directory / _TEMPLATE_FILE).write_text(chat_template(processor))


def chat_template(processor: PromptProcessor) -> str:
    """Jinja of the prompt of one picture and one text, as the model was trained with it."""
    values = {"image": json_text.dumps(processor.image_token), "prompt": "found.text", None: '""'}
    pieces = ["bos_token"] if prepends_bos(processor.tokenizer, processor.template) else []
    for literal, name, _, _ in string.Formatter().parse(processor.template):
        pieces += [json_text.dumps(literal), values[name]]
    return _CHAT_TEMPLATE + "{{- " + " ~ ".join(pieces) + " -}}\n"
