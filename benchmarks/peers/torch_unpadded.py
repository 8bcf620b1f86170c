"""A peer of uneven.py: a torch update that computes no padding; see answers.py for the contract.

Every sequence runs alone, prompt and response at its own length, as the padding-free mode of trainers (verl's
`use_remove_padding`) computes: all tokens of each sequence and none beside. Gradients add up over the sequences, then
come clipping and AdamW. Logits are computed for response tokens alone.

job {"folder", "checkpointing", "rate", "clip", "max_norm"} -> {"versions"}, then for each {"batch": .npz} one update:
{"seconds", "cpu_seconds", "loss", "grad_norm", "peak_gb"}
"""

import platform
import time

import numpy as np
import torch
import transformers
from answers import Answers, peak_gb, requests


def sequence_loss(model, row: dict[str, torch.Tensor], clip: float) -> torch.Tensor:
    """The clipped surrogate of one response, a mean over its tokens."""
    length = int(row["lengths"])
    targets = row["completion_ids"][:length]
    tokens = torch.cat([row["prompt_ids"], targets])
    # The logits before each response token: those of the last prompt token to those of the last but one.
    logits = model(input_ids=tokens[None], use_cache=False, logits_to_keep=length + 1).logits[0, :-1]
    log_probs = -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    ratio = torch.exp(log_probs - row["old_per_token_logps"][:length])
    advantage = row["advantages"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -surrogate.mean()


def main() -> None:
    answer, lines = Answers(), requests()
    job = next(lines)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).train()
    if job["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["rate"], weight_decay=0.0, fused=True)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    attention = model.config._attn_implementation
    answer(versions=f"{versions}, {torch.get_num_threads()} threads, attention {attention}, optimiser fused AdamW")
    for request in lines:
        batch = {name: torch.from_numpy(array) for name, array in np.load(request["batch"]).items()}
        count = len(batch["lengths"])
        start = time.perf_counter(), time.process_time()
        total = 0.0
        for number in range(count):
            loss = sequence_loss(model, {name: array[number] for name, array in batch.items()}, job["clip"]) / count
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job["max_norm"])
        optimizer.step()
        optimizer.zero_grad()
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        answer(seconds=seconds, cpu_seconds=cpu_seconds, loss=total, grad_norm=float(norm), peak_gb=peak_gb())


if __name__ == "__main__":
    main()
