"""Records of judged captions: what the host computes for them equals what the compiled step uses."""

import numpy as np
import pytest

from balcap_jax.advantages import length_gate
from balcap_jax.training.job import in_band


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.7, 1.3), (0.0, 1.0), (1 / 3, 2 / 3)])
def test_length_band_on_the_host_is_the_gate_of_the_train_step(low, high):
    reference = np.arange(121)
    words = np.tile(np.arange(260), (len(reference), 1))
    inside = in_band(words, reference, low, high)
    np.testing.assert_array_equal(inside, np.asarray(length_gate(words, reference, low, high)) > 0)
    assert not inside[0].any()
    assert inside[30, 21] == (low <= 0.7 <= high)
