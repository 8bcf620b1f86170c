"""The schema of a configuration: its fields as tables and messages name them, and the check of values against it."""

import dataclasses
import difflib
import functools
import numbers
import operator
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.config.fields import SIZE, Group
from balcap_jax.config.flaws import parse_flaws
from balcap_jax.config.groups import Config, Model
from balcap_jax.config.lists import parse_endpoints, parse_shares
from balcap_jax.config.packed import UNIT, WORTH

__all__ = [
    "FIELDS",
    "KINDS",
    "RUN_FIELDS",
    "UNIT",
    "WORTH",
    "Config",
    "Model",
    "Setting",
    "parse_endpoints",
    "parse_flaws",
    "parse_shares",
    "validated",
]

RUN_FIELDS = (
    *("dtype", "remat", "attention", "logits_chunk", "prompt_tokens", "template"),
    *("min_image_tokens", "max_image_tokens", "max_aspect", "wide_images"),
)
"""Fields of the group `model` that no parameter's shape depends on: the recipe decides them for a saved model too, but
for an empty template."""

KINDS = {"int": "an integer", "float": "a number", "bool": "True or False", "str": "a string"}
KINDS |= {"ints": "a tuple of integers", "floats": "a tuple of numbers", "int or auto": "an integer or auto"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field. `kind` is a key of KINDS; its numbers are within `low` and `high` (exclusive with `open_high`)."""

    name: str
    kind: str
    default: Any
    meaning: str
    low: float | None
    high: float | None
    open_high: bool
    choices: tuple[str, ...]
    resumable: bool
    is_path: bool

    @property
    def range_text(self) -> str:
        if self.kind == "int or auto":
            return f"auto | [1, {SIZE}]"
        if self.choices or self.low is None:
            return " | ".join(self.choices)
        low, high = (str(end) if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"[{low}, {high}{')' if self.open_high else ']'}"

    def holds(self, number: float) -> bool:
        return self.low <= number <= self.high and not (self.open_high and number == self.high)


def _settings(group: Group, prefix: str = "", what: str = "") -> Iterator[Setting]:
    for name, field in type(group).model_fields.items():
        default, arguments = getattr(group, name), get_args(field.annotation)
        if isinstance(default, Group):
            yield from _settings(default, f"{prefix}{name}.", field.description or "")
            continue
        is_tuple = isinstance(default, tuple)
        entry = FieldInfo.from_annotation(arguments[0]) if is_tuple else field
        ends = {end: getattr(mark, end) for mark in entry.metadata for end in ("ge", "le", "lt") if hasattr(mark, end)}
        kind = f"{entry.annotation.__name__}s" if is_tuple else type(default).__name__
        yield Setting(
            name=prefix + name,
            kind="int or auto" if "auto" in field.metadata else kind,
            default=default,
            meaning=" ".join(field.description.split()).replace("{stage}", what),
            low=ends.get("ge"),
            high=ends.get("le", ends.get("lt")),
            open_high="lt" in ends,
            choices=arguments if get_origin(field.annotation) is Literal else (),
            resumable="resumable" in field.metadata,
            is_path="path" in field.metadata,
        )


FIELDS = {setting.name: setting for setting in _settings(Config())}
T = TypeVar("T", bound=Group)


def validated(group: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The `group` of these values; `prefix` is what the names of its fields begin with, such as "model.".

    Raises:
      UserError: one line that names the field, what it must be and what it was.
    """
    try:
        return group.model_validate(_plain(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    path = [part for part in problem["loc"] if isinstance(part, str)]  # Numbers are places in a tuple.
    name, kind = prefix + ".".join(path), problem["type"]
    reason = str(problem["ctx"]["error"]) if kind == "value_error" else problem["msg"]
    if name not in FIELDS:
        raise UserError(reason)
    field, value = FIELDS[name], functools.reduce(operator.getitem, path, values)
    if kind in ("string_unicode", "string_pattern_mismatch"):
        why = "bytes that are not UTF-8, half of a surrogate pair, or the character 0"
        reason = f"must be Unicode text, got {shown(value)} ({why})"
    elif kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value, field.choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        reason = f"must be one of {', '.join(field.choices)}, got {shown(value)}{hint}"
    elif kind != "value_error":
        is_outside = kind in ("greater_than_equal", "less_than_equal", "less_than")
        demand = f"in {field.range_text}" if is_outside else KINDS[field.kind]
        demand += ", at least one" if kind == "too_short" else ""
        reason = f"must be {demand}, got {shown(value)} ({field.meaning})"
    raise UserError(f"config field {name!r} {reason}")


def _plain(value: Any) -> Any:
    """What recipes may write in place of Python's own numbers and tuples: those of NumPy, fractions, lists."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if json_text.is_number(value) else value
