"""A captioner of photographs of your own: a folder of pictures with captions, no judge, the lexical reward.

    python -m balcap_jax.train --config=configs/photos.py --workdir=runs/photos --config.data.data_dir=FOLDER

FOLDER holds a.jpg and its caption a.txt, or captions.jsonl; see `balcap_jax/data/photos.py`. A policy of the Qwen2.5-VL
family of a million parameters is trained from random numbers, in 20 supervised and 20 reinforced steps: it shows that
everything runs, and learns next to nothing. A model that captions needs other sizes of prompts, captions and steps:
take the recipe of a published model, which reads the same folder with data.name=photos:

    python -m balcap_jax.train --config=configs/qwen25vl_3b.py:lexical --workdir=runs/photos \\
        --config.data.name=photos --config.data.data_dir=FOLDER

Variants: other rewards, of a judge behind judge.endpoints (`docs/judges.md`); what they read beside a caption is in
captions.jsonl, and `recaption` writes most of it.
    :balcap      precision, recall, language; needs reference_units, and a judge that sees pictures
    :text        recall and language of a judge that sees none; needs reference_units
    :caprl       questions answered from the caption; needs questions
    :rubicap     weighted criteria; needs rubrics
    :feedquill   verified share and number of units; needs a judge that sees pictures
    :arena       comparisons with the other captions of the picture; needs a judge that sees pictures
    :balcap_arena   these beside the three of :balcap
"""

from ml_collections import ConfigDict

from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import default_config

WEIGHTS = {"balcap": (1.0, 1.0, 1.0), "text": (1.0, 1.0), "caprl": (1.0,), "rubicap": (1.0,), "feedquill": (1.0, 1.0)}
WEIGHTS |= {"arena": (1.0,), "balcap_arena": (1.0, 1.0, 1.0, 1.0)}


def get_config(variant: str = "") -> ConfigDict:
    if variant and variant not in WEIGHTS:
        raise UserError(f"unknown variant {variant!r}; there are {', '.join(WEIGHTS)}")
    config = default_config()
    config.name = "photos"
    config.data.name = "photos"
    config.data.validation_share = 0.05
    config.data.test_share = 0.1
    config.data.max_pixels = 262_144
    config.rewards.name = "lexical"
    config.rewards.weights = (1.0,)
    if variant:
        config.rewards.name = variant
        config.rewards.weights = WEIGHTS[variant]
        config.judge.name = "remote"

    # Pictures of any size have 4 to 16 image tokens of 28 x 28 pixels; whatever they have, one program serves them.
    config.model.family = "qwen2_5_vl"
    config.model.patch_size = 14
    config.model.window_size = 56
    config.model.full_attention_layers = (1,)
    config.model.min_image_tokens = 4
    config.model.max_image_tokens = 16
    config.model.vision_width = 64
    config.model.vision_layers = 2
    config.model.vision_mlp = 128
    config.model.width = 128
    config.model.layers = 2
    config.model.mlp = 256
    config.model.mrope_section = (4, 6, 6)
    config.model.rope_theta = 1e6
    config.model.norm_eps = 1e-6
    config.model.qkv_bias = True
    config.model.prompt_tokens = 40
    config.rollout.group_size = 4
    config.rollout.max_tokens = 64
    config.rollout.buckets = (64,)

    config.stages.order = "sft,rl"
    config.stages.sft.steps = 20
    config.stages.sft.batch_size = 8
    config.stages.sft.warmup_steps = 2
    config.stages.rl.steps = 20
    config.stages.rl.batch_size = 4
    config.stages.rl.learning_rate = 5e-4
    config.stages.rl.freeze = "^(vision|merger)/"
    config.log.eval_images = 8
    config.log.eval_samples = 2
    return config
