"""The advantage estimators against golden numbers, a slow float64 version, and the properties they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balcap_jax import advantages

NAN = float("nan")

# Computed with NumPy in float64 from the formulas and rounded to 6 decimals; matched there against the estimators of
# TRL 1.16.0 (G1, G2b, G4), verl, NeMo-RL and ms-swift (G1, G3). Key: case / weights / estimator and settings.
# [group][member][objective]; the second objective of the second group has no spread.
G1 = [
    [[0.8, 0.4, 0.9], [0.6, 0.55, 0.7], [0.9, 0.3, 0.2], [0.5, 0.75, 0.6]],
    [[1.0, 0.2, 0.5], [0.75, 0.2, 0.9], [0.5, 0.2, 0.1], [0.25, 0.2, 0.7]],
]
G2_LENGTH_RATIO = [[1.0, 0.8, 2.6, 1.4], [0.9, 0.45, 1.1, 2.0]]  # the third objective is gated to [0.5, 2]
G2_IN_BAND = [[1, 1, 0, 1], [1, 0, 1, 1]]
DISTINCT = ("c_gdpo", "grpo", "dr_grpo", "rloo")  # gdpo is c_gdpo
WEIGHTS = {"111": [1, 1, 1], "421": [1, 0.5, 0.25]}
# fmt: off
GOLDEN = {
    "G1/111/grpo_eps1e4": [[1.028639, 0.17144, -1.371518, 0.17144], [0.666749, 0.974479, -1.179633, -0.461596]],
    "G1/111/grpo_eps1e6": [[1.028988, 0.171498, -1.371984, 0.171498], [0.666885, 0.974677, -1.179873, -0.461689]],
    "G1/111/grpo_eps1e4_ddof0": [[1.187707, 0.197951, -1.583609, 0.197951], [0.769871, 1.125196, -1.36208, -0.532988]],
    "G1/111/dr_grpo": [[0.3, 0.05, -0.4, 0.05], [0.325, 0.475, -0.575, -0.225]],
    "G1/111/rloo": [[0.4, 0.066667, -0.533333, 0.066667], [0.433333, 0.633333, -0.766667, -0.3]],
    "G1/111/gdpo_pre_eps1e4": [[1.055633, 0.047392, -1.284412, 0.181388], [1.015193, 1.411574, -1.704258, -0.722509]],
    "G1/111/gdpo_bn_eps1e4": [[0.918289, 0.041226, -1.117302, 0.157788], [0.88311, 1.227919, -1.482524, -0.628506]],
    "G1/111/gdpo_pre_eps1e6": [[1.056014, 0.047338, -1.284791, 0.181439], [1.015507, 1.411989, -1.704758, -0.722738]],
    "G1/111/gdpo_bn_none_after_eps1e6": [
        [0.91842, 0.04117, -1.117389, 0.157798],
        [0.883191, 1.228013, -1.482636, -0.628568],
    ],
    "G1/111/gdpo_pre_ddof0": [[1.218871, 0.054733, -1.483043, 0.209439], [1.172187, 1.62987, -1.967817, -0.83424]],
    "G1/111/gdpo_bn_ddof0": [[0.98169, 0.044082, -1.194456, 0.168684], [0.94409, 1.312712, -1.584898, -0.671904]],
    "G1/421/grpo_eps1e4": [[1.403302, -0.561321, 0.0, -0.841981], [1.065748, 0.624749, -0.698249, -0.992248]],
    "G1/421/grpo_eps1e6": [[1.404863, -0.561945, 0.0, -0.842918], [1.066058, 0.624931, -0.698452, -0.992537]],
    "G1/421/grpo_eps1e4_ddof0": [[1.620112, -0.648045, 0.0, -0.972067], [1.230564, 0.721365, -0.806231, -1.145697]],
    "G1/421/dr_grpo": [[0.125, -0.05, 0.0, -0.075], [0.3625, 0.2125, -0.2375, -0.3375]],
    "G1/421/rloo": [[0.166667, -0.066667, 0.0, -0.1], [0.483333, 0.283333, -0.316667, -0.45]],
    "G1/421/gdpo_pre_eps1e4": [[0.546852, -0.334907, 0.244784, -0.456729], [1.12495, 0.643277, -0.716448, -1.051778]],
    "G1/421/gdpo_bn_eps1e4": [[0.725265, -0.444173, 0.324647, -0.605739], [1.49197, 0.85315, -0.950193, -1.394927]],
    "G1/421/gdpo_pre_eps1e6": [[0.547105, -0.335111, 0.245006, -0.457], [1.125295, 0.64347, -0.716662, -1.052103]],
    "G1/421/gdpo_bn_none_after_eps1e6": [
        [0.725444, -0.444347, 0.32487, -0.605967],
        [1.492105, 0.85322, -0.950271, -1.395054],
    ],
    "G1/421/gdpo_pre_ddof0": [[0.631405, -0.386681, 0.282613, -0.527336], [1.298918, 0.742758, -0.827245, -1.214431]],
    "G1/421/gdpo_bn_ddof0": [[0.775335, -0.474826, 0.347035, -0.647544], [1.59501, 0.912072, -1.015817, -1.491264]],
    "G2a/111/gdpo_pre": [[0.940392, 0.095022, -1.345868, 0.310454], [1.69103, -0.596169, -1.067957, -0.026904]],
    "G2a/111/gdpo_bn": [[0.929905, 0.093963, -1.330859, 0.306991], [1.672171, -0.58952, -1.056047, -0.026604]],
    "G2a/111/grpo": [[0.908523, 0.259578, -1.427679, 0.259578], [1.396647, -0.507872, -0.888775, 0.0]],
    "G2a/111/dr_grpo": [[0.35, 0.1, -0.55, 0.1], [0.55, -0.2, -0.35, 0.0]],
    "G2a/111/rloo": [[0.466667, 0.133333, -0.733333, 0.133333], [0.733333, -0.266667, -0.466667, 0.0]],
    "G2a/421/gdpo_pre": [[0.518042, -0.323, 0.22942, -0.424462], [1.293909, 0.141342, -0.557373, -0.877877]],
    "G2a/421/gdpo_bn": [[0.745295, -0.464693, 0.330062, -0.610664], [1.861517, 0.203345, -0.80188, -1.262982]],
    "G2b/111/gdpo_pre": [[1.127305, -0.510251, 0.073859, -0.690913], [1.379682, 0.387178, -1.477911, -0.288949]],
    "G2b/111/gdpo_bn": [[1.18486, -0.536302, 0.07763, -0.726188], [1.450122, 0.406946, -1.553366, -0.303702]],
    "G3/111/gdpo_bn": [
        [1.15111, 0.051678, -1.400582, 0.197793],
        [1.107013, 1.539245, -1.858401, -0.787857],
        [0.0, 0.0, 0.0, 0.0],
    ],
    "G4/111/gdpo_pre": [[0.916467, 0.0, -1.019072, 0.102605], [1.015193, 1.411574, -1.704258, -0.722509]],
    "G4/111/gdpo_bn": [[0.777335, 0.0, -0.864364, 0.087029], [0.861074, 1.197279, -1.44553, -0.612823]],
}
Z_G1 = [
    [[0.547423, -0.510493, 1.018703], [-0.547423, 0.255247, 0.339568],
     [1.094845, -1.020986, -1.358271], [-1.094845, 1.276233, 0.0]],
    [[1.161535, 0.0, -0.146342], [0.387178, 0.0, 1.024395],
     [-0.387178, 0.0, -1.317079], [-1.161535, 0.0, 0.439026]],
]
Z3_G2A = [[0.903463, 0.387198, -1.419727, 0.129066], [0.529495, -0.983347, -0.680779, 1.134631]]
Z3_G2B = [[1.090376, -0.218075, 0.0, -0.872301], [0.218146, 0.0, -1.090732, 0.872586]]
# fmt: on
SETTINGS = {
    "grpo_eps1e4": {"estimator": "grpo"},
    "grpo_eps1e6": {"estimator": "grpo", "eps_group": 1e-6},
    "grpo_eps1e4_ddof0": {"estimator": "grpo", "ddof": 0},
    "grpo": {"estimator": "grpo"},
    "dr_grpo": {"estimator": "dr_grpo"},
    "rloo": {"estimator": "rloo"},
    "gdpo_pre_eps1e4": {"batch_norm": "none"},
    "gdpo_pre": {"batch_norm": "none"},
    "gdpo_bn_eps1e4": {},
    "gdpo_bn": {},
    "gdpo_pre_eps1e6": {"batch_norm": "none", "eps_group": 1e-6},
    "gdpo_bn_none_after_eps1e6": {"eps_group": 1e-6, "eps_batch": 0.0},
    "gdpo_pre_ddof0": {"batch_norm": "none", "ddof": 0},
    "gdpo_bn_ddof0": {"ddof": 0},
}


def third_objective(flags):
    """[B, G] flags on objective 3 of K = 3, the others 1."""
    return np.stack([np.ones_like(flags), np.ones_like(flags), flags], -1)


def golden_case(case):
    """compute()'s array arguments for the reward tables behind GOLDEN."""
    rewards = np.array(G1, np.float32)
    in_band = np.array(G2_IN_BAND)
    if case == "G1":
        return {"rewards": rewards}
    if case == "G2a":
        return {"rewards": rewards, "gate": third_objective(in_band)}
    if case == "G2b":  # a missing value may hold anything
        missing = third_objective(in_band) == 0
        return {"rewards": np.where(missing, NAN, rewards), "valid": ~missing}
    if case == "G3":
        constant = np.broadcast_to(np.array([0.7, 0.3, 0.6], np.float32), (1, 4, 3))
        return {"rewards": np.concatenate([rewards, constant])}
    if case == "G4":
        valid = np.ones(rewards.shape, bool)
        valid[0, 1] = False
        return {"rewards": np.where(valid, rewards, NAN), "valid": valid}
    raise KeyError(case)


