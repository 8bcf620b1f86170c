"""Geometry of the report's charts: what the template draws as inline SVG, one small chart per metric.

A chart is a viewBox of WIDTH x HEIGHT with the plot inside its margins. Colours are class numbers, so that the style
sheet decides on them for light and dark pages.
"""

import dataclasses
import functools
import html
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from balcap_jax.report.run import BALANCED, TABLE, Run, cell_of, is_number, label_text, mapping, scale_of

WIDTH, HEIGHT = 280, 168
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 24
FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
MAX_POINTS = 240  # beyond this many a curve's points are means over neighbouring steps
MAX_BARS = 48
RUN_COLOURS = 6
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SMALLEST = 1e-290  # Below, powers of ten and their inverses are no numbers.
PHASES = ("rollout", "judge", "update", "other")
TRUTH, HEALTH = "The judge and the truth", "Health and speed"
_FAR = 3.0  # times the 95th percentile: where the axis of a clipped curve ends


# --- axes -------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover [low, high], in steps of 1, 2 or 5 times a power of ten."""
    low, high = sorted((low, high))
    if high - low < 1e-9 * max(1.0, abs(high)):
        largest = max(abs(low), abs(high))
        pad = largest * 0.1 if largest > _SMALLEST else 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short_number(value: float, step: float = 0.0) -> str:
    """A short number; with the axis' `step`, just the decimals that tell two ticks apart."""
    if abs(value) >= 10_000:
        text = f"{value / 1000:.4g}k"
    elif step:
        text = f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    elif abs(value) < 1:
        text = f"{value:.3g}"
    else:
        text = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def scale(low: float, high: float, start: float, length: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, start + length], rounded to tenths of a pixel; a negative length points upwards."""
    return lambda value: round(start + (value - low) / (high - low) * length, 1)


class _Axes:
    """Maps (step, value) to the viewBox."""

    def __init__(self, steps: Sequence[float], values: Sequence[float]):
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)
        self.ticks = ticks(min(values), max(values))
        low, high = self.ticks[0], self.ticks[-1]
        self.x = scale(self.first, self.last, LEFT, WIDTH - LEFT - RIGHT)
        self.y = scale(low, high, HEIGHT - BOTTOM, -(HEIGHT - TOP - BOTTOM))
        # Small values are written in thousandths, millionths, ... with the power of ten once, in the chart's title.
        largest = max(abs(low), abs(high))
        self.exponent = -3 * math.floor(math.log10(largest) / 3) if largest < 0.1 else 0
        self.factor = 10.0**self.exponent

    def text(self, value: float) -> str:
        """A value in the units of the axis."""
        return short_number(value * self.factor)

    def frame(self) -> dict[str, Any]:
        gap = (self.ticks[1] - self.ticks[0]) * self.factor
        steps = [tick for tick in ticks(self.first, self.last) if self.first <= tick <= self.last and tick == int(tick)]
        return {
            "y_ticks": [(self.y(tick), short_number(tick * self.factor, gap)) for tick in self.ticks],
            "x_ticks": [(self.x(tick), short_number(tick, 1)) for tick in steps],
        }

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """An SVG path that is interrupted where a value is missing."""
        parts, pen_down = [], False
        for step, value in points:
            if math.isnan(value):
                pen_down = False
                continue
            place = f"{self.x(step)} {self.y(value)}"
            # A lone point is drawn as a dot, by the round cap of a line of no length.
            parts.append(f"L{place}" if pen_down else f"M{place}L{place}")
            pen_down = True
        return "".join(parts)


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one chart shows: a metric of metrics.jsonl, and the evaluated value of its diamonds.

    low: the axis includes this value. least: it reaches this far at least, so that nothing but zeros is no mountain.
    truth: a metric that is drawn beside it. is_clipped: a few points far above all others leave the axis.
    """

    title: str
    key: str
    group: str
    scale: float = 1.0
    unit: str = ""
    stage: str | None = None
    evaluated: str | None = None
    low: float | None = None
    least: float | None = None
    truth: str | None = None
    is_clipped: bool = False


