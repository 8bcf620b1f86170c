"""The one error type that a user is meant to read, and how every command ends: on it, on Ctrl-C, on a full disk."""

import contextlib
import errno
import functools
import gc
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from balcap_jax import memory

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells count it: 128 + SIGINT."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 2000  # characters of a message
_LONGEST_VALUE = 200


class UserError(Exception):
    """Bad input or a bad environment: one line that says what was wrong, where, and what to do.

    What a message quotes cannot break it: control characters are spelt out, and the middle of a long text is left out.
    """

    def __str__(self) -> str:
        text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], super().__str__())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} ... {text[-500:]}"


def shown(value: Any, form: Callable[[Any], str] = repr) -> str:
    """A value of any kind as a message quotes it: its `form` on one line, cut; of one that has none, its type."""
    try:
        text = re.sub(r"\s*\n\s*", " ", form(value)).strip()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # An integer of too many digits, or whatever a user's own class raises.
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def raised(error: BaseException) -> str:
    """What a user's own code raised, as a message quotes it: "KeyError: 'reference'"."""
    message = shown(error, str)
    return f"{type(error).__name__}{f': {message}' if message else ''}"


@contextlib.contextmanager
def streams_kept() -> Iterator[None]:
    """Stdout and stderr are afterwards those of before, open, whatever a user's own code inside does to them."""
    kept = {"stdout": (1, sys.stdout), "stderr": (2, sys.stderr)}
    try:
        yield
    finally:
        for name, (descriptor, stream) in kept.items():
            try:
                is_lost = getattr(stream, "closed", False)
            except ValueError:  # Detached.
                is_lost = True
            if is_lost:  # Python leaves the descriptor open.
                encoding = getattr(stream, "encoding", None)
                stream = open(descriptor, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def exit_on_user_error(main: Callable) -> Callable:
    """Wraps a command: a UserError, a disk that fails, too little memory or Ctrl-C becomes one line on stderr.

    The exit status is 2, or INTERRUPTED.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        _freeze_once()
        if signal.getsignal(signal.SIGINT) is _end_now:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # Paths of files need not be UTF-8.
        if sys.stdout is None:  # Closed by who started the command.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except UserError as error:
            end(str(error))
        except KeyboardInterrupt:
            _say("interrupted")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # The reader has left (`... | head`).
            _discard_output()
            sys.exit(1)
        except (OSError, MemoryError, RuntimeError) as error:
            if memory.is_too_little(error):
                end(memory.TOO_LITTLE)
            if not isinstance(error, OSError) or not error.strerror:
                raise
            if error.errno == errno.ENOSPC and _cannot_print():
                _discard_output()
                end(f"cannot write what this command prints: {error.strerror}; make room and run it again")
            end(f"{_where(error)}: {error.strerror}; mend that and run the same command again")

    return wrapped


def _where(error: OSError) -> str:
    """The file that the system refuses, or, as fsync and write do not name it, our line that worked with it."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if names:
        return " -> ".join(names)
    frame = [frame for frame in traceback.extract_tb(error.__traceback__) if "balcap_jax" in frame.filename][-1]
    return f"{os.path.basename(frame.filename)}, line {frame.lineno} ({frame.line})"


def end(reason: str) -> NoReturn:
    """Ends the command with one line, whatever a name or a message in it holds; exit status 2."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in reason)
    _say(f"error: {line}")
    sys.exit(2)


def _say(line: str) -> None:
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # None, or closed.
        sys.stderr = None  # Python would fail to flush one without a buffer at exit.
        if sys.__stderr__ is not None:  # Otherwise descriptor 2 may be that of another file.
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def _cannot_print() -> bool:
    """Whether it is stdout that has no room; an error of write() does not name its file."""
    try:
        print(flush=True)  # Without a buffer, a flush alone has nothing to fail on.
    except OSError:
        return True
    return False


def _discard_output() -> None:
    """Sends the rest of stdout nowhere: Python would complain once more when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache
def _freeze_once() -> None:
    """Takes what the imports have made out of garbage collection for good.

    It stays to the end anyway, and to walk it each time is a tenth of the CPU time of a run of a few steps.
    """
    gc.freeze()


def end_quietly_while_importing() -> None:
    """Makes Ctrl-C end this process with one line until a command begins: its imports take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ignored by the parent: a background job.
        signal.signal(signal.SIGINT, _end_now)


def _end_now(number: int, frame: object) -> None:
    # An exception would end up wherever the import stands, some of which swallow or print it.
    del number, frame
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
