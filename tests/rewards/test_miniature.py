"""The miniature's DCScore, CaptionQA and arena: worked examples, and slow versions after the published protocols."""

import numpy as np
import pytest

from balcap_jax.data.scenes import faults, language
from balcap_jax.data.scenes.habits import habits_of
from balcap_jax.data.scenes.questions import questions
from balcap_jax.data.scenes.reading import parse
from balcap_jax.data.scenes.world import Scene, SceneObject, sample_scene
from balcap_jax.judges.oracle import OracleJudge, judge_precision
from balcap_jax.judges.schema import Judge
from balcap_jax.rewards import measure, miniature
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import Samples
from balcap_jax.rewards.miniature import Miniature, arena, captionqa, dcscore, opponents, with_miniature, worth

SCENE = Scene(
    (SceneObject("star", "red", "large", "striped", 0), SceneObject("ring", "blue", "small", "plain", 4)),
    ground="grey",
    pattern="gridded",
)
UNITS = language.reference_units(SCENE)
# 5 true assertions, a remark, 2 true and a false one (size): of 11 units 7 are covered.
CAPTION = (
    "There are two shapes. The top left holds a large red striped star. The scene is beautiful. "
    "The centre holds a large blue ring."
)


def scenes(count: int):
    """(scene, units, a faulty caption) of test scenes."""
    for seed in range(2_000_000_000, 2_000_000_000 + count):
        scene = sample_scene(seed)
        yield scene, language.reference_units(scene), faults.faulty_caption(scene, np.random.default_rng(seed))[0]


def test_dcscore_of_a_worked_example():
    assert len(UNITS) == 11
    assert dcscore(CAPTION, SCENE, UNITS) == pytest.approx((2 * 7 / (9 + 11) + 2 * 7 / (8 + 11)) / 2)


def test_a_true_assertion_beyond_the_reference_extends_it():
    """The reference has the star above the ring; that it is left of it is true as well."""
    caption = CAPTION + " The red star is left of the blue ring."
    recall = (7 + 1) / (11 + 1)
    f1 = [2 * precision * recall / (precision + recall) for precision in (8 / 10, 8 / 9)]
    assert dcscore(caption, SCENE, UNITS) == pytest.approx(sum(f1) / 2)
    assert dcscore(CAPTION + " The red star is right of the blue ring.", SCENE, UNITS) < dcscore(CAPTION, SCENE, UNITS)


def slow_dcscore(relevant, verified, matched, oracle: int) -> float:
    """One image as DeCapBench's script has it, from lists with one entry per fact."""

    def f1(keep) -> float:
        facts = [i for i in range(len(matched)) if keep[i]]
        times = {k: sum(other == k for other in matched) for k in matched}
        held = [i for i in facts if verified[i]]
        extra = sum(matched[i] is None for i in held)
        recall = (sum(1 / times[matched[i]] for i in held if matched[i] is not None) + extra) / (oracle + extra)
        precision = len(held) / len(facts) if facts else 0.0
        return 2 * precision * recall / (precision + recall + 1e-8)

    return (f1([1] * len(matched)) + f1(relevant)) / 2


def test_the_slow_version_gives_the_published_vectors():
    assert 100 * slow_dcscore([1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0], [0, 0, 0, 3, None, None], 10) == pytest.approx(
        29.8746, abs=1e-4
    )
    assert 100 * slow_dcscore([1] * 4, [1] * 4, [0, 1, 2, 3], 4) == pytest.approx(100, abs=1e-4)


def test_dcscore_is_that_of_the_published_script():
    """Assertions are matched by their wording, which is that of the units."""
    compared = 0
    for scene, units, caption in scenes(200):
        facts = judge_precision(caption, scene).assertions
        matched = [units.index(one.text) if one.text in units else None for one in facts]
        slow = slow_dcscore([one.pointable for one in facts], [one.verified for one in facts], matched, len(units))
        if any(finding.name == "contradiction" for finding in parse(caption).findings):
            continue  # Recall counts no unit that a caption contradicts; the script does.
        assert dcscore(caption, scene, units) == pytest.approx(slow, abs=1e-6), caption
        compared += 1
    assert compared > 100


