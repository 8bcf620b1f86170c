"""What a command runs on: devices, versions, and where compiled programs are kept."""

import contextlib
import importlib.metadata
import os
import platform

import jax

from balcap_jax.cli.files import resolved

PACKAGES = ("balcap-jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets", "grain")


def use_compilation_cache(data_dir: str | os.PathLike = "~/.cache/balcap_jax") -> None:
    """Keeps compiled programs below `data_dir`, so that a resumed or repeated command starts at once.

    JAX_COMPILATION_CACHE_DIR, where it is set, takes precedence. It is called once the processes know each other:
    it asks JAX for its devices.
    """
    _hush_false_alarms()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(resolved(data_dir) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _hush_false_alarms() -> None:
    """Keeps XLA's C++ errors off the terminal, where one process runs on its CPU and TF_CPP_MIN_LOG_LEVEL is unset.

    On Intel's CPUs with AVX-512 each program from the cache logs two lines of 2 kB: a preference of LLVM's would be
    missing from the machine (openxla/xla issue 44565). The program is right. Real errors arrive as exceptions.
    """
    # JAX itself sets it to 1 where the user has not.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "1" or jax.default_backend() != "cpu" or jax.process_count() > 1:
        return
    level = jax.config.jax_logging_level
    jax.config.update("jax_logging_level", "CRITICAL")
    # Python's loggers are as they were, and C++'s too where the user has set a level of their own.
    jax.config.update("jax_logging_level", level)


def versions() -> dict[str, str]:
    """{package: version} of Python and of those of PACKAGES that are installed."""
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[package] = importlib.metadata.version(package)
    return result


def device_text() -> str:
    kinds = sorted({device.device_kind for device in jax.devices()})
    return f"{jax.device_count()} x {', '.join(kinds)}, {os.cpu_count()} host cores"
