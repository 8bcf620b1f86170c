"""The groups of a configuration: every field with its type, default, range and meaning, and what fields demand.

The meaning is the field's description, or the text below a field whose line is full.
"""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from balcap_jax.cli.errors import shown
from balcap_jax.config import flaws
from balcap_jax.config.fields import (
    IMAGES,
    SIZE,
    WIDE,
    Amount,
    CountOrAuto,
    Devices,
    Dtype,
    Few,
    FewOrNone,
    Group,
    Images,
    Path,
    Pixels,
    PromptSize,
    Resumable,
    Scale,
    Seconds,
    Seed,
    Share,
    Size,
    SomeSteps,
    Steps,
    Text,
    Weight,
    Wide,
    WideOrNone,
)
from balcap_jax.config.lists import parse_endpoints, parse_shares
from balcap_jax.config.packed import UNIT, WORTH

STAGES = ("vision", "align", "sft", "rl")
"""Stages that `stages.order` may name."""

DATA_DIR = "~/.cache/balcap_jax"
_LEAST = 0.01  # of a temperature or of the largest weight: below, fp32 and the epsilons decide the result
# Deliberately narrow: a key that was given in place of a variable's name must not look like one.
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


def _regex_problems(text: str) -> Iterator[str]:
    try:
        re.compile(text)
    except re.error as error:
        yield f"is no regular expression: {error}, got {text!r}"


