"""The configuration of a run: recipes, the command line, and what may change when a run is resumed.

    python -m balcap_jax.config                                                   prints the table
    python -m balcap_jax.config --config=scenes --config.seed=1                   prints the resolved settings

A recipe is a short Python file whose `get_config(variant)` starts from `default_config()` and overrides fields. It is
named by its path, or, where it is one of the project's own, by its name: configs/scenes.py is `scenes` anywhere.
"""

import argparse
import contextlib
import difflib
import functools
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import split_overrides
from balcap_jax.cli.errors import UserError, raised, shown, streams_kept
from balcap_jax.cli.files import read_bytes, resolved
from balcap_jax.config.schema import FIELDS, Config, validated

_LISTED = 8  # members of a group that a message names
_LONGEST_NAME = 200  # names are compared in quadratic time
_LONGEST_RECIPE = 1 << 24  # bytes
_NAME = re.compile(r"(\w+)(?::(.*))?")  # of an own recipe, with a variant

_GROUPS = {name.rsplit(".", depth)[0] for name in FIELDS for depth in range(1, name.count(".") + 1)}
_DEEPEST = max(name.count(".") for name in FIELDS) + 1  # dots of a name that is looked for: a group may hold itself


def default_config() -> ConfigDict:
    """The full configuration with every field at its default; recipes override fields of it."""
    # Not type-safe on purpose: `check` then reports an ill-typed field in our words, with the field's full name.
    return ConfigDict(Config().model_dump(), type_safe=False)


