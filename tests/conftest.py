"""Every test runs on the CPU, in float32, without a network, and sees the same 8 devices wherever it runs."""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

# Tests that start commands of their own pass the environment on, so what must hold for them too is set here, and
# before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Most of the time of these tests is compilation of programs that then run for milliseconds: machine code that is less
# optimised is made in two thirds of it, XLA's older emitter of fused loops takes half of what the newer one does, and a
# program that is not cut into parts for several threads is compiled by a quarter less work. XLA's own passes over a
# program stay as users have them. A flag that a jaxlib does not know ends the process: those of jax 0.12 have the newer
# emitter alone.
_flags = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([*_flags, os.environ.get("XLA_FLAGS", "")]).strip()

# A shell's background job starts with SIGINT ignored, and commands inherit that: the tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One compilation cache for this run of the tests, commands that they start included, and never one of an earlier run:
# a resumed training run would otherwise compile again what the interrupted one had compiled.
_own_cache = None
if "BALCAP_TEST_CACHE" not in os.environ:
    # Tests that were killed leave theirs behind: its name says whose it is.
    for left in Path(tempfile.gettempdir()).glob("balcap-test-cache-*-*"):
        owner = left.name.split("-")[3]
        if owner.isdecimal() and not Path("/proc", owner).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    _own_cache = tempfile.mkdtemp(prefix=f"balcap-test-cache-{os.getpid()}-")
    os.environ["BALCAP_TEST_CACHE"] = _own_cache
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["BALCAP_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


import jax  # noqa: E402
import output_keys  # noqa: E402
import pytest  # noqa: E402

# Through jax's own setting and not XLA_FLAGS: commands that the tests start see one device, as on a user's machine.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def server():
    """The emulator of Google Cloud Storage with the bucket "bucket"; a file with another server has its own."""
    from fake_bucket import serving  # Here: it imports what few files need.

    with serving() as found:
        yield found


def pytest_terminal_summary(terminalreporter):
    """Says above pytest's closing line what launch/test.sh knows besides: the whole time, and what ruff found."""
    if os.environ.get("LAUNCH_TEST_LINT", "0") != "0":
        terminalreporter.write_line("ruff: findings, listed above the tests; the whole fails", red=True)
    if started := os.environ.get("LAUNCH_TEST_STARTED"):
        seconds = int(time.time() - float(started))
        terminalreporter.write_line(f"launch/test.sh: {seconds} s in all, installation and ruff included")


def pytest_collection_modifyitems(items):
    """Files of one or two minutes come first: at the end they would leave the other processes waiting."""
    first = [Path(__file__).parent / name for name in ("notebooks", "system", "aot")]
    items.sort(key=lambda item: [not item.path.is_relative_to(path) for path in first])


def pytest_collection_finish():
    """What runs write is looked at from here on. What the imports made lives as long as the process: collections of
    garbage need not walk it each time."""
    output_keys.watch()
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)
