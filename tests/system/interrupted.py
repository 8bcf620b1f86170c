"""Runs `balcap train`, which meets a signal at a chosen point, so that a test need not hit it by luck.

    python interrupted.py SIGKILL WHERE <arguments of balcap_jax.train>

WHERE is one of
    log:N         step N is computed, its line in metrics.jsonl is not; the checkpoint before it is whole
    rename:NAME   a file or directory is whole under its temporary name and is about to be renamed to NAME; the
                  checkpoints before it are whole
or several of them, joined by +
"""

import os
import signal
import sys

from balcap_jax import __main__ as balcap
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.training.logging import MetricsWriter


def interrupt(number: signal.Signals, where: str) -> None:
    kind, _, name = where.partition(":")
    save, write, writing = Checkpointer.save, MetricsWriter.write, []

    def remember_and_save(self, *arguments, **options):
        writing.append(self)
        save(self, *arguments, **options)

    def strike() -> None:
        for checkpointer in writing:
            checkpointer.wait()
        os.kill(os.getpid(), number)

    if kind == "log":

        def strike_and_write(self, step, *arguments):
            if step == int(name):
                strike()
            write(self, step, *arguments)

        Checkpointer.save, MetricsWriter.write = remember_and_save, strike_and_write
    elif kind == "rename":
        if not name.isdecimal():  # A checkpoint that is about to get its name must not wait for itself.
            Checkpointer.save = remember_and_save

        def watch(event: str, arguments: tuple) -> None:
            if event == "os.rename" and os.path.basename(os.fsdecode(arguments[1])) == name:
                strike()

        sys.addaudithook(watch)
    else:
        raise ValueError(f"unknown point {where!r}")


if __name__ == "__main__":
    for point in sys.argv[2].split("+"):
        interrupt(signal.Signals[sys.argv[1]], point)
    balcap.main(["train", *sys.argv[3:]])
