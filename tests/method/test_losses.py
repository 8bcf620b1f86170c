"""The loss pieces against hand-computed numbers, loops, autodiff of plain versions, and the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balcap_jax import losses

# ---- token weights ----

# Per-token losses 1 2 3 / 4 / nothing: lengths 3, 1, 0 of at most 4 tokens. The same table through TRL 1.16 and verl
# gave 2.5 (token mean), 3.0 or 2.0 (sequence mean, the empty member out or in), 0.833333 (constant).
TABLE = np.array([[[1, 2, 3, 99], [4, 99, 99, 99], [99, 99, 99, 99]]], np.float32)
MASK = np.array([[[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]])
ALL = np.ones((1, 3), bool)


@pytest.mark.parametrize(("normaliser", "expected"), [("token", 2.5), ("sequence", 3.0), ("constant", 10 / 12)])
def test_golden_normalisers(normaliser, expected):
    weights = losses.token_weights(MASK, ALL, normaliser, max_tokens=4)
    np.testing.assert_allclose((weights * TABLE).sum(), expected, rtol=1e-6)
    assert np.all(np.asarray(weights)[MASK == 0] == 0)


@pytest.mark.parametrize(("normaliser", "expected"), [("token", 2.0), ("sequence", 2.0), ("constant", 6 / 12)])
def test_excluded_member_has_no_part(normaliser, expected):
    """Without the second member: it leaves the denominators of both means, and the constant stays constant."""
    weights = losses.token_weights(MASK, np.array([[True, False, True]]), normaliser, max_tokens=4)
    np.testing.assert_allclose((weights * TABLE).sum(), expected, rtol=1e-6)


def test_nothing_valid_is_zero_and_unknown_is_an_error():
    for normaliser in losses.NORMALISERS:
        weights = losses.token_weights(MASK, ~ALL, normaliser, max_tokens=4)
        np.testing.assert_array_equal(weights, np.zeros((1, 3, 4)))
    with pytest.raises(ValueError, match="normaliser 'batch'"):
        losses.token_weights(MASK, ALL, "batch", 4)


@pytest.mark.parametrize("normaliser", losses.NORMALISERS)
def test_any_split_of_the_batch_adds_up_to_the_loop(normaliser):
    rng = np.random.default_rng(0)
    B, G, R = 6, 4, 9
    lengths = rng.integers(0, R + 1, (B, G))
    mask = (np.arange(R) < lengths[..., None]).astype(np.int32)
    member_valid = rng.random((B, G)) > 0.2
    table = rng.normal(size=(B, G, R))

    members = [(i, j) for i in range(B) for j in range(G) if member_valid[i, j] and lengths[i, j] > 0]
    sums = [sum(table[i, j, t] for t in range(lengths[i, j])) for i, j in members]
    expected = {
        "sequence": sum(s / lengths[index] for s, index in zip(sums, members, strict=True)) / len(members),
        "token": sum(sums) / sum(lengths[index] for index in members),
        "constant": sum(sums) / (B * G * R),
    }[normaliser]
    terms = np.asarray(losses.token_weights(mask, member_valid, normaliser, R)) * table
    for parts in (1, 2, 3, 6):
        np.testing.assert_allclose(sum(part.sum() for part in np.split(terms, parts)), expected, rtol=1e-5)


# ---- clipped surrogate and KL ----


def plain_surrogate(log_probs, old_log_probs, advantages, clip_low, clip_high):
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratio * advantages[..., None], clipped * advantages[..., None])


def test_clipped_surrogate_by_hand():
    """ratio 1.5 and 0.5 with A = +2 and -2: clipped only where a step would go further in the direction taken."""
    log_probs = jnp.log(jnp.array([[[1.5, 0.5]], [[1.5, 0.5]]]))
    advantages = jnp.array([[2.0], [-2.0]])
    loss, ratio, clipped = losses.clipped_surrogate(log_probs, jnp.zeros((2, 1, 2)), advantages, 0.2, 0.28)
    np.testing.assert_allclose(loss, [[[-2.56, -1.0]], [[3.0, 1.6]]], rtol=1e-6)
    np.testing.assert_allclose(ratio, [[[1.5, 0.5]], [[1.5, 0.5]]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[[True, False]], [[False, True]]])


def test_clipped_surrogate_value_and_gradient_against_plain():
    keys = jax.random.split(jax.random.key(0), 3)
    log_probs, old = (-jax.random.exponential(key, (5, 4, 7)) for key in keys[:2])
    advantages = jax.random.normal(keys[2], (5, 4))
    advantages = advantages.at[0, 0].set(0.0)
    loss, _, clipped = losses.clipped_surrogate(log_probs, old, advantages, 0.2, 0.3)
    np.testing.assert_allclose(loss, plain_surrogate(log_probs, old, advantages, 0.2, 0.3), rtol=1e-6, atol=1e-7)
    gradient = jax.grad(lambda x: losses.clipped_surrogate(x, old, advantages, 0.2, 0.3)[0].sum())(log_probs)
    expected = jax.grad(lambda x: plain_surrogate(x, old, advantages, 0.2, 0.3).sum())(log_probs)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert 0.1 < np.asarray(clipped).mean() < 0.9
    assert np.all(np.asarray(gradient)[np.asarray(clipped)] == 0)
    assert not np.any(clipped[0, 0])


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient is -A for every token, also with a clip range of 0 (jnp.minimum would lose a part)."""
    advantages = jnp.array([[1.5, -0.5]])
    log_probs = -jnp.ones((1, 2, 3))
    for clip in (0.2, 0.0):
        gradient = jax.grad(lambda x, c=clip: losses.clipped_surrogate(x, log_probs, advantages, c, c)[0].sum())
        np.testing.assert_allclose(gradient(log_probs), np.broadcast_to([[[-1.5], [0.5]]], (1, 2, 3)), rtol=1e-6)


