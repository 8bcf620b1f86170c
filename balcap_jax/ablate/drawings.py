"""What the figure of each study shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.ablate import plot
from balcap_jax.ablate.claims import Values
from balcap_jax.ablate.figures import Panel, Point, Series, svg
from balcap_jax.ablate.studies import FLAWS, JUDGED, SCALES, SHARES, UTILITY_REWARDS, Study, asked, flawed, scaled
from balcap_jax.ablate.table import BASE, METRICS, mean_and_spread, rows
from balcap_jax.ablate.variants import FULL, Variant

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm -> seed -> result
_NAMES = {FULL: "c-GDPO", "grpo": "GRPO", "no_gate": "no gate", "soft_min": "soft minimum"}


def draw(study: Study, found: Results, values: Values) -> str:
    """The study's figure as SVG, "" where there is nothing to draw; `values` are `report.values_of(found)`."""
    if not any(found.values()):
        return ""
    own = {"spread": _spread, "rivals": _rivals, "budget": _budget, "judges": _judges}.get(study.name)
    if own is None:
        known = {name: Variant(arm.about) for name, arm in study.arms.items()}
        return plot.svg(rows(values, known), study.question)
    panels = own(found, values)
    drawn = any(one.points for panel in panels for one in panel.series)
    return svg(panels, study.question) if drawn else ""


def _scores(values: Values, arm: str, metric: str) -> list[float]:
    return [one[metric] for one in values.get(arm, {}).values() if metric in one]


def _curve(name: str, colour: int, scores: Mapping[float, Sequence[float]], dashed: bool = False) -> Series:
    """A series of the means of `scores` {x: values of seeds}, with a dot for each; x without a value are left out."""
    points = [(x, mean_and_spread(column)[0]) for x, column in sorted(scores.items()) if column]
    seeds = [(x, value) for x, column in scores.items() for value in column]
    return Series(name, points, colour, seeds, dashed=dashed)


def _spread(found: Results, values: Values, metric: str = "b_capscore") -> list[Panel]:
    everywhere = (min(SCALES), max(SCALES))
    series = [
        _curve("c-GDPO", 0, {scale: _scores(values, scaled(FULL, scale), metric) for scale in SCALES}),
        _curve("GRPO", 1, {scale: _scores(values, scaled("grpo", scale), metric) for scale in SCALES}),
        _curve("GRPO, fixed weights", 2, dict.fromkeys(everywhere, _scores(values, "grpo_fixed", metric)), dashed=True),
        _curve("base", 5, dict.fromkeys(everywhere, _scores(values, BASE, metric)), dashed=True),
    ]
    return [Panel("Greedy b-CapScore", "scale of the linguistic score", METRICS[metric], series, log_x=True)]


def _rivals(found: Results, values: Values) -> list[Panel]:
    """Utility rewards in one colour, preference and overlap in others, BalCap's own reward in the first."""
    kinds = {FULL: 0, "best_of": 0, "arena": 2, "lexical": 3, BASE: 5} | dict.fromkeys(UTILITY_REWARDS, 1)
    panels = []
    for title, x, y in (
        ("Long and noisy?", "words", "precision"),
        ("Fluent and generic?", "captionqa", "linguistic"),
        ("Useful and liked?", "dcscore", "arena"),
    ):
        series = []
        for arm, colour in kinds.items():
            places: list[Point] = [(one[x], one[y]) for one in values.get(arm, {}).values() if x in one and y in one]
            if places:
                middle = tuple(mean_and_spread(column)[0] for column in zip(*places, strict=True))
                label = "BalCap" if arm == FULL else arm
                series.append(Series(arm, [middle], colour, places, line=False, label=label))
        panels.append(Panel(title, METRICS[x], METRICS[y], series))
    return panels


def _budget(found: Results, values: Values, metric: str = "b_capscore") -> list[Panel]:
    calls = {
        asked(share): result["judge_calls"] / 1000
        for share in SHARES
        for result in list(found.get(asked(share), {}).values())[:1]
    }
    series = [
        _curve("c-GDPO", 0, {count: _scores(values, arm, metric) for arm, count in calls.items()}),
        _curve("base", 5, dict.fromkeys(calls.values(), _scores(values, BASE, metric)), dashed=True),
    ]
    return [Panel("Greedy b-CapScore", "thousand questions to the judge", METRICS[metric], series)]


def _judges(found: Results, values: Values, metric: str = "b_capscore") -> list[Panel]:
    panels = []
    for flaw in FLAWS:
        series = []
        for colour, method in enumerate(JUDGED):
            runs = [result.get("trajectory", []) for result in found.get(flawed(method, flaw), {}).values()]
            for kind, name, dashed in (("true", "true", False), ("proxy", "judge", True)):
                columns: dict[float, list[float]] = {}
                for point in (point for run in runs for point in run if metric in point[kind]):
                    columns.setdefault(point["update"], []).append(point[kind][metric])
                points = [(x, mean_and_spread(column)[0]) for x, column in sorted(columns.items())]
                series.append(Series(f"{_NAMES[method]}, {name}", points, colour, dashed=dashed))
        panels.append(Panel(flaw, "update", METRICS[metric], series))
    return panels
