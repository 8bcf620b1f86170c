"""A peer of advantages.py: the advantages inside TRL's GRPOTrainer, in an environment of its own.

TRL computes them in the middle of its rollout, so a real trainer of a tiny model runs that, with a generation and a
scoring that are given. Contract: answers.py; job and answer are those of verl_advantages.py, lengths are not used.
"""

import platform
import tempfile

import datasets
import torch
import transformers
import trl
from answers import Answers, requests
from trl_update import tokenizer

ESTIMATORS = {
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "grpo": {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group"},
    "dr_grpo": {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "none"},
}


class GivenRewards(trl.GRPOTrainer):
    """The trainer with completions of one token and a table of rewards."""

    rewards: torch.Tensor

    def _generate(self, prompts):
        ones = [[2]] * len(prompts)
        return ones, ones, None, ["x"] * len(prompts), None, {}, None, []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.rewards

    def advantages(self, table: dict) -> dict[str, list]:
        rewards = torch.tensor(table["rewards"], dtype=torch.float32)
        batch, group, objectives = rewards.shape
        self.rewards = rewards.reshape(-1, objectives)
        self.reward_weights = torch.tensor(table["weights"])
        self.num_generations = group
        self.reward_funcs = [None] * objectives
        self.reward_func_names = [str(k) for k in range(objectives)]
        self.model.train()
        found = {}
        for name, settings in ESTIMATORS.items():
            for setting, value in settings.items():
                setattr(self, setting, value)
            out = self._generate_and_score_completions([{"prompt": "x"} for _ in range(batch * group)])
            found[name] = out["advantages"].reshape(batch, group).tolist()
        return found


def main() -> None:
    answer, lines = Answers(), requests()
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GivenRewards(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=2,
                num_generations=2,
                gradient_accumulation_steps=1,
                beta=0.0,
                use_cpu=True,
                bf16=False,
                report_to="none",
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * 2),
            processing_class=tokenizer(),
        )
        tables = [trainer.advantages(table) for table in next(lines)["tables"]]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, trl {trl.__version__}"
    answer(versions=versions, advantages={name: [table[name] for table in tables] for name in tables[0]})


if __name__ == "__main__":
    main()
