"""The study of a recipe's own variants: which runs it has, and the tables of those that are finished."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.ablate import plot
from balcap_jax.ablate.running import Run, cost, is_finished
from balcap_jax.ablate.table import BASE, claims_markdown, markdown, points, rows
from balcap_jax.ablate.variants import FULL
from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import write_text
from balcap_jax.config import recipes as configuration
from balcap_jax.report.run import KINDS
from balcap_jax.training.machine import device_text, versions
from balcap_jax.training.workdir import read_summary, refuse_another_run

LAST = "rl"


def plan(
    recipe: str, overrides: Mapping[str, str], variants: Sequence[str], seeds: Sequence[int], out: Path
) -> tuple[dict[int, Run], list[Run]]:
    """-> (base run by seed, empty where the recipe has no stage before rl; runs of the variants, seed by seed)

    Raises:
      UserError: a bad recipe, variant or field, a variant that changes nothing, or `out` holds other runs.
    """

    def make(variant: str, seed: int, recipe: str, more: Mapping[str, str], **base: Any) -> Run:
        fields = {**overrides, "seed": str(seed), **more}
        return Run(variant, seed, configuration.load(recipe, fields), arguments_of(recipe, fields), out, **base)

    order = order_before(configuration.load(recipe, overrides))
    before = {"stages.order": ",".join(order), "checkpoint.best_metric": ""}
    bases = {seed: make(BASE, seed, recipe, before, is_base=True) for seed in seeds} if order else {}
    # Seed by seed: the first run of a variant compiles its programs, and a study that is cut short compares all.
    runs = [
        make(name, seed, with_variant(recipe, name), {}, base=bases.get(seed)) for seed in seeds for name in variants
    ]
    seen: dict[str, str] = {}
    for run in runs:
        other = seen.setdefault(configuration.to_text(run.config), run.variant)
        if other != run.variant:
            raise UserError(
                f"the variants {other!r} and {run.variant!r} are the same with these settings; leave one out of "
                "--variants, or an override out"
            )
    for run in (*bases.values(), *runs):
        refuse_another_run(run.workdir / "config.json", run.config)
    return bases, runs


def arguments_of(recipe: str, fields: Mapping[str, str]) -> tuple[str, ...]:
    """Arguments of balcap_jax.train without --workdir."""
    return (f"--config={recipe}", *(f"--config.{name}={value}" for name, value in fields.items()))


def order_before(config: ConfigDict) -> tuple[str, ...]:
    """The stages before rl. Raises UserError where the recipe does not end with rl."""
    order = configuration.stage_order(config)
    if order[-1] != LAST:
        raise UserError(f"config field 'stages.order' must end with rl, which a study compares; got {','.join(order)}")
    return order[:-1]


def with_variant(recipe: str, variant: str) -> str:
    """The recipe with one variant more; FULL and "" are the recipe itself."""
    if variant in (FULL, ""):
        return recipe
    has_variant = configuration.split_recipe(recipe)[1] is not None
    return f"{recipe},{variant}" if has_variant else f"{recipe}:{variant}"


def collect(runs: Sequence[Run], kind: str) -> dict[str, dict[int, dict[str, float]]]:
    """Values of all finished runs: {variant: {seed: {metric: points}}}; BASE is the start of the first variant."""
    values: dict[str, dict[int, dict[str, float]]] = {BASE: {}}
    for run in runs:
        if not is_finished(run):
            continue
        order = configuration.stage_order(run.config)
        before = order[-2] if len(order) > 1 else "base"
        try:
            evaluations = read_summary(run.workdir)[kind]
            if before in evaluations:
                values[BASE].setdefault(run.seed, points(evaluations[before]))
            values.setdefault(run.variant, {})[run.seed] = points(evaluations[order[-1]])
        except (KeyError, TypeError, AttributeError) as error:
            warning = f"warning: {run.workdir}/summary.json is none that training wrote ({error})"
            print(f"{warning}; the table is without it; delete the folder to run it anew", file=sys.stderr)
    return {variant: by_seed for variant, by_seed in values.items() if by_seed}


def write_tables(out: Path, runs: Sequence[Run], command: str, entries: Sequence[Mapping[str, Any]], jobs: int) -> Path:
    """Writes table.json, table.md and plot.svg about the runs that are finished; returns the path of table.md."""
    tables = {kind: rows(collect(runs, kind)) for kind in KINDS}
    first, title = next(iter(KINDS.items()))
    seconds, images = cost(entries), runs[0].config.log.eval_images
    about = {"command": command, "versions": versions(), "device": device_text(), "jobs": jobs, **seconds}
    write_text(out / "table.json", json_text.dumps(about | tables, indent=1) + "\n")
    parts = [
        f"`{command}`\n",
        f"{seconds['wall_seconds'] / 60:.0f} min in all, {seconds['runs_seconds'] / 60:.0f} min of runs, {jobs} at a "
        f"time, on {about['device']}; jax {about['versions'].get('jax')}. {images} held-out images; mean ± sd over "
        "seeds; bold: the 95% t interval of the paired difference to `full` is above or below 0.\n",
    ]
    for kind, table in tables.items():
        parts += [f"## {KINDS[kind].capitalize()} captions\n", markdown(table)]
        if any(row["claims"] for row in table):
            parts += [f"Claims, {KINDS[kind]} captions; ours: mean paired difference ± half of its 95% interval.\n"]
            parts += [claims_markdown(table)]
    parts += ["## Variants\n", "".join(f"- `{row['variant']}`: {row['about']}\n" for row in tables[first])]
    write_text(out / "table.md", "\n".join(parts))
    write_text(out / "plot.svg", plot.svg(tables[first], f"Leave-one-out study, {title} captions"))
    return out / "table.md"
