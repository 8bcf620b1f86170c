"""The Qwen families in the programs of a run: parts, stages, packing and meshes change no sample and no update."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_qwen
from test_packed_update import (
    LENGTHS,
    MICRO_BATCHES,
    OBJECTIVE,
    OPTIMIZER,
    B,
    G,
    R,
    assert_equal_trees,
    mesh_of,
    put,
    trace_of,
    with_adapters,
)

from balcap_jax.models import attention, lora, packing
from balcap_jax.models.packing import UNIT
from balcap_jax.parallel import sharding
from balcap_jax.parallel.host_batch import make_reordering
from balcap_jax.rollout import Rollout, Sampling, refilled, sample
from balcap_jax.staging import Stage
from balcap_jax.train_step import RLBatch, finalise, init_state, make_rl_step
from balcap_jax.training.programs import state_shardings

GRIDS = [(2, 3), (1, 1), (3, 2), (1, 5), (2, 2), (1, 4), (3, 1), (2, 1)]
P = 10
PARTS = 2
# Of the prompts of a part, on one device and on each of four: lines that split, and fewer of them than prompts.
STAGES = {4: (Stage(4, 3), Stage(3, 1)), 1: (Stage(1, 3), Stage(1, 1))}
LIMITS = np.maximum(LENGTHS, 1)[np.argsort(LENGTHS.sum(1))]  # The longest of the batch lie side by side.
SAMPLING = Sampling(G, R, temperature=OBJECTIVE.temperature)
FREEZE = "^(vision|merger|deepstack)/"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The cache of R positions is nine blocks, the last of them not whole."""
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)


@functools.cache
def policy_of(family: str):
    """The toy policy with sizes that divide over a mesh; of Qwen3-VL one decoder layer gains nothing."""
    tower = {"layers": 3, "max_image_tokens": 6, "remat": "full"}
    if family == "qwen2_5_vl":
        tower["full_attention_layers"] = (1,)
    else:
        tower["deepstack_layers"] = (0, 2)
    return tiny_qwen.make_policy(family, tower=tower, layers=3, vocab=42, remat="full")


@functools.cache
def inputs(family: str) -> tuple:
    """(parameters, prompts, a key for each branch) on the host."""
    policy = policy_of(family)
    prompt = tiny_qwen.make_prompt(policy, GRIDS, P)
    params, prompt = jax.device_get((tiny_qwen.make_params(policy), prompt))  # Updates donate what they are given.
    return params, prompt, jax.random.split(jax.random.key(7), (B, G))


@functools.cache
def drawn(family: str, parts: int = 1, shrinks: bool = False, refills: bool = False, **sizes: int) -> Rollout:
    """The rollout on the host, sampled on a mesh of these sizes."""
    policy, mesh = policy_of(family), mesh_of(**sizes)
    prompts = B // parts // sharding.parts_of(mesh)
    stages = STAGES[prompts] if shrinks else (Stage(prompts, G),)

    @jax.jit
    def rollout(params, prompt, keys, limits):
        def part(prompt, keys, limits):
            return sample(policy, params, prompt, keys, SAMPLING, mesh, limits=limits, stages=stages)

        if refills:
            settings = dataclasses.replace(SAMPLING, parts=parts, refill=True)
            return refilled(policy, params, prompt, keys, settings, mesh, limits=limits)
        with sharding.layout(mesh, sharding.SAMPLING):
            return sharding.in_parts(part, (prompt, keys, limits), parts)

    params, *rows = inputs(family)
    params = jax.device_put(params, sharding.tree_shardings(mesh, params))
    return jax.device_get(rollout(params, *put(mesh, (*rows, LIMITS))))


