"""What a command does to its process: signals, garbage collection, output of libraries, memory limits, and its end.

`prepare_import`, `install` and `on_abort` make every change that lasts, and only commands call them. A program that
imports the package keeps its signal handlers, hooks, filters and environment.
"""

import contextlib
import ctypes
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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError

INTERRUPTED = 130  # Exit status after Ctrl-C, as shells count it: 128 + SIGINT.
TOO_LITTLE = (
    "there is too little memory for this; free some, raise the limit that is set (ulimit, or a container's), or lower "
    "sizes such as those of batches"
)


def exit_on_user_error(main: Callable | None = None, *, resumes: bool = False) -> Callable:
    """Wraps a command: a UserError, a disk that fails, too little memory or Ctrl-C becomes one line on stderr.

    The exit status is 2, or INTERRUPTED. `install` is called first. After Ctrl-C a command that `resumes` says so.
    """
    if main is None:
        return functools.partial(exit_on_user_error, resumes=resumes)

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        install()
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except UserError as error:
            end(str(error))
        except KeyboardInterrupt:
            _say("stopped; the same command goes on from here" if resumes else "interrupted")
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


# ---- changes of the process ------------------------------------------------------------------------------------------


def prepare_import(command: str = "") -> None:
    """Prepares for the imports of a command, which take seconds: Ctrl-C ends them with one line.

    Ends the process where a limit leaves too little memory for the command: the imports alone may be too much.
    command: its name; "" = the NAME of `python -m balcap_jax.NAME`.
    """
    # Without PyTorch, which is no dependency, transformers tells every user of every command that models are missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # See `quieten_libraries`.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ignored by the parent: a background job.
        signal.signal(signal.SIGINT, _end_now)
    modules = [name.removeprefix("-m") for name in sys.orig_argv if name.startswith(("balcap_jax.", "-mbalcap_jax."))]
    command = command or (modules[0].removeprefix("balcap_jax.") if modules else "")
    if problem := memory_problem(command):
        end(problem)


def install() -> None:
    """Makes the changes that last as long as a command. A second call changes nothing more."""
    if not gc.get_freeze_count():
        # What the imports have made stays to the end. To walk it each time is a tenth of the CPU time of a short run.
        gc.freeze()
    if signal.getsignal(signal.SIGINT) is _end_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # Paths of files need not be UTF-8.
    if sys.stdout is None:  # Closed by who started the command.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    quieten_libraries()


def quieten_libraries() -> None:
    """Drops what libraries print of failures that the caller reports, and of what is meant to be so.

    After the first array that can't be read or written, TensorStore's other tasks never begin, or end on an event loop
    that is gone. They do so at any time, also before the caller knows. Each of them is a traceback or a warning.
    """
    import absl.logging  # noqa: F401 - before getLogger: it makes a logger of a class of its own, where there is none.

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)  # Adding it twice is the same as once.
    # It warns of what our own checks report, such as odd fields of a model's config.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # Else one line per request, where logging is on.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    # Pillow warns of what `data.images` raises, and of damage beside the pixels. Readers are threads: once for all.
    warnings.filterwarnings("ignore", module="PIL")
    previous_hook = sys.unraisablehook
    if getattr(previous_hook, "drops_stragglers", False):
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    hook.drops_stragglers = True
    sys.unraisablehook = hook


@contextlib.contextmanager
def errors_only(library: str) -> Iterator[None]:
    """The library logs nothing but errors inside the block."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says more than the command does. Orbax, TensorStore and TFDS log through absl and asyncio.

    Orbax's threads and TensorStore's tasks log a traceback of each failure that reaches the user as one line. TFDS
    warns of what is meant to be so: a config of ours, a directory not there yet, no OpenCV.
    """
    if str(record.msg).startswith(("Using custom data configuration", "Variant folder", "OpenCV is not installed")):
        return False
    # asyncio's records are of its own file; the message or the traceback tells whose task failed.
    texts = [record.pathname, record.getMessage()]
    if record.exc_info:
        texts += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
    signs = (f"{os.sep}orbax{os.sep}", "tensorstore_spec", " local file ")  # The last two are TensorStore's words.
    return not any(sign in text for text in texts for sign in signs)


def on_abort(last_line: Callable[[], str]) -> None:
    """Makes abort() in this process, as native code calls it, write `last_line()` to stderr and exit with status 1.

    Python's signal handlers never run in a process that aborts, hence one of libc.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_: int) -> None:
        os.write(sys.__stderr__.fileno(), last_line().encode())
        os._exit(1)

    on_abort.handler = handler  # It must outlive this call.
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _end_now(number: int, frame: object) -> None:
    # An exception would end up wherever the import stands, some of which swallow or print it.
    del number, frame
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


# ---- memory ----------------------------------------------------------------------------------------------------------

_SIGNS = ("RESOURCE_EXHAUSTED", "can't start new thread", "Cannot allocate memory", "std::bad_alloc")

# GB of address space that the smallest run of a command takes, beside those of each core's threads: VmPeak with jax
# 0.10 on 2 cores was 3.0 for train, 2.4 for caption, 2.2 for convert; about half of it was data.
_LEAST_MEMORY = {"train": 2.8, "ablate": 2.8, "aot": 2.8, "caption": 2.2, "convert": 2.0}
_PER_CORE = 0.1
_LIMITS = (("address space (ulimit -v)", resource.RLIMIT_AS, 1.0), ("data (ulimit -d)", resource.RLIMIT_DATA, 0.55))


def memory_problem(command: str) -> str | None:
    """One line about a limit that is too low for the command; None where every limit is high enough.

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


# ---- the end of a command --------------------------------------------------------------------------------------------


def _where(error: OSError) -> str:
    """The file that the system refuses, or, as fsync and write do not name it, our line that worked with it."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if names:
        return " -> ".join(names)
    frame = [frame for frame in traceback.extract_tb(error.__traceback__) if "balcap_jax" in frame.filename][-1]
    return f"{os.path.basename(frame.filename)}, line {frame.lineno} ({frame.line})"


def end(reason: str) -> NoReturn:
    """Ends the command with one line, whatever a name or a message in it holds; exit status 2."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown(reason))
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
    """Whether stdout has no room; an error of write() does not name its file."""
    try:
        print(flush=True)  # Without a buffer, a flush alone has nothing to fail on.
    except OSError:
        return True
    return False


def _discard_output() -> None:
    """Discards the rest of stdout: Python would complain once more when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
