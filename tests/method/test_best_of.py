"""Best of G: the member that is imitated, by hand, and the update against supervised training on it alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_llava import G, R, make_params, make_policy, make_prompt, make_responses

from balcap_jax import advantages
from balcap_jax.train_step import RLBatch, RLObjective, SFTBatch, finalise, init_state, make_rl_step, make_sft_step

NAN = float("nan")
POLICY = make_policy()
B = 4
OPTIMIZER = optax.sgd(0.1)
NAMES = ("precision", "recall", "linguistic")
OBJECTIVE = RLObjective(
    NAMES,
    (1.0, 2.0, 0.5),
    (False, False, True),
    R,
    estimator="best_of",
    normaliser="token",
    gate_low=0.5,
    gate_high=2.0,
)


def best(rewards, **options) -> tuple[list[list[bool]], np.ndarray]:
    rewards = np.float32(rewards)
    result = advantages.compute(rewards, estimator="best_of", **{"weights": np.ones(rewards.shape[-1])} | options)
    contributes = np.asarray(result.contributes)
    np.testing.assert_array_equal(np.asarray(result.combined), contributes.astype(float))
    return contributes.tolist(), np.asarray(result.combined)


def test_the_best_by_hand():
    group = [[[0.5, 0.1], [0.2, 0.9], [0.4, 0.4]]]
    assert best(group)[0] == [[False, True, False]]
    assert best(group, weights=[1.0, 0.1])[0] == [[True, False, False]]
    gate = np.ones((1, 3, 2))
    gate[0, 1, 1] = 0  # 0.2 is left of it
    assert best(group, gate=gate)[0] == [[False, False, True]]
    # A sum without one of its terms is no sum; of weight 0 it may be missing.
    missing = [[[0.5, 0.1], [0.9, NAN], [0.4, 0.4]]]
    assert best(missing)[0] == [[False, False, True]]
    assert best(missing, weights=[1.0, 0.0])[0] == [[False, True, False]]
    assert best(missing, member_valid=np.array([[True, True, False]]))[0] == [[True, False, False]]
    assert best([[[NAN], [NAN]], [[0.3], [0.3]], [[-2.0], [-1.0]]])[0] == [[False] * 2, [True, False], [False, True]]


def make_batch() -> RLBatch:
    rng = np.random.default_rng(3)
    responses, mask = make_responses(B)
    rewards, valid = rng.random((B, G, 3)).astype(np.float32), rng.random((B, G, 3)) > 0.1
    valid[2, :, 0] = False  # a group without a best one
    return jax.tree.map(
        jnp.asarray,
        RLBatch(
            prompt=make_prompt(POLICY, batch=B),
            image_embeds=jax.jit(POLICY.encode)(make_params(POLICY), make_prompt(POLICY, batch=B).images),
            responses=responses,
            mask=mask,
            old_log_probs=np.float32(-rng.random(mask.shape) * 9),  # of another policy: nothing is clipped
            rewards=np.where(valid, rewards, NAN),
            valid=valid,
            words=rng.integers(3, 30, (B, G)),
            reference_words=np.array([10, 12, 9, 11]),
            truncated=np.zeros((B, G), bool),
        ),
    )


def test_an_update_is_supervised_training_on_the_best_of_each_group():
    batch = make_batch()
    host = jax.device_get(batch._replace(prompt=None, image_embeds=None))
    inside = (host.words >= 0.5 * host.reference_words[:, None]) & (host.words <= 2 * host.reference_words[:, None])
    assert not inside.all()
    chosen = {}
    for b in range(B):
        sums = {
            g: host.rewards[b, g, 0] + 2 * host.rewards[b, g, 1] + 0.5 * host.rewards[b, g, 2] * inside[b, g]
            for g in range(G)
            if host.valid[b, g].all()
        }
        if sums:
            chosen[b] = max(sums, key=sums.get)
    assert sorted(chosen) == [0, 1, 3]
    mask = np.zeros((B, 1, R), bool)
    for b, g in chosen.items():
        mask[b, 0] = host.mask[b, g]
    responses = np.stack([host.responses[b, [chosen.get(b, 0)]] for b in range(B)])

    def state():
        return jax.device_put(init_state(make_params(POLICY), OPTIMIZER, "^(vision|projector)/"), jax.devices()[0])

    freeze = {"freeze": "^(vision|projector)/"}
    got, metrics = make_rl_step(POLICY, OPTIMIZER, OBJECTIVE, **freeze)(state(), batch)
    supervised = SFTBatch(batch.prompt, jnp.asarray(responses), jnp.asarray(mask))
    want, expected = make_sft_step(POLICY, OPTIMIZER, **freeze)(state(), supervised)
    np.testing.assert_allclose(finalise(metrics)["loss"], finalise(expected)["loss"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    recall = np.mean([host.rewards[b, g, 1] for b, g in chosen.items()])
    np.testing.assert_allclose(finalise(metrics)["best/recall"], recall, rtol=1e-5)
