"""A peer of generate.py and uneven.py: Tunix's sampler (JAX, flax nnx), in its own environment; see answers.py.

job {"folder", "prompts": .npy, "group", "max_tokens", plus the decoder's sizes} -> {"versions", "greedy": [B][R]},
then for each request one rollout: {"seconds", "cpu_seconds", "peak_gb"}; the first compiles. "greedy_tokens" of the job
ends the greedy ones earlier. A request may bring {"batch": .npz} with other prompts and the tokens after which each
sample ends.
"""

import dataclasses
import importlib.metadata
import platform
import time
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
from answers import Answers, peak_gb, requests
from tunix.generate import sampler
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


@flax.struct.dataclass
class StateWithEnds(sampler._SamplingState):
    """The sampler's state, with the token number after which each row [N] ends."""

    ends: jax.Array | None = None


class GivenLengths(sampler.Sampler):
    """The sampler, whose row n ends after `ends[n]` tokens, at least 2, as an end token there would end it."""

    ends: np.ndarray  # [N]

    def __init__(self, *inputs) -> None:
        super().__init__(*inputs)
        decode = self._compiled_decode_fn
        self._compiled_decode_fn = lambda params, state: decode(params, self._with_ends(state, jnp.asarray(self.ends)))

    @staticmethod
    def _with_ends(state: sampler._SamplingState, ends: jax.Array) -> StateWithEnds:
        names = [field.name for field in dataclasses.fields(sampler._SamplingState)]
        return StateWithEnds(**{name: getattr(state, name) for name in names}, ends=ends)

    def _sample(self, logits, eos, cache, sampler_state):
        state = super()._sample(logits, eos, cache, sampler_state)
        if not isinstance(sampler_state, StateWithEnds):  # The first token comes with the prompt.
            return state
        written = state.decoding_step + 1 - state.num_input_tokens
        return self._with_ends(state.replace(done=state.done | (written >= sampler_state.ends)), sampler_state.ends)


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
    cache = sampler.CacheConfig(length, config.num_layers, config.num_kv_heads, config.head_dim)
    given = PromptsByNumber(prompts)
    tunix = GivenLengths(model, given, cache)

    def generate(samples: int, ends: list[int], **how) -> np.ndarray:
        # The sampler knows no groups: every sample is a prompt of its own, as its GRPO learner passes them.
        texts = [str(number) for number in range(len(given.prompts)) for _ in range(samples)]
        tunix.ends = np.array(ends, np.int32)
        # No token ends a response.
        out = tunix(texts, max_tokens, max_prompt_length=prompts.shape[1], eos_tokens=[-1], **how)
        tokens = np.array([np.asarray(row) for row in out.tokens])
        # What was not reached is still padding, or cut off.
        if len(tokens) != len(texts) or ((tokens >= 0).sum(1) != max(ends)).any():
            raise SystemExit(f"the sampler gave {tokens.shape}, {(tokens >= 0).sum(1)} tokens for {max(ends)}")
        return tokens[:, : max(ends)]

    greedy = generate(1, [job.get("greedy_tokens", max_tokens)] * len(prompts))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "google-tunix")]
    answer(versions=", ".join([f"Python {platform.python_version()}", *versions]), greedy=greedy.tolist())
    for seed, request in enumerate(lines):
        ends = [max_tokens] * len(prompts) * group
        if "batch" in request:
            batch = np.load(request["batch"])
            given.prompts, ends = batch["prompt_ids"][::group], batch["lengths"].tolist()
        start = time.perf_counter(), time.process_time()
        generate(group, ends, temperature=1.0, top_p=1.0, top_k=None, seed=seed)
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        answer(seconds=seconds, cpu_seconds=cpu_seconds, peak_gb=peak_gb())


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
