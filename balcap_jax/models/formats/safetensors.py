"""Reading and writing the safetensors files of a checkpoint directory, tensor by tensor, as NumPy arrays.

A file is an 8-byte little-endian length, a JSON header of that length ({name: dtype, shape, data_offsets}) and the
tensors' bytes (huggingface/safetensors, README "Format"). `Tensor.mapped` maps one tensor at a time: mapped pages count
as resident memory. Of a model in a bucket, ranges of its weights are read, and the other files fetched.
"""

import math
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of the types that only tensors beside the model may have.
_OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8}
# By bytes of a number: the bits besides the sign, and infinity, beyond which NaN is too.
_MAGNITUDES = {
    np.dtype(np.float32): (np.uint32(0x7FFFFFFF), 0x7F800000),
    np.dtype(np.float16): (np.uint16(0x7FFF), 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16(0x7FFF), 0x7F80),
}
_CHECKED = 2**18  # numbers at once, few enough for the cache
_COMPARED = 2**26  # bytes of two tensors that are compared at once

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_STAY = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

PassedOver = Callable[[str, tuple[int, ...]], bool]
"""Whether a tensor of this name and shape is none of the model's."""

_NAMED = 8  # shards that an error names; it counts the others
_LONGEST_NAME = 255  # bytes; file systems take no more
# The reference implementation refuses longer headers too.
_LONGEST_HEADER = 100_000_000
_DOWNLOAD_AGAIN = "download or copy it again"


class Tensor(NamedTuple):
    """Where a tensor lies: `start` is the offset in bytes of its data in `file`."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """The tensor, or one of `parts` equal pieces of its first axis; only that piece is read."""
        start, size, shape = self._piece(part, parts)
        data = self._bytes(start, size)
        array = data.view(self.dtype).reshape(shape)
        if not is_finite(array):
            raise self.not_finite()
        return array

    def mapped(
        self, part: int = 0, parts: int = 1, cut: Callable[[np.ndarray], np.ndarray] = lambda array: array
    ) -> np.ndarray:
        """`cut` of a read-only view of the file: only pages that are looked at are read, and no number is checked.

        The map ends with the last reference to the array. In a bucket the bytes from the first to the last that a view
        by `cut` spans are read, at once.
        """
        start, size, shape = self._piece(part, parts)
        if not size:
            return cut(np.empty(shape, self.dtype))
        if storage.is_remote(self.file):
            return self._downloaded(start, size, shape, cut)
        try:
            data = np.memmap(self.file, np.uint8, "r", start, (size,))
        except OSError as error:
            raise self._unreadable(error) from error
        except ValueError as error:
            raise self._cut_short() from error
        return cut(data.view(np.ndarray).view(self.dtype).reshape(shape))

    def _downloaded(
        self, start: int, size: int, shape: tuple[int, ...], cut: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        room = np.empty(size, np.uint8)  # Pages that nothing is written to take no memory.
        view = cut(room.view(self.dtype).reshape(shape))
        low, high = (int(bound) - room.ctypes.data for bound in np.lib.array_utils.byte_bounds(view))
        if not view.size:
            return view
        if low < 0 or high > size:  # A copy.
            room[:] = self._bytes(start, size)
            return cut(room.view(self.dtype).reshape(shape))
        room[low:high] = self._bytes(start + low, high - low)
        return view

    def equals(self, other: "Tensor") -> bool:
        """Whether two tensors hold the same bytes; only a part of them is in memory at a time."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        for done in range(0, self.size, _COMPARED):
            size = min(_COMPARED, self.size - done)
            if not np.array_equal(self._bytes(self.start + done, size), other._bytes(other.start + done, size)):
                return False
        return True

    def not_finite(self) -> UserError:
        """What to say of NaN or infinity in it."""
        return UserError(
            f"{self.file}: tensor {self.name} holds NaN or infinity; download it again, or take an earlier one"
        )

    def _piece(self, part: int, parts: int) -> tuple[int, int, tuple[int, ...]]:
        """(offset in the file, bytes, shape) of one of `parts` equal pieces of the first axis."""
        shape = (self.shape[0] // parts, *self.shape[1:]) if parts > 1 else self.shape
        size = self.size // parts
        return self.start + part * size, size, shape

    def _bytes(self, start: int, size: int) -> np.ndarray:
        try:
            if storage.is_remote(self.file):
                data = np.frombuffer(storage.read_range(self.file, start, size), np.uint8)
            else:
                data = np.fromfile(self.file, np.uint8, size, offset=start)
        except OSError as error:
            raise self._unreadable(error) from error
        if data.size != size:
            raise self._cut_short()
        return data

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.file} cannot be read at tensor {self.name}: {error.strerror or error}; {_DOWNLOAD_AGAIN}"
        )

    def _cut_short(self) -> UserError:
        return UserError(f"{self.file} is cut short at tensor {self.name}; {_DOWNLOAD_AGAIN}")


