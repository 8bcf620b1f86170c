"""Command lines: the parser that every command uses, types of arguments, and overrides of config fields."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved

OVERRIDE = "--config."


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors: one line, exit status 2 through `exit_on_user_error`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def called(command: str) -> str:
    """How a command is called in this process: `balcap train`, or `python -m balcap_jax.train`."""
    return f"balcap {command}" if sys.argv[:1] == ["balcap"] else f"python -m balcap_jax.{command}"


def split_overrides(argv: Sequence[str], prefix: str = OVERRIDE) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.FIELD=VALUE` and `--config.FIELD VALUE` out of a command line; both begin with `prefix`.

    Returns:
      (other arguments, {FIELD: VALUE}); the last value of a repeated field wins.
    """
    rest, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(prefix):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix(prefix).partition("=")
        if not equals:
            value = next(arguments, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
        overrides[name] = value
    return rest, overrides


def positive(text: str, below: float, what: str) -> float:
    """A number between 0 and `below`; the error says that it takes `what`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < below:
        raise argparse.ArgumentTypeError(f"it takes {what}, got {text!r}")
    return value


def seconds(text: str) -> float:
    """A positive number of seconds."""
    return positive(text, 1e6, "a number of seconds")


def place(text: str) -> str:
    """A path, `resolved`. An empty one, as of a shell variable that is not set, would be the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it names no file or directory")
    try:
        return str(resolved(text, "it"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def disk_place(text: str) -> str:
    """A `place` that is in no bucket."""
    path = place(text)
    try:
        storage.refuse(path, "it")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def output_file(text: str) -> str:
    """A `place` where a file can be written, so that hours of work do not end without one; folders may be missing."""
    path = Path(disk_place(text))
    folder = next((folder for folder in path.absolute().parents if folder.exists()), path)
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"no file can be written at {text}; name one in a folder that is yours")
    return str(path)
