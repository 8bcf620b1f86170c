"""Questions of the general benchmarks, from the files that they are published in.

.tsv     VLMEvalKit's form of any of them: index, question, answer, A, B, ..., category, l2-category, split, and the
         picture as `image` (base64, or the index of a row before it that has it) or `image_path`
.json    ChartQA (a list with imgname, query, label), DocVQA and InfoVQA ({"data": [...]} with questionId, question,
         answers), TextVQA ({"data": [...]} with question_id, answers), OCRBench.json (a list with question, answers,
         type), SEED-Bench ({"questions": [...]} with choice_a ...; without those about videos), ScienceQA
         (problems.json, by id; without those that have no picture, which is ScienceQA-IMG)
.jsonl   one question a line, with the fields of any of these, or of BLINK's rows
folder   ChartQA's, with test_human.json and test_augmented.json; ids are "human:1", "augmented:1", ...

A question without an id has its number in the file.
"""

import ast
import base64
import binascii
import contextlib
import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl, read_lines
from balcap_jax.evals.inputs import read_document
from balcap_jax.evals.vqa_rules import LETTERS

_REMEDY = "give a file in the benchmark's own form (balcap_jax/evals/vqa_data.py)"
_LONGEST_INDEX = 18  # digits
_ROTATION = 1_000_000  # MMBench: rotations of question i have the indices i + k * 1,000,000
_ID = ("index", "question_id", "questionId", "id", "idx")
_SPLIT = ("split", "data_split", "set_name")
_INDEX_LENGTH = 64  # VLMEvalKit: a shorter cell `image` is the index of the row that has the picture
_LONGEST_FIELD = 1 << 28  # characters of a TSV field: pictures in base64


@dataclasses.dataclass(frozen=True)
class Question:
    """One question: its `answers`, all of them right, or, with `options` {letter: text}, the letter of the right one.

    group: what the rotations of one question share. kind: of an OCRBench question, or the dataset that it is from.
    picture: path below the images' folder, or the bytes of a file; None where the file names none.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    options: Mapping[str, str]
    category: str
    group: str
    kind: str = ""
    hint: str = ""
    picture: str | bytes | None = dataclasses.field(default=None, repr=False)


def read_questions(path: Path, split: str = "") -> Iterator[Question]:
    """The questions of a file, in its order; with `split`, those whose line names it.

    Raises:
      UserError: no such file, another form, a question without an answer, or two with one id.
    """
    seen: dict[str, int] = {}
    pictures: dict[str, str | bytes | None] = {}
    number = 0
    for number, (where, entry) in enumerate(_entries(Path(path)), start=1):
        if split and split not in (str(entry.get(name, "")) for name in _SPLIT):
            continue
        question = _question(entry, where, number)
        if Path(path).suffix == ".tsv":
            cell = str(entry.get("image", ""))
            if cell in pictures:
                question = dataclasses.replace(question, picture=pictures[cell])
            pictures[question.id] = question.picture
        if question.id in seen:
            raise UserError(f"{where}: the question {question.id!r} is number {seen[question.id]} already; {_REMEDY}")
        seen[question.id] = number
        yield question
    if not seen:
        raise UserError(
            f"{path} has no question{f' of the split {split!r} among {number}' if number else ''}; {_REMEDY}"
        )


def _entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        halves = {kind: sorted(path.glob(f"*_{kind}.json")) for kind in ("human", "augmented")}
        if any(len(files) != 1 for files in halves.values()):
            raise UserError(
                f"{path} does not hold one file *_human.json and one *_augmented.json of ChartQA; {_REMEDY}"
            )
        for kind, (file,) in halves.items():
            for number, (where, entry) in enumerate(_entries(file), start=1):
                yield where, {"id": f"{kind}:{number}", "dataset_name": kind, **entry}
    elif path.suffix == ".jsonl":
        yield from read_jsonl(path, _REMEDY)
    elif path.suffix == ".tsv":
        yield from _rows(path)
    elif path.suffix == ".json":
        content = read_document(path, _REMEDY)
        if isinstance(content, dict):
            inside = content.get("data", content.get("questions"))
            content = inside if isinstance(inside, list) else _problems(content)
        if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
            raise UserError(f"{path} holds no list of questions; {_REMEDY}")
        for number, entry in enumerate(content, start=1):
            if str(entry.get("data_type", "")).lower() != "video":
                yield f"{path}, question {number}", entry
    else:
        raise UserError(f"{path} ends in none of .tsv, .json and .jsonl; {_REMEDY}")


def _problems(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ScienceQA's problems by id, those with a picture, which lies in SPLIT/ID/."""
    problems = []
    for key, problem in content.items():
        entry = {"id": key, **(problem if isinstance(problem, dict) else {})}
        if entry.get("image"):
            entry["image"] = "/".join(str(part) for part in (entry.get("split", ""), key, entry["image"]) if part)
        if entry.get("image") or "image" not in entry:
            problems.append(entry)
    return problems


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        lines = (line.decode("utf-8-sig") for line in read_lines(path))
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), start=1):
            yield f"{path}, row {number}", {key: value for key, value in row.items() if key and value is not None}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table of text ({error}); {_REMEDY}") from error


