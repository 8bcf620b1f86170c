"""Update and rollout at uneven response lengths: ours, an earlier commit of ours, and the peers, turn by turn.

    benchmarks/peers/install.sh PEERS trl tunix
    python benchmarks/uneven.py --shape=six_layers --sides=now,commit
    python benchmarks/uneven.py --shape=135m --sides=now,trl,unpadded,transformers,tunix \\
        --torch=PEERS/trl/bin/python --tunix=PEERS/tunix/bin/python --means=0.215 --draws=20
    python benchmarks/uneven.py --small                                    half a minute, to see that it runs

No source gives the true distribution of caption lengths during training; lengths.py says what is drawn instead. All
sides get the same weights, tokens and lengths. Every side is a process of its own (peer.py):

    now           this tree                          update, rollout
    refill        this tree, rows take the next      rollout, with the rows of one of --parts
    padded        this tree, all rows to the end     update, rollout
    commit        --commit=REV, with the same jax    update, rollout
    trl           TRL's GRPOTrainer                  update
    unpadded      torch, each sequence alone         update
    transformers  `generate`                         rollout
    tunix         Tunix's sampler                    rollout

Loss and gradient norm of all sides are compared at every update, the rollouts' greedy tokens and the lengths that
each side sampled before a time is reported. The learning rate is too small to change a weight, so that all updates
start from the same ones. A sample ends at its drawn length on all sides. Ratios are medians over rounds.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import lengths
import numpy as np
import uneven_report
from generate import SIZES, compare_greedy, write_for_peer
from peer import Peer
from step_time import load_average, machine

from balcap_jax.cli.arguments import CommandParser, output_file
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.models import decoder

ROOT = Path(__file__).parents[1]
OURS, TORCH, TUNIX = ("now", "padded", "refill", "commit"), ("trl", "unpadded", "transformers"), ("tunix",)
SIDES = {
    "update": ("now", "padded", "commit", "trl", "unpadded"),
    "rollout": ("now", "padded", "refill", "commit", "transformers", "tunix"),
}
SCRIPTS = {
    "trl": "trl_update.py",
    "unpadded": "torch_unpadded.py",
    "transformers": "transformers_generate.py",
    "tunix": "tunix_generate.py",
}
# fp32 sums of some thousand products in another order; loss and norm are single numbers over all of them. The terms
# that the loss averages are of order 1 and nearly cancel, so that its own size says little.
TOLERANCE, LOSS_SCALE = {"float32": 1e-4, "bfloat16": 3e-2}, 0.1
RATE, CLIP, MAX_NORM = 1e-12, 0.2, 1.0
GREEDY_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a side's programs for one kind of lengths cost: compiling them all, and the largest temporaries in GB."""

    compile_seconds: float | None = None
    compile_cpu_seconds: float | None = None
    temporaries_gb: float | None = None
    programs: tuple[str, ...] = ()


