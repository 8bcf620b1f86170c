"""Attention by library kernels against the einsum form: values, and gradients of everything that goes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.models import attention, kernels, packing
from balcap_jax.parallel import sharding

B, G, P, R, N, M, H = 2, 2, 21, 10, 4, 2, 16
KINDS = ("dot_product", "splash")


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def padded_on_both_sides() -> jax.Array:
    mask = np.ones((B, P), bool)
    mask[0, :3], mask[1, -4:] = False, False
    return jnp.asarray(mask)


def compare(reference, kernel, inputs, weight, tolerance=1e-5):
    """Values where `weight` is not 0, and gradients of a weighted sum."""

    def pull(attend):
        def loss(*xs):
            read = attend(*xs)
            return jnp.sum(jnp.sin(read) * weight), read

        return jax.jit(jax.value_and_grad(loss, range(len(inputs)), has_aux=True))(*inputs)

    (wanted, wanted_read), wanted_gradients = pull(reference)
    (value, read), gradients = pull(kernel)
    np.testing.assert_allclose(value, wanted, rtol=tolerance, atol=tolerance)
    assert float(jnp.abs(jnp.where(weight != 0, read - wanted_read, 0)).max()) < tolerance
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert float(jnp.abs(gradient - wanted).max()) < tolerance * float(jnp.abs(wanted).max()) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_attends_as_by_einsum(kind):
    q, k, v, weight = arrays((B, P, N, H), (B, M, P, H), (B, M, P, H), (B, P, N, H))
    mask = padded_on_both_sides()
    compare(
        lambda *x: attention.causal(*x, mask),
        lambda *x: kernels.causal(kind, *x, mask),
        (q, k, v),
        weight * mask[:, :, None, None],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_branches_attend_to_their_prompt_as_by_einsum(kind):
    shapes = [(B, G, R, N, H), *[(B, M, P, H)] * 2, *[(B, G, M, R, H)] * 2, (B, G, R, N, H)]
    q, prefix_k, prefix_v, branch_k, branch_v, weight = arrays(*shapes)
    mask, visible = padded_on_both_sides(), jnp.tril(jnp.ones((R, R), bool))

    def reference(q, prefix_k, prefix_v, branch_k, branch_v):
        return attention.prefix_and_branch(q, prefix_k, prefix_v, mask, branch_k, branch_v, visible)

    def kernel(q, prefix_k, prefix_v, branch_k, branch_v):
        return kernels.over_prompt(kind, q, prefix_k, prefix_v, mask, branch_k, branch_v)

    compare(reference, kernel, (q, prefix_k, prefix_v, branch_k, branch_v), weight)


def test_a_kernel_runs_on_each_device_for_its_part():
    mesh = sharding.make_mesh({"replica": 1, "data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    q, k, v, weight = arrays((B, P, N, H), (B, M, P, H), (B, M, P, H), (B, P, N, H))
    mask = padded_on_both_sides()

    def kernel(*x):
        with sharding.layout(mesh, sharding.TRAINING):
            return kernels.causal("splash", *x, mask)

    compare(lambda *x: attention.causal(*x, mask), jax.jit(kernel), (q, k, v), weight * mask[:, :, None, None])


def test_auto_is_chosen_for_the_devices_of_the_program(monkeypatch):
    def chosen(platform, head_size, dtype):
        monkeypatch.setattr(sharding, "platform", lambda: platform)
        return kernels.resolve("auto", head_size, dtype)

    assert chosen("tpu", 128, "bfloat16") == "splash"
    assert chosen("tpu", 80, "bfloat16") == "einsum"
    assert chosen("gpu", 128, "bfloat16") == "dot_product"
    assert chosen("gpu", 128, "float32") == "einsum"
    assert chosen("cpu", 128, "bfloat16") == "einsum"
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    with pytest.raises(UserError, match="heads of a multiple of 128"):
        kernels.resolve("splash", 80, "bfloat16")


def test_packed_responses_on_a_tpu_meet_no_padding_again(monkeypatch):
    # The library's kernel takes a response at a time, with all of its R keys: as much attention as padding has.
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    length, heads, size = 1024, 2, 128
    at = packing.places(jnp.full((1, 2, 2), 64), length, bucket=64)
    tokens = 2 * 2 * 64
    inputs = arrays((1, tokens, heads, size), *[(2, 1, 128, size)] * 2, *[(1, 1, tokens, size)] * 2)

    def kernels_of(kind: str) -> str:
        def attend(q, prefix_k, prefix_v, k, v):
            return kernels.over_prompt_packed(kind, q, prefix_k, prefix_v, jnp.ones((2, 128), bool), k, v, at, length)

        return str(jax.make_jaxpr(attend)(*inputs))

    assert "pallas_call" not in kernels_of("auto")
    assert "pallas_call" in kernels_of("splash")
