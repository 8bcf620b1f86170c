"""Figures of studies as SVG: panels of curves and of labelled points, means over seeds with a dot for each seed."""

import dataclasses
import html
import math
from collections.abc import Callable, Iterator, Sequence

from balcap_jax.report.charts import scale, short_number, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 220, 44, 14, 26, 40  # pixels of a panel, and its margins
LEGEND, LEGEND_ENTRY = 24, 150
LABEL, LETTER = 11, 6.5  # height of a label, and width of one of its letters
COLOURS = ("#1f5fa8", "#b3541e", "#2e7d32", "#7b3fa0", "#c2185b", "#5d6770", "#00838f", "#8d6e00")
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.t{font-weight:600}.k{text-anchor:middle;fill:#666}"
    ".n{text-anchor:end;fill:#666}.g{stroke:#e3e3e3}.l{fill:none;stroke-width:2}.d{stroke-dasharray:4 3}"
)

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """Means `points`, joined by a line where `line`, and the `seeds` that they are of. label: a text beside each point.

    Series of one name have one entry in the legend.
    """

    name: str
    points: Sequence[Point]
    colour: int
    seeds: Sequence[Point] = ()
    line: bool = True
    dashed: bool = False
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """log_x: the x axis has a tick at each x of its points, evenly apart by factors."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False


def svg(panels: Sequence[Panel], title: str, columns: int = 3) -> str:
    """The panels in rows of `columns`, and one legend below them; those without a point are left out."""
    panels = [panel for panel in panels if any(one.points for one in panel.series)]
    columns = max(1, min(columns, len(panels)))
    names = {one.name: one for panel in panels for one in panel.series if one.points and not one.label}
    each = max(1, columns * WIDTH // LEGEND_ENTRY)
    legend = LEGEND * math.ceil(len(names) / each)
    width, height = columns * WIDTH, math.ceil(len(panels) / columns) * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + legend}" width="{width}" '
        f'height="{height + legend}" role="img"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height + legend}" fill="#fff"/>'
    ]
    for number, panel in enumerate(panels):
        left, top = number % columns * WIDTH, number // columns * HEIGHT
        parts += [f'<g transform="translate({left} {top})">', *_panel(panel), "</g>"]
    for number, (name, one) in enumerate(names.items()):
        x, y = number % each * LEGEND_ENTRY + 12, height + number // each * LEGEND + 12
        parts.append(_line([(x, y), (x + 22, y)], one) if one.line else _dot(x + 11, y, one, 4))
        parts.append(_text("", x + 28, y + 4, name))
    return "".join(parts) + "</svg>\n"


def _text(style: str, x: float, y: float, text: str) -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}">{html.escape(text)}</text>'


def _line(points: Sequence[Point], series: Series) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="l{" d" * series.dashed}" stroke="{_colour(series)}" points="{path}"/>'


def _dot(x: float, y: float, series: Series, size: float, opacity: float = 1) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{size:g}" fill="{_colour(series)}" fill-opacity="{opacity:g}"/>'


def _colour(series: Series) -> str:
    return COLOURS[series.colour % len(COLOURS)]


def _axes(panel: Panel) -> tuple[Callable, Callable, list[tuple[float, str]], list[tuple[float, str]]]:
    """-> (place of x, place of y, (place, text) of the ticks of x, and of y)"""
    everything = [point for one in panel.series for point in (*one.points, *one.seeds)]
    xs, ys = sorted({x for x, _ in everything}), [y for _, y in everything]
    inner, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    y_ticks = ticks(min(ys), max(ys))
    y = scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, -high)
    if panel.log_x:
        ends = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] / 2, xs[0] * 2)
        log = scale(*map(math.log, ends), LEFT + 10, inner - 20)

        def x(value: float) -> float:
            return log(math.log(value))

        x_ticks = [(x(value), f"{value:g}") for value in xs]
    else:
        marks = ticks(xs[0], xs[-1])
        x = scale(marks[0], marks[-1], LEFT, inner)
        x_ticks = [(x(mark), short_number(mark, marks[1] - marks[0])) for mark in marks]
    return x, y, x_ticks, [(y(mark), short_number(mark, y_ticks[1] - y_ticks[0])) for mark in y_ticks]


def _panel(panel: Panel) -> Iterator[str]:
    x, y, x_ticks, y_ticks = _axes(panel)
    bottom = HEIGHT - BOTTOM
    yield _text("t", LEFT, TOP - 10, panel.title)
    for place, text in y_ticks:
        yield f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}"/>'
        yield _text("n", LEFT - 5, place + 4, text)
    for place, text in x_ticks:
        yield f'<line class="g" x1="{place}" x2="{place}" y1="{TOP}" y2="{bottom}"/>'
        yield _text("k", place, bottom + 14, text)
    yield _text("k", (LEFT + WIDTH - RIGHT) / 2, bottom + 29, f"{panel.x}  |  up: {panel.y}")
    labels = []
    for one in panel.series:
        places = [(x(a), y(b)) for a, b in one.points]
        for a, b in one.seeds:
            yield _dot(x(a), y(b), one, 2.5, 0.4)
        if one.line and len(places) > 1:
            yield _line(places, one)
        for a, b in places:
            if not one.dashed:
                yield _dot(a, b, one, 3.5)
            if one.label:
                labels.append((a, b, one.label))
    yield from _labels(labels)


def _labels(labels: Sequence[tuple[float, float, str]]) -> Iterator[str]:
    """Each beside its point, at the nearest height at which it lies on no other."""
    taken: list[tuple[float, float, float]] = []
    for x, y, text in labels:
        width = LETTER * len(text)
        is_left = x + 6 + width > WIDTH
        start = x - 6 - width if is_left else x + 6
        heights = sorted((y + 4 + step * LABEL for step in range(-20, 21)), key=lambda place: abs(place - y - 4))
        free = (
            place
            for place in heights
            if TOP <= place <= HEIGHT - BOTTOM
            and all(
                abs(place - other) >= LABEL or start + width < left or start > right for left, right, other in taken
            )
        )
        height = next(free, y + 4)
        taken.append((start, start + width, height))
        yield _text("n" if is_left else "", x - 6 if is_left else x + 6, height, text)
