"""The peer of update.py: TRL's GRPOTrainer on torch, in an environment of its own; see answers.py for the contract.

The trainer's own loop runs: its data loader, its loss, backward, clipping of the gradient, optimiser and metrics. Only
its generation and scoring are replaced, by the batch of the job.

job {"folder", "batch": .npz, "group", "checkpointing", "rate", "clip", "max_norm"}
-> {"versions"}, then for each request one update: {"seconds", "loss", "grad_norm", "peak_gb"}
"""

import platform
import tempfile
import time

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from answers import Answers, peak_gb, requests


class InjectedBatch(trl.GRPOTrainer):
    """The trainer with a rollout that is given."""

    injected: dict

    def _generate_and_score_completions(self, inputs):
        return {name: tensor.clone() for name, tensor in self.injected.items()}

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.last_loss = float(loss.detach())
        return loss


class OneStepPerRequest(transformers.TrainerCallback):
    def __init__(self, answer, lines):
        self.answer, self.lines, self.trainer = answer, lines, None

    def on_step_begin(self, args, state, control, **_):
        if next(self.lines, None) is None:
            raise SystemExit
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds = time.perf_counter() - self.start

    def on_log(self, args, state, control, logs=None, **_):
        if "grad_norm" in logs:
            self.answer(
                seconds=self.seconds, loss=self.trainer.last_loss, grad_norm=logs["grad_norm"], peak_gb=peak_gb()
            )


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The trainer wants one; nothing is tokenised."""
    words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def main() -> None:
    answer, lines = Answers(), requests()
    job = next(lines)
    arrays = {name: torch.from_numpy(array) for name, array in np.load(job["batch"]).items()}
    rows, length = arrays["completion_ids"].shape
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
    callback = OneStepPerRequest(answer, lines)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            num_generations=job["group"],
            gradient_accumulation_steps=1,
            max_completion_length=length,
            max_steps=10**6,
            loss_type="grpo",
            beta=0.0,
            epsilon=job["clip"],
            learning_rate=job["rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=job["max_norm"],
            gradient_checkpointing=job["checkpointing"],
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = InjectedBatch(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * rows),
            processing_class=tokenizer(),
            callbacks=[callback],
        )
        callback.trainer = trainer
        trainer.injected = {
            **arrays,
            "prompt_mask": torch.ones_like(arrays["prompt_ids"]),
            "completion_mask": torch.ones_like(arrays["completion_ids"]),
            "num_items_in_batch": torch.tensor(rows * length),
        }
        versions = [f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl)]
        threads = f"{torch.get_num_threads()} threads"
        attention = f"attention {model.config._attn_implementation}, optimiser {config.optim}"
        answer(versions=", ".join([f"Python {platform.python_version()}", *versions, threads, attention]))
        trainer.train()


if __name__ == "__main__":
    main()
