"""The runs of the studies: their configs, what they go on from, and which of them have no result yet."""

import dataclasses
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax import rewards
from balcap_jax.ablate import results
from balcap_jax.ablate.leave_one_out import arguments_of, order_before, with_variant
from balcap_jax.ablate.running import Run, Scheduler, cost, is_finished
from balcap_jax.ablate.studies import FIELDS, PARTS, QUIET, Arm, Study, World
from balcap_jax.cli.files import AppendedLines
from balcap_jax.cli.process import PreemptionFlag
from balcap_jax.config import recipes as configuration
from balcap_jax.judges.cost import calls_of_step
from balcap_jax.report.run import CEILING
from balcap_jax.training.workdir import read_summary, refuse_another_run

_DONE = ".done"  # ends the names of directories that are being deleted


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the studies are run with: a recipe and a user's overrides, where runs are made, and where results lie."""

    recipe: str
    overrides: Mapping[str, str]
    out: Path
    results: Path
    _told: set[Path] = dataclasses.field(default_factory=set)
    _configs: dict[tuple, ConfigDict] = dataclasses.field(default_factory=dict)

    # ---- configs

    def fields(self, world: World, seed: int, arm: Arm | None = None) -> dict[str, str]:
        own = arm.fields if arm else {}
        return {**FIELDS, **QUIET, **self.overrides, **world.fields, **own, "seed": str(seed)}

    def of(self, study: Study, name: str, seed: int) -> tuple[str, dict[str, str], ConfigDict] | None:
        """(recipe, fields, config) of a run; None where it depends on a result that is not there yet.

        Raises:
          UserError: the recipe knows no such variant, or the config no such field.
        """
        arm = study.arms[name]
        fields = self.fields(study.world, seed, arm)
        if arm.inverse_std_of:
            needed = self.result(study, arm.inverse_std_of, seed)
            if needed is None:
                return None
            path = results.path_of(self.results, study.label(arm.inverse_std_of), seed)
            fields["rewards.weights"] = results.inverse_std(needed, path)
        recipe = with_variant(self.recipe, arm.recipe)
        update = self._config(recipe, fields).stages.rl
        if update.micro_batches == 1 and update.batch_size % PARTS == 0:
            fields = {"stages.rl.micro_batches": str(PARTS), **fields}  # A user's own number counts, 1 too.
        return recipe, fields, self._config(recipe, fields)

    def _config(self, recipe: str, fields: Mapping[str, str]) -> ConfigDict:
        """Each is made once: a study has hundreds, and looks at them several times."""
        key = recipe, *fields.items()
        if key not in self._configs:
            config = configuration.load(recipe, fields)
            rewards.check_settings(config)
            self._configs[key] = config
        return self._configs[key]

    def result(self, study: Study, name: str, seed: int, *, warn: bool = False) -> dict[str, Any] | None:
        """The result of a run where it is there and is that of today's config; `warn` says once that one is not."""
        path = results.path_of(self.results, study.label(name), seed)
        if not path.exists():
            return None
        run = self.of(study, name, seed)
        if run is None:
            return None
        found, changed = results.fresh(path, run[2])
        if changed and warn and path not in self._told:
            self._told.add(path)
            print(f"{path} is of another config ({changed}) and does not count", file=sys.stderr, flush=True)
        return found

    # ---- runs

    def missing(self, studies: Iterable[Study], seeds: Sequence[int] | None = None) -> list[Run]:
        """Runs without a result, each behind the bases that it still needs; seed by seed, shared ones once.

        seeds: None = those of each study. A run that depends on another's result is not among them before that.

        Raises:
          UserError: a bad recipe, variant or field, or `out` holds a run of another config.
        """
        wanted = {
            (seed, study.label(name)): (study, name)
            for study in studies
            for seed in (study.seeds if seeds is None else seeds)
            for name in study.arms
        }
        runs: dict[str, Run] = {}
        for (seed, label), (study, name) in sorted(wanted.items(), key=lambda entry: entry[0][0]):
            made = None if self.result(study, name, seed, warn=True) else self.of(study, name, seed)
            if made is None:
                continue
            recipe, fields, config = made
            run = Run(label, seed, config, arguments_of(recipe, fields), self.out)
            base = None
            for base in () if is_finished(run) else self._bases(study.world, run, runs):
                runs[base.name] = base
            runs[run.name] = dataclasses.replace(run, base=base)
        for run in runs.values():
            refuse_another_run(run.workdir / "config.json", run.config)
        return list(runs.values())

    def _bases(self, world: World, run: Run, known: Mapping[str, Run]) -> Iterator[Run]:
        """What a run goes on from: the stages that all captioners share, then the captioner's."""
        order = configuration.stage_order(run.config)
        whole = order_before(self._config(self.recipe, self.overrides))
        shared = whole[: whole.index(CEILING) + 1] if CEILING in whole else ()
        captioner = world.fields.get("data.captioner", "habits")
        steps = [(CEILING, shared, World(""))] * (0 < len(shared) < len(whole)) + [(f"{captioner}-base", whole, world)]
        base = None
        for name, stages, of in steps:
            if not stages or order[: len(stages)] != stages:
                return
            fields = self.fields(of, run.seed) | {"stages.order": ",".join(stages), "checkpoint.best_metric": ""}
            config, arguments = self._config(self.recipe, fields), arguments_of(self.recipe, fields)
            made = Run(name, run.seed, config, arguments, self.out, base=base, is_base=True)
            base = known.get(made.name, made)
            yield base


