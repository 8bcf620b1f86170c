"""The method and its sampling pass the type checker, strictly; pyproject.toml names the files."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import balcap_jax

ROOT = Path(__file__).parents[1]
PACKAGE = Path(balcap_jax.__file__).parent


@pytest.mark.skipif(not (ROOT / "balcap_jax").is_dir(), reason="types are checked in the repository, not in a wheel")
def test_mypy_has_no_finding():
    pytest.importorskip("mypy", reason="the extra dev brings mypy to the oldest Python alone")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"]
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout == f"Success: no issues found in {len(settings['files'])} source files\n", (
        done.stdout + done.stderr
    )
    assert done.returncode == 0


def test_nothing_is_exempt_from_it():
    """The files of the method are all there, and no comment in them silences the checker."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    names = {"advantages.py", "losses.py", "train_step.py", "rollout.py", "models/policy.py", "rewards/base.py"}
    assert {name.removeprefix("balcap_jax/") for name in settings["files"]} >= names
    for name in settings["files"]:
        text = (PACKAGE.parent / name).read_text()
        assert "type: ignore" not in text, name
        assert "no_type_check" not in text, name
