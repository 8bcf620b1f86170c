"""The configuration of a run: recipes, the command line, and the check against the table in `config_fields`.

    python -m balcap_jax.config                                                   prints the table
    python -m balcap_jax.config --config=configs/scenes.py --config.seed=1        prints the resolved settings

A recipe is a short Python file whose `get_config(variant)` starts from `default_config()` and overrides fields.
"""

import argparse
import contextlib
import difflib
import inspect
import numbers
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import CommandParser, place, split_overrides
from balcap_jax.cli.errors import UserError, raised, shown, streams_kept
from balcap_jax.cli.files import read_bytes, resolved
from balcap_jax.config import checks
from balcap_jax.config.schema import FIELDS, KINDS, Field

_LISTED = 8  # members of a group that a message names
_LONGEST_NAME = 200
_SIMILAR = 0.6  # difflib ratio from which a name counts as a misspelling of another

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_LONGEST_RECIPE = 1 << 24  # bytes

_BY_NAME = {field.name: field for field in FIELDS}
_GROUPS = {name.rsplit(".", depth)[0] for name in _BY_NAME for depth in range(1, name.count(".") + 1)}
_DEEPEST = max(name.count(".") for name in _BY_NAME) + 1  # dots of a name that is looked for: a group may hold itself


# ---- building -------------------------------------------------------------------------------------------------------


def default_config() -> ConfigDict:
    """The full configuration with every field at its default; recipes override fields of it."""
    # Not type-safe on purpose: `check` then reports an ill-typed field in our words, with the field's full name.
    return _build({field.name: field.default for field in FIELDS})


def _build(values: Mapping[str, Any]) -> ConfigDict:
    config = ConfigDict(type_safe=False)
    for name, value in values.items():
        *groups, leaf = name.split(".")
        at = config
        for group in groups:
            if group not in at:
                at[group] = ConfigDict(type_safe=False)
            at = at[group]
        at[leaf] = value
    return config