def test_log_ratio_clamp_keeps_loss_and_gradient_finite():
    log_probs, old = jnp.full((1, 1, 1), -1.0), jnp.full((1, 1, 1), -500.0)
    loss, gradient = jax.value_and_grad(
        lambda x: losses.clipped_surrogate(x, old, jnp.array([[-1.0]]), 0.2, 0.2, log_ratio_clamp=5.0)[0].sum()
    )(log_probs)
    np.testing.assert_allclose(loss, np.exp(5.0), rtol=1e-6)
    assert gradient == 0


def test_kl_k3():
    np.testing.assert_allclose(losses.kl_k3(jnp.float32(-1.0), jnp.float32(-1.5)), 0.106531, atol=1e-6)
    log_probs = jnp.linspace(-3.0, -0.1, 12)
    difference = np.float64(-1.2) - np.asarray(log_probs, np.float64)
    np.testing.assert_allclose(losses.kl_k3(log_probs, -1.2), np.exp(difference) - difference - 1, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: losses.kl_k3(x, -1.2).sum())(log_probs)
    np.testing.assert_allclose(gradient, 1 - np.exp(difference), rtol=1e-5, atol=1e-6)
    for log_prob, ref, expected in [(-200.0, -1.0, losses.KL_CEILING), (-1.0, -200.0, losses.KL_CEILING)]:
        assert losses.kl_k3(jnp.float32(log_prob), jnp.float32(ref)) == expected
        assert jax.grad(losses.kl_k3)(jnp.float32(log_prob), jnp.float32(ref)) == 0
    # The input clamp alone: d = -8 becomes -3, and the estimate stays below the ceiling.
    np.testing.assert_allclose(losses.kl_k3(jnp.float32(-1.0), jnp.float32(-9.0), clamp=3.0), np.exp(-3) + 2, rtol=1e-6)


# ---- chunked log-probs ----

D, V = 16, 37
FORBIDDEN = np.isin(np.arange(V), [0, 5, 36])


def random_inputs(shape, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (*shape, D), dtype)
    kernel = (jax.random.normal(keys[1], (D, V)) / 2).astype(dtype)
    targets = jax.random.choice(keys[2], np.flatnonzero(~FORBIDDEN), shape)
    return hidden, kernel, targets, jax.random.normal(keys[3], shape)


