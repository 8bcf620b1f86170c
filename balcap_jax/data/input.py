"""Any random-access data set of dict examples: batches, shuffled and checkpointable, and TFDS without TensorFlow."""

import collections
import contextlib
import io
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli import bucket, storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import sync, sync_tree

Batch = dict[str, Any]
_LOOKED_AT = 64  # examples of a source that does not list its prompts


class LeftOut(NamedTuple):
    """A picture that is not used, and why."""

    image: str
    reason: str


NO_PICTURE, NO_CAPTION = "no picture", ("no caption", "empty caption")
"""Reasons of samples in which there is nothing to be read."""


class Data(NamedTuple):
    """Random-access sources of dict examples, and the tokenizer of a model trained from scratch on them.

    fields: those in which at least one example has something. left_out: pictures that are missing or damaged, as far as
    the start knows; damaged: those that turned out to be when they were read, a list that grows.
    """

    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]
    fields: frozenset[str]
    left_out: Sequence[LeftOut] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    damaged: Sequence[LeftOut] = ()


class BuiltHereInfo(tfds.core.DatasetInfo):
    """What a data set says of itself that is made here and nowhere else."""

    def initialize_from_bucket(self) -> None:
        """Does nothing: TFDS would ask its public bucket, and leave an empty temporary folder behind each time."""


class Kept(Sequence):
    """A source whose examples stay in memory from their first reading on: those of a small data set are read often.

    Threads may read at once. Nobody may write into an example.
    """

    def __init__(self, source: Sequence[Mapping[str, Any]]):
        self._source = source
        self._examples: dict[int, Mapping[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        index = range(len(self))[index]
        if index not in self._examples:
            self._examples[index] = self._source[index]
        return self._examples[index]


def prompts_of(source: Sequence[Mapping[str, Any]]) -> collections.Counter[str]:
    """How often each prompt is asked, the most frequent first: of all examples where `source` has `prompts`.

    Otherwise of _LOOKED_AT of them, evenly spaced: to read an example is to decode its picture.
    """
    if (prompts := getattr(source, "prompts", None)) is None:
        places = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int)) if len(source) else ()
        prompts = [decode(source[int(place)]["prompt"]) for place in places]
    return collections.Counter(dict(collections.Counter(prompts).most_common()))


def make_dataset(
    source: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    threads: int = 2,
    prefetch: int | None = None,
) -> grain.DatasetIterator:
    """Returns an iterator over batches of `source`, as columns (see `as_columns`).

    Each epoch shuffles the order anew, from (`seed`, epoch). Examples that do not fill a batch are left out, other ones
    in each epoch. Of each batch only `rows` (indices into it; None = all) are read: processes that share a global batch
    read a part of it each, and the batch does not depend on their number. Neither does the order depend on `threads` (0
    reads in the calling thread) or `prefetch` (batches that are read ahead).

    The iterator's `get_state()` is JSON-able and does not depend on `rows`. `set_state` goes on with exactly the batch
    that would have followed.

    Raises:
      UserError: the source cannot fill one batch.
    """
    if len(source) < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs more examples than there are: {len(source)} in the data set; lower the "
            "batch size or enlarge the split"
        )
    rows = range(batch_size) if rows is None else [int(row) for row in rows]
    if any(not 0 <= row < batch_size for row in rows):
        raise ValueError(f"rows {list(rows)} are not all in [0, {batch_size})")

    in_batch = getattr(source, "in_batch", lambda indices, row: source[indices[row]])

    def read(indices: np.ndarray) -> Batch:
        return as_columns([decode(in_batch(indices, row)) for row in rows])

    # The order is one of indices, so that no process reads the rows of another one.
    dataset = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    # Batches are cut before the repetition: a batch never holds examples of two epochs, so never an example twice. Nor
    # does one that stands in for an example which cannot be read (`Readable.in_batch`).
    dataset = dataset.batch(batch_size, drop_remainder=True).map(read)
    if repeat:
        dataset = dataset.repeat()
    # Read ahead only a little: a batch of images is large, and the update is slower than the reading.
    buffer = max(2, threads) if prefetch is None else prefetch
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    return iter(dataset.to_iter_dataset(options))


