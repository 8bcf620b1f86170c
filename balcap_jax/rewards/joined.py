"""Two rewards on the same captions, as one with the objectives of both."""

import numpy as np

from balcap_jax.rewards.base import RewardFn, Samples, Scores


class Joined:
    """The objectives of `first`, and those of `second` that it lacks."""

    def __init__(self, first: RewardFn, second: RewardFn):
        self.first, self.second = first, second
        self._kept = [k for k, name in enumerate(second.names) if name not in first.names]
        self.names = first.names + tuple(second.names[k] for k in self._kept)
        self.gated = first.gated + tuple(second.gated[k] for k in self._kept)
        self.needs = tuple(dict.fromkeys(first.needs + second.needs))
        self.asks = tuple(dict.fromkeys(first.asks + second.asks))

    def __call__(self, samples: Samples) -> Scores:
        one, other = self.first(samples), self.second(samples)
        detail = [
            [
                b | a | {"failures": dict(b.get("failures", {})) | dict(a.get("failures", {}))}
                for a, b in zip(group, more, strict=True)
            ]
            for group, more in zip(one.detail, other.detail, strict=True)
        ]
        return Scores(
            np.concatenate([one.rewards, other.rewards[..., self._kept]], -1),
            np.concatenate([one.valid, other.valid[..., self._kept]], -1),
            detail,
        )