def compute(*, rewards, weights, **options):
    return advantages.compute(rewards, weights=np.asarray(weights, np.float32), **options)


@pytest.mark.parametrize("key", GOLDEN)
def test_golden(key):
    case, weights, setting = key.split("/")
    result = compute(**golden_case(case), weights=WEIGHTS[weights], **SETTINGS[setting])
    np.testing.assert_allclose(result.combined, GOLDEN[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "expected"), [("G1", Z_G1), ("G2a", Z3_G2A), ("G2b", Z3_G2B)])
def test_golden_per_objective(case, expected):
    result = compute(**golden_case(case), weights=WEIGHTS["421"])
    actual = result.per_objective if case == "G1" else result.per_objective[..., 2]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_golden_exact_zeros():
    assert np.all(compute(**golden_case("G3"), weights=[1, 1, 1]).combined[2] == 0)  # a constant group
    assert compute(**golden_case("G4"), weights=[1, 1, 1]).combined[0, 1] == 0  # a member without any score
    assert np.all(compute(**golden_case("G1"), weights=[1, 1, 1]).per_objective[1, :, 1] == 0)  # a constant column


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_weighted_sum_estimators_leave_out_a_member_with_a_missing_objective(estimator):
    """Equal to a group that never had the member; a silent 0 (TRL's nansum) would lift all others."""
    case = golden_case("G2b")
    result = compute(**case, weights=[1, 1, 1], estimator=estimator).combined
    kept = [0, 1, 3]
    alone = compute(rewards=np.array(G1, np.float32)[:1, kept], weights=[1, 1, 1], estimator=estimator).combined
    np.testing.assert_allclose(result[0, kept], alone[0], atol=1e-6)
    assert result[0, 2] == 0
    assert result[1, 1] == 0


