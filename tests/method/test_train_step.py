"""The compiled updates against loops in NumPy and the gradient of the plain repeated path."""

import dataclasses
import functools
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_llava
import pytest
from tiny_llava import EOS, G, R, make_params, make_policy, make_prompt, make_responses, make_rows

from balcap_jax.rollout import Sampling, make_rollout
from balcap_jax.train_step import (
    Max,
    RLBatch,
    RLObjective,
    SFTBatch,
    finalise,
    init_state,
    make_rl_step,
    make_sft_step,
    split,
    vision_is_frozen,
)

B = 4
NAMES = ("precision", "recall", "linguistic")
CONSTANT = {"normaliser": "constant", "temperature": 0.7, "gate": False}
OBJECTIVE = RLObjective(NAMES, weights=(1.0, 0.5, 2.0), gated=(False, False, True), max_tokens=R)
POLICY = make_policy()
RATE = 0.1
# After the first update the trace is the gradient itself.
OPTIMIZER = optax.chain(optax.trace(decay=0.9), optax.scale(-RATE))

rl_step = functools.cache(functools.partial(make_rl_step, POLICY, OPTIMIZER))
sft_step = functools.cache(functools.partial(make_sft_step, POLICY, OPTIMIZER))
encode = jax.jit(POLICY.encode)


# ------------------------------------------------------------------------------------------------- the slow version


@functools.cache
def plain(temperature: float = 1.0):
    """(params, cotangent) -> log-probabilities [B, G, R] by the plain path, and the gradient of their product."""
    rows, images, (responses, mask) = make_rows(POLICY, B), make_prompt(POLICY, batch=B).images, make_responses(B)

    def log_probs(params):
        found = plain_llava.log_probs(POLICY, params, rows, images, responses, temperature)
        return jnp.where(mask, found, 0.0)

    def pull(params, cotangent):
        value, back = jax.vjp(log_probs, params)
        return value, back(cotangent)[0]

    return jax.jit(pull)


class ByHand(NamedTuple):
    loss: float
    slope: np.ndarray  # [B, G, R], derivative of the loss by each log-probability
    advantages: np.ndarray
    in_band: np.ndarray
    scored: np.ndarray
    ratio: np.ndarray
    clipped: np.ndarray
    kl: np.ndarray


def by_hand(objective: RLObjective, batch: RLBatch, log_probs, reference=None) -> ByHand:
    """Gate, advantages (c-GDPO), surrogate, KL and their derivative by loops, from log-probabilities [B, G, R]."""
    b = jax.tree.map(np.asarray, batch._replace(prompt=None, image_embeds=None))
    log_probs = np.float64(log_probs)
    members = [(i, j) for i in range(B) for j in range(G)]
    taking_part = ~b.truncated if objective.exclude_truncated else np.ones((B, G), bool)
    in_band = np.array(
        [
            [objective.gate_low <= b.words[i, j] / b.reference_words[i] <= objective.gate_high for j in range(G)]
            for i in range(B)
        ]
    )

    z = np.zeros((B, G, len(NAMES)))
    for i in range(B):
        for k in range(len(NAMES)):
            rewards = {}
            for j in range(G):
                if taking_part[i, j] and b.valid[i, j, k]:
                    gated = objective.gate and objective.gated[k] and not in_band[i, j]
                    scale = objective.scales[k] if objective.scales else 1.0
                    rewards[j] = 0.0 if gated else scale * float(b.rewards[i, j, k])
            if len(rewards) >= 2 and len(set(rewards.values())) > 1:
                mean, std = np.mean(list(rewards.values())), np.std(list(rewards.values()), ddof=1)
                for j, reward in rewards.items():
                    z[i, j, k] = objective.weights[k] * (reward - mean) / (std + objective.eps_group)
    scored, combined = taking_part & b.valid.any(-1), z.sum(-1)
    if objective.aggregation == "soft_min":
        for m in members:
            if scored[m]:
                combined[m] = -np.log(np.mean(np.exp(-objective.kappa * z[m][b.valid[m]]))) / objective.kappa
    if objective.aggregation == "conflict":
        mixed = (z < 0).any(-1) & (z > 0).any(-1)
        scored = scored & ~(mixed & (np.abs(combined) < 0.2 * np.abs(z).sum(-1)))
    mean, spread = np.mean(combined[scored]), np.std(combined[scored], ddof=1)
    advantages = np.where(scored, (combined - mean) / (spread + objective.eps_batch), 0.0)

    tokens_of = {m: int(b.mask[m].sum()) for m in members if scored[m]}
    loss, slope, kl = 0.0, np.zeros((B, G, R)), np.zeros((B, G, R))
    ratio, clipped = np.ones((B, G, R)), np.zeros((B, G, R), bool)
    for m in members:
        for t in range(R):
            if not (scored[m] and b.mask[m][t]):
                continue
            weight = {
                "sequence": 1 / (tokens_of[m] * len(tokens_of)),
                "token": 1 / sum(tokens_of.values()),
                "constant": 1 / (B * G * objective.max_tokens),
            }[objective.normaliser]
            at, a = (*m, t), advantages[m]
            ratio[at] = np.exp(log_probs[at] - b.old_log_probs[at])
            bounded = min(max(ratio[at], 1 - objective.clip_low), 1 + objective.clip_high)
            clipped[at] = bounded * a < ratio[at] * a
            loss += weight * -min(ratio[at] * a, bounded * a)
            slope[at] = 0.0 if clipped[at] else weight * -a * ratio[at]
            if reference is not None:
                difference = float(reference[at]) - log_probs[at]
                kl[at] = np.exp(difference) - 1 - difference
                loss += objective.kl_coef * weight * kl[at]
                slope[at] += objective.kl_coef * weight * (1 - np.exp(difference))
    return ByHand(loss, slope, advantages, in_band, scored, ratio, clipped, kl)


