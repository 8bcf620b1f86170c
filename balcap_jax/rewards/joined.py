"""Two rewards on the same captions, as one with the objectives of both."""

import numpy as np

from balcap_jax.rewards.base import RewardFn, Samples, Scores


class Joined:
    """The objectives of `first`, and those of `second` that it lacks."""

    def __init__(self, first: RewardFn, second: RewardFn):
        self.first, self.second = first, second
        self._columns = [k for k, name in enumerate(second.names) if name not in first.names]
        self.names = first.names + tuple(second.names[k] for k in self._columns)
        self.gated = first.gated + tuple(second.gated[k] for k in self._columns)
        self.needs = tuple(dict.fromkeys(first.needs + second.needs))
        self.asks = tuple(dict.fromkeys(first.asks + second.asks))

    def __call__(self, samples: Samples) -> Scores:
        first, second = self.first(samples), self.second(samples)
        detail = [
            [
                b | a | {"failures": dict(b.get("failures", {})) | dict(a.get("failures", {}))}
                for a, b in zip(group, more, strict=True)
            ]
            for group, more in zip(first.detail, second.detail, strict=True)
        ]
        return Scores(
            np.concatenate([first.rewards, second.rewards[..., self._columns]], -1),
            np.concatenate([first.valid, second.valid[..., self._columns]], -1),
            detail,
        )
