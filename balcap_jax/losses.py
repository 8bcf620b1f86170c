"""The policy loss: token weights, clipped surrogate, KL, and log-probs in chunks that bound the logits in memory.

The loss is `sum(token_weights * per_token_loss)`. The weights come from the whole global batch at once, so the sum over
any split of it (micro-batches, devices) is the exact loss and its gradients simply add up.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

NORMALISERS = ("sequence", "token", "constant")
# Finite, so that the log-prob of a forbidden padding token times a zero weight is 0 and not NaN;
# exp(FORBIDDEN_LOGIT - any logit) is exactly 0 in fp32.
FORBIDDEN_LOGIT = -1e30
# Ceiling of the k3 estimate: one token of probability near 0 would otherwise be the whole loss.
KL_CEILING = 10.0


def token_weights(mask: ArrayLike, member_valid: ArrayLike, normaliser: str, max_tokens: int) -> jax.Array:
    """[B, G, R] float32 weights w with loss = sum(w * per_token_loss); 0 outside `mask` and for excluded members.

    Args:
      mask: [B, G, R], 1 for response tokens.
      member_valid: [B, G] bool; False = the member has no part in the loss.
      normaliser: "sequence" = mean over members of token means (GRPO, GDPO eq 3). A member that is excluded or has no
        token leaves the denominator: its absence must not scale the others.
        "token" = mean over all tokens (DAPO).
        "constant" = sum / (B * G * max_tokens) (Dr.GRPO). All B * G members count, excluded ones too: the point of this
        normaliser is that nothing sampled enters the denominator.
      max_tokens: response budget; only "constant" uses it.

    A batch without any valid token has all weights 0. Raises ValueError for an unknown normaliser.
    """
    counted: jax.Array = jnp.asarray(mask, jnp.float32) * jnp.asarray(member_valid, jnp.float32)[..., None]
    weights: jax.Array
    if normaliser == "sequence":
        tokens = counted.sum(-1, keepdims=True)
        weights = counted / jnp.maximum(tokens, 1) / jnp.maximum((tokens > 0).sum(), 1)
    elif normaliser == "token":
        weights = counted / jnp.maximum(counted.sum(), 1)
    elif normaliser == "constant":
        B, G, _ = counted.shape
        weights = counted / (B * G * max_tokens)
    else:
        raise ValueError(f"normaliser {normaliser!r} is not one of {', '.join(map(repr, NORMALISERS))}")
    return weights


def clipped_surrogate(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    clip_low: float,
    clip_high: float,
    log_ratio_clamp: float = 20.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """PPO's -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per token, `advantages` [B, G].

    Returns (loss [B, G, R], ratio [B, G, R], clipped [B, G, R] bool). Where `clipped`, the gradient is 0.
    The log-ratio is clamped to +-`log_ratio_clamp` before exp, with gradient 0 beyond.
    """
    ratio = jnp.exp(jnp.clip(log_probs - old_log_probs, -log_ratio_clamp, log_ratio_clamp))
    advantages = advantages[..., None]
    # The minimum written out: it binds above for A > 0 and below for A < 0. jnp.minimum of both branches has the same
    # value, but splits the gradient between them where they are equal.
    bound = jnp.where(advantages > 0, 1 + clip_high, 1 - clip_low)
    clipped = ((advantages > 0) & (ratio > bound)) | ((advantages < 0) & (ratio < bound))
    return -advantages * jnp.where(clipped, bound, ratio), ratio, clipped


def kl_k3(log_probs: jax.Array, ref_log_probs: jax.Array, clamp: float = 20.0) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - policy, >= 0.

    d is clamped to +-`clamp` and the estimate to KL_CEILING, both with gradient 0 beyond: unclamped, one token that the
    reference favours by 50 nats makes the loss infinite.
    """
    difference = jnp.clip(ref_log_probs - log_probs, -clamp, clamp)
    return jnp.minimum(jnp.expm1(difference) - difference, KL_CEILING)


