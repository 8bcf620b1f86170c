"""A study drawn as one SVG: a row per variant, a panel per metric, a dot per seed, the mean with ± one sd."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.ablate.table import METRICS
from balcap_jax.ablate.variants import FULL
from balcap_jax.report.charts import short_number, ticks

LABELS, PANEL, GAP, ROW, TOP, BOTTOM = 132, 128, 18, 20, 34, 26  # pixels
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.t{font-weight:600}.n{text-anchor:end}"
    ".k{text-anchor:middle;fill:#666}.g{stroke:#e3e3e3}"
    ".f{stroke:#b3541e;stroke-dasharray:3 3}.w{stroke:#1f5fa8;stroke-width:2}"
    ".m{fill:#1f5fa8}.s{fill:#1f5fa8;fill-opacity:.35}"
)


def svg(table: Sequence[Mapping[str, Any]], title: str) -> str:
    """The figure of `ablation_table.rows`; the dashed line is the mean of the full method."""
    shown = [name for name in METRICS if any(name in row["metrics"] for row in table)]
    width, height = LABELS + len(shown) * (PANEL + GAP), TOP + len(table) * ROW + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for index, row in enumerate(table):
        name = html.escape(row["variant"])
        parts.append(f'<text class="n" x="{LABELS - 10}" y="{_middle(index) + 4}">{name}</text>')
    for number, metric in enumerate(shown):
        parts += _panel(table, metric, LABELS + number * (PANEL + GAP))
    return "".join(parts) + "</svg>\n"


def _middle(index: int) -> float:
    return TOP + (index + 0.5) * ROW


def _panel(table: Sequence[Mapping[str, Any]], metric: str, left: int) -> list[str]:
    entries = {index: row["metrics"][metric] for index, row in enumerate(table) if metric in row["metrics"]}
    values = [value for entry in entries.values() for value in entry["seeds"].values()]
    values += [entry["mean"] + sign * (entry["sd"] or 0) for entry in entries.values() for sign in (-1, 1)]
    marks = ticks(min(values), max(values), 3)
    low, high = marks[0], marks[-1]

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * PANEL, 1)

    bottom = TOP + len(table) * ROW
    parts = [f'<text class="t" x="{left}" y="{TOP - 16}">{html.escape(METRICS[metric])}</text>']
    for mark in marks:
        parts.append(f'<line class="g" x1="{x(mark)}" x2="{x(mark)}" y1="{TOP}" y2="{bottom}"/>')
        label = short_number(mark, marks[1] - marks[0])
        parts.append(f'<text class="k" x="{x(mark)}" y="{bottom + 14}">{label}</text>')
    for index, row in enumerate(table):
        if row["variant"] == FULL and index in entries:
            at = x(entries[index]["mean"])
            parts.append(f'<line class="f" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
    for index, entry in entries.items():
        y = _middle(index)
        if entry["sd"]:
            ends = [x(entry["mean"] + sign * entry["sd"]) for sign in (-1, 1)]
            parts.append(f'<line class="w" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>')
        parts += [f'<circle class="s" cx="{x(value)}" cy="{y}" r="3"/>' for value in entry["seeds"].values()]
        parts.append(f'<circle class="m" cx="{x(entry["mean"])}" cy="{y}" r="3.5"/>')
    return parts
