"""The LLaVA-1.5 family: CLIP vision tower, GELU projector, Llama decoder. Liu et al., arXiv 2310.03744."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava import vision
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.models.policy import VisionLanguagePolicy

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Llava(VisionLanguagePolicy):
    """A policy (see `models.policy.Policy`) of this family; fields as in `VisionLanguagePolicy`."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token: int
    pad_token: int
    end_tokens: tuple[int, ...]
    forbidden: tuple[int, ...] = ()
    logits_chunk: int = 512

    @property
    def image_tokens(self) -> int:
        return self.vision.image_tokens

    def init(self, rng: jax.Array) -> Params:
        tower, projector, language = jax.random.split(rng, 3)
        features = jnp.zeros((1, 1, self.vision.width))
        return {
            "vision": vision.init(self.vision, tower),
            "projector": self._projector.init(projector, features)["params"],
            "decoder": decoder.init(self.decoder, language),
        }

    def features(self, params: Params, images: jax.Array) -> jax.Array:
        return vision.encode(self.vision, params["vision"], images)

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        return self._projector.apply({"params": params["projector"]}, self.features(params, images))

    @property
    def _projector(self) -> vision.Projector:
        return vision.Projector(self.decoder.width, self.decoder.dtype)