def examples(
    source: Sequence[Mapping[str, Any]], limit: int | None = None, *, places: Iterable[int] | None = None
) -> list[dict[str, Any]]:
    """The first `limit` examples that can be read (all if None), in the order of the split, with text as `str`.

    Of `places` alone where they are given. None stands in for another. Raises UserError where none can be read.
    """
    read = getattr(source, "itself", source.__getitem__)
    there = filter(lambda example: example is not None, map(read, range(len(source)) if places is None else places))
    found = [decode(example) for example in itertools.islice(there, limit)]
    if not found and len(source) and limit != 0:
        source[0]  # It says why.
    return found


def as_columns(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Turns examples with the same fields into one dict of columns.

    Numbers and arrays of equal shape are stacked ([B, ...], images stay uint8); everything else, such as text, ragged
    arrays and lists, becomes a list of length B.
    """
    fields = rows[0].keys()
    for row in rows:
        if row.keys() != fields:
            raise ValueError(f"examples of a batch differ in their fields: {sorted(fields)} and {sorted(row)}")
    return {field: _column([row[field] for row in rows]) for field in fields}


def _column(values: list) -> Any:
    numeric = all(isinstance(value, np.ndarray | np.number | int | float | bool) for value in values)
    if numeric and len({np.shape(value) for value in values}) == 1:
        return np.stack(values)
    return values


def decode(value: Any) -> Any:
    """An example whose text is `str`: data sets hand out UTF-8 bytes and arrays of them."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: decode(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind in "OSU"):
        return [decode(inner) for inner in value]
    return value


def damaged(folder: Path, reason: str) -> UserError:
    """The error for a data set below `folder` that cannot be read."""
    return UserError(f"the data set {folder} cannot be read ({reason}); delete this directory to have it made anew")


INFO = "dataset_info.json"  # the file that says what a data set is, sent last


def fetch(folder: Path) -> None:
    """Fetches the versions of a prepared data set that are whole in a bucket, `folder`/VERSION. Raises UserError."""
    if url := storage.url_of(folder):
        for version in bucket.children(url):
            storage.fetch(folder / version, marker=INFO)


def open_builder(
    kind: type[tfds.core.GeneratorBasedBuilder], data_dir: Path, config: tfds.core.BuilderConfig
) -> tfds.core.GeneratorBasedBuilder:
    """The builder of a data set that is complete (`is_prepared`) or not there at all.

    TFDS takes every directory that is there for a complete one, and does not make what is missing in it.

    Raises:
      UserError: the data set does not say what it is, or not in a form that TFDS reads.
    """
    try:
        builder = kind(data_dir=data_dir, config=config)
        if not builder.is_prepared() and Path(builder.data_dir).exists():
            builder = kind(data_dir=data_dir, config=config)  # Another process may have made it in between.
            if not builder.is_prepared():
                raise damaged(Path(builder.data_dir), "dataset_info.json is missing")
    except (OSError, UserError):  # The caller explains those of the disk.
        raise
    except Exception as error:  # TFDS raises protobuf's own, among others.
        raise damaged(data_dir / kind.name / config.name, " ".join(str(error).split())) from error
    return builder


def prepare(builder: tfds.core.GeneratorBasedBuilder, **download: Any) -> None:
    """Makes a data set, on disk or in its bucket when this returns. `download`: of TFDS's DownloadConfig.

    TFDS's own announcements are dropped, and its progress bars are on terminals only: in a file each update is a line.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                # Everything is made here: do not look for a prepared copy in TFDS's public bucket.
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, **download),
                file_format=tfds.core.FileFormat.ARRAY_RECORD,
            )
    finally:
        tfds.display_progress_bar(True)
    folder = Path(builder.data_dir)  # data_dir/name/config/version
    sync_tree(folder)
    for parent in folder.parents[:3]:
        sync(parent)
    storage.send(folder, last=[INFO])
