"""Files that a user names, read where they are files: a named pipe would block, and a device may never end."""

import errno
import os
import stat
from collections.abc import Iterator
from typing import IO

LONGEST = 1 << 31  # bytes of a file that is read whole
_LONGEST_LINE = 1 << 26  # bytes: a line may hold pictures


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file to read its bytes. Raises OSError as `open` does, and for anything that is no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "no regular file", os.fspath(path))


def read(path: str | os.PathLike, longest: int = LONGEST) -> bytes:
    """The content of a regular file. Raises OSError, also where it has more than `longest` bytes."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > longest:
            raise OSError(errno.EFBIG, f"{size:,} bytes are more than the {longest:,} that can be meant")
        return file.read()


def read_lines(path: str | os.PathLike) -> Iterator[bytes]:
    """The lines of a regular file, with their ends. Raises OSError, also for a line that no memory would hold."""
    with open_regular(path) as file:
        yield from lines_of(file)


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """As `read_lines`, of an open file."""
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise OSError(errno.EFBIG, f"a line has more than {_LONGEST_LINE >> 20} MiB")
        yield line
