"""Leaves questions to the judge out at random, for a judge that one can pay: `judge.ask`."""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np

from balcap_jax.judges.cost import asked_of
from balcap_jax.rewards.base import RewardFn, Samples, Scores


class Sparing(RewardFn):
    """`reward`, whose judge is asked about a share of the captions of each group; the other scores are missing.

    shares: {method of the judge: share in (0, 1]}. The choice depends on the run's seed, the example and the method
    alone: a resumed run asks the same, over however many processes. The samples of a group are drawn alike, so that
    which of them are asked about does not bias what is learnt.
    """

    def __init__(self, reward: RewardFn, shares: Mapping[str, float], seed: int):
        self.reward, self.shares, self.seed = reward, dict(shares), seed
        self.names, self.gated, self.needs, self.asks = reward.names, reward.gated, reward.needs, reward.asks

    def __call__(self, samples: Samples) -> Scores:
        _, group = samples.shape
        left_out = {
            method: np.stack([left_out_of(self.seed, name, method, group, share) for name in samples.example_ids])
            for method, share in self.shares.items()
        }
        return self.reward(dataclasses.replace(samples, left_out=left_out))


def left_out_of(seed: int, example_id: str, method: str, group: int, share: float) -> np.ndarray:
    """[G] bool: which captions of an example's group `method` is not asked about."""
    digest = hashlib.blake2b("\x1f".join((str(seed), method, example_id)).encode(errors="replace"), digest_size=16)
    order = np.random.default_rng(int.from_bytes(digest.digest(), "big")).permutation(group)
    left_out = np.zeros(group, bool)
    left_out[order[asked_of(group, share) :]] = True
    return left_out
