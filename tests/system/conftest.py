"""One data set and one finished run for all tests of this folder."""

from pathlib import Path
from typing import NamedTuple

import pytest
from commands import RECIPE, train

from balcap_jax import config, data


class FinishedRun(NamedTuple):
    workdir: Path
    output: str
    errors: str


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    recipe = config.load(str(RECIPE))
    data.load(recipe.data.to_dict() | {"data_dir": str(folder)}, recipe.model.image_size)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir) -> FinishedRun:
    """An uninterrupted run: started elsewhere, in a relative workdir whose path holds spaces."""
    elsewhere = tmp_path_factory.mktemp("some where else")
    done = train("my runs/the first run", data_dir, cwd=elsewhere)
    return FinishedRun(elsewhere / "my runs" / "the first run", done.stdout, done.stderr)
