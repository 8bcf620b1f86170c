"""The decoder alone as a policy: text models, for judging, for checks against real weights and for benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import VisionLanguagePolicy

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TextPolicy(VisionLanguagePolicy):
    """A policy without a tower; `Prompt.images` is `no_images(B)`."""

    decoder: DecoderConfig
    pad_token: int
    end_tokens: tuple[int, ...]
    forbidden: tuple[int, ...] = ()
    logits_chunk: int = 512
    image_token: int = -1  # no token has this id

    @staticmethod
    def no_images(batch: int) -> np.ndarray:
        """[B, 0] uint8."""
        return np.zeros((batch, 0), np.uint8)

    def init(self, rng: jax.Array) -> Params:
        return {"decoder": decoder.init(self.decoder, rng)}

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """[B, 0] -> [B, 1, D] of zeros, which no token asks for."""
        return jnp.zeros((images.shape[0], 1, self.decoder.width), jnp.dtype(self.decoder.dtype))
