"""How the time of an update and of a rollout grows with G, P, R and B, with a shared and with a repeated prefix.

    python benchmarks/scaling.py --out=scaling.json --plot=docs/figures/scaling.svg      4 minutes on 2 CPU cores
    python benchmarks/scaling.py --small                                        a minute, to see that it runs

One size is varied at a time. The decoder has SmolLM2-135M's width with 2 layers, and a vocabulary that keeps the ratio
of layers to output projection. "Repeated" is the same compiled step on B * G prompts with one sample each, which is how
trainers without a shared prefix run it. Everything is compiled and run once before the
first time is taken; then each round runs every point once, and the median counts.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peer import table, take_turns
from step_time import machine

from balcap_jax.cli.arguments import CommandParser
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import Prompt, TextPolicy
from balcap_jax.rollout import Sampling, example_keys, make_rollout
from balcap_jax.train_step import RLBatch, RLObjective, init_state, make_rl_step

FORMS = ("shared", "repeated")
WORK = ("update", "rollout")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompts B of P tokens, G samples of R tokens each."""

    B: int
    G: int
    P: int
    R: int


@dataclasses.dataclass(frozen=True)
class Sweep:
    decoder: DecoderConfig
    base: Sizes
    values: dict[str, tuple[int, ...]]

    def points(self) -> list[Sizes]:
        """The base with one size at a time replaced; each once."""
        varied = [
            dataclasses.replace(self.base, **{name: value}) for name, values in self.values.items() for value in values
        ]
        return list(dict.fromkeys([self.base, *varied]))


FULL = Sweep(
    DecoderConfig(3072, 576, 2, 9, 3, 64, 1536, tied_embeddings=True, remat="full"),
    Sizes(B=1, G=8, P=288, R=64),
    {"G": (2, 4, 8, 16), "P": (72, 288, 1152), "R": (16, 64, 256), "B": (1, 2, 4)},
)
SMALL = Sweep(
    DecoderConfig(256, 32, 1, 2, 1, 16, 64, tied_embeddings=True, remat="full"),
    Sizes(B=1, G=2, P=8, R=4),
    {"G": (2, 4), "P": (8,), "R": (4,), "B": (1,)},
)


def make_prompt(sizes: Sizes, vocab: int, form: str) -> Prompt:
    """[B, P] random prompts, or each of them G times."""
    tokens = np.random.default_rng(0).integers(1, vocab, (sizes.B, sizes.P)).astype(np.int32)
    if form == "repeated":
        tokens = np.repeat(tokens, sizes.G, axis=0)
    positions = np.tile(np.arange(sizes.P, dtype=np.int32), (len(tokens), 1))
    return Prompt(tokens, np.ones(tokens.shape, bool), positions, TextPolicy.no_images(len(tokens)))


def make_update(policy: TextPolicy, params: dict[str, Any], sizes: Sizes, form: str) -> Callable[[], float]:
    """The compiled update of one point, warmed up: `seconds = update()`."""
    rng = np.random.default_rng(1)
    prompt = make_prompt(sizes, policy.vocab, form)
    b = len(prompt.tokens)
    g, r = (1 if form == "repeated" else sizes.G), sizes.R
    batch = RLBatch(
        prompt,
        np.zeros((b, 1, policy.decoder.width), np.float32),
        rng.integers(1, policy.vocab, (b, g, r)).astype(np.int32),
        np.ones((b, g, r), bool),
        np.full((b, g, r), -np.log(policy.vocab), np.float32),
        rng.random((b, g, 1)).astype(np.float32),
        np.ones((b, g, 1), bool),
        np.full((b, g), 20),
        np.full(b, 20),
        np.zeros((b, g), bool),
    )
    # Dr.GRPO's advantages are defined for a group of one as well (0 there); an update costs the same whatever they are.
    objective = RLObjective(("one",), (1.0,), (False,), max_tokens=r, estimator="dr_grpo")
    optimizer = optax.sgd(1e-6)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, "")
    batch = jax.device_put(batch)
    program = make_rl_step(policy, optimizer, objective).lower(state, batch).compile()
    # Donated: the step consumes a state and returns the next.
    held = [jax.block_until_ready(program(state, batch))[0]]

    def update() -> float:
        start = time.perf_counter()
        held[0], _ = jax.block_until_ready(program(held[0], batch))
        return time.perf_counter() - start

    return update


