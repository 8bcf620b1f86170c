"""Small random checkpoint directories of every family, as transformers saves them, and in the names of others."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.models.llava.vision import PIXEL_MEAN, PIXEL_STD
from balcap_jax.models.qwen2_5_vl.windows import patches_of

FAMILIES = {
    "llava": transformers.LlavaForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}
CLIP = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
# As the published checkpoints have them, at these sizes.
PROCESSORS = {
    "llava": CLIP
    | {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_center_crop": True,
        "size": {"shortest_edge": 12},
        "crop_size": {"height": 12, "width": 12},
    },
    "qwen2_5_vl": CLIP
    | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 4 * 64,
        "max_pixels": 16384 * 64,
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
    },
    "qwen3_vl": CLIP
    | {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 64 * 64, "longest_edge": 16384 * 64},
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
    },
}
# The smallest shards in which every tensor of these models fits, so that there are several.
SHARD = "16KB"
PROMPT = "what is on the table?"


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return build_tokenizer([PROMPT, "a red ball lies on the table, left of a cube."])


def config(family: str, words: transformers.PreTrainedTokenizerBase, **changes) -> transformers.PreTrainedConfig:
    """Sizes that differ wherever they may; the embedding has five rows more than there are words."""
    image = words.convert_tokens_to_ids("<image>")
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = ids | {
        "vocab_size": len(words) + 5,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if family == "llava":
        tower = transformers.CLIPVisionConfig(
            image_size=12,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=20,
            projection_dim=8,
        )
        text = transformers.LlamaConfig(**text, rms_norm_eps=1e-6, head_dim=6)
        return transformers.LlavaConfig(
            vision_config=tower, text_config=text, image_token_index=image, image_seq_length=9, **changes
        )
    tower = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 24,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 1]}
    if family == "qwen3_vl":
        kind, tower = transformers.Qwen3VLConfig, tower | {"num_position_embeddings": 9}
        tower["deepstack_visual_indexes"] = [0, 2]
        text, rope = text | {"head_dim": 6}, rope | {"mrope_interleaved": True}
    else:
        kind = transformers.Qwen2_5_VLConfig
        tower |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return kind(
        vision_config=tower,
        text_config=text | {"rms_norm_eps": 1e-6, "rope_parameters": rope},
        **{
            "image_token_id": image,
            "video_token_id": text["vocab_size"] - 1,
            "vision_start_token_id": text["vocab_size"] - 2,
            "vision_end_token_id": text["vocab_size"] - 3,
        }
        | changes,
    )


def make(
    family: str,
    dtype: torch.dtype = torch.float32,
    words: transformers.PreTrainedTokenizerBase | None = None,
    **changes,
) -> transformers.PreTrainedModel:
    """The model with every parameter random, norms and biases too, in inference mode; `words`: another tokenizer."""
    sizes = config(family, words or tokenizer(), **changes)
    model = FAMILIES[family]._from_config(sizes, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.rsplit(".", 2)[-2] or ".ln_q." in name
            parameter.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.2, generator=generator)
    return model.to(dtype).eval()


def save(
    model: transformers.PreTrainedModel,
    path: Path,
    names: str = "saved",
    shard: str = SHARD,
    words: transformers.PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes a checkpoint directory: tensors as transformers names them ("saved"), or its "modules", or the "hub"."""
    model.save_pretrained(path, max_shard_size=shard)
    (words or tokenizer()).save_pretrained(path)
    family = model.config.model_type
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family], indent=2) + "\n")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    if names == "modules":
        # A tied head too is a tensor of its own then, as some trainers write it.
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for file in path.glob("model*"):
            file.unlink()
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    elif names == "hub":
        rename(path, lambda name: name.replace("vision_tower.", "vision_tower.vision_model."))
    return path


def rename(path: Path, new: Callable[[str], str]) -> None:
    """Gives every tensor of a checkpoint another name, in its shard and in the index."""
    for file in path.glob("*.safetensors"):
        state = {new(name): tensor for name, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {new(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits_error(family, reference, policy, params, processor) -> float:
    """Relative error of the logits behind a prompt with an image, against the reference."""
    # A Qwen model's picture has as many tokens, of 8 x 8 pixels, as there must be.
    side = policy.vision.image_size if family == "llava" else 8 * math.isqrt(processor.min_image_tokens)
    image = np.random.default_rng(3).integers(0, 256, (side, side, 3)).astype(np.uint8)
    prompt = processor([image], [PROMPT])
    ours = jax.jit(lambda params: policy.prefill(params, prompt, policy.encode(params, prompt.images))[1])(params)

    tokens = torch.tensor(prompt.tokens[prompt.mask])[None].long()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family == "llava":
        pixels = np.moveaxis((image / 255.0 - PIXEL_MEAN) / PIXEL_STD, -1, 0)[None]
    else:
        patch = policy.vision.patch_size
        values = patches_of(image, patch).reshape(-1, 3, 1, patch * patch) / 255.0
        tower = policy.vision
        values = (values - tower.PIXEL_MEAN[:, None, None]) / tower.PIXEL_STD[:, None, None]
        pixels = values.repeat(2, axis=2).reshape(len(values), -1)
        inputs["image_grid_thw"] = torch.tensor([[1, side // patch, side // patch]])
        inputs["mm_token_type_ids"] = (tokens == policy.image_token).int()
    with torch.no_grad():
        theirs = reference(**inputs, pixel_values=torch.tensor(pixels, dtype=torch.float32)).logits[0, -1].numpy()
    allowed = [v for v in range(policy.vocab) if v not in policy.forbidden]
    return float(np.abs(np.asarray(ours)[0, allowed] - theirs[allowed]).max() / np.abs(theirs[allowed]).max())