@functools.cache
def _host_batch() -> RLBatch:
    rng = np.random.default_rng(7)
    responses, mask = make_responses(B)
    log_probs, _ = plain()(make_params(POLICY), jnp.zeros((B, G, R)))
    shape = (B, G, len(NAMES))
    valid = rng.random(shape) > 0.15
    valid[1, 2], valid[2, :3, 0] = False, False  # a member without any score; a column with a single one
    rewards = np.where(valid, rng.random(shape), 0.0).astype(np.float32)
    rewards[3, :, 1] = 0.3  # a constant column
    return jax.device_get(
        RLBatch(
            prompt=make_prompt(POLICY, batch=B),
            image_embeds=encode(make_params(POLICY), make_prompt(POLICY, batch=B).images),
            responses=responses,
            mask=mask,
            # Off-policy enough that tokens are clipped on both sides, and others are not.
            old_log_probs=jnp.where(mask, log_probs + 0.3 * rng.standard_normal(mask.shape), 0.0),
            rewards=rewards,
            valid=valid,
            words=rng.integers(3, 30, (B, G)),
            reference_words=np.array([10, 12, 9, 11]),
            truncated=~(np.asarray(responses) == EOS).any(-1),
        )
    )


def make_batch(**changes) -> RLBatch:
    return jax.tree.map(jnp.asarray, _host_batch()._replace(**changes))


def new_state(freeze: str = "", params=None):
    state = init_state(make_params(POLICY) if params is None else params, OPTIMIZER, freeze)
    return jax.device_put(state, jax.devices()[0])


