"""The miniature world: scene graphs of a few objects on a 3 x 3 grid, sampled from a seed.

A scene is the ground truth of all else: of the picture (`render`), of the reference caption and the faulty captions
(`language`, `faults`), of the questions (`questions`) and of every judgement of the oracle.
"""

import dataclasses
import json

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
# Row-major cells of the 3 x 3 grid; cell // 3 is the row, cell % 3 the column.
PLACES = (
    "top left", "top centre", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
GROUNDS = ("grey", "white", "black", "brown")
PATTERNS = ("smooth", "gridded", "speckled")
MIN_OBJECTS, MAX_OBJECTS = 2, 6


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object: `dx`, `dy` in [-1, 1] jitter it inside its cell, `tilt` in [-1, 1] turns it a little."""

    shape: str
    colour: str
    size: str
    texture: str
    cell: int
    dx: float = 0.0
    dy: float = 0.0
    tilt: float = 0.0

    @property
    def subject(self) -> tuple[str, str]:
        """What names it in its scene."""
        return self.colour, self.shape

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in reading order (by cell) and the background (`ground` colour and `pattern`)."""

    objects: tuple[SceneObject, ...]
    ground: str
    pattern: str
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        fields = json.loads(text)
        fields["objects"] = tuple(SceneObject(**thing) for thing in fields["objects"])
        return cls(**fields)


def sample_scene(seed: int) -> Scene:
    """Draws a scene; the same seed gives the same scene on every machine (NumPy's PCG64)."""
    rng = np.random.default_rng([0x5CE9E5, seed])
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    cells = np.sort(rng.choice(len(PLACES), size=count, replace=False))
    # No two objects of a scene share both shape and colour, so that "the red star" names one object only.
    kinds = rng.choice(len(SHAPES) * len(COLOURS), size=count, replace=False)
    objects = []
    for cell, kind in zip(cells, kinds, strict=True):
        jitter = np.round(rng.uniform(-1, 1, size=3), 3)
        objects.append(
            SceneObject(
                shape=SHAPES[kind % len(SHAPES)],
                colour=COLOURS[kind // len(SHAPES)],
                size=str(rng.choice(SIZES)),
                texture=str(rng.choice(TEXTURES)),
                cell=int(cell),
                dx=float(jitter[0]),
                dy=float(jitter[1]),
                tilt=float(jitter[2]),
            )
        )
    return Scene(tuple(objects), ground=str(rng.choice(GROUNDS)), pattern=str(rng.choice(PATTERNS)), seed=seed)
