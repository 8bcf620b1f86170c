"""The three rewards: what counts, what is missing and why; and b-CapScore."""

import json

import numpy as np
import pytest

from balcap_jax.data.scenes.language import reference_caption, reference_units
from balcap_jax.data.scenes.world import sample_scene
from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.judges.schema import Assertion, Failure, Judge, LinguisticVerdict, PrecisionVerdict, RecallVerdict
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import Samples
from balcap_jax.rewards.bcapscore import b_capscore, corpus_b_capscore, harmonic_mean


def make_samples(captions, units=None) -> Samples:
    prompts = len(captions)
    return Samples(
        example_ids=[f"example-{b}" for b in range(prompts)],
        captions=captions,
        references=["a reference"] * prompts,
        reference_units=units or [["u0", "u1", "u2", "u3"]] * prompts,
        images=np.zeros((prompts, 2, 2, 3), np.uint8),
        metadata=[{"row": b} for b in range(prompts)],
    )


class ScriptedJudge(Judge):
    """Answers from tables keyed by caption, and keeps what it was asked."""

    def __init__(self, precision=None, recall=None, linguistic=None):
        self.tables = {"precision": precision or {}, "recall": recall or {}, "linguistic": linguistic or {}}
        self.asked = {"precision": [], "recall": [], "linguistic": []}

    def _answer(self, kind, questions, default):
        self.asked[kind] += questions
        return [self.tables[kind].get(question.caption, default) for question in questions]

    def precision(self, questions):
        return self._answer("precision", questions, PrecisionVerdict(assertions=[]))

    def recall(self, questions):
        return self._answer("recall", questions, RecallVerdict(covered=[True, True, False, False]))

    def linguistic(self, questions):
        return self._answer("linguistic", questions, LinguisticVerdict(clarity=5, fluency=4, coherency=3))


def assertions(*flags: tuple[bool, bool]) -> PrecisionVerdict:
    return PrecisionVerdict(
        assertions=[Assertion(text=f"claim {i}", verified=v, pointable=p) for i, (v, p) in enumerate(flags)]
    )


def test_names_and_gates():
    reward = BalCapReward(ScriptedJudge())
    assert reward.names == ("precision", "recall", "linguistic")
    assert reward.gated == (False, False, True)


