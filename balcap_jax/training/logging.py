"""The numbers of a run: metrics.jsonl, TensorBoard and wandb."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes, replace_file
from balcap_jax.training.weights_and_biases import WandbRun


class MetricsWriter(contextlib.AbstractContextManager):
    """Writes each step's values to `workdir`/metrics.jsonl, to TensorBoard events and, if asked, to Weights & Biases.

    `wandb` is a project name, see `WandbRun`. A writer that is not `enabled` (every process but 0) touches no file.
    Opening drops a torn last line, which a killed process may have left. Call `truncate` with the restored step before
    the first `write` of a resumed run. Raises UserError when the disk is full or not writable, or when the file holds
    something else. It does so too when wandb cannot be started.
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
        self._wandb: WandbRun | None = None
        if not enabled:
            return
        with writing_below(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: each line is one write, whole on disk when `write` returns, whatever kills the process next.
            self._reopen(lambda record: True)
        if tensorboard:
            self._events = EventFile(self.path.parent / "tensorboard")
        if wandb:
            with writing_below(self.path.parent):
                resumed = self.path.stat().st_size > 0
                self._wandb = WandbRun(wandb, self.path.parent, config or {}, resumed=resumed)

    def truncate(self, after_step: int) -> int:
        """Drops the lines with step > `after_step` and returns their number; -1 empties the file.

        The lines of a run that was killed and resumed are then those of an uninterrupted run.
        """
        if not self.enabled:
            return 0
        with writing_below(self.path):
            self._file.close()
            dropped = self._reopen(lambda record: record["step"] <= after_step)
        if self._events is not None:
            self._events.purge(after_step + 1)
        return dropped

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
            self._wandb.log(step, stage, finite)

    def write_completions(
        self, step: int, stage: str, records: Sequence[Mapping[str, Any]], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """A table of captions, see `WandbRun.log_completions`; samples/ of the workdir has all of them."""
        if self._wandb is not None:
            self._wandb.log_completions(step, stage, records, pictures)

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
            self._wandb.close()
        self._file = self._events = self._wandb = None
        self.enabled = False

    def __exit__(self, *exception) -> None:
        self.close()

    def _reopen(self, keep: Callable[[dict], bool]) -> int:
        """Opens the file without a torn last line and the lines not to `keep`. -> the number of those"""
        old = read_bytes(self.path) if self.path.exists() else b""
        records = list(_records(self.path, old))
        lines = [line + b"\n" for line, record in records if keep(record)]
        if b"".join(lines) != old:
            replace_file(self.path, b"".join(lines))
        self._file = self.path.open("ab", buffering=0)
        return len(records) - len(lines)


# Events are flushed (and synced) at most this often: a flush each step would cost fast SFT steps dearly.
TENSORBOARD_FLUSH_SECONDS = 2.0


@contextlib.contextmanager
def writing_below(path: Path) -> Iterator[None]:
    """Raises UserError, with the remedy, in place of the OSError of a write to `path` in a workdir."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot write ({reason}); free space there or choose another --workdir") from error


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """PyTorch cannot be imported inside: tensorboardX would, wherever there is one, for a second or two and no use."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules["torch"] is None:
            del sys.modules["torch"]


class EventFile:
    """One TensorBoard event file, written in the calling thread.

    tensorboardX's SummaryWriter writes from a thread behind a bounded queue: when the disk fills up that thread dies
    and the next `add_scalar` blocks for ever. Its event writer below is the same format without the queue.
    """

    def __init__(self, directory: Path):
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self.directory = directory
        self._event, self._summary = event_pb2, summary_pb2
        with writing_below(directory):
            directory.mkdir(parents=True, exist_ok=True)
            # A file's own time stamp has a resolution of one second; a quick restart must not overwrite the first one.
            suffix = f".{os.getpid()}.{time.time_ns():x}"
            self._writer = EventsWriter(str(directory / "events"), filename_suffix=suffix)
        self._flushed = time.monotonic()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self._summary.Summary(value=scalars))
        if time.monotonic() - self._flushed > TENSORBOARD_FLUSH_SECONDS:
            self.flush()

    def purge(self, from_step: int) -> None:
        """Tells TensorBoard to hide what earlier files logged at `from_step` or later (its purge_step)."""
        self._write(from_step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))
        self.flush()

    def _write(self, step: int, **content: Any) -> None:
        with writing_below(self.directory):
            self._writer.write_event(self._event.Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        with writing_below(self.directory):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with writing_below(self.directory):
            self._writer.close()


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


def _json_number(value: Any) -> int | float | None:
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None