def test_objective_of_weight_0_is_only_watched():
    case = golden_case("G2b")
    for estimator in DISTINCT:
        watched = compute(**case, weights=[1, 0.5, 0], estimator=estimator).combined
        without = compute(rewards=case["rewards"][..., :2], weights=[1, 0.5], estimator=estimator).combined
        np.testing.assert_allclose(watched, without, atol=1e-6)


# ---- an independent slow version, in float64 with loops ----


def slow_std(values, ddof):
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - ddof)) ** 0.5


def slow_advantages(rewards, weights, valid, gate, member_valid, estimator, batch_norm, eps_group, eps_batch, ddof):
    """Eqs 4 to 7 of GDPO and the GRPO family, member by member, with the batch mean subtracted as eq 6 has it."""
    B, G, K = rewards.shape
    combined = np.zeros((B, G))
    ok = [[[bool(valid[i, j, k] and member_valid[i, j]) for k in range(K)] for j in range(G)] for i in range(B)]
    raw = np.where(valid, rewards, 0).astype(np.float64) * gate
    if estimator in ("gdpo", "c_gdpo"):
        for i in range(B):
            for k in range(K):
                members = [j for j in range(G) if ok[i][j][k]]
                column = [raw[i, j, k] for j in members]
                if len(members) < 2 or min(column) == max(column):
                    continue
                mean, std = sum(column) / len(column), slow_std(column, ddof)
                for j, value in zip(members, column, strict=True):
                    combined[i, j] += float(weights[k]) * (value - mean) / (std + eps_group)
        if batch_norm == "sequence":
            alive = [(i, j) for i in range(B) for j in range(G) if any(ok[i][j])]
            values = [combined[index] for index in alive]
            if len(values) >= 2:
                mean, std = sum(values) / len(values), slow_std(values, ddof)
                for index in alive:
                    combined[index] = (combined[index] - mean) / (std + eps_batch)
        return combined
    for i in range(B):
        members = [j for j in range(G) if all(ok[i][j])]
        sums = [sum(float(weights[k]) * raw[i, j, k] for k in range(K)) for j in members]
        if len(members) < 2 or np.ptp(sums) < 1e-12:
            continue
        mean = sum(sums) / len(sums)
        scale = {"grpo": 1 / (slow_std(sums, ddof) + eps_group), "dr_grpo": 1, "rloo": len(sums) / (len(sums) - 1)}
        for j, value in zip(members, sums, strict=True):
            combined[i, j] = (value - mean) * scale[estimator]
    return combined


