"""Questions that are left out: which, what becomes of their scores, and the advantages of what is left."""

import numpy as np
import pytest

from balcap_jax import advantages, rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes
from balcap_jax.config.schema import parse_shares
from balcap_jax.data.scenes.language import reference_caption, reference_units
from balcap_jax.data.scenes.world import sample_scene
from balcap_jax.judges.cost import asked_of, calls_of_step
from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import Samples
from balcap_jax.rewards.sparing import Sparing, left_out_of

GROUP = 6
SHARES = {"precision": 0.5, "linguistic": 0.34}


def samples_of(count: int = 5) -> Samples:
    scenes, rng = [sample_scene(seed) for seed in range(count)], np.random.default_rng(0)
    captions = []
    for scene in scenes:
        sentences = reference_caption(scene, rng).split(". ")
        captions.append([". ".join(sentences[: g + 1]).rstrip(".") + "." for g in range(GROUP)])
    return Samples(
        example_ids=[f"scene {b}" for b in range(count)],
        captions=captions,
        references=[group[-1] for group in captions],
        reference_units=[list(reference_units(scene)) for scene in scenes],
        images=None,
        metadata=[{"scene": scene.to_json()} for scene in scenes],
    )


class Counting(OracleJudge):
    def __init__(self):
        super().__init__()
        self.asked = []

    def mixed(self, questions):
        self.asked += [(question.method, question.caption) for question in questions]
        return super().mixed(questions)


def test_a_share_of_each_group_is_asked_about():
    judge, samples = Counting(), samples_of()
    whole = BalCapReward(OracleJudge())(samples)
    scores = Sparing(BalCapReward(judge), SHARES, seed=3)(samples)
    asked = scores.valid.sum(1)
    np.testing.assert_array_equal(asked, [[3, 6, 2]] * 5)
    assert len(judge.asked) == 5 * (3 + 6 + 2)
    np.testing.assert_array_equal(scores.rewards[scores.valid], whole.rewards[scores.valid])
    np.testing.assert_array_equal(scores.unasked(), ~scores.valid)
    for b, g in samples.where:
        detail = scores.detail[b][g]
        assert detail["failures"] == {}
        names = np.array(BalCapReward.names)
        assert detail.get("left_out", []) == list(names[scores.unasked()[b, g]])


def test_the_choice_is_of_seed_example_and_question_alone():
    samples = samples_of()
    scores = Sparing(BalCapReward(OracleJudge()), SHARES, seed=3)(samples)
    turned = Samples(
        **{name: value[::-1] if isinstance(value, list) else value for name, value in vars(samples).items()}
    )
    again = Sparing(BalCapReward(OracleJudge()), SHARES, seed=3)(turned)
    np.testing.assert_array_equal(again.valid[::-1], scores.valid)
    other = Sparing(BalCapReward(OracleJudge()), SHARES, seed=4)(samples)
    assert (other.valid != scores.valid).any()
    masks = [left_out_of(0, f"{i}", method, 8, 0.5) for i in range(400) for method in ("precision", "recall")]
    np.testing.assert_allclose(np.mean(masks, 0), 0.5, atol=0.09)  # No place of a group is favoured.
    assert sum((a == b).all() for a, b in zip(masks[::2], masks[1::2], strict=True)) < 40


@pytest.mark.parametrize(
    ("group", "share", "expected"), [(8, 0.5, 4), (8, 0.01, 2), (8, 1.0, 8), (5, 0.5, 3), (2, 0.1, 2)]
)
def test_at_least_two_are_asked_about(group, share, expected):
    assert asked_of(group, share) == expected
    assert (~left_out_of(0, "x", "precision", group, share)).sum() == expected


def test_advantages_are_those_of_the_scores_that_were_asked_for():
    """c-GDPO by hand in float64: means and deviations over the asked members of each column, then over the batch."""
    scores = Sparing(BalCapReward(OracleJudge()), SHARES, seed=3)(samples_of())
    weights = np.array([1.0, 0.5, 2.0])
    found = advantages.compute(scores.rewards, weights=np.float32(weights), valid=scores.valid)
    combined = np.zeros(scores.rewards.shape[:2])
    for b in range(len(combined)):
        for k in range(3):
            asked = scores.valid[b, :, k]
            column = scores.rewards[b, asked, k].astype(float)
            if np.ptp(column):
                normalised = (column - column.mean()) / (column.std(ddof=1) + 1e-4)
                combined[b, asked] += weights[k] * normalised
    expected = (combined - combined.mean()) / (combined.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found.combined, expected, atol=2e-5)
    assert np.asarray(found.contributes).all(), "each has at least its recall"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", {}), ("precision:0.5,recall:1", {"precision": 0.5, "recall": 1.0}), (" recall:.25 ", {"recall": 0.25})],
)
def test_shares(text, expected):
    assert parse_shares(text) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge.ask": "precision"}, r"judge\.ask' must be a list such as precision:0\.5,recall:1, got 'precision'"),
        ({"judge.ask": "recall:0"}, "gives recall the share 0; shares are above 0 and at most 1"),
        ({"judge.ask": "recall:1.5"}, "shares are above 0 and at most 1"),
        ({"judge.ask": "recall:1,recall:1"}, "names recall twice"),
        ({"judge.ask": "choice:0.5"}, "names 'choice', and the reward 'balcap' asks for precision, recall, linguistic"),
        ({"judge.ask": "recall:0.5", "rewards.name": "tests.odd_rewards:AllNaN"}, "is 'tests.odd_rewards:AllNaN'"),
    ],
)
def test_bad_shares_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        rewards.check_settings(recipes.load("configs/scenes.py", changes))
    assert "\n" not in str(caught.value)


def test_the_cost_of_a_step_is_that_of_what_is_asked():
    config = recipes.load("configs/scenes.py", {"judge.ask": "precision:0.5", "rollout.group_size": "8"})
    batch = config.stages.rl.batch_size
    assert [calls_of_step(config, method) for method in ("precision", "recall")] == [batch * 4, batch * 8]
    arena = recipes.load("configs/scenes.py:arena", {"rollout.group_size": "8", "rewards.opponents": "3"})
    assert calls_of_step(arena, "preference") == batch * 8 * 3
