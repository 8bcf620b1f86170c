"""Where files of commands lie: on this machine, or in a bucket, of which this machine then holds a copy.

Every path of the commands is one of this machine. One below `bucket.root()` stands for an object: inputs are fetched
before they are read (`fetch`), large ones read by ranges (`read_range`), outputs sent after they are written (`send`).
What grows is written here and sent whole from time to time (`kept`): no bucket can append. On any other path all of
these do nothing.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from balcap_jax.cli import bucket
from balcap_jax.cli.bucket import Object, shown, url_of
from balcap_jax.cli.bucket_lock import Lock
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import files_of

EVERY = 60.0  # seconds between uploads of what grows
_SHARE = 20  # An upload that takes a second is repeated after this many at the earliest.
_THREADS = 16
LOCK = ".lock"
_POINTER = b"version https://git-lfs.github.com/spec/"  # github.com/git-lfs/git-lfs, docs/spec.md: the first line
_ASIDE = (".tmp", ".writing")  # ends of names of what is about to be renamed

# Objects that were listed and not fetched, and the generations of those that were fetched or sent, by their paths here.
_remote: dict[Path, Object] = {}
_here: dict[Path, int] = {}


def refuse(path: str | os.PathLike, what: str) -> None:
    """Raises UserError for a path in a bucket, or the URL of one; `what` it is that needs a disk."""
    if url := os.fspath(path) if bucket.is_url(os.fspath(path)) else url_of(path):
        raise UserError(f"{url}: {what} must lie on a disk; copy it (`gcloud storage cp -r`), or mount the bucket")


# ---- reading ---------------------------------------------------------------------------------------------------------


def fetch(path: Path, *, but: tuple[str, ...] = (), marker: str = "", deep: bool = True) -> Path:
    """Copies an object, or all (right) below a path, to this machine, unless that was done; returns the path.

    Objects whose names end in one of `but` stay where they are: `read_range` reads them. Where `marker` is given and no
    such object is there, nothing is: whoever writes several objects ends with it.

    Raises:
      BucketError: the bucket is missing or refuses; nothing at `path` is no error. OSError: no room here.
    """
    url = url_of(path)
    if url is None or any(holder.holds(path) for holder in _kept):  # What this process writes is newer here.
        return path
    found = {bucket.local(entry.url): entry for entry in bucket.objects(url, deep=deep)}
    if marker and path / marker not in found:
        return path
    wanted = []
    for place, entry in found.items():
        if place.name.endswith(but):
            _remote[place] = entry
        elif _here.get(place) != entry.generation or not place.exists():
            wanted.append((place, entry))
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_fetch_one, wanted))
    return path


def _fetch_one(wanted: tuple[Path, Object]) -> None:
    place, entry = wanted
    with contextlib.suppress(FileNotFoundError):  # Deleted since it was listed.
        _here[place] = bucket.download(entry, place)


def is_file(path: Path) -> bool:
    """Whether a file is here, or an object that `fetch` left in its bucket."""
    return path.is_file() or path in _remote


def size_of(path: Path) -> int:
    """Bytes. Raises OSError where there is no such file."""
    return _remote[path].size if is_remote(path) else path.stat().st_size


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder whose names end so, by name; those too that `fetch` left in their bucket."""
    remote = {path for path in _remote if path.parent == folder and path.name.endswith(suffix)}
    return sorted({path for path in folder.glob(f"*{suffix}") if path.is_file()} | remote)


def is_remote(path: Path) -> bool:
    """Whether a file must be read by `read_range`: it is in its bucket alone."""
    return path in _remote and not path.exists()


