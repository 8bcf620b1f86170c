"""What a command says of the machine that it runs on."""

import os
import subprocess
import sys

import pytest

COMPILES = """
import jax, logging
from balcap_jax.training.machine import use_compilation_cache

use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((8, 8))))
print(logging.getLogger("jax").handlers)
"""


@pytest.fixture
def run(tmp_path):
    def run(**settings):
        kept = {name: value for name, value in os.environ.items() if name not in ("TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS")}
        environment = {**kept, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), **settings}
        return subprocess.run(
            [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, timeout=300, check=True
        )

    return run


def test_a_program_from_the_cache_says_nothing(run, tmp_path):
    """On Intel's CPUs with AVX-512 XLA would log two lines of 2 kB a program; elsewhere it has nothing to say."""
    first, second = run(), run()
    assert list((tmp_path / "cache").iterdir())
    for ended in first, second:
        assert ended.stderr == ""
        # Python's loggers are as JAX makes them.
        assert ended.stdout.split() == ["512.0", "[]"]
