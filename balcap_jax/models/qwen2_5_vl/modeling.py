"""The Qwen2.5-VL family: window-attention vision tower, merger, Qwen2 decoder with M-RoPE. arXiv 2502.13923."""

import dataclasses
from typing import Any

import jax

from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import VisionLanguagePolicy
from balcap_jax.models.qwen2_5_vl import vision
from balcap_jax.models.qwen2_5_vl.vision import QwenImages, VisionConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Qwen25VL(VisionLanguagePolicy):
    """A policy (see `models.policy.Policy`) of this family; fields as in `VisionLanguagePolicy`.

    `Prompt.images` are `QwenImages`, `Prompt.positions` [B, P, 3]. Every image gives I rows; a prompt holds as many
    placeholders as its image has tokens, and takes that many of them.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    image_token: int
    pad_token: int
    end_tokens: tuple[int, ...]
    forbidden: tuple[int, ...] = ()
    logits_chunk: int = 512

    @property
    def image_tokens(self) -> int:
        return self.vision.max_image_tokens

    def init(self, rng: jax.Array) -> Params:
        tower, merger, language = jax.random.split(rng, 3)
        return {
            "vision": vision.init(self.vision, tower),
            "merger": vision.init_merger(self.vision, self.decoder.width, merger),
            "decoder": decoder.init(self.decoder, language),
        }

    def features(self, params: Params, images: QwenImages) -> jax.Array:
        x = vision.encode(self.vision, params["vision"], images)
        return vision.merged_features(self.vision, params["merger"], images, x)

    def encode(self, params: Params, images: QwenImages) -> jax.Array:
        mlp = {name: params["merger"][name] for name in ("first", "second")}
        merger = vision.Merger(self.decoder.width, self.vision.dtype)
        return merger.apply({"params": mlp}, self.features(params, images))
