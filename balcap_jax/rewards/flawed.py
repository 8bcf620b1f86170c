"""Deliberate errors of the scores that a judge's verdicts come to, for training alone: `judge.flaws`.

    picture_noise:x   x times a normal number is added, the same to all captions of a picture
    noise:x           x times a normal number is added, another one to each caption
    coarse:n          the nearest of n levels, 0 to 1 in equal steps

What belongs to the picture leaves the differences within a group as they are. Nothing is clipped: at a limit that
would not hold. Errors of single verdicts are in `judges.flawed`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from balcap_jax.judges.draws import normal
from balcap_jax.rewards.base import RewardFn, Samples, Scores
from balcap_jax.rewards.length import LENGTH

OF_SCORES = ("picture_noise", "noise", "coarse")


class Flawed(RewardFn):
    """`reward` with `flaws` {name: amount} of OF_SCORES; a score is the mean of `votes`, with noise of their own.

    The length is counted, and nobody judges it. A draw follows from the run's seed, the vote, the objective, the
    example and, but for the picture's, the caption.
    """

    def __init__(self, reward: RewardFn, flaws: Mapping[str, float], votes: int, seed: int):
        self.reward, self.flaws, self.votes, self.seed = reward, dict(flaws), votes, seed
        self.names, self.gated, self.needs, self.asks = reward.names, reward.gated, reward.needs, reward.asks

    def __call__(self, samples: Samples) -> Scores:
        """Scores of the reward; a detail also holds under "exact" {objective: score} before the errors."""
        scores = self.reward(samples)
        judged = [k for k, name in enumerate(self.names) if name != LENGTH]
        rewards, detail = scores.rewards.copy(), [[dict(entry) for entry in group] for group in scores.detail]
        for b, g in samples.where:
            valid = [k for k in judged if scores.valid[b, g, k]]
            for k in valid:
                about = self.names[k], samples.example_ids[b], samples.captions[b][g]
                rewards[b, g, k] = self._reported(float(scores.rewards[b, g, k]), *about)
            detail[b][g]["exact"] = {self.names[k]: float(scores.rewards[b, g, k]) for k in valid}
        return dataclasses.replace(scores, rewards=rewards, detail=detail)

    def _reported(self, score: float, name: str, example: str, caption: str) -> float:
        votes = []
        for vote in range(self.votes):
            about = (str(self.seed), str(vote), name, example)
            value = score
            if "picture_noise" in self.flaws:
                value += self.flaws["picture_noise"] * normal("picture noise", *about)
            if "noise" in self.flaws:
                value += self.flaws["noise"] * normal("noise", *about, caption)
            if "coarse" in self.flaws:
                steps = self.flaws["coarse"] - 1
                value = np.floor(value * steps + 0.5) / steps
            votes.append(value)
        return sum(votes) / self.votes
