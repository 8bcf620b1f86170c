"""The whole Qwen models against transformers: random weights at small size, fp32 unless the test's name says bf16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference implementations need torch, of the [dev] extra")
pytest.importorskip("transformers")

import transformers  # noqa: E402
from reference_qwen import (  # noqa: E402
    VIDEO,
    VISION_END,
    VISION_START,
    grid_thw,
    make_reference,
    pixels,
    relative_error,
    to_params,
)
from tiny_qwen import EOS, FAMILIES, IMAGE, PAD, START, V, make_images, make_policy  # noqa: E402

from balcap_jax.models import attention, decoder, deepstack  # noqa: E402
from balcap_jax.models.decoder import Block  # noqa: E402
from balcap_jax.models.policy import Prompt  # noqa: E402
from balcap_jax.models.qwen2_5_vl.processing import mrope_positions  # noqa: E402
from balcap_jax.rollout import Sampling, make_rollout  # noqa: E402

# Two correct fp32 implementations agree to about 1e-6 at these sizes.
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
B, G, P, R = 3, 2, 52, 6
BATCHES = {0: [(2, 3), (5, 7), (1, 1)], 1: [(5, 8), (4, 4), (3, 9)]}
# Words before and after each image.
TEXTS = [(0, 2), (3, 1), (4, 5)]


every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def models(family: str, tied: bool = False):
    """(transformers model, our policy, its parameters) with the same weights."""
    policy = make_policy(family, tied_embeddings=tied)
    reference = make_reference(policy)
    return reference, policy, to_params(policy, reference.state_dict())


def make_batch(policy, seed: int, side: str = "right"):
    """Prompts of B images with text on both sides, padded on `side`: (Prompt, rows of tokens, patches, grids)."""
    rng, grids = np.random.default_rng(seed), BATCHES[seed]
    images, patches = make_images(policy, grids, seed)
    rows = []
    for (before, after), (height, width) in zip(TEXTS, grids, strict=True):
        words = rng.integers(START + 1, VIDEO, before + after).tolist()
        vision = [VISION_START, *[IMAGE] * (height * width), VISION_END]
        rows.append([START, *words[:before], *vision, *words[before:]])
    tokens, mask = np.full((B, P), PAD, np.int32), np.zeros((B, P), bool)
    for b, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(P - len(row), P)
        tokens[b, where], mask[b, where] = row, True
    positions = mrope_positions(tokens == IMAGE, mask, np.array(grids))
    return Prompt(tokens, mask, positions, images), rows, patches, grids


def make_responses(seed: int) -> np.ndarray:
    """Tokens [B, G, R]."""
    return np.random.default_rng(100 + seed).integers(START + 1, VIDEO, (B, G, R)).astype(np.int32)


def reference_inputs(policy, rows, patches, grids, side: str = "right") -> dict[str, torch.Tensor]:
    """The reference's arguments for `rows` of tokens, padded on `side`."""
    longest = max(map(len, rows))
    pad = [[PAD] * (longest - len(row)) for row in rows]
    tokens = torch.tensor([row + p if side == "right" else p + row for row, p in zip(rows, pad, strict=True)])
    real = torch.tensor([[1] * len(row) + [0] * len(p) for row, p in zip(rows, pad, strict=True)])
    return {
        "input_ids": tokens,
        "attention_mask": real if side == "right" else real.flip(1),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": pixels(policy.vision, np.concatenate(patches)),
        "image_grid_thw": grid_thw(grids),
    }


def reference_logits(reference, policy, batch, responses, side: str = "right") -> torch.Tensor:
    """[B, G, R, V]: what predicts each response token, every sample a sequence of its own."""
    _, rows, patches, grids = batch
    per_sample = []
    for g in range(G):
        longer = [row + responses[b, g].tolist() for b, row in enumerate(rows)]
        inputs = reference_inputs(policy, longer, patches, grids, side)
        logits = reference(**inputs).logits
        ends = [np.flatnonzero(mask)[-1] for mask in inputs["attention_mask"].numpy()]
        per_sample.append(torch.stack([logits[b, end - R : end] for b, end in enumerate(ends)]))
    return torch.stack(per_sample, dim=1)