def random_table(rng, B, G, K):
    """Scores with missing values, gates, excluded members, constant columns and cancelling groups.

    Half of the tables are on a grid of 1/16, where ties and cancelling sums are exact in fp32: elsewhere the rounding
    of a sum that cancels, over eps, is a difference to float64 that no implementation can avoid.
    """
    rewards = rng.random((B, G, K)).astype(np.float32)
    if rng.random() < 0.5:
        rewards = np.round(rewards * 16) / 16
    for i in range(B):
        if rng.random() < 0.3:
            rewards[i, :, rng.integers(K)] = rng.integers(0, 21) / 20
        elif K > 1 and rng.random() < 0.3:
            rewards[i] = np.round(rewards[i] * 16) / 16
            rewards[i, :, 1] = 1 - rewards[i, :, 0]
    valid = rng.random((B, G, K)) > rng.choice([0.0, 0.1, 0.6])
    rewards[~valid] = rng.choice(np.array([NAN, np.inf, -7.0, 1e30], np.float32), (~valid).sum())
    gate = np.where(np.arange(K) == K - 1, rng.random((B, G, 1)) > 0.3, True).astype(np.float32)
    return rewards, valid, gate, rng.random((B, G)) > 0.05


@pytest.mark.parametrize("estimator", DISTINCT)
@pytest.mark.parametrize(
    ("G", "K", "batch_norm", "ddof"),
    [(2, 1, "sequence", 1), (3, 2, "sequence", 1), (5, 4, "none", 1), (8, 3, "sequence", 0), (16, 5, "sequence", 1)],
)
def test_random_tables_against_slow_version(G, K, batch_norm, ddof, estimator):
    rng = np.random.default_rng(G)
    for table in range(40):  # 5 x 40 = 200 tables
        rewards, valid, gate, member_valid = random_table(rng, 4, G, K)
        options = {
            "weights": rng.choice([0.25, 0.5, 1, 2], K).astype(np.float32),
            "valid": valid,
            "gate": gate,
            "member_valid": member_valid,
            "estimator": estimator,
            "batch_norm": batch_norm,
            "eps_group": (1e-4, 1e-2)[table % 2],
            "eps_batch": 1e-4,
            "ddof": ddof,
        }
        expected = slow_advantages(rewards, **options)
        actual = np.asarray(advantages.compute(rewards, **options).combined)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=f"table {table}")
        assert np.all(actual[~(valid.any(-1) & member_valid)] == 0)


def test_c_gdpo_is_gdpo():
    both = [compute(**golden_case("G2a"), weights=[1, 1, 1], estimator=name).combined for name in ("c_gdpo", "gdpo")]
    np.testing.assert_array_equal(*both)


# ---- the properties ----


def random_rewards(seed, shape=(6, 8, 3)):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def test_common_factor_on_weights_cancels_in_the_batch_step():
    rewards, weights = random_rewards(0), np.array([1, 0.5, 0.25])
    np.testing.assert_allclose(
        compute(rewards=rewards, weights=7 * weights, eps_batch=1e-6).combined,
        compute(rewards=rewards, weights=weights, eps_batch=1e-6).combined,
        atol=1e-5,
    )


