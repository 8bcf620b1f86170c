"""Qwen2.5-VL between Hugging Face checkpoints (`Qwen2_5_VLForConditionalGeneration`) and ours; see `formats.hf`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from balcap_jax.models.fields import DEFAULTS
from balcap_jax.models.formats import hf_config
from balcap_jax.models.formats.hf import VECTOR, Row, decoder_rows, dense, patches
from balcap_jax.models.prompting import PIXEL_MEAN, PIXEL_STD
from balcap_jax.models.qwen2_5_vl.processing import CHATML_TEMPLATE
from balcap_jax.models.qwen2_5_vl.vision import FRAMES, QwenTower, VisionConfig
from balcap_jax.models.qwen2_5_vl.windows import MERGE

MODEL_TYPE = "qwen2_5_vl"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
IMAGE_TOKEN = "image_token_id"

# Published checkpoints, and those that transformers 5 writes, carry the names of transformers 4.
RENAMES = (
    ("visual.", "model.visual."),
    ("model.visual.", "model.visual."),
    ("model.language_model.", "model.language_model."),
    ("model.", "model.language_model."),
)

# Our fields of the tower and those of `vision_config`.
_TOWER_FIELDS = {
    "patch_size": "patch_size",
    "vision_width": "hidden_size",
    "vision_layers": "depth",
    "vision_heads": "num_heads",
    "vision_mlp": "intermediate_size",
    "window_size": "window_size",
    "full_attention_layers": "fullatt_block_indexes",
}
_TOWER = "model.visual"
_BLOCK = f"{_TOWER}.blocks.{{}}"
_MIN_IMAGE_TOKENS, _IMAGE_TOKENS = DEFAULTS["min_image_tokens"], DEFAULTS["max_image_tokens"]


def split_patch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[frames, channels * rows * columns, width] to its axes."""
    side = math.isqrt(shape[1] // 3)
    return shape[0], 3, side, side, shape[2]


TABLE = (
    # [width, channel, frame, row, column]
    Row(f"{_TOWER}.patch_embed.proj.weight", "vision/patch/kernel", patches(2, 1, 3, 4, 0, split=split_patch)),
    Row(f"{_BLOCK}.norm1.weight", "vision/layers/attention_norm/scale", VECTOR),
    # Queries, keys and values are one matrix there and three here.
    *(
        dataclasses.replace(row, part=(i, 3))
        for i, x in enumerate("qkv")
        for row in dense(f"{_BLOCK}.attn.qkv", f"vision/layers/{x}")
    ),
    *dense(f"{_BLOCK}.attn.proj", "vision/layers/o", inputs=2),
    Row(f"{_BLOCK}.norm2.weight", "vision/layers/mlp_norm/scale", VECTOR),
    *(row for x in ("gate", "up", "down") for row in dense(f"{_BLOCK}.mlp.{x}_proj", f"vision/layers/{x}")),
    Row(f"{_TOWER}.merger.ln_q.weight", "merger/norm/scale", VECTOR),
    *dense(f"{_TOWER}.merger.mlp.0", "merger/first"),
    *dense(f"{_TOWER}.merger.mlp.2", "merger/second"),
    *decoder_rows("model.language_model", biases=True),
)


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config group `model` of a complete config.json. Raises ValueError or KeyError for what we cannot build."""
    text, tower = config["text_config"], config["vision_config"]
    hf_config.require(text, hidden_act="silu", use_sliding_window=(False, None))
    language = hf_config.decoder_fields(config)
    hf_config.require(tower, hidden_act="silu", in_channels=3, spatial_merge_size=MERGE, temporal_patch_size=FRAMES)
    hf_config.require(tower, out_hidden_size=language["width"])
    return {
        "family": "qwen2_5_vl",
        **{name: tower[theirs] for name, theirs in _TOWER_FIELDS.items()},
        **language,
        "mrope_section": list(text["rope_parameters"]["mrope_section"]),
        "qkv_bias": True,
        "template": CHATML_TEMPLATE,
        "prompt_tokens": _IMAGE_TOKENS + hf_config.INSTRUCTION_TOKENS,
    }


def fields_from_processor(processor: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds of image tokens. Raises ValueError for an image processor that does something else than ours.

    A maximum beyond our default (published: 16,384 tokens) stays at that: every prompt is padded to it.
    """
    return image_bounds(processor, fields, VisionConfig)


def image_bounds(processor: Mapping[str, Any], fields: Mapping[str, Any], tower: type[QwenTower]) -> dict[str, Any]:
    """`fields_from_processor` of both Qwen families, whose image processors differ in mean and deviation alone."""
    # What a file leaves out is CLIP's in both.
    pixels = {"image_mean": PIXEL_MEAN.tolist(), "image_std": PIXEL_STD.tolist()} | dict(processor)
    hf_config.require_processor(pixels, kind="Qwen2", mean=tower.PIXEL_MEAN, std=tower.PIXEL_STD)
    patch = fields["patch_size"]
    if patch != processor.get("patch_size", 14):
        raise ValueError(f"patch_size is {processor.get('patch_size', 14)!r}, only {patch} is built")
    hf_config.require(processor, merge_size=(MERGE, None), temporal_patch_size=(FRAMES, None))
    size = processor.get("size")
    if size is not None and not (isinstance(size, dict) and set(size) <= {"shortest_edge", "longest_edge"}):
        raise ValueError(f"size is {size!r}, only numbers of pixels as shortest_edge and longest_edge are built")
    bounds = {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        pixels = processor.get(name, (size or {}).get(edge))
        if pixels is not None and (type(pixels) is not int or pixels < 1):
            raise ValueError(f"{name} is {pixels!r}, it must be a number of pixels")
        bounds[name] = pixels
    token = (MERGE * patch) ** 2
    least = -(-bounds["min_pixels"] // token) if bounds["min_pixels"] else _MIN_IMAGE_TOKENS
    most = bounds["max_pixels"] // token if bounds["max_pixels"] else max(least, _IMAGE_TOKENS)
    if not least <= most:
        raise ValueError(
            f"max_pixels, {bounds['max_pixels']}, is less than the {least} tokens of {token} pixels of min_pixels"
        )
    most = min(most, max(least, _IMAGE_TOKENS))
    return {"min_image_tokens": least, "max_image_tokens": most, "prompt_tokens": most + hf_config.INSTRUCTION_TOKENS}


def processor_to_hf(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The first file of `hf.PROCESSORS` for a model that has none; published models do without the second."""
    return image_processor(fields, "Qwen2_5_VLProcessor", VisionConfig)


def image_processor(fields: Mapping[str, Any], name: str, tower: type[QwenTower]) -> tuple[dict[str, Any], ...]:
    """`processor_to_hf` of both Qwen families; `name` is the processor's in transformers."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": name,
        **hf_config.processor_settings(tower.PIXEL_MEAN, tower.PIXEL_STD),
        **image_limits(fields),
        "patch_size": fields["patch_size"],
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
    }
    return (settings,)


def image_limits(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an image processor that give pictures as many tokens as the model's fields."""
    token = (MERGE * fields["patch_size"]) ** 2
    least, most = fields["min_image_tokens"] * token, fields["max_image_tokens"] * token
    # Versions of transformers read the one or the other.
    return {"min_pixels": least, "max_pixels": most, "size": {"shortest_edge": least, "longest_edge": most}}


def config_to_hf(fields: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a model that came from no checkpoint; `ids` as in `formats.hf`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        IMAGE_TOKEN: ids["image"],
        # transformers 4 looks for images behind this token alone.
        "vision_start_token_id": ids["before_image"],
        "tie_word_embeddings": fields["tied_embeddings"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            **{theirs: fields[name] for name, theirs in _TOWER_FIELDS.items()},
            "out_hidden_size": fields["width"],
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
        },
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **hf_config.text_config(fields, ids, mrope_section=list(fields["mrope_section"])),
        },
    }