def leaves(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf; an empty unknown group counts as a leaf, so that it is reported."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        group = isinstance(value, Mapping | ConfigDict) and name not in _BY_NAME and name.count(".") < _DEEPEST
        if group and (len(value) or name in _GROUPS):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def stage_order(config: ConfigDict) -> tuple[str, ...]:
    """Stages to run, in order."""
    return tuple(part.strip() for part in config.stages.order.split(","))


# ---- checking -------------------------------------------------------------------------------------------------------


def check(config: ConfigDict) -> None:
    """Checks names, types, ranges and what fields demand of each other.

    Raises:
      UserError: one line that names the field, what it must be and what it was.
    """
    _canonical(config)


def _canonical(config: ConfigDict) -> ConfigDict:
    return _checked(_values(dict(leaves(config))))


def _values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every field: a float field's is a float and a tuple field's a tuple, whatever the recipe wrote."""
    for name in given:
        if name not in _BY_NAME:
            raise _unknown(name, given[name])
    missing = [name for name in _BY_NAME if name not in given]
    if missing:
        raise UserError(f"config field {missing[0]!r} is missing; a recipe starts from config.default_config()")
    return {field.name: _typed(field, given[field.name]) for field in FIELDS}


def _checked(values: Mapping[str, Any]) -> ConfigDict:
    for field in FIELDS:
        _check_range(field, values[field.name])
    checked = _build(values)
    for problem in checks.problems(checked, stage_order(checked)):
        raise UserError(problem)
    return checked.lock()


def _unknown(name: str, value: Any = None) -> UserError:
    if name in _GROUPS:
        below = [known.removeprefix(f"{name}.") for known in _BY_NAME if known.startswith(f"{name}.")]
        members = list(dict.fromkeys(member.partition(".")[0] for member in below))
        more = f" and {len(members) - _LISTED} more" if len(members) > _LISTED else ""
        listed = ", ".join(members[:_LISTED]) + more
        return UserError(f"config field {name!r} is a group ({listed}), it can't be set to {shown(value)}")
    near = nearest(name, _BY_NAME)
    hint = f"did you mean {near!r}?" if near else "`python -m balcap_jax.config` lists all fields"
    return UserError(f"unknown config field {name!r}; {hint}")


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The known dotted name most like `name`, by the whole name or by its last part alone; None if none is alike."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, last), whole

    if len(name) > _LONGEST_NAME:  # Compared in quadratic time, and like none.
        return None
    best = max(known, key=likeness)
    return best if likeness(best)[0] >= _SIMILAR else None


def _typed(field: Field, value: Any) -> Any:
    """The value as the field's Python type, without any change of meaning (no 1.5 -> 1, no "1" -> 1, no True -> 1)."""
    kind = field.kind
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        if _NO_TEXT.search(value):
            raise UserError(
                f"config field {field.name!r} must be Unicode text, got {shown(value)} (bytes that are not UTF-8, half "
                "of a surrogate pair, or the character 0)"
            )
        return str(value)
    if kind in ("ints", "floats") and isinstance(value, tuple | list) and (value or field.may_be_empty):
        entries = [_number(kind.removesuffix("s"), entry) for entry in value]
        if None not in entries:
            return tuple(entries)
    if kind in ("int", "float"):
        number = _number(kind, value)
        if number is not None:
            return number
    raise UserError(f"config field {field.name!r} must be {KINDS[kind]}, got {shown(value)} ({field.meaning})")


def _number(kind: str, value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if kind == "int":
        return int(value) if isinstance(value, numbers.Integral) else None
    return float(value) if json_text.is_number(value) else None


def _check_range(field: Field, value: Any) -> None:
    if field.choices and value not in field.choices:
        near = difflib.get_close_matches(value, field.choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        choices = ", ".join(field.choices)
        raise UserError(f"config field {field.name!r} must be one of {choices}, got {shown(value)}{hint}")
    if field.kind in ("int", "float", "ints", "floats"):
        for number in value if isinstance(value, tuple) else (value,):
            if not field.holds(number):
                demand = f"must be in {field.range_text}"
                raise UserError(f"config field {field.name!r} {demand}, got {shown(value)} ({field.meaning})")


# ---- recipes and the command line -----------------------------------------------------------------------------------


def load(recipe: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Runs a recipe, applies overrides and checks the result.

    Args:
      recipe: path of a Python file, with ":variant" for `get_config("variant")`.
      overrides: dotted field name -> text, as in `--config.rollout.buckets=64,96`.

    Raises:
      UserError: the recipe is missing or fails, or `check` fails.
    """
    path, variant = _split_variant(recipe)
    # What is in the ConfigDict is the recipe's code too, until every value has its type.
    with _errors_of(path), streams_kept():
        given = dict(leaves(_run_recipe(path, variant)))
        values = _values(_overridden(given, overrides or {}))
    return _checked(values)


def take_group(argv: Sequence[str], group: str, **defaults: Any) -> tuple[list[str], ConfigDict]:
    """Takes `--GROUP.FIELD=VALUE` out of the command line of a command that has no recipe.

    Args:
      group: such as "judge"; `defaults` are values of its fields that differ from the schema's.

    Returns:
      (the other arguments, the checked group).

    Raises:
      UserError: a bad field or value.
    """
    rest, overrides = split_overrides(argv, f"--{group}.")
    given = {field.name: field.default for field in FIELDS}
    given |= {f"{group}.{name}": value for name, value in defaults.items()}
    given = _overridden(given, {f"{group}.{name}": text for name, text in overrides.items()})
    return rest, _checked(_values(given))[group]


def _overridden(given: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    for name, text in overrides.items():
        if name not in _BY_NAME:
            raise _unknown(name, text)
    return {**given, **{name: _parse(_BY_NAME[name], text) for name, text in overrides.items()}}


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Whatever a recipe's code raises inside becomes a UserError, SystemExit too: no recipe ends a command well."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _recipe_error(path, error) from error


def _run_recipe(path: str, variant: str | None) -> ConfigDict:
    try:
        source = read_bytes(path, _LONGEST_RECIPE).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"recipe {path}: {reason}; --config takes a Python file such as configs/scenes.py") from error
    # Executed rather than imported: no byte code is left beside the recipe, and two recipes may share a file name.
    module = types.ModuleType("recipe")
    module.__file__ = path
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"recipe {path} has no function get_config; copy configs/forkme.py for the form of a recipe")
    accepts_variant = bool(inspect.signature(get_config).parameters)
    if variant is not None and not accepts_variant:
        raise UserError(f"recipe {path} has no variants (its get_config takes no argument), got {variant!r}")
    try:
        config = get_config(variant or "") if accepts_variant else get_config()
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error
    if inspect.iscoroutine(config):
        config.close()  # Python would complain later that nobody awaits it.
    if not isinstance(config, ConfigDict):
        raise UserError(f"recipe {path}: get_config must return a ConfigDict, got {type(config).__name__}")
    return config


def _split_variant(recipe: str) -> tuple[str, str | None]:
    path, colon, variant = recipe.rpartition(":")
    return (path, variant) if colon and path.endswith(".py") else (recipe, None)


def _recipe_error(path: str, error: BaseException) -> UserError:
    if isinstance(error, SyntaxError) and error.filename == path:
        return UserError(f"recipe {path}, line {error.lineno}: {error.msg}")
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    where = f", line {lines[-1]}" if lines else ""
    return UserError(f"recipe {path}{where}: {raised(error)}")


def _parse(field: Field, text: str) -> Any:
    """A command line's text as the field's type; what is no such value stays text, for `check` to name."""
    if field.kind == "str":
        return text
    if field.kind == "bool":
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    if field.kind in ("ints", "floats"):
        inside = text.strip().removeprefix("(").removesuffix(")").removesuffix(",")
        parts = inside.split(",") if inside else []
        numbers_ = [_parse_number(field.kind.removesuffix("s"), part) for part in parts]
        return text if None in numbers_ else tuple(numbers_)
    number = _parse_number(field.kind, text)
    return text if number is None else number


def _parse_number(kind: str, text: str) -> int | float | None:
    try:
        return _number(kind, int(text, 0))
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return None
    if kind == "int":
        return int(value) if value.is_integer() else None  # 1e3 steps
    return _number(kind, value)


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --config and documents --config.FIELD=VALUE, which `split_overrides` takes out before argparse sees it."""
    parser.add_argument(
        "--config",
        metavar="FILE.py[:VARIANT]",
        required=required,
        help="recipe; any field of it is overridden by --config.FIELD=VALUE, for example "
        "--config.rollout.temperature=0.8 (`python -m balcap_jax.config` lists the fields)",
    )


def parse_command_line(
    argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses `--config=RECIPE --workdir=D --config.a.b=v ...` and loads the configuration.

    Args:
      argv: arguments without the program's name; None = those of this process.
      parser: a command's own parser, with `add_arguments` already applied; None = one with --config and --workdir.

    Returns:
      (checked configuration, the other arguments).

    Raises:
      UserError: a bad recipe, field or argument.
    """
    if parser is None:
        parser = CommandParser()
        add_arguments(parser)
        parser.add_argument(
            "--workdir", type=place, metavar="DIR", required=True, help="where the run is written, and resumed from"
        )
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(rest)
    for argument in unknown:
        name = argument.partition("=")[0].lstrip("-")
        if name in _BY_NAME:
            raise UserError(f"unknown argument {argument}; did you mean --config.{argument.lstrip('-')}?")
        raise UserError(f"unknown argument {argument} (see {parser.prog} --help)")
    return load(args.config, overrides), args


# ---- text form and resuming -----------------------------------------------------------------------------------------


def to_text(config: ConfigDict) -> str:
    """The checked configuration as JSON with sorted keys: equal configurations give equal text."""
    return json_text.dumps(_canonical(config).to_dict(), indent=2, sort_keys=True) + "\n"


def from_text(text: str | bytes, where: str = "the text", remedy: str = "give what `to_text` wrote") -> ConfigDict:
    """The inverse of `to_text`. Fields are not checked, so that an older version's text can still be compared.

    Raises:
      UserError: the text is not that of a configuration; it begins with `where` and ends with `remedy`.
    """
    tree = json_text.parse_object(text, where, remedy)
    try:
        return _build({name: tuple(value) if isinstance(value, list) else value for name, value in leaves(tree)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is not JSON of a configuration ({error}); {remedy}") from error


def differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """What keeps `current` from resuming the run of `saved`: one "field: old -> new" each; empty = it may resume.

    Fields that change neither what is learnt nor how it is evaluated (`Field.resumable`: most of log.*, checkpoint.*,
    reader threads) may differ. The last stage may grow, unless its schedule depends on its length: the steps already
    made would have been others.
    """
    old, new = dict(leaves(saved)), dict(leaves(current))
    last = stage_order(current)[-1]
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name in _BY_NAME and _BY_NAME[name].resumable:
            continue
        if name not in old or name not in new:
            found.append(f"{name}: only in the {'saved' if name in old else 'new'} configuration")
        elif old[name] != new[name] and not _lead_to_one_place(name, old[name], new[name]):
            grows = name == f"stages.{last}.steps" and json_text.is_number(old[name]) and new[name] > old[name]
            if grows and current.stages[last].schedule == "constant":
                continue
            why = " (the cosine schedule depends on it)" if grows else ""
            found.append(f"{name}: {shown(old[name])} -> {shown(new[name])}{why}")
    return found


def _lead_to_one_place(name: str, *paths: Any) -> bool:
    if name not in _BY_NAME or not _BY_NAME[name].is_path or not all(isinstance(path, str) for path in paths):
        return False
    one, other = (path and resolved(path).absolute() for path in paths)
    return one == other


# ---- python -m balcap_jax.config ------------------------------------------------------------------------------------
