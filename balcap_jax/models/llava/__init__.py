"""The LLaVA-1.5 family. `build` makes the policy and its processor from the config group `model`."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava.modeling import Llava
from balcap_jax.models.llava.processing import LlavaProcessor
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.models.prompting import PLAIN_TEMPLATE, end_tokens, forbidden_tokens, image_word


def build(
    model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str = PLAIN_TEMPLATE
) -> tuple[Llava, LlavaProcessor]:
    """Builds policy and processor; `model` holds the fields of the config group `model`.

    Raises:
      UserError: a tokenizer without a word for an image token.
    """
    tower = VisionConfig(
        image_size=model["image_size"],
        patch_size=model["patch_size"],
        width=model["vision_width"],
        layers=model["vision_layers"],
        heads=model["vision_heads"],
        mlp=model["vision_mlp"],
        feature_layer=model["feature_layer"],
        norm_eps=model.get("vision_norm_eps") or model["norm_eps"],
        dtype=model["dtype"],
        keep_unused=model.get("keep_unused", False),
        remat=model["remat"],
    )
    # Published checkpoints round V up, to 32064 for LLaVA's 32002 tokens; the rows beyond stand for nothing.
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
        norm_eps=model["norm_eps"],
        tied_embeddings=model["tied_embeddings"],
        dtype=model["dtype"],
        remat=model["remat"],
        attention=model["attention"],
    )
    image_token = tokenizer.convert_tokens_to_ids(image_word(tokenizer, "<image>"))
    ends = end_tokens(tokenizer, model)
    policy = Llava(
        vision=tower,
        decoder=language,
        image_token=image_token,
        pad_token=tokenizer.pad_token_id,
        end_tokens=ends,
        forbidden=forbidden_tokens(tokenizer, image_token, vocab, ends),
        logits_chunk=model["logits_chunk"],
    )
    processor = LlavaProcessor(
        tokenizer=tokenizer,
        image_size=tower.image_size,
        image_tokens=tower.image_tokens,
        prompt_tokens=model["prompt_tokens"],
        template=template,
        end_tokens=ends,
    )
    return policy, processor