def is_finite(array: np.ndarray) -> bool:
    """Whether an fp32, fp16 or bf16 array holds neither NaN nor infinity; about 2 GB a second."""
    keep, infinity = _MAGNITUDES[array.dtype]
    bits = np.ascontiguousarray(array).reshape(-1).view(keep.dtype)
    return all((bits[i : i + _CHECKED] & keep).max() < infinity for i in range(0, len(bits), _CHECKED))


class NewTensor(NamedTuple):
    """A tensor to write; `produce` makes its array at the time of the write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ------------------------------------------------------------------------------------------------- reading


def fetch(directory: Path) -> Path:
    """Fetches the small files of a directory in a bucket; weights stay there. Raises UserError as `storage.fetch`."""
    return storage.fetch(directory, but=_STAY, deep=False)


def read_directory(directory: Path, passed_over: PassedOver = lambda name, shape: False) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory by name, in the order of its shards, from their headers alone.

    A file model.safetensors comes before an index of other shards, as in transformers. The result leaves out tensors
    that are `passed_over`, which may be of any type.

    Raises:
      UserError: no weights, or pickled weights only. A shard that is missing, cut short or no safetensors file. A
        tensor of a type other than fp32, fp16 and bf16, in two shards, or that the index places elsewhere.
    """
    index, files = _shards(directory)
    if missing := [file for file in files if not storage.is_file(directory / file)]:
        raise _no_weights(directory, missing, INDEX if index else "")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in read_file(directory / file, passed_over):
            if tensor.name in tensors:
                raise UserError(
                    f"{tensor.file} holds tensor {tensor.name}, which {tensors[tensor.name].file.name} holds too; "
                    f"delete the shard that does not belong to this checkpoint"
                )
            tensors[tensor.name] = tensor
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{directory / file} lacks tensor {name}, which {INDEX} places there; {_DOWNLOAD_AGAIN}")
    return {name: tensor for name, tensor in tensors.items() if not passed_over(name, tensor.shape)}


def problems(directory: Path, passed_over: PassedOver = lambda name, shape: False) -> list[UserError]:
    """What is wrong with the files of weights of a directory, each taken alone; `read_directory` raises the first."""
    try:
        index, files = _shards(directory)
    except UserError as error:
        return [error]
    missing = [file for file in files if not storage.is_file(directory / file)]
    found = [_no_weights(directory, missing, INDEX if index else "")] if missing else []
    for file in files:
        if file not in missing:
            try:
                read_file(directory / file, passed_over)
            except UserError as error:
                found.append(error)
    return found


def _shards(directory: Path) -> tuple[dict[str, str], list[str]]:
    """(the index, {} = there is none that counts; the files of weights that there should be)."""
    index = _read_index(directory)
    if WEIGHTS not in index.values() and storage.is_file(directory / WEIGHTS):
        index = {}
    return index, sorted(set(index.values())) if index else [WEIGHTS]


def _read_index(directory: Path) -> dict[str, str]:
    """{tensor: file} of the index; empty where there is none."""
    path = directory / INDEX
    try:
        content = read_json(path, _DOWNLOAD_AGAIN, unique=True)
    except FileNotFoundError:
        return {}
    index = content.get("weight_map") if isinstance(content, dict) else None
    problem = "" if isinstance(index, dict) else "it has none"
    for name, file in index.items() if not problem else ():
        if not _is_beside(file):
            problem = f"tensor {name} is in {reprlib.repr(file)}"
            break
    if problem:
        raise UserError(
            f"{path} is no index of shards (its weight_map must name files beside it: {problem}); {_DOWNLOAD_AGAIN}"
        )
    return index


def _is_beside(file: Any) -> bool:
    """Whether this can name a file of the directory itself; a name with a folder in it would lead elsewhere."""
    plain = isinstance(file, str) and file not in ("", "..") and Path(file).name == file
    return plain and file.isprintable() and len(os.fsencode(file)) <= _LONGEST_NAME


