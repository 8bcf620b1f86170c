"""Rows of parquet files, at random or in order, in the memory of a few pictures: no file and no column is read whole.

A row is found from the footers alone: row -> (file, row group, offset). What is read is the part of its row group up to
the row, in blocks; the last blocks stay, and so does the place that reading came to, since neighbours are often next.
"""

import collections
import contextlib
import glob
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import open_regular, resolved
from balcap_jax.data.addresses import SUFFIXES, folder_of, is_parquet, refuse_tars

_BUFFER = 1 << 20  # bytes that are read of a column at once
_BLOCK = 8 << 20  # bytes of rows that are decoded at once, by the footer
_BLOCK_ROWS = 256  # at most: of a column of few different values the footer says less than its rows take
_KEPT, _KEPT_BLOCKS = 32 << 20, 32  # bytes of blocks that stay, and how many
_CURSORS = 4  # row groups that reading may go on in
_THREADS = 8  # that read footers
_FAILURES = (pa.ArrowException, OSError, ValueError, OverflowError)


class RowError(Exception):
    """A row that cannot be read; the text is the reason, without the row's name."""


class ParquetFiles:
    """Files of one form as one sequence of rows: `place(row)` says where a row is, and nothing but footers is read.

    Raises:
      UserError: a file has no whole footer, or other columns than the first.
    """

    def __init__(self, paths: Sequence[Path], folder: Path):
        self.paths, self.folder = list(paths), folder
        with ThreadPoolExecutor(_THREADS) as pool:
            self.footers = list(pool.map(_footer, self.paths))
        self.schema = self.footers[0].schema.to_arrow_schema()
        for path, footer in zip(self.paths[1:], self.footers[1:], strict=True):
            names = footer.schema.to_arrow_schema().names
            if set(names) != set(self.schema.names):
                raise UserError(
                    f"{path} has the columns {', '.join(names)}, and {self.paths[0]} has "
                    f"{', '.join(self.schema.names)}; give files of one form, such as a glob for some of them"
                )
        groups = [
            (file, group, footer.row_group(group).num_rows)
            for file, footer in enumerate(self.footers)
            for group in range(footer.num_row_groups)
        ]
        self._groups = [group for group in groups if group[2]]
        self._starts = np.cumsum([0, *(rows for *_, rows in self._groups)])
        # The first row of each file, by which rows are named.
        self._firsts = np.cumsum([0, *(footer.num_rows for footer in self.footers)])
        self._names = [os.path.relpath(path, folder) for path in self.paths]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def groups(self) -> int:
        """Row groups with rows."""
        return len(self._groups)

    def place(self, row: int) -> tuple[int, int, int]:
        """(file, row group, offset in it) of a row."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, group, _ = self._groups[index]
        return file, group, int(row - self._starts[index])

    def name(self, row: int) -> str:
        """The address of a row, relative to `folder`."""
        file = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return f"{self._names[file]}#{row - self._firsts[file]}"

    def row_of(self, file: int, number: int) -> int | None:
        """The row that is `number` of a file; None where that has fewer."""
        return int(self._firsts[file]) + number if number < self.footers[file].num_rows else None

    def kinds_differ(self, columns: Sequence[str], kind_of: Callable[[pa.DataType], str]) -> None:
        """Raises UserError where a file holds something else in one of `columns` than the first, by `kind_of(type)`."""
        first = {column: kind_of(field_of(self.schema, column).type) for column in columns}
        for path, footer in zip(self.paths[1:], self.footers[1:], strict=True):
            schema = footer.schema.to_arrow_schema()
            for column, kind in first.items():
                field = field_of(schema, column)
                other = kind_of(field.type) if field is not None else "nothing"
                if other != kind:
                    raise UserError(
                        f"{path} holds {other} in the column {column!r}, and {self.paths[0]} holds {kind}; give files "
                        "of one form, such as a glob for some of them"
                    )


def field_of(schema: pa.Schema, column: str) -> pa.Field | None:
    """The field of a column, or of a part of one (`image.path`); None where there is none."""
    if column in schema.names:
        return schema.field(column)
    outer, _, inner = column.partition(".")
    if not inner or outer not in schema.names or not pa.types.is_struct(schema.field(outer).type):
        return None
    return field_of(pa.schema(list(schema.field(outer).type)), inner)


def find(source: str | os.PathLike, what: str) -> tuple[list[Path], Path]:
    """The files of a file name, a folder (all below it) or a glob, in the order of their names, and their folder.

    Raises:
      UserError: there is none; the line begins with `what`.
    """
    place = resolved(source)
    storage.refuse(place, "a parquet file")
    if place.is_dir():
        # A hidden folder holds halves of downloads.
        found = [path for suffix in SUFFIXES for path in place.rglob(f"*{suffix}")]
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(place).parts)]
    elif glob.has_magic(str(place)) and not place.exists():
        found = [Path(path) for path in glob.glob(str(place), recursive=True)]
    else:
        found = [place]
    if not any(map(is_parquet, found)):
        refuse_tars(place, "parquet")
    if not found or not all(path.is_file() for path in found):
        raise UserError(f"{what}: no parquet file at {source}; give a file, a folder or a glob such as 'DIR/train-*'")
    return sorted(found), folder_of(place)


def _footer(path: Path) -> pq.FileMetaData:
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} is empty; download it again, or give other files")
            footer = pq.read_metadata(file)
            footer.schema.to_arrow_schema()  # Not all that other writers can write can be read.
            return footer
    except _FAILURES as error:
        with contextlib.suppress(OSError):
            storage.refuse_pointer(path)
        remedy = "download it again" if is_parquet(path) else "give others, or data.name=photos for a JSONL file"
        raise UserError(f"{path} is no whole parquet file ({_reason(error)}); {remedy}") from error


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


# ---- reading ---------------------------------------------------------------------------------------------------------


class Rows:
    """Reads `columns` of rows: `rows[row]` is {column: value}, as Python has it. Threads may read at once."""

    def __init__(self, files: ParquetFiles, columns: Sequence[str]):
        self.files, self.columns = files, tuple(columns)
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[int, int, int], pa.RecordBatch] = collections.OrderedDict()
        self._cursors: collections.OrderedDict[tuple[int, int], _Cursor] = collections.OrderedDict()
        self._broken: dict[tuple[int, int], tuple[int, str]] = {}  # where a row group ends to be readable, and why

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Raises RowError where the row cannot be read."""
        if not self.columns:
            return {}
        file, group, offset = self.files.place(row)
        start, batch = self._block(file, group, offset)
        return {column: _value(batch, column, offset - start) for column in self.columns}

    def _block(self, file: int, group: int, offset: int) -> tuple[int, pa.RecordBatch]:
        """The block that holds a row of a row group, and the offset of the block's first row."""
        place = file, group
        with self._lock:
            for key in reversed(self._kept):
                if key[:2] == place and key[2] <= offset < key[2] + len(self._kept[key]):
                    self._kept.move_to_end(key)
                    return key[2], self._kept[key]
            end, reason = self._broken.get(place, (offset + 1, ""))
            if offset >= end:
                raise RowError(reason)
            cursor = self._cursors.pop(place, None)  # Nobody else reads from it now.
        if cursor is not None and cursor.at > offset:
            cursor = None
        cursor = cursor or _Cursor(self.files, file, group, self.columns)
        try:
            start, batch = cursor.up_to(offset)
        except _FAILURES as error:
            reason = f"its row group {group} is damaged: {_reason(error)}"
            with self._lock:
                self._broken[place] = cursor.at, reason
            raise RowError(reason) from error
        with self._lock:
            self._kept[(file, group, start)] = batch
            self._cursors[place] = cursor
            while len(self._kept) > 1 and (
                len(self._kept) > _KEPT_BLOCKS or sum(kept.nbytes for kept in self._kept.values()) > _KEPT
            ):
                self._kept.popitem(last=False)
            while len(self._cursors) > _CURSORS:
                self._cursors.popitem(last=False)
        return start, batch


