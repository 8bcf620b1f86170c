"""The table of a leave-one-out study: means and spreads over seeds, and differences against the directions reported.

Values are in points (0 to 100), arena in -100 to 100, words in words.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from balcap_jax.ablate.statistics import Paired, paired
from balcap_jax.ablate.variants import FULL, VARIANTS, Variant
from balcap_jax.report.run import MINIATURE

BASE = "base"
_ABOUT_BASE = "what every variant starts from: the policy at the end of the stage before rl"
METRICS = {
    "b_capscore": "b-CapScore",
    **{row.key: row.name for row in MINIATURE},
    "words": "words",
    "precision": "precision",
    "recall": "recall",
    "linguistic": "linguistic",
    "in_band": "in band, %",
    "lowest": "lowest of the three",
}
_AS_STORED = ("b_capscore", "words")
MARGIN = 1.0  # points that count as nothing
_SIGNS = {1: "rises", -1: "falls", 0: "does not fall"}

Values = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> metric -> points


def points(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one evaluation of summary.json; those without a value are left out."""
    means = {name: (evaluation.get(name) or {}).get("mean") for name in METRICS}
    scales = {name: 1 if name in _AS_STORED else 100 for name in METRICS}
    return {name: float(mean) * scales[name] for name, mean in means.items() if mean is not None}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has no standard deviation (None)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def verdict(change: Paired, direction: int) -> str:
    """Whether a difference goes in the reported direction: "yes" and "no" only where its interval leaves no doubt.

    A direction of 0, "does not fall", holds where a fall of more than MARGIN is outside of the interval.
    """
    half = change.half()
    if half is None:
        return "one seed"
    if direction == 0:
        return "yes" if change.mean - half > -MARGIN else "no" if change.mean + half < 0 else "not told apart"
    if abs(change.mean) <= half:
        return "not told apart"
    return "yes" if change.mean * direction > 0 else "no"


def differences(values: Values, variant: str, other: str, metric: str) -> list[float]:
    """variant - other for each seed that both have, ascending by seed."""
    ours, theirs = values.get(variant, {}), values.get(other, {})
    seeds = sorted(seed for seed in ours if metric in ours[seed] and metric in theirs.get(seed, {}))
    return [ours[seed][metric] - theirs[seed][metric] for seed in seeds]


def difference(values: Values, variant: str, other: str, metric: str) -> Paired | None:
    """Over the seeds that both have; None where there are none."""
    each = differences(values, variant, other, metric)
    return paired(each) if each else None


def claims_of(variant: str, known: Mapping[str, Variant] = VARIANTS) -> list[tuple[str, int, str, str]]:
    """(metric, direction, against which variant, whose claim) of each claim about a variant."""
    if variant not in known:
        return []
    about = known[variant]
    reported = [(metric, sign, about.against, "paper") for metric, sign in about.reported.items()]
    return reported + [(metric, sign, FULL, "method") for metric, sign in about.expected.items()]


def rows(values: Values, known: Mapping[str, Variant] = VARIANTS) -> list[dict[str, Any]]:
    """One JSON-able row per variant: values by seed, mean and sd of each metric, and the verdict on each claim.

    known: what the variants are, and the claims about them.
    """
    table = []
    for variant, by_seed in values.items():
        metrics, claims = {}, []
        for metric in METRICS:
            seeds = {seed: one[metric] for seed, one in by_seed.items() if metric in one}
            if seeds:
                mean, spread = mean_and_spread(list(seeds.values()))
                metrics[metric] = {"mean": mean, "sd": spread, "seeds": {str(seed): x for seed, x in seeds.items()}}
                change = difference(values, variant, FULL, metric)
                if change is not None and variant not in (FULL, BASE):
                    metrics[metric]["against_full"] = {"mean": change.mean, "half": change.half()}
        for metric, sign, other, source in claims_of(variant, known):
            change = difference(values, variant, other, metric)
            if change is not None:
                claim = {"metric": metric, "direction": sign, "source": source, "against": other}
                claims.append(claim | {"mean": change.mean, "half": change.half(), "agrees": verdict(change, sign)})
        about = known[variant].about if variant in known else _ABOUT_BASE if variant == BASE else ""
        table.append({"variant": variant, "about": about, "seeds": len(by_seed), "metrics": metrics, "claims": claims})
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± sd of each metric; bold where the 95% interval of the paired difference to the full method is above or
    below 0."""
    names = [name for name in METRICS if any(name in row["metrics"] for row in table)]
    lines = ["| variant | " + " | ".join(METRICS[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in table:
        cells = [_cell(row["metrics"].get(name)) for name in names]
        lines.append(f"| {_plain(row['variant'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    return name.replace("|", "\\|")


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    text = f"{entry['mean']:.1f}" + (f" ± {entry['sd']:.1f}" if entry["sd"] is not None else "")
    change = entry.get("against_full")
    clear = change is not None and change["half"] is not None and abs(change["mean"]) > change["half"]
    return f"**{text}**" if clear else text


def claims_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The claims about each variant beside the measurements."""
    lines = ["| variant | metric | claim | against | ours | agrees |", "|---|---|---|---|---|---|"]
    for row in table:
        for one in row["claims"]:
            half = "" if one["half"] is None else f" ± {one['half']:.1f}"
            lines.append(
                f"| {_plain(row['variant'])} | {METRICS[one['metric']]} | {_SIGNS[one['direction']]} ({one['source']}) "
                f"| {one['against']} | {one['mean']:+.1f}{half} | {one['agrees']} |"
            )
    return "\n".join(lines) + "\n"
