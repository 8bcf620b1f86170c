import pytest


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A set-up without a fault, which tests leave as it is."""
    from doctor.set_up import sound_in  # It skips the tests where PyTorch is missing.

    with sound_in(tmp_path_factory.mktemp("sound")) as found:
        yield found
