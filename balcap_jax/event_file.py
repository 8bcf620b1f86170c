"""TensorBoard's event file of a run, and what a disk that refuses means for a workdir's files."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from balcap_jax.errors import UserError

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
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
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
        summary = self._summary.Summary(value=scalars)
        with writing_below(self.directory):
            self._writer.write_event(self._event.Event(wall_time=time.time(), step=int(step), summary=summary))
        if time.monotonic() - self._flushed > TENSORBOARD_FLUSH_SECONDS:
            self.flush()

    def purge(self, from_step: int) -> None:
        """Tells TensorBoard to hide what earlier files logged at `from_step` or later (its purge_step)."""
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        with writing_below(self.directory):
            event = self._event.Event(wall_time=time.time(), step=max(int(from_step), 0), session_log=start)
            self._writer.write_event(event)
        self.flush()

    def flush(self) -> None:
        with writing_below(self.directory):
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with writing_below(self.directory):
            self._writer.close()
