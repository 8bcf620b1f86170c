"""LLaVA-1.5-7B: BalCapRL on ShareGPT4V with a chat judge, its leave-one-outs, and what it is compared with.

    hf download llava-hf/llava-1.5-7b-hf --local-dir models/llava15_7b
    python -m balcap_jax.recaption --images=DATA/sharegpt4v_instruct_gpt4-vision_cap100k.json --out=units.jsonl \\
        --judge.endpoints=URL,URL
    python -m balcap_jax.train --config=configs/llava15_7b.py --workdir=runs/llava15_7b \\
        --config.data.manual_dir=DATA --config.data.units=units.jsonl --config.judge.endpoints=URL,URL
    python -m balcap_jax.train --config=configs/llava15_7b.py:scenes --workdir=runs/smoke      (a smoke run, no judge)

Variants: sft, lora, one, scenes, no_precision, caprl and more; `vlm.py`, which belongs beside this file, has them all.

Chips: compiled for v5e:4x8 (7.8 of 15.75 GiB a chip with 32 prompts at once) and v5p:2x2x2; `docs/performance.md` has
the commands. On GPUs 8 of 80 GB or more: weights, moments and gradients are 109 GB in all.
Result: compiled ahead of time, not yet run.
"""

from ml_collections import ConfigDict
from vlm import published_config

from balcap_jax.models import published


def get_config(variant: str = "") -> ConfigDict:
    config = published_config("llava15_7b", published.LLAVA_15_7B, variant, freeze="^(vision|projector)/")
    # 576 image tokens, the chat template's 40 and an instruction.
    config.model.prompt_tokens = 704
    config.rollout.max_tokens = 512
    config.rollout.buckets = (512,)
    config.rollout.token_buckets = (128, 192, 256, 352)
    return config
