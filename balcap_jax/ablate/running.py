"""Training runs of a study: several at a time, each from a copy of its base, resumed where they were stopped."""

import ctypes
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, read_bytes, rename_directory, sync_tree, write_text
from balcap_jax.cli.process import PreemptionFlag
from balcap_jax.config import recipes as configuration
from balcap_jax.report.run import CEILING, KINDS
from balcap_jax.training.checkpoint import branch
from balcap_jax.training.evaluation import captions_file
from balcap_jax.training.workdir import is_held, read_summary

_PATIENCE = 120  # seconds that a run has to save and stop
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One training run of the study: `arguments` of balcap_jax.train without --workdir.

    base: the run from whose end it goes on. is_base: others go on from its end, so its own need not be evaluated.
    """

    variant: str
    seed: int
    config: ConfigDict
    arguments: tuple[str, ...]
    out: Path
    base: "Run | None" = None
    is_base: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    @property
    def workdir(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"


def is_finished(run: Run) -> bool:
    """Whether the run has done all of its steps, has been evaluated, and has left its model."""
    try:
        saved = configuration.from_text(read_bytes(run.workdir / "config.json"))
        stages = configuration.stage_order(run.config)
        summary = read_summary(run.workdir)
    except (FileNotFoundError, NotADirectoryError):
        return False
    same_length = all(saved.stages[stage].steps == run.config.stages[stage].steps for stage in stages)
    evaluated = run.is_base or stages[-1] in summary.get("evaluations", {})
    return same_length and evaluated and (run.workdir / "model").is_dir()


class Scheduler:
    """Runs what is not finished, at most `jobs` at a time; `failed` holds reasons by name of run.

    `finish(run)` is called once for each run that has ended well, those that had before among them. A UserError of it
    counts as a failure of the run.
    """

    def __init__(
        self, runs: Sequence[Run], jobs: int, log: AppendedLines, finish: Callable[[Run], None] = lambda run: None
    ):
        """Bases stand before the runs that go on from them."""
        self.jobs, self._log, self._finish = jobs, log, finish
        self.waiting = list(runs)
        self.total = len(runs)
        self.failed: dict[str, str] = {}
        self._finished: set[Run] = set()
        self._running: dict[Run, tuple[subprocess.Popen, float]] = {}
        # Several runs share the cores: threads of one that wait for those of another take longer than one thread does.
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self._environment = os.environ | ({"NPROC": str(threads)} if jobs > 1 else {})

    def run(self, stop: PreemptionFlag) -> None:
        """Returns when nothing is left to run, or when `stop` was requested and all runs have saved."""
        for run in list(self.waiting):
            if is_finished(run):
                self.waiting.remove(run)
                self._end_well(run)
        while (self.waiting or self._running) and not stop.requested:
            for run in list(self.waiting):
                if run.base is not None and run.base.name in self.failed:
                    self.waiting.remove(run)
                    self._fail(run, f"its base {run.base.name} failed")
                elif len(self._running) < self.jobs and self._may_start(run):
                    self.waiting.remove(run)
                    self._start(run)
            time.sleep(0.1)
            for run, (process, _) in list(self._running.items()):
                if process.poll() is not None:
                    self._end(run)
        self._stop()

    def _may_start(self, run: Run) -> bool:
        """Waits for a run of a study that was killed, which may still be saving."""
        return (run.base is None or run.base in self._finished) and not is_held(run.workdir)

    def _start(self, run: Run) -> None:
        try:
            if run.base is not None and not run.workdir.exists():
                copy_base(run.base.workdir, run.workdir)
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
            self._fail(run, "it was asked to stop; the same command goes on with it", "stopped")
        self._log.append([{"run": run.name, "status": status, "started": started, "ended": time.time()}])
        if status == "finished":
            self._end_well(run)

    def _end_well(self, run: Run) -> None:
        try:
            self._finish(run)
            self._finished.add(run)
        except UserError as error:
            self._fail(run, str(error))

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

    def _fail(self, run: Run, reason: str, how: str = "failed") -> None:
        self.failed[run.name] = reason
        self._say(f"{run.name} {how}: {reason}")

    def _say(self, text: str) -> None:
        ended = self.total - len(self.waiting) - len(self._running)
        print(f"{time.strftime('%H:%M:%S')} [{ended}/{self.total}] {text}", flush=True)


def _end_with_the_study() -> None:
    """In a run's process: has the system ask it to stop when the study is killed, where the system can (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def copy_base(base: Path, workdir: Path) -> None:
    """Makes `workdir` look like a run of the recipe that stopped at the end of its base's stages.

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


def cost(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of all runs together, and of the time in which any of them ran."""
    times = ((one.get("started"), one.get("ended")) for one in entries)
    spans = sorted(span for span in times if all(isinstance(time, int | float) for time in span))
    wall, until = 0.0, 0.0
    for start, end in spans:
        wall += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"runs_seconds": sum(end - start for start, end in spans), "wall_seconds": wall}
