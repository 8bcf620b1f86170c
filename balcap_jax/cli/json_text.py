"""JSON that others wrote, which may be torn, of another form or no text at all; and the JSON that we write."""

import json
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from balcap_jax.cli.errors import UserError

_DEEPEST = 100  # objects and lists inside each other; what people write has ten
_MOST_DIGITS = 300  # of an integer: a float holds 308


def decode(text: str | bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `hook` makes objects of their pairs.

    An integer that no float holds is infinite, as 1e400 is.

    Raises:
      ValueError: no UTF-8, no JSON, or nested so deeply that a reader would fail on it.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=hook, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(value):
        raise ValueError("nested too deeply")
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _is_deep(value: Any) -> bool:
    level = [[value]]
    for _ in range(_DEEPEST):
        children = (value.values() if isinstance(value, dict) else value for value in level)
        level = [child for values in children for child in values if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; True and False are none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of 309 digits or more
        return False


def parse(text: str | bytes, where: str, remedy: str, *, unique: bool = False) -> Any:
    """The value of a JSON text; `where` (file, and line) and `remedy` are for the error.

    Raises:
      UserError: what `decode` raises, or half of a surrogate pair, which is no character; if `unique`, an object that
        has a name twice, of which `json` would keep the last.
    """

    def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in fields if names.count(name) > 1)
            raise UserError(f"{where} has {twice!r} twice; keep one of them")
        return fields

    try:
        value = decode(text, unique_names if unique else None)
        # `json` lets halves of pairs through; file names and tokenizers do not take them.
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not JSON (half of a surrogate pair is no character); {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not JSON (not a text file); {remedy}") from error
    except ValueError as error:
        kind = "JSON" if isinstance(error, json.JSONDecodeError) else "JSON that can be read"
        raise UserError(f"{where} is not {kind} ({error}); {remedy}") from error
    except MemoryError as error:
        raise UserError(f"{where} is too large for this machine's memory; {remedy}") from error
    return value


def parse_object(text: str | bytes, where: str, remedy: str, *, unique: bool = False) -> dict[str, Any]:
    """As `parse`; raises UserError for anything but an object too."""
    return as_object(parse(text, where, remedy, unique=unique), where, remedy)


def as_object(value: Any, where: str, remedy: str) -> dict[str, Any]:
    """`value`, or a UserError if it is no object."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object; {remedy}")
    return value


def dumps(value: Any, **layout: Any) -> str:
    """JSON of `value`, with null for numbers that are NaN or infinite, which JSON lacks. `layout`: as of `json.dumps`.

    Raises TypeError, ValueError or RecursionError for what JSON cannot hold.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(with_nulls(value), allow_nan=False, **layout)


def lines(values: Iterable[Any]) -> str:
    """JSONL of `values`, by `dumps`."""
    return "".join(dumps(value) + "\n" for value in values)


def with_nulls(value: Any) -> Any:
    """`value` with None in place of numbers that are NaN or infinite; tuples become lists."""
    if isinstance(value, dict):
        return {key: with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
