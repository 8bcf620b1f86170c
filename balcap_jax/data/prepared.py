"""TFDS data sets that are made on this machine: opened whole, or refused."""

from pathlib import Path

import tensorflow_datasets as tfds

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


def _open(kind, data_dir: Path, config) -> tfds.core.GeneratorBasedBuilder:
    try:
        return kind(data_dir=data_dir, config=config)
    except OSError:  # of the disk: the caller's to explain
        raise
    except Exception as error:  # protobuf's own, among others
        raise damaged(data_dir / kind.name / config.name, " ".join(str(error).split())) from error
