"""A peer of advantages.py: verl's estimators on torch, in an environment of its own; answers.py has the contract.

job {"tables": [{"rewards": [B][G][K], "weights": [K], "lengths": [B][G]}]}
-> {"versions", "advantages": {estimator: [B][G] for each table}}
"""

import importlib.metadata
import platform

import numpy as np
import torch
from answers import Answers, requests
from verl.trainer.ppo import core_algos


def advantages(table: dict) -> dict[str, list]:
    rewards = torch.tensor(table["rewards"], dtype=torch.float32)
    batch, group, objectives = rewards.shape
    lengths = torch.tensor(table["lengths"]).reshape(-1)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    index = np.repeat(np.arange(batch), group)
    # One reward for the estimators that know no objectives, on a response's last token.
    total = (rewards * torch.tensor(table["weights"])).sum(-1).reshape(-1)
    outcome = torch.zeros_like(mask)
    outcome[torch.arange(len(total)), lengths - 1] = total
    names = [f"objective {k}" for k in range(objectives)]
    settings = {"gdpo_reward_keys": names, "gdpo_reward_weights": table["weights"]}
    found = {
        "gdpo": core_algos.compute_gdpo_outcome_advantage(
            outcome,
            mask,
            index,
            config=settings,
            non_tensor_batch={name: rewards[..., k].reshape(-1).numpy() for k, name in enumerate(names)},
            batch={"prompts": torch.zeros(len(mask), 1), "attention_mask": torch.cat([mask[:, :1], mask], 1).long()},
        ),
        "grpo": core_algos.compute_grpo_outcome_advantage(outcome, mask, index),
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(outcome, mask, index, norm_adv_by_std_in_grpo=False),
        "rloo": core_algos.compute_rloo_outcome_advantage(outcome, mask, index),
    }
    # The same on every token of a response; its first is enough.
    return {name: pair[0][:, 0].reshape(batch, group).tolist() for name, pair in found.items()}


def main() -> None:
    answer, lines = Answers(), requests()
    tables = [advantages(table) for table in next(lines)["tables"]]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "verl")]
    answer(
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        advantages={name: [table[name] for table in tables] for name in tables[0]},
    )


if __name__ == "__main__":
    main()
