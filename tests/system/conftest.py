"""One data set and one finished run for all tests of this folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from command_runs import RECIPE, arguments, finish, start_afresh
from filelock import FileLock

from balcap_jax import data
from balcap_jax.config import recipes


class FinishedRun(NamedTuple):
    workdir: Path
    output: str
    errors: str


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled, by whichever of the test processes came first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not (folder / "made").exists():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        recipe = recipes.load(str(RECIPE))
        data.load(recipe.data.to_dict() | {"data_dir": str(folder)}, recipe.model.image_size)

    return made_once(tmp_path_factory, "data", make)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir) -> FinishedRun:
    """An uninterrupted run: started elsewhere, in a relative workdir whose path holds spaces.

    Its process is a user's own, so that the forked ones which must equal it are proved to be like one.
    """
    workdir = Path("my runs") / "the first run"

    def make(folder: Path) -> None:
        done = finish(start_afresh("balcap_jax.train", *arguments(workdir, data_dir), cwd=folder))
        (folder / "output").write_text(done.stdout)
        (folder / "errors").write_text(done.stderr)

    elsewhere = made_once(tmp_path_factory, "some where else", make)
    return FinishedRun(elsewhere / workdir, (elsewhere / "output").read_text(), (elsewhere / "errors").read_text())
