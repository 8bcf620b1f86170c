"""Qwen3-VL between Hugging Face checkpoints (`Qwen3VLForConditionalGeneration`) and ours; see `formats.hf`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from balcap_jax.models.fields import DEFAULTS
from balcap_jax.models.formats import hf_config
from balcap_jax.models.formats.hf import MATRIX, VECTOR, Row, decoder_rows, dense, layer_norm, patches
from balcap_jax.models.qwen2_5_vl import hf as qwen2_5_vl
from balcap_jax.models.qwen2_5_vl.vision import FRAMES, ROPE_THETA
from balcap_jax.models.qwen2_5_vl.windows import MERGE
from balcap_jax.models.qwen3_vl import CHATML_TEMPLATE
from balcap_jax.models.qwen3_vl.vision import VisionConfig

MODEL_TYPE = "qwen3_vl"
ARCHITECTURE = "Qwen3VLForConditionalGeneration"
IMAGE_TOKEN = "image_token_id"
# Published checkpoints have the names of the modules.
RENAMES = ()

# Our fields of the tower and those of `vision_config`.
_TOWER_FIELDS = {
    "patch_size": "patch_size",
    "vision_width": "hidden_size",
    "vision_layers": "depth",
    "vision_heads": "num_heads",
    "vision_mlp": "intermediate_size",
    "vision_positions": "num_position_embeddings",
    "deepstack_layers": "deepstack_visual_indexes",
}
_TOWER = "model.visual"
_BLOCK = f"{_TOWER}.blocks.{{}}"


def _merger(name: str, path: str) -> tuple[Row, ...]:
    return (
        *layer_norm(f"{name}.norm", f"{path}/norm"),
        *dense(f"{name}.linear_fc1", f"{path}/first"),
        *dense(f"{name}.linear_fc2", f"{path}/second"),
    )


TABLE = (
    # [width, channel, frame, row, column]
    Row(
        f"{_TOWER}.patch_embed.proj.weight",
        "vision/patch/kernel",
        patches(2, 1, 3, 4, 0, split=qwen2_5_vl.split_patch),
    ),
    Row(f"{_TOWER}.patch_embed.proj.bias", "vision/patch/bias", VECTOR),
    Row(f"{_TOWER}.pos_embed.weight", "vision/positions", MATRIX),
    *layer_norm(f"{_BLOCK}.norm1", "vision/layers/attention_norm"),
    # Queries, keys and values are one matrix there and three here.
    *(
        dataclasses.replace(row, part=(i, 3))
        for i, x in enumerate("qkv")
        for row in dense(f"{_BLOCK}.attn.qkv", f"vision/layers/{x}")
    ),
    *dense(f"{_BLOCK}.attn.proj", "vision/layers/o", inputs=2),
    *layer_norm(f"{_BLOCK}.norm2", "vision/layers/mlp_norm"),
    *dense(f"{_BLOCK}.mlp.linear_fc1", "vision/layers/up"),
    *dense(f"{_BLOCK}.mlp.linear_fc2", "vision/layers/down"),
    *_merger(f"{_TOWER}.merger", "merger"),
    *_merger(f"{_TOWER}.deepstack_merger_list.{{}}", "deepstack/layers"),
    *decoder_rows("model.language_model"),
)


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config group `model` of a complete config.json. Raises ValueError or KeyError for what we cannot build."""
    text, tower = config["text_config"], config["vision_config"]
    hf_config.require(text, hidden_act="silu", attention_bias=(False, None))
    language = hf_config.decoder_fields(config)
    rope = text["rope_parameters"]
    hf_config.require(rope, mrope_interleaved=(True, None))
    hf_config.require(tower, hidden_act="gelu_pytorch_tanh", in_channels=3, out_hidden_size=language["width"])
    hf_config.require(tower, spatial_merge_size=MERGE, temporal_patch_size=FRAMES)
    hf_config.require(tower.get("rope_parameters") or {}, rope_theta=(ROPE_THETA, None))
    taken = tower["deepstack_visual_indexes"]
    if not taken or list(taken) != sorted({i for i in taken if 0 <= i < tower["depth"]}):
        layers = f"layers from 0 to {tower['depth'] - 1}"
        raise ValueError(f"deepstack_visual_indexes is {taken!r}, only {layers} in ascending order are built")
    return {
        "family": "qwen3_vl",
        **{name: tower[theirs] for name, theirs in _TOWER_FIELDS.items()},
        "deepstack_layers": list(taken),
        **language,
        # Without sections the modules take those of the published models.
        "mrope_section": list(rope.get("mrope_section") or (24, 20, 20)),
        "template": CHATML_TEMPLATE,
        # What published processors say; a checkpoint may lack that file.
        "min_image_tokens": 64,
        "prompt_tokens": DEFAULTS["max_image_tokens"] + hf_config.INSTRUCTION_TOKENS,
    }


def fields_from_processor(processor: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """As in Qwen2.5-VL. Raises ValueError for an image processor that does something else than ours."""
    return qwen2_5_vl.image_bounds(processor, fields, VisionConfig)


def processor_to_hf(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The first file of `hf.PROCESSORS` for a model that has none; published models do without the second."""
    return qwen2_5_vl.image_processor(fields, "Qwen3VLProcessor", VisionConfig)


image_limits = qwen2_5_vl.image_limits


def config_to_hf(fields: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a model that came from no checkpoint; `ids` as in `formats.hf`."""
    rope = {"mrope_section": list(fields["mrope_section"]), "mrope_interleaved": True}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        IMAGE_TOKEN: ids["image"],
        # transformers 4 looks for images behind this token alone.
        "vision_start_token_id": ids["before_image"],
        "tie_word_embeddings": fields["tied_embeddings"],
        "vision_config": {
            "model_type": MODEL_TYPE,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            **{theirs: fields[name] for name, theirs in _TOWER_FIELDS.items()},
            "out_hidden_size": fields["width"],
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
        },
        "text_config": {
            "model_type": "qwen3_vl_text",
            "head_dim": fields["head_size"],
            **hf_config.text_config(fields, ids, **rope),
        },
    }
