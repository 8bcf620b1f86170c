"""Which pictures are meant: all of a folder, or the lines of a JSONL file."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balcap_jax import json_text
from balcap_jax.data import images
from balcap_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture to caption. `key` is its id, or its path as listed: what resuming and sampling go by.

    `error` says why it cannot be captioned, where that is known before it is read. `entry` is the line it is from.
    """

    key: str
    image: str
    path: Path
    prompt: str
    id: str | None = None
    error: str = ""
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def names(self) -> dict[str, str]:
        """What its output line says of it."""
        return {"image": self.image} | ({"id": self.id} if self.id is not None else {})


def list_items(source: str | os.PathLike, prompt: str) -> list[Item]:
    """The pictures of a folder or of a JSONL file; `prompt` is for those without their own.

    Raises:
      UserError: nothing there, a bad line, or two lines with one id.
    """
    source = Path(source)
    if source.is_dir():
        items = [_found(source, name, prompt) for name in files_below(source, "--images")]
        if not items:
            kinds = " ".join(images.SUFFIXES)
            raise UserError(f"no pictures in {source}: no file ends in one of {kinds}")
        return items
    if not source.is_file():
        raise UserError(f"--images={source}: no such folder or file")
    items = _listed(source, prompt)
    if not items:
        raise UserError(f'{source} is empty; it takes lines such as {{"image": "photo.jpg"}}')
    return items


def _found(folder: Path, name: str, prompt: str) -> Item:
    """A file of a folder."""
    text = spelt(name)
    error = "" if text == name else "the name of the file is not UTF-8; rename it"
    return Item(text, text, folder / name, prompt, error=error)


def spelt(name: str) -> str:
    """The name of a file as text: bytes that are no UTF-8 are spelt out, as JSON cannot hold them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def files_below(folder: Path, what: str) -> list[str]:
    """Paths of pictures below `folder`, relative to it, with /; hidden files and folders are left out.

    Raises:
      UserError: a folder cannot be looked into; `what` says in which argument or field it was given.
    """

    def unreadable(error: OSError):
        raise UserError(f"{what}: {error.filename} cannot be read ({error.strerror})") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in images.SUFFIXES:
                found.append((Path(parent) / name).relative_to(folder).as_posix())
    return sorted(found)


def _listed(source: Path, prompt: str) -> list[Item]:
    items, lines = [], {}
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--images={source} cannot be read ({reason}); give a folder or a JSONL file") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = json_text.parse(line, f"{source}, line {number}", "mend or remove that line")
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
            raise UserError(f'{source}, line {number}: a line is an object with "image", the path of a picture')
        for name in ("id", "prompt"):
            if not isinstance(entry.get(name, ""), str):
                raise UserError(f'{source}, line {number}: "{name}" must be text, got {entry[name]!r}')
        key = entry.get("id", entry["image"])
        if key in lines:
            raise UserError(f'{source}, line {number}: {key!r} is line {lines[key]} already; give each its own "id"')
        lines[key] = number
        path = source.parent / entry["image"]
        items.append(Item(key, entry["image"], path, entry.get("prompt", prompt), entry.get("id"), entry=entry))
    return items
