"""The arena among the captions of a picture: its pairs, its mean, what fails, and the judges that answer it."""

import itertools
import json

import numpy as np
import pytest

from balcap_jax import rewards
from balcap_jax.config.recipes import default_config
from balcap_jax.data.scenes.language import reference_caption, reference_units
from balcap_jax.data.scenes.world import sample_scene
from balcap_jax.judges.oracle import OracleJudge, worth
from balcap_jax.judges.schema import Failure, Judge, PreferenceQuestion, PreferenceVerdict
from balcap_jax.rewards.arena import REFERENCE, ArenaReward, BalCapArenaReward, circular_pairs, score_comparisons
from balcap_jax.rewards.base import Samples

IMAGE = np.zeros((8, 8, 3), np.uint8)


class ByLength(Judge):
    """Prefers the longer caption, or the first where `place` says so; fails on what holds "broken"."""

    def __init__(self, place=False):
        self.place, self.asked = place, []

    def preference(self, questions):
        self.asked += questions
        return [self._verdict(question) for question in questions]

    def _verdict(self, question):
        if "broken" in question.first + question.second:
            return Failure("no answer")
        first, second = len(question.first), len(question.second)
        winner = 1 if self.place else 0 if first == second else 1 if first > second else 2
        return PreferenceVerdict(winner=winner)


def samples_of(captions, ids=None, references=None, **more) -> Samples:
    count = len(captions)
    return Samples(
        example_ids=ids or [f"example {b}" for b in range(count)],
        captions=captions,
        references=references or ["a reference"] * count,
        reference_units=[[]] * count,
        images=[IMAGE] * count,
        metadata=[{}] * count,
        **more,
    )


@pytest.mark.parametrize(("group", "opponents"), [(2, 1), (3, 1), (8, 2), (8, 7), (8, 20), (5, 4)])
def test_each_caption_is_shown_first_as_often_as_second(group, opponents):
    pairs = circular_pairs(list(range(group)), opponents)
    each = min(opponents, group - 1)
    assert len(pairs) == len(set(pairs)) == group * each
    for place in range(group):
        assert sum(first == place for first, _ in pairs) == each
        assert sum(second == place for _, second in pairs) == each
        assert (place, place) not in pairs


def test_the_reward_is_the_share_of_comparisons_won():
    """With all opponents the longest of 5 wins all, the next 3 of 4, ...; the two equal ones share their comparison."""
    captions = ["a" * n for n in (5, 3, 9, 3, 1)]
    scores = ArenaReward(ByLength(), {"opponents": 4})(samples_of([captions]))
    np.testing.assert_allclose(scores.rewards[0, :, 0], [3 / 4, 1.5 / 4, 1.0, 1.5 / 4, 0.0])
    assert scores.valid.all()
    assert len(scores.detail[0][0]["compared"]) == 8
    few = ArenaReward(ByLength(), {"opponents": 2})(samples_of([captions]))
    assert few.rewards.mean() == pytest.approx(0.5)
    assert [len(detail["compared"]) for detail in few.detail[0]] == [4] * 5


def test_a_judge_that_prefers_a_place_moves_no_caption():
    scores = ArenaReward(ByLength(place=True), {"opponents": 3})(samples_of([[str(g) for g in range(8)]] * 3))
    np.testing.assert_array_equal(scores.rewards, 0.5)


def test_pairs_depend_on_seed_and_example_alone():
    def asked(seed, ids, captions):
        judge = ByLength()
        ArenaReward(judge, {"seed": seed, "opponents": 1})(samples_of(captions, ids))
        return [(question.first, question.second) for question in judge.asked]

    groups = [[f"{name}{g}" for g in range(6)] for name in "ab"]
    both = asked(0, ["x", "y"], groups)
    assert set(asked(0, ["y", "x"], groups[::-1])) == set(both)
    assert set(asked(1, ["x", "y"], groups)) != set(both)
    circles = [[(int(a[1]), int(b[1])) for a, b in both if a[0] == name] for name in "ab"]
    assert circles[0] != circles[1]


