"""A JSONL file that only grows, whole line by whole line, whatever kills the process that writes it."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from balcap_jax import durable, json_text, locks, regular_files
from balcap_jax.errors import UserError


class AppendedLines:
    """Opens `path` to go on with it: `entries` are the objects of its lines, or what `remember` makes of each.

    A torn last line is no entry, and is cut off by the first change; until then the file stays as it was found, so that
    a caller can still refuse a file that is not its own (`found`: it was there, with something in it). One process at
    a time may hold the file. Where there is none it is made, at once or, if `lazy`, with its first line; one that this
    object made or emptied is removed again if it stays empty.

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
        self.found = False
        self._made = False
        self._tail: Callable[[], Any] = lambda: None  # makes the end of the file the end of a line
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "AppendedLines":
        there = self.path.exists()
        if there and not self.path.is_file():
            raise UserError(f"{self.path} is no regular file; name another one")
        if there or not self._lazy:
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
        """Writes one line for each entry. They are on disk when it returns: no later kill or power cut loses them."""
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
        """Removes the lines of all other entries; for files whose entries are remembered whole."""
        kept = [entry for entry in self.entries if wanted(entry)]
        if len(kept) < len(self.entries):
            self.replace(kept)

    def replace(self, entries: Sequence[dict[str, Any]]) -> None:
        """Writes these in place of all lines: the one change that is no addition."""
        try:
            durable.replace_file(self.path, json_text.lines(entries).encode())
        except OSError as error:
            raise self._failure("written", error) from error
        self._file.close()
        self._open()
        self._made, self._tail = True, lambda: None
        self.entries = [self._remember(entry) for entry in entries]

    def _open(self) -> None:
        try:
            durable.make_directory(self.path.parent)
            self._made |= not self.path.exists()
            self._file = self.path.open("ab+", buffering=0)
            durable.sync(self.path.parent)
            held = locks.hold(self._file, self.path)
        except OSError as error:
            raise self._failure("written", error) from error
        if not held:
            self._file.close()
            raise UserError(f"{self.path} is being written by another process; wait for it or stop it")

    def _read(self) -> None:
        self._file.seek(0)
        at = 0
        with open(os.dup(self._file.fileno()), "rb") as lines:  # Line by line: files of gigabytes are few entries.
            for number, line in enumerate(regular_files.lines_of(lines), start=1):
                self.found = True
                where = f"{self.path}, line {number}"
                if not line.endswith(b"\n") and not _is_object(line):
                    self._tail = functools.partial(self._file.truncate, at)
                    break
                at += len(line)
                if not line.endswith(b"\n"):
                    self._tail = functools.partial(self._file.write, b"\n")
                entry = json_text.parse_object(line, where, "mend or remove that line")
                try:
                    self.entries.append(self._remember(entry))
                except UserError as error:
                    raise UserError(f"{where}: {error}; mend or remove that line") from error

    def _failure(self, what: str, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be {what} ({error.strerror}); make room there or name another file")


def _is_object(line: bytes) -> bool:
    try:
        json_text.parse_object(line, "the last line", "")
    except UserError:
        return False
    return True
