"""LLaVA-1.5 between Hugging Face checkpoints (`LlavaForConditionalGeneration`) and our parameters; see `formats.hf`."""

import math
from collections.abc import Mapping
from typing import Any

from balcap_jax.models.formats import hf_config
from balcap_jax.models.formats.hf import MATRIX, VECTOR, Row, decoder_rows, dense, layer_norm, patches
from balcap_jax.models.llava.processing import VICUNA_TEMPLATE
from balcap_jax.models.prompting import PIXEL_MEAN, PIXEL_STD

MODEL_TYPE = "llava"
ARCHITECTURE = "LlavaForConditionalGeneration"
IMAGE_TOKEN = "image_token_index"

# Checkpoints of transformers 4 carry the first name of each kind; those that transformers 5 writes have the second for
# the tower. Names of the modules themselves stay as they are.
RENAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)

# Our fields of the tower and those of `vision_config`.
_TOWER_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vision_width": "hidden_size",
    "vision_layers": "num_hidden_layers",
    "vision_heads": "num_attention_heads",
    "vision_mlp": "intermediate_size",
    "vision_norm_eps": "layer_norm_eps",
}
_TOWER = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"
# The sizes of a CLIP processor whose file names none.
_CLIP_SIZES = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}


def _split_patch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[rows * columns * channels, width] to its axes."""
    side = math.isqrt(shape[0] // 3)
    return side, side, 3, shape[1]


def _tower_layers(path: str) -> tuple[Row, ...]:
    layer = f"{_TOWER}.encoder.layers.{{}}"
    return (
        *layer_norm(f"{layer}.layer_norm1", f"{path}/attention_norm"),
        *(row for x in "qkv" for row in dense(f"{layer}.self_attn.{x}_proj", f"{path}/{x}")),
        *dense(f"{layer}.self_attn.out_proj", f"{path}/o", inputs=2),
        *layer_norm(f"{layer}.layer_norm2", f"{path}/mlp_norm"),
        *dense(f"{layer}.mlp.fc1", f"{path}/up"),
        *dense(f"{layer}.mlp.fc2", f"{path}/down"),
    )


TABLE = (
    Row(f"{_TOWER}.embeddings.class_embedding", "vision/patches/class_token", VECTOR),
    # [width, channel, row, column]
    Row(
        f"{_TOWER}.embeddings.patch_embedding.weight",
        "vision/patches/patch/kernel",
        patches(2, 3, 1, 0, split=_split_patch),
    ),
    Row(f"{_TOWER}.embeddings.position_embedding.weight", "vision/patches/positions", MATRIX),
    *layer_norm(f"{_TOWER}.pre_layrnorm", "vision/patches/norm"),
    *_tower_layers("vision/layers"),
    *_tower_layers("vision/unused/layers"),
    # No feature depends on the last norm; transformers builds it all the same.
    Row(
        f"{_TOWER}.post_layernorm.weight",
        "vision/unused/norm/scale",
        VECTOR,
        fill=(1.0, "vision/patches/norm/scale", 0),
    ),
    Row(f"{_TOWER}.post_layernorm.bias", "vision/unused/norm/bias", VECTOR, fill=(0.0, "vision/patches/norm/bias", 0)),
    *dense(f"{_PROJECTOR}.linear_1", "projector/first"),
    *dense(f"{_PROJECTOR}.linear_2", "projector/second"),
    *decoder_rows("model.language_model"),
)


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config group `model` of a complete config.json. Raises ValueError or KeyError for what we cannot build."""
    text, tower = config["text_config"], config["vision_config"]
    hf_config.require(config, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    hf_config.require(config, multimodal_projector_bias=(True, None))
    hf_config.require(text, model_type="llama", hidden_act="silu", attention_bias=(False, None), mlp_bias=(False, None))
    hf_config.require(tower, model_type="clip_vision_model", hidden_act="quick_gelu", num_channels=(3, None))
    hf_config.require_sizes(tower, "image_size", "patch_size")
    if not isinstance(config["vision_feature_layer"], int):
        raise ValueError(f"vision_feature_layer is {config['vision_feature_layer']!r}, only one layer is built")
    image_tokens = (tower["image_size"] // tower["patch_size"]) ** 2
    return {
        "family": "llava",
        **{name: tower[theirs] for name, theirs in _TOWER_FIELDS.items()},
        "feature_layer": config["vision_feature_layer"],
        "keep_unused": True,
        **hf_config.decoder_fields(config),
        "template": VICUNA_TEMPLATE,
        "prompt_tokens": image_tokens + hf_config.INSTRUCTION_TOKENS,
    }


def fields_from_processor(processor: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """{}, as CLIP's image processor has no free setting. Raises ValueError for one that does something else."""
    hf_config.require_processor(processor, kind="CLIPImageProcessor", mean=PIXEL_MEAN, std=PIXEL_STD)
    side = fields["image_size"]
    processor = _CLIP_SIZES | dict(processor)
    hf_config.require(processor, do_center_crop=(True, None), patch_size=(fields["patch_size"], None))
    hf_config.require(
        processor, size=({"shortest_edge": side}, side), crop_size=({"height": side, "width": side}, side)
    )
    return {}


def processor_to_hf(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The files of `hf.PROCESSORS` for a model that has none."""
    side = fields["image_size"]
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **hf_config.processor_settings(PIXEL_MEAN, PIXEL_STD),
        "do_center_crop": True,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    return image_processor, {
        "processor_class": "LlavaProcessor",
        "patch_size": fields["patch_size"],
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the class token
        "image_token": "<image>",
    }


def image_limits(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{}: every picture gets as many tokens."""
    del fields
    return {}


def config_to_hf(fields: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a model that came from no checkpoint; `ids` as in `formats.hf`.

    It leaves out layers behind `feature_layer` that have no parameters: the features are then those of the last layer.
    """
    layer, layers = fields["feature_layer"], fields["vision_layers"]
    if not fields.get("keep_unused"):
        layer, layers = -1, layers + 1 + layer if layer < 0 else layer
    tower = {**fields, "vision_layers": layers}
    tower["vision_norm_eps"] = fields.get("vision_norm_eps") or fields["norm_eps"]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        IMAGE_TOKEN: ids["image"],
        "image_seq_length": (fields["image_size"] // fields["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": fields["tied_embeddings"],
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            **{theirs: tower[name] for name, theirs in _TOWER_FIELDS.items()},
        },
        "text_config": {"model_type": "llama", "head_dim": fields["head_size"], **hf_config.text_config(fields, ids)},
    }
