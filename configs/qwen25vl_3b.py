"""Qwen2.5-VL-3B: BalCapRL on ShareGPT4V with a chat judge, its leave-one-outs, and what it is compared with.

    hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir models/qwen25vl_3b
    python -m balcap_jax.recaption --images=DATA/sharegpt4v_instruct_gpt4-vision_cap100k.json --out=units.jsonl \\
        --judge.endpoints=URL,URL
    python -m balcap_jax.train --config=configs/qwen25vl_3b.py --workdir=runs/qwen25vl_3b \\
        --config.data.manual_dir=DATA --config.data.units=units.jsonl --config.judge.endpoints=URL,URL
    python -m balcap_jax.train --config=configs/qwen25vl_3b.py:scenes --workdir=runs/smoke      (a smoke run, no judge)

Variants: sft, lora, one, scenes, no_precision, caprl and more; `vlm.py`, which belongs beside this file, has them all.

Chips: compiled for v5e:4x4 (8.0 of 15.75 GiB a chip with 16 prompts at once); `docs/performance.md` has the commands.
Weights, moments and gradients are 51 GB in all. Variant `one`: compiled for one chip of v5e, the rollout
takes 13.7 of 15.75 GiB in 16 parts, the update 15.1.
Result: compiled ahead of time, not yet run.
"""

from ml_collections import ConfigDict
from vlm import published_config

from balcap_jax.models import published


def get_config(variant: str = "") -> ConfigDict:
    config = published_config(
        "qwen25vl_3b", published.QWEN25_VL_3B, variant, freeze="^(vision|merger)/", micro_batches=8
    )
    config.model.max_image_tokens = 384
    # 384 image tokens, the chat template's 20 and an instruction.
    config.model.prompt_tokens = 512
    config.rollout.max_tokens = 1024
    config.rollout.buckets = (1024,)
    # Captions have about 220 tokens. With two prompts on a device at once the fullest has about 280 a response, more
    # where some pictures have long captions and others short ones; the last two are for captions that grow.
    config.rollout.token_buckets = (288, 320, 384, 512)
    return config
