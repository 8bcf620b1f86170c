"""What a command does to its process: how it ends, signals, garbage collection, libraries' output, memory limits."""

import contextlib
import errno
import functools
import gc
import logging
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from balcap_jax.cli.errors import UserError

INTERRUPTED = 130

"""Exit status after Ctrl-C, as shells count it: 128 + SIGINT."""
TOO_LITTLE = (
    "there is too little memory for this; free some, raise the limit that is set (ulimit, or a container's), or lower "
    "sizes such as those of batches"
)


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
            if is_out_of_memory(error):
                end(TOO_LITTLE)
            if not isinstance(error, OSError) or not error.strerror:
                raise
            if error.errno == errno.ENOSPC and _cannot_print():
                _discard_output()
                end(f"cannot write what this command prints: {error.strerror}; make room and run it again")
            end(f"{_where(error)}: {error.strerror}; mend that and run the same command again")

    return wrapped


_SIGNS = ("RESOURCE_EXHAUSTED", "can't start new thread", "Cannot allocate memory", "std::bad_alloc")

# GB of address space that the smallest run of a command takes, beside those of each core's threads: VmPeak with jax
# 0.10 on 2 cores was 3.0 for train, 2.4 for caption, 2.2 for convert; about half of it was data.
_LEAST_MEMORY = {"train": 2.8, "ablate": 2.8, "aot": 2.8, "caption": 2.2, "convert": 2.0}
_PER_CORE = 0.1
_LIMITS = (("address space (ulimit -v)", resource.RLIMIT_AS, 1.0), ("data (ulimit -d)", resource.RLIMIT_DATA, 0.55))


def memory_problem(command: str) -> str | None:
    """One line about a limit that the command cannot live with; None where there is none.

    Where no thread can be started, JAX and array_record wait for ever, or crash, and no error can be caught.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for what, kind, share in _LIMITS:
        limit = resource.getrlimit(kind)[0]
        least = (_LEAST_MEMORY.get(command, 0) + _PER_CORE * cores) * share * 1e9
        if command in _LEAST_MEMORY and limit != resource.RLIM_INFINITY and limit < least:
            return (
                f"this process is limited to {limit / 1e9:.2f} GB of {what}, and {command} takes at least "
                f"{least / 1e9:.2f} GB on {cores} cores; raise the limit"
            )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, XLA or the system says that there is no memory, or no room for another thread."""
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))
    )


class PreemptionFlag:
    """Notes SIGTERM and the first SIGINT, so that a run can finish its step, save and exit 0.

    Use it in a `with` block in the main thread and look at `requested`, or at the signal's `number`, after each step. A
    second SIGINT interrupts at once (KeyboardInterrupt). The handlers from before are back after the block.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.number != 0

    @property
    def signal_name(self) -> str | None:
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> "PreemptionFlag":
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # Ignored by the parent: a shell's background job.
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _: object) -> None:
        self.number = int(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _DropRepeated(logging.Filter):
    """Orbax's threads and TensorStore's tasks log a traceback of each failure that reaches the user as one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        # asyncio's records are of its own file; whose task failed is told by the message or by the traceback.
        files = [record.pathname, record.getMessage()]
        if record.exc_info:
            files += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
        signs = (f"{os.sep}orbax{os.sep}", "tensorstore_spec", " local file ")  # The last two are TensorStore's words.
        return not any(sign in file for file in files for sign in signs)


_drop_repeated = _DropRepeated()


def quieten_orbax() -> None:
    """Drops what Orbax, asyncio and TensorStore print of failures that the caller reports.

    After the first array that can't be read or written, TensorStore's other ones end on an event loop that is gone, at
    any time, also before the caller knows, or never begin: each is a traceback or a warning.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_drop_repeated)  # Adding it twice is the same as once.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook
    if getattr(before, "drops_stragglers", False):
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    hook.drops_stragglers = True
    sys.unraisablehook = hook


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