def plain_log_probs(hidden, kernel, targets, temperature=1.0, forbidden=None):
    logits = (hidden @ kernel) / temperature
    if forbidden is not None:
        logits = jnp.where(forbidden, -jnp.inf, logits)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((3, 4, 10), 24), ((3, 4, 10), 7), ((3, 4, 10), 2), ((3, 4, 10), 1000), ((29,), 8), ((2, 11), 2), ((1, 1, 1), 1)],
)
@pytest.mark.parametrize(("temperature", "forbidden"), [(1.0, None), (0.7, FORBIDDEN)])
def test_chunked_log_probs_value_and_gradients(shape, chunk, temperature, forbidden):
    hidden, kernel, targets, cotangent = random_inputs(shape)
    options = {"temperature": temperature, "forbidden": forbidden}

    def chunked(hidden, kernel):
        log_probs = losses.chunked_log_probs(hidden, kernel, targets, chunk=chunk, **options)
        return (log_probs * cotangent).sum(), log_probs

    def plain(hidden, kernel):
        log_probs = plain_log_probs(hidden, kernel, targets, **options)
        return (log_probs * cotangent).sum(), log_probs

    grads, log_probs = jax.jit(jax.grad(chunked, argnums=(0, 1), has_aux=True))(hidden, kernel)
    expected_grads, expected = jax.jit(jax.grad(plain, argnums=(0, 1), has_aux=True))(hidden, kernel)
    assert log_probs.shape == shape
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert relative_error(actual, wanted) < 1e-5


def test_head_may_be_a_function():
    hidden, kernel, targets, _ = random_inputs((2, 3, 5))
    bias = jnp.linspace(-1, 1, V)

    def loss(kernel, bias, head_of):
        return losses.chunked_log_probs(hidden, head_of(kernel, bias), targets, chunk=4).sum()

    def plain(kernel, bias):
        return jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel + bias), targets[..., None], -1).sum()

    grads = jax.grad(loss, argnums=(0, 1))(kernel, bias, lambda k, b: lambda h: h @ k + b)
    for actual, wanted in zip(grads, jax.grad(plain, argnums=(0, 1))(kernel, bias), strict=True):
        assert relative_error(actual, wanted) < 1e-5


def test_forbidden_ids_have_probability_0_and_finite_gradients():
    hidden, kernel, _, _ = random_inputs((1, 1, V))
    hidden = jnp.broadcast_to(hidden[:, :, :1], hidden.shape)  # one position asked for every id
    targets = jnp.arange(V)[None, None]

    def log_probs(hidden, kernel):
        return losses.chunked_log_probs(hidden, kernel, targets, chunk=8, forbidden=FORBIDDEN)

    probabilities = np.exp(log_probs(hidden, kernel))[0, 0]
    assert np.all(probabilities[FORBIDDEN] == 0)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)
    # A padding token is a forbidden target with weight 0: neither the loss nor a gradient may become NaN.
    mask = jnp.where(FORBIDDEN, 0.0, 1.0)
    loss, grads = jax.value_and_grad(lambda *x: (mask * log_probs(*x)).sum(), argnums=(0, 1))(hidden, kernel)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(g)) for g in grads)
    assert np.all(grads[1][:, FORBIDDEN] == 0)


def test_log_probs_are_those_of_the_sampler():
    """The sampler draws from sampling_logits; on the same policy the ratio of the update is 1."""
    hidden, kernel, targets, _ = random_inputs((2, 4, 6))
    sampler = jax.nn.log_softmax(losses.sampling_logits(hidden @ kernel, 0.8, FORBIDDEN))
    sampled = jnp.take_along_axis(sampler, targets[..., None], -1)[..., 0]
    update = losses.chunked_log_probs(hidden, kernel, targets, chunk=8, temperature=0.8, forbidden=FORBIDDEN)
    np.testing.assert_allclose(np.exp(update - sampled), 1, atol=1e-5)


