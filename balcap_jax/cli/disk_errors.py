"""What a failing disk makes Orbax and TensorStore say and leave, as one reason, and paths that both accept."""

import atexit
import functools
import re
import shutil
import tempfile
import time
from pathlib import Path

from balcap_jax.cli.errors import UserError


def reason_of(error: BaseException) -> str:
    """The cause in a few words, out of TensorStore's "STATUS: what: file: ...: cause [details]" among others."""
    if isinstance(error, UserError):  # Of a bucket.
        return str(error)
    if "No space left" in str(error):
        return "no space left on the disk"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    clauses = re.sub(r"\s*\[.*", "", str(error), flags=re.DOTALL).split(": ")
    if len(clauses) > 1 and clauses[0].isupper():
        return f"{clauses[0]}: {clauses[-1]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def remove_unfinished(directory: Path, quiet: float = 0.1, patience: float = 3.0) -> None:
    """Deletes a directory that a failed save has left behind, as far as the disk lets it.

    TensorStore's other writes go on after the first one has failed, and make their directories again. So this repeats
    until the directory has stayed away for `quiet` seconds, or `patience` seconds are over.
    """
    deadline = time.monotonic() + patience
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(quiet)
        if not directory.exists() or time.monotonic() > deadline:
            return


def for_tensorstore(directory: Path) -> Path:
    r"""An absolute path to `directory` whose parents have names that TensorStore accepts.

    TensorStore takes a\b for a/b, and refuses names that end in .__lock or are no UTF-8. A link avoids them.
    """
    directory = directory.absolute()
    return _reached(directory.parent) / directory.name


@functools.cache
def _reached(folder: Path) -> Path:
    try:
        text = str(folder.relative_to(folder.anchor))
        text.encode()
        if "\\" not in text and not any(part.endswith(".__lock") for part in folder.parts):
            return folder
    except UnicodeEncodeError:
        pass
    link = Path(tempfile.mkdtemp(prefix="balcap-link-"), "to")
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    link.symlink_to(folder)
    return link
