"""Metrics from the compiled step to the disk and the terminal: exact accumulation, writers, phase clock, progress line.

Scales: `reward/<name>`, `gate/in_band`, `judge/failure_rate` and `length/truncated_frac` are fractions in [0, 1];
`b_capscore` is in points, 0 to 100; `length/mean` counts whitespace words; `time/*` are seconds, which add up to those
of the step without `HIDDEN`. `step` counts over all stages of a run, so that it orders the lines of metrics.jsonl.
"""

import contextlib
import importlib
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax import durable, json_text, regular_files
from balcap_jax.errors import UserError
from balcap_jax.event_file import EventFile, writing_below

# --- (sum, count) metrics ---------------------------------------------------------------------------------------------


class Mean(NamedTuple):
    """A mean that is still a sum: `total` over `count` items, so that uneven micro-batches add up exactly."""

    total: Any
    count: Any


class Max(NamedTuple):
    """The largest value seen, -inf when nothing was: for drift-like metrics, where a mean would hide one outlier."""

    value: Any


Metrics = dict[str, Mean | Max]


def combine(a: Metrics, b: Metrics) -> Metrics:
    """Metrics of two micro-batches (or hosts) together; a name that only one side has is kept. Works under jit."""
    combined = dict(a)
    for name, right in b.items():
        left = combined.get(name)
        if left is None:
            combined[name] = right
        elif type(left) is not type(right):
            raise TypeError(f"metric {name}: {type(left).__name__} and {type(right).__name__} do not combine")
        elif isinstance(left, Mean):
            combined[name] = Mean(left.total + right.total, left.count + right.count)
        else:
            on_device = isinstance(left.value, jax.Array) or isinstance(right.value, jax.Array)
            combined[name] = Max((jnp if on_device else np).maximum(left.value, right.value))
    return combined


def finalise(metrics: Metrics) -> dict[str, float]:
    """Host floats of `metrics`, fetched in one explicit transfer; NaN where nothing was counted (null in the JSON)."""
    values = {}
    for name, metric in jax.device_get(metrics).items():
        if isinstance(metric, Mean):
            # The division is done in double, so that the value does not depend on where it was computed.
            total, count = float(metric.total), float(metric.count)
            values[name] = total / count if count else math.nan
        else:
            value = float(metric.value)
            values[name] = math.nan if value == -math.inf else value
    return values


# --- writers ----------------------------------------------------------------------------------------------------------


class MetricsWriter:
    """Writes each step's values to `workdir`/metrics.jsonl, to TensorBoard events and, if asked, to Weights & Biases.

    `wandb` is a project name; the rest of W&B (entity, run id, mode) is set by its own WANDB_* environment variables.
    A writer that is not `enabled` (every process but 0) touches no file. Opening drops a torn last line, which a killed
    process may have left. Call `truncate` with the restored step before the first `write` of a resumed run.
    Raises UserError when the disk is full or not writable, when the file holds something else, or when wandb is asked
    for and cannot be started.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        enabled: bool = True,
        config: Mapping[str, Any] | None = None,
    ):
        self.path = Path(workdir) / "metrics.jsonl"
        self.enabled = enabled
        self._file: IO[bytes] | None = None
        self._events = None
        self._wandb = None
        if not enabled:
            return
        with writing_below(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: each line is one write, whole on disk when `write` returns, whatever kills the process next.
            self._file = self._reopen(lambda record: True)
        if tensorboard:
            self._events = EventFile(self.path.parent / "tensorboard")
        if wandb:
            module = import_wandb()
            try:
                self._wandb = module.init(project=wandb, dir=str(self.path.parent), config=dict(config or {}))
            except Exception as error:  # of many kinds: no network, no login, a name that it does not take
                raise UserError(
                    f"log.wandb: Weights & Biases cannot be started ({' '.join(str(error).split())}); mend that, set "
                    "WANDB_MODE=offline, or leave log.wandb empty"
                ) from error

    def truncate(self, after_step: int) -> int:
        """Drops the lines with step > `after_step` and returns their number; -1 empties the file.

        The lines of a run that was killed and resumed are then those of an uninterrupted run.
        """
        if not self.enabled:
            return 0
        before = _count_lines(self.path)
        with writing_below(self.path):
            self._file.close()
            self._file = self._reopen(lambda record: record["step"] <= after_step)
        if self._events is not None:
            self._events.purge(after_step + 1)
        return before - _count_lines(self.path)

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Appends one line; NaN and infinities become null, since JSON has no word for them."""
        if not self.enabled:
            return
        numbers = {name: _json_number(value) for name, value in values.items()}
        line = json_text.dumps({"step": int(step), "stage": stage, **numbers}) + "\n"
        with writing_below(self.path):
            rest = memoryview(line.encode())
            while rest:  # a disk that fills up takes a part first and fails on the next write
                rest = rest[self._file.write(rest) :]
        finite = {name: value for name, value in numbers.items() if value is not None}
        if self._events is not None:
            self._events.add(step, finite)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in finite.items()}, step=int(step))

    def flush(self) -> None:
        """Puts the TensorBoard events on disk, before a checkpoint: a resumed run does not log those steps again."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._events = self._wandb = None
        self.enabled = False

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _reopen(self, keep: Callable[[dict], bool]) -> IO[bytes]:
        """Rewrites the file without a torn last line and lines not to `keep`, and opens it for appending."""
        if self.path.exists():
            old = regular_files.read(self.path)
            kept = b"".join(line + b"\n" for line, record in _records(self.path, old) if keep(record))
            if kept != old:
                durable.replace_file(self.path, kept)
        return self.path.open("ab", buffering=0)


def import_wandb() -> Any:
    """The module wandb. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError("log.wandb is set but wandb is not installed; run `pip install wandb` or unset it") from error


