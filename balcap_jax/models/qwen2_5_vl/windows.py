"""The window-major layout of an image: one static shape for every size, planned on the host.

In most of its layers the tower of Qwen2.5-VL attends within windows of m x m merged tokens. A merged token is a group
of MERGE x MERGE patches. An image becomes W windows of S = (MERGE m)^2 patch slots, the MERGE^2 patches of a merged
token side by side. The worst allowed image determines W; a mask covers slots and windows beyond the image's own. So
window attention is dense attention along the S axis, and full attention is the same over W * S. No program depends on
the size of an image.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

# Patches per side of a merged token (`spatial_merge_size` of every published Qwen2.5-VL).
MERGE = 2


class Plan(NamedTuple):
    """Where the patches of an image of `rows` x `columns` merged tokens lie.

    slot [W, S]: index of the patch in the order of `patches_of`, 0 without one; mask [W, S]: True with one.
    positions [W, S, 2]: its row and column, in patches. back [I]: merged token (raster order) -> index among the
    W * m^2 merged slots; token_mask [I], True for the image's tokens.
    """

    slot: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    back: np.ndarray
    token_mask: np.ndarray


@functools.lru_cache(maxsize=1024)
def plan(rows: int, columns: int, *, side: int, windows: int, tokens: int) -> Plan:
    """The layout of an image of `rows` x `columns` merged tokens: windows of `side` x `side`, W = windows, I = tokens.

    Raises:
      ValueError: the image needs more windows or tokens than there are.
    """
    down, across = -(-rows // side), -(-columns // side)
    if down * across > windows or rows * columns > tokens:
        raise ValueError(
            f"{rows} x {columns} tokens do not fit {windows} windows of {side} x {side} and {tokens} tokens"
        )
    padded = np.full((down * side, across * side), -1)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    token = np.full((windows, side * side), -1)
    token[: down * across] = padded.reshape(down, side, across, side).swapaxes(1, 2).reshape(-1, side * side)

    parts = MERGE * MERGE
    patch = np.where(token[..., None] >= 0, token[..., None] * parts + np.arange(parts), -1).reshape(windows, -1)
    mask = patch >= 0
    slot = np.maximum(patch, 0)
    # A patch's index counts through its merged token first, then through the merged tokens in raster order.
    row, column = np.divmod(slot // parts, columns)
    inner_row, inner_column = np.divmod(slot % parts, MERGE)
    positions = np.stack([row * MERGE + inner_row, column * MERGE + inner_column], axis=-1)

    flat = token.reshape(-1)
    back = np.zeros(tokens, np.int32)
    back[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    positions = np.where(mask[..., None], positions, 0).astype(np.int32)
    layout = Plan(slot, mask, positions, back, np.arange(tokens) < rows * columns)
    for array in layout:
        array.setflags(write=False)  # Every image of this size shares it.
    return layout


@functools.lru_cache
def windows_needed(tokens: int, max_aspect: float, side: int) -> int:
    """W: the most windows of `side` x `side` merged tokens that an image of at most `tokens` of them can need.

    The sides of a grid differ from those of an image, whose aspect is at most `max_aspect`, by a rounding of less than
    one. Without the bound on the aspect, an image of one row would decide for all.
    """
    grids = (
        (rows, columns)
        for rows in range(1, tokens + 1)
        for columns in range(1, tokens // rows + 1)
        if columns < max_aspect * (rows + 1) and rows < max_aspect * (columns + 1)
    )
    return max(-(-rows // side) * -(-columns // side) for rows, columns in grids)


def grid_of(height: int, width: int, *, factor: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Rows and columns of merged tokens, each `factor` pixels a side, after the resize of an image.

    The rule of transformers' Qwen2-VL image processors (`smart_resize`) with min and max pixels of min_tokens and
    max_tokens: each side to the nearest multiple, scaled first where the result is too large or too small. That rule
    itself may end above its maximum (an image of one row, min_tokens near max_tokens); then the image shrinks further.
    """
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns < min_tokens:
        scale = math.sqrt(min_tokens * factor**2 / (height * width))
        rows, columns = math.ceil(height * scale / factor), math.ceil(width * scale / factor)
    if rows * columns > max_tokens:
        scale = math.sqrt(height * width / (max_tokens * factor**2))
        rows, columns = max(1, math.floor(height / scale / factor)), max(1, math.floor(width / scale / factor))
    return min(rows, max_tokens // min(columns, max_tokens)), min(columns, max_tokens)


def patches_of(image: np.ndarray, patch_size: int) -> np.ndarray:
    """uint8 [rows * MERGE * patch, columns * MERGE * patch, 3] -> [patches, 3 * patch * patch], values unchanged.

    The patches of a merged token follow each other, merged tokens are in raster order; a patch is channel, row, column.
    """
    rows, columns = (length // (MERGE * patch_size) for length in image.shape[:2])
    split = image.reshape(rows, MERGE, patch_size, columns, MERGE, patch_size, 3)
    return np.einsum("aipbjqc->abijcpq", split).reshape(rows * columns * MERGE**2, -1)
