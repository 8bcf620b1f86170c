"""The address of a picture inside a parquet file, `FILE.parquet#ROW`: it stands wherever the path of a picture may.

`FILE.parquet#ROW#COLUMN` says which column, where the file has several of pictures.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from balcap_jax.cli.errors import UserError

SUFFIXES = (".parquet", ".pq")
_TARS = (".tar", ".tar.gz", ".tgz")
_ADDRESS = re.compile(rf"(.+(?:{'|'.join(map(re.escape, SUFFIXES))}))#(\d+)(?:#([^#]+))?", re.IGNORECASE | re.DOTALL)


def address(path: str | os.PathLike) -> tuple[str, int, str] | None:
    """(file, row, column or "") that an address names; None for other paths."""
    found = _ADDRESS.fullmatch(os.fspath(path))
    return (found[1], int(found[2]), unquote(found[3] or "")) if found else None


def with_column(name: str, column: str) -> str:
    """An address with the column of its picture."""
    return f"{name}#{quote(column, safe='')}"


def is_parquet(source: str | os.PathLike) -> bool:
    """Whether a path is that of a parquet file, a glob of some, or a folder with some below it."""
    path = Path(source)
    if path.is_dir():
        return any(next(path.rglob(f"*{suffix}"), None) for suffix in SUFFIXES)
    return path.name.lower().endswith(SUFFIXES)


def refuse_tars(source: Path, name: str) -> None:
    """Raises UserError for .tar files, which `data.name` = `name` cannot read: one, those of a glob, or in a folder.

    Webdataset has such. Folders with pictures or parquet files besides are the caller's to read.
    """
    files: Iterable[Path] = (source,)
    if source.is_dir():
        files = (path for path in source.rglob("*") if not path.is_dir())
    elif glob.has_magic(str(source)) and not source.exists():
        files = [*map(Path, sorted(glob.glob(str(source), recursive=True))), source]
    if tar := next((path for path in files if path.name.lower().endswith(_TARS)), None):
        raise UserError(
            f"{tar} is a .tar file, and data.name={name} reads none; unpack the .tar files (`tar -xf`), and give the "
            "folder of their pictures and texts with --config.data.name=photos"
        )


def folder_of(source: str | os.PathLike) -> Path:
    """The folder that names of pictures start from: `source` itself, that of a file, or what comes before a glob."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