def commit_source(revision: str, folder: Path) -> Path:
    """The package at `revision`, out of this repository, below `folder`.

    Raises:
      UserError: git does not know the revision, or this is no repository.
    """
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, "balcap_jax"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"--commit: git does not start: {error.strerror}") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(
            f"--commit={revision}: {reason[-1] if reason else 'git archive failed'}; give a revision of this "
            "repository, or leave the side commit out of --sides"
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Sides:
    """The processes of all sides; a side that needs the accelerator shares a process with those of the same tree."""

    def __init__(self, args: argparse.Namespace, shape: lengths.Shape, folder: Path, stack: contextlib.ExitStack):
        self.shape, self.names = shape, args.sides
        self._processes: dict[str, Peer] = {}
        foreign = any(side not in OURS for side in self.names)
        init, flat = (lambda: decoder.init(shape.decoder, jax.random.key(0))), ""
        self.weights = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init)))
        if foreign or "commit" in self.names:  # Processes of one tree start from the same weights by themselves.
            params, flat = init(), str(folder / "params.npz")
            np.savez(flat, **flax.traverse_util.flatten_dict({"decoder": jax.tree.map(np.asarray, params)}, sep="/"))
            if foreign:
                write_for_peer(folder, shape.decoder, params)
            del params
        update = {"rate": RATE, "clip": CLIP, "max_norm": MAX_NORM}
        ours = {
            "decoder": dataclasses.asdict(shape.decoder),
            "params": flat,
            "group": shape.group,
            "response": shape.response,
            "parts": args.parts,
            **update,
        }
        theirs = {
            "folder": str(folder),
            "group": shape.group,
            "checkpointing": not args.no_checkpointing,
            "parts": args.trl_parts,
            "max_tokens": shape.response,
            "greedy_tokens": min(GREEDY_TOKENS, shape.response),
            **update,
            **{size: getattr(shape.decoder, size) for size in SIZES},
        }
        self.first = folder / "first.npz"  # what a peer reads before the first request
        batch = lengths.make_batches(shape, args.means[0], not args.drawn_longest, 1, args.seed)
        Path(lengths.write_batches(folder, "first", batch)[0]).rename(self.first)
        np.save(folder / "prompts.npy", batch[0]["prompt_ids"])
        self.greedy: dict[str, Any] = {}
        for name in self.names:
            if name in OURS:
                tree = commit_source(args.commit, folder / "commit") if name == "commit" else ROOT
                if str(tree) not in self._processes:
                    peer = stack.enter_context(Peer(sys.executable, "balcap.py", env={"PYTHONPATH": str(tree)}))
                    self._processes[str(tree)] = peer
                    print(f"{name}: {peer.ask(**ours)['versions']}", flush=True)
                self._processes[name] = self._processes[str(tree)]
                continue
            python = args.tunix if name in TUNIX else args.torch
            self._processes[name] = peer = stack.enter_context(Peer(python, SCRIPTS[name]))
            ready = peer.ask(**theirs, batch=str(self.first), prompts=str(folder / "prompts.npy"))
            print(f"{name}: {ready['versions']}", flush=True)
            if "greedy" in ready:
                self.greedy[name] = ready["greedy"]

    def ask(self, name: str, work: str, batch: str, prepare: bool = False) -> dict[str, Any]:
        """One update or rollout of a side; with `prepare` what it needs before the first timed one."""
        if name not in OURS:
            return self._processes[name].ask(batch=batch)
        mode = name if name in ("padded", "refill") else "best"
        return self._processes[name].ask(work=work, batch=batch, mode=mode, prepare=prepare)

    def compare_greedy(self) -> None:
        """Ends the benchmark unless the samplers choose the same tokens.

        Raises:
          UserError: they do not.
        """
        if self.greedy:
            ours = next(name for name in self.names if name in OURS)
            length = min(GREEDY_TOKENS, self.shape.response)
            tokens = self._processes[ours].ask(work="greedy", batch=str(self.first), length=length)["greedy"]
            for name, theirs in self.greedy.items():
                compare_greedy(name, np.array(tokens), theirs)

    def bandwidth(self) -> float:
        """Bytes per second at which the device reads memory."""
        ours = next(name for name in self.names if name in OURS)
        return self._processes[ours].ask(work="bandwidth")["bytes_per_second"]


def check_updates(kind: str, answers: Mapping[str, dict[str, Any]], dtype: str) -> float:
    """The largest relative difference of loss and gradient norm to the first side's.

    Raises:
      UserError: it is above the tolerance.
    """
    (first, reference), largest = next(iter(answers.items())), 0.0
    for name, found in answers.items():
        for value, scale in (("loss", LOSS_SCALE), ("grad_norm", 0.0)):
            ours, theirs = reference[value], found[value]
            difference = abs(ours - theirs) / max(abs(ours), scale)
            if not difference <= TOLERANCE[dtype]:
                raise UserError(
                    f"{value} is {ours:.7g} of {first} and {theirs:.7g} of {name} (lengths {kind}), more than "
                    f"{TOLERANCE[dtype]:g} apart, so this is not one computation; no times are reported"
                )
            largest = max(largest, difference)
    return largest


def computed(name: str, batch: dict[str, np.ndarray], answer: dict[str, Any]) -> int:
    """Positions of responses that a side computes: of the update, or rows x steps of the rollout."""
    drawn = batch["lengths"]
    if name in OURS:
        return answer["positions"]
    return int(drawn.sum() if name == "unpadded" else drawn.size * drawn.max())