def test_failed_comparisons_leave_the_mean_and_too_many_are_a_missing_value():
    captions = ["aaaa", "aaa", "broken", "a"]
    scores = ArenaReward(ByLength(), {"opponents": 3})(samples_of([captions]))
    assert scores.valid[0, :, 0].tolist() == [True, True, False, True]
    np.testing.assert_allclose(scores.rewards[0, [0, 1, 3], 0], [1.0, 0.5, 0.0])
    assert scores.detail[0][2]["failures"] == {"preference": "no answer"}
    half = [(1, True, 1.0), (1, False, Failure("x"))]
    assert score_comparisons(half)[0] == 1.0
    assert isinstance(score_comparisons([*half, (2, True, Failure("x"))])[0], Failure)


def test_left_out_captions_are_in_no_comparison():
    judge, group = ByLength(), ["a" * n for n in (1, 2, 3, 4)]
    left_out = {"preference": np.array([[False, True, False, True]])}
    scores = ArenaReward(judge, {"opponents": 3})(samples_of([group], left_out=left_out))
    assert {question.first for question in judge.asked} == {"a", "aaa"}
    assert scores.valid[0, :, 0].tolist() == [True, False, True, False]
    assert scores.unasked()[0, :, 0].tolist() == [False, True, False, True]
    np.testing.assert_array_equal(scores.rewards[0, :, 0], [0, 0, 1, 0])
    assert scores.detail[0][1]["failures"] == {}


def test_evaluations_compare_with_the_reference_in_both_orders():
    """Within a group the mean is 1/2 whatever the captions are worth: no measure of progress."""
    judge = ByLength()
    reward = ArenaReward(judge)
    measured = rewards.measure(reward, judge, ())
    scores = measured(samples_of([["short", "longer than it"]], references=["ten longs."]))
    np.testing.assert_array_equal(scores.rewards[0, :, 0], [0.0, 1.0])
    assert [each["with"] for each in scores.detail[0][0]["compared"]] == ["reference"] * 2
    assert len(judge.asked) == 4
    alone = reward(samples_of([["longer than it"]], references=["ten longs."]))
    np.testing.assert_array_equal(alone.rewards, 1.0)
    assert reward._pairs(samples_of([["a", "b"]]), 0) != measured._pairs(samples_of([["a", "b"]]), 0)
    assert (0, REFERENCE) in measured._pairs(samples_of([["a", "b"]]), 0)


def test_the_oracle_prefers_what_is_worth_more():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(seed) for seed in range(6)]
    for scene in scenes:
        units = tuple(reference_units(scene))
        good = reference_caption(scene, rng)
        worse = good.split(". ")[0] + "."
        metadata = {"scene": scene}
        asked = [PreferenceQuestion(a, b, None, metadata, units) for a, b in itertools.permutations((good, worse))]
        first, second = OracleJudge().preference(asked)
        assert worth(good, scene, units) > worth(worse, scene, units) + 0.05
        assert (first.winner, second.winner) == (1, 2)
        same = PreferenceQuestion(good, good, None, metadata, units)
        assert OracleJudge().preference([same])[0].winner == 0
    failing = OracleJudge(failure_rate=1.0).preference(asked)
    assert all(isinstance(verdict, Failure) for verdict in failing)


def test_beside_balcap_it_is_a_fourth_objective():
    scene = sample_scene(3)
    good = reference_caption(scene, np.random.default_rng(0))
    samples = Samples(
        example_ids=["x"],
        captions=[[good, "There is a thing.", good.split(". ")[0] + "."]],
        references=[good],
        reference_units=[list(reference_units(scene))],
        images=None,
        metadata=[{"scene": scene.to_json()}],
    )
    config = default_config().rewards
    config.name, config.weights = "balcap_arena", (1.0, 1.0, 1.0, 1.0)
    assert rewards.objectives(config) == ("precision", "recall", "linguistic", "preference")
    reward = rewards.build(config, OracleJudge())
    assert isinstance(reward, BalCapArenaReward)
    scores = reward(samples)
    assert scores.rewards.shape == (1, 3, 4)
    assert scores.rewards[0, 0].tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0])
    assert scores.rewards[0, 1, 3] < 0.5
    json.dumps(scores.detail)
