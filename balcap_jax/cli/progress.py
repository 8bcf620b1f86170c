"""The progress of a command that works on many things."""

import sys
import time

PLAIN_SECONDS = 10.0  # between progress lines, when the output is no terminal


class ProgressLine:
    """A bar on a terminal, else a plain line every few seconds: how many are done of all, how many a second, time left.

    what: the results, such as "captions", one for each of the pictures or other `things`.
    """

    def __init__(self, what: str, total: int, done: int, things: str = "pictures"):
        self.things = things
        self.what, self.total, self.done, self._start_done = what, total, done, done
        self._bar = self._task = None
        self._start = self._last_printed = time.monotonic()

    def __enter__(self) -> "ProgressLine":
        if sys.stdout.isatty():  # isatty decides, not rich: FORCE_COLOR must not put control codes into a log file.
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(self.what, *columns)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=self.done)
        else:
            print(f"{self.total - self.done} of {self.total} {self.things} lack {self.what}", flush=True)
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self.done == self.total or now - self._last_printed >= PLAIN_SECONDS:
            self._last_printed = now
            rate = (self.done - self._start_done) / max(now - self._start, 1e-9)
            left = round((self.total - self.done) / rate)
            print(f"{self.what} {self.done}/{self.total}  {rate:.2f} {self.things}/s  {left} s left", flush=True)
