import shutil

import pytest


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A set-up without a fault, which tests leave as it is."""
    from doctor.set_up import sound_in  # It skips the tests where PyTorch is missing.

    with sound_in(tmp_path_factory.mktemp("sound")) as found:
        yield found


@pytest.fixture(scope="session")
def seen(sound):
    """`pictures.Seen` of the sound set-up."""
    from balcap_jax.doctor import pictures

    return pictures.look(sound.config(), 96, tokenizer=False)[1]


@pytest.fixture(scope="session")
def built(sound):
    """`checkpoint.Built` of the sound set-up."""
    from balcap_jax.doctor import checkpoint

    return checkpoint.look(sound.config(), None)[1]


@pytest.fixture
def own(sound, tmp_path):
    """A set-up whose data and lines a test may spoil: a copy of the sound one."""
    from doctor.set_up import SetUp

    shutil.copytree(sound.folder / "data", tmp_path / "data")
    shutil.copy(sound.folder / "units.jsonl", tmp_path)
    (tmp_path / "model").symlink_to(sound.folder / "model")
    return SetUp(tmp_path, sound.server)
