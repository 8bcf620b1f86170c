"""Commands in processes that are forked from one that has imported what a training command imports.

Importing takes a quarter of a small run's time, and the tests start some fifty of them. All else of a process of its
own is there: environment, working directory, signals, exit functions, and nothing that another command has computed.
What happens while modules are imported is not seen here: each of these commands is also started by an interpreter of
its own (`commands.start_afresh`). What is read at import, such as JAX_*, is as it was in the tests' process, but for
JAX_NUM_CPU_DEVICES.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

DEVICES = "JAX_NUM_CPU_DEVICES"
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["balcap_jax.train"])


class Forked:
    """What the tests use of `subprocess.Popen`, for `python -m MODULE ...` or `python FILE.py ...`.

    The output is text and is there once the process has ended.
    """

    def __init__(self, args: list[str], cwd: Path, env: Mapping[str, str]):
        self.args = args
        self._output = tempfile.TemporaryDirectory(prefix="balcap-test-output-")
        self._process = _forks.Process(target=_run, args=(args, str(cwd), dict(env), self._output.name), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end and returns (stdout, stderr).

        Raises:
          subprocess.TimeoutExpired: it has not ended in `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        texts = tuple(Path(self._output.name, name).read_text() for name in ("stdout", "stderr"))
        self._output.cleanup()
        return texts


def _run(args: list[str], cwd: str, env: dict[str, str], output: str) -> None:
    """In the forked process: what the interpreter does with its command line, up to its end."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(output) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if DEVICES in env:
        jax.config.update("jax_num_cpu_devices", int(env[DEVICES]))
    np.random.seed()  # Nothing may hang on it; with one state for all, no comparison of runs would find out.
    try:
        if args[0] == "-m":
            sys.argv = args[1:]
            sys.path[0] = cwd
            sys.modules.pop(args[1], None)  # It runs as __main__, with its own state.
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = args
            sys.path[0] = str(Path(args[0]).parent)
            runpy.run_path(args[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()  # Without this a process of multiprocessing ends without them.