def our_logits(policy, params, prompt: Prompt, responses) -> tuple[jax.Array, jax.Array]:
    """[B, G, R, V] by the update's path, and [B, V] of the first response token by the rollout's."""
    embeds = policy.encode(params, prompt.images)
    _, first = policy.prefill(params, prompt, embeds)
    x = policy._prompt_embeddings(params, prompt, embeds)
    y = decoder.embed(policy.decoder, params["decoder"], responses)
    hidden = decoder.forward(policy.decoder, params["decoder"], x, prompt.mask, prompt.positions, y)
    return decoder.logits(policy.decoder, params["decoder"], hidden), first


@functools.cache
def compiled_logits(policy):
    """`our_logits(params, prompt, responses)` of a policy, compiled for all tests that look at them."""
    return jax.jit(functools.partial(our_logits, policy))


@every_family
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_equal_transformers(family, side):
    reference, policy, _ = models(family)
    for seed in BATCHES:
        prompt, _, _, grids = make_batch(policy, seed, side)
        theirs, deltas = reference.model.get_rope_index(
            torch.tensor(prompt.tokens).long(),
            torch.tensor(prompt.tokens == IMAGE).int(),
            grid_thw(grids),
            attention_mask=torch.tensor(prompt.mask),
        )
        np.testing.assert_array_equal(prompt.positions, theirs.permute(1, 2, 0).numpy())
        # Where the response goes on.
        ours = decoder._next_position(policy.decoder, jnp.asarray(prompt.mask), jnp.asarray(prompt.positions))
        np.testing.assert_array_equal(ours, deltas[:, 0].numpy() + prompt.mask.sum(1))


@every_family
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_transformers(family, tied):
    reference, policy, params = models(family, tied)
    ours = compiled_logits(policy)
    allowed = [v for v in range(V) if v not in policy.forbidden]
    errors = {}
    for seed in BATCHES:
        for side in ("right", "left"):
            batch, responses = make_batch(policy, seed, side), make_responses(seed)
            logits, first = ours(params, batch[0], responses)
            with torch.no_grad():
                theirs = reference_logits(reference, policy, batch, responses, side)
            errors[seed, side] = relative_error(logits, theirs)
            errors[seed, side, "prefill"] = relative_error(first[:, allowed], theirs[:, 0, 0, allowed])
    print("logits", {key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE, errors


def test_each_feature_of_deepstack_counts():
    """Without one of them the logits are others than those that the test above allows, in prefill and in the update."""
    reference, policy, params = models("qwen3_vl")
    batch, responses = make_batch(policy, 0), make_responses(0)
    allowed = [v for v in range(V) if v not in policy.forbidden]
    with torch.no_grad():
        theirs = reference_logits(reference, policy, batch, responses)
    ours = compiled_logits(policy)
    for i in range(len(policy.vision.deepstack_layers)):
        second = params["deepstack"]["layers"]["second"]
        without = {name: leaf.at[i].set(0.0) for name, leaf in second.items()}
        layers = params["deepstack"]["layers"] | {"second": without}
        logits, first = ours(params | {"deepstack": {"layers": layers}}, batch[0], responses)
        assert relative_error(logits, theirs) > 1e3 * TOLERANCE
        assert relative_error(first[:, allowed], theirs[:, 0, 0, allowed]) > 1e3 * TOLERANCE


@every_family
def test_every_decoder_block_equals_transformers(family):
    reference, policy, params = models(family)
    c, side = policy.decoder, "left"
    prompt, rows, patches, grids = make_batch(policy, 1, side)

    @jax.jit
    def blocks(params):
        x = policy._prompt_embeddings(params, prompt, policy.encode(params, prompt.images))
        x, deepen = deepstack.split(x, c.width)
        block, rope, outputs = Block(c), decoder.rope_table(c, prompt.positions), [x]
        for i in range(c.layers):
            weights = {"params": jax.tree.map(lambda stacked, i=i: stacked[i], params["decoder"]["layers"])}
            q, k, v = block.apply(weights, x, rope, method="qkv")
            outputs.append(block.apply(weights, x, attention.causal(q, k, v, prompt.mask), method="output"))
            x = deepen(outputs[-1], i)  # The reference gives what its layers do, without what they gain.
        return outputs

    inputs = reference_inputs(policy, rows, patches, grids, side)
    with torch.no_grad():
        theirs = list(reference(**inputs, output_hidden_states=True).hidden_states)
    real = inputs["attention_mask"].bool()
    # The last of the reference's hidden states has gone through the final norm.
    ours = blocks(params)
    ours[-1] = decoder.RMSNorm(c.norm_eps).apply({"params": params["decoder"]["norm"]}, ours[-1])
    errors = [relative_error(x[prompt.mask], y[real]) for x, y in zip(ours, theirs, strict=True)]
    print("decoder blocks", [f"{error:.1e}" for error in errors])
    assert max(errors) <= TOLERANCE, errors


@every_family
@pytest.mark.parametrize(
    ("tied", "remat"),
    [
        (False, "none"),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(False, "dots", marks=pytest.mark.slow),
    ],
    ids=["untied", "tied, remat full", "untied, remat dots"],
)
def test_gradients_of_every_parameter_equal_transformers(family, tied, remat):
    reference, _, params = models(family, tied)
    policy = make_policy(family, tower={"remat": remat}, remat=remat, tied_embeddings=tied)
    batch, responses = make_batch(policy, 0), make_responses(0)
    weights = np.random.default_rng(5).standard_normal((B, G, R)).astype(np.float32)

    def ours(params):
        embeds = policy.encode(params, batch[0].images)
        return jnp.sum(weights * policy.log_probs(params, batch[0], embeds, responses))

    loss, gradients = jax.jit(jax.value_and_grad(ours))(params)

    reference.zero_grad()
    logits = reference_logits(reference, policy, batch, responses)
    logits = logits.index_fill(-1, torch.tensor(policy.forbidden), -1e30)
    chosen = torch.gather(logits.log_softmax(-1), -1, torch.tensor(responses).long()[..., None])[..., 0]
    their_loss = (torch.tensor(weights) * chosen).sum()
    their_loss.backward()
    theirs = to_params(policy, {name: parameter.grad for name, parameter in reference.named_parameters()})

    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)
    errors = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (relative_error(a, b), jax.tree_util.keystr(path, simple=True, separator="/")),
        gradients,
        theirs,
    )
    errors = sorted(jax.tree.leaves(errors, is_leaf=lambda x: isinstance(x, tuple)), reverse=True)
    print("gradients", errors[:4])
    assert errors[0][0] <= GRADIENT_TOLERANCE, errors[:5]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@every_family
