"""Attention over whole images goes through a few of them at a time: the same numbers, and never all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
from tiny_llava import make_params, make_policy, make_prompt

from balcap_jax.models import image_attention
from balcap_jax.parallel import sharding

B = 8


@pytest.mark.parametrize(("limit", "parts"), [(2**29, 1), (4 * 300, 4), (4 * 150, 8), (1, 8)])
def test_as_few_parts_as_the_logits_ask_for(monkeypatch, limit, parts):
    """One row has 150 logits."""
    monkeypatch.setattr(image_attention, "IMAGE_LOGITS", limit)
    seen = []

    def attend(x):
        seen.append(x.shape[0])
        return 2 * x

    x = np.arange(B * 3.0).reshape(B, 3)
    np.testing.assert_array_equal(image_attention.few_at_a_time(attend, (x,), 150), 2 * x)
    assert set(seen) == {B // parts}


def test_the_rows_of_a_device_count(monkeypatch):
    monkeypatch.setattr(image_attention, "IMAGE_LOGITS", 4 * 150)
    mesh = sharding.make_mesh({"replica": 1, "data": 2, "fsdp": 2, "tensor": 1}, jax.devices()[:4])
    x, seen = jax.device_put(np.arange(B * 3.0).reshape(B, 3), sharding.batch_sharding(mesh)), []

    def attend(x):
        seen.append(x.shape[0])
        return 2 * x

    @jax.jit
    def run(x):
        with sharding.layout(mesh, sharding.TRAINING):
            return image_attention.few_at_a_time(attend, (x,), 150)

    np.testing.assert_array_equal(run(x), 2 * x)
    assert set(seen) == {4}  # a row of each of the four devices


def of_llava():
    policy = make_policy()
    return policy, make_params(policy), make_prompt(policy, batch=B).images


def of_qwen():
    policy = tiny_qwen.make_policy()
    return policy, tiny_qwen.make_params(policy), tiny_qwen.make_images(policy, [(4, 6), (5, 8), (2, 3), (6, 6)])[0]


@pytest.mark.parametrize("family", [of_llava, of_qwen])
def test_towers_give_the_same_embeddings_and_gradients(monkeypatch, family):
    policy, params, images = family()

    def run(limit):
        monkeypatch.setattr(image_attention, "IMAGE_LOGITS", limit)

        @jax.jit
        def loss(params):
            embeds = policy.encode(params, images)
            return jnp.sum(jnp.sin(embeds)), embeds

        return jax.value_and_grad(loss, has_aux=True)(params)

    ((_, whole), gradient), ((_, parts), of_parts) = run(2**29), run(1)
    np.testing.assert_allclose(parts, whole, atol=1e-5 * np.abs(whole).max())
    for one, other in zip(jax.tree.leaves(of_parts), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 0.1))  # A bias of keys has none.
