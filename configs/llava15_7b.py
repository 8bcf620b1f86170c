"""LLaVA-1.5-7B: BalCapRL, or supervised training on the references.

    python -m balcap_jax.convert --from_hf=HF_DIRECTORY --out=models/llava15_7b
    python -m balcap_jax.train --config=configs/llava15_7b.py --workdir=runs/llava15_7b

Variants, which may be joined as in `:sft,lora`:
    :rl     reinforcement from the published model, as the method is reported; what no variant means too
    :sft    supervised training on captions of the data set instead
    :lora   adapters of rank 64 on a frozen bfloat16 base, in place of all decoder parameters

Chips: compiled for v5e:4x8 (7.8 of 15.75 GiB a chip with 32 prompts at once) and v5p:2x2x2; `docs/performance.md` has
the commands. On GPUs 8 of 80 GB or more: weights, moments and gradients are 109 GB in all.
Result: compiled ahead of time, not yet run.

The settings are those of the method's reports, or our own where they say nothing (`docs/method.md`). Data and judge
are the embedded ones, so that this file is a whole recipe: with captioned photographs and a judge model of your own,
change data.name, data.data_dir, data.prompt (empty: each sample's own) and judge.name.
"""

from ml_collections import ConfigDict

from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import default_config
from balcap_jax.models import published

VARIANTS = ("rl", "sft", "lora")


def get_config(variant: str = "") -> ConfigDict:
    variants = [part for part in variant.split(",") if part]
    for unknown in set(variants) - set(VARIANTS):
        raise UserError(f"unknown variant {unknown!r}; there are {', '.join(VARIANTS)}")
    if {"rl", "sft"} <= set(variants):
        raise UserError("variants rl and sft exclude each other; for one after the other set stages.order to sft,rl")

    config = default_config()
    config.name = "llava15_7b"
    config.model.update(published.LLAVA_15_7B)
    config.model.path = "models/llava15_7b"
    # 576 image tokens, the chat template's 40 and an instruction.
    config.model.prompt_tokens = 704
    config.model.dtype = "bfloat16"  # of the computation; the parameters that are trained stay float32
    config.model.remat = "full"

    config.data.name = "scenes"
    config.judge.name = "oracle"

    # 128 prompts a step; 700 steps are one pass over 90,000 images. The rate is constant after 5% of them.
    config.stages.order = "sft" if "sft" in variants else "rl"
    for stage in (config.stages.sft, config.stages.rl):
        stage.steps = 700
        stage.batch_size = 128
        stage.micro_batches = 4  # A part of the batch has at least a prompt for each chip.
        stage.learning_rate = 1e-6
        stage.warmup_steps = 35
        stage.freeze = "^(vision|projector)/"
    config.optim.clip_norm = 1.0
    config.optim.frozen_dtype = "bfloat16"  # The tower computes in it anyway.
    config.mesh.data = 1
    config.mesh.fsdp = -1  # All chips; where they are more than the prompts of a micro-batch, set mesh.tensor as well.

    config.rollout.group_size = 8
    config.rollout.max_tokens = 512
    config.rollout.buckets = (128, 256, 384, 512)
    config.checkpoint.every = 25
    config.checkpoint.asynchronous = True  # Gigabytes: the chips need not wait for the disk.

    if "lora" in variants:
        config.lora.rank = 64
        config.lora.alpha = 64.0
        # Ours: adapters start at 0 and take about ten times the rate of full training.
        config.stages.sft.learning_rate = config.stages.rl.learning_rate = 1e-5
    return config
