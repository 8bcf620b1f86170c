"""Errors of scores on purpose: noise of a picture and of a caption, few levels, and what votes make of them."""

import json

import numpy as np
import pytest

from balcap_jax import advantages, rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes
from balcap_jax.judges import draws
from balcap_jax.judges.flawed import FlawedJudge
from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import RewardFn, Samples, Scores
from balcap_jax.rewards.flawed import Flawed
from balcap_jax.rewards.length import LengthPenalised

B, G = 60, 8
RNG = np.random.default_rng(2)
EXACT = RNG.random((B, G, 2)).astype(np.float32)
SAMPLES = Samples(
    [f"example-{b}" for b in range(B)],
    [[f"caption {g} of {b}" for g in range(G)] for b in range(B)],
    ["a reference of five words"] * B,
    [["a unit"]] * B,
    None,
    [{}] * B,
)


class Given(RewardFn):
    """The scores EXACT, one of them missing."""

    names = ("precision", "recall")
    gated = (False, False)
    asks = ("precision", "recall")

    def __call__(self, samples):
        valid = np.ones(EXACT.shape, bool)
        valid[0, 0, 0] = False
        return Scores(np.where(valid, EXACT, 0), valid, [[{"failures": {}} for _ in range(G)] for _ in range(B)])


def errors(flaws, votes=1, seed=0) -> np.ndarray:
    """[B, G, 2] errors of the scores; NaN where there is none."""
    scores = Flawed(Given(), flaws, votes, seed)(SAMPLES)
    assert not scores.valid[0, 0, 0]
    assert scores.rewards[0, 0, 0] == 0
    json.dumps(scores.detail)
    assert scores.detail[0][0]["exact"].keys() == {"recall"}
    assert scores.detail[3][1]["exact"]["precision"] == EXACT[3, 1, 0]
    return np.where(scores.valid, scores.rewards - EXACT, np.nan)


def test_noise_of_a_picture_is_one_error_of_its_group_and_leaves_no_trace_in_advantages():
    error = errors({"picture_noise": 0.3})
    assert np.nanmax(error, axis=1) == pytest.approx(np.nanmin(error, axis=1), abs=1e-6)
    assert error[:, 1].std() == pytest.approx(0.3, abs=0.06)
    assert abs(np.corrcoef(error[:, 1].T)[0, 1]) < 0.35, "each objective has its own"
    plain, noisy = (reward(SAMPLES) for reward in (Given(), Flawed(Given(), {"picture_noise": 0.3}, 1, 0)))
    for estimator in ("c_gdpo", "grpo"):
        given = {"weights": [1.0, 1.0], "valid": plain.valid, "estimator": estimator}
        exact, other = (np.asarray(advantages.compute(s.rewards, **given).combined) for s in (plain, noisy))
        np.testing.assert_allclose(other, exact, atol=1e-4)


def test_noise_of_a_caption_is_its_own_and_votes_average_it():
    error = errors({"noise": 0.2})
    assert np.nanstd(error) == pytest.approx(0.2, abs=0.02)
    assert np.nanmean(error) == pytest.approx(0, abs=0.03)
    assert np.nanstd(error - np.nanmean(error, axis=1, keepdims=True), axis=1).mean() == pytest.approx(0.19, abs=0.02)
    assert np.nanstd(errors({"noise": 0.2}, votes=9)) == pytest.approx(0.2 / 3, abs=0.01)
    np.testing.assert_array_equal(errors({"noise": 0.2}, seed=7), errors({"noise": 0.2}, seed=7))
    assert np.nanmax(abs(errors({"noise": 0.2}, seed=7) - error)) > 0.2


def test_coarse_scores_have_few_levels_and_noise_comes_before_them():
    scores = Flawed(Given(), {"coarse": 3.0}, 1, 0)(SAMPLES).rewards
    assert set(np.unique(scores)) == {0, 0.5, 1}
    assert np.abs(scores - np.where(scores == 0, 0, EXACT))[1:].max() <= 0.25 + 1e-6
    assert Flawed(Given(), {"coarse": 5.0}, 1, 0)._reported(0.62, "x", "y", "z") == 0.5
    assert Flawed(Given(), {"coarse": 5.0}, 1, 0)._reported(0.63, "x", "y", "z") == 0.75
    both = Flawed(Given(), {"noise": 0.2, "coarse": 3.0}, 1, 0)(SAMPLES).rewards
    assert set(np.unique(both * 2 % 1)) == {0}
    # The mean of votes lies between the levels again.
    assert len(np.unique(Flawed(Given(), {"noise": 0.2, "coarse": 3.0}, 3, 0)(SAMPLES).rewards.round(5))) > 5


