"""A recipe to copy: supervised training, then reinforcement learning, on scenes.

    python -m balcap_jax.train --config=configs/forkme.py --workdir=runs/forkme
    python -m balcap_jax.train --config=configs/forkme.py:tiny --workdir=runs/forkme_tiny     (does it run at all?)
    python -m balcap_jax.train --config=configs/forkme.py --workdir=runs/hot --config.rollout.temperature=1.2

Chips: 2 CPU cores.
Result: not yet run.

`python -m balcap_jax.config` lists every field. Fields that are not named here keep their defaults.
"""

from ml_collections import ConfigDict

from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import default_config


def get_config(variant: str = "") -> ConfigDict:
    config = default_config()
    config.name = "forkme"

    # The base to improve: captions with habits and faults, so that every objective has room to rise.
    config.stages.sft.steps = 400
    config.stages.sft.learning_rate = 1e-3

    # Rewards only compare the G samples of a prompt with each other: more samples, less noise, more time.
    config.stages.rl.steps = 100
    config.stages.rl.batch_size = 16
    config.rollout.group_size = 8
    # A fifth to a tenth of the supervised rate: the sampler must stay close to the policy that it is compared with.
    config.stages.rl.learning_rate = 1e-4

    # Updates are compiled once per bucket and run at the smallest one that holds the longest response.
    config.rollout.max_tokens = 96
    config.rollout.buckets = (64, 96)

    # Precision, recall, linguistic. With advantage.batch_norm on, only their ratios matter.
    config.rewards.weights = (1.0, 1.0, 1.0)

    if variant == "tiny":
        config.data.train_size = 64
        config.stages.sft.steps = config.stages.rl.steps = 2
        config.stages.sft.batch_size = config.stages.rl.batch_size = 4
        config.rollout.group_size = 2
        config.log.eval_images = 4
    elif variant:
        raise UserError(f"unknown variant {variant!r}; the only one is tiny")
    return config