def _curves(reward_names: Sequence[str]) -> list[Curve]:
    rl = functools.partial(Curve, stage="rl")
    rewards = [rl(name, f"reward/{name}", "Rewards", scale_of(name), evaluated=name) for name in reward_names]
    whole = {"low": 0, "least": 10}
    # A group whose members all score the same teaches nothing about that objective.
    silent = [
        rl(name, f"advantage/zero_std_frac/{name}", "Groups without spread", 100, "%", **whole) for name in reward_names
    ]
    return [
        *rewards,
        rl("b-CapScore", "b_capscore", "Rewards", evaluated="b_capscore"),
        # What a judge that is wrong on purpose says, and what the exact one says of the same captions.
        *(rl(name, f"reward/{name}", TRUTH, scale_of(name), truth=f"true/{name}") for name in reward_names),
        rl("b-CapScore", "b_capscore", TRUTH, truth="true/b_capscore"),
        rl("Mean words", "length/mean", "Length", evaluated="words"),
        rl("Length ratio", "length/ratio_mean", "Length", unit="×"),
        rl("In band", "gate/in_band", "Length", 100, "%", evaluated="in_band"),
        rl("Truncated", "length/truncated_frac", "Length", 100, "%", evaluated="truncated", low=0),
        Curve("SFT loss", "loss", "Learning", stage="sft"),
        rl("KL to reference", "kl", "Learning", low=0),
        rl("Entropy", "entropy", "Learning"),
        Curve("Gradient norm", "grad_norm", "Learning", low=0, is_clipped=True),
        *silent,
        rl("Largest drift", "drift/max_abs_logp", HEALTH, low=0),
        rl("Judge failures", "judge/failure_rate", HEALTH, 100, "%", low=0, least=1),
        Curve("Tokens per second", "tokens_per_second", HEALTH, low=0),
    ]


def chart_groups(runs: Sequence[Run], skipped: list[str]) -> list[dict[str, Any]]:
    """Charts by group; metrics that no run logged in a stage that should have them go to `skipped`."""
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record)
    rewards = [key.removeprefix("reward/") for key in keys if key.startswith("reward/") and not key.endswith("_std")]
    usual = [row.key for row in BALANCED]  # Keys of the log are in the order of the alphabet.
    rewards.sort(key=lambda name: usual.index(name) if name in usual else len(usual))
    groups: dict[str, list] = {}
    for curve in _curves(rewards):
        if curve.truth is not None and curve.truth not in keys:
            continue
        series = [_series(run, curve) for run in runs]
        if any(series):
            marks = [_evaluated(run, curve) for run in runs]
            groups.setdefault(curve.group, []).append((curve, series, marks))
        elif any(_lacks(run, curve) for run in runs):
            skipped.append(curve.key if curve.stage is None else f"{curve.key} ({curve.stage})")
    charts: list[dict[str, Any]] = []
    for title, members in groups.items():
        # The rewards share one axis: whether they are balanced is the point of looking at them.
        shared = [value for member in members for value in _values(*member)] if title == "Rewards" else None
        group_charts = [_chart(*member, runs, shared or _values(*member)) for member in members]
        charts.append({"title": title, "charts": group_charts})
    return _joined(charts)


def _joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """No group of one chart, where there is another to put it into: a lone chart leaves a row empty."""
    joined: list[dict[str, Any]] = []
    for group in groups:
        if joined and min(len(group["charts"]), len(joined[-1]["charts"])) < 2:
            last = joined[-1]
            title = f"{last['title']}; {group['title'][0].lower()}{group['title'][1:]}"
            joined[-1] = {"title": title, "charts": last["charts"] + group["charts"]}
        else:
            joined.append(group)
    return joined


