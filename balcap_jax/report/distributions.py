"""Charts of held-out captions one by one: a mean that rose may hide captions that all grew long, or a few that broke.

Each is of one run, before and after: how long captions are, precision against recall, and the change of each picture.
"""

import math
from collections.abc import Sequence
from typing import Any

from balcap_jax.report.changes import means_of, value_of
from balcap_jax.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, scale, short_number, ticks
from balcap_jax.report.run import BALANCED, KINDS, LENGTHS, JudgedImage, Row, Run, label_text

_BINS = 14
_ROWS = {row.key: row for row in (*BALANCED, *LENGTHS)}
_DOTS = 400  # of a label; more would only cover each other


def distributions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each run with captions before and after: {"run", "kind", "labels", "charts"}."""
    found = []
    for run in runs:
        if len(run.labels) < 2:
            continue
        for kind, title in KINDS.items():
            images = [run.judged[kind].get(label, {}) for label in run.labels]
            charts = [chart for make in (_lengths, _plane, _by_picture) if (chart := make(images)) is not None]
            if charts:
                labels = [label_text(label) for label in run.labels]
                found.append({"run": run.name, "kind": title, "labels": labels, "charts": charts})
                break
    return found


def _values(images: dict[str, JudgedImage], row: Row) -> list[float]:
    captions = (caption for image in images.values() for caption in image.captions)
    return [value for caption in captions if (value := value_of(caption, row)) is not None]


def _frame(x: Sequence[float], y: Sequence[float], title: str, unit: str) -> dict[str, Any]:
    """Title and axes of a chart whose ticks are `x` and `y`, and the maps of both."""
    to_x = scale(x[0], x[-1], LEFT, WIDTH - LEFT - RIGHT)
    to_y = scale(y[0], y[-1], HEIGHT - BOTTOM, -(HEIGHT - TOP - BOTTOM))
    step = [one[1] - one[0] for one in (x, y)]
    return {
        "title": title,
        "unit": unit,
        "x_ticks": [(to_x(tick), short_number(tick, step[0])) for tick in x],
        "y_ticks": [(to_y(tick), short_number(tick, step[1])) for tick in y],
        "maps": (to_x, to_y),
        "outlines": [],
        "dots": [],
        "bars": [],
    }


def _lengths(images: Sequence[dict[str, JudgedImage]]) -> dict[str, Any] | None:
    """Share of captions by their number of words, as steps of two outlines."""
    words = [_values(one, _ROWS["words"]) for one in images]
    if not all(words):
        return None
    every = [value for one in words for value in one]
    x = ticks(min(every), max(every), 5)
    width = (x[-1] - x[0]) / _BINS
    shares = []
    for one in words:
        counts = [0] * _BINS
        for value in one:
            counts[min(int((value - x[0]) / width), _BINS - 1)] += 1
        shares.append([100 * count / len(one) for count in counts])
    chart = _frame(x, ticks(0, max(max(one) for one in shares)), "Length", "% of captions by words")
    to_x, to_y = chart["maps"]
    paths = []
    for one in shares:
        path = f"M{to_x(x[0])} {to_y(0)}"
        for place, share in enumerate(one):
            path += f"V{to_y(share)}H{to_x(x[0] + (place + 1) * width)}"
        paths.append(f"{path}V{to_y(0)}")
    means = [sum(one) / len(one) for one in words]
    return chart | {"outlines": paths, "said": f"mean {means[0]:.0f} to {means[1]:.0f} words"}


def _plane(images: Sequence[dict[str, JudgedImage]]) -> dict[str, Any] | None:
    """Precision against recall of each caption: gaming one of them leaves the diagonal."""
    dots = []
    for one in images:
        pairs = []
        for caption in (caption for image in one.values() for caption in image.captions):
            x, y = (value_of(caption, _ROWS[name]) for name in ("precision", "recall"))
            if x is not None and y is not None:
                pairs.append((x, y))
        dots.append(pairs)
    if not all(dots) or any(not -1 <= value <= 101 for pairs in dots for pair in pairs for value in pair):
        return None
    axis = [0, 20, 40, 60, 80, 100]
    chart = _frame(axis, axis, "Precision and recall", "recall (up) by precision")
    to_x, to_y = chart["maps"]
    # A path of lines of no length, with round caps: one element for all dots.
    drawn = ["".join(f"M{to_x(x)} {to_y(y)}h0" for x, y in pairs[:: math.ceil(len(pairs) / _DOTS)]) for pairs in dots]
    means = ["{:.0f} / {:.0f}".format(*(sum(axis) / len(pairs) for axis in zip(*pairs, strict=True))) for pairs in dots]
    return chart | {"dots": drawn, "said": f"{means[0]} to {means[1]}"}


def _by_picture(images: Sequence[dict[str, JudgedImage]]) -> dict[str, Any] | None:
    """The change in b-CapScore of each picture, from the largest loss to the largest gain."""
    before, after = (means_of(one, _ROWS["b_capscore"]) for one in images)
    changes = sorted(after[name] - before[name] for name in before if name in after)
    if len(changes) < 2:
        return None
    y = ticks(min(0.0, *changes), max(0.0, *changes))
    x = [tick for tick in ticks(0, len(changes)) if tick == int(tick) and tick < len(changes)]
    chart = _frame([*x, len(changes)], y, "Change by picture", "b-CapScore, sorted")
    chart["x_ticks"] = chart["x_ticks"][: len(x)]  # The last one, where the axis ends, is seldom round.
    to_x, to_y = chart["maps"]
    zero, bars = to_y(0), {True: "", False: ""}
    for place, change in enumerate(changes):
        left, right = to_x(place), to_x(place + 1)
        top, bottom = sorted((zero, to_y(change)))
        gap = 0.2 * (right - left)
        width, height = round(right - left - gap, 2), max(round(bottom - top, 1), 0.6)
        bars[change < 0] += f"M{left} {top}h{width}v{height}h-{width}z"
    worse = sum(change < 0 for change in changes)
    return chart | {"bars": [bars[True], bars[False]], "said": f"{worse} of {len(changes)} lost"}
