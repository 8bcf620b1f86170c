"""What was seen in many files, pictures and their captions, remembered from one start to the next by size and time.

An index is a JSON file, {"files": {name: [bytes, mtime in ns, what was seen]}}. A file that it knows is not opened
again while its size and time stay; what could not be read is always looked at again. So no index can be wrong for long,
a copy of a folder that keeps times can use that of the original, and whoever deletes one loses seconds.
"""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.files import make_directory, read_bytes
from balcap_jax.data import images

CACHE = "~/.cache/balcap_jax"
_THREADS = 8
_FEW = 1000  # Fewer pictures are looked at in a second: no index is kept.
_BLOCK = 64  # pictures that a thread takes at a time
Stamps = dict[str, list[int]]


def problems(paths: Mapping[str, str], index: Path) -> dict[str, str]:
    """{name: why it cannot be read} of those of `paths`, {name: path}, that do not begin as a picture does.

    The rest of a file is checked when it is read. `index` is the file that remembers them.
    """
    return seen_in(paths, index, images.check)[1]


def seen_in(paths: Mapping[str, str], index: Path, look: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """({name: look(path)}, {name: why it raised}) of the files `paths`, {name: path}.

    `look` gives what JSON can hold, or raises ImageError; threads call it, for files that `index` does not know.
    """

    def result(name: str) -> Any:
        try:
            return look(paths[name])
        except images.ImageError as error:
            return error

    known = _read(index) if len(paths) >= _FEW else {}
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = _stamps(paths, pool) if len(paths) >= _FEW else {}
        same = {name for name, stamp in stamps.items() if known.get(name, ())[:2] == stamp}
        new = dict(_each(pool, result, [name for name in paths if name not in same]))
    values = {name: known[name][2] if name in same else new[name] for name in paths}
    failed = {name: str(value) for name, value in values.items() if isinstance(value, images.ImageError)}
    values = {name: value for name, value in values.items() if name not in failed}
    fresh = {name: [*stamp, values[name]] for name, stamp in stamps.items() if name in values}
    if fresh != known:
        _write(index, fresh)
    return values, failed


def _each(pool: ThreadPoolExecutor, function: Callable[[str], Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, function(name)) of each, in order; threads take several at a time."""
    blocks = [names[start : start + _BLOCK] for start in range(0, len(names), _BLOCK)]
    for block in pool.map(lambda names: [(name, function(name)) for name in names], blocks):
        yield from block


def _stamps(paths: Mapping[str, str], pool: ThreadPoolExecutor) -> Stamps:
    """[bytes, mtime in ns] of each that is a file."""
    # Listing a folder says what is missing, and has many network disks send all sizes and times at once.
    there = {
        folder: set(names) for folder, names in _each(pool, _names_in, list(set(map(os.path.dirname, paths.values()))))
    }
    listed = [name for name, path in paths.items() if os.path.basename(path) in there[os.path.dirname(path)]]
    return {name: stamp for name, stamp in _each(pool, lambda name: _stamp(paths[name]), listed) if stamp}


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except (OSError, ValueError):
        return []


def _stamp(path: str) -> list[int]:
    try:
        state = os.stat(path)
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns] if stat.S_ISREG(state.st_mode) else []


def _read(index: Path) -> dict[str, list[Any]]:
    """What an index holds; {} where there is none, or one that is torn or of another form."""
    try:
        files = json_text.decode(read_bytes(index))["files"]
        return files if all(len(entry) == 3 for entry in files.values()) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write(index: Path, files: Mapping[str, list[Any]]) -> None:
    """Replaces the index in one step; several processes may do so at once."""
    try:
        make_directory(index.parent)
        handle, aside = tempfile.mkstemp(prefix=index.name, dir=index.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json_text.dumps({"files": files}))
            os.replace(aside, index)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        print(f"{index} cannot be written ({error.strerror}): files will be opened again at each start", flush=True)