def _records(path: Path, content: bytes) -> Iterator[tuple[bytes, dict]]:
    """Lines without their ends, and what they hold. A crash may have torn the last one, which is left out then.

    Raises:
      UserError: what a crash does not do: another line, or the only one, is no record of ours.
    """
    remedy = "no run wrote that; move the file away (the run goes on without the earlier numbers), or mend the line"
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = json_text.parse_object(line, where, remedy)
            if not isinstance(record.get("step"), int):
                raise UserError(f"{where} has no step; {remedy}")
        except UserError:
            if 1 < number == len(lines) and not rest:
                return
            raise
        yield line, record
    if not lines and rest and not rest.startswith(b"{"):
        raise UserError(f"{path}, line 1 is no record of a run; {remedy}")


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _json_number(value: Any) -> int | float | None:
    if value is None:
        return None
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        number = float(number)
    return number if math.isfinite(number) else None


# --- phase clock ------------------------------------------------------------------------------------------------------

STEP_PHASES = ("rollout", "judge", "update")
HIDDEN = "time/judge_hidden"
"""Seconds of judging that nobody waited for, because something else was done meanwhile: in no phase, and in no sum."""


class PhaseClock:
    """Says where the seconds go, by step and over the whole run, restarts included.

    Every second belongs to exactly one phase: the innermost open one, or "other" outside any. So compiling inside
    `phase("rollout")` can be told apart by `phase("compile")`, and the totals add up to the wall time. One thread only.
    """

    def __init__(self, step_phases: tuple[str, ...] = STEP_PHASES, *, now: Callable[[], float] = time.perf_counter):
        self._step_phases = step_phases
        self._now = now
        self._mark = now()
        self._open: list[str] = []
        self._step: dict[str, float] = {}
        self._total: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._attribute()
        self._open.append(name)
        try:
            yield
        finally:
            self._attribute()
            self._open.pop()

    def step(self) -> dict[str, float]:
        """Seconds since the last call as `time/<phase>` for the step's phases and `time/other`.

        "other" is the time outside any phase; phases beyond the step's own (compile, save, evaluate) count in the
        totals only, so that they do not distort the time of a step. Call it once before the loop to leave set-up out.
        """
        self._attribute()
        seconds = {f"time/{name}": self._step.get(name, 0.0) for name in (*self._step_phases, "other")}
        self._step = {}
        return seconds

    def totals(self) -> dict[str, float]:
        """Seconds by phase and their sum "wall" since the run began, over restarts."""
        self._attribute()
        return {"wall": sum(self._total.values()), **self._total}

    def state(self) -> dict[str, float]:
        """JSON-able totals for the checkpoint."""
        self._attribute()
        return dict(self._total)

    def restore(self, state: Mapping[str, float]) -> None:
        """Adds the totals of the run so far to this process's own; call once, after a restart."""
        for name, seconds in state.items():
            self._total[name] = self._total.get(name, 0.0) + float(seconds)

    def _attribute(self) -> None:
        now = self._now()
        elapsed, self._mark = now - self._mark, now
        name = self._open[-1] if self._open else "other"
        self._step[name] = self._step.get(name, 0.0) + elapsed
        self._total[name] = self._total.get(name, 0.0) + elapsed


# --- progress ---------------------------------------------------------------------------------------------------------

LINE_WIDTH = 140
PLAIN_LINES = 20  # lines over a run, when the output is no terminal
_RECENT_STEPS = 20  # steps whose mean time gives s/step and the ETA


