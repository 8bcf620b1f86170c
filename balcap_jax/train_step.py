"""THE compiled step: rewards in, gates, per-objective advantages, loss, gradients, update; one jit, donated state.

SFT is the same step with another loss. This file, `advantages` and `losses` hold all that the method says about an
update; `train.py` only feeds it.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from balcap_jax import advantages, losses
from balcap_jax.models import packing
from balcap_jax.models.decoder import Params
from balcap_jax.models.policy import Policy, Prompt
from balcap_jax.parallel import sharding


class Mean(NamedTuple):
    """A mean that is still a sum: `total` over `count` items, so that uneven micro-batches add up exactly."""

    total: Any
    count: Any


class Max(NamedTuple):
    """The largest value, -inf of none: for drift-like metrics, where a mean would hide one outlier."""

    value: Any


Metrics = dict[str, Mean | Max]
Gradient = dict[str, jax.Array]  # by the paths of `split`


def finalise(metrics: Metrics) -> dict[str, float]:
    """Host floats of `metrics`, in one explicit transfer; NaN for a mean over nothing (null in the JSON)."""
    values = {}
    for name, metric in jax.device_get(metrics).items():
        if isinstance(metric, Mean):
            # The division is in double precision, so that the value does not depend on where it happens.
            total, count = float(metric.total), float(metric.count)
            values[name] = total / count if count else math.nan
        else:
            value = float(metric.value)
            values[name] = math.nan if value == -math.inf else value
    return values


class TrainState(NamedTuple):
    """Everything an update changes. `params` are the fp32 master weights, nested dicts.

    step: int32, updates done in this stage. opt_state covers the trainable parameters only.
    nonfinite: int32, updates in a row that were skipped because their gradient was not finite.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    nonfinite: jax.Array


class RLBatch(NamedTuple):
    """One rollout batch with its rewards.

    responses, mask, old_log_probs [B, G, R]; image_embeds [B, I, D] from the rollout (used while the vision side is
    frozen); rewards, valid [B, G, K]; words [B, G] and reference_words [B] int32; truncated [B, G] bool.
    """

    prompt: Prompt
    image_embeds: jax.Array
    responses: jax.Array
    mask: jax.Array
    old_log_probs: jax.Array
    rewards: jax.Array
    valid: jax.Array
    words: jax.Array
    reference_words: jax.Array
    truncated: jax.Array


class SFTBatch(NamedTuple):
    """Target captions [B, G, R], G per image, and their mask."""

    prompt: Prompt
    responses: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True)
class RLObjective:
    """The method's settings; the fields are those of the config groups `advantage`, `loss` and `rewards`.

    names, weights, gated: one entry per objective, and so is `scales`, or it is empty: advantages are those of rewards
    times scales, and metrics those of the rewards as they came. `temperature` is the rollout's, so that the recomputed
    log-probabilities are those of the distribution that was sampled from.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    gated: tuple[bool, ...]
    max_tokens: int
    scales: tuple[float, ...] = ()
    gate_low: float = 0.5
    gate_high: float = 2.0
    gate: bool = True
    estimator: str = "c_gdpo"
    aggregation: str = "sum"
    kappa: float = 1.0
    batch_norm: str = "sequence"
    eps_group: float = 1e-4
    eps_batch: float = 1e-4
    ddof: int = 1
    exclude_truncated: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    normaliser: str = "sequence"
    kl_coef: float = 0.0
    log_ratio_clamp: float = 20.0
    temperature: float = 1.0

    def advantages_of(
        self,
        rewards: jax.Array,
        valid: jax.Array,
        words: jax.Array,
        reference_words: jax.Array,
        truncated: jax.Array,
    ) -> tuple[advantages.Advantages, jax.Array]:
        """Advantages of a whole batch, and which of its captions [B, G] are in the length band; fields of `RLBatch`."""
        # 1. Length gate: only the gated objectives lose their reward outside the band (method, section 1).
        in_band = advantages.length_gate(words, reference_words, self.gate_low, self.gate_high)
        gated = jnp.asarray(self.gated) & self.gate
        gate = jnp.where(gated, in_band[..., None], 1.0)

        # 2. Per-objective advantages, normalised within the group before they are combined (c-GDPO).
        advantage = advantages.compute(
            rewards * jnp.asarray(self.scales) if self.scales else rewards,
            weights=jnp.asarray(self.weights),
            valid=valid,
            gate=gate,
            member_valid=~truncated if self.exclude_truncated else jnp.ones_like(truncated),
            estimator=self.estimator,
            aggregation=self.aggregation,
            kappa=self.kappa,
            batch_norm=self.batch_norm,
            eps_group=self.eps_group,
            eps_batch=self.eps_batch,
            ddof=self.ddof,
            names=self.names,
        )
        return advantage, in_band

    def surrogate(
        self, log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`losses.clipped_surrogate` with these settings."""
        clips = self.clip_low, self.clip_high, self.log_ratio_clamp
        return losses.clipped_surrogate(log_probs, old_log_probs, advantages, *clips)


