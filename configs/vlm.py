"""What the recipes of published models share: the data, the judge, training on many chips, and the variants.

The data are ShareGPT4V with references that a judge has written anew, under each sample's own prompt; the judge is a
vision-language model behind chat endpoints. Both are yours to give, and `train` starts nothing without them:

    --config.data.manual_dir=FOLDER     ShareGPT4V's JSON and the folders of pictures that it names
    --config.data.units=FILE            what `python -m balcap_jax.recaption` wrote about these pictures
    --config.judge.endpoints=URL,URL    one or more servers; `launch/judge_server.sh` starts them

The settings are those of the method's reports, or our own where they say nothing (`docs/method.md`).

Variants, which may be joined as in `:sft,lora`:
    :rl       reinforcement from the published model, as the method is reported; what no variant means too
    :sft      supervised training on the references instead
    :lora     adapters of rank 64 on a frozen bfloat16 base, in place of all decoder parameters
    :one      one device: `lora`, and the same 128 prompts x 8 an update, sampled in as many parts as the memory asks
              for and learnt from prompt by prompt
    :scenes   rendered scenes and the oracle in place of data and judge: does it run, and fit, on these chips?

Leave-one-outs of the method:
    :no_precision :no_recall :no_linguistic   without that objective
    :precision_only :recall_only :linguistic_only   with no other objective
    :no_pointability   precision asks only what is true     :no_gate   language counts at any length
    :tau_1_1 :tau_1_5 :tau_3   another upper end of the length band, in lengths of the reference
    :two_sided :ramp :ramp_reference   a linear length penalty in place of the gate
    :grpo      vanilla GRPO: the weighted sum is normalised, in place of each objective
    :dr_grpo :rloo   other estimators of one summed reward     :no_batch_norm   c-GDPO without its batch step
    :best_of   supervised on the best caption of each group of the model at the start, in place of RL
    :soft_min  RVPO: the soft minimum of the objectives' z-scores in place of their sum
    :conflict  GD2PO: captions on which the objectives disagree are dropped

Rewards that the method is compared with:
    :caprl     accuracy of 8 questions answered from the caption, as CapRL's released script trains: RLOO, no KL, 1e-6
               after 20 steps of warm-up; data.units then holds lines with "questions"
    :rubicap   weighted criteria, GRPO; data.units is what `recaption --write=rubrics` wrote
    :feedquill verified share and number of units, c-GDPO (ours: the paper trains reward models and uses PPO)
    :arena     comparisons with the other captions of the picture     :balcap_arena   these beside the method's three
    :lexical   ROUGE-L to the reference, no judge
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.config import ablations, default_config

OWN = ("rl", "sft", "lora", "one", "scenes")
# What says on validation pictures which checkpoint is best; b_capscore where it is not named here.
BEST = {"caprl": "accuracy", "rubicap": "rubric", "feedquill": "verified_fraction", "lexical": "rouge_l"}
BEST |= {"arena": "preference"}


def published_config(
    name: str, model: Mapping[str, Any], variant: str, freeze: str, micro_batches: int = 4
) -> ConfigDict:
    """The configuration of the model `name`, whose fields are `model`; `freeze` is what both stages leave as it is.

    micro_batches: of both stages on many chips.

    Raises:
      UserError: there is no such variant, or two exclude each other.
    """
    variants = ablations.chosen(variant, (*OWN, *ablations.NAMES), one_of=[("rl", "sft")])
    config = default_config()
    config.name = name
    config.model.update(model)
    config.model.path = f"models/{name}"
    config.model.dtype = "bfloat16"  # of the computation; the parameters that are trained stay float32
    config.model.remat = "full"

    config.data.name = "sharegpt4v"
    config.data.validation_share = config.data.test_share = 0.01  # 900 pictures each, and 88,000 to train on
    config.judge.name = "remote"
    config.judge.endpoints = ""
    # A step asks 128 x 8 x 3 questions: six rounds of so many at once.
    config.judge.concurrency = 512
    # A caption of 1,024 tokens has about 80 assertions of 50 tokens each, and a full server writes 30 tokens a second.
    config.judge.max_tokens = 4096
    config.judge.timeout = 240.0
    config.judge.deadline = 900.0
    config.pipeline.depth = 1  # The judge works while the next captions are sampled.

    # 128 prompts a step; 700 steps are one pass over 90,000 images. The rate is constant after 5% of them.
    config.stages.order = "sft" if "sft" in variants else "rl"
    for stage in (config.stages.sft, config.stages.rl):
        stage.steps = 700
        stage.batch_size = 128
        # A part of the batch has at least a prompt for each chip.
        stage.micro_batches = stage.batch_size if "one" in variants else micro_batches
        stage.learning_rate = 1e-6
        stage.warmup_steps = 35
        stage.freeze = freeze
    config.stages.sft.learning_rate = 1e-5  # of MoCo Rubric's supervised baseline, the nearest report
    config.optim.clip_norm = 1.0
    config.optim.frozen_dtype = "bfloat16"  # The tower computes in it anyway.
    config.mesh.data = 1
    config.mesh.fsdp = -1  # All chips; where they are more than the prompts of a micro-batch, set mesh.tensor as well.

    config.rollout.group_size = 8
    config.checkpoint.every = 25
    config.checkpoint.asynchronous = True  # Gigabytes: the chips need not wait for the disk.
    # 14 evaluations of 128 pictures add one percent to the judge's questions.
    config.log.eval_images, config.log.eval_samples = 128, 2
    if "sft" not in variants:
        config.stages.rl.eval_every = 50
        config.checkpoint.best_metric = next((BEST[name] for name in BEST if name in variants), "b_capscore")

    if "caprl" in variants:
        config.advantage.estimator = "rloo"
        config.stages.rl.warmup_steps = 20
    if "rubicap" in variants:
        config.advantage.estimator = "grpo"
    # In tokens: a reference has about 200.
    ablations.apply(config, variants, length_start=256, length_end=512)
    if "one" in variants:
        config.rollout.parts = "auto"
    if {"lora", "one"} & set(variants):
        config.lora.rank = 64
        config.lora.alpha = 64.0
        # Ours: adapters start at 0 and take about ten times the rate of full training.
        config.stages.sft.learning_rate, config.stages.rl.learning_rate = 1e-4, 1e-5
    if "lexical" in variants:
        config.judge.name = "oracle"  # It is never asked.
    if "scenes" in variants:
        config.data.name, config.judge.name = "scenes", "oracle"
    else:
        config.data.captions_per_image = 1
    return config