class Model(Group):
    """The sizes are those of the random initialisation; a saved model brings its own, all but RUN_FIELDS."""

    family: Literal["llava", "qwen2_5_vl", "qwen3_vl"] = Field("llava", description="architecture of the policy")
    path: Path = Field("", description="directory of a saved model; empty = random initialisation with the sizes below")
    image_size: Pixels = Field(96, description="height and width of the square input image, pixels")
    patch_size: Pixels = Field(16, description="height and width of a vision patch, pixels; divides image_size")
    vision_width: Size = Field(128, description="features of a vision token")
    vision_layers: Few = Field(4, description="vision transformer layers")
    vision_heads: Few = Field(4, description="vision attention heads; divides vision_width")
    vision_mlp: Wide = Field(512, description="hidden features of the vision MLP")
    feature_layer: int = Field(-2, ge=-1024, le=1024)
    """vision hidden state given to the decoder; -1 = last layer"""
    decoder_path: Path = ""
    """directory of a language model, a Llama, that is the decoder of a new policy (llava); empty = random"""
    width: Size = Field(128, description="features of a decoder token, D")
    layers: Few = Field(4, description="decoder layers, L")
    heads: Few = Field(4, description="decoder query heads, N")
    kv_heads: Few = Field(4, description="decoder key/value heads, M; divides heads")
    head_size: int = Field(32, ge=2, le=1024, description="features of a decoder head, H; even (rotary pairs)")
    mlp: Wide = Field(384, description="hidden features of the decoder MLP")
    rope_theta: float = Field(1e4, ge=1, le=1e12, description="base wavelength of the rotary positions")
    norm_eps: float = Field(1e-5, ge=1e-12, le=0.1, description="added to the variance in RMSNorm and LayerNorm")
    tied_embeddings: bool = Field(False, description="output projection = transposed token embedding")
    dtype: Dtype = Field("float32", description="compute type; parameters stay float32")
    remat: Literal["none", "full", "dots"] = Field("none", description="activations recomputed in the backward pass")
    attention: Literal["auto", "einsum", "dot_product", "splash"] = "auto"
    """how whole sequences attend; auto: splash on TPU where nothing is packed, cuDNN on GPU in bfloat16, else einsum"""
    logits_chunk: Wide = Field(512, description="tokens per device whose [V] logits exist at once, in the update")
    prompt_tokens: Size = Field(48, description="padded prompt length with image tokens, P; longer is refused")
    template: Text = Field("", description="prompt text with {image} and {prompt}; empty = the family's own")
    vocab: WideOrNone = Field(0, description="rows of the token embedding, V; 0 = one per token of the tokenizer")
    keep_unused: bool = False
    """keep vision layers behind feature_layer, to export them again (llava)"""
    qkv_bias: bool = Field(False, description="biases on the decoder's query, key and value projections")
    # qwen2_5_vl and qwen3_vl only, from here on
    mrope_section: tuple[FewOrNone, ...] = ()
    """rotary frequencies per axis (time, height, width); their sum is head_size / 2"""
    window_size: Pixels = Field(112, description="side of a vision attention window, pixels (qwen2_5_vl)")
    full_attention_layers: tuple[FewOrNone, ...] = ()
    """vision layers (from 0) that attend to the whole image (qwen2_5_vl)"""
    vision_positions: Wide = Field(2304, description="learned vision positions, a square number (qwen3_vl)")
    deepstack_layers: tuple[FewOrNone, ...] = ()
    """vision layers (from 0) whose features the first decoder layers add (qwen3_vl)"""
    min_image_tokens: Size = Field(4, description="image tokens below which a picture is enlarged")
    max_image_tokens: Size = Field(384, description="image tokens above which a picture is shrunk, I")
    max_aspect: float = Field(4.0, ge=1, le=1000)
    """longest over shortest side from which wide_images applies"""
    wide_images: Literal["letterbox", "reject"] = "letterbox"
    """pad pictures beyond max_aspect, or refuse them"""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.decoder_path and (self.path or self.family != "llava"):
            other = "model.path names a whole model" if self.path else f"model.family is {self.family!r}, not 'llava'"
            yield (
                "model.decoder_path",
                f"is the decoder of a new policy of the family llava, and {other}; leave one out",
            )
        if self.path:
            return
        fixed_size = self.family == "llava"  # Others resize an image to what its own size asks for.
        divisors = [("vision_width", "vision_heads"), ("heads", "kv_heads")]
        for name, divisor in [("image_size", "patch_size"), *divisors] if fixed_size else divisors:
            size, part = getattr(self, name), getattr(self, divisor)
            if size % part:
                yield f"model.{name}", f"({size}) must be divisible by model.{divisor} ({part})"
        if self.head_size % 2:
            yield "model.head_size", f"must be even for rotary positions, got {self.head_size}"
        layers, image_tokens, why = self.vision_layers, self.max_image_tokens, "max_image_tokens"
        if fixed_size:
            if not 1 <= abs(self.feature_layer) <= layers:
                ends = f"[-{layers}, -1] or [1, {layers}]"
                yield "model.feature_layer", f"must be in {ends} for {layers} vision layers, got {self.feature_layer}"
            image_tokens, why = (self.image_size // self.patch_size) ** 2, "image_size / patch_size, squared"
        if self.prompt_tokens <= image_tokens:
            demand = f"leaves no room for text beside the {image_tokens} image tokens ({why})"
            yield "model.prompt_tokens", f"({self.prompt_tokens}) {demand}"


class Lora(Group):
    rank: int = Field(0, ge=0, le=4096, description="rank of the adapters; 0 = all parameters are trained")
    alpha: float = Field(32.0, ge=1e-3, le=1e5, description="adapters are scaled by alpha / rank")
    targets: Text = "^decoder/layers/(q|k|v|o|gate|up|down)$"
    """regex searched in the paths of dense layers that get an adapter"""
    base_dtype: Dtype = Field("bfloat16", description="type of the frozen parameters")

    def problems(self) -> Iterator[tuple[str, str]]:
        for problem in _regex_problems(self.targets) if self.rank else ():
            yield "lora.targets", problem


class Data(Group):
    name: Literal["scenes", "photos", "sharegpt4v", "parquet"] = Field("scenes", description="data set of the run")
    data_dir: Path = Field(DATA_DIR, description="where data sets are built, or photos or parquet files lie")
    train_size: Images = Field(4096, description="training images to build")
    validation_size: Images = Field(64, description="validation images to build")
    test_size: Images = Field(128, description="test images to build")
    captions_per_image: Few = Field(4, description="captions of the base captioner per training image, for SFT")
    seed: Seed = Field(0, description="seed of the built images and captions, of all splits")
    captioner: Literal["habits", "moods", "padding"] = "habits"
    """who writes the captions that sft imitates: habits; moods that trade objectives; habits and remarks as padding"""
    # not of scenes, from here on
    validation_share: float = Field(0.05, ge=0, le=0.5, description="share of the pictures for validation")
    test_share: float = Field(0.05, ge=0, le=0.5, description="share of the pictures for the test split")
    max_pixels: int = Field(1_048_576, ge=0, le=6 * WIDE)
    """pixels that a picture is shrunk to when it is read; 0 = as it is"""
    manual_dir: Path = Field("", description="folder of the JSON and image roots (sharegpt4v); root of other paths")
    annotations: Text = Field("sharegpt4v_instruct_gpt4-vision_cap100k.json", description="name of the JSON there")
    columns: Text = Field(
        "", description="FIELD=COLUMN,... or a data set of docs/data.md (parquet, JSONL); empty = own names"
    )
    units: Path = Field("", description="JSONL of recaption: references, units, rubrics; joined by picture")
    prompt: Text = Field("", description="prompt for every image; empty = each sample's own")
    read_threads: Resumable[FewOrNone] = Field(2, description="host threads that read images; 0 = none")


class Stage(Group):
    steps: Steps = Field(description="updates of the {stage} stage; 0 skips it")
    batch_size: Size = Field(description="prompts (images) per update, B, over all devices")
    micro_batches: Size = Field(1, description="parts of B whose gradients are accumulated; lowers memory")
    learning_rate: float = Field(ge=0, le=10, description="peak AdamW learning rate")
    warmup_steps: Steps = Field(description="updates of linear warm-up; the first has 1 / warmup_steps of the rate")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after warm-up")
    freeze: Text = Field("", description="regex searched in parameter paths; matches are not trained; empty = none")
    eval_every: Steps = Field(0, description="updates between evaluations on held-out images; 0 = ends only")


class Stages(Group):
    order: Text = Field("sft,rl", description="stages to run, comma-separated: vision, align, sft, rl")
    vision: Stage = Stage(steps=600, batch_size=64, learning_rate=2e-3, warmup_steps=50)
    """vision pretraining"""
    align: Stage = Stage(steps=400, batch_size=16, learning_rate=2e-3, warmup_steps=20)
    """alignment (references as targets)"""
    sft: Stage = Field(Stage(steps=400, batch_size=32, learning_rate=1e-3, warmup_steps=20), description="supervised")
    rl: Stage = Field(Stage(steps=100, batch_size=16, learning_rate=1e-4, warmup_steps=5), description="reinforcement")

    @property
    def names(self) -> tuple[str, ...]:
        """Stages to run, in order."""
        return tuple(part.strip() for part in self.order.split(","))

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in self.names:
            if name not in STAGES:
                yield "stages.order", f"names the stage {name!r}; stages are {', '.join(STAGES)}"
            stage = getattr(self, name)
            size, parts, steps, warmup = stage.batch_size, stage.micro_batches, stage.steps, stage.warmup_steps
            if size % parts:
                yield (
                    f"stages.{name}.batch_size",
                    f"({size}) must be divisible by stages.{name}.micro_batches ({parts})",
                )
            if stage.schedule == "cosine" and 0 < steps <= warmup:
                raise ValueError(
                    f"config fields 'stages.{name}.steps' ({steps}) and 'stages.{name}.warmup_steps' ({warmup}) do not "
                    "fit: the cosine schedule needs more steps than its warm-up; raise the one or lower the other"
                )
            for problem in _regex_problems(stage.freeze):
                yield f"stages.{name}.freeze", problem
        if len(set(self.names)) < len(self.names):
            yield "stages.order", f"names a stage twice, got {self.order!r}"


class Rollout(Group):
    group_size: Few = Field(8, description="samples per prompt, G; a group needs at least 2 samples for rl")
    max_tokens: Size = Field(96, description="longest response, tokens, R; longer ones are truncated")
    buckets: tuple[Size, ...] = Field((96,), min_length=1)
    """response lengths that updates are compiled for; last = max_tokens"""
    token_buckets: tuple[Size, ...] = ()
    """tokens per response, on average in what a device has at once, that packed updates hold; empty = padded alone"""
    temperature: float = Field(1.0, ge=0.01, le=100, description="sampling temperature in training")
    top_p: float = Field(1.0, ge=1e-4, le=1, description="nucleus: fewest tokens with this mass")
    top_k: WideOrNone = Field(0, description="only the k likeliest tokens; 0 = all")
    eval_temperature: float = Field(1.0, ge=0, le=100, description="sampling temperature in evaluations; 0 = greedy")
    parts: Resumable[CountOrAuto] = 1
    """parts of B sampled one after the other: the cache holds one; auto = as few as fit (1 if memory is unknown)"""
    refill: Resumable[bool] = False
    """with parts: a row whose response has ended takes the batch's next one, and all prompts' keys are held at once"""

    def problems(self) -> Iterator[tuple[str, str]]:
        if sorted(set(self.buckets)) != list(self.buckets):
            yield "rollout.buckets", f"must be ascending, got {self.buckets}"
        if self.buckets[-1] != self.max_tokens:
            fitting = (*(bucket for bucket in self.buckets if bucket < self.max_tokens), self.max_tokens)
            hint = f"try --config.rollout.buckets={','.join(map(str, fitting))}"
            yield "rollout.buckets", f"must end with rollout.max_tokens ({self.max_tokens}), got {self.buckets}; {hint}"
        if sorted(set(self.token_buckets)) != list(self.token_buckets):
            yield "rollout.token_buckets", f"must be ascending, got {self.token_buckets}"
        taken = tuple(bucket for bucket in self.token_buckets if UNIT <= bucket <= WORTH * self.max_tokens)
        if taken != self.token_buckets:
            why = f"a response takes {UNIT} tokens or more, and above {WORTH:g} of that limit padding is cheaper"
            problem = f"would compile an update that no batch takes, got {self.token_buckets} with rollout.max_tokens"
            hint = f"try --config.rollout.token_buckets={','.join(map(str, taken))}"
            yield "rollout.token_buckets", f"{problem} ({self.max_tokens}): {why}; {hint}"
        if self.refill and self.parts == 1:
            yield "rollout.refill", "is True, but one part has a row for each response; set rollout.parts to auto or 2"
        if 0 < self.eval_temperature < _LEAST:
            yield "rollout.eval_temperature", f"must be 0 (greedy) or at least {_LEAST:g}, got {self.eval_temperature}"


class Pipeline(Group):
    depth: int = Field(0, ge=0, le=1)
    """batches sampled ahead in rl: 1 judges a batch beside the next one's rollout, and is one update off-policy"""


class Rewards(Group):
    name: Text = "balcap"
    """balcap, caprl, rubicap, feedquill, arena, balcap_arena, lexical, text, or your own package.module:Class"""
    weights: tuple[Weight, ...] = Field((1.0, 1.0, 1.0), min_length=1)
    """weight per objective of the reward; of balcap: precision, recall, linguistic"""
    scales: tuple[Scale, ...] = ()
    """factor on each objective's score before advantages, as of a judge with marks of another range; empty = ones"""
    pointability: bool = Field(True, description="assertions must be pointable to count in precision (balcap)")
    draws: FewOrNone = Field(8, description="questions drawn per caption (caprl); 0 = each one once")
    opponents: Few = Field(2, description="captions of its group that each one is shown before (arena)")
    length: Literal["none", "two_sided", "ramp", "ramp_reference"] = "none"
    """linear length penalty as one more objective: by rho, or a ramp in tokens or in reference words"""
    length_start: WideOrNone = Field(2048, description="tokens up to which the ramp gives 1")
    length_end: Wide = Field(3072, description="tokens from which on the ramp gives 0")
    gate: bool = Field(True, description="zero the linguistic reward outside the length band")
    gate_low: Amount = Field(0.5, description="shortest caption in the band, words over reference words")
    gate_high: Amount = Field(2.0, description="longest caption in the band, words over reference words")

    def problems(self) -> Iterator[tuple[str, str]]:
        for start, end in (("gate_low", "gate_high"), ("length_start", "length_end")):
            low, high = getattr(self, start), getattr(self, end)
            if not low < high:
                yield f"rewards.{start}", f"({low}) must be less than rewards.{end} ({high})"
        if max(self.weights) < _LEAST:
            yield "rewards.weights", f"must have a weight above 0 (at least {_LEAST:g}), got {self.weights}"


class Judge(Group):
    name: Literal["oracle", "remote", "policy"] = "oracle"
    """who judges captions: the rules of scenes, a model behind judge.endpoints, or one at judge.path on the mesh"""
    failure_rate: Share = Field(0.0, description="share of oracle calls made to fail, as a drill")
    max_failure_rate: Share = Field(0.2, description="share of failed calls above which the run stops")
    failure_window: SomeSteps = Field(20, description="steps over which it is measured, at most those of rl")
    flaws: Text = ""
    """what is wrong on purpose with the oracle that train asks, such as false_accept:0.2,coarse:3; empty = nothing"""
    votes: Few = Field(1, description="votes on each question with flaws; the majority decides, the mean of scores")
    ask: Text = ""
    """shares of a group's captions that train asks each question about, such as precision:0.5; empty = all"""
    # of the policy only, beside max_tokens
    path: Path = Field("", description="model directory of the judge")
    scoring: Literal["generate", "yes_no"] = "generate"
    """written JSON answers, or probabilities of yes and no and of marks, one forward pass each"""
    dtype: Dtype = Field("bfloat16", description="compute and storage type of the judge")
    batch_size: Size = Field(16, description="questions at a time, rounded up to what the mesh divides")
    prompt_buckets: tuple[PromptSize, ...] = Field((1024, 2048, 4096), min_length=1)
    """prompt lengths that the judge is compiled for; longer prompts are failures"""
    # of remote only, from here on
    endpoints: Resumable[Text] = "http://localhost:8000/v1"
    """OpenAI-compatible base URLs, comma-separated; URL*WEIGHT for shares of the calls; empty = to be given"""
    model: Text = Field("", description="name of the model there; empty = the one that the endpoints list")
    api_key_env: Resumable[Text] = ""
    """environment variable that holds the key; empty = none is sent"""
    temperature: float = Field(0.0, ge=0, le=2, description="sampling temperature of the judge")
    max_tokens: int = Field(2048, ge=16, le=SIZE, description="longest answer of the judge, tokens")
    concurrency: Resumable[int] = Field(32, ge=1, le=4096, description="requests under way at once, of all processes")
    rpm: Resumable[int] = Field(0, ge=0, le=IMAGES)
    """requests a minute to each endpoint, of all processes; 0 = no limit"""
    tpm: Resumable[int] = Field(0, ge=0, le=2_000_000_000)
    """tokens a minute to each endpoint, of all processes; 0 = no limit"""
    deadline: Resumable[Seconds] = 180.0
    """seconds from a question's first request to its answer, retries included"""
    timeout: Resumable[Seconds] = Field(60.0, description="seconds of one request")
    retries: Resumable[int] = Field(4, ge=0, le=100)
    """requests after a first that failed; asked to wait (429) counts as none"""
    cache_dir: Resumable[Path] = "~/.cache/balcap_jax/judge"
    """where answers are kept, on a disk of this machine; empty = nowhere"""
    cache_gb: Resumable[float] = Field(2.0, ge=0.001, le=1e6)
    """size above which answers not used for longest go, GB"""
    price_in: Resumable[Amount] = Field(0.0, description="price of a million tokens of questions")
    price_out: Resumable[Amount] = Field(0.0, description="price of a million tokens of answers")
    max_cost: Resumable[float] = Field(0.0, ge=0, le=1e9)
    """the run saves and stops when its judge has cost this; 0 = no limit"""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.failure_rate and self.name != "oracle":
            yield "judge.failure_rate", f"is for the oracle judge only, and judge.name is {self.name!r}"
        try:
            parse_shares(self.ask)
        except ValueError as error:
            yield "judge.ask", str(error)
        yield from flaws.problems(self.flaws, self.votes, self.name, self.failure_rate, self.max_failure_rate)
        if self.name == "policy" and sorted(set(self.prompt_buckets)) != list(self.prompt_buckets):
            yield "judge.prompt_buckets", f"must be ascending, got {self.prompt_buckets}"
        if self.name == "policy" and not self.path:
            yield "judge.path", "is empty: the judge 'policy' needs the directory of its model"
        if self.name != "remote":
            return
        try:  # An empty list is an error once somebody is to be asked.
            _ = self.endpoints.strip() and parse_endpoints(self.endpoints)
        except ValueError as error:
            yield "judge.endpoints", str(error)
        if self.api_key_env and not _VARIABLE.fullmatch(self.api_key_env):
            hint = "it is not shown here, in case it is a key, which belongs into that variable"
            demand = "must be the name of an environment variable in capitals, such as OPENAI_API_KEY"
            yield "judge.api_key_env", f"{demand}; {hint}"
        if self.model != self.model.strip():
            yield "judge.model", f"has blanks around it, got {self.model!r}"
        if self.timeout > self.deadline:
            most = f"judge.deadline ({self.deadline:g} s, all retries included)"
            yield "judge.timeout", f"({self.timeout:g} s of one request) is more than {most}"
        if self.max_cost and not (self.price_in or self.price_out):
            yield "judge.max_cost", "needs prices: set judge.price_in and judge.price_out"


class Advantage(Group):
    estimator: Literal["c_gdpo", "gdpo", "grpo", "dr_grpo", "rloo", "best_of"] = "c_gdpo"
    """how K rewards become one advantage; best_of: imitate the best caption of each group of the policy at the start"""
    aggregation: Literal["sum", "soft_min", "conflict"] = "sum"
    """how the z-scores of K objectives become one (GDPO family): their sum; RVPO's soft minimum; GD2PO's sum without
    the rollouts on which the objectives disagree"""
    kappa: float = Field(1.0, ge=0.01, le=100, description="how close soft_min is to the minimum; small = the mean")
    batch_norm: Literal["sequence", "none"] = "sequence"
    """second normalisation, over the batch (GDPO family)"""
    eps_group: Share = Field(1e-4, description="added to the std of a group")
    eps_batch: Share = Field(1e-4, description="added to the std of the batch")
    ddof: int = Field(1, ge=0, le=1, description="0 = population std, 1 = sample std")
    exclude_truncated: bool = Field(False, description="leave truncated responses out of groups and loss")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.aggregation != "sum" and self.estimator not in ("c_gdpo", "gdpo"):
            why = f"needs z-scores of each objective, and advantage.estimator is {self.estimator!r}"
            yield (
                "advantage.aggregation",
                f"is {self.aggregation!r}, which {why}; take c_gdpo, or the aggregation 'sum'",
            )


class Loss(Group):
    clip_low: float = Field(0.2, ge=1e-4, lt=1, description="ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.2, ge=1e-4, le=100, description="ratio is clipped above 1 + clip_high")
    normaliser: Literal["sequence", "token", "constant"] = "sequence"
    """mean of token means, mean over all tokens, or sum over a constant"""
    kl_coef: float = Field(0.0, ge=0, le=1000)
    """weight of the k3 KL to the policy at the stage's start; 0 = off"""
    log_ratio_clamp: float = Field(20.0, ge=0.1, le=80, description="log-ratios are clamped to +- this before exp")


class Optim(Group):
    b1: float = Field(0.9, ge=0, le=0.9999, description="AdamW first-moment decay")
    b2: float = Field(0.95, ge=0, le=0.99999, description="AdamW second-moment decay")
    eps: float = Field(1e-8, ge=1e-20, le=1, description="AdamW denominator epsilon")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW decoupled weight decay")
    clip_norm: float = Field(1.0, ge=1e-6, le=1e9, description="gradients are scaled down to this global norm")
    mu_dtype: Dtype = Field("float32", description="type of AdamW's first moments")
    frozen_dtype: Dtype = "float32"
    """type that parameters which a stage freezes are kept in; with LoRA it is lora.base_dtype"""
    max_nonfinite: SomeSteps = Field(3, description="skipped non-finite updates in a row that stop the run")


class Mesh(Group):
    replica: Devices = 1
    """devices along replica (across slices); here and below, -1 = all that are left"""
    data: Devices = Field(-1, description="devices along data")
    fsdp: Devices = Field(1, description="devices that parameters are sharded over")
    tensor: Devices = Field(1, description="devices that heads and MLP features are split over")
    sampling: Resumable[CountOrAuto] = "auto"
    """devices that a matrix is split over while sampling; auto = what fits and reads and sends the fewest bytes"""

    def problems(self) -> Iterator[tuple[str, str]]:
        sizes = {axis: size for axis, size in self if axis != "sampling"}
        for axis, size in sizes.items():
            if size == 0:
                yield f"mesh.{axis}", f"must be >= 1, or -1 for all devices left, got {size}"
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one of the config fields 'mesh.*' may be -1, got {dict(sorted(sizes.items()))}")


class Checkpoint(Group):
    every: Resumable[Steps] = Field(50, description="updates between checkpoints; 0 = only at stage ends")
    keep: Resumable[SomeSteps] = Field(2, description="newest checkpoints kept, besides the stage ends")
    best_metric: Text = ""
    """keep what scores best in it on greedy captions of validation images, every stages.rl.eval_every updates:
    b_capscore, an objective, with scenes dcscore, captionqa, arena; empty = none"""
    asynchronous: Resumable[bool] = False
    """write while training goes on; a power cut then loses up to two times checkpoint.every updates, not one"""


class Log(Group):
    every: Resumable[SomeSteps] = Field(1, description="updates between lines of metrics.jsonl")
    samples_every: Resumable[Steps] = Field(20, description="updates between saved captions; 0 = off")
    tensorboard: Resumable[bool] = Field(True, description="write TensorBoard events")
    wandb: Resumable[Text] = Field("", description="Weights & Biases project, with tables of captions; empty = off")
    profile: Resumable[Text] = ""
    """first:last, the updates of which a trace is written for xprof, as metrics.jsonl counts them; empty = none"""
    eval_images: Images = Field(48, description="held-out images of an evaluation")
    eval_samples: Few = Field(4, description="captions per image of an evaluation")

    def problems(self) -> Iterator[tuple[str, str]]:
        ends = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", self.profile)
        if self.profile and not (ends and 1 <= int(ends[1]) <= int(ends[2])):
            demand = "must be first:last, two whole numbers of at most nine digits with 1 <= first <= last"
            yield "log.profile", f"{demand}, got {shown(self.profile)}"


class Config(Group):
    name: Text = Field("", description="label of the run in reports and logs; empty = the workdir's name")
    seed: Seed = Field(0, description="seed of initial parameters, data order and sampling")
    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    stages: Stages = Stages()
    rollout: Rollout = Rollout()
    pipeline: Pipeline = Pipeline()
    rewards: Rewards = Rewards()
    judge: Judge = Judge()
    advantage: Advantage = Advantage()
    loss: Loss = Loss()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def problems(self) -> Iterator[tuple[str, str]]:
        data, stages, order = self.data, self.stages, self.stages.names
        group_size, evaluates = self.rollout.group_size, stages.rl.eval_every
        if "rl" in order and group_size < 2:
            why = "because rl compares the samples of a prompt with each other"
            yield "rollout.group_size", f"is {group_size}: a group needs at least 2 samples, {why}"
        for name in order:
            size = getattr(stages, name).batch_size
            if data.name == "scenes" and size > data.train_size:
                yield f"stages.{name}.batch_size", f"({size}) is more than data.train_size ({data.train_size})"
        adapted = [name in ("sft", "rl") for name in order]
        if self.lora.rank and (not any(adapted) or adapted != sorted(adapted)):
            place = f"must be in config field 'stages.order' and come after all others, got {stages.order!r}"
            yield "lora.rank", f"is above 0: adapters are trained by sft and rl, which {place}"
        if self.checkpoint.best_metric and not (order[-1] == "rl" and evaluates):
            demand = "needs stages.rl.eval_every above 0, and rl as the last of stages.order"
            yield "checkpoint.best_metric", f"{demand}, got {evaluates} and {stages.order!r}"
        if data.name != "scenes" and "vision" in order:
            why = f"which learns from scene graphs: the data set {data.name!r} has none"
            yield "stages.order", f"names the stage vision, {why}; leave the stage out"
        if self.judge.name == "policy" and self.pipeline.depth:
            why = "a judge on the devices that sample has nothing to run beside"
            yield "pipeline.depth", f"is 1 and judge.name is policy: {why}; set pipeline.depth to 0"
