"""Model directories of earlier versions: `model.json` with the fields, `params/` with one zarr array per parameter.

`convert` turns them into checkpoints; nothing else reads them. One that came from a checkpoint has its small files, and
the names of its tensors in `hf_names.json`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from balcap_jax.cli.disk_errors import for_tensorstore, reason_of
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_object
from balcap_jax.models import fields as model_fields
from balcap_jax.models.formats.loading import DEFAULTS, EARLIER, EARLIER_NAMES
from balcap_jax.models.formats.safetensors import DTYPE_NAMES

_PARAMS = "params"
_COPY_AGAIN = "copy the model again"


def is_earlier(directory: Path) -> bool:
    return (directory / EARLIER).is_file()


def read_fields(directory: Path) -> dict[str, Any]:
    """The config group `model` of such a directory. Raises UserError where it is torn or lacks one."""
    fields = read_json_object(directory / EARLIER, _COPY_AGAIN)
    model_fields.check(fields, str(directory / EARLIER), _COPY_AGAIN)
    return {name: DEFAULTS[name] for name in model_fields.LATER if name in DEFAULTS} | fields


def read_names(directory: Path) -> dict[str, str]:
    """{name in the modules of transformers: name in the checkpoint that it came from}; {} where it came from none."""
    try:
        return read_json_object(directory / EARLIER_NAMES, _COPY_AGAIN)
    except FileNotFoundError:
        return {}


class Array:
    """A parameter on the disk, read whole or as one layer of it. Raises UserError when it is damaged."""

    def __init__(self, directory: Path, path: str):
        self._name = f"{directory / _PARAMS}: {path}"
        where = for_tensorstore(directory / _PARAMS) / path.replace("/", ".")
        # By default TensorStore takes a chunk that is not there for zeros.
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(where)}, "fill_missing_data_reads": False}
        try:
            self._store = tensorstore.open(spec, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error
        self.shape, self.dtype = tuple(self._store.shape), self._store.dtype.numpy_dtype
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"{self._name} holds {self.dtype.name}; {_COPY_AGAIN}")

    def read(self, layer: int | None) -> np.ndarray:
        try:
            return (self._store if layer is None else self._store[layer]).read().result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self._name} cannot be read: {reason_of(error)}; {_COPY_AGAIN}")
