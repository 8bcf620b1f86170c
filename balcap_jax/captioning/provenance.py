"""The model and the settings of a file of captions, in a file beside it, which keeps those of others out."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_object, replace_file, resolved
from balcap_jax.models.formats import loading

_MODEL_FILES = ("config.json", "balcap_jax.json", "adapter_config.json", "preprocessor_config.json", "tokenizer.json")
_PIECE, _PIECES = 4096, 64  # bytes of a sample, and number of samples, that tell two files of weights apart
_READERS = 16


def beside(out: Path, suffix: str) -> Path:
    """The file of this suffix that belongs to `out`: captions.errors.jsonl to captions.jsonl."""
    return out.with_name(out.name.removesuffix(".jsonl") + suffix)


def files_of(out: Path) -> list[Path]:
    """What belongs to the file of captions, or of what `recaption` writes, and grows with it."""
    return [beside(out, suffix) for suffix in (".settings.json", ".errors.jsonl", ".duplicates.jsonl", ".judge.json")]


def existing(model: str | os.PathLike) -> Path:
    """The directory of the model. Raises UserError where there is none."""
    loading.find(model)
    return resolved(model).absolute()


def identity(model: str | os.PathLike) -> dict[str, str]:
    """The model's path, and a digest of its configuration and of samples of its weights.

    Reading gigabytes of weights to tell two models apart would take longer than captioning with them, and training
    changes weights everywhere.
    """
    path = existing(model)
    digest = hashlib.sha256()
    try:
        for name in _MODEL_FILES:
            if (path / name).is_file():
                digest.update((path / name).read_bytes())
        for file in storage.files_in(path, ".safetensors"):
            size = storage.size_of(file)
            digest.update(f"{file.relative_to(path).as_posix()} {size}\n".encode(errors="surrogateescape"))
            starts = range(0, size, max(_PIECE, size // _PIECES))
            with ThreadPoolExecutor(_READERS) as pool:  # Each of them is a request where the model is in a bucket.
                for piece in pool.map(lambda start, file=file: storage.read_range(file, start, _PIECE), starts):
                    digest.update(piece)
    except OSError as error:
        raise UserError(f"--model={model}: {error.filename or 'a file'} cannot be read ({error.strerror})") from error
    return {"model": shown(path), "model_digest": digest.hexdigest()}


def check(out: Path, settings: dict[str, Any], absent: Mapping[str, Any] | None = None) -> None:
    """Raises UserError unless the present lines have the same settings; `absent` are those that a file may not say."""
    path = beside(out, ".settings.json")
    remedy = "name another file with --out"
    try:
        before = {**(absent or {}), **read_json_object(path, remedy)}
    except FileNotFoundError as error:
        raise UserError(
            f"{out} has lines already, but {path.name} beside it, which says how they were made, is missing; {remedy}"
        ) from error
    if before.get("model_digest") != settings.get("model_digest"):
        raise UserError(
            f"{out} has captions of another model (then {before.get('model')}, now {settings['model']}); {remedy}"
        )
    for name in {**before, **settings}:
        moved = name == "model" and "model_digest" in settings  # a model that was moved is the same model
        then, now = before.get(name), settings.get(name)
        if not moved and then != now:
            raise UserError(f"{out} has lines made with {name} {then!r}, not {now!r}; {remedy}")


def read(out: Path) -> dict[str, Any]:
    """The settings of a file of captions. Raises UserError where they are missing or no JSON object."""
    path = storage.fetch(beside(out, ".settings.json"))
    remedy = "name captions that `caption` wrote"
    try:
        return read_json_object(path, remedy)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}, which says how {out.name} was made, is missing; {remedy}") from error


def write(out: Path, settings: dict[str, Any]) -> None:
    path = beside(out, ".settings.json")
    try:
        replace_file(path, (json_text.dumps(settings, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make room or name another --out") from error
