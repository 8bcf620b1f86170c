"""`rewards.scales`: a judge with marks of another range moves GRPO, and c-GDPO by no more than epsilon does."""

import numpy as np
import pytest

from balcap_jax import advantages, rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes

EPS = 1e-4
RNG = np.random.default_rng(11)
REWARDS = RNG.random((16, 8, 3)).astype(np.float32) * np.float32([0.5, 0.7, 0.3])


def combined(scores: np.ndarray, estimator: str) -> np.ndarray:
    """[B, G]."""
    options = {"weights": [1.0, 1.0, 1.0], "estimator": estimator, "eps_group": EPS, "eps_batch": EPS}
    return np.asarray(advantages.compute(scores, **options).combined)


def c_gdpo_by_hand(scores: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """c-GDPO in float64 with an epsilon of its own [K] for each objective."""
    scores = scores.astype(np.float64)
    z = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + eps)
    total = z.sum(-1)
    return total / (total.std(ddof=1) + EPS)


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("k", range(3))
def test_a_scale_is_another_epsilon_to_c_gdpo_and_another_weight_to_grpo(scale, k):
    factors = np.where(np.arange(3) == k, np.float32(scale), np.float32(1))
    ours = combined(REWARDS * factors, "c_gdpo")
    np.testing.assert_allclose(ours, c_gdpo_by_hand(REWARDS, EPS / factors), atol=2e-5)
    # Epsilon is a hundredth of the least standard deviation that is scaled by 0.1; advantages are up to 3.
    np.testing.assert_allclose(ours, combined(REWARDS, "c_gdpo"), atol=0.04)
    assert np.abs(combined(REWARDS * factors, "grpo") - combined(REWARDS, "grpo")).mean() > 0.15


def test_a_recipe_needs_a_scale_for_each_objective_or_none():
    def check(**fields):
        rewards.check_settings(recipes.load("configs/scenes.py", {f"rewards.{n}": text for n, text in fields.items()}))

    check()
    check(scales="1,1,0.1")
    check(scales="1,1,0.1,2", length="two_sided", weights="1,1,1,1")
    with pytest.raises(UserError, match=r"'rewards.scales' needs 3 numbers for balcap .*, or none, got \(1.0, 0.1\)"):
        check(scales="1,0.1")
    with pytest.raises(UserError, match=r"'rewards.scales' must be in \[0.001, 1000\], got \(1.0, 1.0, 0.0\)"):
        check(scales="1,1,0")
