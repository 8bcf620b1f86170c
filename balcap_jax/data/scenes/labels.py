"""What a scene shows at each image token: the classes that the vision tower is pretrained on."""

import numpy as np

from balcap_jax.data.scenes.world import COLOURS, GROUNDS, PATTERNS, SHAPES, SIZES, TEXTURES, Scene

# Number of classes of shape, colour, size and texture (0: no object there), of the ground and of its pattern.
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, len(TEXTURES) + 1, len(GROUNDS), len(PATTERNS))


def of_tokens(scene: Scene, side: int) -> np.ndarray:
    """Classes [side * side, 6] int32 of a square grid of image tokens, row by row.

    A token has the classes of the object in the cell of the 3 x 3 world that holds the token's centre.
    """
    cells = np.zeros((9, len(CLASSES)), np.int32)
    for one in scene.objects:
        cells[one.cell, :4] = (
            1 + SHAPES.index(one.shape),
            1 + COLOURS.index(one.colour),
            1 + SIZES.index(one.size),
            1 + TEXTURES.index(one.texture),
        )
    cells[:, 4:] = GROUNDS.index(scene.ground), PATTERNS.index(scene.pattern)
    third = (2 * np.arange(side) + 1) * 3 // (2 * side)
    return cells[(third[:, None] * 3 + third).ravel()]