def measure(sides: Sides, work: str, kind: str, paths: Sequence[str], batches: Sequence[dict], rounds: int) -> dict:
    """{side: results} of one kind of lengths: `rounds` x draws timed ones in turns, after everything is compiled.

    Raises:
      UserError: sides computed different things.
    """
    names = [name for name in sides.names if name in SIDES[work]]
    prepared = {}
    for name in names:
        if name in OURS:
            found = {one["program"]: one for one in (sides.ask(name, work, path, prepare=True) for path in paths)}
            temporaries = [one["temporaries_gb"] for one in found.values() if one["temporaries_gb"] is not None]
            seconds = [sum(one[of] for one in found.values()) for of in ("compile_seconds", "compile_cpu_seconds")]
            prepared[name] = Prepared(*seconds, max(temporaries, default=None), tuple(found))
        else:
            sides.ask(name, work, paths[0])
            prepared[name] = Prepared()
        print(f"{work}, lengths {kind}: {name} is ready {', '.join(prepared[name].programs)}", flush=True)
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [[] for _ in range(rounds)] for name in names}
    largest, equal = 0.0, []
    for turn in range(rounds):
        for path in paths:
            answers = {name: sides.ask(name, work, path) for name in names}
            for name, answer in answers.items():
                runs[name][turn].append(answer)
            if work == "update":
                largest = max(largest, check_updates(kind, answers, sides.shape.decoder.dtype))
            tokens = [answer["tokens"] for answer in answers.values() if "tokens" in answer]
            equal += [np.mean(np.equal(tokens[0], other)) for other in tokens[1:]]
        times = ", ".join(f"{name} {np.mean([one['seconds'] for one in runs[name][turn]]):.2f} s" for name in names)
        print(f"{work}, lengths {kind}, round {turn + 1} of {rounds}, mean of {len(paths)}: {times}", flush=True)
    if work == "update" and len(names) > 1:
        print(f"loss and gradient norm of all sides: largest relative difference {largest:.1e}")
    if equal:
        print(f"responses whose tokens are equal at all of our sides: {100 * np.mean(equal):.1f} %", flush=True)
    results = {}
    for name, of_side in runs.items():
        responses = [computed(name, batch, answer) for batch, answer in zip(batches, of_side[0], strict=True)]
        # Who shares a prompt among its samples computes it once.
        prompts = batches[0]["prompt_ids"].size * (1 if name in OURS else batches[0]["lengths"].shape[1])
        results[name] = {
            "seconds": [[one["seconds"] for one in turn] for turn in of_side],
            "cpu_seconds": [[one["cpu_seconds"] for one in turn] for turn in of_side],
            "useful": sum(int(batch["lengths"].sum()) for batch in batches) / sum(responses),
            "positions": float(np.mean(responses)) + (prompts if work == "update" else 0),
            "peak_gb": max(one["peak_gb"] for turn in of_side for one in turn),
            **dataclasses.asdict(prepared[name]),
        }
    return results


