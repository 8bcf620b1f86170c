"""Leaves parts of the method out, one at a time and over several seeds, and writes what that changes.

    python -m balcap_jax.ablate --config=configs/scenes.py --out=runs/ablation
    python -m balcap_jax.ablate --config=configs/scenes.py --out=D --variants=full,grpo --seeds=0,1 --jobs=1

A variant is one of the recipe's own, as in `configs/scenes.py:no_gate`; "full" is the recipe as it is. For each seed
the stages before rl are trained once (D/runs/base-seedN); every variant goes on from a copy of that run's last
checkpoint, exactly as one run of the whole recipe would. D then holds

    table.md, table.json, plot.svg   of all runs that are finished
    runs/VARIANT-seedN/              each an ordinary workdir: `python -m balcap_jax.report` shows it
    logs/, study.jsonl               what each run printed, and when it ran

The same command goes on with a study that was stopped or killed: finished runs stay, others resume. After a run that
fails the others still run; the command names it at the end, and the exit status is 1.
"""

import ctypes
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax import rewards
from balcap_jax.ablate import plot
from balcap_jax.ablate.table import BASE, claims_markdown, markdown, points, rows
from balcap_jax.ablate.variants import FULL, LEAVE_ONE_OUTS
from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import CommandParser, place, split_overrides
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, read_bytes, rename_directory, sync_tree, write_text
from balcap_jax.cli.process import INTERRUPTED, PreemptionFlag, exit_on_user_error
from balcap_jax.config import recipes as configuration
from balcap_jax.report.run import CEILING, KINDS
from balcap_jax.training.checkpoint import branch
from balcap_jax.training.evaluation import captions_file
from balcap_jax.training.machine import device_text, versions
from balcap_jax.training.workdir import is_held, read_summary, refuse_another_run

