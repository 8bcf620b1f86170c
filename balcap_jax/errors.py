"""The one error type that a user is meant to read, and how every command ends on it, on Ctrl-C and on a closed pipe."""

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells count it: 128 + SIGINT."""


class UserError(Exception):
    """Bad input or a bad environment: one line that says what was wrong, where, and what to do."""


def exit_on_user_error(main: Callable) -> Callable:
    """Wraps a command: a UserError or Ctrl-C becomes one line on stderr, and exit status 2 or INTERRUPTED."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        _freeze_once()
        if signal.getsignal(signal.SIGINT) is _end_now:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # Paths of files need not be UTF-8.
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader has left (`... | head`). Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return wrapped


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
