"""Reward functions: captions in, a [B, G, K] array with a validity mask out."""

from collections.abc import Mapping
from typing import Any

from balcap_jax.judges.schema import Judge
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import RewardFn, Samples, Scores, count_words

REWARDS = {"balcap": BalCapReward}


def build(config: Mapping[str, Any], judge: Judge) -> RewardFn:
    """The reward function of the config group `rewards`."""
    return REWARDS[config["name"]](judge)


__all__ = ["RewardFn", "Samples", "Scores", "build", "count_words"]
