"""A small captioner on jax's default device, for device.py to compare with the same on a CPU.

    python benchmarks/device_parity.py OUT.npz

Qwen2.5-VL's structure with heads of 128 features, which every attention kernel takes: 4 images, 4 responses of up to 64
tokens. Written: float32 log-probabilities, gradient (padded and packed), loss, sampled tokens, and log-probabilities in
bfloat16 with the device's own attention kernel.
"""

import inspect
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balcap_jax import models
from balcap_jax.config import recipes
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer
from balcap_jax.models.policy import Policy, Prompt
from balcap_jax.rollout import Sampling, example_keys, make_rollout
from balcap_jax.train_step import RLBatch, RLObjective, init_state, make_rl_step

RECIPE = Path(__file__).parents[1] / "configs" / "scenes.py"
SIZES = {"width": "256", "layers": "2", "heads": "2", "kv_heads": "1", "head_size": "128", "mrope_section": "16,24,24"}
B, G, R = 4, 4, 64
# Keeps the gradient as its state: what is compared is not the step of an optimiser.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda trained: jax.tree.map(jnp.zeros_like, trained),
    lambda gradient, _, trained=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def make_policy(dtype: str) -> tuple[Policy, Any]:
    overrides = {f"model.{name}": value for name, value in SIZES.items()} | {"model.dtype": dtype}
    return models.build(recipes.load(f"{RECIPE}:qwen", overrides).model, scenes_tokenizer())


def make_batch(policy: Policy, prompt: Prompt, embeds: jax.Array, log_probs: jax.Array, responses, mask) -> RLBatch:
    rng = np.random.default_rng(1)
    return RLBatch(
        prompt,
        embeds,
        responses,
        mask,
        np.where(mask, np.asarray(log_probs) + rng.normal(0, 0.1, mask.shape), 0).astype(np.float32),
        rng.random((B, G, 1)).astype(np.float32),
        np.ones((B, G, 1), bool),
        np.full((B, G), 20),
        np.full(B, 20),
        np.zeros((B, G), bool),
    )


def compute() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    policy, processor = make_policy("float32")
    prompt = processor([rng.integers(0, 256, (96, 96, 3), np.uint8) for _ in range(B)], ["describe the image"] * B)
    params = jax.jit(policy.init)(jax.random.key(0))
    lengths = rng.integers(1, R // 2, (B, G))
    lengths[0, 0] = R
    mask = np.arange(R) < lengths[..., None]
    allowed = np.setdiff1d(np.arange(policy.vocab), [*policy.forbidden, *policy.end_tokens])
    responses = np.where(mask, rng.choice(allowed, mask.shape), policy.pad_token).astype(np.int32)

    found = {}
    embeds = jax.jit(policy.encode)(params, prompt.images)
    log_probs = jax.jit(policy.log_probs)(params, prompt, embeds, responses)
    found["log_probs"] = np.where(mask, np.asarray(log_probs), 0)
    objective = RLObjective(("one",), (1.0,), (False,), max_tokens=R)
    batch = make_batch(policy, prompt, embeds, found["log_probs"], responses, mask)
    packs = "token_bucket" in inspect.signature(make_rl_step).parameters
    # All but one response take one unit of 32 tokens: three quarters of R on average are more than they need.
    forms = {"padded": {}} | ({"packed": {"token_bucket": R * 3 // 4}} if packs else {})
    for name, options in forms.items():
        state = init_state(jax.tree.map(jnp.copy, params), KEEP_GRADIENT, "^(vision|merger)/")
        state, metrics = make_rl_step(policy, KEEP_GRADIENT, objective, freeze="^(vision|merger)/", **options)(
            state, batch
        )
        found[f"loss/{name}"] = np.asarray(metrics["loss"].total)
        found |= {f"gradient/{name}/{path}": np.asarray(value) for path, value in state.opt_state.items()}

    keys = example_keys([str(number) for number in range(B)])
    rollout = make_rollout(policy, Sampling(G, R))(params, prompt, keys, np.uint32(0), np.uint32(0))
    found["tokens"] = np.asarray(rollout.tokens)

    policy, _ = make_policy("bfloat16")
    low = jax.jit(policy.log_probs)(params, prompt, embeds.astype(jnp.bfloat16), responses)
    found["log_probs_bfloat16"] = np.where(mask, np.asarray(low), 0)
    return found


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """What `ours` and `theirs` differ by: absolute, of a gradient relative to the largest entry of each array.

    "tokens" is the share of sampled tokens that differ.
    """
    gradients: dict[str, list[float]] = {}
    result = {}
    for name, value in theirs.items():
        if name.startswith("gradient/"):
            with np.errstate(invalid="ignore"):  # NaN, which no bar allows, where all of a gradient is 0
                error = float(np.abs(ours[name] - value).max() / np.abs(value).max())
            gradients.setdefault("/".join(name.split("/")[:2]), []).append(error)
        elif name == "tokens":
            result[name] = float(np.mean(ours[name] != value))
        else:
            result[name] = float(np.abs(ours[name] - value).max())
    return result | {name: float(np.max(errors)) for name, errors in gradients.items()}


if __name__ == "__main__":
    # float32 means float32: accelerators would multiply in fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    np.savez(sys.argv[1], **compute())