def test_captionqa_credits():
    question = {
        "question": "What colour is the object at the top left?",
        "choices": ["green", "red", "blue", "orange"],
        "answer": "red",
        "query": {"ask": "colour", "place": "top left"},
    }
    assert miniature._credit(CAPTION, question) == 1.0
    assert miniature._credit("The top left holds a blue star.", question) == 0.0
    assert miniature._credit("The centre holds a blue ring.", question) == pytest.approx(0.25 + 0.05)
    above = {"question": "?", "choices": ["above", "below"], "answer": "above", "query": {"ask": "relation"}}
    above["query"] |= {"object": {"colour": "red", "shape": "star"}, "other": {"colour": "blue", "shape": "ring"}}
    assert miniature._credit("The scene is beautiful.", above) == pytest.approx(0.5 + 0.05)


def test_captionqa_of_the_reference_and_of_nothing():
    for scene, _, _ in scenes(20):
        asked = questions(scene, np.random.default_rng([0xA4E7A, 11, scene.seed]), 12)
        assert captionqa(opponents(scene)["reference"], scene) == 1.0
        assert captionqa("", scene) == pytest.approx(np.mean([1 / len(one["choices"]) + 0.05 for one in asked]))


def test_worth_of_a_worked_example():
    """7 units covered, 2 assertions that don't hold. A remark in between costs half a sentence of clarity and one of
    coherency, no background half a one: marks 4, 5, 3 of 5."""
    assert worth(CAPTION, SCENE, UNITS) == pytest.approx((7 - 2) / 11 + (4 + 5 + 3) / 15)


def test_the_arena_counts_wins_less_losses():
    for scene, units, caption in scenes(40):
        others = opponents(scene)
        wins = losses = 0
        for other in others.values():
            margin = worth(caption, scene, units) - worth(other, scene, units)
            wins, losses = wins + (margin > 0.05), losses + (margin < -0.05)
        assert arena(caption, scene, units) == (wins - losses) / 4
        assert opponents(scene) == others
        assert worth(others["reference"], scene, units) == 2.0
    scored = {name: [] for name in others}
    for scene, units, _ in scenes(40):
        for name, caption in opponents(scene).items():
            scored[name].append(arena(caption, scene, units))
    means = {name: np.mean(values) for name, values in scored.items()}
    assert means["reference"] > 0.6
    assert all(abs(value) < 0.6 for name, value in means.items() if name != "reference"), means


def test_evaluations_of_scenes_score_them_beside_the_objectives():
    judge = OracleJudge()
    fields = {"scene", "reference_units", "reference"}
    found = with_miniature(measure(BalCapReward(judge), judge, fields), judge, fields)
    assert found.names == ("precision", "recall", "linguistic", "dcscore", "captionqa", "arena")
    samples = Samples(["a"], [[CAPTION, ""]], ["reference"], [UNITS], None, [{"scene": SCENE.to_json()}])
    scores = found(samples)
    assert scores.valid.all()
    expected = [dcscore(CAPTION, SCENE, UNITS), captionqa(CAPTION, SCENE), arena(CAPTION, SCENE, UNITS)]
    np.testing.assert_allclose(scores.rewards[0, 0, 3:], expected, rtol=1e-6)
    np.testing.assert_allclose(scores.rewards[0, 0, :3], [7 / 9, 7 / 11, 12 / 15], rtol=1e-6)
    assert scores.rewards[0, 1, 3] == 0.0
    assert [detail["habits"] for detail in scores.detail[0]] == [habits_of(CAPTION, SCENE), habits_of("", SCENE)]
    assert with_miniature(reward := BalCapReward(judge), judge, {"reference"}) is reward
    assert with_miniature(reward, Judge(), fields) is reward
    assert set(Miniature.needs) <= fields
