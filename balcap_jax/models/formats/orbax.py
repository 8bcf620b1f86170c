"""Parameters on disk: a tree of arrays as Orbax writes it, which TensorStore reads and writes array by array.

A conversion must not hold a whole model in memory, which Orbax's own `save` asks for. So `create` lets Orbax write the
directory with placeholders, and replaces each by an array of the true shape that is written layer by layer. The other
parts turn what a failing disk makes Orbax and TensorStore say and leave into one reason, and find a path that both
accept.
"""

import atexit
import contextlib
import functools
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_object

# A chunk is compressed, checked and buffered as a whole, several at a time.
_CHUNK_BYTES = 64 * 2**20
_COPY_AGAIN = "copy the model again, or convert or save it anew"


# ------------------------------------------------------------------------------------------------- writing


def is_stacked(path: str) -> bool:
    """Whether a parameter has a leading layer axis."""
    return "layers/" in path


def create(directory: Path, specs: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, ts.TensorStore]:
    """Makes the arrays {path: (shape, dtype)} below `directory`; write each with `arrays[path][...].write(x).result()`.

    The caller must write every element before anyone reads the directory.
    """
    placeholders = {path: np.zeros(1, dtype) for path, (_, dtype) in specs.items()}
    # Of several processes only the one that calls this writes: Orbax must not wait for the others.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me} if jax.process_count() > 1 else None, barrier_sync_key_prefix="alone"
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(for_tensorstore(directory), flax.traverse_util.unflatten_dict(placeholders, sep="/"))
    return {path: _open(directory, path, _metadata(path, *spec)) for path, spec in specs.items()}


def write_tree(directory: Path, params: Mapping[str, Any]) -> None:
    """Writes a whole tree of arrays; the host holds one parameter at a time."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    arrays = create(directory, {path: (leaf.shape, np.dtype(leaf.dtype)) for path, leaf in flat.items()})
    for path, leaf in flat.items():
        arrays[path].write(np.asarray(leaf)).result()


def _metadata(path: str, shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    chunk, axis = list(shape), 0
    if is_stacked(path):
        chunk[0], axis = 1, 1
    if len(chunk) > axis:
        row = math.prod(chunk) // max(chunk[axis], 1) * dtype.itemsize
        chunk[axis] = max(1, min(chunk[axis], _CHUNK_BYTES // max(row, 1)))
    return {
        "shape": list(shape),
        "chunks": chunk,
        "dtype": "bfloat16" if dtype == jax.numpy.bfloat16 else dtype.str,
        "compressor": None,
        "order": "C",
        "dimension_separator": ".",
        "fill_value": None,
    }


# ------------------------------------------------------------------------------------------------- reading


def open_all(directory: Path) -> dict[str, ts.TensorStore]:
    """The arrays {path: array} below `directory`; read them, whole or layer by layer, with `read`.

    Raises:
      UserError: there are none, or one cannot be opened.
    """
    with _reading(directory):
        tree = read_json_object(directory / "_METADATA", _COPY_AGAIN)
        try:
            if tree.get("use_ocdbt"):
                raise ValueError("OCDBT")
            leaves = tree["tree_metadata"].values()
            for leaf in leaves:
                # Orbax would read an array of another kind in another way, or leave it out.
                kind = leaf["value_metadata"]
                if kind["value_type"] != "np.ndarray" or kind.get("skip_deserialize"):
                    raise ValueError("value_metadata")
            paths = ["/".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError("its _METADATA is not what this version writes") from error
        return {path: _open(directory, path) for path in paths}


def read(directory: Path, array: ts.TensorStore, layer: int | None = None) -> np.ndarray:
    """One of the arrays of `open_all(directory)`, or one layer of it. Raises UserError when it is damaged."""
    with _reading(directory):
        return (array if layer is None else array[layer]).read().result()


def restore(directory: Path, like: Any) -> Any:
    """The tree with the types and shardings of `like` (ShapeDtypeStructs); each device reads what it holds.

    Raises UserError when it is damaged, or holds NaN or infinity.
    """
    with _reading(directory), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(for_tensorstore(directory), like)
        for where, finite in jax.tree_util.tree_leaves_with_path(_are_finite(tree)):
            if not finite:
                name = jax.tree_util.keystr(where, simple=True, separator="/")
                raise ValueError(f"{name} holds NaN or infinity")
        return tree


@jax.jit
def _are_finite(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.numpy.isfinite(leaf).all(), tree)


def _open(directory: Path, path: str, metadata: dict[str, Any] | None = None) -> ts.TensorStore:
    spec: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(for_tensorstore(directory) / path.replace("/", "."))},
        # Orbax takes a chunk that is not there for a damaged checkpoint, so TensorStore must write zeros too.
        "store_data_equal_to_fill_value": True,
    }
    if metadata is None:
        # By default TensorStore takes a chunk that is not there for zeros.
        return ts.open(spec | {"fill_missing_data_reads": False}, open=True, read=True).result()
    return ts.open(spec | {"metadata": metadata}, create=True, delete_existing=True).result()


# ------------------------------------------------------------------------------------------------- disks that fail


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Turns failures with the files below `directory` into one UserError, without tracebacks beside it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        # TensorStore: "STATUS: what: ... local file "name": ... cause [tensorstore_spec=...]"
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        text = re.sub(r"\s*\[(tensorstore_spec|source locations).*", "", text, flags=re.DOTALL)
        reason = " ".join((text if isinstance(error, OSError) else text.rpartition(": ")[2]).split())
        file = re.search(r'local file "(.*?)"', text)
        if file and file[1] not in reason:
            reason = f"{file[1]}: {reason}"
        raise UserError(f"the parameters at {directory} cannot be read: {reason}; {_COPY_AGAIN}") from error


def reason_of(error: BaseException) -> str:
    """The cause in a few words, out of TensorStore's "STATUS: what: file: ...: cause [details]" among others."""
    if "No space left" in str(error):
        return "no space left on the disk"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    clauses = re.sub(r"\s*\[.*", "", str(error), flags=re.DOTALL).split(": ")
    if len(clauses) > 1 and clauses[0].isupper():
        return f"{clauses[0]}: {clauses[-1]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def remove_unfinished(directory: Path, quiet: float = 0.1, patience: float = 3.0) -> None:
    """Deletes a directory that a failed save has left behind, as far as the disk lets it.

    TensorStore's other writes go on after the first one has failed, and make their directories again. So this repeats
    until the directory has stayed away for `quiet` seconds, or `patience` seconds are over.
    """
    deadline = time.monotonic() + patience
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(quiet)
        if not directory.exists() or time.monotonic() > deadline:
            return


# ------------------------------------------------------------------------------------------------- paths


def for_tensorstore(directory: Path) -> Path:
    r"""An absolute path to `directory` whose parents have names that TensorStore accepts.

    TensorStore takes a\b for a/b, and refuses names that end in .__lock or are no UTF-8. A link avoids them.
    """
    directory = directory.absolute()
    return _reached(directory.parent) / directory.name


@functools.cache
def _reached(folder: Path) -> Path:
    try:
        text = str(folder.relative_to(folder.anchor))
        text.encode()
        if "\\" not in text and not any(part.endswith(".__lock") for part in folder.parts):
            return folder
    except UnicodeEncodeError:
        pass
    link = Path(tempfile.mkdtemp(prefix="balcap-link-"), "to")
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    link.symlink_to(folder)
    return link
