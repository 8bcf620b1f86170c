"""The error type whose message is for users, and the quoting of values and of other errors in such messages."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 2000  # characters of a message
_LONGEST_VALUE = 200


class UserError(Exception):
    """Bad input or a bad environment: one line that says what was wrong, where, and what to do.

    No quoted text can break the line: control characters are spelt out, and the middle of a long text is left out.
    """

    def __str__(self) -> str:
        text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], super().__str__())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} ... {text[-500:]}"


def shown(value: Any, form: Callable[[Any], str] = repr) -> str:
    """A value of any kind for a message: its `form` on one line, cut; its type where it has no `form`."""
    try:
        text = re.sub(r"\s*\n\s*", " ", form(value)).strip()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # An integer of too many digits, or whatever a user's own class raises.
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def raised(error: BaseException) -> str:
    """An error of a user's own code for a message: "KeyError: 'reference'"."""
    message = shown(error, str)
    return f"{type(error).__name__}{f': {message}' if message else ''}"


@contextlib.contextmanager
def streams_kept() -> Iterator[None]:
    """Restores stdout and stderr afterwards, open, whatever a user's own code inside does to them."""
    streams = {"stdout": (1, sys.stdout), "stderr": (2, sys.stderr)}
    try:
        yield
    finally:
        for name, (descriptor, stream) in streams.items():
            try:
                is_lost = getattr(stream, "closed", False)
            except ValueError:  # Detached.
                is_lost = True
            if is_lost:  # Python leaves the descriptor open.
                encoding = getattr(stream, "encoding", None)
                stream = open(descriptor, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
