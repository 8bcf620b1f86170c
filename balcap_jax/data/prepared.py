"""TFDS data sets that are made on this machine: opened whole, or refused."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from balcap_jax import durable
from balcap_jax.errors import UserError


def damaged(folder: Path, reason: str) -> UserError:
    """What to say of a data set below `folder` that cannot be read."""
    return UserError(f"the data set {folder} cannot be read ({reason}); delete this directory to have it made anew")


def open_builder(
    kind: type[tfds.core.GeneratorBasedBuilder], data_dir: Path, config: tfds.core.BuilderConfig
) -> tfds.core.GeneratorBasedBuilder:
    """The builder of a data set that is whole (`is_prepared`) or not there at all.

    TFDS takes a directory that is there for a whole one, and does not make what is missing in it.

    Raises:
      UserError: the data set does not say what it is, or not in a form that TFDS reads.
    """
    builder = _open(kind, data_dir, config)
    if not builder.is_prepared() and Path(builder.data_dir).exists():
        builder = _open(kind, data_dir, config)  # Another process may have made it between the two questions.
        if not builder.is_prepared():
            raise damaged(Path(builder.data_dir), "dataset_info.json is missing")
    return builder


def prepare(builder: tfds.core.GeneratorBasedBuilder, **download: Any) -> None:
    """Makes a data set; what TFDS gives its name is on disk when this returns. `download`: of TFDS's DownloadConfig."""
    builder.download_and_prepare(
        # Everything is made here: do not look for a prepared copy in TFDS's public bucket.
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, **download),
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    folder = Path(builder.data_dir)  # data_dir/name/config/version
    durable.sync_tree(folder)
    for parent in folder.parents[:3]:
        durable.sync(parent)


def _open(kind, data_dir: Path, config) -> tfds.core.GeneratorBasedBuilder:
    try:
        return kind(data_dir=data_dir, config=config)
    except OSError:  # of the disk: the caller's to explain
        raise
    except Exception as error:  # protobuf's own, among others
        raise damaged(data_dir / kind.name / config.name, " ".join(str(error).split())) from error
