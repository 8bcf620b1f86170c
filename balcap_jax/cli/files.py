"""Files that commands read and write: paths from users, JSON and JSONL, writes that outlive a power cut, locks.

Content is on disk only once its file is synced, and a new name only once its directory is synced.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from balcap_jax.cli import bucket, json_text
from balcap_jax.cli.errors import UserError

_NOTHING_TO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)  # from fsync of a directory on some network disks
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre and NFS, as they are often mounted.
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:/")  # With one slash too: it is what pathlib makes of two.
_SLIP = re.compile(r"\s*gs:/+(?=[^/])", re.IGNORECASE)  # how a gs:// path is misspelt
_LONGEST_SHOWN = 80  # characters of a path in a message
LARGEST = 1 << 31  # bytes of a file that is read whole
_LONGEST_LINE = 1 << 26  # bytes: a line may hold pictures
_log = logging.getLogger(__name__)


def resolved(path: str | os.PathLike, what: str = "the path") -> Path:
    """The path without `~`, `.`, `..`, and doubled or trailing slashes, which TensorStore refuses.

    `..` goes up from where a link leads, as the system does, and makes the path absolute. All else stays as it is, such
    as a relative path and links, whose names say more than their targets' names. For gs://bucket/folder it is the path
    of this machine that stands for it (`storage`).

    Raises:
      UserError: it is another URL, in the home of no user, or no name of a file; the line begins with `what`.
    """
    text = os.fspath(path)
    quoted = repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")
    if bucket.is_url(text):
        return bucket.local(text)
    if _URL.match(text):
        remedy = "mount it and give the path there (a folder of that name is ./...)"
        if slip := _SLIP.match(text):
            remedy = f"did you mean gs://{text[slip.end() :]}?"
        raise UserError(
            f"{what} is a URL, and files are read and written on mounted disks and in gs:// buckets only, got "
            f"{quoted}; {remedy}"
        )
    if "\0" in text:
        raise UserError(f"{what} holds a character 0, which no name has, got {quoted}")
    text = os.path.expanduser(text)
    if text.startswith("~"):
        raise UserError(
            f"{what} names the home of a user that does not exist, got {quoted}; a name that begins with ~ is ./~..."
        )
    result = Path()
    for part in Path(re.sub("/+", "/", text)).parts:
        result = Path(os.path.realpath(result)).parent if part == ".." else result / part
    try:
        os.lstat(result)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # The reader knows whether it must be there.
    except OSError as error:  # A name that is too long, links in a circle.
        raise UserError(f"{what} cannot be a file ({error.strerror}), got {quoted}") from error
    return result


# ---- reading ---------------------------------------------------------------------------------------------------------


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


def read_bytes(path: str | os.PathLike, longest: int = LARGEST) -> bytes:
    """The content of a regular file. Raises OSError, also where it has more than `longest` bytes."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > longest:
            raise OSError(errno.EFBIG, f"{size:,} bytes are more than the {longest:,} that can be meant")
        return file.read()