def assert_same_samples(found: Rollout, whole: Rollout) -> None:
    for name in ("tokens", "mask", "lengths", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(found.policy_log_probs, whole.policy_log_probs, atol=1e-5)
    np.testing.assert_allclose(found.image_embeds, whole.image_embeds, atol=1e-5)
    assert found.slots.sum() < 0.8 * whole.slots.sum()


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_a_rollout_in_parts_that_shrink_has_the_samples_of_the_whole(family):
    whole = drawn(family)
    assert (whole.lengths == LIMITS).any()
    assert (whole.lengths < LIMITS).any()
    assert whole.lengths.max() == R
    assert_same_samples(drawn(family, PARTS, shrinks=True), whole)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_a_refilled_rollout_has_the_samples_of_the_whole(family, sizes):
    assert_same_samples(drawn(family, PARTS, refills=True, **sizes), drawn(family))


@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"])
def test_packed_log_probs_are_those_that_decoding_gave(family):
    """In parts that shrink, so that a branch that lost its prompt or its cache on the way would not agree."""
    policy, out, (params, prompt, _) = policy_of(family), drawn(family, PARTS, shrinks=True), inputs(family)
    assert out.slots.sum() < 0.8 * B * G * R
    bucket = -(-int(packing.units_of(out.lengths).sum()) * UNIT // (B * G))
    options = {"temperature": SAMPLING.temperature, "mask": out.mask, "token_bucket": bucket}
    found = jax.jit(functools.partial(policy.log_probs, **options))(params, prompt, out.image_embeds, out.tokens)
    assert (np.asarray(found)[~out.mask] == 0).all()
    np.testing.assert_allclose(found, out.policy_log_probs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_eight_devices_sample_what_one_does(family):
    found = drawn(family, PARTS, shrinks=True, data=2, fsdp=2, tensor=2)
    assert_same_samples(found, drawn(family))


def updated(family: str, packed: bool, adapted: bool = False, freeze: str = FREEZE, micro_batches: int = 1, **sizes):
    """(gradient, metrics) of the RL update on the samples of the rollout; where it is packed, prompts are dealt out."""
    policy, mesh, out = policy_of(family), mesh_of(**sizes), drawn(family)
    params, prompt, _ = inputs(family)
    if adapted:
        policy, params = with_adapters(policy, params)
        freeze = f"{lora.FREEZE_BASE}|{freeze}"
    rng = np.random.default_rng(7)
    batch = RLBatch(
        prompt=prompt,
        image_embeds=out.image_embeds,
        responses=out.tokens,
        mask=out.mask,
        old_log_probs=out.policy_log_probs,
        rewards=rng.random((B, G, 3)).astype(np.float32),
        valid=rng.random((B, G, 3)) > 0.1,
        words=rng.integers(3, 30, (B, G)),
        reference_words=rng.integers(8, 12, B),
        truncated=out.truncated,
    )
    batch, options = put(mesh, batch), {"freeze": freeze, "micro_batches": micro_batches}
    if packed:
        parts = sharding.parts_of(mesh), micro_batches
        units, responses = packing.units_of(out.lengths).sum(1), B * G // (parts[0] * parts[1])
        order = packing.deal(units, *parts)
        room = packing.largest_part(units[order], *parts)
        assert room < packing.largest_part(units, *parts)  # In the order of the batch they would not fit.
        options["token_bucket"] = room * UNIT // responses
        assert packing.capacity(options["token_bucket"], responses) == room
        batch = make_reordering(mesh)(batch, put(mesh, order))
    state = init_state(params, OPTIMIZER, freeze)
    state = jax.device_put(jax.device_get(state), state_shardings(mesh, state))
    reference = jax.tree.map(lambda x: 1.02 * x, state.params)  # The update donates the state.
    state, metrics = make_rl_step(policy, OPTIMIZER, OBJECTIVE, **options)(state, batch, reference)
    return trace_of(state), finalise(metrics)


def assert_same_update(found, wanted) -> None:
    (gradient, values), (wanted_gradient, wanted_values) = found, wanted
    assert values.pop("padding/update_useful") > 1.3 * wanted_values.pop("padding/update_useful")
    assert values.keys() == wanted_values.keys()
    for name, value in values.items():
        np.testing.assert_allclose(value, wanted_values[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert_equal_trees(gradient, wanted_gradient, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("adapted", "freeze"), [(False, FREEZE), (False, ""), (True, FREEZE)], ids=str)
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_a_packed_update_in_two_parts_is_the_padded_one(family, adapted, freeze):
    """With the vision side frozen, with all of it trained, and of adapters."""
    found = updated(family, True, adapted, freeze, MICRO_BATCHES)
    assert any(name.startswith("merger") for name in found[0]) == (freeze != FREEZE)
    assert any("lora_a" in name for name in found[0]) == adapted
    if not adapted:  # The samples are of these parameters.
        assert abs(found[1]["ratio/mean"] - 1) < 1e-5
        assert found[1]["drift/max_abs_logp"] < 2e-5
    assert_same_update(found, updated(family, False, adapted, freeze))


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
def test_a_packed_update_on_eight_devices_is_the_padded_one_on_one(family):
    assert_same_update(updated(family, True, data=2, fsdp=2, tensor=2), updated(family, False))