def make_sampler(policy: TextPolicy, params: dict[str, Any], sizes: Sizes, form: str) -> Callable[[], float]:
    """The compiled rollout of one point, warmed up: `seconds = rollout()`."""
    prompt = make_prompt(sizes, policy.vocab, form)
    group = 1 if form == "repeated" else sizes.G
    keys = example_keys([str(row) for row in range(len(prompt.tokens))])
    inputs = jax.device_put((params, prompt, keys, np.uint32(0), np.uint32(0)))
    program = make_rollout(policy, Sampling(group, sizes.R)).lower(*inputs).compile()

    def rollout() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs).tokens)
        return time.perf_counter() - start

    rollout()
    return rollout


def measure(sweep: Sweep, rounds: int, wait: bool) -> list[dict[str, Any]]:
    """[{"work", "form", B, G, P, R, "seconds" (median), "runs"}] of every point."""
    policy = TextPolicy(sweep.decoder, pad_token=0, end_tokens=(-1,))  # no token ends a response
    params = jax.jit(policy.init)(jax.random.key(0))
    make = {"update": make_update, "rollout": make_sampler}
    keys = list(itertools.product(WORK, FORMS, sweep.points()))
    sides = {}
    for number, (work, form, sizes) in enumerate(keys):
        sides[f"{work} {form} B {sizes.B} G {sizes.G} P {sizes.P} R {sizes.R}"] = make[work](
            policy, params, sizes, form
        )
        print(f"{number + 1} of {len(keys)} programs ready", flush=True)
    runs = take_turns(sides, rounds, wait)
    return [
        {
            "work": work,
            "form": form,
            **dataclasses.asdict(sizes),
            "seconds": statistics.median(seconds),
            "runs": seconds,
        }
        for (work, form, sizes), seconds in zip(keys, runs.values(), strict=True)
    ]


def series(sweep: Sweep, results: list[dict[str, Any]], work: str, form: str, name: str) -> dict[int, float]:
    """{value of the size `name`: seconds}, the other sizes at their base."""
    base = dataclasses.asdict(sweep.base)
    others = {key: value for key, value in base.items() if key != name}
    found = {
        one[name]: one["seconds"]
        for one in results
        if (one["work"], one["form"]) == (work, form) and all(one[key] == value for key, value in others.items())
    }
    return {value: found[value] for value in sweep.values[name]}


def plot(sweep: Sweep, results: list[dict[str, Any]], path: Path) -> None:
    """One panel per size and kind of work, both axes logarithmic."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'balcap-jax[notebook]', or leave --plot out") from error
    plt.rcParams.update({"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 8})
    figure, axes = plt.subplots(len(WORK), len(sweep.values), figsize=(9, 4), sharey="row", layout="constrained")
    for row, work in zip(axes, WORK, strict=True):
        for axis, (name, values) in zip(row, sweep.values.items(), strict=True):
            for form, style in zip(FORMS, ("o-", "s--"), strict=True):
                axis.plot(*zip(*series(sweep, results, work, form, name).items(), strict=True), style, ms=3, label=form)
            axis.set(xscale="log", yscale="log", xlabel=name)
            axis.set_xticks(values, map(str, values))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{work}, s")
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python benchmarks/scaling.py", description="Time of update and rollout by size; see the head of the file."
    )
    parser.add_argument("--small", action="store_true", help="toy sizes: to see that it runs, not to quote")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="timed runs of each point; the median counts"
    )
    parser.add_argument("--out", default="", metavar="FILE.json", help="where the results go")
    parser.add_argument("--plot", default="", metavar="FILE", help="where the plot goes, .svg or .png")
    parser.add_argument("--wait", action="store_true", help="for Enter before each round: to quieten the machine first")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    sweep = SMALL if args.small else FULL

    packages = ("jax", "jaxlib", "flax", "optax")
    head = {
        "command": shlex.join(["python", "benchmarks/scaling.py", *arguments]),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "decoder": dataclasses.asdict(sweep.decoder),
    }
    print(json.dumps(head), flush=True)
    results = measure(sweep, args.rounds, args.wait)
    for work in WORK:
        rows = [(f"{work}, s", "size", *FORMS, "repeated / shared")]
        for name in sweep.values:
            both = [series(sweep, results, work, form, name) for form in FORMS]
            for value in sweep.values[name]:
                shared, repeated = (seconds[value] for seconds in both)
                rows.append((name, str(value), f"{shared:.3f}", f"{repeated:.3f}", f"{repeated / shared:.2f}"))
        print("\n" + table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps({**head, "results": results}, indent=1) + "\n")
    if args.plot:
        plot(sweep, results, Path(args.plot))


if __name__ == "__main__":
    main()
