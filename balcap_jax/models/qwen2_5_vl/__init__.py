"""The Qwen2.5-VL family. `build` makes the policy and its processor from the config group `model`."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from balcap_jax.cli.errors import UserError
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.prompting import PLAIN_TEMPLATE, end_tokens, forbidden_tokens, has_word, image_word
from balcap_jax.models.qwen2_5_vl.modeling import Qwen25VL
from balcap_jax.models.qwen2_5_vl.processing import CHATML_TEMPLATE, Qwen25VLProcessor
from balcap_jax.models.qwen2_5_vl.vision import VisionConfig
from balcap_jax.models.qwen2_5_vl.windows import MERGE


def build(
    model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str = ""
) -> tuple[Qwen25VL, Qwen25VLProcessor]:
    """Builds policy and processor; `model` holds the fields of the config group `model`.

    Without a template the prompt is Qwen's ChatML, or the image and the instruction alone where the tokenizer has no
    chat words.

    Raises:
      UserError: sizes that do not fit together, or a tokenizer without a word for an image token.
    """
    _check(model)
    tower = VisionConfig(
        patch_size=model["patch_size"],
        width=model["vision_width"],
        layers=model["vision_layers"],
        heads=model["vision_heads"],
        mlp=model["vision_mlp"],
        window_size=model["window_size"],
        full_attention_layers=tuple(model["full_attention_layers"]),
        max_image_tokens=model["max_image_tokens"],
        max_aspect=model["max_aspect"],
        dtype=model["dtype"],
        remat=model["remat"],
    )
    # Published checkpoints round V up, to 151936 or 152064 for 151665 words; the rows beyond stand for nothing.
    vocab = model.get("vocab") or len(tokenizer)
    language = DecoderConfig(
        vocab=vocab,
        width=model["width"],
        layers=model["layers"],
        heads=model["heads"],
        kv_heads=model["kv_heads"],
        head_size=model["head_size"],
        mlp=model["mlp"],
        rope_theta=model["rope_theta"],
        mrope_section=tuple(model["mrope_section"]),
        norm_eps=model["norm_eps"],
        qkv_bias=model["qkv_bias"],
        tied_embeddings=model["tied_embeddings"],
        dtype=model["dtype"],
        remat=model["remat"],
        attention=model["attention"],
    )
    word = image_word(tokenizer, "<|image_pad|>", "<image>")
    image_token, ends = tokenizer.convert_tokens_to_ids(word), end_tokens(tokenizer, model)
    policy = Qwen25VL(
        vision=tower,
        decoder=language,
        image_token=image_token,
        pad_token=tokenizer.pad_token_id,
        end_tokens=ends,
        forbidden=forbidden_tokens(tokenizer, image_token, vocab, ends),
        logits_chunk=model["logits_chunk"],
    )
    processor = Qwen25VLProcessor(
        tokenizer=tokenizer,
        vision=tower,
        prompt_tokens=model["prompt_tokens"],
        min_image_tokens=model["min_image_tokens"],
        wide_images=model["wide_images"],
        image_token=word,
        template=template or (CHATML_TEMPLATE if has_word(tokenizer, "<|im_start|>") else PLAIN_TEMPLATE),
        end_tokens=ends,
    )
    return policy, processor


def _check(model: Mapping[str, Any]) -> None:
    """Raises UserError naming the field that no Qwen2.5-VL can have."""
    section, window = tuple(model["mrope_section"]), MERGE * model["patch_size"]
    beyond = [layer for layer in model["full_attention_layers"] if layer >= model["vision_layers"]]
    rules = (
        (
            len(section) == 3 and sum(section) * 2 == model["head_size"],
            f"mrope_section is {section}: qwen2_5_vl needs three counts that sum to head_size / 2 = "
            f"{model['head_size'] // 2}",
        ),
        (
            model["vision_width"] % (4 * model["vision_heads"]) == 0,
            f"vision_width is {model['vision_width']}: it must be a multiple of 4 * vision_heads, for rows and columns",
        ),
        (
            model["window_size"] >= window,
            f"window_size is {model['window_size']} pixels: a merged token, {window} (2 * patch_size), must fit",
        ),
        (
            not beyond,
            f"full_attention_layers names layer {beyond and beyond[0]}: there are {model['vision_layers']}, from 0",
        ),
        (
            model["min_image_tokens"] <= model["max_image_tokens"],
            f"min_image_tokens is {model['min_image_tokens']}: more than max_image_tokens, {model['max_image_tokens']}",
        ),
    )
    for holds, complaint in rules:
        if not holds:
            raise UserError(f"config field model.{complaint}")
