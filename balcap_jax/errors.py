"""The one error type that a user is meant to read, and how every command ends on it."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or a bad environment: one line that says what was wrong, where, and what to do."""


def exit_on_user_error(main: Callable) -> Callable:
    """Wraps a command: a UserError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
