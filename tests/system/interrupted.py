"""Runs a training command that meets a signal at a chosen point, so that a test need not hit it by luck.

    python interrupted.py SIGKILL WHERE <arguments of balcap_jax.train>

WHERE is one of
    log:N         step N is computed, its line in metrics.jsonl is not; the checkpoint before it is whole
    rename:NAME   a file or directory is whole under its temporary name and is about to be renamed to NAME
or several of them, joined by +
"""

import os
import signal
import sys

from balcap_jax import train
from balcap_jax.checkpoint import Checkpointer
from balcap_jax.metrics import MetricsWriter


def interrupt(number: signal.Signals, where: str) -> None:
    kind, _, name = where.partition(":")

    def strike() -> None:
        os.kill(os.getpid(), number)

    if kind == "log":
        save, write, writing = Checkpointer.save, MetricsWriter.write, []

        def remember_and_save(self, *arguments, **options):
            writing.append(self)
            save(self, *arguments, **options)

        def strike_and_write(self, step, *arguments):
            if step == int(name):
                for checkpointer in writing:
                    checkpointer.wait()
                strike()
            write(self, step, *arguments)

        Checkpointer.save, MetricsWriter.write = remember_and_save, strike_and_write
    elif kind == "rename":

        def watch(event: str, arguments: tuple) -> None:
            if event == "os.rename" and os.path.basename(os.fsdecode(arguments[1])) == name:
                strike()

        sys.addaudithook(watch)
    else:
        raise ValueError(f"unknown point {where!r}")


if __name__ == "__main__":
    for point in sys.argv[2].split("+"):
        interrupt(signal.Signals[sys.argv[1]], point)
    train.main(sys.argv[3:])
