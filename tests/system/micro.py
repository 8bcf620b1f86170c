"""A recipe for tests: every part of a real run, at sizes that take seconds.

python -m balcap_jax.train --config=tests/system/micro.py --workdir=D --config.data.data_dir=DATA
"""

from balcap_jax.config.recipes import default_config


def get_config():
    config = default_config()
    config.name = "micro"
    config.data.train_size = 24
    config.data.validation_size = 4
    config.data.test_size = 8
    config.data.captions_per_image = 2
    config.data.read_threads = 1
    config.model.image_size = 24
    config.model.patch_size = 8
    config.model.vision_width = 16
    config.model.vision_layers = 2
    config.model.vision_heads = 2
    config.model.vision_mlp = 16
    config.model.width = 16
    config.model.layers = 2
    config.model.heads = 2
    config.model.kv_heads = 1
    config.model.head_size = 8
    config.model.mlp = 16
    config.model.prompt_tokens = 14
    config.stages.sft.steps = 4
    config.stages.sft.batch_size = 4
    config.stages.sft.warmup_steps = 2
    config.stages.sft.learning_rate = 1e-2
    config.stages.rl.steps = 6
    config.stages.rl.batch_size = 4
    config.stages.rl.warmup_steps = 2
    config.stages.rl.learning_rate = 1e-2
    config.stages.rl.freeze = "^(vision|projector)/"
    config.stages.rl.eval_every = 4
    config.rollout.group_size = 3
    config.rollout.max_tokens = 24
    config.rollout.buckets = (24,)
    config.checkpoint.every = 2
    config.checkpoint.keep = 20
    config.log.samples_every = 3
    config.log.eval_images = 4
    config.log.eval_samples = 3  # as training draws: one rollout for both
    return config
