"""One update step beside TRL's: same weights, tokens, advantages and old log-probabilities, turn by turn.

    benchmarks/peers/install.sh PEERS trl
    python benchmarks/update.py --peer_python=PEERS/trl/bin/python         about 10 minutes on 2 CPU cores
    python benchmarks/update.py --small --peer_python=...                  seconds, to see that it runs

A Llama decoder of SmolLM2-135M's shape with random weights, fp32; B prompts of P text tokens, G responses of R tokens
each. One step is forward, backward, clipping of the gradient's norm and AdamW, on both sides. The peer is TRL's
GRPOTrainer with its own loop; its generation and scoring are replaced by this batch. Loss and gradient norm of the
first update are compared before a time is reported; they are the warm-up too, and compilation is timed apart.
"""

import dataclasses
import importlib.metadata
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from generate import FULL, SMALL, Shape, write_for_peer
from peer import Peer, compare, table, take_turns
from step_time import machine

from balcap_jax import advantages
from balcap_jax.cli.arguments import CommandParser
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.models import decoder
from balcap_jax.models.policy import Prompt, TextPolicy
from balcap_jax.train_step import RLBatch, RLObjective, TrainState, init_state, make_rl_step

# fp32 sums of some thousand products in another order; loss and norm are single numbers over all of them.
TOLERANCE = 1e-4
RATE, CLIP, MAX_NORM = 1e-6, 0.2, 1.0
# Old log-probabilities are off by this much (standard deviation): ratios differ from 1, and some are clipped.
STALENESS = 0.2


def make_policy(shape: Shape, remat: str) -> TextPolicy:
    # No token ends a response and none is forbidden: the peer's distribution.
    return TextPolicy(dataclasses.replace(shape.decoder, remat=remat), pad_token=0, end_tokens=(-1,))


def make_batch(shape: Shape, params: dict[str, Any]) -> RLBatch:
    """Random prompts, responses and rewards; old log-probabilities near those of `params`."""
    rng = np.random.default_rng(0)
    b, g, p, r, vocab = shape.batch, shape.group, shape.prompt, shape.response, shape.decoder.vocab
    policy = make_policy(shape, "none")
    prompt = Prompt(
        rng.integers(1, vocab, (b, p)).astype(np.int32),
        np.ones((b, p), bool),
        np.tile(np.arange(p, dtype=np.int32), (b, 1)),
        policy.no_images(b),
    )
    responses = rng.integers(1, vocab, (b, g, r)).astype(np.int32)
    embeds = np.zeros((b, 1, shape.decoder.width), np.float32)
    log_probs = jax.jit(policy.log_probs)({"decoder": params}, prompt, embeds, responses)
    batch = RLBatch(
        prompt,
        embeds,
        responses,
        np.ones((b, g, r), bool),
        np.asarray(log_probs) + rng.normal(0, STALENESS, (b, g, r)).astype(np.float32),
        rng.random((b, g, 1)).astype(np.float32),
        np.ones((b, g, 1), bool),
        np.full((b, g), 20),
        np.full(b, 20),
        np.zeros((b, g), bool),
    )
    return jax.device_put(batch)


def write_batch(path: Path, batch: RLBatch) -> None:
    """The batch as TRL holds it: every response is a row with its own copy of the prompt."""
    group = batch.responses.shape[1]
    combined = advantages.compute(batch.rewards, weights=np.ones(1)).combined
    rows = {
        "prompt_ids": np.repeat(np.asarray(batch.prompt.tokens), group, axis=0).astype(np.int64),
        "completion_ids": np.asarray(batch.responses).reshape(-1, batch.responses.shape[2]).astype(np.int64),
        "advantages": np.asarray(combined).reshape(-1),
        "old_per_token_logps": np.asarray(batch.old_log_probs).reshape(-1, batch.responses.shape[2]),
    }
    np.savez(path, **rows)


class OurStep:
    """The compiled update of one rematerialisation policy: `seconds = step()`, with the last loss and gradient norm."""

    def __init__(self, shape: Shape, remat: str, params: dict[str, Any], batch: RLBatch) -> None:
        optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(RATE, weight_decay=0.0))
        objective = RLObjective(
            ("one",), (1.0,), (False,), max_tokens=shape.response, clip_low=CLIP, clip_high=CLIP, normaliser="sequence"
        )
        self.state: TrainState = init_state({"decoder": jax.tree.map(jnp.copy, params)}, optimizer, "")
        self.batch = batch
        step = make_rl_step(make_policy(shape, remat), optimizer, objective)
        start = time.perf_counter()
        self.program = step.lower(self.state, batch).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.program.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes / 1e9 if memory else float("nan")

    def __call__(self) -> float:
        start = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.program(self.state, self.batch))
        seconds = time.perf_counter() - start
        self.loss, self.grad_norm = (float(metrics[name].total) for name in ("loss", "grad_norm"))
        return seconds


