"""Where the seconds of a step go, and what sharing a prompt among its samples saves.

    python benchmarks/step_time.py               both parts, about 5 minutes on 2 CPU cores
    python benchmarks/step_time.py --small       half a minute, to see that it runs

Part `scenes`: the stages of configs/scenes.py on data of its own, seconds per step by phase, compile time apart. A
token is one of a caption; in the stage `vision`, one of an image.
Part `prefix`: one compiled RL update of a decoder of about 135M parameters, twice: as it is, and with every sample as
a prompt row of its own, so that the prompt is run (and kept) G times. Both are `train_step.make_rl_step` on the same
decoder with the same rematerialisation; only what they are given differs. Their gradients are compared before a time
is reported.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balcap_jax import data, judges, models, rewards
from balcap_jax.cli.arguments import CommandParser
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.config import recipes as configuration
from balcap_jax.data.input import make_dataset
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava import Llava
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.models.policy import Params, Prompt
from balcap_jax.parallel import sharding
from balcap_jax.train import STAGES
from balcap_jax.train_step import RLBatch, RLObjective, TrainState, init_state, make_rl_step
from balcap_jax.training.job import Job
from balcap_jax.training.progress import PhaseClock

RECIPE = Path(__file__).parents[1] / "configs" / "scenes.py"
# Gradients of the two paths differ by rounding alone: entries are sums of some thousand products in another order.
LARGEST_GRADIENT_ERROR = 1e-4


# ------------------------------------------------------------------------------------------------- part `scenes`


def time_stages(recipe: str, overrides: dict[str, str], steps: int, model: str) -> None:
    """Prints the median seconds per step of each stage by phase, tokens per second, and the compile time."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration.load(recipe, {"data.data_dir": folder, **overrides})
        splits = data.load(config.data, config.model.image_size)
        if model:
            policy, params, processor = models.load(model)
        else:
            policy, processor = models.build(config.model, splits.tokenizer)
            params = jax.jit(policy.init)(jax.random.key(config.seed))
        reward = rewards.build(config.rewards, judges.build(config.judge, config.seed))
        captions = f"of {model}" if model else "of an untrained policy: nearly all as long as rollout.max_tokens allows"
        print(f"captions {captions}\n")
        print(f"{'stage':6}  {'B':>3} {'G':>3}  {'s/step':>8}  {'by phase':58} {'tokens/s':>9}  {'compile s':>9}")
        groups = {"align": 1, "sft": config.data.captions_per_image, "rl": config.rollout.group_size}
        for name in configuration.stage_order(config):
            job = Job(config, sharding.make_mesh(config.mesh), policy, processor, reward, PhaseClock())
            settings = config.stages[name]
            stage = STAGES[name](job)
            state = stage.load({"state": stage.programs.start(params)})
            batches = make_dataset(splits.train, batch_size=settings.batch_size, seed=0, threads=0)
            # The first step compiles, and warms up what is not compiled.
            state, _, _ = stage.advance(state, next(batches), 1)
            compile_seconds = job.clock.totals()["compile"]
            seconds: list[dict[str, float]] = []
            tokens: list[float] = []
            for step in range(2, 2 + steps):
                batch = next(batches)
                job.clock.step()
                state, values, _ = stage.advance(state, batch, step)
                seconds.append(job.clock.step())
                tokens.append(values["tokens"])
            whole = statistics.median(sum(one.values()) for one in seconds)
            phases = [*stage.phases, "other"]
            shares = {phase: statistics.median(one[f"time/{phase}"] for one in seconds) for phase in phases}
            by_phase = "  ".join(f"{phase} {value:.3f}" for phase, value in shares.items())
            rate = statistics.median(tokens) / whole
            print(
                f"{name:6}  {settings.batch_size:3} {groups.get(name, '-'):>3}  {whole:8.3f}  {by_phase:58} {rate:9.0f}"
                f"  {compile_seconds:9.1f}",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------- part `prefix`


@dataclasses.dataclass(frozen=True)
class RepeatedPrefix:
    """The policy as most trainers run it: every sample is a sequence of its own, prompt and image included."""

    policy: Llava

    def log_probs(self, params: Params, prompt: Prompt, image_embeds, responses, *, temperature: float = 1.0):
        batch, group, length = responses.shape
        prompt, image_embeds = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), (prompt, image_embeds))
        rows = responses.reshape(batch * group, 1, length)
        found = self.policy.log_probs(params, prompt, image_embeds, rows, temperature=temperature)
        return found.reshape(batch, group, length)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of part `prefix`; `side`² image tokens are part of the P prompt tokens."""

    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_size: int = 64
    mlp: int = 1536
    vocab: int = 49152
    batch: int = 2
    group: int = 8
    prompt: int = 576
    side: int = 23
    response: int = 128
    logits_chunk: int = 128


SMALL = Shape(
    layers=2, width=64, heads=4, kv_heads=2, head_size=16, mlp=128, vocab=512, group=4, prompt=48, side=6, response=16
)


def make_inputs(shape: Shape, remat: str, dtype: str) -> tuple[Llava, Params, RLBatch]:
    """A policy of that shape with random parameters, and a random batch on whose tokens nothing is clipped."""
    # The tower is frozen and does not run: the update takes the rollout's image embeddings.
    tower = VisionConfig(image_size=shape.side, patch_size=1, width=8, layers=2, heads=1, mlp=8, dtype=dtype)
    language = DecoderConfig(
        vocab=shape.vocab,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        mlp=shape.mlp,
        tied_embeddings=True,
        dtype=dtype,
        remat=remat,
    )
    policy = Llava(
        tower,
        language,
        image_token=3,
        pad_token=0,
        end_tokens=(2,),
        forbidden=(0, 1, 3),
        logits_chunk=shape.logits_chunk,
    )
    rng = np.random.default_rng(0)
    b, g, r = shape.batch, shape.group, shape.response
    tokens = rng.integers(4, shape.vocab, (b, shape.prompt))
    tokens[:, 1 : 1 + policy.image_tokens] = policy.image_token
    prompt = Prompt(
        tokens.astype(np.int32),
        np.ones((b, shape.prompt), bool),
        np.tile(np.arange(shape.prompt, dtype=np.int32), (b, 1)),
        np.zeros((b, shape.side, shape.side, 3), np.uint8),
    )
    batch = RLBatch(
        prompt,
        rng.standard_normal((b, policy.image_tokens, shape.width)).astype(np.float32),
        rng.integers(4, shape.vocab, (b, g, r)).astype(np.int32),
        np.ones((b, g, r), bool),
        np.full((b, g, r), -np.log(shape.vocab), np.float32),
        rng.random((b, g, 1)).astype(np.float32),
        np.ones((b, g, 1), bool),
        np.full((b, g), 20),
        np.full(b, 20),
        np.zeros((b, g), bool),
    )
    return policy, jax.jit(policy.init)(jax.random.key(0)), jax.device_put(batch)


def time_prefix(shape: Shape, remat: str, dtype: str, repeats: int) -> None:
    """Prints seconds and temporaries of the update with a shared and with a repeated prefix.

    Raises:
      UserError: the gradients of the two disagree, so that their times are not those of one computation.
    """
    policy, params, batch = make_inputs(shape, remat, dtype)
    count = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
    print(
        f"decoder {count / 1e6:.1f}M parameters, {dtype}, remat {remat}; B {shape.batch}, G {shape.group}, "
        f"P {shape.prompt}, R {shape.response}, V {shape.vocab}, logits of {shape.logits_chunk} tokens at once",
        flush=True,
    )
    # Gradient descent that keeps the last gradient: it can be compared, and what is measured is the policy, not the
    # moments of an optimiser, which would add the same to both sides.
    optimizer = optax.GradientTransformation(
        lambda trained: jax.tree.map(jnp.zeros_like, trained),
        lambda gradient, _, trained=None: (jax.tree.map(lambda g: -1e-3 * g, gradient), gradient),
    )
    objective = RLObjective(("one",), (1.0,), (False,), max_tokens=shape.response, clip_low=0.99, clip_high=100.0)
    freeze = "^(vision|projector)/"
    programs, states, temporaries = {}, {}, {}
    for name, one in (("shared", policy), ("repeated", RepeatedPrefix(policy))):
        states[name] = init_state(jax.tree.map(jnp.copy, params), optimizer, freeze)
        start = time.perf_counter()
        programs[name] = make_rl_step(one, optimizer, objective, freeze=freeze).lower(states[name], batch).compile()
        compiled = time.perf_counter() - start
        memory = programs[name].memory_analysis()
        temporaries[name] = memory.temp_size_in_bytes if memory else float("nan")
        print(f"{name:9} compiled in {compiled:.1f} s, temporaries {temporaries[name] / 1e9:.3f} GB", flush=True)
    del params

    def update(name: str) -> float:
        start = time.perf_counter()
        states[name], _ = jax.block_until_ready(programs[name](states[name], batch))
        return time.perf_counter() - start

    seconds = {name: [update(name)] for name in programs}
    error = gradient_error(states["shared"], states["repeated"])
    print(f"largest gradient error {error:.1e} of each array's largest entry", flush=True)
    if not error < LARGEST_GRADIENT_ERROR:
        raise UserError(f"gradients differ by {error:.1e}, more than {LARGEST_GRADIENT_ERROR:g}; no times are reported")
    for _ in range(repeats - 1):
        for name in programs:
            seconds[name].append(update(name))

    tokens = shape.batch * shape.group * shape.response
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(states["shared"].opt_state))
    beside = {name: size - gradient for name, size in temporaries.items()}
    print(
        f"\n{'update':9} {'best s':>8} {'tokens/s':>9} {'temporaries GB':>15} {'beside the gradient':>20}  all runs, s"
    )
    for name, times in seconds.items():
        print(
            f"{name:9} {min(times):8.2f} {tokens / min(times):9.1f} {temporaries[name] / 1e9:15.3f}"
            f" {beside[name] / 1e9:20.3f}  {', '.join(f'{one:.2f}' for one in times)}"
        )
    print(
        f"shared prefix: {min(seconds['repeated']) / min(seconds['shared']):.2f}x as fast; "
        f"{beside['shared'] / beside['repeated']:.2f}x the temporaries beside the gradient, which both hold "
        f"({temporaries['shared'] / temporaries['repeated']:.2f}x with it)"
    )


def gradient_error(one: TrainState, other: TrainState) -> float:
    """The largest error of any gradient array, relative to its largest entry."""
    errors = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), one.opt_state, other.opt_state)
    return max(map(float, jax.tree.leaves(errors)))


# ------------------------------------------------------------------------------------------------- the command


def machine() -> str:
    """One line on what the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{processor}, {os.cpu_count()} cores; {jax.device_count()} jax device(s): {kinds}"


