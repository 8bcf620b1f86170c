"""A peer of advantages.py: ms-swift's estimators on torch, in an environment of its own; answers.py has the contract.

Job and answer are those of verl_advantages.py; the lengths of responses are not used.
"""

import importlib.metadata
import platform

import torch
from answers import Answers, requests
from swift.rl_core.advantage import compute_advantages

ESTIMATORS = {
    "gdpo": {"scale_rewards": "gdpo"},
    "grpo": {"scale_rewards": "group"},
    "dr_grpo": {"scale_rewards": "none"},
    "rloo": {"advantage_estimator": "rloo", "scale_rewards": "none"},
}


def advantages(table: dict) -> dict[str, list]:
    rewards = torch.tensor(table["rewards"], dtype=torch.float32)
    batch, group, objectives = rewards.shape
    arguments = rewards.reshape(-1, objectives), torch.tensor(table["weights"]), group
    return {
        name: compute_advantages(*arguments, **settings)[0].reshape(batch, group).tolist()
        for name, settings in ESTIMATORS.items()
    }


def main() -> None:
    answer, lines = Answers(), requests()
    tables = [advantages(table) for table in next(lines)["tables"]]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ms-swift")]
    answer(
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        advantages={name: [table[name] for table in tables] for name in tables[0]},
    )


if __name__ == "__main__":
    main()