# ------------------------------------------------------------------------------------------------- parameters


def split(params: Params, freeze: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Splits nested `params` into flat (trainable, frozen) dicts by path.

    `freeze` is a regular expression searched for in paths such as "decoder/layers/q/kernel"; empty freezes nothing.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    frozen = {path for path in flat if freeze and re.search(freeze, path)}
    return {path: x for path, x in flat.items() if path not in frozen}, {path: flat[path] for path in frozen}


def join(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    params: Params = flax.traverse_util.unflatten_dict({**trainable, **frozen}, sep="/")
    return params


def trained(params: Params, freeze: str) -> Params:
    """The nested tree of the trainable parameters alone."""
    return join(split(params, freeze)[0], {})


def vision_is_frozen(params: Params, freeze: str) -> bool:
    """Whether training leaves every parameter of `policy.encode` alone, so that its output may be reused."""
    trainable, _ = split(params, freeze)
    return all(path.startswith("decoder/") for path in trainable)


def init_state(params: Params, optimizer: optax.GradientTransformation, freeze: str) -> TrainState:
    trainable, _ = split(params, freeze)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable), jnp.zeros((), jnp.int32))


# ------------------------------------------------------------------------------------------------- the RL step


def make_rl_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    objective: RLObjective,
    *,
    freeze: str = "",
    micro_batches: int = 1,
    token_bucket: int = 0,
) -> "CompiledStep":
    """The compiled RL update `step(state, batch: RLBatch, reference: Params | None) -> (state, metrics)`.

    `reference` are the parameters that the KL term compares with and must be given when `kl_coef` > 0. Those that
    `freeze` matches are taken from the state: `trained(params, freeze)` is enough.
    The batch is cut into `micro_batches` along B; their gradients add up to the whole batch's exactly, because every
    normaliser is computed before the cut.
    With a `token_bucket` responses run packed, see `Policy.log_probs`: the same numbers but for rounding.
    """

    def step(state: TrainState, batch: RLBatch, reference: Params | None = None) -> tuple[TrainState, Metrics]:
        # 1. and 2. Length gate, and per-objective advantages: what the method makes of rewards.
        advantage, in_band = objective.advantages_of(
            batch.rewards, batch.valid, batch.words, batch.reference_words, batch.truncated
        )

        # 3. Clipped surrogate on shared-prefix log-probabilities, plus an optional KL term to the reference.
        weights = losses.token_weights(batch.mask, advantage.contributes, objective.normaliser, objective.max_tokens)
        reuse = vision_is_frozen(state.params, freeze)
        if objective.kl_coef:
            at_start = flax.traverse_util.flatten_dict(reference, sep="/")
            anchor = join(at_start, split(state.params, freeze)[1])

        def loss_fn(
            params: Params, micro_batch: tuple[RLBatch, jax.Array, jax.Array]
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            batch, combined, weights = micro_batch

            def log_probs_of(params: Params) -> jax.Array:
                # A frozen vision side is the reference's too.
                embeds = batch.image_embeds if reuse else policy.encode(params, batch.prompt.images)
                return policy.log_probs(
                    params,
                    batch.prompt,
                    embeds,
                    batch.responses,
                    temperature=objective.temperature,
                    mask=batch.mask,
                    token_bucket=token_bucket,
                )

            log_probs = log_probs_of(params)
            surrogate, _, _ = objective.surrogate(log_probs, batch.old_log_probs, combined)
            if objective.estimator == advantages.BEST_OF:  # Imitated, however far the policy is from who wrote it.
                surrogate = -log_probs
            aux = {"log_probs": log_probs}
            if objective.kl_coef:
                aux["kl"] = losses.kl_k3(log_probs, jax.lax.stop_gradient(log_probs_of(anchor)))
                surrogate = surrogate + objective.kl_coef * aux["kl"]
            return jnp.sum(weights * surrogate), aux

        whole = (batch, advantage.combined, weights)
        loss, aux, gradient = accumulate(loss_fn, state.params, whole, freeze, micro_batches)
        state, update_metrics = apply_gradients(optimizer, state, gradient, freeze)
        metrics = _rl_metrics(objective, batch, advantage, in_band, aux) | useful(
            batch.mask, micro_batches, token_bucket
        )
        return state, {"loss": as_mean(loss), **metrics, **update_metrics}

    return CompiledStep(step)


@jax.named_scope("metrics")
def _rl_metrics(
    objective: RLObjective,
    batch: RLBatch,
    advantage: advantages.Advantages,
    in_band: jax.Array,
    aux: Mapping[str, jax.Array],
) -> Metrics:
    """(sum, count) metrics of a rollout batch; -log p of the sampled tokens estimates the entropy."""
    mask = batch.mask & advantage.contributes[..., None]
    log_probs = aux["log_probs"]
    _, ratio, clipped = objective.surrogate(log_probs, batch.old_log_probs, advantage.combined)
    drift = jnp.where(batch.mask, jnp.abs(log_probs - batch.old_log_probs), 0.0)
    metrics: Metrics = {name: Mean(*pair) for name, pair in advantage.stats.items()}
    for k, name in enumerate(objective.names):
        valid = batch.valid[..., k]
        rewards = jnp.where(valid, batch.rewards[..., k], 0.0)
        metrics[f"reward/{name}"] = masked_mean(rewards, valid)
        metrics[f"reward/{name}_std"] = _group_std(rewards, valid)
        if objective.estimator == advantages.BEST_OF:
            metrics[f"best/{name}"] = masked_mean(rewards, valid & advantage.contributes)
    every = jnp.ones_like(in_band)
    return metrics | {
        "gate/in_band": masked_mean(in_band, every),
        "length/mean": masked_mean(batch.words, every),
        "length/tokens_mean": masked_mean(batch.mask.sum(-1), every),
        "length/ratio_mean": masked_mean(batch.words / jnp.maximum(batch.reference_words, 1)[:, None], every),
        "length/truncated_frac": masked_mean(batch.truncated, every),
        "entropy": masked_mean(-log_probs, batch.mask),
        "kl": masked_mean(aux["kl"], mask) if "kl" in aux else Mean(jnp.zeros(()), jnp.zeros(())),
        "ratio/mean": masked_mean(ratio, mask),
        "ratio/clipped_frac": masked_mean(clipped, mask),
        "drift/max_abs_logp": Max(drift.max()),
    }


# ------------------------------------------------------------------------------------------------- the SFT step


def make_sft_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    freeze: str = "",
    micro_batches: int = 1,
    token_bucket: int = 0,
) -> "CompiledStep":
    """The compiled SFT update `step(state, batch: SFTBatch) -> (state, metrics)`: mean cross-entropy of target tokens.

    The G targets of an image share its encoding and its prompt, as samples do. `token_bucket`: as in `make_rl_step`.
    """

    def step(state: TrainState, batch: SFTBatch) -> tuple[TrainState, Metrics]:
        every = jnp.ones(batch.mask.shape[:2], bool)
        weights = losses.token_weights(batch.mask, every, "token", batch.mask.shape[-1])

        def loss_fn(params: Params, micro_batch: tuple[SFTBatch, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            batch, weights = micro_batch
            image_embeds = policy.encode(params, batch.prompt.images)
            log_probs = policy.log_probs(
                params, batch.prompt, image_embeds, batch.responses, mask=batch.mask, token_bucket=token_bucket
            )
            return -jnp.sum(weights * log_probs), {}

        loss, _, gradient = accumulate(loss_fn, state.params, (batch, weights), freeze, micro_batches)
        state, update_metrics = apply_gradients(optimizer, state, gradient, freeze)
        metrics: Metrics = {"length/tokens_mean": masked_mean(batch.mask.sum(-1), every)}
        metrics |= useful(batch.mask, micro_batches, token_bucket)
        return state, {"loss": as_mean(loss), **metrics, **update_metrics}

    return CompiledStep(step)


# ------------------------------------------------------------------------------------------------- shared parts


class CompiledStep:
    """jit of `step(state, batch, ...) -> (state, metrics)` that consumes the state and keeps its shardings.

    Left to itself, the compiler may return a small replicated parameter split over `fsdp`. A program that was compiled
    ahead would refuse that state at the next update.
    """

    def __init__(self, step: Callable[..., tuple[TrainState, Metrics]]):
        self._step = step
        self._by_shardings: dict[tuple[Any, ...], Any] = {}

    def __call__(self, state: TrainState, *inputs: Any) -> tuple[TrainState, Metrics]:
        found: tuple[TrainState, Metrics] = self._jit(state)(state, *inputs)
        return found

    def lower(self, state: TrainState, *inputs: Any) -> jax.stages.Lowered:
        lowered: jax.stages.Lowered = self._jit(state).lower(state, *inputs)
        return lowered

    def _jit(self, state: TrainState) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, state)
        key = tuple(jax.tree.leaves(shardings))
        if key not in self._by_shardings:
            mesh = sharding.mesh_of(state.params)

            def step(*inputs: Any) -> tuple[TrainState, Metrics]:
                with sharding.layout(mesh, sharding.TRAINING):
                    return self._step(*inputs)

            self._by_shardings[key] = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return self._by_shardings[key]


@jax.named_scope("gradient")
def accumulate(
    loss_fn: Callable[[Params, Any], tuple[jax.Array, dict[str, jax.Array]]],
    params: Params,
    batch: Any,
    freeze: str,
    micro_batches: int,
) -> tuple[jax.Array, dict[str, jax.Array], Gradient]:
    """Sums loss and gradient of `loss_fn(params, micro_batch) -> (loss, aux)` over equal parts of `batch` along B.

    Returns the loss, the arrays `aux` (joined again along B), and the flat gradient of the trainable parameters in
    fp32.
    """
    trainable, frozen = split(params, freeze)

    @jax.named_scope("loss")
    def loss_of(trainable: Mapping[str, jax.Array], micro_batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_fn(join(trainable, frozen), micro_batch)

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    if micro_batches == 1:
        (loss, aux), gradient = differentiate(trainable, batch)
        return loss, aux, sharding.constrain_tree(gradient)

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[0] % micro_batches:
            raise ValueError(f"batch of {x.shape[0]} prompts does not divide into {micro_batches} micro-batches")
        # Every micro_batches-th row, not neighbouring rows: B is split over the devices, and each of them has its share
        # of every micro-batch. Neighbouring rows would be on few devices, and the others would wait.
        return x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def add(total: tuple[jax.Array, Gradient], micro_batch: Any) -> tuple[tuple[jax.Array, Gradient], Any]:
        loss, gradient = total
        (micro_loss, aux), micro_gradient = differentiate(trainable, micro_batch)
        gradient = jax.tree.map(jnp.add, gradient, sharding.constrain_tree(micro_gradient))
        return (loss + micro_loss, sharding.constrain_tree(gradient)), aux

    zero = (jnp.zeros(()), sharding.constrain_tree(jax.tree.map(jnp.zeros_like, trainable)))
    (loss, gradient), aux = jax.lax.scan(add, zero, jax.tree.map(cut, batch))
    return loss, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), aux), gradient


