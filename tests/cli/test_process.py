"""A program that imports the package keeps its process as it is; a command changes it once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STATE = """
import gc, logging, os, signal, sys, warnings
import absl.logging, grain, httpx2, jax, optax, tensorflow_datasets, transformers
import orbax.checkpoint

def state():
    loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio", "httpx2", "transformers")]
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.unraisablehook, sys.stdout, sys.stderr, sys.stdout.errors),
        "loggers": [(logger.level, list(logger.filters), list(logger.handlers)) for logger in loggers],
        # These are imported late, sympy by torch, and bring filters of their own.
        "warnings": [
            entry for entry in warnings.filters if not any(name in str(entry) for name in ("torch", "scipy", "sympy"))
        ],
        "frozen": gc.get_freeze_count(),
        "environment": dict(os.environ),
        "caught": caught(),
    }

def caught():
    # Python does not see a handler that libc was given: the system counts all of them.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("SigCgt:")]
    return line

before = state()
"""

USE = """
import numpy as np
import balcap_jax.train, balcap_jax.caption, balcap_jax.aot.__main__, balcap_jax.ablate.__main__, balcap_jax.evaluate
import balcap_jax.training.checkpoint, balcap_jax.judges.chat.endpoint
from balcap_jax import models
from balcap_jax.data.scenes import builder
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.config.recipes import default_config
fields = default_config().model.to_dict()
policy, processor = models.build(fields, scenes_tokenizer())
path = models.save(sys.argv[1] + "/model", fields, jax.jit(policy.init)(jax.random.key(0)), processor)
models.load(path)
builder.prepare(sys.argv[1], train=1, validation=1, test=1)
with Checkpointer(sys.argv[1] + "/checkpoints") as checkpointer:
    checkpointer.save(1, {"x": np.ones(3)})
"""


def run(program: str, *arguments: object) -> None:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("use", ["import balcap_jax\n", USE])
def test_importing_and_using_the_package_changes_nothing_in_the_process(tmp_path, use):
    end = "after = state()\nfor name in before: assert after[name] == before[name], (name, before[name], after[name])"
    run(f"{STATE}{use}{end}", tmp_path)


def test_a_command_makes_its_changes_once():
    program = """
from balcap_jax.cli import process
process.exit_on_user_error(lambda: None)()
first = state()
process.exit_on_user_error(lambda: None)()
assert state() == first
changed = {name for name in first if first[name] != before[name]}
assert changed == {"hooks", "loggers", "warnings", "frozen"}, changed
"""
    run(STATE + program)


def test_an_abort_of_native_code_ends_in_a_line():
    program = """
import ctypes
from balcap_jax.cli import process
process.on_abort(lambda: "error: a peer is dead\\n")
ctypes.CDLL(None).abort()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: a peer is dead\n")
