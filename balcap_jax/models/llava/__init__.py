"""The LLaVA-1.5 family: CLIP vision tower, GELU projector, Llama decoder. Liu et al., arXiv 2310.03744."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava import vision
from balcap_jax.models.llava.processing import LlavaProcessor
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.models.policy import Params, Policy, Projector
from balcap_jax.models.prompting import PLAIN_TEMPLATE, image_word, special_tokens


@dataclasses.dataclass(frozen=True)
class Llava(Policy):
    """A policy of this family."""

    vision: VisionConfig

    @property
    def image_tokens(self) -> int:
        """I: tokens of every image."""
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
        """Images uint8 [B, S, S, 3] -> the vision tower's features [B, I, width], before the projector."""
        return vision.encode(self.vision, params["vision"], images)

    @jax.named_scope("encode")
    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        return self._projector.apply({"params": params["projector"]}, self.features(params, images))

    @property
    def _projector(self) -> Projector:
        return Projector(self.decoder.width, self.decoder.width, self.decoder.dtype)


def build(
    model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str = PLAIN_TEMPLATE
) -> tuple[Llava, LlavaProcessor]:
    """Policy and processor of the fields `model` of the config group `model`.

    Raises:
      UserError: a tokenizer without a word for an image token.
    """
    tower = VisionConfig.of(
        model, norm_eps=model.get("vision_norm_eps") or model["norm_eps"], keep_unused=model.get("keep_unused", False)
    )
    # Published checkpoints round V up, to 32064 for LLaVA's 32002 tokens; the rows beyond stand for nothing.
    vocab = model.get("vocab") or len(tokenizer)
    llama = {"qkv_bias": False, "qk_norm": False, "mrope_section": (), "mrope_interleaved": False}
    language = DecoderConfig.of(model, vocab=vocab, **llama)
    special = special_tokens(tokenizer, model, image_word(tokenizer, "<image>"), vocab)
    policy = Llava(vision=tower, decoder=language, logits_chunk=model["logits_chunk"], **special)
    processor = LlavaProcessor(
        tokenizer=tokenizer,
        image_size=tower.image_size,
        image_tokens=tower.image_tokens,
        prompt_tokens=model["prompt_tokens"],
        template=template,
        end_tokens=policy.end_tokens,
    )
    return policy, processor
