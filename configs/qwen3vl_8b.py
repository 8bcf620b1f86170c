"""Qwen3-VL-8B: BalCapRL on ShareGPT4V with a chat judge, its leave-one-outs, and what it is compared with.

    hf download Qwen/Qwen3-VL-8B-Instruct --local-dir models/qwen3vl_8b
    python -m balcap_jax.recaption --images=DATA/sharegpt4v_instruct_gpt4-vision_cap100k.json --out=units.jsonl \\
        --judge.endpoints=URL,URL
    python -m balcap_jax.train --config=configs/qwen3vl_8b.py --workdir=runs/qwen3vl_8b \\
        --config.data.manual_dir=DATA --config.data.units=units.jsonl --config.judge.endpoints=URL,URL
    python -m balcap_jax.train --config=configs/qwen3vl_8b.py:scenes --workdir=runs/smoke      (a smoke run, no judge)

Variants: sft, lora, one, scenes, no_precision, caprl and more; `vlm.py`, which belongs beside this file, has them all.

Chips: compiled for v5e:4x8 (10.65 of 15.75 GiB a chip in the rollout, 14.12 in the padded update);
`docs/performance.md` has the command. Weights, moments and gradients of the decoder are 131 GB in all.
Result: compiled ahead of time, not yet run.
"""

from ml_collections import ConfigDict
from vlm import published_config

from balcap_jax.models import published


def get_config(variant: str = "") -> ConfigDict:
    config = published_config("qwen3vl_8b", published.QWEN3_VL_8B, variant, freeze="^(vision|merger|deepstack)/")
    config.model.max_image_tokens = 384
    # 384 image tokens, the chat template's 9 and an instruction.
    config.model.prompt_tokens = 512
    config.rollout.max_tokens = 1024
    config.rollout.buckets = (1024,)
    # As in `qwen25vl_3b.py`: captions have about 220 tokens, and parts of a batch are of two prompts and more.
    config.rollout.token_buckets = (288, 320, 384, 512)
    return config
