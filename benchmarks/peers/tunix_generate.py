"""A peer of generate.py: Tunix's sampler (JAX, flax nnx), in an environment of its own; answers.py has the contract.

job {"folder", "prompts": .npy, "group", "max_tokens", plus the decoder's sizes} -> {"versions", "greedy": [B][R]},
then for each request one rollout: {"seconds"}; the first compiles.
"""

import importlib.metadata
import platform
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from answers import Answers, requests
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors


class PromptsByNumber:
    """A tokenizer whose texts are numbers of prompts: the sampler takes strings only. No prompt holds the pad id."""

    def __init__(self, prompts: np.ndarray) -> None:
        self.prompts = prompts

    def encode(self, text: str) -> list[int]:
        return self.prompts[int(text)].tolist()

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # none

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -1


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)
    answer, lines = Answers(), requests()
    job = next(lines)
    prompts, group, max_tokens = np.load(job["prompts"]), job["group"], job["max_tokens"]
    config = ModelConfig(
        num_layers=job["layers"],
        vocab_size=job["vocab"],
        embed_dim=job["width"],
        hidden_dim=job["mlp"],
        num_heads=job["heads"],
        head_dim=job["head_size"],
        num_kv_heads=job["kv_heads"],
        rope_theta=int(job["rope_theta"]),
        norm_eps=job["norm_eps"],
        weight_tying=True,
    )
    model = create_model_from_safe_tensors(job["folder"], config, dtype=jnp.float32)
    length = prompts.shape[1] + max_tokens
    cache = CacheConfig(length, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, PromptsByNumber(prompts), cache)

    def generate(samples: int, **how) -> np.ndarray:
        # The sampler knows no groups: every sample is a prompt of its own, as its GRPO learner passes them.
        texts = [str(number) for number in range(len(prompts)) for _ in range(samples)]
        # No token ends a response.
        out = sampler(texts, max_tokens, max_prompt_length=prompts.shape[1], eos_tokens=[-1], **how)
        tokens = np.array([np.asarray(row) for row in out.tokens])
        if tokens.shape != (len(texts), max_tokens):
            raise SystemExit(f"the sampler gave {tokens.shape}")
        return tokens

    greedy = generate(1)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "google-tunix")]
    answer(versions=", ".join([f"Python {platform.python_version()}", *versions]), greedy=greedy.tolist())
    for seed, _ in enumerate(lines):
        start = time.perf_counter()
        generate(group, temperature=1.0, top_p=1.0, top_k=None, seed=seed)
        answer(seconds=time.perf_counter() - start)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
