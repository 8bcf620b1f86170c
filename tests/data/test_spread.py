"""Work that several processes share: its order, its errors, and the end of the processes."""

import math
import os
import pathlib
import subprocess
import sys
import time

import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.data import spread
from balcap_jax.data.scenes import builder

ROOT = pathlib.Path(spread.__file__).parents[2]


def test_results_come_in_order_from_as_many_processes_as_asked_for():
    results = list(spread.spread(divmod, [(i, 7) for i in range(50)], 3))
    assert results == [divmod(i, 7) for i in range(50)]
    pids = list(spread.spread(os.getpid, [()] * 9, 3))
    assert pids[:3] * 3 == pids
    assert len({os.getpid(), *pids}) == 4


def test_what_the_function_prints_is_no_result(capfd):
    assert list(spread.spread(print, [("said",)] * 2, 2)) == [None, None]
    assert capfd.readouterr() == ("", "said\nsaid\n")


def test_an_error_there_is_one_here(capfd):
    results = spread.spread(math.sqrt, [(4.0,), (-1.0,), (9.0,)], 2)
    assert next(results) == 2.0
    with pytest.raises(UserError, match="ended with 1, without its result"):
        next(results)
    assert "ValueError" in capfd.readouterr().err


def test_examples_of_a_data_set_are_the_same():
    arguments = [("train", index, builder.ScenesSettings()) for index in range(5)]
    for one, other in zip(spread.spread(builder.make_example, arguments, 2), arguments, strict=True):
        expected = builder.make_example(*other)
        assert one.pop("image").getvalue() == expected.pop("image").getvalue()
        assert one == expected


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "results.close()"])
def test_the_processes_end_with_the_one_that_started_them(ending):
    """They are in the middle of their work: nothing reads on."""
    code = f"""
import os
from balcap_jax.data.spread import spread
results = spread(os.getpid, [()] * 1_000_000, 2)
print(next(results), next(results), flush=True)
{ending}
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, timeout=60)
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(map(_runs, pids)):
        assert time.monotonic() < deadline, "a process goes on"
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