def test_gdpo_ignores_scale_and_offset_of_a_reward_and_grpo_does_not():
    rewards = random_rewards(1)
    scaled = rewards * np.array([5, 1, 0.5], np.float32) + np.array([-2, 0, 3], np.float32)
    one, other = (compute(rewards=x, weights=[1, 1, 1], eps_group=1e-7).combined for x in (rewards, scaled))
    np.testing.assert_allclose(one, other, atol=2e-5)
    one, other = (compute(rewards=x, weights=[1, 1, 1], estimator="grpo").combined for x in (rewards, scaled))
    assert np.abs(one - other).max() > 0.5


@pytest.mark.parametrize("estimator", DISTINCT)
def test_permuting_members_permutes_advantages(estimator):
    rewards, order = random_rewards(2), np.random.default_rng(0).permutation(8)
    plain = compute(rewards=rewards, weights=[1, 1, 1], estimator=estimator).combined
    permuted = compute(rewards=rewards[:, order], weights=[1, 1, 1], estimator=estimator).combined
    np.testing.assert_allclose(permuted, plain[:, order], atol=2e-6)


@pytest.mark.parametrize("estimator", DISTINCT)
def test_constant_groups_are_exactly_zero(estimator):
    """The fp32 mean of six times 0.3 is not 0.3; without the shift the residue over a small eps is up to 0.95."""
    sizes, values = np.meshgrid(np.arange(2, 17), np.arange(21, dtype=np.float32) / 20, indexing="ij")
    rewards = np.broadcast_to(values.reshape(-1, 1, 1), (15 * 21, 16, 2)).copy()
    member_valid = np.arange(16) < sizes.reshape(-1, 1)
    rewards[-1, :, :] = random_rewards(0, (16, 2))  # one group with a signal, so that the batch step does something
    options = {"weights": [1, 0.7], "estimator": estimator, "eps_group": 1e-8, "eps_batch": 1e-8}
    result = compute(rewards=rewards, member_valid=member_valid, **options)
    assert np.all(np.asarray(result.combined[:-1]) == 0)
    assert np.all(np.asarray(result.per_objective[:-1]) == 0)
    assert np.abs(result.combined[-1]).min() > 0
    assert np.all(compute(rewards=np.full((2, 6, 2), 0.3, np.float32), **options).combined == 0)


def test_no_spread_without_eps_is_zero():
    rewards = np.full((2, 4, 3), 0.3, np.float32)
    for estimator in DISTINCT:
        options = {"estimator": estimator, "eps_group": 0.0, "eps_batch": 0.0}
        assert np.all(compute(rewards=rewards, weights=[1, 1, 1], **options).combined == 0)


def test_cancelling_batch_stays_small():
    """Two equally weighted objectives with a constant sum give 0; fp32 noise must not be normalised up to order 1."""
    rewards = np.stack([[0.8, 0.6, 0.9, 0.5], [0.4, 0.6, 0.3, 0.7]], -1)[None].astype(np.float32)
    assert np.abs(compute(rewards=rewards, weights=[1, 1]).combined).max() < 1e-2
    # Unequal weights break the tie: w = (1, 0.5), rewards (1, 1, 0) and (0, 0, 1).
    rewards = np.array([[[1, 0], [1, 0], [0, 1]]], np.float32)
    result = compute(rewards=rewards, weights=[1, 0.5], batch_norm="none", eps_group=0.0).combined
    np.testing.assert_allclose(result, [[0.288675, 0.288675, -0.577350]], atol=1e-6)


@pytest.mark.parametrize("estimator", DISTINCT)
@pytest.mark.parametrize("bad", [NAN, np.inf])
@pytest.mark.parametrize("marked", [True, False])
def test_nan_never_reaches_another_member(estimator, bad, marked):
    rewards = random_rewards(3)
    rewards[0, 0, 1] = bad  # the first member, whose value the group is shifted by
    valid = np.isfinite(rewards) if marked else None
    result = compute(rewards=rewards, weights=[1, 1, 1], valid=valid, estimator=estimator)
    for leaf in jax.tree.leaves(result):
        assert np.all(np.isfinite(leaf))
    assert result.stats["advantage/invalid_frac/1"] == (1, 48)
    assert result.stats["advantage/nonfinite_frac/1"][0] == (0 if marked else 1)
    assert result.per_objective[0, 0, 1] == 0


