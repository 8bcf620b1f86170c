"""Computes the items of a long list in several Python processes, and hands them on in the order of the list."""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from balcap_jax.cli.errors import UserError


def processors() -> int:
    """How many processors this process may use."""
    # Fewer than the machine has, in a container or under `taskset`; not every system can tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(function: Callable[..., Any], arguments: Sequence[tuple], processes: int) -> Iterator[Any]:
    """Yields `function(*arguments[i])` for each i in order, from as many processes beside this one.

    `function` is one of the top level of a module, and what it takes and returns can be pickled. The processes end with
    the iterator, and when this process is killed.

    Raises:
      UserError: a process ended early; its own error is on stderr.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", f"from {__name__} import work; work()"]
    with contextlib.ExitStack() as stack:
        workers = []
        for first in range(processes):
            # In a session of its own: an interrupt at the terminal is for this process, which then ends the others.
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
            stack.enter_context(worker)
            stack.callback(worker.kill)
            try:
                with worker.stdin:
                    pickle.dump((function, arguments[first::processes]), worker.stdin)
            except BrokenPipeError:
                raise _ended(worker) from None
            workers.append(worker)
        for index in range(len(arguments)):
            worker = workers[index % processes]
            try:
                result = pickle.load(worker.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise _ended(worker) from None
            yield result


def _ended(worker: subprocess.Popen) -> UserError:
    return UserError(
        f"a process that makes the data ended with {worker.wait()}, without its result (its reason is above, or it was "
        "killed); free memory, and run the same command again"
    )


def work() -> None:
    """The life of such a process: reads the function and its arguments from stdin, writes results to stdout."""
    results = sys.stdout.buffer
    sys.stdout = sys.stderr  # What the function prints is no result.
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        for each in arguments:
            pickle.dump(function(*each), results)
            results.flush()
    except BrokenPipeError:
        os._exit(0)  # Nobody reads any more; in good order, Python would try to write what is left.
