"""Draws a scene graph: one anti-aliased RGB picture per scene, the same bytes for the same graph.

All lengths are in pixels of the default 96 x 96 picture (a 32-pixel cell) and are scaled to the size of the picture.
So the proportions do not depend on the resolution, and neither does what a vision tower can tell apart.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from balcap_jax.data.scenes.world import Scene, SceneObject

# The colours are far apart from each other and from every ground, also where stripes and dots mix them.
COLOUR_RGB = {
    "red": (214, 28, 44),
    "green": (30, 150, 62),
    "blue": (32, 84, 228),
    "yellow": (255, 222, 30),
    "purple": (156, 60, 196),
    "orange": (255, 120, 0),
}
GROUND_RGB = {
    "grey": (150, 152, 156),
    "white": (244, 244, 240),
    "black": (26, 26, 30),
    "brown": (104, 70, 46),
}
SUPERSAMPLE = 3  # A picture is drawn three times larger and averaged down: PIL itself draws hard edges.
CELL = 32.0  # pixels of a cell at the default size
RADIUS = {"small": 8.4, "large": 13.4}
# How far the centre may move at jitter 1. With the largest reach of a tilted shape (1.08 of its radius) this keeps
# every object inside its own cell: 1.08 * 13.4 + 1.4 = 15.9 and 1.08 * 8.4 + 4.5 = 13.6, both below 16.
JITTER = {"small": 4.5, "large": 1.4}
MAX_TILT = 12.0  # degrees at tilt 1
OUTLINE = {"small": 0.9, "large": 1.3}
TEXTURE_PERIOD = 4.8


def render(scene: Scene, size: int = 96) -> np.ndarray:
    """Returns the picture of `scene`, uint8 [size, size, 3]; an object never leaves its cell of the 3 x 3 grid."""
    edges = [round(i * size / 3) for i in range(4)]
    picture = _background(scene, size)
    for thing in scene.objects:
        top, bottom = edges[thing.row], edges[thing.row + 1]
        left, right = edges[thing.column], edges[thing.column + 1]
        colour, cover = _tile(thing, right - left, bottom - top, size / (3 * CELL))
        cell = picture[top:bottom, left:right]
        cell += cover * (colour - cell)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _tile(thing: SceneObject, width: int, height: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """One object on a cell of its own: colour float32 [height, width, 3] and coverage float32 [height, width, 1]."""
    unit = scale * SUPERSAMPLE
    big = (width * SUPERSAMPLE, height * SUPERSAMPLE)
    radius = RADIUS[thing.size] * unit
    reach = JITTER[thing.size] * unit
    x, y = big[0] / 2 + thing.dx * reach, big[1] / 2 + thing.dy * reach
    angle = math.radians(MAX_TILT * thing.tilt)
    base = COLOUR_RGB[thing.colour]
    edge = _mix(base, (0, 0, 0), 0.5)

    cover = Image.new("L", big, 0)
    paint = Image.new("RGB", big, base)
    on_cover, on_paint = ImageDraw.Draw(cover), ImageDraw.Draw(paint)
    _draw_texture(on_paint, thing, (x, y), angle, unit)
    # The outline is drawn twice as wide, centred on the edge; its outer half is cut off by the coverage.
    line = round(2 * OUTLINE[thing.size] * unit)
    if thing.shape in ("circle", "ring"):
        _disc(on_cover, x, y, 0.95 * radius, fill=255)
        _disc(on_paint, x, y, 0.95 * radius + line / 2, outline=edge, width=line)
        if thing.shape == "ring":
            _disc(on_cover, x, y, 0.42 * radius, fill=0)
            _disc(on_paint, x, y, 0.42 * radius + line / 2, outline=edge, width=line)
    else:
        corners = [(x + radius * u, y + radius * v) for u, v in _turn(_OUTLINES[thing.shape], angle)]
        on_cover.polygon(corners, fill=255)
        on_paint.line([*corners, corners[0], corners[1]], fill=edge, width=line, joint="curve")
    colour = np.asarray(paint.resize((width, height), Image.Resampling.BOX), np.float32)
    coverage = np.asarray(cover.resize((width, height), Image.Resampling.BOX), np.float32)[..., None] / 255
    return colour * _shade(height), coverage


def _draw_texture(draw: ImageDraw.ImageDraw, thing: SceneObject, centre, angle: float, unit: float) -> None:
    if thing.texture == "plain":
        return
    # Light marks, but dark ones on yellow, where light ones would not show; both keep the hue of the mean recognisable.
    dark = thing.colour == "yellow"
    mark = _mix(COLOUR_RGB[thing.colour], (90, 50, 0) if dark else (255, 255, 255), 0.7 if dark else 0.78)
    period = TEXTURE_PERIOD * unit
    x, y = centre
    # Marks further out than the farthest corner, 1.16 radii away, would not show.
    reach = math.ceil(1.2 * RADIUS[thing.size] / TEXTURE_PERIOD)
    steps = range(-reach, reach + 1)
    if thing.texture == "striped":
        along = (math.cos(angle - math.pi / 4), math.sin(angle - math.pi / 4))
        across = (-along[1], along[0])
        half = 5 * period
        for step in steps:
            mid = (x + across[0] * step * period, y + across[1] * step * period)
            ends = [(mid[0] - along[0] * half, mid[1] - along[1] * half)]
            ends.append((mid[0] + along[0] * half, mid[1] + along[1] * half))
            draw.line(ends, fill=mark, width=round(0.42 * period))
    else:
        dot = 0.29 * period
        cos, sin = math.cos(angle), math.sin(angle)
        for row in steps:
            for column in steps:
                u, v = (column + 0.5 * (row % 2)) * period, 0.87 * row * period
                _disc(draw, x + cos * u - sin * v, y + sin * u + cos * v, dot, fill=mark)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, **style) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), **style)


def _mix(first, second, share: float) -> tuple[int, int, int]:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def _regular(count: int, radii: tuple[float, ...], rise: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Corners at equal angles from the top, with the radii in turn; `rise` moves all of them downwards."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return tuple(
        (radii[i % len(radii)] * math.sin(a), rise - radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)
    )


def _turn(points, angle: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(cos * u - sin * v, sin * u + cos * v) for u, v in points]


_ARM, _TIP = 0.34, 0.98
# In units of the radius, y downwards; every corner stays within 1.08 of the centre in x and y at any allowed tilt.
_OUTLINES = {
    "square": ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "triangle": _regular(3, (1.1,), rise=0.18),
    "star": _regular(10, (1.08, 0.54), rise=0.06),
    "cross": (
        (-_ARM, -_TIP), (_ARM, -_TIP), (_ARM, -_ARM), (_TIP, -_ARM), (_TIP, _ARM), (_ARM, _ARM),
        (_ARM, _TIP), (-_ARM, _TIP), (-_ARM, _ARM), (-_TIP, _ARM), (-_TIP, -_ARM), (-_ARM, -_ARM),
    ),
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def _shade(height: int) -> np.ndarray:
    """Lit from above: brightness falls by a tenth from the top to the bottom of a cell, float32 [height, 1, 1]."""
    return np.linspace(1.04, 0.94, height, dtype=np.float32)[:, None, None]


@functools.lru_cache(maxsize=64)
def _plain_background(ground: str, pattern: str, size: int) -> np.ndarray:
    """Ground colour with a slight diagonal gradient and, for "gridded", thin lines; float32 [size, size, 3]."""
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 7 * (ramp[:, None] * 0.7 + ramp[None, :] * 0.3)
    base = np.asarray(GROUND_RGB[ground], np.float32) - light[..., None]
    if pattern == "gridded":
        spacing, width = 8 * size / 96, max(1, round(size / 96))
        on_line = np.zeros(size, bool)
        for i in range(12):
            start = round((i + 0.5) * spacing)
            on_line[start : start + width] = True
        base[on_line[:, None] | on_line[None, :]] += _relief(ground)
    base.setflags(write=False)
    return base


def _background(scene: Scene, size: int) -> np.ndarray:
    picture = _plain_background(scene.ground, scene.pattern, size).copy()
    if scene.pattern == "speckled":
        rng = np.random.default_rng([0x5BEC4, scene.seed])
        grain, count = max(1, round(size / 96)), 420
        rows, columns = rng.integers(0, size - grain + 1, size=(2, count))
        sign = np.where(rng.random(count) < 0.8, 1.4, -0.6).astype(np.float32)[:, None] * _relief(scene.ground)
        for dy in range(grain):
            for dx in range(grain):
                picture[rows + dy, columns + dx] += sign
    return picture


def _relief(ground: str) -> float:
    """Grey levels by which grid lines and speckles differ from their ground: they are darker on light grounds."""
    return -38.0 if ground in ("grey", "white") else 40.0
