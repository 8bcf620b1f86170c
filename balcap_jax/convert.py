"""Hugging Face checkpoint directories to model directories of ours, and back.

    python -m balcap_jax.convert --from_hf=Qwen2.5-VL-3B-Instruct --out=qwen3b      before training or captioning
    python -m balcap_jax.convert --to_hf=my-captioner --from=RUN/model              for transformers, vLLM and others

Numbers keep their type and come back bit for bit. The command handles one layer at a time, so that a model needs the
memory of its largest tensor and no more.
"""

import itertools
import math
import os
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import CommandParser, place
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_object, resolved
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.cli.progress import PLAIN_SECONDS
from balcap_jax.config.schema import RUN_FIELDS
from balcap_jax.models import Policy
from balcap_jax.models.formats import hf, loading, orbax, safetensors
from balcap_jax.models.prompting import PromptProcessor

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
SHARD_GB = 5.0
"""Largest shard; transformers has the same default."""

# The text of the last message; messages are texts or lists of parts.
_CHAT_TEMPLATE = """\
{%- set found = namespace(text="") -%}
{%- for message in messages if message["role"] == "user" -%}
{%- if message["content"] is string -%}{%- set found.text = message["content"] -%}{%- else -%}
{%- for part in message["content"] if part["type"] == "text" -%}{%- set found.text = part["text"] -%}{%- endfor -%}
{%- endif -%}{%- endfor -%}
"""

_TOKENIZER = "tokenizer_config.json"
_DOWNLOAD_AGAIN = "download it again"

Report = Callable[[int], None]


def from_hf(
    source: str | os.PathLike, out: str | os.PathLike, *, dtype: str | None = None, progress: bool = False
) -> Path:
    """Converts the Hugging Face checkpoint directory `source` to the model directory `out`.

    Args:
      source: config.json, safetensors shards of fp32, fp16 or bf16, and the tokenizer's files.
      out: what `models.load` then reads; must not exist.
      dtype: a key of DTYPES that all parameters are cast to; None = as they are.

    Raises:
      UserError: the checkpoint is incomplete or damaged or of another architecture, or cannot be written.
    """
    source, out = _paths(source, out, hf.CONFIG)
    checkpoint = loading.open_checkpoint(source)
    loading.carried_files(source)  # One that is torn is found here.
    fields = loading.DEFAULTS | checkpoint.fields
    policy, _ = loading.build_saved(source, fields)
    loading.check_image_token(checkpoint, policy)
    shapes = loading.flat_shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    pieces = hf.check(checkpoint, shapes, cast=dtype is not None)
    types = {piece.path: checkpoint.tensors[name].dtype for name, parts in pieces.items() for piece in parts}
    if dtype is not None:
        types = dict.fromkeys(types, DTYPES[dtype])
    total = sum(math.prod(shape) * types[path].itemsize for path, shape in shapes.items())
    with loading.written_aside(out, "the model") as aside, _progress(total, progress) as report:
        stores = orbax.create(aside / loading.PARAMS, {path: (shapes[path], types[path]) for path in shapes})
        for path, layer, array in hf.read_arrays(checkpoint, pieces):
            place = stores[path] if layer is None else stores[path][layer]
            with np.errstate(over="ignore"):
                array = array.astype(types[path], copy=False)
            if dtype is not None and not safetensors.is_finite(array):
                raise UserError(f"{source}: {path} is beyond the range of {dtype}; give another --dtype")
            place.write(array).result()
            report(array.nbytes)
        loading.carry_files(source, aside)
        names = {name: tensor.name for name, tensor in checkpoint.tensors.items()}
        loading.write_json(aside / loading.NAMES, names)
        loading.write_json(aside / loading.MODEL, fields)
    return out


