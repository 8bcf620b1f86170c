"""The fields of a line of a captioned JSONL file, checked."""

from collections.abc import Mapping
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.data.choices import MAX_OPTIONS, lettered

_LARGEST_WEIGHT = 1000.0


def read_record(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{"image", "captions", "prompt", "reference_units", "questions", "rubrics"} of a line.

    Captions are a tuple with `reference` first, where there is one. Questions and rubrics are JSON text, "[]" where
    there are none. An absent prompt is "".

    Raises:
      UserError: it lacks what is needed, or a field is of another form; `where` names the line.
    """
    if not isinstance(entry.get("image"), str) or not entry["image"]:
        raise UserError(f'{where}: a line is an object with "image", the path of a picture, and "caption"')
    captions = [entry[name] for name in ("reference", "caption") if entry.get(name) is not None]
    more = [] if entry.get("captions") is None else entry["captions"]
    captions += more if isinstance(more, list) else [more]
    if not all(isinstance(text, str) for text in captions):
        raise UserError(f'{where}: "reference", "caption" and the entries of "captions" must be text')
    captions = [text.strip() for text in captions if text.strip()]
    if not captions:
        raise UserError(f'{where}: {entry["image"]!r} has no caption; give "caption", or a list "captions"')
    prompt, units, questions, rubrics = (
        empty if entry.get(name) is None else entry[name]
        for name, empty in (("prompt", ""), ("reference_units", []), ("questions", []), ("rubrics", []))
    )
    if not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" must be text, got {prompt!r}')
    if not isinstance(units, list) or not all(isinstance(unit, str) and unit.strip() for unit in units):
        raise UserError(f'{where}: "reference_units" must be a list of texts')
    if not isinstance(questions, list) or not all(map(_is_question, questions)):
        raise UserError(
            f'{where}: "questions" must be a list of {{"question": text, "choices": [2 to {MAX_OPTIONS} texts], '
            '"answer": a letter, or one of the choices}'
        )
    if not isinstance(rubrics, list) or not all(map(_is_criterion, rubrics)):
        raise UserError(f'{where}: "rubrics" must be a list of {{"criterion": text, "weight": a number above 0}}')
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
