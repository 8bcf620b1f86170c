import shutil

import pytest


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A set-up without a fault, which tests leave as it is."""
    from doctor.set_up import sound_in  # It skips the tests where PyTorch is missing.

    with sound_in(tmp_path_factory.mktemp("sound")) as found:
        yield found


@pytest.fixture
def own(sound, tmp_path):
    """A set-up whose data and lines a test may spoil: a copy of the sound one."""
    from doctor.set_up import SetUp

    shutil.copytree(sound.folder / "data", tmp_path / "data")
    shutil.copy(sound.folder / "units.jsonl", tmp_path)
    (tmp_path / "model").symlink_to(sound.folder / "model")
    return SetUp(tmp_path, sound.server)
