"""Limits under which JAX would hang: one line at the start, before the imports that are too much themselves."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from balcap_jax.cli.process import memory_problem

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")


@pytest.mark.parametrize(
    ("command", "option", "limit"),
    [
        *(("train", "-v", limit) for limit in (300_000, 1_200_000, 1_500_000, 1_800_000, 2_500_000)),
        *(("train", "-d", 900_000), ("caption", "-v", 1_900_000), ("convert", "-v", 900_000)),
    ],
)
def test_a_low_limit_is_one_line(command, option, limit):
    shell = f"ulimit {option} {limit} && exec {sys.executable} -m balcap_jax.{command} --anything"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: this process is limited to {limit * 1024 / 1e9:.2f} GB of ")
    assert f"(ulimit {option}), and {command} takes at least " in line


def test_limits_that_are_enough(monkeypatch):
    for command in ("report", "compare", "evaluate", "config"):  # They run no model.
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**9, 10**9))
        assert memory_problem(command) is None
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**12, 10**12))
    assert memory_problem("train") is None
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory_problem("train") is None
