# The first cell of every notebook. notebooks/README.md says how PACKAGE is set for all of them at once.
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings
from glob import glob
from pathlib import Path

# A Git address, a wheel (URL or path), or "" for the package index; the environment variable takes precedence.
PACKAGE = "git+https://github.com/your-account/balcap_jax"
PACKAGE = os.environ.get("BALCAP_JAX_PACKAGE", PACKAGE)


class Stop(Exception):
    """Ends a cell, and what runs after it, with one line in place of a traceback."""

    def _render_traceback_(self):
        return [str(self)]


def accelerator():
    """The extra for what this machine has: "cuda", "tpu", or "", also where JAX_PLATFORMS is "cpu"."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return ""
    if glob("/dev/nvidia[0-9]*") or Path("/dev/dxg").exists():
        return "cuda"
    return "tpu" if "TPU_ACCELERATOR_TYPE" in os.environ or glob("/dev/accel*") or glob("/dev/vfio/[0-9]*") else ""


def lacking(extra):
    """What is to be installed still: asked anew each time, so that a failed installation is no obstacle."""
    importlib.invalidate_caches()
    plugins = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}.get(extra, ("jax",))
    wanted = [("balcap_jax",), ("jax",), ("matplotlib",), plugins]
    return [names[0] for names in wanted if not any(importlib.util.find_spec(name) for name in names)]


def versions():
    return {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}


extra = accelerator()
stale = globals().get("stale", set())  # of an earlier try in this session
if lacking(extra):
    address = Path(PACKAGE).resolve().as_uri() if PACKAGE and Path(PACKAGE).exists() else PACKAGE
    requirement = "balcap-jax" + (f"[{extra}]" if extra else "") + (f" @ {address}" if address else "")
    print(f"Installing {requirement} takes minutes.", flush=True)
    before = versions()
    command = [sys.executable, "-m", "pip", "install", "-q", requirement, "matplotlib"]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode or lacking(extra):
        print((pip.stdout + pip.stderr)[-2000:])
        raise Stop(f"pip could not install {requirement}: see above, and run this cell again.")
    changed = {name for name, version in versions().items() if before.get(name, version) != version}
    # A module that this session has loaded stays as it was, beside new ones that expect the other version.
    for module, names in importlib.metadata.packages_distributions().items():
        if getattr(sys.modules.get(module), "__file__", None):
            stale |= changed.intersection(names)
if stale:
    raise Stop(f"Restart the session and run all cells again: it still holds the old {', '.join(sorted(stale))}.")

warnings.filterwarnings("ignore", message="IProgress not found")  # plain progress lines will do

import jax  # noqa: E402

import balcap_jax  # noqa: E402

print(f"balcap_jax {balcap_jax.__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}")
print(jax.devices())
if extra and jax.default_backend() == "cpu":
    raise Stop(f"jax does not see the device for [{extra}]: restart the session and run this cell again.")
