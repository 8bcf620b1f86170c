"""The tables and the plot of uneven.py."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.cli.errors import UserError

Runs = Sequence[Sequence[float]]  # [rounds][draws]


def ratio(theirs: Runs, ours: Runs) -> float:
    """How many times as long `theirs` took: of all draws together, the median over rounds."""
    return statistics.median(sum(one) / sum(other) for one, other in zip(theirs, ours, strict=True))


def mean_of_draws(runs: Runs) -> float:
    """Seconds of one draw: the mean over draws, the median over rounds."""
    return statistics.median(map(statistics.fmean, runs))


def markdown(
    work: str, first: str, kinds: Mapping[str, dict[str, float]], results: Mapping[str, dict[str, Any]]
) -> str:
    """One row per kind of lengths and side; `first` is the side that the ratios compare with."""
    heads = (
        "mean of R",
        "mean, longest",
        work,
        "s",
        "CPU s",
        f"s / {first}",
        f"CPU s / {first}",
        f"positions / {first}",
    )
    heads += ("useful share", "temporaries, GB", "peak of the process, GB", "compiled in, s", "in CPU s")
    rows = [heads, ("---",) * len(heads)]
    for kind, sides in results.items():
        ours = sides[first]
        sizes = f"{kinds[kind]['mean']:.0f}, {kinds[kind]['longest']:.0f}"
        for name, side in sides.items():
            rows.append(
                (
                    kind,
                    sizes,
                    name,
                    _number(mean_of_draws(side["seconds"])),
                    _number(mean_of_draws(side["cpu_seconds"])),
                    f"{ratio(side['seconds'], ours['seconds']):.2f}",
                    f"{ratio(side['cpu_seconds'], ours['cpu_seconds']):.2f}",
                    f"{side['positions'] / ours['positions']:.2f}",
                    f"{side['useful']:.2f}",
                    _known(side["temporaries_gb"], ".3f"),
                    f"{side['peak_gb']:.2f}",
                    _known(side["compile_seconds"], ".1f"),
                    _known(side["compile_cpu_seconds"], ".1f"),
                )
            )
        if work == "rollout" and "floor" in kinds[kind]:
            floor = (
                "*floor*",
                _number(kinds[kind]["floor"]),
                "",
                f"{kinds[kind]['floor'] / mean_of_draws(ours['seconds']):.2f}",
            )
            rows.append((kind, sizes, *floor, *[""] * (len(heads) - 6)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _known(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def plotting() -> Any:
    """matplotlib.pyplot.

    Raises:
      UserError: it is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'balcap-jax[notebook]', or leave --plot out") from error
    return plt


def plot(kinds: Mapping[str, dict[str, float]], results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """A column per kind of work: seconds above, the share of positions that hold a token below."""
    plt = plotting()
    plt.rcParams.update({"svg.hashsalt": "uneven", "svg.fonttype": "none", "font.size": 8})
    figure, axes = plt.subplots(
        2, len(results), figsize=(4.5 * len(results), 5), sharex=True, squeeze=False, layout="constrained"
    )
    places = np.arange(len(kinds))
    for column, (work, of_kind) in zip(axes.T, results.items(), strict=True):
        for name in next(iter(of_kind.values())):
            seconds = [mean_of_draws(of_kind[kind][name]["seconds"]) for kind in kinds]
            column[0].plot(places, seconds, "o-", ms=3, label=name)
            column[1].plot(places, [of_kind[kind][name]["useful"] for kind in kinds], "o-", ms=3, label=name)
        if work == "rollout" and all("floor" in kind for kind in kinds.values()):
            column[0].plot(places, [kind["floor"] for kind in kinds.values()], "k:", label="weights read once a step")
        column[0].set(yscale="log", ylabel=f"{work}, s")
        column[1].set(ylim=(0, 1.05), ylabel="useful share", xlabel="mean length / limit")
        column[1].set_xticks(places, list(kinds))
        for axis in column:
            axis.grid(alpha=0.3)
        column[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