def test_bfloat16_kernel_gradient_is_summed_in_fp32():
    """512 chunks of one sign: a bfloat16 sum stops growing near 256 terms. fp32 sums leave one rounding (2^-9)."""
    hidden = jnp.abs(random_inputs((1, 512), dtype=jnp.bfloat16)[0])
    kernel, targets = jnp.zeros((D, V), jnp.bfloat16), jnp.full((1, 512), 3)

    def loss(kernel):
        return losses.chunked_log_probs(hidden, kernel, targets, chunk=1).sum()

    gradient = jax.jit(jax.grad(loss))(kernel)
    assert gradient.dtype == jnp.bfloat16
    one_hot = np.arange(V) == 3
    expected = np.asarray(hidden, np.float64)[0].sum(0)[:, None] * (one_hot - 1 / V)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=2**-8)
    log_probs = losses.chunked_log_probs(hidden, kernel, targets, chunk=64)
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, -np.log(V), rtol=1e-6)


def largest_logits(compiled, vocabulary, width):
    """Most elements of any array with a V axis in the program, in tokens; the kernel [D, V] and its kin left out."""
    largest = 0
    for dims in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text()):
        shape = [int(d) for d in dims.split(",")]
        if vocabulary in shape and sorted(shape) != sorted((width, vocabulary)):
            largest = max(largest, int(np.prod(shape)) // vocabulary)
    return largest


@pytest.mark.parametrize("shape", [(4, 8, 32), (1024,)])
def test_no_array_of_logits_beyond_a_chunk_in_the_compiled_program(shape):
    width, vocabulary, chunk = 24, 1009, 64  # primes and odd sizes that no other axis has
    hidden, kernel = jnp.ones((*shape, width)), jnp.ones((width, vocabulary))
    targets = jnp.zeros(shape, jnp.int32)

    def compiled(log_probs):
        gradient = jax.grad(lambda hidden, kernel: log_probs(hidden, kernel).sum(), argnums=(0, 1))
        return jax.jit(gradient).lower(hidden, kernel).compile()

    chunked = compiled(lambda h, k: losses.chunked_log_probs(h, k, targets, chunk=chunk))
    plain = compiled(lambda h, k: plain_log_probs(h, k, targets))
    assert largest_logits(plain, vocabulary, width) >= 1024  # the check sees what it is meant to forbid
    assert 0 < largest_logits(chunked, vocabulary, width) <= chunk
    # Temporaries: a few arrays of one chunk, the kernel and its gradient, the inputs re-cut; far below one full array.
    memory = chunked.memory_analysis()
    assert memory.temp_size_in_bytes < 1024 * vocabulary * 4 / 2


def test_sharded_batch_stays_on_its_devices():
    """Same gradients over 8 devices, and only sums cross devices: no chunk is gathered."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (8, 4, 10, 16)), jax.random.normal(keys[1], (16, 37))
    targets = jax.random.randint(keys[2], (8, 4, 10), 0, 37)

    def loss(hidden, kernel, targets):
        return losses.chunked_log_probs(hidden, kernel, targets, chunk=56).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    layouts = PartitionSpec("data"), PartitionSpec(), PartitionSpec("data")
    split = [
        jax.device_put(array, NamedSharding(mesh, layout))
        for array, layout in zip((hidden, kernel, targets), layouts, strict=True)
    ]
    for a, b in zip(gradient(hidden, kernel, targets), gradient(*split), strict=True):
        # Gradients of up to 320 tokens, order 10.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-4)
    text = gradient.lower(*split).compile().as_text()
    assert "all-reduce" in text  # It is the text of the program over 8 devices.
    assert [op for op in ("all-gather", "all-to-all", "collective-permute") if op in text] == []


def test_bad_arguments_are_errors():
    hidden, kernel, targets, _ = random_inputs((2, 3))
    with pytest.raises(ValueError, match="chunk"):
        losses.chunked_log_probs(hidden, kernel, targets, chunk=0)
    with pytest.raises(ValueError, match="do not fit"):
        losses.chunked_log_probs(hidden, kernel, targets[0], chunk=4)
