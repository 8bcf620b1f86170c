"""Judge calls that fail: missing values with a reason, other members untouched, a stop when too many do."""

import dataclasses
import functools
import json
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_runs import checkpoints, read_metrics, the_one_line, train
from tiny_llava import G, R, make_params, make_policy, make_prompt, make_responses

from balcap_jax import advantages
from balcap_jax.config.recipes import default_config
from balcap_jax.train_step import RLBatch, RLObjective, finalise, init_state, make_rl_step
from balcap_jax.training.run import failure_budget_spent, failure_window

NAMES = ("precision", "recall", "linguistic")
CALLS = 4 * 3 * len(NAMES)  # of a step of the recipe


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_too_many_failures_stop_the_run_which_goes_on_once_the_judge_is_mended(tmp_path, data_dir):
    """0.9 of 36 calls fail at each step; over the window of 8 steps 0.2 of 288 calls may: that is passed at step 2."""
    overrides = {"stages__order": "rl", "stages__rl__steps": 8}
    done = train(tmp_path, data_dir, expected=2, judge__failure_rate=0.9, **overrides)
    line = the_one_line(done.stderr)
    failed = round(CALLS * sum(line["judge/failure_rate"] for line in read_metrics(tmp_path)))
    assert line.startswith(f"error: stopped at step 2: {failed} of the last 72 judge calls failed, more than ")
    assert "judge.max_failure_rate = 0.2 allows over 8 steps; the run is saved, mend the judge" in line
    assert failed > 57
    assert checkpoints(tmp_path) == [2]
    assert not (tmp_path / "model").exists()

    # A judge is mended where it runs; the oracle's failures are part of the config.
    config = json.loads((tmp_path / "config.json").read_text())
    config["judge"]["failure_rate"] = 0.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = train(tmp_path, data_dir, **overrides)
    assert "going on after step 2 of 8 (rl)" in done.stdout
    assert [line["judge/failure_rate"] > 0 for line in read_metrics(tmp_path)] == [True] * 2 + [False] * 6


@pytest.mark.parametrize(
    ("steps", "failed", "stop_at"),
    [
        (3, [10] * 3, 1),  # a run that is shorter than the window
        (8, [4] * 8, 5),
        (8, [2] * 8, None),  # what is allowed is allowed
        (100, [10] * 100, 5),
        (100, [10, 0, 0, 0, 0] * 20, None),
        (100, [0] * 30 + [10] * 70, 35),
    ],
)
def test_budget_of_failures(steps, failed, stop_at):
    """Of 10 calls a step; a fifth of those in 20 steps may fail, or of those of the whole stage if that is shorter."""
    config = default_config()
    config.stages.rl.steps = steps
    window, stopped = deque(maxlen=failure_window(config)), None
    for step, count in enumerate(failed, start=1):
        window.append((count, 10))
        if failure_budget_spent(window, config):
            stopped = step
            break
    assert stopped == stop_at


# ---- one update -----------------------------------------------------------------------------------------------------

POLICY = make_policy()
FAILED = 1  # the member whose precision is missing
OBJECTIVE = RLObjective(NAMES, weights=(1.0, 0.5, 2.0), gated=(False, False, True), max_tokens=R, batch_norm="none")
# After the first update the trace is the gradient itself.
OPTIMIZER = optax.trace(decay=0.9)
STEP = make_rl_step(POLICY, OPTIMIZER, OBJECTIVE)
REWARDS = np.random.default_rng(0).random((1, G, 3)).astype(np.float32)
OTHERS = [g for g in range(G) if g != FAILED]


def one_invalid() -> np.ndarray:
    valid = np.ones((1, G, 3), bool)
    valid[0, FAILED, 0] = False
    return valid


@functools.cache
def rollout_arrays():
    params, prompt = make_params(POLICY), make_prompt(POLICY, batch=1)
    responses, mask = make_responses(batch=1)
    embeds = jax.jit(POLICY.encode)(params, prompt.images)
    log_probs = jax.jit(POLICY.log_probs)(params, prompt, embeds, responses)
    return prompt, embeds, responses, mask, jnp.where(mask, log_probs, 0.0)


