"""A peer of generate.py and uneven.py: transformers on torch, in its own environment; answers.py has the contract.

job {"folder", "prompts": .npy, "group", "max_tokens"} -> {"versions", "greedy": [B][R]}, then for each request one
rollout: {"seconds", "cpu_seconds", "peak_gb"}. "greedy_tokens" of the job ends the greedy ones earlier. A request may
bring {"batch": .npz} with other prompts and the tokens after which each sample ends.
"""

import platform
import time

import numpy as np
import torch
import transformers
from answers import Answers, peak_gb, requests


class GivenLengths(transformers.StoppingCriteria):
    """Ends row n after `lengths[n]` tokens beyond the prompt, as an end token there would."""

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self.ends = prompt + torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def main() -> None:
    answer, lines = Answers(), requests()
    job = next(lines)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
    prompts = torch.from_numpy(np.load(job["prompts"])).long()
    # No end token: every sample has its full length, or the one that is given.
    fixed = {"max_new_tokens": job["max_tokens"], "eos_token_id": -1, "pad_token_id": 0}

    def generate(prompts: torch.Tensor, **how) -> torch.Tensor:
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **fixed | how)
        return out[:, prompts.shape[1] :]

    greedy = generate(prompts, do_sample=False, max_new_tokens=job.get("greedy_tokens", job["max_tokens"]))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    answer(versions=f"{versions}, {torch.get_num_threads()} threads", greedy=greedy.tolist())
    for seed, request in enumerate(lines):
        lengths, criteria = [job["max_tokens"]] * len(prompts) * job["group"], None
        if "batch" in request:
            batch = np.load(request["batch"])
            prompts, lengths = torch.from_numpy(batch["prompt_ids"][:: job["group"]]), batch["lengths"].tolist()
            criteria = transformers.StoppingCriteriaList([GivenLengths(prompts.shape[1], lengths)])
        torch.manual_seed(seed)
        start = time.perf_counter(), time.process_time()
        out = generate(
            prompts,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=job["group"],
            stopping_criteria=criteria,
        )
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        if out.shape != (len(lengths), max(lengths)):
            raise SystemExit(f"generate gave {tuple(out.shape)}")
        if any(out[row, length:].any() for row, length in enumerate(lengths)):
            raise SystemExit("generate did not keep to the lengths that were given")
        answer(seconds=seconds, cpu_seconds=cpu_seconds, peak_gb=peak_gb())


if __name__ == "__main__":
    main()