def parse_sides(text: str, python: Mapping[str, str]) -> tuple[str, ...]:
    """Raises:
    UserError: a name is unknown or stands twice, none of ours is among them, or a peer's Python is not given.
    """
    names = tuple(part.strip() for part in text.split(","))
    known = list(dict.fromkeys(SIDES["update"] + SIDES["rollout"]))
    for name in names:
        if name not in known:
            raise UserError(f"--sides: {name!r} is none of {', '.join(known)}")
        flag = "tunix" if name in TUNIX else "torch"
        if name not in OURS and not python[flag]:
            raise UserError(f"--sides: {name} needs --{flag}=PYTHON; benchmarks/peers/install.sh makes its environment")
    if len(set(names)) < len(names):
        raise UserError(f"--sides={text} names one twice")
    if names[0] not in OURS:
        raise UserError(f"--sides={text}: the first is what the others are compared with, one of {', '.join(OURS)}")
    return names


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="python benchmarks/uneven.py",
        description="Update and rollout at uneven lengths; see the head of the file.",
    )
    known = list(dict.fromkeys(SIDES["update"] + SIDES["rollout"]))
    parser.add_argument("--shape", default="six_layers", choices=tuple(lengths.SHAPES), help="decoder and batch")
    parser.add_argument("--small", action="store_true", help="toy sizes: to see that it runs, not to quote")
    parser.add_argument("--sides", default="now,commit", metavar="A,B", help=f"of {', '.join(known)}")
    parser.add_argument("--work", default="update,rollout", metavar="A,B", help="update, rollout or both")
    parser.add_argument("--means", default="0.1,0.2,0.4,0.8,equal", metavar="M,..", help="mean lengths / R, and equal")
    parser.add_argument("--drawn_longest", action="store_true", help="no response is made to run to R")
    parser.add_argument("--draws", type=int, default=1, metavar="N", help="batches of each mean; their mean counts")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed runs of each batch and side")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths and tokens")
    parser.add_argument(
        "--parts", type=int, default=1, metavar="N", help="of the rollout, for the sides now and refill"
    )
    parser.add_argument("--commit", default="5d0dd7b", metavar="REV", help="of the side commit")
    parser.add_argument("--torch", default="", metavar="PATH", help="Python of trl, unpadded and transformers")
    parser.add_argument("--tunix", default="", metavar="PATH", help="Python of tunix")
    parser.add_argument("--no_checkpointing", action="store_true", help="trl and unpadded keep their activations")
    parser.add_argument("--trl_parts", type=int, default=1, metavar="N", help="of trl's batch, one after the other")
    parser.add_argument("--out", type=output_file, metavar="FILE.json", help="where the results go")
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="where the plot goes, .svg or .png")
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(arguments)
    for name in ("draws", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed must be 0 or above, got {args.seed}")
    args.sides = parse_sides(args.sides, vars(args))
    args.means = lengths.parse_means(args.means)
    work = [part.strip() for part in args.work.split(",")]
    if not set(work) <= set(SIDES):
        raise UserError(f"--work={args.work} is not of {', '.join(SIDES)}")
    if args.plot:
        uneven_report.plotting()
    shape = lengths.SMALL if args.small else lengths.SHAPES[args.shape]
    if args.trl_parts < 1 or shape.batch * shape.group % args.trl_parts:
        raise UserError(
            f"--trl_parts={args.trl_parts} must divide the {shape.batch * shape.group} responses of a batch"
        )
    if args.parts < 1 or shape.batch % args.parts:
        raise UserError(f"--parts={args.parts} must divide the {shape.batch} prompts of a batch")
    if "refill" in args.sides and args.parts == 1:
        raise UserError("--sides: refill needs --parts=2 or more; one part has a row for each response")
    # This process only hands out: an accelerator belongs to the side that computes.
    jax.config.update("jax_platforms", "cpu")

    head = {
        "command": shlex.join(["python", "benchmarks/uneven.py", *arguments]),
        "machine": machine(),
        "decoder": dataclasses.asdict(shape.decoder),
        "B": shape.batch,
        "G": shape.group,
        "P": shape.prompt,
        "R": shape.response,
        "load_before": load_average(),
    }
    print(json.dumps(head), flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = Sides(args, shape, folder, stack)
        sides.compare_greedy()
        bandwidth = sides.bandwidth() if "rollout" in work else 0.0
        results: dict[str, dict[str, Any]] = {one: {} for one in work}
        kinds: dict[str, dict[str, float]] = {}
        for kind in args.means:
            batches = lengths.make_batches(shape, kind, not args.drawn_longest, args.draws, args.seed)
            paths = lengths.write_batches(folder, kind, batches)
            drawn = [batch["lengths"] for batch in batches]
            kinds[kind] = {"mean": float(np.mean(drawn)), "longest": float(np.mean([one.max() for one in drawn]))}
            if bandwidth:
                read = sides.weights * np.dtype(shape.decoder.dtype).itemsize
                kinds[kind]["floor"] = (kinds[kind]["longest"] - 1) * read / bandwidth
            for one in work:
                results[one][kind] = measure(sides, one, kind, paths, batches, args.rounds)
    head |= {"load_after": load_average(), "bytes_per_second": bandwidth, "kinds": kinds}
    for one in work:
        print("\n" + uneven_report.markdown(one, args.sides[0], kinds, results[one]))
    if bandwidth:
        print(f"\nmemory is read at {bandwidth / 1e9:.1f} GB/s; the floor reads all weights once for each step")
    print(f"load average before: {head['load_before']}; after: {head['load_after']}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps({**head, "results": results}, indent=1) + "\n")
    if args.plot:
        uneven_report.plot(kinds, results, Path(args.plot))


if __name__ == "__main__":
    main()