def test_the_length_is_counted_and_not_judged():
    reward = LengthPenalised(Given(), {"length": "two_sided"})
    exact, said = reward(SAMPLES), Flawed(reward, {"noise": 0.5, "coarse": 2.0}, 1, 0)(SAMPLES)
    assert reward.names[-1] == "length"
    np.testing.assert_array_equal(said.rewards[..., -1], exact.rewards[..., -1])
    assert (said.rewards[..., 0] != exact.rewards[..., 0]).mean() > 0.9


def test_draws_are_normal_and_uniform():
    numbers = np.array([draws.normal("seed", str(i)) for i in range(4000)])
    assert (numbers.mean(), numbers.std()) == pytest.approx((0, 1), abs=0.05)
    assert np.mean(np.abs(numbers) < 1.96) == pytest.approx(0.95, abs=0.015)
    shares = np.histogram([draws.uniform("seed", str(i)) for i in range(4000)], 4, (0, 1))[0] / 4000
    assert shares == pytest.approx(np.full(4, 0.25), abs=0.03)


def test_training_alone_has_the_errors_and_the_truth_beside_them():
    judge = FlawedJudge({"noise": 0.3, "false_accept": 0.5}, seed=1)
    reward = BalCapReward(judge)
    assert rewards.in_training(reward, _judge(), 1) is reward
    flawed = rewards.in_training(reward, _judge(flaws="noise:0.3,false_accept:0.5"), 1)
    assert (type(flawed), flawed.flaws) == (Flawed, {"noise": 0.3})
    assert rewards.in_training(reward, _judge(flaws="false_accept:0.5"), 1) is reward
    asked = rewards.in_training(reward, _judge(flaws="noise:0.3", ask="recall:0.5"), 1)
    assert (asked.names, asked.reward.shares) == (reward.names, {"recall": 0.5})
    fields = {"scene", "reference_units"}
    assert rewards.truth(judge, fields).judge is judge.exact()
    assert rewards.truth(OracleJudge(), fields) is None
    assert rewards.truth(judge, {"scene"}) is None


def _judge(**fields: str):
    return recipes.load("configs/scenes.py", {f"judge.{name}": text for name, text in fields.items()}).judge


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"flaws": "sleepy:0.2"},
            "'judge.flaws' names 'sleepy', which is none of false_accept, length, praise, coarse",
        ),
        ({"flaws": "noise"}, "'judge.flaws' must be a list such as false_accept:0.2,coarse:3, got 'noise'"),
        ({"flaws": "noise:-1"}, "'judge.flaws' must be a list such as"),
        ({"flaws": "false_accept:1.5"}, "gives false_accept the amount 1.5; it is within 0 and 1"),
        ({"flaws": "coarse:1"}, "gives coarse the amount 1; it is within 2 and 100"),
        ({"flaws": "coarse:2.5"}, "gives coarse 2.5 levels; they are a whole number"),
        ({"flaws": "noise:1,noise:2"}, "'judge.flaws' names noise twice"),
        (
            {"flaws": "noise:1", "name": "remote"},
            "'judge.flaws' is for the oracle judge only, and judge.name is 'remote'",
        ),
        ({"flaws": "noise:1", "failure_rate": "0.1"}, "write failed:RATE into judge.flaws"),
        ({"votes": "3"}, "'judge.votes' is 3, and without judge.flaws all votes are the same"),
        ({"flaws": "noise:1", "votes": "2"}, "'judge.votes' must be odd, so that there is a majority, got 2"),
        (
            {"flaws": "failed:0.3"},
            r"lets 0.3 of all questions fail, of which judge.max_failure_rate \(0.2\) stops the run",
        ),
    ],
)
def test_what_no_judge_can_be_is_one_clear_line(fields, message):
    with pytest.raises(UserError, match=message):
        _judge(**fields)


def test_many_failed_calls_need_a_run_or_votes_that_bear_them():
    assert _judge(flaws="failed:0.3", max_failure_rate="0.5").flaws == "failed:0.3"
    assert _judge(flaws="failed:0.3", votes="3").votes == 3
    assert _judge(flaws="failed:1", max_failure_rate="1").flaws == "failed:1"
    config = recipes.load("configs/scenes.py:lexical", {"judge.flaws": "noise:1"})
    with pytest.raises(UserError, match=r"'judge.flaws' is 'noise:1', and the reward 'lexical' asks no judge"):
        rewards.check_settings(config)
