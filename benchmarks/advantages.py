"""Our advantages beside those that TRL, verl and ms-swift compute, each package run in an environment of its own.

    benchmarks/peers/install.sh PEERS trl verl swift
    python benchmarks/advantages.py --peers=PEERS           under a minute

First table: the largest absolute difference over the golden tables and 200 random ones, with the peer's eps on our side
(all of them divide by the sample deviation, ddof 1); where it exceeds TOLERANCE the command fails. Second table: inputs
on which the formulas differ on purpose, ours with its own settings. Nothing is timed.
"""

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peer import Peer, table

from balcap_jax import advantages
from balcap_jax.cli.arguments import CommandParser
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error

# fp32 on both sides; advantages are of order 1, and the smallest deviation of a random group is about 0.01.
TOLERANCE = 1e-4
RANDOM_TABLES = 200
PADDED = (5, 16, 5)  # the largest B, G and K of any table
NAN = float("nan")

# Our estimator and eps for each of a peer's. verl whitens with rsqrt(var + 1e-8), so nothing is added to the deviation.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {
        "gdpo": {"estimator": "gdpo", "eps_group": 1e-4, "eps_batch": 1e-4},
        "grpo": {"estimator": "grpo", "eps_group": 1e-4},
        "dr_grpo": {"estimator": "dr_grpo"},
    },
    "verl": {
        "gdpo": {"estimator": "gdpo", "eps_group": 1e-6, "eps_batch": 0.0},
        "grpo": {"estimator": "grpo", "eps_group": 1e-6},
        "dr_grpo": {"estimator": "dr_grpo"},
        "rloo": {"estimator": "rloo"},
    },
    "swift": {
        "gdpo": {"estimator": "gdpo", "eps_group": 1e-8, "eps_batch": 1e-8},
        "grpo": {"estimator": "grpo", "eps_group": 1e-4},
        "dr_grpo": {"estimator": "dr_grpo"},
        "rloo": {"estimator": "rloo"},
    },
}

# The reward tables of tests/method/test_advantages.py, [B][G][K]; the second objective of the second group is constant.
G1 = [
    [[0.8, 0.4, 0.9], [0.6, 0.55, 0.7], [0.9, 0.3, 0.2], [0.5, 0.75, 0.6]],
    [[1.0, 0.2, 0.5], [0.75, 0.2, 0.9], [0.5, 0.2, 0.1], [0.25, 0.2, 0.7]],
]
IN_BAND = [[1, 1, 0, 1], [1, 0, 1, 1]]  # of the third objective's length gate


def reward_table(rewards: Any, weights: Sequence[float] | None = None, lengths: Any = None) -> dict[str, Any]:
    """A table as the peers read it; responses of one token unless `lengths` [B][G] says otherwise."""
    rewards = np.asarray(rewards, np.float32)
    return {
        "rewards": rewards.tolist(),
        "weights": list(weights or [1.0] * rewards.shape[-1]),
        "lengths": np.ones(rewards.shape[:2], int).tolist() if lengths is None else lengths,
    }


def golden_tables() -> list[dict[str, Any]]:
    gated = np.array(G1)
    gated[..., 2] *= IN_BAND  # a gated member stays in its group with reward 0
    constant = np.concatenate([G1, np.tile([0.7, 0.3, 0.6], (1, 4, 1))])
    cases = (G1, gated, constant)
    return [reward_table(case, weights) for case in cases for weights in (None, (1.0, 0.5, 0.25))]


def random_tables(count: int) -> list[dict[str, Any]]:
    """Scores in [0, 1] of 2 to 5 prompts with G 2..16 samples and K 1..5 objectives."""
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(count):
        shape = rng.integers((2, 2, 1), np.array(PADDED) + 1)
        tables.append(reward_table(rng.random(shape), rng.uniform(0.1, 2, shape[2]).tolist()))
    return tables