class _Cursor:
    """Where the reading of a row group came to; `at` is the offset of its next row."""

    def __init__(self, files: ParquetFiles, file: int, group: int, columns: Sequence[str]):
        self.at = 0
        self._batches = self._read(files.paths[file], files.footers[file], group, columns)

    @staticmethod
    def _read(path: Path, footer: pq.FileMetaData, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        about = footer.row_group(group)
        chunks = (about.column(i) for i in range(about.num_columns))
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if any(f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns)
        )
        rows = max(1, min(_BLOCK_ROWS, _BLOCK * about.num_rows // max(size, 1)))
        settings = {"pre_buffer": False, "buffer_size": _BUFFER, "page_checksum_verification": True}
        with open_regular(path) as source, pq.ParquetFile(source, metadata=footer, **settings) as file:
            yield from file.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)

    def up_to(self, offset: int) -> tuple[int, pa.RecordBatch]:
        """(offset of its first row, block) of the block with the row at `offset`, which is not behind this."""
        for batch in self._batches:
            start, self.at = self.at, self.at + len(batch)
            if offset < self.at:
                return start, batch
        raise ValueError("it has fewer rows than the footer says")


def _value(batch: pa.RecordBatch, column: str, index: int) -> Any:
    names = batch.schema.names
    if column in names:
        return batch.column(names.index(column))[index].as_py()
    outer, _, inner = column.partition(".")
    value = batch.column(names.index(outer))[index].as_py()
    for part in inner.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