def update(rewards, valid, members=range(G), step=STEP):
    """The flat gradient and the metrics of an update on `members` of the group, all in band and not truncated."""
    prompt, embeds, responses, mask, log_probs = rollout_arrays()
    members = np.array(members)
    batch = RLBatch(
        prompt,
        embeds,
        responses[:, members],
        mask[:, members],
        log_probs[:, members],
        jnp.asarray(rewards[:, members]),
        jnp.asarray(valid[:, members]),
        words=jnp.full((1, len(members)), 10),
        reference_words=jnp.full(1, 10),
        truncated=jnp.zeros((1, len(members)), bool),
    )
    state, metrics = step(init_state(make_params(POLICY), OPTIMIZER, ""), batch)
    return {path: np.asarray(leaf) for path, leaf in state.opt_state.trace.items()}, finalise(metrics)


def only(objective: int) -> np.ndarray:
    """Rewards in which only one objective tells the members apart: constant columns have no advantage."""
    rewards = np.full_like(REWARDS, 0.5)
    rewards[..., objective] = REWARDS[..., objective]
    return rewards


@pytest.mark.parametrize("estimator", ["c_gdpo", "gdpo"])
@pytest.mark.parametrize("batch_norm", ["sequence", "none"])
def test_advantages_of_the_others_are_those_without_the_failed_member(estimator, batch_norm):
    settings = {"weights": jnp.asarray(OBJECTIVE.weights), "estimator": estimator, "batch_norm": batch_norm}
    failed = advantages.compute(REWARDS, valid=one_invalid(), **settings)
    whole = advantages.compute(REWARDS, **settings)
    without = advantages.compute(REWARDS[:, OTHERS], **settings)
    per_objective = np.asarray(failed.per_objective)
    np.testing.assert_allclose(per_objective[:, OTHERS, 0], without.per_objective[..., 0], rtol=1e-6)
    np.testing.assert_array_equal(per_objective[..., 1:], whole.per_objective[..., 1:])
    assert per_objective[0, FAILED, 0] == 0
    assert np.asarray(failed.combined)[0, FAILED] != 0  # Its other two objectives still teach.


@pytest.mark.parametrize("held", [0.0, np.nan, np.inf, 1e9, -1e30])
def test_what_a_failed_slot_holds_is_never_read(held):
    rewards = REWARDS.copy()
    rewards[0, FAILED, 0] = held
    gradient, metrics = update(rewards, one_invalid())
    reference, expected = update(REWARDS, one_invalid())
    for path, leaf in gradient.items():
        assert np.isfinite(leaf).all(), path
        np.testing.assert_array_equal(leaf, reference[path], err_msg=path)
    assert metrics == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert metrics["reward/precision"] == pytest.approx(REWARDS[0, OTHERS, 0].mean())
    assert metrics["nonfinite"] == 0


def test_gradient_is_that_of_the_others_and_of_the_other_objectives():
    """On-policy and without the batch's normalisation the gradient is a sum over objectives.

    Precision contributes what it does in a group without the failed member; the loss is a mean over G members in the
    one case and over G - 1 in the other.
    """
    every = np.ones((1, G, 3), bool)
    precision, _ = update(only(0), every, OTHERS)
    recall, _ = update(only(1), every)
    linguistic, _ = update(only(2), every)
    gradient, _ = update(REWARDS, one_invalid())
    intact, _ = update(REWARDS, every)
    largest = max(np.abs(leaf).max() for leaf in gradient.values())
    for path, leaf in gradient.items():
        expected = precision[path] * (G - 1) / G + recall[path] + linguistic[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5 * largest, err_msg=path)
    assert max(np.abs(gradient[path] - intact[path]).max() for path in gradient) > 1e-2 * largest


@pytest.mark.parametrize(
    ("estimator", "weights", "missing", "normaliser"),
    [
        pytest.param("grpo", OBJECTIVE.weights, [0], "sequence", marks=pytest.mark.slow),
        pytest.param("rloo", OBJECTIVE.weights, [0], "token", marks=pytest.mark.slow),
        ("c_gdpo", (1.0, 0.0, 2.0), [0, 2], "sequence"),  # What is left of it has no weight.
    ],
)
def test_a_member_without_an_advantage_does_not_dilute_the_loss(estimator, weights, missing, normaliser):
    """The update is that of the group without it."""
    objective = dataclasses.replace(OBJECTIVE, estimator=estimator, weights=weights, normaliser=normaliser)
    step = make_rl_step(POLICY, OPTIMIZER, objective)
    valid = np.ones((1, G, 3), bool)
    valid[0, FAILED, missing] = False
    gradient, metrics = update(REWARDS, valid, step=step)
    expected, without = update(REWARDS, valid, OTHERS, step=step)
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in gradient.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5 * largest, err_msg=path)
    assert metrics["loss"] == pytest.approx(without["loss"], abs=1e-5)
    assert largest > 1e-3
