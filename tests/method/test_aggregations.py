"""Aggregations of z-scores other than their sum: hand-made numbers, a slow float64 version, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balcap_jax import advantages

NAN = float("nan")
DROPPED = "advantage/dropped_frac"
# One group of three. With ddof 1 and no eps the z-scores are (-1, 0, 1), (1, -1, 0) and (-1, -1, 2) / sqrt(3); weighted
# by HALF, the third objective's are (-0.288675, -0.288675, 0.577350).
HAND = np.array([[[0, 2, 0], [1, 0, 0], [2, 1, 3]]], np.float32)
HALF = [1, 1, 0.5]
EXACT = {"eps_group": 0.0, "eps_batch": 0.0}


# A default that is left out and one that is given are two programs for jit.
DEFAULTS = {"kappa": 1.0, "batch_norm": "sequence", "eps_group": 1e-4, "eps_batch": 1e-4}


def compute(rewards, weights, aggregation, *, valid=None, gate=None, member_valid=None, **options):
    """`advantages.compute`, on the host. Tables are filled up to one shape by members that are excluded, so that few
    programs are compiled.
    """
    B, G, K = rewards.shape

    def filled(array, shape, rest):
        padding = [(0, whole - part) for whole, part in zip((8, 8, K), shape, strict=False)]
        return np.pad(np.ones(shape, bool) if array is None else array, padding, constant_values=rest)

    result = advantages.compute(
        filled(rewards, rewards.shape, NAN),
        weights=np.float32(weights),
        valid=filled(valid, rewards.shape, True),
        gate=filled(gate, rewards.shape, 1).astype(np.float32),
        member_valid=filled(member_valid, (B, G), False),
        aggregation=aggregation,
        **DEFAULTS | options,
    )
    combined, per_objective, stats, contributes = jax.device_get(result)
    assert np.all(combined[B:] == 0)
    assert np.all(combined[:, G:] == 0)
    assert contributes.sum() == contributes[:B, :G].sum()
    return advantages.Advantages(combined[:B, :G], per_objective[:B, :G], stats, contributes[:B, :G])


def near(actual, expected, atol=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# ---- by hand ----


def test_soft_min_by_hand():
    # -ln((e^1 + e^-1 + e^0.288675) / 3), -ln((e^0 + e^1 + e^0.288675) / 3), -ln((e^-1 + e^0 + e^-0.577350) / 3)
    plain = compute(HAND, HALF, "soft_min", batch_norm="none", **EXACT)
    near(plain.combined, [[-0.387713, -0.521357, 0.441474]])
    # -1/2 ln((e^2 + e^-2 + e^0.577350) / 3) and so on
    near(compute(HAND, HALF, "soft_min", kappa=2.0, batch_norm="none", **EXACT).combined,
         [[-0.566008, -0.610433, 0.363356]])  # fmt: skip
    # Mean -0.155865 and standard deviation 0.521609 of the three; then eq 6.
    near(compute(HAND, HALF, "soft_min", **EXACT).combined, [[-0.444484, -0.700702, 1.145186]])
    assert plain.stats[DROPPED] == (0, 3)
    assert plain.contributes.all()


def test_conflict_by_hand():
    # |-1 + 1 - 0.288675| / 2.288675 is 0.126: dropped. The others' sums are -1.288675 and 1.577350.
    plain = compute(HAND, HALF, "conflict", batch_norm="none", **EXACT)
    near(plain.combined, [[0, -1.288675, 1.577350]])
    # Their mean 0.144338 is not 0 and is subtracted; of two values the rest is +-1/sqrt(2).
    result = compute(HAND, HALF, "conflict", **EXACT)
    near(result.combined, [[0, -0.707107, 0.707107]])
    np.testing.assert_array_equal(result.contributes, [[False, True, True]])
    assert result.combined[0, 0] == 0
    assert result.stats[DROPPED] == (1, 3)
    near(result.stats["advantage/pre_norm_std"][0], 2.866025 / 2**0.5)
    # At full weight the ratio is 0.577350 / 2.577350 = 0.224, which is kept.
    assert compute(HAND, [1, 1, 1], "conflict").stats[DROPPED] == (0, 3)


def test_missing_scores_by_hand():
    """The first member has no third score: the column of two others is -+0.707107, weighted -+0.353553."""
    rewards = HAND.copy()
    rewards[0, 0, 2] = NAN
    options = {"valid": ~np.isnan(rewards), "batch_norm": "none", **EXACT}
    # Over two objectives there, -ln((e^1 + e^-1) / 2), and over three elsewhere.
    near(compute(rewards, HALF, "soft_min", **options).combined, [[-0.433781, -0.538908, 0.371031]])
    result = compute(rewards, HALF, "conflict", **options)  # -1 + 1 cancels
    near(result.combined, [[0, -1.353553, 1.353553]])
    assert result.stats[DROPPED] == (1, 3)
    # A member without any score is no dropped one, and its aggregate is 0.
    options["valid"][0, 0] = False
    result = compute(rewards, HALF, "soft_min", **options)
    assert result.combined[0, 0] == 0
    assert result.stats[DROPPED] == (0, 2)


# ---- an independent slow version, in float64 with loops ----


def slow_z(rewards, weights, valid, gate, member_valid, eps_group):
    """Weighted z-scores [B, G, K], NaN where a member has no usable score of an objective of non-zero weight."""
    z = np.full(rewards.shape, np.nan)
    B, _, K = rewards.shape
    for i, k in np.ndindex(B, K):
        members = valid[i, :, k] & member_valid[i]
        if weights[k] and members.any():
            scores = (rewards[i, members, k] * gate[i, members, k]).astype(np.float64)
            spread = scores.std(ddof=1) if np.ptp(scores) else np.inf
            z[i, members, k] = weights[k] * (scores - scores.mean()) / (spread + eps_group)
    return z


def slow_advantages(z, aggregation, kappa, batch_norm, eps_batch):
    """-> (advantages, contributing members, distance of the nearest conflict to the threshold)"""
    B, G, _ = z.shape
    combined, taking_part, nearest = np.zeros((B, G)), np.zeros((B, G), bool), np.inf
    for i, j in np.ndindex(B, G):
        own = z[i, j][~np.isnan(z[i, j])]
        if not len(own):
            continue
        taking_part[i, j] = True
        if aggregation == "soft_min":
            combined[i, j] = -np.log(np.mean(np.exp(-kappa * own))) / kappa
            continue
        combined[i, j] = own.sum()
        if own.min() < 0 < own.max():
            agreement = abs(own.sum()) / (np.abs(own).sum() + 1e-8)
            nearest = min(nearest, abs(agreement - 0.2))
            taking_part[i, j] = agreement >= 0.2
    if batch_norm == "sequence" and taking_part.sum() > 1:
        among = combined[taking_part]
        combined = (combined - among.mean()) / (among.std(ddof=1) + eps_batch)
        combined[~np.nan_to_num(z).any((1, 2))] = 0  # nothing to compare in the group
    return np.where(taking_part, combined, 0), taking_part, nearest


def random_table(rng, B, G, K):
    """Scores of continuous rewards with missing values, gates, excluded members and columns without spread."""
    rewards = rng.random((B, G, K)).astype(np.float32)
    valid = rng.random((B, G, K)) > rng.choice([0.0, 0.1, 0.4])
    for i in range(B):
        if rng.random() < 0.3:
            rewards[i, :, rng.integers(K)] = 0.3
    rewards[0] = np.where(rng.random() < 0.2, np.float32(0.7), rewards[0])  # a group without any signal
    rewards[~valid] = rng.choice(np.array([NAN, np.inf, -7.0, 1e30], np.float32), (~valid).sum())
    gate = np.where(np.arange(K) == K - 1, rng.random((B, G, 1)) > 0.2, True).astype(np.float32)
    return rewards, valid, gate, rng.random((B, G)) > 0.05


@pytest.mark.parametrize(("G", "batch_norm", "kappa"), [(8, "sequence", 1.0), (5, "none", 2.0)])
def test_200_random_tables_equal_the_slow_version(G, batch_norm, kappa):
    rng = np.random.default_rng(G)
    dropped = 0
    for table in range(100):
        rewards, valid, gate, member_valid = random_table(rng, 5, G, 3)
        weights = rng.choice([0, 0.25, 0.5, 1, 2], 3).astype(np.float32)
        eps_group = (1e-4, 1e-2)[table % 2]
        z = slow_z(rewards, weights, valid, gate, member_valid, eps_group)
        scored = ~np.isnan(z).all(-1)
        options = {"valid": valid, "gate": gate, "member_valid": member_valid}
        options |= {"batch_norm": batch_norm, "eps_group": eps_group}
        for aggregation, own in (("soft_min", {"kappa": kappa}), ("conflict", {})):
            expected, taking_part, nearest = slow_advantages(z, aggregation, kappa, batch_norm, 1e-4)
            assert nearest > 1e-6  # no rollout on the threshold itself, where rounding would decide
            result, message = compute(rewards, weights, aggregation, **options, **own), f"table {table}, {aggregation}"
            np.testing.assert_allclose(result.combined, expected, rtol=1e-6, atol=1e-6, err_msg=message)
            np.testing.assert_array_equal(result.contributes, taking_part, err_msg=message)
            assert result.stats[DROPPED] == ((scored & ~taking_part).sum(), scored.sum()), message
        dropped += (scored & ~taking_part).sum()
    assert dropped > 100


# ---- the properties ----


def random_rewards(seed, shape=(6, 8, 3)):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_soft_min_lies_between_the_minimum_and_the_mean_and_reaches_both():
    z = np.random.default_rng(0).standard_normal((6, 8, 3)).astype(np.float32)
    soft_min = functools.partial(advantages.AGGREGATIONS["soft_min"], z, np.ones(z.shape, bool))
    found, kept = soft_min(1.0)
    assert kept.all()
    assert np.all(found < z.mean(-1))
    assert np.all(found > z.min(-1))
    near(soft_min(1e4)[0], z.min(-1) + np.log(3) / 1e4)
    near(soft_min(1e-5)[0], z.mean(-1), 2e-5)
    # Second order, as RVPO reads it: mean - kappa / 2 variance. Through exp and log fp32 would be off by 1e-4.
    near(soft_min(1e-3)[0], z.mean(-1) - 5e-4 * z.var(-1), 2e-6)


@pytest.mark.parametrize("aggregation", ["soft_min", "conflict"])
def test_an_objective_of_weight_0_is_only_watched(aggregation):
    rewards = random_rewards(1)
    without = np.broadcast_to([True, True, False], rewards.shape)
    watched = compute(rewards, [1, 0.5, 0], aggregation)
    unknown = compute(rewards, [1, 0.5, 1], aggregation, valid=without)
    near(watched.combined, unknown.combined)
    np.testing.assert_array_equal(watched.contributes, unknown.contributes)
    assert (watched.stats[DROPPED][0] > 0) == (aggregation == "conflict")
    # A single objective is its own minimum, and disagrees with nobody.
    alone = compute(rewards, [2, 0, 0], aggregation, batch_norm="none")
    np.testing.assert_array_equal(alone.combined, 2 * alone.per_objective[..., 0])
    assert alone.contributes.all()


@pytest.mark.parametrize("aggregation", ["soft_min", "conflict"])
def test_groups_without_signal_are_exactly_0_beside_others(aggregation):
    """The batch mean is not 0; it must not become the advantage of a group whose members are all equal."""
    rewards = random_rewards(3)
    rewards[2] = np.float32([0.3, 0.7, 0.9])
    valid = np.ones(rewards.shape, bool)
    valid[4, 1:] = False  # one scored member: nothing to compare it with
    result = compute(rewards, [1, 1, 1], aggregation, valid=valid)
    assert np.all(np.asarray(result.combined)[[2, 4]] == 0)
    assert np.abs(np.asarray(result.combined)[[0, 1, 3, 5]]).max() > 1
    assert np.all(compute(np.full_like(rewards, 0.3), [1, 1, 1], aggregation, **EXACT).combined == 0)


def test_a_batch_of_conflicts_alone_is_0_and_finite():
    rewards = np.array([[[0, 1, 1], [1, 0, 1]], [[0, 2, 1], [3, 1, 1]]], np.float32)
    result = compute(rewards, [1, 1, 1], "conflict")
    assert not result.contributes.any()
    assert np.all(result.combined == 0)
    assert result.stats[DROPPED] == (4, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_a_dropped_rollout_is_out_of_the_batch_statistics_but_not_of_its_group():
    rewards = random_rewards(4)
    result = compute(rewards, [1, 1, 1], "conflict")
    kept, combined = np.asarray(result.contributes), np.asarray(result.combined)
    assert 3 < (~kept).sum() < 24
    near(combined[kept].mean(), 0)
    near(combined[kept].std(ddof=1), 1, 2e-4)
    plain = compute(rewards, [1, 1, 1], "conflict", batch_norm="none")
    near(plain.combined, np.where(kept, plain.per_objective.sum(-1), 0))
    near(plain.per_objective.sum(1), 0, 5e-6)  # centred over all of the group, whoever is dropped afterwards


def test_inside_jit_and_over_8_devices_it_is_the_same():
    assert jax.device_count() == 8
    rng = np.random.default_rng(5)
    rewards = rng.random((8, 8, 3)).astype(np.float32)
    valid = rng.random(rewards.shape) > 0.15
    rewards = np.where(valid, rewards, NAN)
    names = ("soft_min", "conflict")

    @jax.jit
    def within(rewards, valid):
        weights = jnp.asarray(HALF)
        found = [advantages.compute(rewards, weights=weights, valid=valid, aggregation=name) for name in names]
        return [(one.combined, one.contributes, one.stats[DROPPED]) for one in found]

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    split = within(*jax.device_put((rewards, valid), NamedSharding(mesh, PartitionSpec(("data", "fsdp")))))
    for name, found in zip(names, split, strict=True):
        assert len(found[0].sharding.device_set) == 8
        outside = compute(rewards, HALF, name, valid=valid)
        combined, contributes, dropped = jax.device_get(found)
        near(combined, outside.combined)
        np.testing.assert_array_equal(contributes, outside.contributes)
        assert dropped == outside.stats[DROPPED]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "min"}, "aggregation 'min' is not one of 'sum', 'soft_min', 'conflict'"),
        ({"kappa": 0.0}, "kappa must be above 0 and finite, got 0.0"),
        ({"kappa": NAN}, "kappa must be above 0 and finite, got nan"),
        ({"estimator": "grpo"}, "'soft_min' needs a z-score of each objective, and estimator 'grpo' adds"),
        ({"estimator": "rloo", "aggregation": "conflict"}, "'conflict' needs a z-score of each objective"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        compute(HAND, HALF, **{"aggregation": "soft_min"} | options)
