"""What an evaluation reads: captions or predictions by id, JSON files of benchmarks, pictures for a judge."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes, read_json, read_jsonl
from balcap_jax.data import images
from balcap_jax.judges.schema import Failure

LARGEST = 2048 * 2048  # pixels of a picture that a judge is shown: hosted models shrink larger ones too
_PICTURES = ("id", "image", "image_path", "image_name", "question_id", "questionId", "index")
_QUESTIONS = ("question_id", "questionId", "index", "id", "image", "image_path", "image_name")
_TEXT = ("caption", "prediction", "answer")


def read_picture(path: Path, name: str) -> np.ndarray | Failure:
    """The pixels that a judge is shown, or, under this name of the picture, why there are none."""
    try:
        return images.shrunk(images.read(path), LARGEST)
    except images.ImageError as error:
        return Failure(f"{name}: {error}")


def read_document(path: str | os.PathLike, remedy: str) -> Any:
    """The value in a JSON file whose objects have each name once. Raises UserError, also where there is no file."""
    try:
        return read_json(Path(path), remedy, unique=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no such file: {path}; {remedy}") from error


class Texts(dict):
    """Captions, or predictions, by id; it remembers which were looked up.

    prompts: those that single captions answer. cut: whether a caption was cut at the token limit. Both by id, where the
    file says so.
    """

    def __init__(
        self, texts: Mapping[str, str], prompts: Mapping[str, str] | None = None, cut: Mapping[str, bool] | None = None
    ):
        super().__init__(texts)
        self.prompts, self.cut = dict(prompts or {}), dict(cut or {})
        self._by_path = {os.path.normpath(key): key for key in reversed(texts)}
        self._by_end: dict[str, str | None] = {}  # None: of several texts
        for key in texts:
            for end in _ends(key):
                self._by_end[end] = None if end in self._by_end else key
        self._found_by_end: dict[str, str] = {}
        self._used: set[str] = set()

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> "Texts":
        return texts if isinstance(texts, Texts) else cls(texts)

    def __getitem__(self, key: str) -> str:
        self._used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - this is `get`

    def find(self, *names: str) -> str | None:
        """The text of a picture that goes by these names.

        Paths are the same however they are spelt ("./1.jpg"). One is also found by its end, as "images/1.jpg" by
        "1.jpg", where no other text has that end. Raises UserError where a text is found so for two pictures.
        """
        names = tuple(name for name in names if name)
        if exact := next((name for name in names if name in self), None):
            return self[exact]
        if same := next((path for path in map(os.path.normpath, names) if path in self._by_path), None):
            return self[self._by_path[same]]
        for name in names:
            path, *shorter = _ends(name)
            keys = {self._by_end.get(path)} | {self._by_path.get(end) for end in shorter if self._by_end.get(end)}
            if len(keys := keys - {None}) == 1:
                (key,) = keys
                first = self._found_by_end.setdefault(key, names[0])
                if first != names[0]:
                    raise UserError(
                        f"the caption of {key!r} may be that of {first!r} or of {names[0]!r}; give captions the ids of "
                        "their pictures, or the whole paths"
                    )
                return self[key]
        return None

    @property
    def truncated(self) -> float | None:
        """The percentage of the looked-up captions that were cut; None where the file does not say."""
        known = [self.cut[name] for name in self._used if name in self.cut]
        return 100.0 * sum(known) / len(known) if known else None

    def below(self, folder: str) -> "Texts":
        """Those whose path begins with `folder`, by the rest of their path."""
        inside = {name: name.removeprefix(f"{folder}/") for name in self if name.startswith(f"{folder}/")}
        parts = (
            {short: part[name] for name, short in inside.items() if name in part} for part in (self.prompts, self.cut)
        )
        return Texts({short: dict.__getitem__(self, name) for name, short in inside.items()}, *parts)

    @property
    def unused(self) -> list[str]:
        """Ids that no item has."""
        return [name for name in self if name not in self._used]


def _ends(path: str) -> list[str]:
    """A path without its first folders: "a/b.jpg" and "b.jpg" of "a/b.jpg" and of "/a/b.jpg"."""
    parts = Path(os.path.normpath(path)).relative_to(Path(path).anchor).parts
    return ["/".join(parts[start:]) for start in range(len(parts))] or [path]


def read_captions(path: str | os.PathLike, what: str = "captions") -> Texts:
    """Captions, or predictions (`what`), by id.

    A JSON object {id: text}; a JSON list or JSONL lines with "caption", "prediction" or "answer", and an "id", "image",
    "image_path", "question_id", "questionId" or "index", of predictions the question's first.

    Raises:
      UserError: no such file, another form, or two texts of one id.
    """
    path, remedy = Path(path), f'--{what} takes {{id: text}}, or lines {{"id" or "image", "caption" or "prediction"}}'
    if path.suffix == ".json":
        content = read_document(path, remedy)
        if isinstance(content, dict):
            for key, caption in content.items():
                if not isinstance(caption, str):
                    raise UserError(f"{path}: the text of {key!r} is none; {remedy}")
            return Texts(content)
        if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
            raise UserError(f"{path} holds neither an object nor a list of objects; {remedy}")
        lines = ((f"{path}, entry {number}", entry) for number, entry in enumerate(content, start=1))
    else:
        lines = read_jsonl(path, remedy)
    texts: dict[str, str] = {}
    prompts: dict[str, str] = {}
    cut: dict[str, bool] = {}
    known: set[str] = set()
    for where, line in lines:
        names = _QUESTIONS if what == "predictions" else _PICTURES
        field = next((name for name in names if line.get(name) is not None), "")
        key = line.get(field)
        text = next((line[name] for name in _TEXT if name in line), None)
        if not isinstance(key, str | int) or isinstance(key, bool) or not isinstance(text, str):
            raise UserError(f"{where} has no id and text; {remedy}")
        name = os.path.normpath(str(key)) if field.startswith("image") else str(key)
        if name in known:
            raise UserError(f"{where}: {key!r} has a text already; keep one of them")
        known.add(name)
        texts[str(key)] = text
        if isinstance(line.get("prompt"), str) and what == "captions":
            prompts[str(key)] = line["prompt"]
        if isinstance(line.get("truncated"), bool):
            cut[str(key)] = line["truncated"]
    return Texts(texts, prompts, cut)


def digest_of(*paths: str | os.PathLike | None) -> str:
    """A digest of the content of files, and of folders' JSON files, for `identity`.

    Raises UserError where one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        if path:
            try:
                files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
                for file in files:
                    digest.update(read_bytes(file))
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()[:16]


def digest_of_texts(*texts: str) -> str:
    """The same of texts."""
    return hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()[:16]