@pytest.mark.parametrize("estimator", DISTINCT)
@pytest.mark.parametrize("by", ["valid", "member_valid"])
def test_an_invalid_member_changes_nobody(estimator, by):
    rewards = random_rewards(4)
    junk = np.full((6, 1, 3), 1e6, np.float32)
    valid, member_valid = np.ones((6, 9, 3), bool), np.ones((6, 9), bool)
    {"valid": valid, "member_valid": member_valid}[by][:, 0] = False
    with_junk = compute(
        rewards=np.concatenate([junk, rewards], 1),
        weights=[1, 1, 1],
        valid=valid,
        member_valid=member_valid,
        estimator=estimator,
    ).combined
    plain = compute(rewards=rewards, weights=[1, 1, 1], estimator=estimator).combined
    np.testing.assert_allclose(with_junk[:, 1:], plain, atol=2e-6)
    assert np.all(with_junk[:, 0] == 0)


@pytest.mark.parametrize("estimator", DISTINCT)
def test_group_sums_are_zero_and_objectives_add_up(estimator):
    weights = np.array([1, 0.5, 0.25], np.float32)
    result = compute(rewards=random_rewards(5), weights=weights, estimator=estimator, batch_norm="none")
    np.testing.assert_allclose(result.combined.sum(1), 0, atol=5e-6)
    np.testing.assert_allclose(result.combined, (result.per_objective * weights).sum(-1), atol=1e-6)


def test_batch_step_gives_unit_deviation_over_the_whole_batch():
    combined = np.asarray(compute(rewards=random_rewards(6), weights=[1, 1, 1]).combined)
    assert abs(combined.mean()) < 1e-6
    assert abs(combined.std(ddof=1) - 1) < 1e-4
    # In one group alone the step erases the magnitude: (0, 1) and (0, 2) both come back to +-0.7071.
    for high in (1.0, 2.0):
        alone = compute(rewards=np.array([[[0.0], [high]]], np.float32), weights=[1], eps_group=0.0, eps_batch=0.0)
        np.testing.assert_allclose(alone.combined, [[-(0.5**0.5), 0.5**0.5]], atol=1e-6)


@pytest.mark.parametrize("estimator", DISTINCT)
def test_no_gradient_flows(estimator):
    rewards = random_rewards(7)
    rewards[0, :, 0] = 0.3  # sqrt(0) has an infinite derivative
    rewards[1, 0, 0] = NAN

    def total(rewards, weights):
        result = advantages.compute(rewards, weights=weights, valid=~jnp.isnan(rewards), estimator=estimator)
        return jnp.sum(result.combined**2) + jnp.sum(result.per_objective**3)

    for gradient in jax.grad(total, argnums=(0, 1))(rewards, jnp.ones(3)):
        assert np.all(np.asarray(gradient) == 0)


def test_sharded_over_8_devices_equals_one_device():
    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    rewards = rng.random((16, 6, 3)).astype(np.float32)
    valid = rng.random(rewards.shape) > 0.15
    arrays = {
        "rewards": np.where(valid, rewards, np.nan),
        "valid": valid,
        "gate": (rng.random(rewards.shape) > 0.2).astype(np.float32),
        "member_valid": rng.random((16, 6)) > 0.1,
    }
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    layouts = [PartitionSpec(("data", "fsdp")), PartitionSpec("data", "fsdp"), PartitionSpec("fsdp")]
    weights = np.float32([1, 0.5, 0.25])

    def run(estimator, where):
        placed = {name: jax.device_put(array, where) for name, array in arrays.items()}
        return advantages.compute(**placed, weights=weights, estimator=estimator)

    for estimator in ("c_gdpo", "grpo", "rloo"):
        alone = run(estimator, jax.devices()[0])
        for layout in layouts:
            split = run(estimator, NamedSharding(mesh, layout))
            assert len(split.combined.sharding.device_set) == 8
            for a, b in zip(alone[:2], split[:2], strict=True):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-6)
            for key, pair in alone.stats.items():
                error = np.abs(np.array(pair) - np.array(split.stats[key])) / np.maximum(np.abs(np.array(pair)), 1)
                assert error.max() < 1e-6, key


# ---- length gate, statistics, errors ----


def test_length_gate_golden():
    # Ratios of the golden case as whole words over a reference of 20: the bounds themselves are inside.
    generated = np.rint(np.array(G2_LENGTH_RATIO) * 20).astype(np.int32)
    gate = advantages.length_gate(generated, np.array([20, 20]), 0.5, 2.0)
    np.testing.assert_array_equal(gate, G2_IN_BAND)
    assert gate.dtype == jnp.float32