def conduct(
    plan: Plan,
    studies: Sequence[Study],
    seeds: Sequence[int] | None,
    *,
    jobs: int,
    keep: bool,
    log: AppendedLines,
    stop: PreemptionFlag,
) -> dict[str, str]:
    """Makes the runs that have no result, until none is left that can be made. -> {name of a run: why it failed}

    keep: directories of finished runs stay; else each is deleted once its result is on disk. Those of bases stay.
    """

    def finish(run: Run) -> None:
        path = results.path_of(plan.results, run.variant, run.seed)
        if run.is_base and path.exists() and results.fresh(path, run.config)[0]:
            return
        results.write(path, result_of(run, jobs, log.entries))
        if not (keep or run.is_base):
            done = run.workdir.with_name(f".{run.name}{_DONE}")
            run.workdir.rename(done)  # Half of a directory must not look like a run.
            shutil.rmtree(done)

    for path in (plan.out / "runs").glob(f".*{_DONE}"):
        shutil.rmtree(path)
    failed: dict[str, str] = {}
    while not stop.requested:
        runs = []
        for run in plan.missing(studies, seeds):
            if run.base is not None and run.base.name in failed:
                failed.setdefault(run.name, f"its base {run.base.name} failed")
            if run.name not in failed:
                runs.append(run)
        if all(run.is_base for run in runs):
            break
        scheduler = Scheduler(runs, jobs, log, finish)
        scheduler.run(stop)
        failed |= scheduler.failed
    return failed


def result_of(run: Run, jobs: int, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of a finished run; `entries` are those of study.jsonl."""
    order = configuration.stage_order(run.config)
    identity, summary = results.identity(run.config), read_summary(run.workdir)
    recipe, *fields = run.arguments
    result = {
        "run": run.variant,
        "seed": run.seed,
        "recipe": recipe.removeprefix("--config="),
        "fields": dict(field.removeprefix("--config.").split("=", 1) for field in fields),
        "config_digest": results.digest(identity),
        "config": identity,
        **results.evaluations(summary, order),
    }
    if not run.is_base:
        records = results.training_records(run.workdir, order[-1])
        result |= {"judge_calls": judge_calls(run.config), "group_std": results.group_std(records)}
        if points := results.trajectory(records):
            result["trajectory"] = points
    seconds = cost([entry for entry in entries if entry.get("run") == run.name])["runs_seconds"]
    result |= {"seconds": round(seconds, 1), "jobs": jobs}
    return result | {"device": summary.get("device", "?"), "versions": summary.get("versions", {})}


def judge_calls(config: ConfigDict) -> int:
    """Questions that training asks the judge; several votes are as many questions."""
    asks = rewards.resolve(config.rewards.name).asks
    calls = config.stages.rl.steps * sum(calls_of_step(config, method) for method in asks)
    return calls * config.judge.get("votes", 1)


def left(plan: Plan, studies: Sequence[Study], seeds: Sequence[int] | None) -> list[str]:
    """Names of the runs that have no result."""
    return [
        f"{study.label(name)}-seed{seed}"
        for study in studies
        for seed in (study.seeds if seeds is None else seeds)
        for name in study.arms
        if plan.result(study, name, seed) is None
    ]
