"""Parts of parameters from the tensors of a checkpoint: what one device holds is read, and nothing else is copied.

A tensor is mapped, cut in the layout of the file, and copied once into ours. Half of a model's numbers lie transposed
there; `_transpose` copies them block by block, so that source and result stay in the cache.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import numpy as np

from balcap_jax.models.formats.hf import Piece
from balcap_jax.models.formats.safetensors import Tensor, is_finite

Index = tuple[slice, ...]
_ALIGNMENT = 64  # bytes; XLA asks for it
_SMALL = 2**20  # bytes of a stack that is fetched whole: that needs no program
_ROWS, _ROW_BYTES = 256, 1024  # of a block that is transposed at once: source and result stay in the cache


def read_slice(
    entries: Sequence[tuple[Tensor, Piece]],
    shape: tuple[int, ...],
    index: Index,
    dtype: np.dtype | None,
    pool: Executor,
) -> np.ndarray:
    """The part `index` of a parameter of `shape`, which `entries` are the tensors of, as `dtype` (None: as stored).

    The layers are read by the threads of `pool`.

    Raises:
      UserError: a tensor cannot be read, or what is read of it holds NaN or infinity.
    """
    lengths = [len(range(size)[part]) for size, part in zip(shape, index, strict=True)]
    out = _aligned(lengths, np.dtype(dtype or entries[0][0].dtype))
    jobs: list[Callable[[], None]] = []
    for tensor, piece in entries:
        if piece.layer is None:
            jobs.append(_job(tensor, piece, index, out))
        elif piece.layer in (layers := range(shape[0])[index[0]]):
            jobs.append(_job(tensor, piece, index[1:], out[layers.index(piece.layer)]))
    for done in pool.map(lambda job: job(), jobs):
        del done  # What a thread raised is raised here.
    return out


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that a device of the CPU takes over as it is: others are copied, into memory that is made anew."""
    size = math.prod(shape) * dtype.itemsize
    held = np.empty(size + _ALIGNMENT, np.uint8)
    start = -held.ctypes.data % _ALIGNMENT
    return held[start : start + size].view(dtype).reshape(shape)


def _job(tensor: Tensor, piece: Piece, index: Index, out: np.ndarray) -> Callable[[], None]:
    def read() -> None:
        array = tensor.mapped(*piece.row.part, cut=lambda whole: piece.row.form.to_ours(whole, piece.shape)[index])
        stored = out if out.dtype == array.dtype else np.empty(out.shape, array.dtype)
        copy(stored, array)
        if not is_finite(stored):
            raise tensor.not_finite()
        if stored is not out:
            out[...] = stored

    return read


def row_of(stack: Any, row: int) -> np.ndarray:
    """`stack[row]` on the host, of an array of NumPy or JAX, or of `distributed.write_whole`."""
    if not isinstance(stack, jax.Array):
        return np.asarray(stack[row])
    if stack.nbytes <= _SMALL:
        return np.asarray(stack)[row]
    # The row is an operand: by `stack[row]` each row of each stack would be a program of its own.
    return np.asarray(jax.lax.dynamic_index_in_dim(stack, np.int32(row), keepdims=False))


def copy(out: np.ndarray, array: np.ndarray) -> None:
    """`out[...] = array` for arrays of one type; fast where `array` is a matrix that lies transposed."""
    bits = np.dtype(f"u{array.dtype.itemsize}")
    out, array = out.view(bits), array.view(bits)
    axis = next((i for i, stride in enumerate(array.strides) if stride == bits.itemsize and array.shape[i] > 1), None)
    if axis is None or axis == array.ndim - 1 or not out.flags.c_contiguous:
        out[...] = array
        return
    rows = int(np.prod(array.shape[: axis + 1]))
    # The reshape makes no copy: axes are split here that were one in the file.
    _transpose(out.reshape(rows, -1), array.reshape(rows, -1).T)


def _transpose(out: np.ndarray, rows: np.ndarray) -> None:
    """out [A, B] = rows [B, A].T for unsigned integers of 2 or 4 bytes; A is contiguous in `rows`.

    Block by block as 8-byte numbers, which are taken apart behind the transposition.
    """
    group = 8 // out.itemsize
    whole, width = out.shape[0] // group * group, _ROW_BYTES // out.itemsize
    grouped = out[:whole].reshape(whole // group, group, out.shape[1])
    for i in range(0, rows.shape[0], _ROWS):
        for j in range(0, whole, width):
            block = np.ascontiguousarray(rows[i : i + _ROWS, j : min(j + width, whole)]).view(np.uint64)
            turned = np.ascontiguousarray(block.T).view(out.dtype).reshape(block.shape[1], block.shape[0], group)
            for k in range(group):
                grouped[j // group : j // group + block.shape[1], k, i : i + _ROWS] = turned[:, :, k]
    out[whole:] = rows[:, whole:].T