def to_hf(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    shard_gb: float = SHARD_GB,
    progress: bool = False,
) -> Path:
    """Converts the model directory `source` to the Hugging Face checkpoint directory `out`.

    Tensors have the names that they had in the checkpoint that the model came from, and those of published checkpoints
    if it came from none. Adapters are merged already in the models that training saves.

    Args:
      source: a directory that `from_hf` or training wrote.
      out: must not exist.
      dtype: a key of DTYPES that all tensors are cast to; None = as they are stored.
      shard_gb: largest shard, in units of 10^9 bytes.

    Raises:
      UserError: the model is incomplete, or cannot be written.
    """
    if not 0 < shard_gb < float("inf"):
        raise UserError(f"--shard_gb must be more than 0 and finite, got {shard_gb}")
    source, out = _paths(source, out, loading.MODEL)
    fields = loading.read_fields(source)
    family = loading.CHECKPOINTS[fields["family"]]
    loading.carried_files(source)  # One that is torn is found here.
    if hf.is_checkpoint(source):
        _check_config(source, fields)
    policy, processor = loading.build_saved(source, fields)
    stores = loading.open_params(source / loading.PARAMS, jax.eval_shape(policy.init, jax.random.key(0)))
    names = loading.source_names(source)

    def read(path: str, layer: int | None) -> np.ndarray:
        return orbax.read(source / loading.PARAMS, stores[path], layer)

    types = {path: store.dtype.numpy_dtype for path, store in stores.items()}
    shapes = {path: tuple(store.shape) for path, store in stores.items()}
    cast = None if dtype is None else DTYPES[dtype]
    tensors = hf.new_tensors(family, shapes, types, read, names=names, dtype=cast)
    total = sum(tensor.size for tensor in tensors)
    with loading.written_aside(out, "the checkpoint") as aside, _progress(total, progress) as report:
        safetensors.write_directory(aside, tensors, shard_bytes=max(1, int(shard_gb * 1e9)), progress=report)
        loading.carry_files(source, aside)
        _write_config(aside, fields, policy, processor, dtype or types["decoder/embed"].name)
        _write_processor(aside, fields)
    return out


def _check_config(source: Path, fields: Mapping[str, Any]) -> None:
    """Raises UserError where the config.json that a model carries describes another model."""
    carried = hf.read_fields(source, tuple(loading.CHECKPOINTS.values()))[1]
    for name in sorted(carried.keys() - set(RUN_FIELDS)):
        theirs, own = carried[name], fields.get(name)
        if theirs != own and not (isinstance(theirs, list) and list(own or ()) == theirs):
            raise UserError(
                f"{source / hf.CONFIG} says that {name} is {theirs!r}, {loading.MODEL} beside it {own!r}; put the file "
                f"there that belongs to the model"
            )


def _write_config(directory: Path, fields: Mapping[str, Any], policy: Policy, processor: Any, dtype: str) -> None:
    """Writes the type of the tensors into config.json, and the whole file for a model that has none."""
    path = directory / hf.CONFIG
    if path.exists():
        config = read_json_object(path, _DOWNLOAD_AGAIN)
        keys = [key for key in ("dtype", "torch_dtype") if key in config]
        if all(config[key] == dtype for key in keys):
            return
        config |= dict.fromkeys(keys, dtype)
    else:
        tokenizer = processor.tokenizer
        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": policy.pad_token}
        generation = {f"{name}_token_id": number for name, number in ids.items()}
        prompt = processor.encode_prompts([""], [1], ["an empty text"])[0][0].tolist()
        ids |= {"image": policy.image_token, "vocab": policy.vocab}
        ids["before_image"] = next((a for a, b in itertools.pairwise(prompt) if b == policy.image_token), None)
        config = loading.CHECKPOINTS[fields["family"]].config_to_hf(fields, ids)
        config |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 4 knows the second alone.
        loading.write_json(directory / loading.GENERATION, generation)
        _write_tokenizer(directory, processor)
    loading.write_json(path, config)


def _write_tokenizer(directory: Path, processor: PromptProcessor) -> None:
    """Changes the files of a tokenizer of ours, which transformers 5 wrote, so that 4 reads them; adds the template."""
    path = directory / _TOKENIZER
    config = read_json_object(path, "save the model again")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Transformers 4 has names for these; its processors look for the image's word among the names.
    config["additional_special_tokens"] = config.get("extra_special_tokens", [])
    config["extra_special_tokens"] = {"image_token": processor.image_token}
    config["model_input_names"] = ["input_ids", "attention_mask"]  # 4 gives token types too, which no model takes.
    loading.write_json(path, config)
    (directory / "chat_template.jinja").write_text(_chat_template(processor))


def _chat_template(processor: PromptProcessor) -> str:
    """Jinja of the prompt of one picture and one text, as the model was trained with it."""
    values = {"image": json_text.dumps(processor.image_token), "prompt": "found.text", None: '""'}
    pieces = ["bos_token"] if processor.tokenizer.bos_token is not None else []
    for literal, name, _, _ in string.Formatter().parse(processor.template):
        pieces += [json_text.dumps(literal), values[name]]
    return _CHAT_TEMPLATE + "{{- " + " ~ ".join(pieces) + " -}}\n"