def leaves(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf; an empty unknown group counts as a leaf, so that it is reported."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        group = isinstance(value, Mapping | ConfigDict) and name not in FIELDS and name.count(".") < _DEEPEST
        if group and (len(value) or name in _GROUPS):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def _tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    tree = {}
    for name, value in values.items():
        *groups, leaf = name.split(".")
        functools.reduce(lambda group, member: group.setdefault(member, {}), groups, tree)[leaf] = value
    return tree


def stage_order(config: ConfigDict) -> tuple[str, ...]:
    """Stages to run, in order."""
    return tuple(part.strip() for part in config.stages.order.split(","))


def check(config: ConfigDict, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Checks names, types, ranges and what fields demand of each other; returns the configuration, locked.

    Raises:
      UserError: one line that names the field, what it must be and what it was.
    """
    values, overrides = dict(leaves(config)), overrides or {}
    for name, value in (values | overrides).items():
        if name not in FIELDS:
            raise _unknown(name, value)
    if missing := [name for name in FIELDS if name not in values]:
        raise UserError(f"config field {missing[0]!r} is missing; a recipe starts from config.default_config()")
    parsed = {name: _parse(FIELDS[name].kind, text) for name, text in overrides.items()}
    config = validated(Config, _tree(values | parsed))
    return ConfigDict(config.model_dump(), type_safe=False).lock()


def _unknown(name: str, value: Any) -> UserError:
    if name in _GROUPS:
        below = [known.removeprefix(f"{name}.") for known in FIELDS if known.startswith(f"{name}.")]
        members = list(dict.fromkeys(member.partition(".")[0] for member in below))
        more = f" and {len(members) - _LISTED} more" if len(members) > _LISTED else ""
        listed = ", ".join(members[:_LISTED]) + more
        return UserError(f"config field {name!r} is a group ({listed}), it can't be set to {shown(value)}")
    near = _nearest(name) if len(name) <= _LONGEST_NAME else None
    hint = f"did you mean {near!r}?" if near else "`python -m balcap_jax.config` lists all fields"
    return UserError(f"unknown config field {name!r}; {hint}")


def _nearest(name: str) -> str | None:
    """The field most like `name`, by the whole name or by its last part alone; None if none is alike."""

    def likeness(field: str) -> tuple[float, float]:
        pairs = ((name, field), (name.rpartition(".")[2], field.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last), whole

    best = max(FIELDS, key=likeness)
    return best if likeness(best)[0] >= 0.6 else None  # difflib's own ratio of a misspelling


def own_files() -> dict[str, Path]:
    """{name: file} of the project's own recipes, and of vlm, which several of them import.

    An installed package holds them in its folder `configs`, which is made from that of the repository.
    """
    package = Path(__file__).resolve().parents[1]
    folder = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.parent != package}


def split_recipe(recipe: str) -> tuple[str, str | None]:
    """(path, variant) of `PATH.py:VARIANT` or `NAME:VARIANT`; None where no variant is given.

    A file or folder in the current directory never hides a recipe of the project.

    Raises:
      UserError: it looks like a name, and no recipe of the project has it.
    """
    path, colon, variant = recipe.rpartition(":")
    if colon and path.endswith(".py"):
        return path, variant
    if not (name := _NAME.fullmatch(recipe)):
        return recipe, None
    own = own_files()
    if name[1] in own:
        return str(own[name[1]]), name[2]
    if os.path.isfile(recipe):
        return recipe, None
    known = own_recipes()
    near = difflib.get_close_matches(name[1], known, 1) if len(name[1]) <= _LONGEST_NAME else []
    hint, names = f" (did you mean {near[0]}?)" if near else "", ", ".join(known) or "none here"
    raise UserError(f"there is no recipe {shown(name[1])}{hint}; give the path of a Python file, or one of: {names}")


def own_recipes() -> list[str]:
    """Names that --config takes."""
    return [name for name, path in own_files().items() if "\ndef get_config(" in path.read_text(encoding="utf-8")]


def load(recipe: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Runs a recipe, applies overrides and checks the result.

    Args:
      recipe: path of a Python file or name of an own recipe, with ":variant" for `get_config("variant")`.
      overrides: dotted field name -> text, as in `--config.rollout.buckets=64,96`.

    Raises:
      UserError: the recipe is missing or fails, or `check` fails.
    """
    path, variant = split_recipe(recipe)
    # What is in the ConfigDict is the recipe's code too, until every value has its type.
    with _running(path):
        return check(_run_recipe(path, variant), overrides)


def take_judge(argv: Sequence[str] | None) -> tuple[list[str], ConfigDict]:
    """Takes `--judge.FIELD=VALUE` out of the command line of a command that has no recipe (None = this process's).

    Returns:
      (the other arguments, the checked group `judge` of a remote one).

    Raises:
      UserError: a bad field or value.
    """
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv, "--judge.")
    config = default_config()
    config.judge.name = "remote"
    judge = check(config, {f"judge.{name}": text for name, text in overrides.items()}).judge
    if not judge.endpoints:
        raise UserError("config field 'judge.endpoints' is empty; give the URL of a server, --judge.endpoints=URL")
    return rest, judge


@contextlib.contextmanager
def _running(path: str) -> Iterator[None]:
    """The surroundings of a recipe's code.

    Whatever it raises becomes a UserError, SystemExit too: no recipe ends a command well. It may import modules beside
    it, behind all others: no byte code stays there, and no module for the next recipe.
    """
    folder, loaded, writes_none = os.path.dirname(os.path.abspath(path)), set(sys.modules), sys.dont_write_bytecode
    is_added = folder not in sys.path
    sys.path += [folder] * is_added
    sys.dont_write_bytecode = True
    try:
        with streams_kept():
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if isinstance(error, SyntaxError) and error.filename == path:
            raise UserError(f"recipe {path}, line {error.lineno}: {error.msg}") from error
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
        where = f", line {lines[-1]}" if lines else ""
        hint = "; modules of a recipe, such as vlm.py, lie beside it" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"recipe {path}{where}: {raised(error)}{hint}") from error
    finally:
        sys.dont_write_bytecode = writes_none
        if is_added and folder in sys.path:
            sys.path.remove(folder)
            sys.path_importer_cache.pop(folder, None)  # It knows the files of now, and there may be others later.
        for name in set(sys.modules) - loaded:
            if is_added and os.path.dirname(getattr(sys.modules[name], "__file__", None) or "") == folder:
                del sys.modules[name]


def _run_recipe(path: str, variant: str | None) -> ConfigDict:
    try:
        source = read_bytes(path, _LONGEST_RECIPE).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"recipe {path}: {reason}; --config takes a Python file or a name such as scenes") from error
    # Executed rather than imported: no byte code is left beside the recipe, and two recipes may share a file name.
    module = types.ModuleType("recipe")
    module.__file__ = path
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        hint = "`python -m balcap_jax.config --source=forkme` prints one to copy"
        raise UserError(f"recipe {path} has no function get_config; {hint}")
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