def with_times(groups: list[dict[str, Any]], times: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the charts of `time_chart` in the last one, that of speed, or in one of their own."""
    if not times:
        return groups
    if groups and groups[-1]["title"].endswith(HEALTH[1:]):
        last = groups[-1]
        return [*groups[:-1], last | {"charts": [*last["charts"], *times]}]
    return _joined([*groups, {"title": HEALTH, "charts": list(times)}])


def _records(run: Run, curve: Curve) -> list[dict[str, Any]]:
    return [record for record in run.records if curve.stage in (None, record.get("stage"))]


def _start(run: Run, curve: Curve) -> float:
    """The step before the first of a curve of one stage: its chart counts the stage's own steps."""
    for before, after in itertools.pairwise(run.records):
        if curve.stage is not None and before.get("stage") != curve.stage == after.get("stage"):
            return before["step"]
    return 0


def _series(run: Run, curve: Curve, key: str | None = None) -> list[tuple[float, float]]:
    """(step, shown value) of the logged steps; where a logged step has no value the curve is not connected (NaN)."""
    key, start = key or curve.key, _start(run, curve)
    points = [
        (record["step"] - start, curve.scale * record[key] if is_number(record[key]) else math.nan)
        for record in _records(run, curve)
        if key in record
    ]
    return points if any(not math.isnan(value) for _, value in points) else []


def _lacks(run: Run, curve: Curve) -> bool:
    """Whether the metric is absent from a stage that ran; one that is always null was logged, and is just off."""
    records = _records(run, curve)
    return bool(records) and not any(curve.key in record for record in records)


def _boundary(run: Run) -> float | None:
    """The step after which the stage changes to RL from another."""
    for before, after in itertools.pairwise(run.records):
        if before.get("stage") != "rl" and after.get("stage") == "rl":
            return before["step"]
    return None


def _evaluated(run: Run, curve: Curve) -> list[tuple[float, float, str]]:
    """(step, shown value, label) of the evaluations of sampled captions: at the start, at stage ends and on the way."""
    row = next((row for row in TABLE if row.key == curve.evaluated), None)
    if row is None or not run.records:
        return []
    steps = {str(record.get("stage")): record["step"] for record in run.records}
    steps["base"] = run.records[0]["step"]
    marks, start = [], _start(run, curve)
    for label in mapping(run.summary.get("evaluations")):
        stage, _, suffix = label.partition("-")
        step = int(suffix) if suffix.isdecimal() else steps.get(label)
        value = cell_of(run.evaluation(label, "evaluations"), row).mean
        # The ceiling and evaluations during SFT lie outside the chart, whose curve begins with RL.
        is_inside = label == "sft" or (stage != "sft" and label != run.ceiling)
        if step is not None and value is not None and is_inside:
            marks.append((step - start, value, label_text(label)))
    return marks


def _values(curve: Curve, series: Sequence[list], marks: Sequence[list]) -> list[float]:
    """All values that the chart's axis covers."""
    values = [value for points in series for _, value in points if not math.isnan(value)]
    values += [value for mark in marks for _, value, _ in mark]
    if curve.is_clipped:
        ordered = sorted(values)
        far = _FAR * ordered[int(0.95 * (len(ordered) - 1))]
        values = [value for value in values if value <= far] or values
    return [*values, *(bound for bound in (curve.low, curve.least) if bound is not None)]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _chunks(entries: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """At most `most` runs of neighbours of one length; the last one may be shorter."""
    size = math.ceil(len(entries) / most)
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    chunks = _chunks(points, MAX_POINTS)
    return [(_mean(step for step, _ in chunk), _mean(value for _, value in chunk)) for chunk in chunks]


def _smoothed(points: list[tuple[float, float]], boundary: float | None) -> list[tuple[float, float]]:
    """Moving mean over a twelfth of the curve around each point; no window reaches over the stage boundary."""
    half = len(points) // 24
    split = 0 if boundary is None else sum(step <= boundary for step, _ in points)
    smoothed = []
    for index, (step, value) in enumerate(points):
        first, last = (0, split) if index < split else (split, len(points))
        window = points[max(first, index - half) : min(last, index + half + 1)]
        smoothed.append((step, math.nan if math.isnan(value) else _mean(value for _, value in window)))
    return smoothed


def _chart(
    curve: Curve, series: Sequence[list], marks: Sequence[list], runs: Sequence[Run], values: Sequence[float]
) -> dict[str, Any]:
    truths = [_series(run, curve, curve.truth) if curve.truth else [] for run in runs]
    values = [*values, *(value for points in truths for _, value in points if not math.isnan(value))]
    steps = [step for points, mark in zip(series, marks, strict=True) if points for step, *_ in (*points, *mark)]
    axes = _Axes(steps, values)
    lines, boundaries, diamonds, peak = [], [], [], 0.0
    for index, (run, points, mark) in enumerate(zip(runs, series, marks, strict=True)):
        if not points:
            continue
        colour, boundary = index % RUN_COLOURS + 1, None if curve.stage else _boundary(run)
        if boundary is not None and axes.first <= boundary <= axes.last:
            boundaries.append({"x": axes.x(boundary), "colour": colour})
        for step, value, label in mark:
            text = f"{run.name}, held out, {label}: {axes.text(value)}{curve.unit}"
            diamonds.append({"x": axes.x(step), "y": axes.y(value), "colour": colour, "text": text})
        parts = [(points, "the judge" if curve.truth else "")]
        parts += [(truths[index], "the truth")] if truths[index] else []
        for each, kind in parts:
            highest = max(value for _, value in each if not math.isnan(value))
            if curve.is_clipped and highest > axes.ticks[-1]:
                peak = max(peak, highest)
                each = [(step, min(value, axes.ticks[-1])) for step, value in each]  # min keeps a NaN that comes first
            thin = _thinned(each)
            smooth = _smoothed(thin, boundary)
            last = axes.text(next(value for _, value in reversed(smooth) if not math.isnan(value)))
            raw = axes.path(thin) if smooth != thin else ""
            names = {"name": run.name, "kind": kind, "is_truth": kind == "the truth"}
            lines.append({"raw": raw, "path": axes.path(smooth), "colour": colour, "last": last} | names)
    power = f" ×10{str(-axes.exponent).translate(SUPERSCRIPT)}" if axes.exponent else ""
    drawing = {"lines": lines, "boundaries": boundaries, "diamonds": diamonds}
    drawing["peak"] = f"{axes.text(peak)}{curve.unit}" if peak else ""
    return {"title": curve.title, "unit": f"{curve.unit}{power}", **axes.frame(), **drawing}


def time_chart(run: Run) -> dict[str, Any] | None:
    """Stacked bars of seconds per step by phase, each the mean of neighbouring steps; shares of the last stage."""
    logged = [
        (record["step"], record.get("stage"), [record.get(f"time/{phase}") for phase in PHASES])
        for record in run.records
    ]
    logged = [entry for entry in logged if any(map(is_number, entry[2]))]
    if not logged:
        return None
    seconds = [[float(value) if is_number(value) else 0.0 for value in values] for _, _, values in logged]
    stacks = [[_mean(phase) for phase in zip(*chunk, strict=True)] for chunk in _chunks(seconds, MAX_BARS)]
    axes = _Axes([step for step, *_ in logged], [0.0, *(sum(stack) for stack in stacks)])
    width = (WIDTH - LEFT - RIGHT) / len(stacks)
    bars = []
    for position, stack in enumerate(stacks):
        below = 0.0
        for phase, height in zip(PHASES, stack, strict=True):
            top, bottom = axes.y(below + height), axes.y(below)
            if bottom - top > 0:
                x = round(LEFT + position * width, 2)
                bars.append({"x": x, "y": top, "height": round(bottom - top, 1), "phase": phase})
            below += height
    stage = logged[-1][1]
    last_stage = [values for (_, name, _), values in zip(logged, seconds, strict=True) if name == stage]
    sums = dict(zip(PHASES, map(sum, zip(*last_stage, strict=True)), strict=True))
    total = sum(sums.values())
    return {
        "name": run.name,
        "is_time": True,
        "stage": str(stage).upper(),
        **axes.frame(),
        "bars": bars,
        "bar_width": round(max(width - 1, width * 0.8), 2),
        "shares": [(phase, 100 * seconds / (total or 1.0)) for phase, seconds in sums.items()],
        "seconds_per_step": total / len(last_stage),
    }


# ---- bars of scores --------------------------------------------------------------------------------------------------

_ROW, _NAMES, _SCALE = 26, 260, 360  # pixels: height of a bar's row, width of its name, of the axis


def bars(entries: Sequence[tuple[str, float, Sequence[float] | None, str]]) -> str:
    """Horizontal bars as one inline SVG: (name, score, interval or None, words) each, zero where the axis has it.

    The words stand behind the score: a caption's length belongs beside whatever it earns.
    """
    if not entries:
        return ""
    values = [value for _, score, interval, _ in entries for value in (0.0, score, *(interval or ()))]
    low, high = min(values), max(values)
    x = scale(low, high if high > low else low + 1.0, _NAMES, _SCALE)
    width, height = _NAMES + _SCALE + 150, _ROW * len(entries) + 8
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" font-size="13">']
    for row, (name, score, interval, words) in enumerate(entries):
        y, thickness = _ROW * row + 4, _ROW - 10
        left, right = sorted((x(0.0), x(score)))
        title = html.escape(name if len(name) <= 34 else "…" + name[-33:])
        label = html.escape(f"{score:.2f}" + (f" ({words} words)" if words else ""))
        parts.append(f'<text x="{_NAMES - 8}" y="{y + 15}" text-anchor="end">{title}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{right - left:.1f}" height="{thickness}" fill="#4c78a8"/>')
        if interval:
            start, stop, middle = x(interval[0]), x(interval[1]), y + 3 + thickness / 2
            parts.append(f'<path d="M{start} {middle:.1f}H{stop}" stroke="#000" stroke-width="1.5"/>')
        parts.append(f'<text x="{_NAMES + _SCALE + 8}" y="{y + 15}">{label}</text>')
    return "".join([*parts, "</svg>"])