class Progress:
    """The progress line of one stage: redrawn in place on a terminal, else a plain line every `every` steps.

    `first_step` and `total_steps` count as `update`'s step does: a stage of the steps 101..300 has first_step 100 and
    total_steps 300. A line of at most 140 characters shows step, ETA, s/step with the share of each phase, tokens/s,
    and for RL each reward (x100), b-CapScore, mean words and in-band share, for SFT the loss.
    """

    def __init__(
        self,
        total_steps: int,
        stage: str = "rl",
        *,
        first_step: int = 0,
        every: int | None = None,
        stream: IO[str] | None = None,
        enabled: bool = True,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.total_steps, self.stage, self.first_step = total_steps, stage, first_step
        self.every = every or max(1, math.ceil((total_steps - first_step) / PLAIN_LINES))
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._now = now
        self._last: float | None = None
        self._last_step = first_step
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._live = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._leave_line()

    def _draw_line(self) -> None:
        from rich.console import Console
        from rich.live import Live

        # Redrawn on update only: a refreshing thread would take time from the step on a small machine.
        self._live = Live(console=Console(file=self._stream), auto_refresh=False)
        self._live.start()

    def _leave_line(self) -> None:
        """What is printed next comes below the line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows that `step` is done, with the values that go to metrics.jsonl."""
        if not self._enabled:
            return
        self._time_step(step, values)
        # isatty decides, not rich: FORCE_COLOR and the like must not put control codes into a log file.
        if self._stream.isatty():
            from rich.text import Text

            if self._live is None:  # Not before: a stage that has nothing left to do would show an empty line.
                self._draw_line()

            width = min(LINE_WIDTH, self._live.console.width - 1)
            self._live.update(Text(self.line(step, values, width), no_wrap=True), refresh=True)
        elif step == self.first_step + 1 or step % self.every == 0 or step == self.total_steps:
            print(self.line(step, values), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Prints one line below the progress."""
        if not self._enabled:
            return
        self._leave_line()
        print(text, file=self._stream, flush=True)

    def line(self, step: int, values: Mapping[str, float], width: int = LINE_WIDTH) -> str:
        """The text of one progress line; reward names are shortened before anything is cut."""
        line = ""
        for letters in (None, 6, 4, 1):
            line = "  ".join(part for part in self._parts(step, values, letters) if part)
            if len(line) <= width:
                return line
        return line[: max(width - 1, 0)] + "…"

    def _parts(self, step: int, values: Mapping[str, float], letters: int | None) -> list[str]:
        parts = [f"{self.stage} {step}/{self.total_steps}"]
        if self._recent:
            seconds = statistics.fmean(self._recent)
            left = self.total_steps - step
            parts.append(f"eta {_duration(seconds * left)}" if left > 0 else "done")
            parts.append(f"{_short(seconds)} s/step{_shares(values)}")
        if _known(values.get("tokens_per_second")):
            parts.append(f"{_short(values['tokens_per_second'])} tok/s")
        if _known(values.get("loss")) and self.stage != "rl":
            parts.append(f"loss {values['loss']:.4f}")
        rewards = {name.removeprefix("reward/"): value for name, value in values.items() if _is_reward(name)}
        parts.append(" ".join(f"{name[:letters]} {_points(value)}" for name, value in rewards.items()))
        if _known(values.get("b_capscore")):
            parts.append(f"b-cap {values['b_capscore']:.1f}")
        if _known(values.get("length/mean")):
            parts.append(f"{values['length/mean']:.0f} words")
        if _known(values.get("gate/in_band")):
            parts.append(f"in band {100 * values['gate/in_band']:.0f}%")
        return parts

    def _time_step(self, step: int, values: Mapping[str, float]) -> None:
        """The clock's seconds where given (they leave compiling out), else the wall time between updates."""
        now = self._now()
        phases = _phase_seconds(values)
        if phases:
            self._recent.append(sum(phases.values()))
        elif self._last is not None and step > self._last_step:
            self._recent.append((now - self._last) / (step - self._last_step))
        self._last, self._last_step = now, step


def _is_reward(name: str) -> bool:
    return name.startswith("reward/") and not name.endswith("_std")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _points(value: float | None) -> str:
    return f"{100 * value:.1f}" if _known(value) else "-"


def _shares(values: Mapping[str, float]) -> str:
    """Shares of the step's phases, such as " (rollout 61 judge 4 update 33%)"; what is missing to 100 is "other"."""
    seconds = _phase_seconds(values)
    total = sum(seconds.values())
    shares = [f"{name} {100 * value / total:.0f}" for name, value in seconds.items() if name != "other" and value > 0]
    return f" ({' '.join(shares)}%)" if shares else ""


def _phase_seconds(values: Mapping[str, float]) -> dict[str, float]:
    return {
        name.removeprefix("time/"): value
        for name, value in values.items()
        if name.startswith("time/") and name != HIDDEN and _known(value)
    }


def _short(value: float) -> str:
    """Three significant digits, such as 0.123, 12.3, 12.3k."""
    for scale, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