def _parse(kind: str, text: str) -> Any:
    """A command line's text as a value of a field's kind; what is no such value stays text, for `check` to name."""
    if kind == "bool":
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    if kind in ("ints", "floats"):
        inside = text.strip().removeprefix("(").removesuffix(")").removesuffix(",")
        entries = tuple(_parse(kind.removesuffix("s"), part) for part in inside.split(",")) if inside else ()
        return text if any(isinstance(entry, str) for entry in entries) else entries
    if kind == "str":
        return text
    value = None
    with contextlib.suppress(ValueError):
        value = float(text)
        value = int(value) if value.is_integer() else value  # 1e3 steps
    with contextlib.suppress(ValueError):
        value = int(text, 0)
    if kind == "float":
        return float(value) if json_text.is_number(value) else text
    return value if isinstance(value, int) else text


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --config and documents --config.FIELD=VALUE, which `split_overrides` takes out before argparse sees it."""
    parser.add_argument(
        "--config",
        metavar="RECIPE[:VARIANT]",
        required=required,
        help="a recipe of the project by name, or a Python file; any field of it is overridden by "
        "--config.FIELD=VALUE, for example --config.rollout.temperature=0.8 (`python -m balcap_jax.config` lists "
        "the fields)",
    )


def parse_command_line(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[ConfigDict, argparse.Namespace]:
    """Parses `--config=RECIPE --config.a.b=v ...` and loads the configuration.

    Args:
      argv: arguments without the program's name.
      parser: a command's own parser, with `add_arguments` already applied.

    Returns:
      (checked configuration, the other arguments).

    Raises:
      UserError: a bad recipe, field or argument.
    """
    rest, overrides = split_overrides(argv)
    args, unknown = parser.parse_known_args(rest)
    for argument in unknown:
        name = argument.partition("=")[0].lstrip("-")
        if name in FIELDS:
            raise UserError(f"unknown argument {argument}; did you mean --config.{argument.lstrip('-')}?")
        raise UserError(f"unknown argument {argument} (see {parser.prog} --help)")
    return load(args.config, overrides), args


def to_text(config: ConfigDict) -> str:
    """The checked configuration as JSON with sorted keys: equal configurations give equal text."""
    return json_text.dumps(check(config).to_dict(), indent=2, sort_keys=True) + "\n"


def from_text(text: str | bytes, where: str = "the text", remedy: str = "give what `to_text` wrote") -> ConfigDict:
    """The inverse of `to_text`. Fields are not checked, so that an older version's text can still be compared.

    Raises:
      UserError: the text is not that of a configuration; it begins with `where` and ends with `remedy`.
    """
    tree = json_text.parse_object(text, where, remedy)
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in leaves(tree)}
        return ConfigDict(_tree(values), type_safe=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is not JSON of a configuration ({error}); {remedy}") from error


def differences(saved: ConfigDict, current: ConfigDict) -> list[str]:
    """What keeps `current` from resuming the run of `saved`: one "field: old -> new" each; empty = it may resume.

    Fields that change neither what is learnt nor how it is evaluated may differ (`Setting.resumable`: most of log.*,
    checkpoint.*, reader threads, how a rollout fits the devices). The last stage may grow, unless its schedule depends
    on its length: the steps already made would have been others.
    """
    old, new = dict(leaves(saved)), dict(leaves(current))
    last = stage_order(current)[-1]
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if name in FIELDS and FIELDS[name].resumable:
            continue
        if name not in old or name not in new:
            changes.append(f"{name}: only in the {'saved' if name in old else 'new'} configuration")
        elif old[name] != new[name] and not _lead_to_one_place(name, old[name], new[name]):
            grows = name == f"stages.{last}.steps" and json_text.is_number(old[name]) and new[name] > old[name]
            if grows and current.stages[last].schedule == "constant":
                continue
            why = " (the cosine schedule depends on it)" if grows else ""
            changes.append(f"{name}: {shown(old[name])} -> {shown(new[name])}{why}")
    return changes


def _lead_to_one_place(name: str, *paths: Any) -> bool:
    if name not in FIELDS or not FIELDS[name].is_path or not all(isinstance(path, str) for path in paths):
        return False
    return len({path and resolved(path).absolute() for path in paths}) == 1