def _question(entry: Mapping[str, Any], where: str, number: int) -> Question:
    try:
        text = _text(entry, "question", "query")
        options = _options(entry)
        answers = _answers(entry, options)
    except ValueError as error:
        raise UserError(f"{where}: {error}; {_REMEDY}") from error
    if not text or not answers:
        missing = "answer" if text else "question"
        raise UserError(f"{where} has no {missing}; {_REMEDY}")
    if options and answers[0] not in options:
        raise UserError(f"{where}: the answer {answers[0]!r} is none of the options {', '.join(options)}; {_REMEDY}")
    # Not the picture's name: it may have several questions.
    name = next((str(entry[key]) for key in _ID if entry.get(key) not in (None, "")), str(number))
    rotated = name.isdecimal() and len(name) <= _LONGEST_INDEX and str(int(name)) == name
    return Question(
        name,
        text,
        answers,
        options,
        _label(entry, "category", "type", "question_type_id", "sub_task", "topic", "data_type"),
        str(int(name) % _ROTATION) if rotated else name,
        _label(entry, "dataset_name", "l2-category", "l2_category", "split"),
        _label(entry, "hint"),
        _picture(entry, where),
    )


def _text(entry: Mapping[str, Any], *names: str) -> str:
    return next((text for name in names if (text := _plain(entry.get(name)).strip())), "")


def _label(entry: Mapping[str, Any], *names: str) -> str:
    return next((str(entry[name]).strip() for name in names if entry.get(name) not in (None, "")), "")


def _plain(value: Any) -> str:
    """A text or a number as a text, "" for nothing, which pandas writes as nan. Raises ValueError for anything else.

    Blanks at its ends count: some of the official scorers compare them.
    """
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:60]!r} stands where a text belongs")
    return str(value)


def _python(text: str) -> Any:
    """The value of a Python literal, or the text itself where it is none."""
    # The errors that `ast.literal_eval` documents for malformed input.
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def _options(entry: Mapping[str, Any]) -> dict[str, str]:
    if isinstance(entry.get("choices"), list):
        return {LETTERS[i]: _plain(text) for i, text in enumerate(entry["choices"][: len(LETTERS)])}
    of_seed_bench = entry.get("choice_a") is not None
    names = {letter: f"choice_{letter.lower()}" if of_seed_bench else letter for letter in LETTERS}
    # VLMEvalKit leaves the options that a question lacks empty, or writes nan.
    texts = {letter: _plain(entry.get(name)) for letter, name in names.items()}
    return {letter: text for letter, text in texts.items() if text not in ("", "nan")}


def _answers(entry: Mapping[str, Any], options: Mapping[str, str]) -> tuple[str, ...]:
    value = entry.get("answers", entry.get("answer", entry.get("label")))
    if isinstance(value, str) and not options and "index" in entry and value.startswith("[") and value.endswith("]"):
        value = _python(value)  # VLMEvalKit's TSV holds Python lists
    if isinstance(value, str) and options:
        value = value.strip().strip("()")  # BLINK's "(B)"
    if isinstance(value, int) and not isinstance(value, bool) and options:
        return (LETTERS[value],) if 0 <= value < len(LETTERS) else ()  # ScienceQA counts from 0
    if isinstance(value, list):
        texts = tuple(_plain(one["answer"] if isinstance(one, dict) and "answer" in one else one) for one in value)
    else:
        texts = (_plain(value),)
    return texts if any(texts) else ()


def _picture(entry: Mapping[str, Any], where: str) -> str | bytes | None:
    for name in ("image_path", "imgname", "image_local_name", "data_id", "image_id", "image"):
        value = entry.get(name)
        if isinstance(value, str) and value and not (name == "image_id" and "image" in entry):
            break
    else:
        return None
    if name == "image_id":  # TextVQA's
        return f"{value}.jpg"
    if name != "image" or Path(value).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif"):
        return value
    if "index" in entry and len(value) <= _INDEX_LENGTH:
        return None  # `read_questions` knows the other row.
    if value.startswith("["):  # BLINK's, one or several
        several = _python(value)
        if isinstance(several, list):
            if len(several) != 1:
                return None
            value = str(several[0])
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: its image is neither a path nor base64 ({error}); {_REMEDY}") from error