def test_only_assertions_that_are_verified_and_pointable_count():
    judge = ScriptedJudge(
        precision={
            "a": assertions((True, True), (True, False), (False, True), (False, False)),
            "b": assertions((True, True), (True, True), (True, False)),
            "c": assertions(),
        }
    )
    scores = BalCapReward(judge)(make_samples([["a", "b"], ["c", "a"]]))
    assert scores.rewards.dtype == np.float32
    np.testing.assert_allclose(scores.rewards[..., 0], [[0.25, 2 / 3], [0.0, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(scores.rewards[..., 1], 0.5)
    np.testing.assert_allclose(scores.rewards[..., 2], (5 + 4 + 3) / 15, rtol=1e-6)
    assert scores.valid.all()
    assert scores.detail[0][1] == {
        "assertions": [
            {"text": "claim 0", "verified": True, "pointable": True, "why": ""},
            {"text": "claim 1", "verified": True, "pointable": True, "why": ""},
            {"text": "claim 2", "verified": True, "pointable": False, "why": ""},
        ],
        "covered": [True, True, False, False],
        "clarity": 5,
        "fluency": 4,
        "coherency": 3,
        "failures": {},
    }


def test_each_question_carries_the_data_of_its_own_prompt():
    judge = ScriptedJudge()
    samples = make_samples([["a", "b"], ["c", "d"]], units=[["x"] * 4, ["y"] * 4])
    BalCapReward(judge)(samples)
    assert [(q.caption, q.metadata["row"]) for q in judge.asked["precision"]] == [
        ("a", 0),
        ("b", 0),
        ("c", 1),
        ("d", 1),
    ]
    assert [(q.caption, q.units[0]) for q in judge.asked["recall"]] == [("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")]


def test_a_failure_is_a_missing_value_of_one_objective_of_one_sample():
    whole = BalCapReward(ScriptedJudge())(make_samples([["a", "b"], ["c", "d"]]))
    judge = ScriptedJudge(
        precision={"b": Failure("timed out")},
        recall={"c": RecallVerdict(covered=[True] * 3)},
        linguistic={"d": Failure("not JSON")},
    )
    scores = BalCapReward(judge)(make_samples([["a", "b"], ["c", "d"]]))
    missing = np.zeros((2, 2, 3), bool)
    missing[0, 1, 0] = missing[1, 0, 1] = missing[1, 1, 2] = True
    np.testing.assert_array_equal(scores.valid, ~missing)
    np.testing.assert_array_equal(scores.rewards, np.where(missing, 0, whole.rewards))
    assert scores.detail[0][0]["failures"] == {}
    assert scores.detail[0][1]["failures"] == {"precision": "timed out"}
    assert scores.detail[1][1]["failures"] == {"linguistic": "not JSON"}
    reason = scores.detail[1][0]["failures"]["recall"]
    assert "3" in reason
    assert "4" in reason
    assert "assertions" not in scores.detail[0][1]
    assert "covered" not in scores.detail[1][0]


def test_a_reference_without_units_has_no_recall_and_is_not_asked_for_it():
    judge = ScriptedJudge()
    scores = BalCapReward(judge)(make_samples([["a", "b"], ["c", "d"]], units=[[], ["x"] * 4]))
    np.testing.assert_array_equal(scores.valid[..., 1], [[False, False], [True, True]])
    assert scores.valid[..., [0, 2]].all()
    assert scores.detail[0][0]["failures"] == {"recall": "example example-0 has no reference units"}
    assert [question.caption for question in judge.asked["recall"]] == ["c", "d"]


def test_a_judge_that_loses_an_answer_is_an_error():
    judge = ScriptedJudge()
    judge.precision = lambda questions: []
    with pytest.raises(ValueError, match="0 answers to 2 questions"):
        BalCapReward(judge)(make_samples([["a", "b"]]))


def test_with_the_oracle_references_score_one_and_empty_captions_next_to_nothing():
    scenes = [sample_scene(seed) for seed in range(8)]
    captions = [[reference_caption(scene, np.random.default_rng(0)), ""] for scene in scenes]
    samples = Samples(
        example_ids=[str(scene.seed) for scene in scenes],
        captions=captions,
        references=[row[0] for row in captions],
        reference_units=[reference_units(scene) for scene in scenes],
        images=None,
        metadata=[{"scene": scene.to_json()} for scene in scenes],
    )
    scores = BalCapReward(OracleJudge())(samples)
    np.testing.assert_array_equal(scores.rewards[:, 0], 1.0)
    np.testing.assert_allclose(scores.rewards[:, 1], [[0, 0, 0.2]] * 8, rtol=1e-6)
    assert scores.valid.all()
    json.dumps(scores.detail)  # reports store it as it is

    lost = BalCapReward(OracleJudge(failure_rate=0.5, seed=3))(samples)
    assert 0.2 < lost.valid.mean() < 0.8
    np.testing.assert_array_equal(lost.rewards[lost.valid], scores.rewards[lost.valid])
    for b, row in enumerate(lost.detail):
        for g, one in enumerate(row):
            names = {name for k, name in enumerate(BalCapReward.names) if not lost.valid[b, g, k]}
            assert one["failures"].keys() == names


def test_b_capscore():
    assert b_capscore(0.8, 0.6, 0.9) == pytest.approx(74.48, abs=0.005)
    assert b_capscore([1.0, 0.8], [1.0, 0.6], [1.0, 0.9]) == pytest.approx((100 + 74.4828) / 2, abs=1e-3)
    assert b_capscore([1.0, 0.0], [1.0, 1.0], [1.0, 1.0]) == 50.0
    assert b_capscore([1.0, 0.5], [1.0, 0.5], [1.0, 0.5], valid=[False, True]) == pytest.approx(50.0)
    assert np.isnan(b_capscore([1.0], [1.0], [1.0], valid=[False]))
    np.testing.assert_allclose(harmonic_mean([[0.8, 0.0]], [[0.6, 1.0]], [[0.9, 1.0]]), [[0.744828, 0.0]], rtol=1e-5)


def test_the_corpus_variant_averages_first():
    precision, recall, linguistic = [1.0, 0.0], [0.5, 0.7], [0.9, 0.9]
    assert corpus_b_capscore(precision, recall, linguistic) == pytest.approx(300 / (1 / 0.5 + 1 / 0.6 + 1 / 0.9))
    kept = corpus_b_capscore(precision, recall, linguistic, valid=[True, False])
    assert kept == pytest.approx(300 / (1 / 1.0 + 1 / 0.5 + 1 / 0.9))
    assert np.isnan(corpus_b_capscore([1.0], [1.0], [1.0], valid=[False]))