def flat(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def gradient_of(state) -> dict[str, np.ndarray]:
    """The gradient of the first update: what the momentum trace of the optimiser holds."""
    return {path: np.asarray(leaf) for path, leaf in state.opt_state[0].trace.items()}


def largest_error(got: dict, want: dict) -> float:
    """Largest error of any array, relative to its own largest entry (or a thousandth of the largest of all)."""
    assert got.keys() == want.keys()
    floor = 1e-3 * max(np.abs(leaf).max() for leaf in want.values())
    return max(float(np.abs(got[path] - want[path]).max() / max(np.abs(want[path]).max(), floor)) for path in want)


# ------------------------------------------------------------------------------------------------- the RL step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normaliser": "token", "exclude_truncated": True, "clip_high": 0.28, "scales": (0.1, 10.0, 1.0)},
        {"normaliser": "token", "exclude_truncated": True, "aggregation": "conflict"},
        CONSTANT,
        pytest.param({"aggregation": "soft_min", "kappa": 2.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_and_gradient_equal_the_slow_version(changes):
    objective, batch, params = dataclasses.replace(OBJECTIVE, **changes), make_batch(), make_params(POLICY)
    log_probs, _ = plain(objective.temperature)(params, jnp.zeros((B, G, R)))
    expected = by_hand(objective, batch, log_probs)
    assert expected.clipped.any()
    assert not expected.clipped[np.asarray(batch.mask)].all()
    could = np.asarray(batch.valid).any(-1) & ~(np.asarray(batch.truncated) & objective.exclude_truncated)
    dropped = (could & ~expected.scored).sum()
    assert (dropped > 0) == (objective.aggregation == "conflict")
    _, gradient = plain(objective.temperature)(params, jnp.asarray(expected.slope, jnp.float32))

    state, metrics = rl_step(objective=objective)(new_state(), batch)
    np.testing.assert_allclose(finalise(metrics)["loss"], expected.loss, rtol=1e-5)
    assert metrics["advantage/dropped_frac"] == (dropped, could.sum())
    precision = np.asarray(batch.rewards)[..., 0].sum()  # As it came, whatever its scale; a missing one is 0.
    np.testing.assert_allclose(metrics["reward/precision"].total, precision, rtol=1e-5)
    assert largest_error(gradient_of(state), flat(gradient)) < 1e-5
    norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in flat(gradient).values()))
    np.testing.assert_allclose(finalise(metrics)["grad_norm"], norm, rtol=1e-5)
    # Trained from end to end: the gradient reaches the first layer of the vision tower.
    assert np.abs(gradient_of(state)["vision/patches/patch/kernel"]).max() > 1e-5
    stepped = {path: leaf - np.float32(RATE) * gradient_of(state)[path] for path, leaf in flat(params).items()}
    for path, leaf in flat(state.params).items():
        np.testing.assert_allclose(leaf, stepped[path], atol=1e-7, err_msg=path)
    assert int(state.step) == 1


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_micro_batches_add_up_to_the_whole(parts):
    whole, metrics = rl_step(objective=OBJECTIVE)(new_state(), make_batch())
    cut, cut_metrics = rl_step(objective=OBJECTIVE, micro_batches=parts)(new_state(), make_batch())
    for path, leaf in flat(whole.params).items():
        np.testing.assert_allclose(flat(cut.params)[path], leaf, atol=1e-6, err_msg=path)
    assert largest_error(gradient_of(cut), gradient_of(whole)) < 1e-5
    assert metrics.keys() == cut_metrics.keys()
    for name, value in finalise(metrics).items():
        np.testing.assert_allclose(finalise(cut_metrics)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="batch of 4 prompts does not divide into 3 micro-batches"):
        rl_step(objective=OBJECTIVE, micro_batches=3)(new_state(), make_batch())


def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimizer_state():
    freeze, batch = "^(vision|projector)/", make_batch()
    before = flat(make_params(POLICY))
    assert vision_is_frozen(make_params(POLICY), freeze)
    state, _ = rl_step(objective=OBJECTIVE, freeze=freeze)(new_state(freeze), batch)
    after = flat(state.params)
    assert after.keys() == before.keys()
    frozen = {path for path in before if not path.startswith("decoder/")}
    assert frozen == set(split(make_params(POLICY), freeze)[1])
    assert set(gradient_of(state)) == set(before) - frozen
    for path in frozen:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert all((after[path] != before[path]).any() for path in before if path not in frozen)

    # The rollout's image embeddings stand for another run of the frozen tower: the same gradient, and really used.
    expected, _ = rl_step(objective=OBJECTIVE)(new_state(), batch)
    want = {path: leaf for path, leaf in gradient_of(expected).items() if path not in frozen}
    assert largest_error(gradient_of(state), want) < 1e-5
    other, _ = rl_step(objective=OBJECTIVE, freeze=freeze)(
        new_state(freeze), make_batch(image_embeds=0 * _host_batch().image_embeds)
    )
    assert largest_error(gradient_of(other), want) > 1e-2


def test_a_projector_in_training_sees_the_images_again():
    freeze = "^vision/"
    assert not vision_is_frozen(make_params(POLICY), freeze)
    stale = make_batch(image_embeds=0 * _host_batch().image_embeds)
    state, _ = rl_step(objective=OBJECTIVE, freeze=freeze)(new_state(freeze), stale)
    expected, _ = rl_step(objective=OBJECTIVE)(new_state(), make_batch())
    want = {path: leaf for path, leaf in gradient_of(expected).items() if not path.startswith("vision/")}
    assert largest_error(gradient_of(state), want) < 1e-5


KL = dataclasses.replace(OBJECTIVE, kl_coef=0.4)


# Better machine code takes ten times as long to compile; the runs of system/ see a divergence below 1e-6 there.
@pytest.mark.slow
def test_kl_at_the_reference_is_zero():
    """So is its gradient, in code that is optimised: at the level of these tests two equal passes round differently."""
    params, batch = make_params(POLICY), make_batch()

    def optimised(step, *inputs):
        return step.lower(*inputs).compile({"xla_backend_optimization_level": 3})(*inputs)

    state, metrics = optimised(rl_step(objective=KL), new_state(), batch, params)
    without, plain_metrics = optimised(rl_step(objective=OBJECTIVE), new_state(), batch)
    assert finalise(metrics)["kl"] == 0
    np.testing.assert_allclose(finalise(metrics)["loss"], finalise(plain_metrics)["loss"], rtol=1e-6)
    assert largest_error(gradient_of(state), gradient_of(without)) < 1e-6


def test_kl_away_from_the_reference_is_k3_by_hand():
    params, batch = make_params(POLICY), make_batch()
    state, metrics = rl_step(objective=KL)(new_state(), batch, params)
    assert finalise(metrics)["kl"] < 1e-10  # at the reference, and but for rounding
    moved = jax.tree.map(jnp.array, state.params)
    state, metrics = rl_step(objective=KL)(new_state(params=state.params), batch, params)
    log_probs, _ = plain()(moved, jnp.zeros((B, G, R)))
    reference, _ = plain()(params, jnp.zeros((B, G, R)))
    expected = by_hand(KL, batch, log_probs, reference)
    _, gradient = plain()(moved, jnp.asarray(expected.slope, jnp.float32))
    taking_part = np.asarray(batch.mask) & expected.scored[..., None]
    assert finalise(metrics)["kl"] > 1e-4
    np.testing.assert_allclose(finalise(metrics)["kl"], expected.kl[taking_part].mean(), rtol=1e-4)
    np.testing.assert_allclose(finalise(metrics)["loss"], expected.loss, rtol=1e-5)
    assert largest_error(gradient_of(state), flat(gradient)) < 1e-5


def test_metrics_are_sums_and_counts():
    batch = make_batch()
    log_probs, _ = plain()(make_params(POLICY), jnp.zeros((B, G, R)))
    hand = by_hand(OBJECTIVE, batch, log_probs)
    host = jax.tree.map(np.asarray, batch._replace(prompt=None, image_embeds=None))
    log_probs, mask = np.float64(log_probs), host.mask
    part = mask & hand.scored[..., None]
    _, metrics = rl_step(objective=OBJECTIVE)(new_state(), batch)
    lengths, ratios = mask.sum(-1), host.words / host.reference_words[:, None]
    members = B * G
    expected = {
        "gate/in_band": (hand.in_band.sum(), members),
        "length/mean": (host.words.sum(), members),
        "length/tokens_mean": (lengths.sum(), members),
        "length/ratio_mean": (ratios.sum(), members),
        "length/truncated_frac": (host.truncated.sum(), members),
        "entropy": (-log_probs[mask].sum(), mask.sum()),
        "ratio/mean": (hand.ratio[part].sum(), part.sum()),
        "ratio/clipped_frac": (hand.clipped[part].sum(), part.sum()),
        "kl": (0.0, 0.0),
        "loss": (hand.loss, 1),
    }
    for k, name in enumerate(NAMES):
        valid = host.valid[..., k]
        expected[f"reward/{name}"] = (host.rewards[valid, k].sum(), valid.sum())
        groups = [host.rewards[i, valid[i], k] for i in range(B) if valid[i].sum() >= 2]
        expected[f"reward/{name}_std"] = (sum(np.std(group, ddof=1) for group in groups), len(groups))
    expected["advantage/zero_std_frac/recall"] = (1, 4)
    expected["advantage/zero_std_frac/precision"] = (0, 3)
    for name, (total, count) in expected.items():
        np.testing.assert_allclose(metrics[name].total, total, rtol=2e-5, atol=1e-6, err_msg=name)
        assert float(metrics[name].count) == count, name
    drift = np.abs(log_probs - host.old_log_probs)[mask].max()
    assert isinstance(metrics["drift/max_abs_logp"], Max)
    np.testing.assert_allclose(metrics["drift/max_abs_logp"].value, drift, rtol=1e-5)
    assert float(metrics["nonfinite"].value) == 0


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    step = rl_step(objective=OBJECTIVE)
    state, _ = step(new_state(), make_batch())  # so that the optimiser has a state to lose
    before = jax.device_get(state)
    broken = make_batch(old_log_probs=np.where(np.arange(R) == 0, np.nan, _host_batch().old_log_probs))
    for count in (1, 2):
        state, metrics = step(state, broken)
        assert np.isnan(finalise(metrics)["grad_norm"])
        assert finalise(metrics)["nonfinite"] == int(state.nonfinite) == count
    after = jax.device_get(state)
    assert after.step == before.step + 2
    for a, b in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    state, metrics = step(state, make_batch())
    assert finalise(metrics)["nonfinite"] == int(state.nonfinite) == 0
    assert (flat(state.params)["decoder/head"] != flat(after.params)["decoder/head"]).any()


@pytest.mark.parametrize("freeze", ["", "^(vision|projector)/"])
def test_the_state_is_donated(freeze):
    state, batch = new_state(freeze), make_batch()
    after, _ = rl_step(objective=OBJECTIVE, freeze=freeze)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, batch)))


