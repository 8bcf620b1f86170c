"""The pictures that a command works on: all of a folder, or the lines of a JSONL file."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.bucket import is_url
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes
from balcap_jax.data import images

_ENDINGS = (".jpg", ".png", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture to caption. `key` is its id, or its `picture_name`; resuming and sampling go by it.

    `error` says why it cannot be captioned, where that is known before it is read. `entry` is its line in a file.
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
        """The fields of its output line that name it."""
        return {"image": self.image} | ({"id": self.id} if self.id is not None else {})


def list_items(
    source: str | os.PathLike, prompt: str, *, columns: str = "", root: str | os.PathLike | None = None
) -> list[Item]:
    """The pictures of a folder or of a JSONL file; `prompt` is for those without their own.

    Of a JSONL file, `columns` is as `data.columns`, and paths start from `root`, None = from its folder.

    Raises:
      UserError: nothing there, a bad line, or two lines with one id.
    """
    source = Path(source)
    if source.suffix == ".jsonl":
        storage.fetch(source)
    elif storage.url_of(source):
        storage.refuse(source, "a folder of pictures")
    if source.is_dir():
        items = []
        for name, problem in files_below(source, "--images"):
            text = spelt(name)
            error = problem if text == name else "the name of the file is not UTF-8; rename it"
            items.append(Item(text, text, source / name, prompt, error=error))
        if not items:
            kinds = " ".join(images.SUFFIXES)
            raise UserError(f"no pictures in {source}: no file ends in one of {kinds}")
        return items
    if not source.is_file():
        raise UserError(f"--images={source}: no such folder or file")
    items = _listed(source, prompt, columns, source.parent if root is None else Path(root))
    if not items:
        raise UserError(f'{source} is empty; it takes lines such as {{"image": "photo.jpg"}}')
    return items


def spelt(name: str) -> str:
    """The name of a file as text. Bytes that are no UTF-8 are spelt out, as JSON cannot hold them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def real_path(path: str | os.PathLike) -> str:
    """Where a file lies: the same for all the links to it, and for all spellings of its path."""
    return str(path) if "\0" in str(path) else os.path.realpath(path)


class RealPaths:
    """`real_path` of many files: each of their folders is looked at once."""

    def __init__(self):
        self._folders: dict[str, str] = {}

    def __call__(self, path: str | os.PathLike) -> str:
        folder, name = os.path.split(path)
        if "\0" in folder or name in ("", ".", ".."):
            return real_path(path)
        if folder not in self._folders:
            self._folders[folder] = real_path(folder)
        path = os.path.join(self._folders[folder], name)
        return real_path(path) if os.path.islink(path) else path


