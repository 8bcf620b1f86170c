"""The JSON object in a model's answer, checked against its schema; models wrap it in fences, thoughts and talk."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pydantic

_THOUGHTS = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_FENCED = re.compile(r"\A\s*```\w*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_STARTS = 64  # places in a text where an object is looked for: more is no answer, and each costs a scan
_DECODER = json.JSONDecoder(strict=False)  # Models break lines inside strings, where JSON wants \n.


class UnusableAnswer(ValueError):
    """The text is no answer of the schema; the message says why in a few words that do not quote the text."""


def parse_answer(text: str, schema: type[pydantic.BaseModel], check: Callable[[Any], str] | None = None) -> Any:
    """The one object of `schema` that a text holds, which `check` has nothing against.

    The whole text is taken where it is JSON; else the one object in it. Two different ones are refused, and so is one
    beside anything that begins as one, whole or not: either might be quoted from the text that was to be judged.

    A schema may have a method `of_text`, which takes the whole text, thoughts included, where it holds no such object.

    Raises:
      UnusableAnswer: no object, not of the schema, more than one, or refused by `check`.
    """
    try:
        value = _object_in(text, schema)
    except UnusableAnswer:
        if not hasattr(schema, "of_text"):
            raise
        value = schema.of_text(text)
    if check is not None and (problem := check(value)):
        raise UnusableAnswer(problem)
    return value


def _object_in(text: str, schema: type[pydantic.BaseModel]) -> Any:
    text = _THOUGHTS.sub("", text).strip()
    if fenced := _FENCED.match(text):
        text = fenced[1].strip()
    if not text:
        raise UnusableAnswer("empty answer")
    whole = _decode(text)
    return _only(text, schema) if whole is None else _validate(whole, schema)


def _decode(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _validate(value: Any, schema: type[pydantic.BaseModel]) -> Any:
    if not isinstance(value, dict):
        raise UnusableAnswer("answer is no JSON object")
    try:
        return schema.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # Numbers of list entries differ from answer to answer; without them reasons can be counted.
        where = ".".join("*" if isinstance(part, int) else str(part) for part in first["loc"])
        raise UnusableAnswer(f"answer does not fit the schema ({where}: {first['type']})") from error


def _only(text: str, schema: type[pydantic.BaseModel]) -> Any:
    found, problem, rest, at = [], None, "", 0
    for candidate, start, end in _objects(text):
        try:
            value = _validate(candidate, schema)
        except UnusableAnswer as error:
            problem = problem or error
            continue
        rest, at = rest + text[at:start], end
        if value not in found:
            found.append(value)
    rest += text[at:]
    names = "|".join(field.alias or name for name, field in schema.model_fields.items())
    if len(found) > 1 or (found and re.search(rf"{{[^{{}}]*?\b({names})\b\W?\s*:", rest)):
        raise UnusableAnswer("answer holds several JSON objects of the schema")
    if found:
        return found[0]
    raise problem or UnusableAnswer("answer holds no JSON object")


def _objects(text: str) -> Iterator[tuple[dict, int, int]]:
    """JSON objects in a text with their begin and end, from left to right, none inside another."""
    at = 0
    for _ in range(_STARTS):
        at = text.find("{", at)
        if at < 0:
            return
        start = at
        try:
            value, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            at += 1
            continue
        yield value, start, at
