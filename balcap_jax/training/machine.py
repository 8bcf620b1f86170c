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

    JAX_COMPILATION_CACHE_DIR, where it is set, takes precedence.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(resolved(data_dir) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


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