def deliberate_differences() -> dict[str, dict[str, Any]]:
    """Inputs on which the packages do different things, by what is special about them."""
    missing = np.array(G1)
    missing[..., 2][np.array(IN_BAND) == 0] = NAN
    unscored = np.array(G1)
    unscored[0, 1] = NAN
    alone = np.array(G1)
    alone[0, 1:, 2] = NAN
    cancelling = [[[0.8, 0.4], [0.6, 0.6], [0.9, 0.3], [0.5, 0.7]]]
    return {
        "two scores of one objective missing": reward_table(missing),
        "a member without any score": reward_table(unscored),
        "one score of an objective in a group": reward_table(alone),
        "constant group of six 0.3 beside a normal one": reward_table([[[0.3]] * 6, [[0.1 * k] for k in range(6)]]),
        "only constant groups (six 0.3, six 0.7)": reward_table([[[0.3]] * 6, [[0.7]] * 6]),
        "objectives that cancel exactly": reward_table(cancelling),
        "responses of 1 to 8 tokens": reward_table(G1, lengths=[[3, 5, 8, 4], [6, 2, 7, 1]]),
    }


def ours(one: dict[str, Any], **settings: Any) -> np.ndarray:
    """Our advantages [B, G] of a table; a NaN is a missing score.

    Tables are padded to one shape with members that take no part and objectives of weight 0, so that 200 shapes are not
    200 compilations.
    """
    rewards = np.array(one["rewards"], np.float32)
    batch, group, objectives = rewards.shape
    padded = np.full(PADDED, NAN, np.float32)
    padded[:batch, :group, :objectives] = rewards
    taking_part = np.zeros(PADDED[:2], bool)
    taking_part[:batch, :group] = True
    weights = np.zeros(PADDED[2], np.float32)
    weights[:objectives] = one["weights"]
    result = advantages.compute(
        padded, weights=weights, valid=np.isfinite(padded), member_valid=taking_part, **settings
    )
    return np.asarray(result.combined)[:batch, :group]


def largest_difference(tables: list[dict[str, Any]], theirs: list[Any], settings: dict[str, Any]) -> float:
    """Over all members of all tables; NaN if the peer gave one."""
    return float(
        np.max(
            [np.max(np.abs(ours(one, **settings) - np.array(other))) for one, other in zip(tables, theirs, strict=True)]
        )
    )


def extremes(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return f"{np.isnan(values).sum()} of {values.size} NaN"
    return f"{values.min():+.3f} to {values.max():+.3f}"


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python benchmarks/advantages.py", description="Advantages beside the peers'; see the head of the file."
    )
    parser.add_argument("--peers", required=True, metavar="DIR", help="the folder given to benchmarks/peers/install.sh")
    parser.add_argument("--only", default=",".join(SETTINGS), metavar="A[,B]", help="some of trl, verl, swift")
    parser.add_argument("--tables", type=int, default=RANDOM_TABLES, metavar="N", help="random tables")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    if not set(names) <= set(SETTINGS):
        raise UserError(f"--only {args.only} is not of {', '.join(SETTINGS)}")

    print(f"command: {shlex.join(['python', 'benchmarks/advantages.py', *arguments])}")
    print(f"versions: Python {platform.python_version()}, jax {importlib.metadata.version('jax')}")
    same, special = golden_tables() + random_tables(args.tables), deliberate_differences()
    answers = {}
    for name in names:
        with Peer(str(Path(args.peers) / name / "bin" / "python"), f"{name}_advantages.py") as peer:
            answers[name] = peer.ask(tables=[*same, *special.values()])
        print(f"{name}: {answers[name]['versions']}", flush=True)

    rows = [("peer", "estimator", "our settings", f"largest difference, {len(same)} tables")]
    worst = 0.0
    for name in names:
        for estimator, settings in SETTINGS[name].items():
            theirs = answers[name]["advantages"][estimator][: len(same)]
            difference = largest_difference(same, theirs, settings)
            worst = max(worst, difference if np.isfinite(difference) else np.inf)
            eps = {key: value for key, value in settings.items() if key != "estimator"}
            rows.append((name, estimator, json.dumps(eps), f"{difference:.1e}"))
    print("\n" + table(rows) + "\n")

    rows = [("GDPO on", "ours", *names)]
    for number, (case, one) in enumerate(special.items()):
        theirs = [np.array(answers[name]["advantages"]["gdpo"][len(same) + number], float) for name in names]
        rows.append((case, *map(extremes, [ours(one), *theirs])))
    print(table(rows))
    if not worst <= TOLERANCE:
        raise UserError(f"the largest difference, {worst:.1e}, is more than {TOLERANCE:g}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