def against_peer(
    ours: dict[str, OurStep], peer: Peer, job: dict[str, Any], rounds: int, wait: bool
) -> dict[str, list[float]]:
    """First updates of all sides, compared; then `rounds` of timed ones in turns.

    Raises:
      UserError: loss or gradient norm differ by more than TOLERANCE.
    """
    print(f"peer: {peer.ask(**job)['versions']}", flush=True)
    first = peer.ask()
    for name, step in ours.items():
        step()
        compare(f"loss, {name}", step.loss, first["loss"], TOLERANCE)
        compare(f"gradient norm, {name}", step.grad_norm, first["grad_norm"], TOLERANCE)
    answers = [first]

    def peer_step() -> float:
        answers.append(peer.ask())
        return answers[-1]["seconds"]

    seconds = take_turns({**ours, "trl": peer_step}, rounds, wait)
    last = next(iter(ours.values()))
    print(f"loss of the last update: {last.loss:.7g} here, {answers[-1]['loss']:.7g} at the peer")
    print(f"peak resident memory of the peer's process: {answers[-1]['peak_gb']:.2f} GB")
    return seconds


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python benchmarks/update.py", description="One update beside TRL's; see the head of the file."
    )
    parser.add_argument("--peer_python", default="", metavar="PATH", help="Python of the peer; empty = ours alone")
    parser.add_argument("--small", action="store_true", help="toy sizes: to see that it runs, not to quote")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed updates of each side; median counts")
    parser.add_argument("--remat", default="full", metavar="A[,B]", help="of ours: none | dots | full, comma-separated")
    parser.add_argument(
        "--no_checkpointing", action="store_true", help="the peer without gradient checkpointing (its default is with)"
    )
    parser.add_argument("--wait", action="store_true", help="for Enter before each round: to quieten the machine first")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    kinds = args.remat.split(",")
    if not set(kinds) <= {"none", "dots", "full"}:
        raise UserError(f"--remat {args.remat} is not of none, dots, full")
    jax.config.update("jax_enable_compilation_cache", False)
    shape = SMALL if args.small else FULL

    print(f"command: {shlex.join(['python', 'benchmarks/update.py', *arguments])}")
    print(f"machine: {machine()}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax"))
    print(f"versions: Python {platform.python_version()}, {versions}")
    params = decoder.init(shape.decoder, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"decoder {count / 1e6:.1f}M parameters, fp32; B {shape.batch}, G {shape.group}, P {shape.prompt}, "
        f"R {shape.response}, V {shape.decoder.vocab}",
        flush=True,
    )
    batch = make_batch(shape, params)
    ours = {f"balcap_jax, remat {kind}": OurStep(shape, kind, params, batch) for kind in kinds}
    for name, step in ours.items():
        print(f"{name}: compiled in {step.compile_seconds:.1f} s, temporaries {step.temporaries:.3f} GB", flush=True)

    if args.peer_python:
        with tempfile.TemporaryDirectory() as name, Peer(args.peer_python, "trl_update.py") as peer:
            folder = Path(name)
            write_for_peer(folder, shape.decoder, params)
            write_batch(folder / "batch.npz", batch)
            job = {
                "folder": str(folder),
                "batch": str(folder / "batch.npz"),
                "group": shape.group,
                "checkpointing": not args.no_checkpointing,
                "rate": RATE,
                "clip": CLIP,
                "max_norm": MAX_NORM,
            }
            seconds = against_peer(ours, peer, job, args.rounds, args.wait)
    else:
        for step in ours.values():
            step()
        seconds = take_turns(ours, args.rounds, args.wait)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"peak resident memory of this process, {len(ours)} program(s): {peak:.2f} GB")
    print("\n" + table(list(_rows(seconds, shape.batch * shape.group * shape.response))))


def _rows(seconds: dict[str, list[float]], tokens: int) -> Iterator[tuple[str, ...]]:
    """Median, rate and all runs by side; the last side is what the others are compared with."""
    last = statistics.median(list(seconds.values())[-1])
    yield "update", "median s", "tokens/s", "times as fast", "all runs, s"
    for name, runs in seconds.items():
        median = statistics.median(runs)
        every = ", ".join(f"{run:.2f}" for run in runs)
        yield name, f"{median:.2f}", f"{tokens / median:.1f}", f"{last / median:.2f}", every


if __name__ == "__main__":
    main()
