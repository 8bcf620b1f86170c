"""Recall and language alone: the objectives for a judge that sees no pictures."""

from balcap_jax.rewards.balcap import score_text
from balcap_jax.rewards.base import Reward, Samples, Scores, collect


class TextReward(Reward):
    """K = 2: BalCap without precision, for a judge that is a language model without eyes.

    Nothing punishes invention: a caption that names everything scores. It serves where there is no vision model, and
    is no method.
    """

    names: tuple[str, ...] = ("recall", "linguistic")
    gated: tuple[bool, ...] = (False, True)
    needs: tuple[str, ...] = ("reference_units",)
    asks: tuple[str, ...] = ("recall", "linguistic")

    def __call__(self, samples: Samples) -> Scores:
        """Rewards [B, G, 2]; a detail is that of `BalCapReward` without its assertions."""
        return collect(self, samples, list(zip(*score_text(self.judge, samples), strict=True)), self.judge)
