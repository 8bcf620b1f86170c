"""What the compiled programs never hold: logits of more than a chunk, and a prompt once per sample.

Read off the shapes in the optimised HLO. All sizes differ and are no multiples of each other, so that a size (or its
product with another) says which axis it is.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_llava import BOS, IMAGE, PAD, make_params, make_policy

from balcap_jax.models.policy import Prompt
from balcap_jax.rollout import Sampling, make_rollout
from balcap_jax.train_step import RLBatch, RLObjective, SFTBatch, init_state, make_rl_step, make_sft_step

B, G, P, R, V, CHUNK = 3, 5, 29, 17, 1009, 8
POLICY = make_policy(vocab=V, logits_chunk=CHUNK)
M, H = POLICY.decoder.kv_heads, POLICY.decoder.head_size
OPTIMIZER = optax.adamw(1e-3)


def prompt() -> Prompt:
    tokens = np.full((B, P), 7, np.int32)
    tokens[:, 0], tokens[:, 1:10] = BOS, IMAGE
    return Prompt(
        jnp.asarray(tokens),
        jnp.asarray(tokens != PAD),
        jnp.tile(jnp.arange(P), (B, 1)),
        jnp.zeros((B, 12, 12, 3), jnp.uint8),
    )


@functools.cache
def shapes(program: str) -> dict[tuple[int, ...], str]:
    """Every array shape of the compiled program, with the first instruction that has it."""
    params, group = make_params(POLICY), jnp.zeros((B, G))
    responses, mask = jnp.zeros((B, G, R), jnp.int32), jnp.ones((B, G, R), bool)
    if program == "rollout":
        scalar = jnp.uint32(0)
        lowered = make_rollout(POLICY, Sampling(G, R, top_p=0.9)).lower(
            params, prompt(), jnp.zeros(B, jnp.uint32), scalar, scalar
        )
    elif program == "sft":
        lowered = make_sft_step(POLICY, OPTIMIZER).lower(
            init_state(params, OPTIMIZER, ""), SFTBatch(prompt(), responses, mask)
        )
    else:
        objective = RLObjective(("one",), (1.0,), (False,), max_tokens=R, kl_coef=0.1)
        embeds = jnp.zeros((B, POLICY.image_tokens, POLICY.decoder.width))
        scores = (jnp.zeros((B, G, 1)), jnp.ones((B, G, 1), bool))
        batch = RLBatch(prompt(), embeds, responses, mask, jnp.zeros((B, G, R)), *scores, group, jnp.ones(B), group > 0)
        lowered = make_rl_step(POLICY, OPTIMIZER, objective).lower(
            init_state(params, OPTIMIZER, ""), batch, make_params(POLICY)
        )
    return shapes_in(lowered)


def shapes_in(lowered: jax.stages.Lowered) -> dict[tuple[int, ...], str]:
    found: dict[tuple[int, ...], str] = {}
    for line in lowered.compile().as_text().splitlines():
        for sizes in re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", line):
            found.setdefault(tuple(map(int, sizes.split(","))), line.strip())
    return found


@pytest.mark.parametrize("program", ["update", "sft"])
def test_no_logits_beyond_a_chunk(program):
    with_vocabulary = {shape: line for shape, line in shapes(program).items() if any(n % V == 0 for n in shape)}
    width = POLICY.decoder.width
    assert (V, width) in with_vocabulary  # the embedding, so the search does find such arrays
    tokens = {shape: math.prod(shape) / V for shape in with_vocabulary if math.prod(shape) != V * width}
    assert max(tokens.values()) == CHUNK // B * B  # logits of whole chunks do appear, and nothing larger
    assert B * G * R > 20 * CHUNK


def test_the_rollout_holds_logits_of_one_token_per_branch():
    tokens = [
        math.prod(shape) / V
        for shape in shapes("rollout")
        if any(n % V == 0 for n in shape) and math.prod(shape) != V * POLICY.decoder.width
    ]
    assert max(tokens) == B * G


def repeated_prefixes(found: dict[tuple[int, ...], str]) -> list[str]:
    """Instructions whose array is as large as all samples' own copies of their prompt's keys, in whatever order."""
    # Scores of the G R queries over P prefix keys are that large too, but have no feature axis.
    return [
        line
        for shape, line in found.items()
        if {G * P, B * G * P} & set(shape)
        or (P in shape and {H, M * H} & set(shape) and math.prod(shape) % (G * P * M * H) == 0)
    ]


def repeated_images(found: dict[tuple[int, ...], str]) -> list[str]:
    """Instructions with features of the vision tower for more than B images."""
    tokens, width = POLICY.image_tokens + 1, POLICY.vision.width
    own = B * tokens * width
    return [
        line
        for shape, line in found.items()
        if width in shape
        and (tokens in shape or math.prod(shape[:-1]) % tokens == 0)
        and math.prod(shape) % (G * own) == 0
    ]


@pytest.mark.parametrize("program", ["rollout", "update", "sft"])
def test_prompts_and_images_are_never_repeated_over_the_group(program):
    assert repeated_prefixes(shapes(program)) == []
    assert repeated_images(shapes(program)) == []


def test_these_checks_find_a_program_that_repeats():
    """The same model with every sample as a prompt of its own."""

    def loss(params, prompt, responses):
        repeated = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), prompt)
        embeds = POLICY.encode(params, repeated.images)
        return POLICY.log_probs(params, repeated, embeds, responses.reshape(B * G, 1, R)).sum()

    responses = jnp.zeros((B, G, R), jnp.int32)
    found = shapes_in(jax.jit(jax.grad(loss)).lower(make_params(POLICY), prompt(), responses))
    assert len(repeated_prefixes(found)) > 3
    assert len(repeated_images(found)) > 3
