"""Paths as users give them, and as TensorStore takes them."""

import atexit
import functools
import os
import re
import shutil
import tempfile
from pathlib import Path

from balcap_jax.errors import UserError

_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:/")  # With one slash too: it is what pathlib makes of two.
_SHOWN = 80  # characters of a path in a message


def resolved(path: str | os.PathLike, what: str = "the path") -> Path:
    """The path without `~`, `.`, `..`, and doubled or trailing slashes, which TensorStore refuses.

    `..` goes up from where a link leads, as the system does, and makes the path absolute. All else stays as it is: a
    relative path, and links, whose names say more than those of what they lead to.

    Raises:
      UserError: it is a URL, of no user's home, or no name that a disk can have; the line begins with `what`.
    """
    text = os.fspath(path)
    given = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    if _URL.match(text):
        raise UserError(
            f"{what} is a URL, and files are read and written on mounted disks only, got {given}; mount it and give "
            "the path there (a folder of that name is ./...)"
        )
    if "\0" in text:
        raise UserError(f"{what} holds a character 0, which no name has, got {given}")
    text = os.path.expanduser(text)
    if text.startswith("~"):
        raise UserError(
            f"{what} names the home of a user that does not exist, got {given}; a name that begins with ~ is ./~..."
        )
    found = Path()
    for part in Path(re.sub("/+", "/", text)).parts:
        found = Path(os.path.realpath(found)).parent if part == ".." else found / part
    try:
        os.lstat(found)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # Whether it must be there is the reader's to say.
    except OSError as error:  # A name that is too long, links in a circle.
        raise UserError(f"{what} cannot be a file ({error.strerror}), got {given}") from error
    return found


def for_tensorstore(directory: Path) -> Path:
    r"""An absolute path that leads to `directory`, of whose parent TensorStore takes every name.

    It takes a\b for a/b, and refuses names that end in .__lock and those that are no UTF-8; a link goes around them.
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
