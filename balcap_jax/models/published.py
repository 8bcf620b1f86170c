"""Sizes of the published models, as fields of the config group `model`.

They equal those of the models' `config.json` (tested). So a recipe is complete without its checkpoint, and its programs
can be compiled before the checkpoint is on the disk.
"""

LLAVA_15_7B = {
    "family": "llava",
    "image_size": 336,
    "patch_size": 14,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_heads": 16,
    "vision_mlp": 4096,
    "feature_layer": -2,
    "keep_unused": True,
    "width": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_size": 128,
    "mlp": 11008,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "tied_embeddings": False,
    "vocab": 32064,
}

_QWEN25_VL = {
    "family": "qwen2_5_vl",
    "patch_size": 14,
    "vision_width": 1280,
    "vision_layers": 32,
    "vision_heads": 16,
    "vision_mlp": 3420,
    "window_size": 112,
    "full_attention_layers": (7, 15, 23, 31),
    "head_size": 128,
    "rope_theta": 1000000.0,
    "mrope_section": (16, 24, 24),
    "norm_eps": 1e-6,
    "qkv_bias": True,
}

QWEN25_VL_3B = _QWEN25_VL | {
    "width": 2048,
    "layers": 36,
    "heads": 16,
    "kv_heads": 2,
    "mlp": 11008,
    "tied_embeddings": True,
    "vocab": 151936,
}

QWEN25_VL_7B = _QWEN25_VL | {
    "width": 3584,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "mlp": 18944,
    "tied_embeddings": False,
    "vocab": 152064,
}

_QWEN3_VL = {
    "family": "qwen3_vl",
    "patch_size": 16,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_heads": 16,
    "vision_mlp": 4096,
    "vision_positions": 2304,
    "deepstack_layers": (5, 11, 17),
    "kv_heads": 8,
    "head_size": 128,
    "rope_theta": 5000000.0,
    "mrope_section": (24, 20, 20),
    "norm_eps": 1e-6,
    "vocab": 151936,
    "min_image_tokens": 64,
}

QWEN3_VL_2B = _QWEN3_VL | {
    "width": 2048,
    "layers": 28,
    "heads": 16,
    "mlp": 6144,
    "tied_embeddings": True,
}

QWEN3_VL_4B = _QWEN3_VL | {
    "width": 2560,
    "layers": 36,
    "heads": 32,
    "mlp": 9728,
    "tied_embeddings": True,
}

QWEN3_VL_8B = _QWEN3_VL | {
    "vision_width": 1152,
    "vision_layers": 27,
    "vision_mlp": 4304,
    "deepstack_layers": (8, 16, 24),
    "width": 4096,
    "layers": 36,
    "heads": 32,
    "mlp": 12288,
    "tied_embeddings": False,
}