@pytest.mark.parametrize(("seed", "side"), [(0, "left"), (1, "right")])
def test_greedy_generation_equals_transformers_for_64_tokens(family, seed, side):
    reference, policy, params = models(family)
    # No sample may end, so that all 64 tokens are compared.
    banned = (PAD, EOS, IMAGE, START)
    policy = dataclasses.replace(policy, forbidden=banned)
    prompt, rows, patches, grids = make_batch(policy, seed, side)
    rollout = make_rollout(policy, Sampling(1, 64, greedy=True))
    out = rollout(params, prompt, jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(0))
    inputs = reference_inputs(policy, rows, patches, grids, "left")
    settings = transformers.GenerationConfig(
        max_new_tokens=64, do_sample=False, suppress_tokens=list(banned), pad_token_id=PAD, eos_token_id=EOS
    )
    with torch.no_grad():
        theirs = reference.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
    assert theirs.shape == (B, 64)
    assert len(np.unique(theirs)) > 8  # not one token over and over
    np.testing.assert_array_equal(out.tokens[:, 0], theirs.numpy())


@every_family
def test_bf16_is_as_near_to_fp32_as_transformers_bf16(family):
    reference, _, params = models(family)
    policy = make_policy(family, tower={"dtype": "bfloat16"}, dtype="bfloat16")
    batch, responses = make_batch(policy, 1), make_responses(1)
    logits, _ = jax.jit(functools.partial(our_logits, policy))(params, batch[0], responses)
    with torch.no_grad():
        exact = reference_logits(reference, policy, batch, responses)
        theirs = reference_logits(make_reference(policy).to(torch.bfloat16), policy, batch, responses)
    ours, theirs = (relative_rms(x, exact) for x in (logits, theirs))
    print(f"bf16: ours {ours:.1e}, transformers {theirs:.1e}")
    assert ours <= 1.25 * theirs
    assert ours <= 0.05


def relative_rms(ours, exact: torch.Tensor) -> float:
    ours = ours.float().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours, np.float32)
    return float(np.sqrt(np.mean((ours - exact.numpy()) ** 2) / np.mean(exact.numpy() ** 2)))
