"""Files that outlive a power cut, and sums by which a directory that does not is told from a whole one.

What is written is on disk only once it is synced, and so is a new name: the directory that holds it must be synced.
"""

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG

from balcap_jax import json_text, regular_files

SUMS = "sums.json"
_PIECE_BYTES = 4 * 2**20
_READERS = 8  # threads; zlib lets go of the interpreter's lock
# Some network disks have nothing to sync in a directory, and say so.
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def sync(path: Path) -> None:
    """Returns when a file's content, or a directory's names, are on disk. Raises OSError as the disk does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """`sync` of all files and directories below `directory`, and of itself."""
    for path in _files(directory):
        sync(path)
    _sync_directories(directory)


def make_directory(path: Path) -> None:
    """`path.mkdir(parents=True, exist_ok=True)`, on disk when it returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whatever happens meanwhile; it is on disk when this returns.

    Raises OSError as the disk does, and leaves nothing behind then.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def rename(path: Path, target: Path) -> None:
    """Gives a directory that is on disk another name beside the old one, on disk when this returns."""
    path.rename(target)
    sync(target.parent)


# ---- sums -----------------------------------------------------------------------------------------------------------


def seal(directory: Path) -> None:
    """Puts all of `directory` on disk, with the size and CRC-32 of each file below it in `sums.json`.

    What was sealed before in a directory below it is not read again.
    """
    sums = {}
    for inner in directory.glob(f"*/**/{SUMS}"):
        folder = inner.parent.relative_to(directory)
        sums |= {str(folder / name): found for name, found in json.loads(inner.read_bytes()).items()}
    names = {str(path.relative_to(directory)) for path in _files(directory)} - {SUMS, *sums}
    with ThreadPoolExecutor(_READERS) as pool:
        sums |= zip(names, pool.map(lambda name: _synced_sum(directory / name), names), strict=True)
    _sync_directories(directory)
    replace_file(directory / SUMS, json_text.dumps(sums, indent=0).encode())


def damage(directory: Path, *, content: bool = True, share: tuple[int, int] = (0, 1)) -> str:
    """What is not as `seal` found it, in a few words; "" where all is.

    Args:
      content: compare the CRC-32 too, for which each file is read.
      share: (i, n) looks at the i-th of n parts of the files.

    Raises OSError where that cannot be told: a file is there and cannot be read.
    """
    try:
        if not S_ISREG((directory / SUMS).stat().st_mode):
            return f"{SUMS} is no file"
        sums = json_text.decode(regular_files.read(directory / SUMS))
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        return f"{SUMS} is missing"
    except ValueError:
        return f"{SUMS} is damaged"
    if not (isinstance(sums, Mapping) and sums and all(_is_inside(n) and _is_sum(v) for n, v in sums.items())):
        return f"{SUMS} is damaged"
    first, step = share
    mine = sorted(sums)[first::step]
    with ThreadPoolExecutor(_READERS) as pool:
        each = pool.map if content else map
        found = each(lambda name: _difference(directory / name, *sums[name], content=content), mine)
        return next((f"{name} {what}" for name, what in zip(mine, found, strict=True) if what), "")


def _difference(path: Path, size: int, crc: int, *, content: bool) -> str:
    try:
        there = path.stat()
        if not S_ISREG(there.st_mode):
            return "is no file"
        if there.st_size != size:
            return f"has {there.st_size} bytes of {size}" if there.st_size else "is empty"
        return "is damaged" if content and _sum(path)[1] != crc else ""
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        return "is missing"


def _is_inside(name: str) -> bool:
    """Whether this can be the path of a file below a directory."""
    return name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts


def _is_sum(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(number, int) for number in value)


def _sum(path: Path) -> list[int]:
    """[size, CRC-32]"""
    size = crc = 0
    with regular_files.open_regular(path) as file:
        while piece := file.read(_PIECE_BYTES):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _synced_sum(path: Path) -> list[int]:
    sync(path)
    return _sum(path)


def _files(directory: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(directory, onerror=_raise):
        yield from (Path(folder, name) for name in names)


def _sync_directories(directory: Path) -> None:
    for folder, _, _ in os.walk(directory, topdown=False, onerror=_raise):
        sync(Path(folder))


def _raise(error: OSError) -> None:
    raise error
