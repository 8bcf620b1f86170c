"""The schema of a configuration: every field with its type, default, range and meaning. `config` checks against it."""

import dataclasses
from typing import Any

STAGES = ("vision", "align", "sft", "rl")
"""Stages that `stages.order` may name."""

RUN_FIELDS = (
    *("dtype", "remat", "attention", "logits_chunk", "prompt_tokens", "template"),
    *("min_image_tokens", "max_image_tokens", "max_aspect", "wide_images"),
)
"""Fields of the group `model` that no parameter's shape depends on: the recipe decides them for a saved model too, but
for an empty template."""

KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "True or False",
    "str": "a string",
    "ints": "a tuple of integers",
    "floats": "a tuple of numbers",
}
# Upper bounds that only say what cannot be meant: counters stay within int32, and one axis within any memory.
STEPS = 100_000_000
SIZE = 65_536
WIDE = 16_777_216
IMAGES = 10_000_000
TYPE_NAMES = {"ints": "int, ..", "floats": "float, .."}


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    `kind` is a key of `KINDS`; every number, or entry of a tuple, is within `low` and `high` (exclusive with
    `open_high`); `choices` lists the values of a string, `may_be_empty` allows (). `resumable` fields may change when a
    run is resumed; `is_path` ones are read by `paths.resolved`.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None
    open_high: bool = False
    choices: tuple[str, ...] = ()
    may_be_empty: bool = False
    resumable: bool = False
    is_path: bool = False

    @property
    def range_text(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        if self.low is None:
            return ""
        low, high = (str(end) if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"[{low}, {high}{')' if self.open_high else ']'}"

    def holds(self, number: float) -> bool:
        return self.low <= number <= self.high and not (self.open_high and number == self.high)


def _stage_fields(stage: str, what: str, *, steps: int, batch_size: int, rate: float, warmup: int) -> tuple[Field, ...]:
    group = f"stages.{stage}"
    return (
        Field(f"{group}.steps", "int", steps, f"updates of the {what} stage; 0 skips it", low=0, high=STEPS),
        Field(
            f"{group}.batch_size",
            "int",
            batch_size,
            "prompts (images) per update, B, over all devices",
            low=1,
            high=SIZE,
        ),
        Field(
            f"{group}.micro_batches",
            "int",
            1,
            "parts of B whose gradients are accumulated; lowers memory",
            low=1,
            high=SIZE,
        ),
        Field(f"{group}.learning_rate", "float", rate, "peak AdamW learning rate", low=0, high=10),
        Field(
            f"{group}.warmup_steps",
            "int",
            warmup,
            "updates of linear warm-up; the first has 1 / warmup_steps of the rate",
            low=0,
            high=STEPS,
        ),
        Field(f"{group}.schedule", "str", "constant", "learning rate after warm-up", choices=("constant", "cosine")),
        Field(f"{group}.freeze", "str", "", "regex searched in parameter paths; matches are not trained; empty = none"),
        Field(
            f"{group}.eval_every",
            "int",
            0,
            "updates between evaluations on held-out images; 0 = ends only",
            low=0,
            high=STEPS,
        ),
    )


FIELDS: tuple[Field, ...] = (
    Field("name", "str", "", "label of the run in reports and logs; empty = the workdir's name"),
    Field("seed", "int", 0, "seed of initial parameters, data order and sampling", low=0, high=2**31 - 1),
    # model: the sizes are those of the random initialisation; a saved model brings its own, all but RUN_FIELDS.
    Field("model.family", "str", "llava", "architecture of the policy", choices=("llava", "qwen2_5_vl")),
    Field(
        "model.path", "str", "", "directory of a saved model; empty = random initialisation with the sizes below",
        is_path=True,
    ),
    Field("model.image_size", "int", 96, "height and width of the square input image, pixels", low=1, high=8192),
    Field(
        "model.patch_size", "int", 16, "height and width of a vision patch, pixels; divides image_size",
        low=1, high=8192,
    ),
    Field("model.vision_width", "int", 128, "features of a vision token", low=1, high=SIZE),
    Field("model.vision_layers", "int", 4, "vision transformer layers", low=1, high=1024),
    Field("model.vision_heads", "int", 4, "vision attention heads; divides vision_width", low=1, high=1024),
    Field("model.vision_mlp", "int", 512, "hidden features of the vision MLP", low=1, high=WIDE),
    Field(
        "model.feature_layer", "int", -2, "vision hidden state given to the decoder; -1 = last layer",
        low=-1024, high=1024,
    ),
    Field("model.width", "int", 128, "features of a decoder token, D", low=1, high=SIZE),
    Field("model.layers", "int", 4, "decoder layers, L", low=1, high=1024),
    Field("model.heads", "int", 4, "decoder query heads, N", low=1, high=1024),
    Field("model.kv_heads", "int", 4, "decoder key/value heads, M; divides heads", low=1, high=1024),
    Field("model.head_size", "int", 32, "features of a decoder head, H; even (rotary pairs)", low=2, high=1024),
    Field("model.mlp", "int", 384, "hidden features of the decoder MLP", low=1, high=WIDE),
    Field("model.rope_theta", "float", 10000.0, "base wavelength of the rotary positions", low=1, high=1e12),
    Field("model.norm_eps", "float", 1e-5, "added to the variance in RMSNorm and LayerNorm", low=1e-12, high=0.1),
    Field("model.tied_embeddings", "bool", False, "output projection = transposed token embedding"),
    Field("model.dtype", "str", "float32", "compute type; parameters stay float32", choices=("float32", "bfloat16")),
    Field(
        "model.remat", "str", "none", "activations recomputed in the backward pass", choices=("none", "full", "dots")
    ),
    Field(
        "model.attention",
        "str",
        "auto",
        "how whole sequences attend; auto: splash on TPU, dot_product (cuDNN) on GPU in bfloat16, else einsum",
        choices=("auto", "einsum", "dot_product", "splash"),
    ),
    Field(
        "model.logits_chunk", "int", 512, "tokens per device whose [V] logits exist at once, in the update",
        low=1, high=WIDE,
    ),
    Field(
        "model.prompt_tokens", "int", 48, "padded prompt length with image tokens, P; longer is refused",
        low=1, high=SIZE,
    ),
    Field("model.template", "str", "", "prompt text with {image} and {prompt}; empty = the family's own"),
    Field(
        "model.vocab", "int", 0, "rows of the token embedding, V; 0 = one per token of the tokenizer", low=0, high=WIDE
    ),
    Field("model.keep_unused", "bool", False, "keep vision layers behind feature_layer, to export them again (llava)"),
    Field("model.qkv_bias", "bool", False, "biases on the decoder's query, key and value projections"),
    # qwen2_5_vl only, from here to data
    Field(
        "model.mrope_section",
        "ints",
        (),
        "rotary frequencies per axis (time, height, width); their sum is head_size / 2",
        low=0,
        high=1024,
        may_be_empty=True,
    ),
    Field("model.window_size", "int", 112, "side of a vision attention window, pixels", low=1, high=8192),
    Field(
        "model.full_attention_layers",
        "ints",
        (),
        "vision layers (from 0) that attend to the whole image",
        low=0,
        high=1024,
        may_be_empty=True,
    ),
    Field("model.min_image_tokens", "int", 4, "image tokens below which a picture is enlarged", low=1, high=SIZE),
    Field("model.max_image_tokens", "int", 384, "image tokens above which a picture is shrunk, I", low=1, high=SIZE),
    Field(
        "model.max_aspect", "float", 4.0, "longest over shortest side from which wide_images applies", low=1, high=1000
    ),
    Field(
        "model.wide_images",
        "str",
        "letterbox",
        "pad pictures beyond max_aspect, or refuse them",
        choices=("letterbox", "reject"),
    ),
    # lora
    Field("lora.rank", "int", 0, "rank of the adapters; 0 = all parameters are trained", low=0, high=4096),
    Field("lora.alpha", "float", 32.0, "adapters are scaled by alpha / rank", low=1e-3, high=1e5),
    Field(
        "lora.targets",
        "str",
        "^decoder/layers/(q|k|v|o|gate|up|down)$",
        "regex searched in the paths of dense layers that get an adapter",
    ),
    Field("lora.base_dtype", "str", "bfloat16", "type of the frozen parameters", choices=("float32", "bfloat16")),
    # data
    Field(
        "data.name", "str", "scenes", "data set to train and evaluate on", choices=("scenes", "photos", "sharegpt4v")
    ),
    Field(
        "data.data_dir", "str", "~/.cache/balcap_jax",
        "where data sets are built and read; of photos: their folder, or a JSONL file; ~ is expanded", is_path=True,
    ),
    Field("data.train_size", "int", 4096, "training images to build", low=1, high=IMAGES),
    Field("data.validation_size", "int", 64, "validation images to build", low=1, high=IMAGES),
    Field("data.test_size", "int", 128, "test images to build", low=1, high=IMAGES),
    Field("data.captions_per_image", "int", 4, "captions with faults per training image, for SFT", low=1, high=1024),
    Field("data.seed", "int", 0, "seed of the built images and captions, of all splits", low=0, high=2**31 - 1),
    # data.name photos and sharegpt4v only, from here to prompt
    Field("data.validation_share", "float", 0.05, "share of the pictures for validation", low=0, high=0.5),
    Field("data.test_share", "float", 0.05, "share of the pictures for the test split", low=0, high=0.5),
    Field(
        "data.max_pixels", "int", 1_048_576, "pixels that a picture is shrunk to when it is read; 0 = as it is",
        low=0, high=WIDE * 6,
    ),
    Field("data.manual_dir", "str", "", "folder of the JSON and the image roots (sharegpt4v)", is_path=True),
    Field(
        "data.annotations", "str", "sharegpt4v_instruct_gpt4-vision_cap100k.json", "name of the JSON there (sharegpt4v)"
    ),
    Field("data.prompt", "str", "", "prompt for every image; empty = each sample's own"),
    Field("data.read_threads", "int", 2, "host threads that read images; 0 = none", low=0, high=1024, resumable=True),
    # stages
    Field("stages.order", "str", "sft,rl", "stages to run, comma-separated: vision, align, sft, rl"),
    *_stage_fields("vision", "vision pretraining", steps=600, batch_size=64, rate=2e-3, warmup=50),
    *_stage_fields("align", "alignment (references as targets)", steps=400, batch_size=16, rate=2e-3, warmup=20),
    *_stage_fields("sft", "supervised", steps=400, batch_size=32, rate=1e-3, warmup=20),
    *_stage_fields("rl", "reinforcement", steps=100, batch_size=16, rate=1e-4, warmup=5),
    # rollout
    Field(
        "rollout.group_size", "int", 8, "samples per prompt, G; a group needs at least 2 samples for rl",
        low=1, high=1024,
    ),
    Field("rollout.max_tokens", "int", 96, "longest response, tokens, R; longer ones are truncated", low=1, high=SIZE),
    Field(
        "rollout.buckets", "ints", (96,), "response lengths that updates are compiled for; last = max_tokens",
        low=1, high=SIZE,
    ),
    Field("rollout.temperature", "float", 1.0, "sampling temperature in training", low=0.01, high=100),
    Field("rollout.top_p", "float", 1.0, "nucleus: fewest tokens with this mass", low=1e-4, high=1),
    Field("rollout.top_k", "int", 0, "only the k likeliest tokens; 0 = all", low=0, high=WIDE),
    Field("rollout.eval_temperature", "float", 1.0, "sampling temperature in evaluations; 0 = greedy", low=0, high=100),
    # pipeline
    Field(
        "pipeline.depth", "int", 0,
        "batches sampled ahead in rl: 1 judges a batch beside the next one's rollout, and is one update off-policy",
        low=0, high=1,
    ),
    # rewards
    Field(
        "rewards.name", "str", "balcap",
        "balcap, caprl, rubicap, feedquill, lexical, text, or package.module:Class for one of your own",
    ),
    Field(
        "rewards.weights", "floats", (1.0, 1.0, 1.0),
        "weight per objective of the reward; of balcap: precision, recall, linguistic", low=0, high=1000,
    ),
    Field("rewards.pointability", "bool", True, "assertions must be pointable to count in precision (balcap)"),
    Field("rewards.draws", "int", 8, "questions drawn per caption (caprl); 0 = each one once", low=0, high=1024),
    Field(
        "rewards.length", "str", "none",
        "linear length penalty as one more objective: by rho, or a ramp in tokens or in reference words",
        choices=("none", "two_sided", "ramp", "ramp_reference"),
    ),
    Field("rewards.length_start", "int", 2048, "tokens up to which the ramp gives 1", low=0, high=WIDE),
    Field("rewards.length_end", "int", 3072, "tokens from which on the ramp gives 0", low=1, high=WIDE),
    Field("rewards.gate", "bool", True, "zero the linguistic reward outside the length band"),
    Field(
        "rewards.gate_low", "float", 0.5, "shortest caption in the band, words over reference words", low=0, high=1e6
    ),
    Field(
        "rewards.gate_high", "float", 2.0, "longest caption in the band, words over reference words", low=0, high=1e6
    ),
    # judge
    Field(
        "judge.name", "str", "oracle",
        "who judges captions: the rules of scenes, a model behind judge.endpoints, or one at judge.path on the mesh",
        choices=("oracle", "remote", "policy"),
    ),
    Field("judge.failure_rate", "float", 0.0, "share of oracle calls made to fail, as a drill", low=0, high=1),
    Field("judge.max_failure_rate", "float", 0.2, "share of failed calls above which the run stops", low=0, high=1),
    Field("judge.failure_window", "int", 20, "steps over which it is measured, at most those of rl", low=1, high=STEPS),
    # judge.name policy only, beside judge.max_tokens
    Field("judge.path", "str", "", "model directory of the judge, of ours or of Hugging Face", is_path=True),
    Field(
        "judge.scoring", "str", "generate",
        "written JSON answers, or probabilities of yes and no and of marks, one forward pass each",
        choices=("generate", "yes_no"),
    ),
    Field("judge.dtype", "str", "bfloat16", "compute and storage type of the judge", choices=("float32", "bfloat16")),
    Field("judge.batch_size", "int", 16, "questions at a time, rounded up to what the mesh divides", low=1, high=SIZE),
    Field(
        "judge.prompt_buckets", "ints", (1024, 2048, 4096),
        "prompt lengths that the judge is compiled for; longer prompts are failures", low=8, high=SIZE,
    ),
    # judge.name remote only, from here to advantage
    Field(
        "judge.endpoints", "str", "http://localhost:8000/v1",
        "OpenAI-compatible base URLs, comma-separated; URL*WEIGHT for shares of the calls", resumable=True,
    ),
    Field("judge.model", "str", "", "name of the model there; empty = the one that the endpoints list"),
    Field(
        "judge.api_key_env", "str", "", "environment variable that holds the key; empty = none is sent", resumable=True
    ),
    Field("judge.temperature", "float", 0.0, "sampling temperature of the judge", low=0, high=2),
    Field("judge.max_tokens", "int", 2048, "longest answer of the judge, tokens", low=16, high=SIZE),
    Field(
        "judge.concurrency", "int", 32, "requests under way at once, of all processes", low=1, high=4096, resumable=True
    ),
    Field(
        "judge.rpm", "int", 0, "requests a minute to each endpoint, of all processes; 0 = no limit",
        low=0, high=IMAGES, resumable=True,
    ),
    Field(
        "judge.tpm", "int", 0, "tokens a minute to each endpoint, of all processes; 0 = no limit",
        low=0, high=2_000_000_000, resumable=True,
    ),
    Field(
        "judge.deadline", "float", 180.0, "seconds from a question's first request to its answer, retries included",
        low=0.1, high=86_400, resumable=True,
    ),
    Field("judge.timeout", "float", 60.0, "seconds of one request", low=0.1, high=86_400, resumable=True),
    Field(
        "judge.retries", "int", 4, "requests after a first that failed; asked to wait (429) counts as none",
        low=0, high=100, resumable=True,
    ),
    Field(
        "judge.cache_dir", "str", "~/.cache/balcap_jax/judge",
        "where answers are kept, on a disk of this machine; empty = nowhere", resumable=True, is_path=True,
    ),
    Field(
        "judge.cache_gb", "float", 2.0, "size above which answers not used for longest go, GB",
        low=0.001, high=1e6, resumable=True,
    ),
    Field("judge.price_in", "float", 0.0, "price of a million tokens of questions", low=0, high=1e6, resumable=True),
    Field("judge.price_out", "float", 0.0, "price of a million tokens of answers", low=0, high=1e6, resumable=True),
    Field(
        "judge.max_cost", "float", 0.0, "the run saves and stops when its judge has cost this; 0 = no limit",
        low=0, high=1e9, resumable=True,
    ),
    # advantage
    Field(
        "advantage.estimator",
        "str",
        "c_gdpo",
        "how K rewards become one advantage",
        choices=("c_gdpo", "gdpo", "grpo", "dr_grpo", "rloo"),
    ),
    Field(
        "advantage.batch_norm",
        "str",
        "sequence",
        "second normalisation, over the batch (GDPO family)",
        choices=("sequence", "none"),
    ),
    Field("advantage.eps_group", "float", 1e-4, "added to the std of a group", low=0, high=1),
    Field("advantage.eps_batch", "float", 1e-4, "added to the std of the batch", low=0, high=1),
    Field("advantage.ddof", "int", 1, "0 = population std, 1 = sample std", low=0, high=1),
    Field("advantage.exclude_truncated", "bool", False, "leave truncated responses out of groups and loss"),
    # loss
    Field(
        "loss.clip_low",
        "float",
        0.2,
        "ratio is clipped below 1 - clip_low",
        low=1e-4,
        high=1,
        open_high=True,
    ),
    Field("loss.clip_high", "float", 0.2, "ratio is clipped above 1 + clip_high", low=1e-4, high=100),
    Field(
        "loss.normaliser",
        "str",
        "sequence",
        "mean of token means, mean over all tokens, or sum over a constant",
        choices=("sequence", "token", "constant"),
    ),
    Field(
        "loss.kl_coef", "float", 0.0, "weight of the k3 KL to the policy at the stage's start; 0 = off",
        low=0, high=1000,
    ),
    Field("loss.log_ratio_clamp", "float", 20.0, "log-ratios are clamped to +- this before exp", low=0.1, high=80),
    # optim
    Field("optim.b1", "float", 0.9, "AdamW first-moment decay", low=0, high=0.9999),
    Field("optim.b2", "float", 0.95, "AdamW second-moment decay", low=0, high=0.99999),
    Field("optim.eps", "float", 1e-8, "AdamW denominator epsilon", low=1e-20, high=1),
    Field("optim.weight_decay", "float", 0.0, "AdamW decoupled weight decay", low=0, high=10),
    Field("optim.clip_norm", "float", 1.0, "gradients are scaled down to this global norm", low=1e-6, high=1e9),
    Field("optim.mu_dtype", "str", "float32", "type of AdamW's first moments", choices=("float32", "bfloat16")),
    Field(
        "optim.frozen_dtype",
        "str",
        "float32",
        "type that parameters which a stage freezes are kept in; with LoRA it is lora.base_dtype",
        choices=("float32", "bfloat16"),
    ),
    Field("optim.max_nonfinite", "int", 3, "skipped non-finite updates in a row that stop the run", low=1, high=STEPS),
    # mesh
    Field(
        "mesh.replica", "int", 1, "devices along replica (across slices); here and below, -1 = all that are left",
        low=-1, high=SIZE,
    ),
    Field("mesh.data", "int", -1, "devices along data", low=-1, high=SIZE),
    Field("mesh.fsdp", "int", 1, "devices that parameters are sharded over", low=-1, high=SIZE),
    Field("mesh.tensor", "int", 1, "devices that heads and MLP features are split over", low=-1, high=SIZE),
    # checkpoint
    Field(
        "checkpoint.every", "int", 50, "updates between checkpoints; 0 = only at stage ends",
        low=0, high=STEPS, resumable=True,
    ),
    Field(
        "checkpoint.keep", "int", 2, "newest checkpoints kept, besides the stage ends",
        low=1, high=STEPS, resumable=True,
    ),
    Field(
        "checkpoint.best_metric", "str", "",
        "keep what scores best in it on greedy captions of validation images, every stages.rl.eval_every updates: "
        "b_capscore, an objective, with scenes dcscore, captionqa, arena; empty = none",
    ),
    Field(
        "checkpoint.asynchronous", "bool", False,
        "write while training goes on; a power cut then loses up to two times checkpoint.every updates, not one",
        resumable=True,
    ),
    # log
    Field("log.every", "int", 1, "updates between lines of metrics.jsonl", low=1, high=STEPS, resumable=True),
    Field("log.samples_every", "int", 20, "updates between saved captions; 0 = off", low=0, high=STEPS, resumable=True),
    Field("log.tensorboard", "bool", True, "write TensorBoard events", resumable=True),
    Field("log.wandb", "str", "", "Weights & Biases project; empty = off", resumable=True),
    Field("log.eval_images", "int", 48, "held-out images of an evaluation", low=1, high=IMAGES),
    Field("log.eval_samples", "int", 4, "captions per image of an evaluation", low=1, high=1024),
)  # fmt: skip
