"""Types of command line arguments that several commands take."""

import argparse

from balcap_jax.errors import UserError
from balcap_jax.paths import resolved


def place(text: str) -> str:
    """A path, `resolved`. An empty one, such as of a shell variable that is not set, would be the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it names no file or directory")
    try:
        return str(resolved(text, "it"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
