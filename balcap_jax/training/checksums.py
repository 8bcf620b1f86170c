"""Checksums of a directory's files: they tell one that outlived a power cut whole from one that did not."""

import errno
import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG

from balcap_jax.cli import bucket, json_text
from balcap_jax.cli.files import files_of, open_regular, read_bytes, replace_file, sync, sync_directories

SUMS = "sums.json"
CRC32C = "crc32c:"  # before the checksum of an object, in base64: what a bucket knows without reading
_PIECE_BYTES = 4 * 2**20
_READERS = 8  # threads; zlib lets go of the interpreter's lock
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def seal(directory: Path) -> None:
    """Puts all of `directory` on disk, with the size and CRC-32 of each file below it in `sums.json`.

    A directory below it that is sealed already is not read again.
    """
    sums = {}
    for inner in directory.glob(f"*/**/{SUMS}"):
        folder = inner.parent.relative_to(directory)
        sums |= {str(folder / name): value for name, value in json.loads(inner.read_bytes()).items()}
    names = {str(path.relative_to(directory)) for path in files_of(directory)} - {SUMS, *sums}
    with ThreadPoolExecutor(_READERS) as pool:
        sums |= zip(names, pool.map(lambda name: _synced_sum(directory / name), names), strict=True)
    sync_directories(directory)
    replace_file(directory / SUMS, json_text.dumps(sums, indent=0).encode())


def find_damage(directory: Path, *, content: bool = True, share: tuple[int, int] = (0, 1)) -> str:
    """The first difference to what `seal` saw, in a few words; "" where there is none.

    Args:
      content: compare the CRC-32 too, for which each file is read.
      share: (i, n) looks at the i-th of n parts of the files.

    Raises OSError where a file is there and cannot be read.
    """
    try:
        if not S_ISREG((directory / SUMS).stat().st_mode):
            return f"{SUMS} is no file"
        sums = json_text.decode(read_bytes(directory / SUMS))
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        return f"{SUMS} is missing"
    except ValueError:
        return f"{SUMS} is damaged"
    if not (isinstance(sums, Mapping) and sums and all(_is_inside(n) and _is_sum(v) for n, v in sums.items())):
        return f"{SUMS} is damaged"
    first, step = share
    names = sorted(sums)[first::step]
    with ThreadPoolExecutor(_READERS) as pool:
        parallel_map = pool.map if content else map
        differences = parallel_map(lambda name: _difference(directory / name, *sums[name], content=content), names)
        return next((f"{name} {what}" for name, what in zip(names, differences, strict=True) if what), "")


def _difference(path: Path, size: int, crc: int | str, *, content: bool) -> str:
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            return "is no file"
        if stat.st_size != size:
            return f"has {stat.st_size} bytes of {size}" if stat.st_size else "is empty"
        if isinstance(crc, str):  # Copied from a bucket.
            return "is damaged" if content and _crc32c(path) not in (None, crc) else ""
        return "is damaged" if content and _sum(path)[1] != crc else ""
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        return "is missing"


def _is_inside(name: str) -> bool:
    """Whether this can be the path of a file below a directory."""
    return name.isprintable() and not Path(name).is_absolute() and ".." not in Path(name).parts


def _is_sum(value: object) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and isinstance(value[0], int)
    return is_pair and (isinstance(value[1], int) or (isinstance(value[1], str) and value[1].startswith(CRC32C)))


def _sum(path: Path) -> list[int]:
    """[size, CRC-32]"""
    size = crc = 0
    with open_regular(path) as file:
        while piece := file.read(_PIECE_BYTES):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _crc32c(path: Path) -> str | None:
    """The checksum that a bucket has of a file; None on a machine without its software."""
    try:
        return CRC32C + bucket.checksum(path)
    except ImportError:
        return None


def _synced_sum(path: Path) -> list[int]:
    sync(path)
    return _sum(path)
