"""The published models at full size, without a number: names and shapes of every tensor, and how many numbers."""

import json
import math

import jax
import pytest
import transformers

from balcap_jax.models import published
from balcap_jax.models.formats import hf, loading

torch = pytest.importorskip("torch", reason="the reference implementations need torch, of the [dev] extra")

# config.json of the published checkpoints, which leave much to transformers' defaults.
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "pad_token_id": 32001,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32064,
    "model_type": "llava",
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama",
        "torch_dtype": "float16",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}


def qwen3(*, out: int, mlp: int, layers: int, heads: int, tied: bool, depth: int, width: int, tower_mlp: int) -> dict:
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": out,
            "initializer_range": 0.02,
            "intermediate_size": mlp,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24] if depth == 27 else [5, 11, 17],
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": width,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": tower_mlp,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": out,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def qwen(*, out: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "hidden_size": out,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": vocab,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "in_chans": 3,
            "intermediate_size": 3420,
            "num_heads": 16,
            "spatial_patch_size": 14,
            "tokens_per_second": 2,
            "out_hidden_size": out,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }


SIZES_3B = {"out": 2048, "intermediate": 11008, "layers": 36, "heads": 16, "kv_heads": 2, "vocab": 151936}
SIZES_7B = {"out": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocab": 152064}
SMALL_TOWER = {"depth": 24, "width": 1024, "tower_mlp": 4096}
SIZES_3_2B = {"out": 2048, "mlp": 6144, "layers": 28, "heads": 16, "tied": True, **SMALL_TOWER}
SIZES_3_4B = {"out": 2560, "mlp": 9728, "layers": 36, "heads": 32, "tied": True, **SMALL_TOWER}
SIZES_3_8B = {"out": 4096, "mlp": 12288, "layers": 36, "heads": 32, "tied": False}
SIZES_3_8B |= {"depth": 27, "width": 1152, "tower_mlp": 4304}
MODELS = {
    "LLaVA-1.5-7B": (LLAVA_7B, 7_063_427_072, published.LLAVA_15_7B),
    "Qwen2.5-VL-3B": (qwen(**SIZES_3B, tied=True), 3_754_622_976, published.QWEN25_VL_3B),
    "Qwen2.5-VL-7B": (qwen(**SIZES_7B, tied=False), 8_292_166_656, published.QWEN25_VL_7B),
    "Qwen3-VL-2B": (qwen3(**SIZES_3_2B), 2_127_532_032, published.QWEN3_VL_2B),
    "Qwen3-VL-4B": (qwen3(**SIZES_3_4B), 4_437_815_808, published.QWEN3_VL_4B),
    "Qwen3-VL-8B": (qwen3(**SIZES_3_8B), 8_767_123_696, published.QWEN3_VL_8B),
}


class Words:
    """As much of a tokenizer as building a policy asks for: two special words beside `<image>`."""

    pad_token_id, eos_token_id, bos_token_id, unk_token_id = 0, 1, None, None
    all_special_ids, added_tokens_decoder = (0, 1, 2), {}

    def __len__(self) -> int:
        return 3

    def convert_tokens_to_ids(self, word: str) -> int | None:
        return 2 if word == "<image>" else None


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_equal_the_reference_and_the_number_of_parameters_the_published_one(name, tmp_path):
    config, count, sizes = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    family, fields, _ = hf.read_fields(tmp_path, tuple(loading.CHECKPOINTS.values()))
    # What recipes say of the model before its checkpoint is there.
    assert json.loads(json.dumps({name: fields[name] for name in sizes})) == json.loads(json.dumps(sizes))
    policy, _ = loading.build(loading.DEFAULTS | fields, Words())
    shapes = loading.flat_shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    assert sum(math.prod(shape) for shape in shapes.values()) == count

    with torch.device("meta"):
        reference = getattr(transformers, family.ARCHITECTURE)(transformers.AutoConfig.from_pretrained(tmp_path))
    # Tied weights are one parameter under two names; named_parameters gives the first.
    theirs = {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()}
    assert sum(math.prod(shape) for shape in theirs.values()) == count
    ours = {name: pieces[0].hf_shape for name, pieces in hf.plan(family.TABLE, shapes).items()}
    assert ours == theirs