def read_range(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file or object from `start` on; fewer at its end. Raises OSError, BucketError."""
    if is_remote(path):
        entry = _remote[path]
        size = min(size, entry.size - start)
        return bucket.read_range(entry.url, start, size) if size > 0 else b""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(size)


def refuse_pointer(path: Path) -> None:
    """Raises UserError where git has left what stands for a large file in its place. Raises OSError as `open` does."""
    if read_range(path, 0, len(_POINTER)) == _POINTER:
        raise UserError(
            f"{path} is a pointer of Git LFS, a few lines in place of the file; run `git lfs pull` there, or "
            "fetch the file with `hf download`"
        )


# ---- writing ---------------------------------------------------------------------------------------------------------


def send(path: Path, *, last: Collection[str] = ()) -> None:
    """Uploads a file, or all files below a directory: those named in `last` at the end, one after the other.

    A reader who waits for the last of them meets all or none. Objects are replaced, and others below the path stay.

    Raises:
      BucketError, OSError.
    """
    if url_of(path) is None:
        return
    files = sorted(files_of(path)) if path.is_dir() else [path]
    ending = [path / name for name in last if path / name in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_send_one, [file for file in files if file not in ending]))
    for file in ending:
        _send_one(file)


def _send_one(path: Path) -> None:
    bucket.upload(path, url_of(path))


def exists(path: Path) -> bool:
    """Whether a file or directory is there, here or in its bucket. Raises BucketError."""
    url = url_of(path)
    return os.path.lexists(path) if url is None else bool(bucket.objects(url))


def remove(path: Path, *, first: Collection[str] = ()) -> None:
    """Deletes the object at a path and all below it; those named in `first` before the others. Raises BucketError."""
    url = url_of(path)
    if url is None:
        return
    urls = [entry.url for entry in bucket.objects(url)]
    leading = [f"{url}/{name}" for name in first if f"{url}/{name}" in urls]
    for each in leading:
        bucket.delete(each)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(bucket.delete, [each for each in urls if each not in leading]))
    for place in [place for place in (*_remote, *_here) if place.is_relative_to(path)]:
        _remote.pop(place, None)
        _here.pop(place, None)


# ---- what grows ------------------------------------------------------------------------------------------------------

_kept: list["Kept"] = []


class Kept(contextlib.AbstractContextManager):
    """An output that grows: its files are sent as they are every EVERY seconds, at `send`, and at the end.

    Its lock object says whose it is. Entering takes the lock, and fetches what is in the bucket. Lines are sent whole:
    of a JSONL file that ends in the middle of one, what is before it. What is deleted here is deleted there.
    """

    def __init__(self, path: Path, beside: Sequence[Path] | None = None, but: Collection[str] = ()):
        """
        Args:
          path: a directory, or a file together with those `beside` it.
          but: names right below the directory that are left alone.
        """
        self.path, self._beside, self._but = path, beside, frozenset(but)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._turn, self._stop = threading.Lock(), threading.Event()

    def __enter__(self) -> "Kept":
        url = url_of(self.path)
        bucket.check(url)
        self.lock = Lock(lock_of(self.path, self._beside is None), url, _note)
        self.lock.__enter__()
        try:
            if self._beside is None:
                inputs = [self.path / name for name in bucket.children(url) if self._is_part(name)]
            else:
                inputs = [self.path, *self._beside]
            for place in inputs:
                fetch(place)
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise
        self._sent = {path: stamp for path, stamp in self._stamps().items() if path in _here}
        _kept.append(self)
        threading.Thread(target=self._run, name="uploads", daemon=True).start()
        return self

    def holds(self, path: Path) -> bool:
        """Whether a path is among what is kept."""
        if self._beside is not None:
            return path == self.path or path in self._beside
        inner = path.relative_to(self.path).parts if path.is_relative_to(self.path) else ("",)
        return not inner or (inner[0] != "" and self._is_part(inner[0]))

    def _is_part(self, name: str) -> bool:
        """Whether what has this name, right below the directory, is kept: what is made aside is not."""
        return name not in self._but and not name.startswith(".") and not name.endswith(_ASIDE)

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        """(time, bytes) of the files that are there now."""
        files: Iterable[Path] = [self.path, *(self._beside or ())]
        if self._beside is None:
            tops = self.path.iterdir() if self.path.is_dir() else ()
            tops = [top for top in tops if self._is_part(top.name)]
            files = itertools.chain.from_iterable(files_of(top) if top.is_dir() else [top] for top in tops)
        return {path: stamp for path in files if not path.name.endswith(_ASIDE) and (stamp := _stamp(path))}

    def send(self) -> None:
        """Sends what has changed, the oldest change first. Raises BucketError, OSError; UserError without the lock."""
        with self._turn:
            self.lock.check()
            stamps = self._stamps()
            for path in [path for path in self._sent if path not in stamps]:
                bucket.delete(url_of(path))
                del self._sent[path]
            changed = [path for path in stamps if self._sent.get(path) != stamps[path]]
            for path in sorted(changed, key=lambda path: stamps[path][0]):
                with contextlib.suppress(FileNotFoundError):  # Gone since then: the next turn deletes it.
                    _send_whole_lines(path)
                    self._sent[path] = stamps[path]

    def _run(self) -> None:
        pause = EVERY
        while not self._stop.wait(pause):
            start = time.monotonic()
            try:
                self.send()
            except (UserError, OSError) as error:
                _note(f"not sent yet: {shown(error)}")
            pause = max(EVERY, _SHARE * (time.monotonic() - start))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        _kept.remove(self)
        try:
            self.send()
        except (UserError, OSError) as problem:
            place = bucket.keep_root() / self.path.relative_to(bucket.root())
            text = f"{url_of(self.path)} lacks the newest of what was written ({shown(problem)}); that is in {place}"
            if error is None:
                raise Unsent(text) from problem
            _note(text)
        finally:
            self.lock.__exit__(None, None, None)


class Unsent(UserError):
    """What was written is on this machine alone."""


def lock_of(path: Path, is_folder: bool = True) -> str:
    """The lock object of an output in a bucket."""
    return f"{url_of(path)}/{LOCK}" if is_folder else f"{url_of(path)}{LOCK}"


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size


def _send_whole_lines(path: Path) -> None:
    if path.suffix != ".jsonl":
        _send_one(path)
        return
    content = path.read_bytes()
    bucket.write(url_of(path), content[: content.rfind(b"\n") + 1])


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def kept(
    path: str | os.PathLike, beside: Sequence[Path] | None = None, but: Collection[str] = ()
) -> Iterator[Kept | None]:
    """`Kept` for the block; None on a disk, and inside of what this process keeps already.

    Raises:
      UserError: another process holds it, or what was written could not be sent. BucketError.
    """
    path = Path(path)
    if url_of(path) is None or any(path.is_relative_to(other.path) for other in _kept):
        yield None
        return
    with Kept(path, beside, but) as holder:
        yield holder


def send_kept() -> None:
    """Sends what has changed of all that is kept: before a checkpoint counts. Raises as `Kept.send`."""
    for holder in list(_kept):
        holder.send()