LAST = "rl"
_PATIENCE = 120  # seconds that a run has to save and stop
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One training run of the study: `arguments` of balcap_jax.train without --workdir."""

    variant: str
    seed: int
    config: ConfigDict
    arguments: tuple[str, ...]
    out: Path

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    @property
    def workdir(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(
    recipe: str, overrides: Mapping[str, str], variants: Sequence[str], seeds: Sequence[int], out: Path
) -> tuple[dict[int, Run], list[Run]]:
    """-> (base run by seed, empty where the recipe has no stage before rl; runs of the variants, seed by seed)

    Raises:
      UserError: a bad recipe, variant or field, a variant that changes nothing, or `out` holds other runs.
    """

    def make(variant: str, seed: int, recipe: str, more: Mapping[str, str]) -> Run:
        fields = {**overrides, "seed": str(seed), **more}
        config = configuration.load(recipe, fields)
        rewards.check_settings(config)
        arguments = (f"--config={recipe}", *(f"--config.{name}={value}" for name, value in fields.items()))
        return Run(variant, seed, config, arguments, out)

    order = configuration.stage_order(configuration.load(recipe, overrides))
    if order[-1] != LAST:
        raise UserError(f"config field 'stages.order' must end with rl, which a study compares; got {','.join(order)}")
    before = {"stages.order": ",".join(order[:-1]), "checkpoint.best_metric": ""}
    bases = {seed: make(BASE, seed, recipe, before) for seed in seeds} if order[:-1] else {}
    # Seed by seed: the first run of a variant compiles its programs, and a study that is cut short compares all.
    runs = [make(name, seed, with_variant(recipe, name), {}) for seed in seeds for name in variants]
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


def with_variant(recipe: str, variant: str) -> str:
    """The recipe with one variant more; FULL is the recipe itself."""
    if variant == FULL:
        return recipe
    return f"{recipe},{variant}" if ".py:" in recipe else f"{recipe}:{variant}"


def is_finished(run: Run) -> bool:
    """Whether the run has done all of its steps, has been evaluated, and has left its model."""
    try:
        saved = configuration.from_text(read_bytes(run.workdir / "config.json"))
        stages = configuration.stage_order(run.config)
        summary = read_summary(run.workdir)
    except (FileNotFoundError, NotADirectoryError):
        return False
    same_length = all(saved.stages[stage].steps == run.config.stages[stage].steps for stage in stages)
    evaluated = run.variant == BASE or stages[-1] in summary.get("evaluations", {})
    return same_length and evaluated and (run.workdir / "model").is_dir()


# --- running ----------------------------------------------------------------------------------------------------------


class Study:
    """Runs what is not finished, at most `jobs` at a time; `failed` holds reasons by name of run."""

    def __init__(self, bases: Mapping[int, Run], runs: Sequence[Run], jobs: int, log: AppendedLines):
        self.bases, self.jobs, self._log = bases, jobs, log
        self.waiting = [run for run in (*bases.values(), *runs) if not is_finished(run)]
        self.total = len(bases) + len(runs)
        self.failed: dict[str, str] = {}
        self._running: dict[Run, tuple[subprocess.Popen, float]] = {}
        # Several runs share the cores: threads of one that wait for those of another take longer than one thread does.
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self._environment = os.environ | ({"NPROC": str(threads)} if jobs > 1 else {})

    def run(self, stop: PreemptionFlag) -> None:
        """Returns when nothing is left to run, or when `stop` was requested and all runs have saved."""
        while (self.waiting or self._running) and not stop.requested:
            for run in list(self.waiting):
                base = self.bases.get(run.seed) if run.variant != BASE else None
                if base is not None and base.name in self.failed:
                    self.waiting.remove(run)
                    self._fail(run, f"its base {base.name} failed")
                elif len(self._running) < self.jobs and self._may_start(run, base):
                    self.waiting.remove(run)
                    self._start(run, base)
            time.sleep(0.1)
            for run, (process, _) in list(self._running.items()):
                if process.poll() is not None:
                    self._end(run)
        self._stop()

    def _may_start(self, run: Run, base: Run | None) -> bool:
        """Waits for a run of a study that was killed, which may still be saving."""
        return (base is None or is_finished(base)) and not is_held(run.workdir)

    def _start(self, run: Run, base: Run | None) -> None:
        try:
            if base is not None and not run.workdir.exists():
                copy_base(base.workdir, run.workdir)
            run.log.parent.mkdir(parents=True, exist_ok=True)
            with open(run.log, "ab") as log:
                command = [sys.executable, "-m", "balcap_jax.train", *run.arguments, f"--workdir={run.workdir}"]
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                    start_new_session=True,  # Ctrl-C is for the study, which then asks its runs to stop.
                    preexec_fn=_end_with_the_study,
                )  # fmt: skip
        except (OSError, UserError) as error:
            self._fail(run, str(error))
            return
        self._running[run] = process, time.time()
        self._say(f"{run.name} started")

    def _end(self, run: Run) -> None:
        process, started = self._running.pop(run)
        if process.returncode:
            status = "failed"
            self._fail(run, f"exit status {process.returncode}: {last_line(run.log)}")
        elif is_finished(run):
            status = "finished"
            self._say(f"{run.name} finished in {time.time() - started:.0f} s")
        else:
            status = "stopped"
            self._fail(run, "it was asked to stop; the same command goes on with it")
        self._log.append([{"run": run.name, "status": status, "started": started, "ended": time.time()}])

    def _stop(self) -> None:
        for process, _ in self._running.values():
            process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for run, (process, _) in list(self._running.items()):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._end(run)

    def _fail(self, run: Run, reason: str) -> None:
        self.failed[run.name] = reason
        self._say(f"{run.name} failed: {reason}")

    def _say(self, text: str) -> None:
        ended = self.total - len(self.waiting) - len(self._running)
        print(f"{time.strftime('%H:%M:%S')} [{ended}/{self.total}] {text}", flush=True)


def _end_with_the_study() -> None:
    """In a run's process: has the system ask it to stop when the study is killed, where the system can (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def copy_base(base: Path, workdir: Path) -> None:
    """Makes `workdir` look like a run of the recipe that stopped at the end of its stages before rl.

    The ceiling's evaluation comes along: the checkpoint that it is of does not.
    """
    aside = workdir.with_name(f".{workdir.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    branch(base / "checkpoints", aside / "checkpoints")
    shutil.copyfile(base / "metrics.jsonl", aside / "metrics.jsonl")
    summary = read_summary(base)
    kept = {kind: {CEILING: summary[kind][CEILING]} for kind in KINDS if CEILING in summary.get(kind, {})}
    if kept:
        write_text(aside / "summary.json", json_text.dumps(kept, indent=2) + "\n")
        (aside / "samples").mkdir()
    for kind in kept:
        if captions_file(base, kind, CEILING).exists():
            shutil.copyfile(captions_file(base, kind, CEILING), captions_file(aside, kind, CEILING))
    sync_tree(aside)
    rename_directory(aside, workdir)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


# --- the result -------------------------------------------------------------------------------------------------------


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


def cost(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of all runs together, and of the time in which any of them ran."""
    times = ((one.get("started"), one.get("ended")) for one in entries)
    spans = sorted(span for span in times if all(isinstance(time, int | float) for time in span))
    wall, until = 0.0, 0.0
    for start, end in spans:
        wall += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"runs_seconds": sum(end - start for start, end in spans), "wall_seconds": wall}


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


# --- the command ------------------------------------------------------------------------------------------------------


def _seeds(text: str) -> list[int]:
    seeds = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds takes different whole numbers, comma-separated; got {text!r}")
    return seeds


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(set(names)) < len(names) or BASE in names:
        raise UserError(f"--variants takes different names of variants, comma-separated; got {text!r}")
    return names


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m balcap_jax.ablate",
        description="Trains variants of a recipe over several seeds and compares them; the same command goes on with "
        "a study that was stopped.",
    )
    configuration.add_arguments(parser)
    parser.add_argument("--out", type=place, metavar="DIR", required=True, help="where the study is written")
    variants_help = "comma-separated; default: %(default)s"
    parser.add_argument("--variants", default=",".join(LEAVE_ONE_OUTS), help=variants_help, metavar="A,B")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="default: %(default)s")
    cores = len(os.sched_getaffinity(0))
    jobs_help = "runs at a time, which share the cores; default: one per core (%(default)s); 1 on an accelerator"
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help=jobs_help)
    arguments = sys.argv[1:] if argv is None else list(argv)
    rest, overrides = split_overrides(arguments)
    args = parser.parse_args(rest)
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    for name in ("seed", "stages.order"):
        if name in overrides:
            raise UserError(f"--config.{name} is the study's own to set; use --seeds, or a recipe with that order")
    variants, seeds, out = _names(args.variants), _seeds(args.seeds), Path(args.out).absolute()
    bases, runs = plan(args.config, overrides, variants, seeds, out)
    command = shlex.join(["python", "-m", "balcap_jax.ablate", *arguments])
    with PreemptionFlag() as stop, AppendedLines(out / "study.jsonl") as log:
        study = Study(bases, runs, args.jobs, log)
        study.run(stop)
        finished = [run for run in runs if is_finished(run)]
        if finished:
            print(f"table: {write_tables(out, runs, command, log.entries, args.jobs)}", flush=True)
        if stop.requested:
            print(f"{stop.signal_name}: {len(finished)} of {len(runs)} runs are finished; the same command goes on")
            sys.exit(INTERRUPTED)
    for name, reason in study.failed.items():
        print(f"error: {name}: {reason} (log: {out / 'logs' / name}.log)", file=sys.stderr)
    if study.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
