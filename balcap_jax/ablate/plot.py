"""A study drawn as one SVG: a row per variant, a panel per metric, a dot per seed, the mean with ± one sd."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.ablate.table import METRICS
from balcap_jax.ablate.variants import FULL
from balcap_jax.report.charts import scale, short_number, ticks

LABELS, PANEL, GAP, ROW, TOP, BOTTOM = 132, 128, 30, 20, 34, 26  # pixels
COLUMNS = 5  # Panels beside each other: more are too small to read on a page.
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.t{font-weight:600}.n{text-anchor:end}"
    ".k{text-anchor:middle;fill:#666}.g{stroke:#e3e3e3}"
    ".f{stroke:#b3541e;stroke-dasharray:3 3}.w{stroke:#1f5fa8;stroke-width:2}"
    ".m{fill:#1f5fa8}.s{fill:#1f5fa8;fill-opacity:.35}"
)


def svg(table: Sequence[Mapping[str, Any]], title: str) -> str:
    """The figure of `ablate.table.rows`, in rows of COLUMNS panels; the dashed line is the mean of the full method."""
    metrics = [name for name in METRICS if any(name in row["metrics"] for row in table)]
    columns, high = min(COLUMNS, len(metrics)), TOP + len(table) * ROW + BOTTOM
    width, height = LABELS + columns * (PANEL + GAP), math.ceil(len(metrics) / COLUMNS) * high
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for start in range(0, len(metrics), COLUMNS):
        parts.append(f'<g transform="translate(0 {start // COLUMNS * high})">')
        for index, row in enumerate(table):
            parts.append(_text("n", LABELS - 10, _middle(index) + 4, row["variant"]))
        for number, metric in enumerate(metrics[start : start + COLUMNS]):
            parts += _panel(table, metric, LABELS + number * (PANEL + GAP))
        parts.append("</g>")
    return "".join(parts) + "</svg>\n"


def _middle(index: int) -> float:
    return TOP + (index + 0.5) * ROW


def _text(style: str, x: float, y: float, text: str) -> str:
    return f'<text class="{style}" x="{x}" y="{y}">{html.escape(text)}</text>'


def _line(style: str, x: Sequence[float], y: Sequence[float]) -> str:
    return f'<line class="{style}" x1="{x[0]}" x2="{x[-1]}" y1="{y[0]}" y2="{y[-1]}"/>'


def _panel(table: Sequence[Mapping[str, Any]], metric: str, left: int) -> list[str]:
    entries = {index: row["metrics"][metric] for index, row in enumerate(table) if metric in row["metrics"]}
    values = [value for entry in entries.values() for value in entry["seeds"].values()]
    values += [entry["mean"] + sign * (entry["sd"] or 0) for entry in entries.values() for sign in (-1, 1)]
    marks = ticks(min(values), max(values), 3)
    x, bottom = scale(marks[0], marks[-1], left, PANEL), TOP + len(table) * ROW
    parts = [_text("t", left, TOP - 16, METRICS[metric])]
    for mark in marks:
        parts.append(_line("g", [x(mark)], [TOP, bottom]))
        parts.append(_text("k", x(mark), bottom + 14, short_number(mark, marks[1] - marks[0])))
    full = [x(entry["mean"]) for index, entry in entries.items() if table[index]["variant"] == FULL]
    parts += [_line("f", [mean], [TOP, bottom]) for mean in full]
    for index, entry in entries.items():
        y = _middle(index)
        if entry["sd"]:
            parts.append(_line("w", [x(entry["mean"] + sign * entry["sd"]) for sign in (-1, 1)], [y]))
        parts += [f'<circle class="s" cx="{x(value)}" cy="{y}" r="3"/>' for value in entry["seeds"].values()]
        parts.append(f'<circle class="m" cx="{x(entry["mean"])}" cy="{y}" r="3.5"/>')
    return parts