def _no_weights(directory: Path, missing: Sequence[str], index: str) -> UserError:
    first, *others = missing
    if index and others:
        named = f"{directory / first}, {', '.join(others[: _NAMED - 1])}"
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        return UserError(f"{named}{more} are missing, though {index} names them; download these shards too")
    if index:
        return UserError(f"{directory / first} is missing, though {index} names it; download this shard too")
    shards = [path.name for path in storage.files_in(directory, ".safetensors")]
    if shards:
        return UserError(f"{directory / INDEX} is missing beside {shards[0]}; download the index too")
    for pattern in PICKLES:
        for path in storage.files_in(directory, pattern.removeprefix("*")):
            return UserError(
                f"{path} is a pickle, which can run code when it is read, and there is no {WEIGHTS}; take the "
                f"checkpoint's safetensors files, or save it again with transformers"
            )
    return UserError(f"{directory} holds no weights: {first} is missing; give the directory of a whole checkpoint")


def read_file(path: Path, passed_over: PassedOver = lambda name, shape: False) -> list[Tensor]:
    """The tensors of one file, from its header. Raises UserError as `read_directory` does."""
    try:
        storage.refuse_pointer(path)
        size = storage.size_of(path)
        length = int.from_bytes(storage.read_range(path, 0, 8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise UserError(f"{path} is cut short or no safetensors file ({size} bytes); {_DOWNLOAD_AGAIN}")
        text = storage.read_range(path, 8, length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    where = f"{path} is no safetensors file: its header"
    header = json_text.parse_object(text, where, _DOWNLOAD_AGAIN, unique=True)
    header.pop("__metadata__", None)
    try:
        tensors = [_read_entry(path, name, entry, 8 + length, passed_over) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file: its header cannot be read; {_DOWNLOAD_AGAIN}") from error
    _check_places(path, tensors, 8 + length, size)
    return tensors


def _check_places(path: Path, tensors: Sequence[Tensor], data: int, size: int) -> None:
    """Raises UserError unless the tensors' bytes follow each other from `data` to the file's end, as the format asks.

    Of two tensors that overlap, one would hold a part of the other.
    """
    end, before = data, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != end:
            problem = f"overlaps {before}" if tensor.start < end else f"leaves a gap behind {before}"
            raise UserError(f"{path} is damaged: tensor {tensor.name} {problem}; {_DOWNLOAD_AGAIN}")
        end, before = end + tensor.size, tensor.name
    if end > size:
        raise UserError(f"{path} is cut short: {size} bytes, of {end} that its header needs; {_DOWNLOAD_AGAIN}")
    if end < size:
        raise UserError(f"{path} is damaged: {size} bytes, {size - end} more than its header says; {_DOWNLOAD_AGAIN}")


def _read_entry(path: Path, name: str, entry: dict[str, Any], data: int, passed_over: PassedOver) -> Tensor:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None and passed_over(name, shape):
        dtype = np.dtype((np.void, _OTHER_SIZES[entry["dtype"]]))
    if dtype is None:
        raise UserError(
            f"{path}: tensor {name} is of type {entry['dtype']}, only {', '.join(DTYPES)} can be read; take the "
            f"checkpoint that is not quantised"
        )
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError(name)
    tensor = Tensor(name, path, dtype, shape, data + start)
    if end - start != tensor.size:
        raise ValueError(name)
    return tensor


# ------------------------------------------------------------------------------------------------- writing


def write_directory(
    directory: Path,
    tensors: Sequence[NewTensor],
    *,
    shard_bytes: int,
    progress: Callable[[int], None] = lambda written: None,
) -> None:
    """Writes tensors in their order, in shards of at most `shard_bytes` (a longer tensor has a shard of its own).

    One shard is called model.safetensors; several are numbered, with an index beside them, as transformers does.
    `progress` gets the number of bytes after each tensor.
    """
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(directory / WEIGHTS, shards[0], progress)
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, shard, progress)
        where |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": dict(sorted(where.items()))}
    (directory / INDEX).write_text(json_text.dumps(index, indent=2) + "\n")


def write_file(
    path: Path, tensors: Sequence[NewTensor], progress: Callable[[int], None] = lambda written: None
) -> None:
    """Writes tensors in their order into one file; raises UserError for one that holds NaN or infinity."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires a writer, and accepts "pt"
    offset = 0
    for tensor in tensors:
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = entry | {"data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    text = json_text.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Data starts at a multiple of 8, so that readers may map it.
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = tensor.produce()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name} is {array.dtype}{array.shape}, {tensor.dtype}{tensor.shape} was announced"
                )
            if not is_finite(array):
                raise UserError(
                    f"tensor {tensor.name} would hold NaN or infinity as {tensor.dtype}; give a type with a larger "
                    f"range, or another model"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            progress(tensor.size)