def test_the_first_update_after_a_rollout_is_on_policy():
    sampling = Sampling(G, R, temperature=0.7, top_p=0.8)
    objective = dataclasses.replace(OBJECTIVE, **CONSTANT)
    prompt, params = make_prompt(POLICY, batch=B), make_params(POLICY)
    keys = jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(1)
    out = make_rollout(POLICY, sampling)(params, prompt, *keys)
    whole = make_rollout(POLICY, dataclasses.replace(sampling, top_p=1.0))(params, prompt, *keys)
    assert (out.tokens != whole.tokens).any()  # top_p cuts something
    batch = make_batch(
        image_embeds=out.image_embeds,
        responses=out.tokens,
        mask=out.mask,
        old_log_probs=out.policy_log_probs,
        truncated=out.truncated,
    )
    values = finalise(rl_step(objective=objective)(new_state(), batch)[1])
    assert abs(values["ratio/mean"] - 1) < 1e-5
    assert values["drift/max_abs_logp"] < 1e-5
    assert values["ratio/clipped_frac"] == 0


# ------------------------------------------------------------------------------------------------- the SFT step


def sft_batch() -> SFTBatch:
    responses, mask = make_responses(B)
    return SFTBatch(make_prompt(POLICY, batch=B), responses, mask)


def test_sft_is_the_mean_cross_entropy_of_the_target_tokens():
    params, batch = make_params(POLICY), sft_batch()
    mask = np.asarray(batch.mask)
    log_probs, gradient = plain()(params, jnp.asarray(-1.0 * mask / mask.sum(), jnp.float32))
    state, metrics = sft_step()(new_state(), batch)
    np.testing.assert_allclose(finalise(metrics)["loss"], -np.asarray(log_probs)[mask].mean(), rtol=1e-5)
    assert largest_error(gradient_of(state), flat(gradient)) < 1e-5
    np.testing.assert_allclose(finalise(metrics)["length/tokens_mean"], mask.sum(-1).mean(), rtol=1e-6)


def test_sft_in_micro_batches_and_with_frozen_parts():
    whole, metrics = sft_step()(new_state(), sft_batch())
    freeze = "^decoder/embed$"
    cut, cut_metrics = sft_step(freeze=freeze, micro_batches=2)(new_state(freeze), sft_batch())
    # Prompts' responses differ in length, so a mean of the parts' means would be another loss.
    np.testing.assert_allclose(finalise(cut_metrics)["loss"], finalise(metrics)["loss"], rtol=1e-6)
    want = {path: leaf for path, leaf in gradient_of(whole).items() if path != "decoder/embed"}
    assert largest_error(gradient_of(cut), want) < 1e-5
    np.testing.assert_array_equal(flat(cut.params)["decoder/embed"], flat(make_params(POLICY))["decoder/embed"])


def test_updates_make_the_targets_likelier():
    state, losses = new_state(), []
    for _ in range(12):
        state, metrics = sft_step()(state, sft_batch())
        losses.append(finalise(metrics)["loss"])
    assert losses[-1] < 0.8 * losses[0]