def sampling_logits(logits: ArrayLike, temperature: ArrayLike = 1.0, forbidden: ArrayLike | None = None) -> jax.Array:
    """Logits [..., V] of the sampling distribution in fp32: divided by temperature, `forbidden` [V] ids impossible.

    The sampler and the loss both call this; otherwise the ratio of an on-policy step is not 1.
    """
    scaled: jax.Array = jnp.asarray(logits, jnp.float32) / temperature
    if forbidden is not None:
        # Added, not selected: a selection would keep a constant of the logits' shape and its condition beside them.
        scaled = scaled + jnp.where(forbidden, FORBIDDEN_LOGIT, 0.0)
    return scaled


def chunked_log_probs(
    hidden: jax.Array,
    head: jax.Array | Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    chunk: int,
    temperature: ArrayLike = 1.0,
    forbidden: ArrayLike | None = None,
) -> jax.Array:
    """log softmax(logits / temperature)[targets] without an array of logits beyond `chunk` tokens, forward or backward.

    Args:
      hidden: [..., D], any float type.
      head: kernel [D, V], or a function [..., D] -> [..., V]. A kernel is multiplied in hidden's type with fp32 sums,
        and the sum of its gradient over chunks is in fp32. A function looks after both itself.
      targets: [...] int token ids.
      chunk: most tokens with logits at a time, over all devices. Every chunk holds the whole leading axis, so that a
        sharded batch stays where it is; a leading axis longer than `chunk` is flattened with the others.
      temperature: > 0.
      forbidden: [V] bool, ids of probability 0, or None.

    Returns [...] float32. A forbidden target has a log-prob near FORBIDDEN_LOGIT and a finite gradient.
    Raises ValueError for a chunk below 1 or shapes that do not fit.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"hidden {hidden.shape} and targets {targets.shape} do not fit")
    logits_of = head if callable(head) else _multiplying(head)

    # Chunks divide the positions of each row, not the rows: a cut through a sharded axis would put whole chunks on
    # single devices, one after the other.
    rows = targets.shape[0] if targets.ndim > 1 and targets.shape[0] <= chunk else 1
    positions = targets.size // rows
    width = min(chunk // rows, positions)
    chunks = -(-positions // width)

    def cut(array: jax.Array) -> jax.Array:  # [rows * positions, ...] -> [chunks, rows, width, ...]
        array = array.reshape(rows, positions, *array.shape[targets.ndim :])
        padding = [(0, 0), (0, chunks * width - positions)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(array, padding).reshape(rows, chunks, width, *array.shape[2:]).swapaxes(0, 1)

    def log_probs_of_chunk(chunk_inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        chunk_hidden, chunk_targets = chunk_inputs
        logits = sampling_logits(logits_of(chunk_hidden), temperature, forbidden)
        # A comparison in place of a gather: it fuses, and needs no gathered logits where V is sharded.
        is_target = jnp.arange(logits.shape[-1]) == chunk_targets[..., None]
        log_probs: jax.Array = (logits * is_target).sum(-1) - jax.nn.logsumexp(logits, axis=-1)
        return log_probs

    # prevent_cse is only needed outside a scan, and costs speed inside.
    of_chunk = jax.checkpoint(log_probs_of_chunk, prevent_cse=False)
    log_probs: jax.Array = jax.lax.map(of_chunk, (cut(hidden), cut(targets)))
    return log_probs.swapaxes(0, 1).reshape(rows, chunks * width)[:, :positions].reshape(targets.shape)


def _multiplying(kernel: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The function that multiplies hidden states [..., D] by `kernel` [D, V]."""
    # The scan sums the kernel's gradient in the type of the array that it closes over.
    kernel = kernel.astype(jnp.float32)

    def logits(hidden: jax.Array) -> jax.Array:
        return jnp.einsum("...d,dv->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    return logits