class PictureNames:
    """The one name, relative to `folder`, of a picture that a file in there calls `image`.

    "a.jpg", "./a.jpg", "b/../a.jpg" and the whole path are one picture. Links keep the names that they are listed by.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = os.path.abspath(folder)
        self._roots = tuple(os.path.join(root, "") for root in (self._folder, os.path.realpath(folder)))
        self._real_path = RealPaths()

    def __call__(self, image: str) -> str:
        path = os.path.join(self._folder, image)
        plain = os.path.normpath(path)
        if ".." in image and self._real_path(plain) != self._real_path(path):  # ".." behind a link
            plain = self._real_path(path)
        for root in self._roots:
            if plain.startswith(root):
                return plain[len(root) :]
        return os.path.relpath(plain, self._folder)


def picture_name(folder: str | os.PathLike, image: str) -> str:
    """`PictureNames(folder)(image)`."""
    return PictureNames(folder)(image)


def with_ending(folder: Path, image: str) -> str:
    """The name of a picture in `folder` with what it ends in, which some data sets leave out."""
    if not image or os.path.splitext(image)[1]:
        return image
    return next((image + end for end in _ENDINGS if (folder / (image + end)).is_file()), image)


def files_below(folder: Path, what: str) -> list[tuple[str, str]]:
    """Pictures below `folder`: their paths relative to it, with /, each with "" or why it cannot be looked at.

    Hidden files and folders are left out. Links to folders are followed, into each folder once. Broken links and
    subfolders that cannot be looked into are listed as well.

    Raises:
      UserError: `folder` itself cannot be looked into; `what` names its argument or field.
    """
    pictures: list[tuple[str, str]] = []

    def add(path: str, problem: str) -> None:
        pictures.append((Path(path).relative_to(folder).as_posix(), problem))

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(f"{what}: {error.filename} cannot be read ({error.strerror})") from error
        add(error.filename, f"a folder that cannot be looked into: {error.strerror}")

    starts, seen = [str(folder)], set()
    for start in starts:  # Links come last, so that pictures have the names of the folders in which they lie.
        for parent, folders, files in os.walk(start, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            starts += (path for name in folders if os.path.islink(path := os.path.join(parent, name)))
            for name in files:
                path = os.path.join(parent, name)
                if name.startswith("."):
                    continue
                if Path(name).suffix.lower() in (*images.SUFFIXES, *images.OTHER_SUFFIXES):
                    add(path, "")
                elif os.path.islink(path) and not os.path.exists(path):
                    add(path, "a broken link")
    return sorted(pictures)


def has_picture(folder: Path) -> bool:
    """Whether a file below the folder ends as pictures do."""
    return any(path.suffix.lower() in images.SUFFIXES for path in folder.rglob("*"))


def lines_of(source: Path, what: str = "", remedy: str = "give a folder or a JSONL file") -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a JSONL file that are not empty; `what` comes before its name in an error.

    Raises:
      UserError: it cannot be read, or is no UTF-8.
    """
    try:
        text = read_bytes(source).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{what}{source} cannot be read ({reason}); {remedy}") from error
    yield from ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def renamed(entry: Mapping[str, Any], columns: str, folder: Path, where: str) -> dict[str, Any]:
    """A line with our own names for what they mean; `columns` is `data.columns`, and its picture lies in `folder`.

    Raises:
      UserError: as `columns.renamed` does, or a field that should be JSON is none; `where` names the line.
    """
    from balcap_jax.data import columns as choices  # pyarrow takes time to import, and few need it.

    try:
        ours = choices.renamed(entry, columns)
    except ValueError as error:
        raise UserError(f"{where}: a field that should be JSON is none ({error}); mend that line") from error
    if isinstance(image := ours.get("image"), str):
        ours["image"] = with_ending(folder, image)
    meant = (*choices.FIELDS, "reference")  # Others may call anything so.
    return {name: value for name, value in entry.items() if name not in meant} | ours


def _listed(source: Path, prompt: str, columns: str, folder: Path) -> list[Item]:
    items, lines, in_bucket = [], {}, storage.url_of(source)
    for number, line in lines_of(source, "--images="):
        entry = json_text.parse(line, f"{source}, line {number}", "mend or remove that line")
        if columns and isinstance(entry, dict):
            entry = renamed(entry, columns, folder, f"{source}, line {number}")
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
            raise UserError(
                f'{source}, line {number}: a line is an object with "image", the path of a picture; mend that line, or '
                "say how its fields are called (recaption: --columns=image=FIELD,caption=FIELD)"
            )
        for name in ("id", "prompt"):
            if not isinstance(entry.get(name, ""), str):
                raise UserError(f'{source}, line {number}: "{name}" must be text, got {entry[name]!r}')
        key = entry.get("id", picture_name(folder, entry["image"]))
        if key in lines:
            raise UserError(f'{source}, line {number}: {key!r} is line {lines[key]} already; give each its own "id"')
        lines[key] = number
        path = folder / entry["image"]
        if in_bucket or is_url(entry["image"]):
            storage.refuse(entry["image"] if is_url(entry["image"]) else path, "a picture")
        items.append(Item(key, entry["image"], path, entry.get("prompt", prompt), entry.get("id"), entry=entry))
    return items
