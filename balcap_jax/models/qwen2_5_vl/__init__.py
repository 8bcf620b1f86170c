"""The Qwen2.5-VL family: window-attention vision tower, merger, Qwen2 decoder with M-RoPE. arXiv 2502.13923."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli.errors import UserError
from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import Params, Policy
from balcap_jax.models.prompting import PLAIN_TEMPLATE, has_word, image_word, special_tokens
from balcap_jax.models.qwen2_5_vl import vision
from balcap_jax.models.qwen2_5_vl.processing import CHATML_TEMPLATE, QwenProcessor
from balcap_jax.models.qwen2_5_vl.vision import QwenImages, QwenTower, VisionConfig
from balcap_jax.models.qwen2_5_vl.windows import MERGE


@dataclasses.dataclass(frozen=True)
class Qwen25VL(Policy):
    """A policy of this family.

    `Prompt.images` are `QwenImages`, `Prompt.positions` [B, P, 3]. Every image gives I rows. A prompt holds as many
    placeholders as its image has tokens, and takes that many of the rows.
    """

    vision: VisionConfig

    @property
    def image_tokens(self) -> int:
        """I: the most tokens of an image."""
        return self.vision.max_image_tokens

    def init(self, rng: jax.Array) -> Params:
        tower, merger, language = jax.random.split(rng, 3)
        return {
            "vision": vision.init(self.vision, tower),
            "merger": vision.init_merger(self.vision, self.decoder.width, merger),
            "decoder": decoder.init(self.decoder, language),
        }

    def features(self, params: Params, images: QwenImages) -> jax.Array:
        """-> the vision tower's features [B, I, 4 * width] in raster order, before the merger's layers."""
        x = vision.encode(self.vision, params["vision"], images)
        return vision.merged_features(self.vision, params["merger"], images, x)

    @jax.named_scope("encode")
    def encode(self, params: Params, images: QwenImages) -> jax.Array:
        mlp = {name: params["merger"][name] for name in ("first", "second")}
        merger = vision.merger(self.vision, self.decoder.width)
        return merger.apply({"params": mlp}, self.features(params, images))


def build(
    model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str = ""
) -> tuple[Qwen25VL, QwenProcessor]:
    """Policy and processor of the fields `model` of the config group `model`.

    Without a template the prompt is Qwen's ChatML, or the image and the instruction alone where the tokenizer has no
    chat words.

    Raises:
      UserError: sizes that do not fit together, or a tokenizer without a word for an image token.
    """
    _check(model)
    language = {"qk_norm": False, "mrope_interleaved": False}
    return assemble(Qwen25VL, VisionConfig.of(model), language, model, tokenizer, template, CHATML_TEMPLATE)


def assemble(
    policy: type[Policy],
    tower: QwenTower,
    language: Mapping[str, Any],
    model: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    chat_template: str,
) -> tuple[Policy, QwenProcessor]:
    """The policy of a Qwen family, and its processor.

    Args:
      tower, language: the vision tower, and the fields of the decoder that the family fixes.
      model, tokenizer: as in `build`.
      template: the prompt; empty = `chat_template`, or PLAIN_TEMPLATE for a tokenizer without chat words.
    """
    # Published checkpoints round V up, to 151936 or 152064 for 151665 words; the rows beyond stand for nothing.
    vocab = model.get("vocab") or len(tokenizer)
    word = image_word(tokenizer, "<|image_pad|>", "<image>")
    built = policy(
        vision=tower,
        decoder=DecoderConfig.of(model, vocab=vocab, **language),
        logits_chunk=model["logits_chunk"],
        **special_tokens(tokenizer, model, word, vocab),
    )
    processor = QwenProcessor(
        tokenizer=tokenizer,
        vision=tower,
        prompt_tokens=model["prompt_tokens"],
        min_image_tokens=model["min_image_tokens"],
        wide_images=model["wide_images"],
        image_token=word,
        template=template or (chat_template if has_word(tokenizer, "<|im_start|>") else PLAIN_TEMPLATE),
        end_tokens=built.end_tokens,
    )
    return built, processor


def check_common(model: Mapping[str, Any], family: str) -> None:
    """Raises UserError naming the field that no model of the Qwen families can have."""
    section, least, most = tuple(model["mrope_section"]), model["min_image_tokens"], model["max_image_tokens"]
    if len(section) != 3 or sum(section) * 2 != model["head_size"]:
        half = model["head_size"] // 2
        problem = f"mrope_section is {section}: {family} needs three counts that sum to head_size / 2 = {half}"
    elif model["vision_width"] % (4 * model["vision_heads"]):
        width = model["vision_width"]
        problem = f"vision_width is {width}: it must be a multiple of 4 * vision_heads, for rows and columns"
    elif least > most:
        problem = f"min_image_tokens is {least}: more than max_image_tokens, {most}; lower the one or raise the other"
    else:
        return
    raise UserError(f"config field model.{problem}")


def _check(model: Mapping[str, Any]) -> None:
    """Raises UserError naming the field that no Qwen2.5-VL can have."""
    check_common(model, "qwen2_5_vl")
    window, layers = MERGE * model["patch_size"], model["vision_layers"]
    if model["width"] != model["heads"] * model["head_size"]:  # No file of a checkpoint could say so.
        width, heads = model["width"], model["heads"]
        problem = f"head_size is {model['head_size']}: that of qwen2_5_vl is width / heads, {width} / {heads}"
    elif model["window_size"] < window:
        size = model["window_size"]
        problem = f"window_size is {size} pixels: a merged token, {window} (2 * patch_size), must fit"
    elif beyond := [layer for layer in model["full_attention_layers"] if layer >= layers]:
        problem = f"full_attention_layers names layer {beyond[0]}: there are {layers}, from 0"
    else:
        return
    raise UserError(f"config field model.{problem}")
