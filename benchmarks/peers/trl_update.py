"""A peer of update.py and uneven.py: TRL's GRPOTrainer on torch, in its own environment; answers.py has the contract.

The trainer's own loop runs: its data loader, its loss, backward, clipping of the gradient, optimiser and metrics. Only
its generation and scoring are replaced, by the batch of the job.

job {"folder", "batch": .npz, "group", "checkpointing", "rate", "clip", "max_norm"}
-> {"versions"}, then for each request one update: {"seconds", "cpu_seconds", "loss", "grad_norm", "peak_gb"}

"parts" of the job: the batch runs in so many, which takes less memory. A request may bring another {"batch": .npz} of
as many rows. A batch may have "lengths": tokens behind them are masked.
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
        self.last_loss += float(loss.detach())  # of all parts of the batch
        return loss


class OneStepPerRequest(transformers.TrainerCallback):
    def __init__(self, answer, lines):
        self.answer, self.lines, self.trainer = answer, lines, None

    def on_step_begin(self, args, state, control, **_):
        request = next(self.lines, None)
        if request is None:
            raise SystemExit
        if "batch" in request:
            self.trainer.injected = as_generated(np.load(request["batch"]))
        self.trainer.last_loss = 0.0
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_):
        self.seconds = time.perf_counter() - self.start[0]
        self.cpu_seconds = time.process_time() - self.start[1]

    def on_log(self, args, state, control, logs=None, **_):
        if "grad_norm" in logs:
            self.answer(
                seconds=self.seconds,
                cpu_seconds=self.cpu_seconds,
                loss=self.trainer.last_loss,
                grad_norm=logs["grad_norm"],
                peak_gb=peak_gb(),
            )


def as_generated(batch) -> dict[str, torch.Tensor]:
    """What the trainer's rollout returns, of a batch of prompt_ids [N, P] and completion_ids [N, T]."""
    names = ("prompt_ids", "completion_ids", "advantages", "old_per_token_logps")
    arrays = {name: torch.from_numpy(batch[name]) for name in names}
    mask = torch.ones_like(arrays["completion_ids"])
    if "lengths" in batch:
        mask = (torch.arange(mask.shape[1]) < torch.from_numpy(batch["lengths"])[:, None]).long()
    return {
        **arrays,
        "prompt_mask": torch.ones_like(arrays["prompt_ids"]),
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
    }


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The trainer wants one; nothing is tokenised."""
    words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def main() -> None:
    answer, lines = Answers(), requests()
    job = next(lines)
    injected = as_generated(np.load(job["batch"]))
    rows, length = injected["completion_ids"].shape
    parts = job.get("parts", 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
    callback = OneStepPerRequest(answer, lines)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rows // parts,
            num_generations=job["group"],
            gradient_accumulation_steps=parts,
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
        trainer.injected = injected
        versions = [f"{module.__name__} {module.__version__}" for module in (torch, transformers, trl)]
        threads = f"{torch.get_num_threads()} threads"
        attention = f"attention {model.config._attn_implementation}, optimiser {config.optim}"
        answer(versions=", ".join([f"Python {platform.python_version()}", *versions, threads, attention]))
        trainer.train()


if __name__ == "__main__":
    main()
