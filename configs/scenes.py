"""The whole method on the embedded world, on a laptop.

    python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes

Variants: `:tiny` is a smoke run of a minute for tests and notebooks; it learns next to nothing.
"""

from balcap_jax.config import default_config


def get_config(variant=""):
    config = default_config()
    config.name = "scenes"
    config.data.train_size = 8192
    config.model.prompt_tokens = 41
    config.stages.sft.steps = 1200
    config.stages.sft.batch_size = 32
    config.stages.sft.learning_rate = 2e-3
    config.stages.sft.warmup_steps = 50
    config.stages.sft.schedule = "cosine"
    config.stages.rl.steps = 100
    config.stages.rl.batch_size = 32
    config.stages.rl.learning_rate = 3e-4
    config.stages.rl.freeze = "^(vision|projector)/"
    config.rollout.group_size = 8
    config.rollout.max_tokens = 96
    config.rollout.buckets = (64, 96)
    if variant == "tiny":
        config.data.train_size = 64
        config.stages.sft.steps = 6
        config.stages.sft.warmup_steps = 2
        config.stages.rl.steps = 4
    return config
