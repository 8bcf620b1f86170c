"""The whole method on the embedded world, on a laptop.

    python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes

Variants: `:tiny` is a smoke run of a minute for tests and notebooks; it learns next to nothing.
"""

from balcap_jax.config import default_config


def get_config(variant=""):
    config = default_config()
    config.name = "scenes"
    config.data.train_size = 8192
    config.data.captions_per_image = 2
    # One image token per cell of the world's 3 x 3 grid; the prompt is these 9 and 5 words.
    config.model.patch_size = 32
    config.model.prompt_tokens = 14
    config.model.layers = 3
    config.model.mlp = 256
    config.rollout.max_tokens = 80
    config.rollout.buckets = (64, 80)
    config.stages.order = "vision,align,sft,rl"

    # The tower first, on what is seen where: LLaVA's comes from CLIP, this one from nowhere.
    config.stages.vision.steps = 700
    config.stages.vision.batch_size = 64
    config.stages.vision.learning_rate = 2e-3
    config.stages.vision.schedule = "cosine"
    config.stages.vision.freeze = "^(projector|decoder)/"

    # Then the decoder, on faultless references, until it sees; then the faults that RL is to remove.
    config.stages.align.steps = 600
    # Frozen, as LLaVA's is: gradients from a decoder that can't read it yet would wash out what the tower has learnt.
    config.stages.align.freeze = "^vision/"
    config.stages.align.batch_size = 16
    config.stages.align.learning_rate = 2e-3
    config.stages.align.warmup_steps = 50
    config.stages.align.schedule = "cosine"

    config.stages.sft.steps = 300
    config.stages.sft.freeze = "^vision/"
    config.stages.sft.batch_size = 16
    config.stages.sft.learning_rate = 1e-3
    config.stages.sft.warmup_steps = 50
    config.stages.sft.schedule = "cosine"

    # As in the paper, the vision side stays as it is; the rate suits a model of a million parameters.
    config.stages.rl.steps = 100
    config.stages.rl.batch_size = 16
    config.stages.rl.learning_rate = 5e-4
    config.stages.rl.freeze = "^(vision|projector)/"
    if variant == "tiny":
        config.data.train_size = 64
        for stage in (config.stages.vision, config.stages.align):
            stage.steps, stage.warmup_steps = 4, 2
        config.stages.sft.steps = 6
        config.stages.sft.warmup_steps = 2
        config.stages.rl.steps = 4
    return config
