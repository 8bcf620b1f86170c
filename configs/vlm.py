"""What the recipes of published models share: how they are trained on many chips, and their variants.

The settings are those of the method's reports, or our own where they say nothing (`docs/method.md`). Data and judge
are the embedded ones, so that such a file is a whole recipe: with captioned photographs and a judge model of your own,
change data.name, data.data_dir, data.prompt (empty: each sample's own) and judge.name.

Variants, which may be joined as in `:sft,lora`:
    :rl     reinforcement from the published model, as the method is reported; what no variant means too
    :sft    supervised training on captions of the data set instead
    :lora   adapters of rank 64 on a frozen bfloat16 base, in place of all decoder parameters
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.cli.errors import UserError
from balcap_jax.config import default_config

VARIANTS = ("rl", "sft", "lora")


def published_config(name: str, model: Mapping[str, Any], variant: str, freeze: str) -> ConfigDict:
    """The configuration of the model `name`, whose fields are `model`; `freeze` is what both stages leave as it is.

    Raises:
      UserError: there is no such variant.
    """
    variants = [part for part in variant.split(",") if part]
    for unknown in set(variants) - set(VARIANTS):
        raise UserError(f"unknown variant {unknown!r}; there are {', '.join(VARIANTS)}")
    if {"rl", "sft"} <= set(variants):
        raise UserError("variants rl and sft exclude each other; for one after the other set stages.order to sft,rl")

    config = default_config()
    config.name = name
    config.model.update(model)
    config.model.path = f"models/{name}"
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
        stage.freeze = freeze
    config.optim.clip_norm = 1.0
    config.optim.frozen_dtype = "bfloat16"  # The tower computes in it anyway.
    config.mesh.data = 1
    config.mesh.fsdp = -1  # All chips; where they are more than the prompts of a micro-batch, set mesh.tensor as well.

    config.rollout.group_size = 8
    config.checkpoint.every = 25
    config.checkpoint.asynchronous = True  # Gigabytes: the chips need not wait for the disk.

    if "lora" in variants:
        config.lora.rank = 64
        config.lora.alpha = 64.0
        # Ours: adapters start at 0 and take about ten times the rate of full training.
        config.stages.sft.learning_rate = config.stages.rl.learning_rate = 1e-5
    return config