def read_lines(path: str | os.PathLike) -> Iterator[bytes]:
    """The lines of a regular file, with their ends. Raises OSError, also for a line that no memory can hold."""
    with open_regular(path) as file:
        yield from lines_of(file)


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of an open file, as `read_lines` gives them."""
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise OSError(errno.EFBIG, f"a line has more than {_LONGEST_LINE >> 20} MiB")
        yield line


def read_json(path: str | os.PathLike, remedy: str, *, unique: bool = False) -> Any:
    """The value in a JSON file.

    Raises:
      FileNotFoundError, NotADirectoryError: there is none.
      UserError: it cannot be read, or as `json_text.parse` does.
    """
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except MemoryError as error:
        raise UserError(f"{path} is too large for this machine's memory; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    return json_text.parse(content, str(path), remedy, unique=unique)


def read_json_object(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """As `read_json`; raises UserError for anything but an object too."""
    return json_text.as_object(read_json(path, remedy), str(path), remedy)


def read_jsonl(path: Path, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line of a JSONL file that is not empty; `where` names file and line.

    Raises:
      UserError: there is no such file, it cannot be read, or a line is no object.
    """
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, json_text.parse_object(line, where, remedy)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def read_json_or_jsonl(path: Path, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_jsonl`; of a file that ends in .json, the objects of its list."""
    if Path(path).suffix != ".json":
        yield from read_jsonl(path, remedy)
        return
    try:
        content = read_json(path, remedy)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no such file: {path}; {remedy}") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise UserError(f"{path} is no list of objects; {remedy}")
    for number, entry in enumerate(content, start=1):
        yield f"{path}, entry {number}", entry


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`replace_file` in a directory that is made if it is missing.

    Raises:
      UserError: the disk is full or read-only.
    """
    try:
        make_directory(path.parent)
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there or name another directory") from error


def try_out(folder: Path) -> None:
    """Raises UserError where `write_bytes` cannot write into a folder. Nothing stays, and no folder is made."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".try-", dir=place):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror} ({place}); name another directory") from error


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file in one step: no reader, no crash and no power cut ever meets half of it.

    The file is on disk when this returns. Raises OSError as the disk does, and leaves nothing behind then.
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


def rename_directory(path: Path, target: Path) -> None:
    """Renames a directory that is on disk; the new name is on disk when this returns."""
    path.rename(target)
    sync(target.parent)


def make_directory(path: Path) -> None:
    """`path.mkdir(parents=True, exist_ok=True)`, on disk when it returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Returns when a file's content, or a directory's names, are on disk. Raises OSError as the disk does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Syncs all files and directories below `directory`, and itself."""
    for path in files_of(directory):
        sync(path)
    sync_directories(directory)


def sync_directories(directory: Path) -> None:
    for folder, _, _ in os.walk(directory, topdown=False, onerror=_raise):
        sync(Path(folder))


def files_of(directory: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(directory, onerror=_raise):
        yield from (Path(folder, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


# ---- locks, and files that grow --------------------------------------------------------------------------------------


def hold_lock(file: int | IO, path: Path) -> bool:
    """Locks the open file `path` until it is closed; False where another process holds it.

    Where the disk has no locks it counts as held by this process, and one line on stderr says so.

    Raises:
      OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_once(path.parent, error.strerror)
    return True


@functools.cache
def _warn_once(folder: Path, reason: str) -> None:
    _log.warning("%s has no locks (%s): nothing keeps another process from writing there too", folder, reason)


class AppendedLines:
    """Opens the JSONL file `path` to append to it. `entries` are the objects of its lines, or `remember` of each.

    A torn last line is no entry, and the first change cuts it off. Until then the file stays as it is, so that a caller
    can still refuse a file that is not its own (`had_content`: the file was there and not empty). One process at a time
    may hold the file. A missing file is made, at once or, if `lazy`, with its first line. A file that this object made
    or emptied is removed again if it stays empty.

    Raises:
      UserError: it cannot be read or written, holds anything but objects, or another process holds it.
    """

    def __init__(
        self, path: str | os.PathLike, *, lazy: bool = False, remember: Callable[[dict[str, Any]], Any] | None = None
    ):
        self.path = Path(path)
        self._lazy = lazy
        self._remember = remember or (lambda entry: entry)
        self.entries: list[Any] = []
        self.had_content = False
        self._made = False
        self._tail: Callable[[], Any] = lambda: None  # makes the end of the file the end of a line
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "AppendedLines":
        exists = self.path.exists()
        if exists and not self.path.is_file():
            raise UserError(f"{self.path} is no regular file; name another one")
        if exists or not self._lazy:
            self._open()
            try:
                self._read()
            except BaseException as error:
                self._file.close()
                if isinstance(error, OSError):
                    raise self._failure("read", error) from error
                raise
        return self

    def __exit__(self, *exception) -> None:
        if self._file is None:
            return
        if self._made and not self.entries and os.fstat(self._file.fileno()).st_size == 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._file.close()

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Writes one line for each entry. They are on disk when this returns: no later kill or power cut loses them."""
        entries = list(entries)
        if self._file is None:
            self._open()
        try:
            self._tail()
            self._tail = lambda: None
            rest = memoryview(json_text.lines(entries).encode())
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure("written", error) from error
        self.entries += map(self._remember, entries)

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Removes the lines of all other entries; only without `remember`, as it writes the entries."""
        entries = [entry for entry in self.entries if wanted(entry)]
        if len(entries) < len(self.entries):
            self.replace(entries)

    def replace(self, entries: Sequence[dict[str, Any]]) -> None:
        """Replaces all lines by those of `entries`."""
        try:
            replace_file(self.path, json_text.lines(entries).encode())
        except OSError as error:
            raise self._failure("written", error) from error
        self._file.close()
        self._open()
        self._made, self._tail = True, lambda: None
        self.entries = [self._remember(entry) for entry in entries]

    def _open(self) -> None:
        try:
            make_directory(self.path.parent)
            self._made |= not self.path.exists()
            self._file = self.path.open("ab+", buffering=0)
            sync(self.path.parent)
            held = hold_lock(self._file, self.path)
        except OSError as error:
            raise self._failure("written", error) from error
        if not held:
            self._file.close()
            raise UserError(f"{self.path} is being written by another process; wait for it or stop it")

    def _read(self) -> None:
        self._file.seek(0)
        at = 0
        with open(os.dup(self._file.fileno()), "rb") as lines:  # Line by line: files of gigabytes are few entries.
            for number, line in enumerate(lines_of(lines), start=1):
                self.had_content = True
                where = f"{self.path}, line {number}"
                try:
                    entry = json_text.parse_object(line, where, "mend or remove that line")
                except UserError:
                    if line.endswith(b"\n"):
                        raise
                    self._tail = functools.partial(self._file.truncate, at)
                    break
                at += len(line)
                if not line.endswith(b"\n"):
                    self._tail = functools.partial(self._file.write, b"\n")
                try:
                    self.entries.append(self._remember(entry))
                except UserError as error:
                    raise UserError(f"{where}: {error}; mend or remove that line") from error

    def _failure(self, what: str, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be {what} ({error.strerror}); make room there or name another file")
