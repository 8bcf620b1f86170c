"""The classes of what a scene shows at each image token; the vision tower is pretrained on them."""

import numpy as np

from balcap_jax.data.scenes.world import COLOURS, GROUNDS, PATTERNS, SHAPES, SIZES, TEXTURES, Scene

# Number of classes of shape, colour, size and texture (0: no object there), of the ground and of its pattern.
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, len(TEXTURES) + 1, len(GROUNDS), len(PATTERNS))


def of_tokens(scene: Scene, side: int) -> np.ndarray:
    """Classes [side * side, 6] int32 of a square grid of image tokens, row by row.

    A token has the classes of the object in the cell of the 3 x 3 world that holds the token's centre.
    """
    cells = np.zeros((9, len(CLASSES)), np.int32)
    for thing in scene.objects:
        values = ((SHAPES, thing.shape), (COLOURS, thing.colour), (SIZES, thing.size), (TEXTURES, thing.texture))
        cells[thing.cell, :4] = [1 + known.index(value) for known, value in values]
    cells[:, 4:] = GROUNDS.index(scene.ground), PATTERNS.index(scene.pattern)
    third = (2 * np.arange(side) + 1) * 3 // (2 * side)
    return cells[(third[:, None] * 3 + third).ravel()]
