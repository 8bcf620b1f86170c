"""Advantages of a rollout group: c-GDPO, GDPO, GRPO, Dr.GRPO, RLOO, aggregations and the length gate, in pure jnp.

For prompt i, sample j, objective k, with means and standard deviations over the group's valid members:

    GDPO family   A_k(i,j) = (r_k(i,j) - mean_j r_k(i,.)) / (std_j r_k(i,.) + eps_group)       GDPO eq 4
                  A(i,j)   = sum_k w_k A_k(i,j), or another of AGGREGATIONS                    eqs 5 and 7
                  Â(i,j)   = (A(i,j) - mean A) / (std A + eps_batch)     over the global batch eq 6
    GRPO          A(i,j)   = (R(i,j) - mean_j R(i,.)) / (std_j R(i,.) + eps_group),  R = sum_k w_k r_k
    Dr.GRPO       A(i,j)   = R(i,j) - mean_j R(i,.)
    RLOO          A(i,j)   = (R(i,j) - mean_j R(i,.)) n / (n - 1),  n valid members
    best of G     A(i,j)   = 1 for the member of the highest R, the first of equals; all others have no part in the loss

The "c" of BalCapRL's c-GDPO stands for continuous rewards (fractions and judge scores in place of GDPO's 0/1 rewards).
The arithmetic is GDPO's, so the two names are one computation here. Continuous rewards only change the weight of
`eps_group`: it is a noise gate, and a column whose spread is well below it contributes almost nothing.

GDPO: arXiv 2601.05242. BalCapRL: arXiv 2605.07394. Dr.GRPO: arXiv 2503.20783. RLOO: arXiv 2402.14740.
RVPO: arXiv 2605.05750. GD2PO: arXiv 2606.16771.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

GDPO_FAMILY = ("c_gdpo", "gdpo")
BEST_OF = "best_of"
ESTIMATORS = (*GDPO_FAMILY, "grpo", "dr_grpo", "rloo", BEST_OF)
BATCH_NORMS = ("sequence", "none")
Pair = tuple[jax.Array, jax.Array]  # sum and count
CONFLICT = 0.2
"""|sum Z| / sum |Z| below which a rollout whose objectives disagree is dropped (GD2PO's value)."""


class Advantages(NamedTuple):
    """`combined` [B, G]; `per_objective` [B, G, K] before weights and batch step; `stats` {name: (sum, count)}.

    Without the batch step `combined = sum_k weights[k] * per_objective[..., k]` for every estimator but BEST_OF with
    the aggregation "sum".

    `contributes` [B, G] bool: the members that have an advantage, 0 or not. All others have advantage 0, because they
    are excluded, a score is missing, or the aggregation dropped them. The loss leaves them out of its denominator: a
    judge that failed must not scale the members that it did score.
    """

    combined: jax.Array
    per_objective: jax.Array
    stats: dict[str, Pair]
    contributes: jax.Array


def length_gate(generated: ArrayLike, reference: ArrayLike, low: float, high: float) -> jax.Array:
    """1 where low <= generated / reference <= high, else 0: `generated` [B, G], `reference` [B] -> [B, G] float32.

    Lengths are in one unit (BalCapRL here: whitespace words); both bounds are inclusive. A reference of length 0 has no
    ratio, which counts as out of band: an empty reference must not lift the limit on length.
    """
    words, of_reference = jnp.asarray(generated, jnp.float32), jnp.asarray(reference, jnp.float32)[:, None]
    # 0.7 * 30 need not be 21 in fp32. The slack keeps the bounds inclusive, and is far below one word.
    slack = 1e-6
    in_band = (words >= low * of_reference * (1 - slack)) & (words <= high * of_reference * (1 + slack))
    gate: jax.Array = (in_band & (of_reference > 0)).astype(jnp.float32)
    return gate


def _sum(z: jax.Array, counted: jax.Array, kappa: float) -> Pair:
    """GDPO: the sum."""
    return z.sum(-1), jnp.ones(z.shape[:-1], bool)


def _soft_min(z: jax.Array, counted: jax.Array, kappa: float) -> Pair:
    """RVPO: -(1/kappa) ln((1/M) sum_k exp(-kappa Z_k)) over the M counted objectives: their mean for a small kappa,
    their minimum for a large one.
    """
    least = jnp.where(counted, z, jnp.inf).min(-1)
    above = jnp.where(counted, z - least[..., None], 0.0)
    # From the least Z, and by expm1 and log1p: no kappa overflows, and a small one does not cancel.
    shrunk = jnp.expm1(-kappa * above).sum(-1) / jnp.maximum(counted.sum(-1), 1)
    return jnp.where(counted.any(-1), least, 0.0) - jnp.log1p(shrunk) / kappa, jnp.ones(least.shape, bool)


def _conflict(z: jax.Array, counted: jax.Array, kappa: float) -> Pair:
    """GD2PO: the sum, without the rollouts whose signs are mixed and that nearly cancel."""
    total, size = z.sum(-1), jnp.abs(z).sum(-1)
    mixed = (z > 0).any(-1) & (z < 0).any(-1)
    return total, ~(mixed & (jnp.abs(total) / (size + 1e-8) < CONFLICT))


Aggregation = Callable[[jax.Array, jax.Array, float], Pair]
AGGREGATIONS: dict[str, Aggregation] = {"sum": _sum, "soft_min": _soft_min, "conflict": _conflict}
"""How a member's weighted z-scores become one number: f(z, counted, kappa) -> (advantage [B, G], kept [B, G] bool).

z [B, G, K] is 0 wherever `counted` [B, G, K] is False: an objective without a usable score there, or of weight 0.
A member that is not kept is dropped: it has no advantage. A new rule is a function here and its name, in this table
and in `config`.
"""


@functools.partial(jax.jit, static_argnames=("estimator", "aggregation", "kappa", "batch_norm", "ddof", "names"))
@jax.named_scope("advantages")
def compute(
    rewards: ArrayLike,
    *,
    weights: ArrayLike | Sequence[float],
    valid: ArrayLike | None = None,
    gate: ArrayLike | None = None,
    member_valid: ArrayLike | None = None,
    estimator: str = "c_gdpo",
    aggregation: str = "sum",
    kappa: float = 1.0,
    batch_norm: str = "sequence",
    eps_group: float = 1e-4,
    eps_batch: float = 1e-4,
    ddof: int = 1,
    names: tuple[str, ...] | None = None,
) -> Advantages:
    """Advantages of every sample in its group. They do not depend on the sharding of B and pass no gradient.

    Args:
      rewards: [B, G, K], used as float32.
      weights: [K]; they multiply normalised advantages (GDPO family) or rewards (the others).
      valid: [B, G, K] bool; False = the judge gave no score. Such an entry may hold anything, NaN included. A
        non-finite reward that claims to be valid is treated as missing too, and counted in the stats.
      gate: [B, G, K] in {0, 1}; multiplies the raw reward, so that a gated member stays in its group with reward 0.
      member_valid: [B, G] bool; False = out of every statistic, advantage exactly 0.
      estimator: one of ESTIMATORS.
      aggregation: one of AGGREGATIONS, over weights * z-scores. The other estimators than the GDPO family have no
        z-score of each objective, and take "sum" alone.
      kappa: above 0; how close "soft_min" is to the minimum. The others ignore it.
      batch_norm: "sequence" = GDPO's batch-wise step over all valid members of the global batch, "none" = without it.
        Only for the GDPO family; the other estimators have no such step and ignore it.
      eps_group, eps_batch: added to the standard deviations. `eps_batch` below 1e-6 lets fp32 noise of a batch that
        cancels grow to order 1.
      ddof: 1 (sample standard deviation) or 0.
      names: K objective names for the stats; the indices by default.

    Missing values. In the GDPO family an entry that is missing leaves only its own column's mean and standard deviation
    and contributes 0; a member counts in the batch step if any objective of non-zero weight has a score. The other
    estimators need the weighted sum of rewards, and a sum without one of its terms is a lower reward that nobody gave:
    a member that misses any objective of non-zero weight leaves its group and gets advantage 0.

    A column with fewer than two valid members, or without spread, contributes exactly 0: its z-scores are 0, also among
    those that "soft_min" counts. A group of such columns alone has advantage exactly 0.

    Raises:
      ValueError: for an unknown option, options that exclude each other, or shapes that do not fit.
    """
    scores, weight = jnp.asarray(rewards, jnp.float32), jnp.asarray(weights, jnp.float32)
    _check_options(estimator, aggregation, kappa, batch_norm, ddof)
    _check_shapes(scores, weight, valid, gate, member_valid, names)
    B, G, K = scores.shape
    member_mask = jnp.ones((B, G), bool) if member_valid is None else jnp.asarray(member_valid, bool)
    has_score = jnp.ones((B, G, K), bool) if valid is None else jnp.asarray(valid, bool)
    is_usable = jnp.isfinite(scores) & has_score
    # An objective of weight 0 is only watched: its score makes no member count, and its failure leaves none out.
    weighted = weight != 0
    contributes = (is_usable & weighted).any(-1) if estimator in GDPO_FAMILY else (is_usable | ~weighted).all(-1)
    contributes = contributes & member_mask
    has_score = member_mask[..., None] & has_score
    counted = has_score & jnp.isfinite(scores)
    passed = jnp.ones((B, G, K), jnp.float32) if gate is None else jnp.asarray(gate, jnp.float32)
    in_statistics = counted if estimator in GDPO_FAMILY else counted & contributes[..., None]

    centred, std, count = _centre(scores * passed, in_statistics, ddof)
    if estimator in GDPO_FAMILY:
        per_objective = _divide(centred, std + eps_group)
    elif estimator == "grpo":
        total_std = _std(_weighted_sum(centred, weight), contributes, ddof)
        per_objective = _divide(centred, total_std[..., None] + eps_group)
    elif estimator == "rloo":
        per_objective = centred * _divide(count, count - 1)
    else:
        per_objective = centred

    combined, kept = AGGREGATIONS[aggregation](per_objective * weight, counted & weighted, kappa)
    scored, contributes = contributes, contributes & kept
    if estimator == BEST_OF:
        contributes = _best(_weighted_sum(jnp.where(counted, scores * passed, 0.0), weight), contributes)
        combined, scored = jnp.ones((B, G)), contributes
    batch_mean, batch_std = _moments(combined, contributes, ddof, has_mean=aggregation != "sum")
    stats = _stats(per_objective, weight, member_mask, has_score, counted, passed, std, count, batch_std, names)
    stats["advantage/dropped_frac"] = _counts(scored & ~kept, scored)
    if estimator in GDPO_FAMILY and batch_norm == "sequence":
        combined = _divide(combined - batch_mean, batch_std + eps_batch)
        # The mean of the others must not become the advantage of a group in which nothing differs.
        contrasts = ((per_objective != 0) & weighted).any((1, 2), keepdims=True)[..., 0]
        combined = jnp.where(contrasts, combined, 0.0)
    combined = jnp.where(contributes, combined, 0.0)
    found: Advantages = jax.tree.map(jax.lax.stop_gradient, Advantages(combined, per_objective, stats, contributes))
    return found


def _best(totals: jax.Array, contributes: jax.Array) -> jax.Array:
    """[B, G] bool: the contributing member of the highest total, the first of equals; none where none contributes."""
    best = jnp.where(contributes, totals, -jnp.inf).argmax(1)
    chosen: jax.Array = contributes & (jnp.arange(totals.shape[1]) == best[:, None])
    return chosen


def _centre(rewards: jax.Array, valid: jax.Array, ddof: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Deviations from the group mean [B, G, K] (0 where not valid), their std and the valid count, both [B, 1, K]."""
    # The shift is by the first valid value: in fp32 the mean of eight times 0.3 is not 0.3, and a small eps would turn
    # the residue of a constant column into an advantage. After the shift a constant column is exactly 0.
    first = jnp.take_along_axis(rewards, jnp.argmax(valid, axis=1, keepdims=True), axis=1)
    # where() before any arithmetic that mixes members: NaN * 0 is NaN.
    shifted = jnp.where(valid, rewards - first, 0.0)
    count = valid.sum(1, keepdims=True, dtype=jnp.float32)
    mean = shifted.sum(1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(valid & (count >= 2), shifted - mean, 0.0)
    return centred, _std(centred, valid, ddof), count


def _std(centred: jax.Array, valid: jax.Array, ddof: int) -> jax.Array:
    """Standard deviation over axis 1 (kept) of values whose mean over the valid ones is 0."""
    count = valid.sum(1, keepdims=True, dtype=jnp.float32)
    squares = jnp.where(valid, jnp.square(centred), 0.0).sum(1, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(count - ddof, 1))


def _moments(combined: jax.Array, contributes: jax.Array, ddof: int, has_mean: bool) -> Pair:
    """Mean and standard deviation, scalars, of the advantages [B, G] of the whole batch's contributing members."""
    values, contributes = combined.reshape(1, -1), contributes.reshape(1, -1)
    # Every column is centred within its group, so the mean of sums is 0 in exact arithmetic; subtracting its fp32
    # residue would only add noise. A soft minimum lies below the mean, and a sum that leaves members out beside it.
    mean = jnp.zeros(())
    if has_mean:
        mean = jnp.where(contributes, values, 0.0).sum() / jnp.maximum(contributes.sum(), 1)
    return mean, _std(values - mean, contributes, ddof)[0, 0]


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 where the denominator is 0 (no spread and eps 0, or no member)."""
    nonzero = denominator > 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1.0), 0.0)


def _weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """[..., K] and [K] -> [...]. It multiplies and adds: a dot would run in bfloat16 passes on a TPU by default."""
    total: jax.Array = (values * weights).sum(-1)
    return total


def _stats(
    per_objective: jax.Array,
    weights: jax.Array,
    member_mask: jax.Array,
    has_score: jax.Array,
    valid: jax.Array,
    gate: jax.Array,
    std: jax.Array,
    count: jax.Array,
    batch_std: jax.Array,
    names: tuple[str, ...] | None,
) -> dict[str, Pair]:
    """(sum, count) pairs: add the pairs of several batches or shards, then divide."""
    objective_names = names or tuple(str(k) for k in range(per_objective.shape[-1]))
    usable = count[:, 0] >= 2  # [B, K]
    gated = valid & (gate == 0)
    fully_gated = valid.any(1) & (gated == valid).all(1)  # [B, K]
    share = jnp.abs(weights * per_objective)
    members = jnp.broadcast_to(member_mask[..., None], valid.shape)
    columns = {
        # Groups in which an objective gives no signal, of those with at least two scores.
        "advantage/zero_std_frac": (usable & (std[:, 0] == 0), usable),
        # Members without a usable score, and scores that are NaN or infinite: a bug in the reward.
        "advantage/invalid_frac": (members & ~valid, members),
        "advantage/nonfinite_frac": (has_score & ~valid, has_score),
        "gate/gated_frac": (gated, valid),
        # Share of the objective in sum |w_k A_k|: what really steers the update, whatever the weights say.
        "advantage/share": (share, jnp.broadcast_to(share.sum(-1, keepdims=True), share.shape)),
    }
    stats: dict[str, Pair] = {}
    for key, pair in columns.items():
        sums = [jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.float32) for x in pair]
        stats |= {f"{key}/{name}": (sums[0][k], sums[1][k]) for k, name in enumerate(objective_names)}
    # Groups with an objective whose every member is out of band: nothing there pulls the length back.
    group_has_score = valid.any((1, 2))
    stats["gate/fully_gated_frac"] = _counts(fully_gated.any(-1), group_has_score)
    # Already over the whole global batch, so it counts once: pairs of several batches add up to their mean deviation.
    stats["advantage/pre_norm_std"] = (batch_std, jnp.ones((), jnp.float32))
    return stats


def _counts(some: jax.Array, every: jax.Array) -> Pair:
    return some.sum(dtype=jnp.float32), every.sum(dtype=jnp.float32)


def _check_options(estimator: str, aggregation: str, kappa: float, batch_norm: str, ddof: int) -> None:
    options: tuple[tuple[str, object, Collection[object]], ...] = (
        ("estimator", estimator, ESTIMATORS),
        ("aggregation", aggregation, AGGREGATIONS),
        ("batch_norm", batch_norm, BATCH_NORMS),
        ("ddof", ddof, (0, 1)),
    )
    for option, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"{option} {value!r} is not one of {', '.join(map(repr, allowed))}")
    if aggregation != "sum" and estimator not in GDPO_FAMILY:
        why = f"estimator {estimator!r} adds the rewards themselves"
        raise ValueError(f"aggregation {aggregation!r} needs a z-score of each objective, and {why}")
    if not 0 < kappa < math.inf:
        raise ValueError(f"kappa must be above 0 and finite, got {kappa}")


def _check_shapes(
    rewards: jax.Array,
    weights: jax.Array,
    valid: ArrayLike | None,
    gate: ArrayLike | None,
    member_valid: ArrayLike | None,
    names: tuple[str, ...] | None,
) -> None:
    if rewards.ndim != 3:
        raise ValueError(f"rewards must be [B, G, K], got shape {rewards.shape}")
    B, G, K = rewards.shape
    if names is not None and len(names) != K:
        raise ValueError(f"{len(names)} names for {K} objectives: {names}")
    expected: dict[str, tuple[ArrayLike | None, tuple[int, ...]]]
    expected = {"weights": (weights, (K,)), "valid": (valid, (B, G, K)), "gate": (gate, (B, G, K))}
    for name, (array, shape) in (expected | {"member_valid": (member_valid, (B, G))}).items():
        # Equality, not broadcasting: a [B, G] gate would gate the wrong axis wherever G happens to equal K.
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape} for rewards {rewards.shape}, got {jnp.shape(array)}")
