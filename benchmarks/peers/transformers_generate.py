"""A peer of generate.py: transformers on torch, in an environment of its own; see answers.py for the contract.

job {"folder", "prompts": .npy, "group", "max_tokens"} -> {"versions", "greedy": [B][R]}, then for each request one
rollout: {"seconds"}.
"""

import platform
import time

import numpy as np
import torch
import transformers
from answers import Answers, requests


def main() -> None:
    answer, lines = Answers(), requests()
    job = next(lines)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
    prompts = torch.from_numpy(np.load(job["prompts"])).long()
    # No end token: every sample has its full length, on both sides.
    fixed = {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": job["max_tokens"],
        "eos_token_id": -1,
        "pad_token_id": 0,
    }

    def generate(**how) -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(prompts, **fixed, **how)[:, prompts.shape[1] :]

    greedy = generate(do_sample=False)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    answer(versions=f"{versions}, {torch.get_num_threads()} threads", greedy=greedy.tolist())
    for seed, _ in enumerate(lines):
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = generate(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=job["group"])
        seconds = time.perf_counter() - start
        if out.shape != (prompts.shape[0] * job["group"], job["max_tokens"]):
            raise SystemExit(f"generate gave {tuple(out.shape)}")
        answer(seconds=seconds)


if __name__ == "__main__":
    main()
