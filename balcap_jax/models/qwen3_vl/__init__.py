"""The Qwen3-VL family (dense): vision tower with DeepStack, mergers, Qwen3 decoder with interleaved M-RoPE."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli.errors import UserError
from balcap_jax.models import decoder, qwen2_5_vl
from balcap_jax.models.policy import Params, Policy
from balcap_jax.models.qwen2_5_vl.processing import QwenProcessor
from balcap_jax.models.qwen2_5_vl.vision import QwenImages, merger
from balcap_jax.models.qwen3_vl import vision
from balcap_jax.models.qwen3_vl.vision import VisionConfig

# The output of Qwen3-VL's chat template for one user message of an image and a text; there is no system sentence.
CHATML_TEMPLATE = "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"


@dataclasses.dataclass(frozen=True)
class Qwen3VL(Policy):
    """A policy of this family; `Prompt` is as in Qwen2.5-VL.

    Image embeddings are [B, I, (1 + n) D]: behind the merger's lies what the first n decoder layers add to them.
    """

    vision: VisionConfig

    @property
    def image_tokens(self) -> int:
        """I: the most tokens of an image."""
        return self.vision.max_image_tokens

    def init(self, rng: jax.Array) -> Params:
        tower, mergers, language = jax.random.split(rng, 3)
        merge, deepstack = vision.init_mergers(self.vision, self.decoder.width, mergers)
        return {
            "vision": vision.init(self.vision, tower),
            "merger": merge,
            "deepstack": deepstack,
            "decoder": decoder.init(self.decoder, language),
        }

    def features(self, params: Params, images: QwenImages) -> jax.Array:
        """-> the vision tower's features [B, I, 4 * width] in raster order, before the merger's layers."""
        x, _ = vision.encode(self.vision, params["vision"], images)
        return vision.features(self.vision, params["merger"], images, x)

    @jax.named_scope("encode")
    def encode(self, params: Params, images: QwenImages) -> jax.Array:
        width = self.decoder.width
        x, taken = vision.encode(self.vision, params["vision"], images)
        mlp = {name: params["merger"][name] for name in ("first", "second")}
        features = vision.features(self.vision, params["merger"], images, x)
        embeds = merger(self.vision, width).apply({"params": mlp}, features)
        gains = vision.deepstack(self.vision, params["deepstack"], width, images, taken)
        return jnp.concatenate([embeds, *gains], axis=-1)


def build(
    model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str = ""
) -> tuple[Policy, QwenProcessor]:
    """Policy and processor of the fields `model` of the config group `model`; `template` as in Qwen2.5-VL.

    Raises:
      UserError: sizes that do not fit together, or a tokenizer without a word for an image token.
    """
    _check(model)
    language = {"qk_norm": True, "mrope_interleaved": True, "qkv_bias": False}
    return qwen2_5_vl.assemble(Qwen3VL, VisionConfig.of(model), language, model, tokenizer, template, CHATML_TEMPLATE)


def _check(model: Mapping[str, Any]) -> None:
    """Raises UserError naming the field that no Qwen3-VL can have."""
    qwen2_5_vl.check_common(model, "qwen3_vl")
    taken, layers = tuple(model["deepstack_layers"]), model["vision_layers"]
    if not taken or taken != tuple(sorted(set(taken))) or taken[-1] >= layers:
        problem = (
            f"deepstack_layers is {taken}: qwen3_vl needs vision layers in ascending order, from 0 to {layers - 1}"
        )
    elif len(taken) > model["layers"]:
        problem = f"deepstack_layers names {len(taken)} layers: more than the decoder has, {model['layers']}"
    elif math.isqrt(model["vision_positions"]) ** 2 != model["vision_positions"] or model["vision_positions"] < 4:
        problem = f"vision_positions is {model['vision_positions']}: it must be a square number from 4 on"
    else:
        return
    raise UserError(f"config field model.{problem}")
