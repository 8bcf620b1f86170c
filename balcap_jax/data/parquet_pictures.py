"""The picture at an address inside a parquet file (`data.addresses`), without the rest of the file."""

import functools
import os
from pathlib import Path

from balcap_jax.cli.errors import UserError
from balcap_jax.data.columns import picture_column, picture_of
from balcap_jax.data.parquet_files import ParquetFiles, RowError, Rows, field_of

_OPENED = 8  # files that stay open: those of one command are read in the order of their rows


def content(path: str, row: int, column: str) -> bytes | str:
    """The bytes of the picture in a row, or the path of its file.

    Raises:
      RowError: there is no such row, or it cannot be read.
    """
    rows, column = _rows(path, column)
    if row >= len(rows):
        raise RowError(f"the file has {len(rows)} rows only")
    try:
        found = picture_of(rows[row][column])
    except ValueError as error:
        raise RowError(str(error)) from error
    return os.path.join(os.path.dirname(path), found) if isinstance(found, str) else found


def check(path: str, row: int, column: str) -> None:
    """Raises RowError where no such row can be. No row is read."""
    rows, _ = _rows(path, column)
    if row >= len(rows):
        raise RowError(f"the file has {len(rows)} rows only")


def _rows(path: str, column: str) -> tuple[Rows, str]:
    try:
        state = os.stat(path)
        return _opened(os.path.realpath(path), column, state.st_size, state.st_mtime_ns)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise RowError("no such file" if missing else f"cannot be looked at: {error.strerror}") from error
    except UserError as error:
        raise RowError(str(error)) from error


@functools.lru_cache(_OPENED)
def _opened(path: str, column: str, size: int, changed: int) -> tuple[Rows, str]:
    del size, changed  # A file that changed is opened anew.
    files = ParquetFiles([Path(path)], Path(path).parent)
    if not (column := column or picture_column(files.schema)) or field_of(files.schema, column) is None:
        raise UserError(
            f"the file has no column {column!r}" if column else "nothing says which column has the pictures"
        )
    return Rows(files, [column]), column