@jax.named_scope("optimizer")
def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Mapping[str, jax.Array], freeze: str
) -> tuple[TrainState, Metrics]:
    """One optimiser step; it skips and counts an update whose gradient is not finite."""
    trainable, frozen = split(state.params, freeze)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, trainable)
    updated = optax.apply_updates(trainable, updates)

    def if_finite(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old)

    trainable = jax.tree.map(if_finite, updated, trainable)
    opt_state = jax.tree.map(if_finite, opt_state, state.opt_state)
    nonfinite = jnp.where(finite, 0, state.nonfinite + 1)
    state = TrainState(state.step + 1, join(trainable, frozen), opt_state, nonfinite)
    return state, {"grad_norm": as_mean(norm), "nonfinite": Max(nonfinite)}


def as_mean(value: jax.Array) -> Mean:
    return Mean(value, jnp.ones(()))


def masked_mean(values: jax.Array, where: jax.Array) -> Mean:
    where = where.astype(jnp.float32)
    return Mean(jnp.sum(values * where), jnp.sum(where))


def useful(mask: jax.Array, micro_batches: int, token_bucket: int) -> Metrics:
    """Real response tokens over the positions that an update computes, those of all devices; mask [B, G, R]."""
    positions = mask.size
    if token_bucket:
        parts = sharding.batch_parts() * micro_batches
        positions = parts * packing.capacity(token_bucket, mask[..., 0].size // parts) * packing.UNIT
    return {"padding/update_useful": Mean(mask.sum(dtype=jnp.float32), jnp.float32(positions))}


def _group_std(values: jax.Array, valid: jax.Array) -> Mean:
    """Mean over groups of the standard deviation (ddof 1) of the valid members; groups of fewer than 2 are left out."""
    count = valid.sum(-1)
    centred = jnp.where(valid, values - jnp.sum(values, -1, keepdims=True) / jnp.maximum(count, 1)[:, None], 0.0)
    std = jnp.sqrt(jnp.sum(centred**2, -1) / jnp.maximum(count - 1, 1))
    return masked_mean(std, count >= 2)
