"""Runs a training command that waits before it logs a step, so that a test need not hit the step by luck.

    python held.py STEP FILE <arguments of balcap_jax.train>

It waits as long as FILE exists, and makes FILE.reached when it begins to.
"""

import sys
import time
from pathlib import Path

from balcap_jax import train
from balcap_jax.training.logging import MetricsWriter


def hold(step: int, file: Path) -> None:
    write = MetricsWriter.write

    def wait_and_write(self, at: int, *arguments) -> None:
        if at == step and file.exists():
            file.with_name(f"{file.name}.reached").touch()
            while file.exists():
                time.sleep(0.02)
        write(self, at, *arguments)

    MetricsWriter.write = wait_and_write


if __name__ == "__main__":
    hold(int(sys.argv[1]), Path(sys.argv[2]))
    train.main(sys.argv[3:])
