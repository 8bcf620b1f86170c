"""What a line of a captioned JSONL file may hold, checked."""

from collections.abc import Mapping
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.data.choices import MAX_OPTIONS, lettered

_LARGEST_WEIGHT = 1000.0


def read_record(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{"image", "captions", "prompt", "reference_units", "questions", "rubrics"} of a line.

    Captions are a tuple with `reference` first, where there is one; questions and rubrics are JSON text, "[]" where
    there are none; an absent prompt is "".

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
    if not isinstance(questions, list) or not all(_is_question(one) for one in questions):
        raise UserError(
            f'{where}: "questions" must be a list of {{"question": text, "choices": [2 to {MAX_OPTIONS} texts], '
            '"answer": a letter, or one of the choices}'
        )
    if not isinstance(rubrics, list) or not all(_is_criterion(one) for one in rubrics):
        raise UserError(f'{where}: "rubrics" must be a list of {{"criterion": text, "weight": a number above 0}}')
    return {
        "image": entry["image"],
        "captions": tuple(dict.fromkeys(captions)),
        "prompt": prompt,
        "reference_units": tuple(units),
        "questions": json_text.dumps(questions),
        "rubrics": json_text.dumps(rubrics),
    }


def _is_question(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("question"), str) or not isinstance(one.get("answer"), str):
        return False
    choices = one.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_OPTIONS:
        return False
    return all(isinstance(text, str) and text.strip() for text in choices) and bool(lettered(one)[1])


def _is_criterion(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("criterion"), str) or not one["criterion"].strip():
        return False
    weight = one.get("weight")
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight <= _LARGEST_WEIGHT
