"""What Orbax and TensorStore say and leave when a disk fails: the reason in a few words, and nothing beside it."""

import logging
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any


def reason_of(error: BaseException) -> str:
    """The cause in a few words, out of TensorStore's "STATUS: what: file: ...: cause [details]" among others."""
    if "No space left" in str(error):
        return "no space left on the disk"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    clauses = re.sub(r"\s*\[.*", "", str(error), flags=re.DOTALL).split(": ")
    if len(clauses) > 1 and clauses[0].isupper():
        return f"{clauses[0]}: {clauses[-1]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


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


def remove_unfinished(directory: Path, quiet: float = 0.1, patience: float = 3.0) -> None:
    """Deletes a directory that a failed save has left behind, as far as the disk lets it.

    TensorStore's other writes go on after the first one has failed, and make their directories anew: it is deleted
    until it has stayed away for `quiet` seconds, or `patience` seconds are over.
    """
    deadline = time.monotonic() + patience
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(quiet)
        if not directory.exists() or time.monotonic() > deadline:
            return