def load_average() -> str:
    return ", ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python benchmarks/step_time.py", description="Times training steps; see the head of the file."
    )
    parser.add_argument("--small", action="store_true", help="toy sizes: to see that it runs, not to quote")
    parser.add_argument("--only", choices=("scenes", "prefix"), help="one part alone")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="updates of part prefix; the best counts")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="timed steps of part scenes; the median counts"
    )
    parser.add_argument("--config", default=str(RECIPE), metavar="FILE.py", help="recipe of part scenes")
    parser.add_argument(
        "--model", default="", metavar="DIR", help="a trained model for part scenes, with its own lengths"
    )
    parser.add_argument(
        "--remat", default="full", choices=("none", "dots", "full"), help="of both sides of part prefix"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of part prefix")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.steps < 1:
        raise UserError("--repeats and --steps must be at least 1")
    # Compile times are those of a first run: nothing comes out of a cache.
    jax.config.update("jax_enable_compilation_cache", False)

    packages = ("jax", "jaxlib", "flax", "optax")
    print(f"command: {shlex.join(['python', 'benchmarks/step_time.py', *arguments])}")
    print(f"machine: {machine()}")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    print(f"versions: Python {platform.python_version()}, {versions}")
    print(f"load average before: {load_average()}", flush=True)
    start = time.perf_counter()
    if args.only != "prefix":
        print(f"\n--- scenes: {args.config}")
        time_stages(args.config, scenes_overrides(args), args.steps, args.model)
    if args.only != "scenes":
        print("\n--- prefix")
        time_prefix(SMALL if args.small else Shape(), args.remat, args.dtype, args.repeats)
    print(f"\nload average after: {load_average()}; {time.perf_counter() - start:.0f} s in all")


def scenes_overrides(args: argparse.Namespace) -> dict[str, str]:
    """As few pictures as the steps need; with --small, tiny batches and short captions too."""
    overrides = {"data.validation_size": "1", "data.test_size": "1"}
    if args.small:
        overrides |= {
            **{f"stages.{name}.batch_size": "4" for name in STAGES},
            "rollout.group_size": "2",
            "rollout.max_tokens": "8",
            "rollout.buckets": "8",
            "data.captions_per_image": "2",
        }
    config = configuration.load(args.config, overrides)
    largest = max(config.stages[name].batch_size for name in configuration.stage_order(config))
    return overrides | {"data.train_size": str(2 * largest)}


if __name__ == "__main__":
    main()
