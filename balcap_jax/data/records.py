"""Pictures with their texts, from the lines of files: what a line may hold, and how lines are joined to pictures.

`recaption` writes such lines about the pictures of any data set, and `data.units` joins them to it.
"""

import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.data import same_pictures
from balcap_jax.data.choices import MAX_OPTIONS, lettered
from balcap_jax.data.input import NO_CAPTION, LeftOut
from balcap_jax.data.listing import PictureNames, RealPaths, lines_of
from balcap_jax.data.same_pictures import Hash, hash_in

REWARDED = ("reference_units", "questions", "rubrics")
"""What rewards read beside a picture and its reference."""
EMPTY = ("", (), "[]")
"""What a field holds that a picture does not have."""

UNITS = "config field 'data.units': ", "give the JSONL file that `recaption` wrote"
"""What stands before the file's name in an error about it, and what to do."""
MEND_LINE = "mend or remove that line"

Key = TypeVar("Key", bound=Hashable)
_LARGEST_WEIGHT = 1000.0  # of a criterion
_LOOKED_AT = 2**14  # bytes of a file that tell it from another of its size


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A picture, by its path, with its texts; `questions` and `rubrics` are JSON text.

    `picture` names the picture of several records, each with an id of its own; "" where the id is the name.
    """

    id: str
    path: str
    prompt: str
    captions: tuple[str, ...]
    reference_units: tuple[str, ...] = ()
    questions: str = "[]"
    rubrics: str = "[]"
    picture: str = ""

    @property
    def key(self) -> str:
        """The name that decides its split."""
        return self.picture or self.id


# ---- lines of a file -------------------------------------------------------------------------------------------------


def read_record(entry: Mapping[str, Any], where: str, *, needs_caption: bool = True) -> dict[str, Any]:
    """{"image", "captions", "prompt", "reference_units", "questions", "rubrics"} of a line.

    Captions are a tuple with `reference` first, where there is one. Questions and rubrics are JSON text, "[]" where
    there are none. An absent prompt is "".

    Raises:
      UserError: it lacks what is needed, or a field is of another form; `where` names the line.
    """
    if not isinstance(entry.get("image"), str) or not entry["image"]:
        raise UserError(
            f'{where}: a line is an object with "image", the path of a picture, and "caption"; mend that line'
        )
    captions = [entry[name] for name in ("reference", "caption") if entry.get(name) is not None]
    more = [] if entry.get("captions") is None else entry["captions"]
    captions += more if isinstance(more, list) else [more]
    if not all(isinstance(text, str) for text in captions):
        raise UserError(f'{where}: "reference", "caption" and the entries of "captions" must be text; mend that line')
    captions = [text.strip() for text in captions if text.strip()]
    if needs_caption and not captions:
        raise UserError(f'{where}: {entry["image"]!r} has no caption; give "caption", or a list "captions"')
    prompt, units, questions, rubrics = (
        empty if entry.get(name) is None else entry[name]
        for name, empty in (("prompt", ""), ("reference_units", []), ("questions", []), ("rubrics", []))
    )
    if not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" must be text, got {shown(prompt)}; mend that line, or leave it out')
    if not isinstance(units, list) or not all(isinstance(unit, str) and unit.strip() for unit in units):
        raise UserError(
            f'{where}: "reference_units" must be a list of texts that are not empty, got {shown(units)}; mend that '
            "line, or have `python -m balcap_jax.recaption --write=units` write them"
        )
    if not isinstance(questions, list) or not all(map(_is_question, questions)):
        raise UserError(
            f'{where}: "questions" must be a list of {{"question": text, "choices": [2 to {MAX_OPTIONS} texts], '
            f'"answer": a letter, or one of the choices}}, got {shown(questions)}; mend that line'
        )
    if not isinstance(rubrics, list) or not all(map(_is_criterion, rubrics)):
        raise UserError(
            f'{where}: "rubrics" must be a list of {{"criterion": text, "weight": a number above 0}}, '
            f"got {shown(rubrics)}; mend that line"
        )
    return {
        "image": entry["image"],
        "captions": tuple(dict.fromkeys(captions)),
        "prompt": prompt,
        "reference_units": tuple(units),
        "questions": json_text.dumps(questions),
        "rubrics": json_text.dumps(rubrics),
    }


def _is_question(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("question", "answer")):
        return False
    choices = entry.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_OPTIONS:
        return False
    return all(isinstance(text, str) and text.strip() for text in choices) and bool(lettered(entry)[1])


def _is_criterion(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("criterion"), str) or not entry["criterion"].strip():
        return False
    weight = entry.get("weight")
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight <= _LARGEST_WEIGHT


# ---- lines about the pictures of a data set ------------------------------------------------------------------------


def join(records: Sequence[Record], file: Path, folder: Path, name: str) -> tuple[list[Record], list[LeftOut]]:
    """The records of the data set `name` with what the JSONL `file` says about their pictures, and those it leaves out.

    A line's captions take the place of a record's, and so do its units, questions and criteria; each record keeps its
    prompt. A line is about the picture at its path, which starts from the file's folder. Where nothing is there, or a
    copy, it is about the one in `folder` whose name its path ends in: so file and pictures may be moved apart, and
    pictures may be copied. Records of pictures without a line are left out. One printed line says how many matched.

    Raises:
      UserError: the file cannot be read, a line is bad, or no line is about any of the pictures.
    """
    real, names = RealPaths(), PictureNames(folder)
    at = [real(record.path) for record in records]
    by_name = {names(record.path): path for record, path in zip(records, at, strict=True)}
    pictures = set(at)

    def find(path: str, image: str) -> str | None:
        if (picture := real(path)) in pictures:
            return picture
        named = next((by_name[end] for end in endings(image) if end in by_name), "")
        # One of the same name that is still there may be another picture: a million folders have a 1.jpg.
        return named if named and (not os.path.lexists(path) or is_copy(path, named)) else None

    example = next(iter(by_name), "none")
    lines, hashes = lines_about(file, find, name, len(pictures), f"{example!r} in {folder}")
    same_pictures.check(hashes, file)
    joined, left_out = [], []
    for record, path in zip(records, at, strict=True):
        whole = dataclasses.replace(record, **lines.get(path, {}))
        if path in lines and whole.captions:
            joined.append(whole)
        else:
            left_out.append(LeftOut(record.id, NO_CAPTION[0] if path in lines else f"no line in {file.name}"))
    return joined, left_out


def endings(image: str) -> Iterator[str]:
    """A path, and what is left of it without its first parts, the longest first."""
    parts = Path(os.path.normpath(image)).parts
    return ("/".join(parts[start:]) for start in range(len(parts)))


def lines_about(
    file: Path, find: Callable[[str, str], Key | None], name: str, pictures: int, such_as: str
) -> tuple[dict[Key, dict[str, Any]], dict[Key, Hash]]:
    """{picture: what the lines of the JSONL `file` say about it, of the fields of `read_record` but image and prompt}.

    The second are hashes of pictures, as far as lines have them.

    `find(path, image)` is the picture that a line is about, None for that of another data set than `name`, which has
    so many `pictures`, `such_as` that one. One printed line says how many matched.

    Raises:
      UserError: the file cannot be read, a line is bad, or no line is about any of the pictures.
    """
    lines: dict[Key, dict[str, Any]] = {}
    hashes: dict[Key, Hash] = {}
    strangers = []
    for number, line in lines_of(file, *UNITS):
        where = f"{file}, line {number}"
        entry = json_text.parse_object(line, where, MEND_LINE)
        fields = read_record(entry, where, needs_caption=False)
        image = fields.pop("image")
        picture = find(os.path.join(file.parent, image), image)
        if picture is None:
            strangers.append(image)
        else:
            said = {field: value for field, value in fields.items() if field != "prompt" and value not in EMPTY}
            lines[picture] = lines.get(picture, {}) | said
            if found := hash_in(entry):
                hashes[picture] = found
    if not lines:
        examples = f"they name such as {strangers[0]!r}" if strangers else "it has none"
        raise UserError(
            f"no line of {file} (data.units) is about a picture of {name}: {examples}, and the pictures are such as "
            f"{such_as}; give what recaption wrote about these, or about copies of them"
        )
    without = pictures - len(lines)
    text = f"{file.name}: lines about {len(lines)} of {pictures} pictures"
    text += f"; the other {without} are left out" if without else ""
    print(text + (f"; {len(strangers)} lines are about no picture of {name}" if strangers else ""), flush=True)
    return lines, hashes


def is_copy(one: str, other: str) -> bool:
    """Whether two files are of one size and begin alike; False where either cannot be read.

    Compressed pictures that differ have other sizes, or other bytes soon: all of 100,000 of them need not be read.
    """
    try:
        if os.path.getsize(one) != os.path.getsize(other):
            return False
        with open(one, "rb") as first, open(other, "rb") as second:
            return first.read(_LOOKED_AT) == second.read(_LOOKED_AT)
    except (OSError, ValueError):
        return False


def check_needs(records: Sequence[Record], needs: Sequence[str], name: str, source: Path) -> None:
    """Checks that records have what a reward `needs` beside pictures; one printed line says how many lack it.

    `source` is what `recaption` takes as --images for the data set `name`.

    Raises:
      UserError: none has it; the line names the command that writes it.
    """
    for field in (field for field in needs if field in REWARDED):
        lacking = {record.key for record in records if getattr(record, field) in EMPTY}
        pictures = {record.key for record in records}
        if records and lacking == pictures:
            raise nowhere(field, name, source)
        if lacking:
            print(f"{name}: {len(lacking)} of {len(pictures)} pictures have no {field} to be scored by", flush=True)


def nowhere(field: str, name: str, source: Path) -> UserError:
    """The error for a field that no record of the data set `name` has; `source` as of `check_needs`."""
    return UserError(
        f"the reward needs {field!r} beside a picture, and the data set {name!r} has none; "
        f"{_REMEDIES[field].format(source)}, and give --config.data.units=units.jsonl, or choose another reward "
        "(rewards.name)"
    )


_COMMAND = "write them with `python -m balcap_jax.recaption --images={} --out=units.jsonl --judge.endpoints=URL"
_REMEDIES = {
    "reference_units": f"{_COMMAND}`",
    "rubrics": f"{_COMMAND} --write=rubrics --students=CAPTIONS.jsonl`",
    "questions": 'write lines {{"image": "a.jpg", "questions": [{{"question", "choices", "answer"}}]}} to units.jsonl',
}
