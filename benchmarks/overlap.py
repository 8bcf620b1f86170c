"""How much of a slow judge `pipeline.depth` 1 hides behind a slow rollout.

    python benchmarks/overlap.py                    5 s of judging and 5 s of sampling, 2 minutes
    python benchmarks/overlap.py --small            some seconds, to see that it runs

The stage rl of configs/scenes.py at both depths. Its own rollout and the oracle's judging are padded with sleep to the
given seconds: a sleeping judge is what one behind an endpoint is to the trainer, and a sleeping rollout leaves the host
as free as an accelerator does. The update, which judging also overlaps with, is the real one.
"""

import functools
import importlib.metadata
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from step_time import load_average, machine

from balcap_jax import data, judges, models, rewards
from balcap_jax.cli.arguments import CommandParser
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.config import recipes as configuration
from balcap_jax.data.input import make_dataset
from balcap_jax.parallel import sharding
from balcap_jax.training import stages
from balcap_jax.training.job import Job
from balcap_jax.training.progress import HIDDEN, PhaseClock

RECIPE = Path(__file__).parents[1] / "configs" / "scenes.py"
SMALL = {"stages.rl.batch_size": "4", "rollout.group_size": "2", "rollout.max_tokens": "8", "rollout.buckets": "8"}


def padded(call: Callable, seconds: float) -> Callable:
    """`call`, which takes at least `seconds`; what it returns is waited for."""

    def slow(*given: Any) -> Any:
        ends = time.perf_counter() + seconds
        found = call(*given)
        if isinstance(found, tuple):
            jax.block_until_ready(found)
        time.sleep(max(ends - time.perf_counter(), 0.0))
        return found

    return slow


class SlowReward:
    """A reward whose judge takes at least `seconds` for a batch."""

    def __init__(self, reward: rewards.RewardFn, seconds: float):
        self.names, self.gated = reward.names, reward.gated
        self._score = padded(reward, seconds)

    def __call__(self, samples: rewards.Samples) -> rewards.Scores:
        return self._score(samples)


def seconds_of_steps(
    depth: int, judge: float, rollout: float, steps: int, overrides: dict[str, str]
) -> dict[str, float]:
    """Medians over `steps` steps: of "step", and of the times of the log by their names."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration.load(str(RECIPE), {"data.data_dir": folder, "pipeline.depth": str(depth), **overrides})
        splits = data.load(config.data, config.model.image_size)
        policy, processor = models.build(config.model, splits.tokenizer)
        reward = SlowReward(rewards.build(config.rewards, judges.build(config.judge, config.seed)), judge)
        job = Job(config, sharding.make_mesh(config.mesh), policy, processor, reward, PhaseClock())
        stage = stages.RLStage(job)
        params = jax.jit(policy.init)(jax.random.key(config.seed))
        state = stage.load({"state": stage.programs.start(params)})
        batches = make_dataset(splits.train, batch_size=config.stages.rl.batch_size, seed=0, threads=0)
        if depth:
            stage.begin(state, next(batches), 1)
        seconds = []
        for step in range(1, steps + 2):
            begun = time.perf_counter()
            state, values, _ = stage.advance(state, next(batches), step)
            wall = time.perf_counter() - begun
            seconds.append({"step": wall, HIDDEN: values.get(HIDDEN, 0.0), **job.clock.step()})
            if step == 1:  # Compiled now.
                stage._rollout = padded(stage._rollout, rollout)
        # The second step's batch was sampled before the rollout was slow, but its judge took its time.
        return {name: statistics.median(one[name] for one in seconds[1:]) for name in seconds[0]}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python benchmarks/overlap.py", description="Times rl at pipeline.depth 0 and 1; see the head of the file."
    )
    parser.add_argument("--judge", type=float, default=5.0, metavar="S", help="seconds of judging a batch, at least")
    parser.add_argument("--rollout", type=float, default=5.0, metavar="S", help="seconds of sampling a batch, at least")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="timed steps; the median counts")
    parser.add_argument("--small", action="store_true", help="0.3 s each and a tiny batch: not to quote")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.steps < 1 or min(args.judge, args.rollout) <= 0:
        raise UserError("--steps must be at least 1, and --judge and --rollout above 0")
    judge, rollout = (0.3, 0.3) if args.small else (args.judge, args.rollout)

    packages = ("jax", "jaxlib", "flax", "optax")
    print(f"command: {shlex.join(['python', 'benchmarks/overlap.py', *arguments])}")
    print(f"machine: {machine()}")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    print(f"versions: Python {platform.python_version()}, {versions}")
    print(f"load average before: {load_average()}\n", flush=True)
    overrides = {"data.train_size": "64", "data.validation_size": "1", "data.test_size": "1", "stages.order": "rl"}
    overrides |= SMALL if args.small else {}
    columns = ("step", "time/rollout", "time/judge", "time/update", "time/other", HIDDEN)
    print(f"{'depth':5} " + " ".join(f"{name.removeprefix('time/'):>12}" for name in columns) + "   seconds")
    measure = functools.partial(seconds_of_steps, judge=judge, rollout=rollout, steps=args.steps, overrides=overrides)
    found = {}
    for depth in (0, 1):
        found[depth] = measure(depth)
        print(f"{depth:5} " + " ".join(f"{found[depth][name]:12.3f}" for name in columns), flush=True)
    saved, shorter = found[0]["step"] - found[1]["step"], min(judge, rollout)
    print(
        f"\na step is {saved:.2f} s shorter: {100 * saved / shorter:.0f}% of the shorter of judging and sampling "
        f"({shorter:g} s); of judging, {found[1]['time/judge']:.2f} s remain visible"
    )
    print(f"load average after: {load_average()}")


if __name__ == "__main__":
    main()
