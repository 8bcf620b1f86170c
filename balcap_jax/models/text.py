"""The decoder alone as a policy: text models, for judging, for checks against real weights and for benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models import decoder
from balcap_jax.models.policy import Params, VisionLanguagePolicy


@dataclasses.dataclass(frozen=True)
class TextPolicy(VisionLanguagePolicy):
    """A policy without a tower; `Prompt.images` is `no_images(B)`."""

    vision: None = dataclasses.field(default=None, kw_only=True)
    image_token: int = dataclasses.field(default=-1, kw_only=True)  # No token has this id.

    @staticmethod
    def no_images(batch: int) -> np.ndarray:
        """[B, 0] uint8."""
        return np.zeros((batch, 0), np.uint8)

    def init(self, rng: jax.Array) -> Params:
        return {"decoder": decoder.init(self.decoder, rng)}

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """[B, 0] -> [B, 1, D] of zeros, which no token takes."""
        return jnp.zeros((images.shape[0], 1, self.decoder.width), jnp.dtype(self.decoder.dtype))
