"""Where the seconds of a run go: the clock of its phases, traces of its steps, and the progress line."""

import contextlib
import math
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import jax

from balcap_jax.cli.bucket import shown

STEP_PHASES = ("rollout", "judge", "update")
# Seconds of judging that nobody waited for, because something else was done meanwhile: in no phase, and in no sum.
HIDDEN = "time/judge_hidden"


class PhaseClock:
    """Says where the seconds go, by step and over the whole run, restarts included.

    Every second belongs to exactly one phase: the innermost open one, or "other" outside any. So compiling inside
    `phase("rollout")` can be told apart by `phase("compile")`, and the totals add up to the wall time. One thread only.
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter):
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
            with jax.profiler.TraceAnnotation(name):
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
        seconds = {f"time/{name}": self._step.get(name, 0.0) for name in (*STEP_PHASES, "other")}
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


class ProfileWindow:
    """Traces the steps of a window "first:last" with JAX's profiler into `directory`, as xprof and TensorBoard read it.

    An empty window traces nothing, and so does one that is not `enabled`: every process but 0, since processes of one
    host would write the same file. Each step is the event "train" with its number, and each phase of the clock is an
    event of the phase's name. A window that the run ends inside is closed when the `with` block ends. Writing the trace
    is the phase "profile" of `clock`. `say` gets the line that tells where the trace is, or why there is none.
    """

    def __init__(
        self,
        window: str,
        directory: Path,
        clock: PhaseClock,
        *,
        enabled: bool = True,
        say: Callable[[str], None] = print,
    ):
        self._steps: Sequence[int] = ()
        if window and enabled:
            first, last = map(int, window.split(":"))
            self._steps = range(first, last + 1)
        self._directory, self._clock, self.say = directory, clock, say
        self._traced: list[int] = []
        self._earlier: set[Path] = set()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The block is step `step`."""
        if step in self._steps:
            if not self._traced:
                self._earlier = self._traces()
                self._try(jax.profiler.start_trace, self._directory)
            self._traced.append(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step in self._steps[-1:]:
            self.close()

    def close(self) -> None:
        if self._traced and self._steps:
            with self._clock.phase("profile"):
                if self._try(jax.profiler.stop_trace):
                    self.say(f"profile of the steps {self._traced[0]} to {self._traced[-1]}: {self._directory}")
        self._traced = []

    def _try(self, call: Callable[..., None], *arguments: Path) -> bool:
        """Whether the profiler did it. A trace that cannot be written is no reason to lose a run."""
        try:
            call(*arguments)
        except (RuntimeError, OSError) as error:  # JAX's errors are RuntimeErrors.
            self._steps = ()
            for torn in self._traces() - self._earlier:
                shutil.rmtree(torn, ignore_errors=True)
            self.say(f"no profile in {self._directory} ({' '.join(str(error).split())[:160]}); the run goes on")
            return False
        return True

    def _traces(self) -> set[Path]:
        return set(self._directory.glob("plugins/profile/*"))


LINE_WIDTH = 140
PLAIN_LINES = 20  # lines over a run, when the output is no terminal
_RECENT_STEPS = 20  # steps whose mean time gives s/step and the ETA


class Progress(contextlib.AbstractContextManager):
    """The progress line of one stage: redrawn in place on a terminal, else about PLAIN_LINES plain lines.

    `first_step` and `total_steps` count as `update`'s step does: a stage of the steps 101..300 has first_step 100 and
    total_steps 300. A line of at most 140 characters shows step, ETA, s/step with the share of each phase, tokens/s and
    the shares of the rollout's and the update's work that went into real tokens.
    For RL it shows each reward (x100), b-CapScore, mean words and in-band share, for SFT the loss.
    """

    def __init__(
        self,
        total_steps: int,
        stage: str = "rl",
        *,
        first_step: int = 0,
        stream: IO[str] | None = None,
        enabled: bool = True,
    ):
        self.total_steps, self.stage, self.first_step = total_steps, stage, first_step
        self.every = max(1, math.ceil((total_steps - first_step) / PLAIN_LINES))
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._live = None

    def __exit__(self, *exception) -> None:
        self._leave_line()

    def _leave_line(self) -> None:
        """What is printed next comes below the line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows that `step` is done, with the values that go to metrics.jsonl, the clock's among them."""
        if not self._enabled:
            return
        self._recent.append(sum(_phase_seconds(values).values()))
        # isatty decides, not rich: FORCE_COLOR and the like must not put control codes into a log file.
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            if self._live is None:  # Not before: a stage that has nothing left to do would show an empty line.
                # Redrawn on update only: a refreshing thread would take time from the step on a small machine.
                self._live = Live(console=Console(file=self._stream), auto_refresh=False)
                self._live.start()
            width = min(LINE_WIDTH, self._live.console.width - 1)
            self._live.update(Text(self.line(step, values, width), no_wrap=True), refresh=True)
        elif step == self.first_step + 1 or step % self.every == 0 or step == self.total_steps:
            print(self.line(step, values), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Prints one line below the progress."""
        if not self._enabled:
            return
        self._leave_line()
        print(shown(text), file=self._stream, flush=True)

    def line(self, step: int, values: Mapping[str, float], width: int = LINE_WIDTH) -> str:
        """The text of one progress line; reward names are shortened before anything is cut."""
        line = ""
        for letters in (None, 6, 4, 2, 1):
            line = "  ".join(part for part in self._parts(step, values, letters) if part)
            if len(line) <= width:
                return line
        return line[: max(width - 1, 0)] + "…"

    def _parts(self, step: int, values: Mapping[str, float], letters: int | None) -> list[str]:
        parts = [f"{self.stage} {step}/{self.total_steps}"]
        seconds, left = statistics.fmean(self._recent), self.total_steps - step
        parts.append(f"eta {_duration(seconds * left)}" if left > 0 else "done")
        parts.append(f"{_short(seconds)} s/step{_shares(values)}")
        if _known(values.get("tokens_per_second")):
            parts.append(f"{_short(values['tokens_per_second'])} tok/s")
        parts.append(_useful(values))
        if _known(values.get("loss")) and self.stage != "rl":
            parts.append(f"loss {values['loss']:.4f}")
        names = [name for name in values if name.startswith("reward/") and not name.endswith("_std")]
        parts.append(" ".join(f"{name.removeprefix('reward/')[:letters]} {_points(values[name])}" for name in names))
        if _known(values.get("b_capscore")):
            parts.append(f"b-cap {values['b_capscore']:.1f}")
        if _known(values.get("length/mean")):
            parts.append(f"{values['length/mean']:.0f} words")
        if _known(values.get("gate/in_band")):
            parts.append(f"in band {100 * values['gate/in_band']:.0f}%")
        return parts


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


def _useful(values: Mapping[str, float]) -> str:
    """Shares of what rollout and update compute that belong to a real token, such as "use 71/93%"."""
    known = (values.get(f"padding/{phase}_useful") for phase in STEP_PHASES)
    shares = [f"{100 * share:.0f}" for share in known if _known(share)]
    return f"use {'/'.join(shares)}%" if shares else ""


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