def test_length_gate_bounds_are_inclusive_to_the_word():
    """Exact rational arithmetic over every reference to 400 words, with bounds that binary fractions can't hold."""
    reference = np.arange(1, 401)
    for low, high in [(50, 200), (70, 130), (60, 210), (33, 115)]:  # per cent
        below, above = -(-reference * low // 100), reference * high // 100  # first and last length in the band
        generated = np.stack([below - 1, below, above, above + 1], 1)
        gate = advantages.length_gate(generated, reference, low / 100, high / 100)
        np.testing.assert_array_equal(gate, np.tile([0, 1, 1, 0], (400, 1)))


def test_length_gate_empty_reference_is_out_of_band():
    np.testing.assert_array_equal(advantages.length_gate(np.array([[0, 5]]), np.array([0]), 0.5, 2.0), [[0, 0]])


def test_gated_members_keep_their_place_in_the_group():
    """One member in band among G gets (G - 1) / sqrt(G) whatever its score; a group wholly outside gets nothing."""
    rewards = np.full((3, 8, 1), 0.37, np.float32)
    gate = np.zeros((3, 8, 1), np.float32)
    gate[0, 3] = 1
    valid = np.ones((3, 8, 1), bool)
    valid[2] = False  # a group without scores counts neither as gated nor as a group
    options = {"batch_norm": "none", "eps_group": 0.0, "names": ("linguistic",)}
    result = compute(rewards=rewards, weights=[1], valid=valid, gate=gate, **options)
    np.testing.assert_allclose(result.combined[0, 3], 7 / 8**0.5, rtol=1e-6)
    np.testing.assert_array_equal(result.combined[1:], 0)
    assert result.stats["gate/fully_gated_frac"] == (1, 2)
    assert result.stats["gate/gated_frac/linguistic"] == (15, 16)
    assert result.stats["advantage/zero_std_frac/linguistic"] == (1, 2)


def test_stats_are_counts_that_add_up():
    rewards = np.array(G1, np.float32)
    valid = np.ones(rewards.shape, bool)
    valid[0, :3, 0] = False  # one score left: the column is not usable
    member_valid = np.ones((2, 4), bool)
    member_valid[1, 0] = False
    names = ("precision", "recall", "linguistic")
    options = {"weights": [1, 1, 2], "names": names, "batch_norm": "none"}
    result = compute(rewards=rewards, valid=valid, member_valid=member_valid, **options)
    stats = {key: (float(total), float(count)) for key, (total, count) in result.stats.items()}
    assert stats["advantage/zero_std_frac/precision"] == (0, 1)
    assert stats["advantage/zero_std_frac/recall"] == (1, 2)
    assert stats["advantage/invalid_frac/precision"] == (3, 7)
    assert stats["advantage/nonfinite_frac/precision"] == (0, 4)
    assert stats["gate/fully_gated_frac"] == (0, 2)
    np.testing.assert_allclose(stats["advantage/pre_norm_std"][0], _std_of_valid(result, member_valid), rtol=1e-5)
    parts = [stats[f"advantage/share/{name}"] for name in names]
    np.testing.assert_allclose(sum(total for total, _ in parts), parts[0][1], rtol=1e-6)
    # Group by group and summed = the whole batch at once, for every count over groups, members and entries.
    for key in stats.keys() - {"advantage/pre_norm_std"}:
        halves = [
            compute(rewards=rewards[i : i + 1], valid=valid[i : i + 1], member_valid=member_valid[i : i + 1], **options)
            for i in range(2)
        ]
        np.testing.assert_allclose(np.sum([half.stats[key] for half in halves], 0), stats[key], rtol=1e-6)


def _std_of_valid(result, member_valid):
    return np.std(np.asarray(result.combined)[member_valid], ddof=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "ppo"}, "estimator 'ppo'"),
        ({"batch_norm": "token"}, "batch_norm 'token'"),
        ({"ddof": 2}, "ddof 2"),
        ({"weights": [1, 1]}, r"weights must have shape \(3,\)"),
        ({"gate": np.ones((2, 4))}, r"gate must have shape \(2, 4, 3\)"),
        ({"member_valid": np.ones(4, bool)}, r"member_valid must have shape \(2, 4\)"),
        ({"names": ("precision",)}, "1 names for 3 objectives"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        compute(**{"rewards": np.array(G1, np.float32), "weights": [1, 1, 1]} | options)
