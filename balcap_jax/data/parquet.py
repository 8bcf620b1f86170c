"""Pictures with their texts in the rows of parquet files, as the Hub has them: read from where they lie, row by row.

To open them is to read footers, and the column that names pictures, where there is one. A row that turns out to have
no picture, no caption or a damaged row group is left out and named then, as damaged files of photographs are. A row
keeps its place while its file keeps its name and rows, so the position of a run is that of the rows' order alone.
"""

import dataclasses
import itertools
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.data import columns as choices
from balcap_jax.data import images, photos, same_pictures
from balcap_jax.data.addresses import address, with_column
from balcap_jax.data.columns import Columns
from balcap_jax.data.input import NO_CAPTION, Data, LeftOut
from balcap_jax.data.listing import Item, has_picture, real_path, with_ending
from balcap_jax.data.parquet_files import ParquetFiles, RowError, Rows, find
from balcap_jax.data.readable import Readable
from balcap_jax.data.records import REWARDED, endings, lines_about, nowhere, read_record

_COUNTED = 1000  # rows whose captions are counted
_ROW = "row"  # in front of what is wrong with one
_LOOKED_AT = 100  # rows in which a path is looked for


@dataclasses.dataclass(frozen=True)
class Table:
    """Parquet files, and which column is what.

    root: where paths of pictures start. said: what data.units says by row; rows of which it says nothing are not used.
    needs_caption: whether a row needs one.
    """

    files: ParquetFiles
    columns: Columns
    root: Path
    said: Mapping[int, Mapping[str, Any]] | None = None
    needs_caption: bool = True

    def rows(self, *, pictures: bool) -> Rows:
        """A reader of all columns in use, with or without that of the pictures."""
        fields = [field for field in self.columns if field != "id" and (pictures or field != "image")]
        return Rows(self.files, list(dict.fromkeys(self.columns[field] for field in fields)))

    def record(self, row: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `records.read_record`. Raises ImageError where the row has no caption or bad fields."""
        try:
            entry = choices.entry_of(values, self.columns) | {"image": self.files.name(row)}
            record = read_record(entry, _ROW, needs_caption=False) | (self.said or {}).get(row, {})
        except ValueError as error:
            raise images.ImageError(f"a field that should be JSON is none: {error}") from error
        except UserError as error:
            raise images.ImageError(str(error).removeprefix(f"{_ROW}: ").partition("; mend")[0]) from error
        if self.needs_caption and not record["captions"]:
            raise images.ImageError(NO_CAPTION[0])
        return record

    def picture(self, values: Mapping[str, Any]) -> np.ndarray:
        """The pixels of a row's picture. Raises ImageError."""
        try:
            found = choices.picture_of(values[self.columns["image"]])
        except ValueError as error:
            raise images.ImageError(str(error)) from error
        if isinstance(found, str):
            if choices.is_url(found):
                raise images.ImageError("a URL and no picture")
            found = os.path.join(self.root, with_ending(self.root, found))
        return images.read(found)


class TableSplit(Readable):
    """A split: `split[i]` reads row `rows[i]` of a table; examples are as those of `photos.Photos`."""

    def __init__(
        self, table: Table, rows: np.ndarray, reader: Rows, captions: int, max_pixels: int, damaged: list[LeftOut]
    ):
        super().__init__(damaged)
        self.table, self.rows, self.captions, self.max_pixels = table, rows, captions, max_pixels
        self._reader = reader

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[str]:
        if "prompt" not in self.table.columns:
            return [photos.PROMPT] * len(self)
        return [prompt for prompt, *_ in self.texts()]

    def texts(self) -> Iterator[tuple[str, ...]]:
        """Those of rows that can be read."""
        reader, table = self.table.rows(pictures=False), self.table
        for row in map(int, self.rows):
            try:
                record = table.record(row, reader[row])
            except (RowError, images.ImageError):
                continue  # It is named when its example is asked for.
            yield record["prompt"] or photos.PROMPT, *record["captions"]

    def name(self, at: int) -> str:
        return self.table.files.name(int(self.rows[at]))

    def read(self, at: int) -> dict[str, Any]:
        row = int(self.rows[at])
        try:
            values = self._reader[row]
        except RowError as error:
            raise images.ImageError(str(error)) from error
        record = self.table.record(row, values)
        return {
            "id": record["image"],
            "image": images.shrunk(self.table.picture(values), self.max_pixels),
            "prompt": record["prompt"] or photos.PROMPT,
            "reference": record["captions"][0],
            "reference_units": list(record["reference_units"]),
            "captions": list(itertools.islice(itertools.cycle(record["captions"]), self.captions)),
            "questions": record["questions"],
            "rubrics": record["rubrics"],
        }


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_table(source: str, chosen: str, root: str, what: str, *, needs_caption: bool = True) -> Table:
    """The table of a file, a folder or a glob. `chosen` is as `data.columns`, `root` "" is the folder of the files.

    Where neither captions are needed nor columns chosen, the likeliest column of pictures is taken.

    Raises:
      UserError: as `find`, `ParquetFiles` and `columns.choose` do, there is no row, or pictures are URLs.
    """
    try:
        paths, folder = find(source, what)
    except UserError as error:
        if resolved(source).is_dir() and has_picture(resolved(source)):
            raise UserError(
                f"{what}: {source} has pictures and no parquet file; give --config.data.name=photos"
            ) from error
        raise
    files = ParquetFiles(paths, folder)
    if not len(files):
        raise UserError(f"no row in {source}: {len(paths)} parquet files without rows; give others")
    if not needs_caption and not chosen and "image" not in files.schema.names:
        chosen = f"image={choices.picture_column(files.schema)}"
    try:
        columns = choices.choose(chosen, files.schema, str(paths[0]), needs_caption=needs_caption)
    except UserError:
        if "image" not in choices.parse(chosen):
            for column in choices.addresses(files.schema):  # To name these columns would only bring the next error.
                _refuse_urls(files, column, choices.likeliest("caption", files.schema), source)
        raise
    files.kinds_differ(list(dict.fromkeys(columns.values())), choices.kind_of)
    place = resolved(root).absolute() if root else folder.absolute()
    table = Table(files, columns, place, needs_caption=needs_caption)
    _refuse_urls(files, columns["image"], columns.get("caption", ""), source)
    return table


def _refuse_urls(files: ParquetFiles, column: str, caption: str, source: str) -> None:
    """Raises UserError where the first path in a column of pictures is a URL; other kinds of columns are not read."""
    if choices.kind_of(choices.field_of(files.schema, column).type) != choices.TEXT:
        return
    reader = Rows(files, [column])
    for row in range(min(len(reader), _LOOKED_AT)):
        try:
            value = reader[row][column]
        except RowError:
            continue
        if value and not choices.is_url(value):
            return
        if value:
            raise UserError(
                f"the column {column!r} of {source} holds URLs, not pictures; download them with `img2dataset "
                f"--url_list={source} --input_format=parquet --url_col={column} --caption_col={caption or 'caption'} "
                "--resize_mode=no --output_format=files --output_folder=DIR`, and train on them with data.name=photos "
                "and data.data_dir=DIR"
            )


def load(config: Mapping[str, Any], needs: Sequence[str] = ()) -> Data:
    """The splits of the parquet files `data_dir`; `needs` are fields that the reward reads.

    Raises:
      UserError: as `open_table`, data.units does not fit, or a needed field is nowhere.
    """
    source, units = config["data_dir"], config.get("units", "")
    chosen, root = config.get("columns", ""), config.get("manual_dir", "")
    table = open_table(source, chosen, root, "config field 'data.data_dir'", needs_caption=not units)
    left_out: list[LeftOut] = []
    if units:
        table, left_out = _join(table, storage.fetch(resolved(units)))
    there = table.columns.keys() | {field for said in (table.said or {}).values() for field in said}
    for field in needs:
        if field in REWARDED and field not in there:
            raise nowhere(field, "parquet", resolved(source))
    keys, files = _keys(table), table.files
    text = f"parquet: {(pictures := len(set(keys.values())))} pictures"
    text += f" in {len(keys)} rows" if pictures < len(keys) else ""
    text += f"; {len(files.paths)} files, {files.groups} row groups"
    print(text + (f"; {len(left_out)} left out" if left_out else ""), flush=True)
    if pictures < 3 <= len(keys):
        raise UserError(
            f"{pictures} pictures in {len(keys)} rows are too few, as the column {table.columns['id']!r} names them; "
            "give --config.data.columns=...,id=COLUMN, or id= where each row has a picture of its own"
        )
    parts = photos.partition(keys.values(), config, len(left_out))
    home = {key: name for name, part in parts.items() for key in part}
    reader, damaged, captions = table.rows(pictures=True), [], _captions_of(table)
    splits = []
    for name in parts:
        rows = np.fromiter((row for row, key in keys.items() if home[key] == name), np.int64)
        splits.append(TableSplit(table, rows, reader, captions, config["max_pixels"], damaged))
    fields = frozenset({"reference", "captions", *there.intersection(REWARDED)})
    return Data(*splits, fields, tuple(left_out), damaged=damaged)


def _keys(table: Table) -> dict[int, str]:
    """{row in use: the name of its picture, which decides its split}."""
    files, column = table.files, table.columns.get("id")
    rows = range(len(files)) if table.said is None else sorted(table.said)
    if column is None:
        return {row: files.name(row) for row in rows}
    reader, keys = Rows(files, [column]), {}
    for row in rows:
        try:
            value = reader[row][column]
        except RowError:
            value = None
        keys[row] = files.name(row) if value in (None, "") else str(value)
    return keys


def _captions_of(table: Table) -> int:
    """How many captions each example has: as many as the median of the first rows."""
    counts = [len(said["captions"]) for said in (table.said or {}).values() if "captions" in said]
    if counts:
        return statistics.median_high(counts)
    if "captions" not in table.columns:
        return 1
    reader, counts = table.rows(pictures=False), []
    for row in range(min(len(reader), _COUNTED)):
        try:
            counts.append(len(table.record(row, reader[row])["captions"]))
        except (RowError, images.ImageError):
            continue
    return statistics.median_high(counts) if counts else 1


def _join(table: Table, units: Path) -> tuple[Table, list[LeftOut]]:
    """The table with what the JSONL file says of its rows, as `records.join` does, and the rows without a line."""
    files = table.files
    by_path = {real_path(path): index for index, path in enumerate(files.paths)}
    by_name = {os.path.relpath(path, files.folder): index for index, path in enumerate(files.paths)}
    plain = choices.picture_column(files.schema)  # that of addresses which name none

    def row_at(path: str, image: str) -> int | None:
        if not (inside := address(path)) or (inside[2] or plain) != table.columns["image"].partition(".")[0]:
            return None  # It is about another picture of the row, or about none.
        file = by_path.get(real_path(inside[0]))
        if file is None and not os.path.lexists(inside[0]):
            file = next((by_name[end] for end in endings(address(image)[0]) if end in by_name), None)
        return None if file is None else files.row_of(file, inside[1])

    said, hashes = lines_about(units, row_at, "parquet", len(files), f"{files.name(0)!r} in {files.folder}")
    column, paths = table.columns["image"], {row: str(files.folder / files.name(row)) for row in hashes}
    paths = paths if column == plain else {row: with_column(path, column) for row, path in paths.items()}
    same_pictures.check({paths[row]: found for row, found in hashes.items()}, units)
    has_captions = bool({"caption", "captions"} & table.columns.keys())
    without = {row for row, fields in said.items() if not has_captions and "captions" not in fields}
    left_out = [
        LeftOut(files.name(row), NO_CAPTION[0] if row in without else f"no line in {units.name}")
        for row in range(len(files))
        if row in without or row not in said
    ]
    said = {row: fields for row, fields in said.items() if row not in without}
    return dataclasses.replace(table, said=said, needs_caption=True), left_out


# ---- listing ---------------------------------------------------------------------------------------------------------


def list_rows(source: str | os.PathLike, chosen: str, prompt: str, *, texts: bool) -> list[Item]:
    """Each row as a picture to caption; `prompt` is for those without their own, `chosen` as `data.columns`.

    Where not `texts`, `entry` says nothing: captions of many rows fill a memory.

    Raises:
      UserError: as `open_table`.
    """
    table = open_table(str(source), chosen, "", "--images", needs_caption=False)
    files, column = table.files, table.columns["image"]
    kind = choices.kind_of(choices.field_of(files.schema, column).type)
    if kind == choices.TEXT:
        raise UserError(f"the column {column!r} of {source} holds paths; give the pictures' own folder or a JSONL file")
    is_plain = column == choices.picture_column(files.schema)
    reader = table.rows(pictures=False) if texts or "prompt" in table.columns else None
    items = []
    for row in range(len(files)):
        name = files.name(row) if is_plain else with_column(files.name(row), column)
        record, entry, error = {}, {}, ""
        if reader:
            try:
                values = reader[row]
                record = table.record(row, values)
                entry = {**choices.entry_of(values, table.columns), "image": name} if texts else {}
            except (RowError, images.ImageError) as failure:
                error = str(failure)
        path = files.folder.absolute() / name
        items.append(Item(name, name, path, record.get("prompt") or prompt, error=error, entry=entry))
    return items