def _write_processor(directory: Path, fields: Mapping[str, Any]) -> None:
    """Adds the processor's files that a model lacks: one from a checkpoint may have none, or that of 5 alone."""
    files = dict(zip(hf.PROCESSORS, loading.CHECKPOINTS[fields["family"]].processor_to_hf(fields), strict=False))
    for path, settings in hf.read_processors(directory).items():
        if path.name != hf.PROCESSORS[0]:
            files[hf.PROCESSORS[0]] = settings
    for name, content in files.items():
        if not (directory / name).exists():
            loading.write_json(directory / name, content)


def _needs_5(directory: Path) -> bool:
    """Whether the checkpoint came from transformers 5 alone: 4 cannot read it, or takes another model for it."""
    config = read_json_object(directory / hf.CONFIG, _DOWNLOAD_AGAIN)
    text = config.get("text_config", config)
    tokenizer = directory / _TOKENIZER
    settings = read_json_object(tokenizer, _DOWNLOAD_AGAIN) if tokenizer.exists() else {}
    has_new_rope = "rope_parameters" in text and "rope_theta" not in text
    return has_new_rope or settings.get("tokenizer_class") == "TokenizersBackend"


def _paths(source: str | os.PathLike, out: str | os.PathLike, holds: str) -> tuple[Path, Path]:
    """Both as absolute paths. Raises UserError unless `source` is one that `holds` this file, and `out` is new."""
    source, out = resolved(source).absolute(), resolved(out).absolute()
    if not source.is_dir():
        raise UserError(f"there is no directory {source}; give one that holds {holds}")
    if holds == loading.MODEL and not (source / holds).exists() and hf.is_checkpoint(source):
        raise UserError(f"{source} is a Hugging Face checkpoint already; --from takes a model directory of ours")
    if holds == hf.CONFIG and (source / loading.MODEL).exists():
        raise UserError(f"{source} is a model directory of ours already; --from_hf takes a Hugging Face checkpoint")
    if os.path.lexists(out):
        raise UserError(f"{out} exists; delete it, or give a directory that does not")
    return source, out


# ------------------------------------------------------------------------------------------------- the command


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Report]:
    """Gives a function that takes new bytes and shows all: a bar on a terminal, else a line every few seconds."""
    if not shown:
        yield lambda size: None
        return
    if sys.stdout.isatty():
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("", total=total)
            yield lambda size: bar.advance(task, size)
        return
    done, start = 0, time.perf_counter()
    last_shown = start

    def report(size: int) -> None:
        nonlocal done, last_shown
        done, now = done + size, time.perf_counter()
        if done >= total or now - last_shown >= PLAIN_SECONDS:
            last_shown = now
            print(f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {now - start:.0f} s", flush=True)

    yield report


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m balcap_jax.convert",
        description="Converts Hugging Face checkpoints to our models (--from_hf, --out) and back (--to_hf, --from).",
    )
    add = parser.add_argument
    add("--from_hf", metavar="DIR", type=place, help="checkpoint directory: config.json, safetensors")
    add("--out", metavar="DIR", type=place, help="model directory to write; must not exist")
    add("--to_hf", metavar="DIR", type=place, help="checkpoint directory to write; must not exist")
    add("--from", metavar="DIR", type=place, dest="source", help="model directory to read")
    add("--dtype", choices=tuple(DTYPES), help="type of the numbers; default: as they are")
    shard_help = f"largest shard of --to_hf; default {SHARD_GB:g}"
    add("--shard_gb", type=float, default=SHARD_GB, metavar="GB", help=shard_help)
    arguments = parser.parse_args(argv)
    names = {name for name in ("from_hf", "out", "to_hf", "source") if getattr(arguments, name) is not None}
    dtype, shard_gb = arguments.dtype, arguments.shard_gb
    if names == {"from_hf", "out"}:
        print(from_hf(arguments.from_hf, arguments.out, dtype=dtype, progress=True))
    elif names == {"to_hf", "source"}:
        written = to_hf(arguments.source, arguments.to_hf, dtype=dtype, shard_gb=shard_gb, progress=True)
        if _needs_5(written):
            print("needs transformers 5, as the checkpoint that the model came from does")
        print(written)
    else:
        parser.error("give either --from_hf and --out, or --to_hf and --from")


if __name__ == "__main__":
    main()
