"""Judges that are wrong on purpose: how often, about what, and what votes make of it."""

import numpy as np
import pytest

from balcap_jax import judges
from balcap_jax.config import recipes
from balcap_jax.data.scenes import faults, language, rubrics
from balcap_jax.data.scenes.world import sample_scene
from balcap_jax.judges.flawed import FlawedJudge
from balcap_jax.judges.oracle import OracleJudge, judge_linguistic, judge_precision, judge_recall
from balcap_jax.judges.schema import (
    ChoiceQuestion,
    Failure,
    LinguisticQuestion,
    PrecisionQuestion,
    PreferenceQuestion,
    RecallQuestion,
    RubricQuestion,
)

SCENES = [sample_scene(seed) for seed in range(150)]
CAPTIONS = [faults.faulty_caption(scene, np.random.default_rng([8, scene.seed]))[0] for scene in SCENES]
UNITS = [language.reference_units(scene) for scene in SCENES]
CRITERIA = [[each["criterion"] for each in rubrics.rubrics(scene)] for scene in SCENES]
PRECISION = [PrecisionQuestion(c, None, {"scene": s}) for c, s in zip(CAPTIONS, SCENES, strict=True)]
RECALL = [RecallQuestion(c, units) for c, units in zip(CAPTIONS, UNITS, strict=True)]
RUBRIC = [RubricQuestion(c, criteria) for c, criteria in zip(CAPTIONS, CRITERIA, strict=True)]
LANGUAGE = [LinguisticQuestion(c) for c in CAPTIONS]


def verdicts(judge) -> tuple[list[bool], list[bool], list[bool]]:
    """On every assertion, unit and criterion of all captions."""
    return (
        [each.verified for verdict in judge.precision(PRECISION) for each in verdict.assertions],
        [each for verdict in judge.recall(RECALL) for each in verdict.covered],
        [each for verdict in judge.rubric(RUBRIC) for each in verdict.passed],
    )


TRUE = verdicts(OracleJudge())


def accepted(judge) -> list[float]:
    """The share of what does not hold that the judge accepts: of assertions, units and criteria."""
    shares = []
    for said, true in zip(verdicts(judge), TRUE, strict=True):
        assert all(one for one, holds in zip(said, true, strict=True) if holds), "what holds is never refused"
        shares.append(np.mean([one for one, holds in zip(said, true, strict=True) if not holds]))
    return shares


def test_without_flaws_of_verdicts_it_is_the_oracle():
    judge = FlawedJudge({"noise": 0.5, "false_accept": 0.0}, seed=3)
    assert judge.precision(PRECISION) == OracleJudge().precision(PRECISION)
    assert verdicts(judge) == TRUE
    assert judge.linguistic(LANGUAGE) == OracleJudge().linguistic(LANGUAGE)
    assert not judge.is_exact
    assert judge.exact().is_exact
    assert judge.exact().failure_rate == 0
    assert OracleJudge(0.5).exact().failure_rate == 0.5


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_false_accepts_come_at_the_rate_asked_and_are_the_same_in_every_run(rate):
    judge = FlawedJudge({"false_accept": rate}, seed=1)
    wrong = [np.sum(~np.array(true)) for true in TRUE]
    assert min(wrong) > 500
    for share, n in zip(accepted(judge), wrong, strict=True):
        assert share == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / n))
    assert verdicts(judge) == verdicts(FlawedJudge({"false_accept": rate}, seed=1))
    assert verdicts(judge) != verdicts(FlawedJudge({"false_accept": rate}, seed=2))
    assert judge.linguistic(LANGUAGE) == OracleJudge().linguistic(LANGUAGE)
    # A remark that is called true points at nothing still.
    exact = [each.pointable for verdict in OracleJudge().precision(PRECISION) for each in verdict.assertions]
    assert [each.pointable for verdict in judge.precision(PRECISION) for each in verdict.assertions] == exact


def test_of_three_votes_two_must_err():
    rate = 0.3
    expected = 3 * rate**2 - 2 * rate**3  # 0.216
    for share, true in zip(accepted(FlawedJudge({"false_accept": rate}, votes=3, seed=1)), TRUE, strict=True):
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / np.sum(~np.array(true))))


def test_failed_calls_and_the_votes_that_do_without():
    def failed(votes):
        judge = FlawedJudge({"failed": 0.3}, votes, seed=5)
        answers = [
            *judge.precision(PRECISION),
            *judge.recall(RECALL),
            *judge.rubric(RUBRIC),
            *judge.linguistic(LANGUAGE),
        ]
        exact = [each for kind in (PRECISION, RECALL, RUBRIC, LANGUAGE) for each in OracleJudge().mixed(kind)]
        assert all(one == true for one, true in zip(answers, exact, strict=True) if not isinstance(one, Failure))
        return np.mean([isinstance(one, Failure) for one in answers])

    assert failed(1) == pytest.approx(0.3, abs=0.08)
    assert failed(3) == pytest.approx(0.027, abs=0.026)


def test_length_buys_lenience():
    """min(1, 0.5 words / 50): of what is wrong, and of the way to the highest mark."""
    short, long = "red star", "red star " * 30  # 2 and 60 words
    judge = FlawedJudge({"length": 0.5}, seed=0)
    units = [f"there is a {colour} {shape}" for colour in ("green", "blue") for shape in ("ring", "cross", "square")]
    units = [f"{unit}{' ' * spaces}" for unit in units for spaces in range(100)]  # many draws on one caption
    covered = [np.mean(judge.recall([RecallQuestion(text, units)])[0].covered) for text in (short, long)]
    assert covered == pytest.approx([0.02, 0.6], abs=0.08)
    for text, share in ((short, 0.02), (long, 0.6)):
        exact, (said,) = judge_linguistic(text), judge.linguistic([LinguisticQuestion(text)])
        assert said.fluency == pytest.approx(exact.fluency + share * (5 - exact.fluency))
    assert judge_linguistic(long).fluency < 5
    assert FlawedJudge({"length": 10.0}).linguistic([LinguisticQuestion(long)])[0].clarity == 5
    (verdict,) = FlawedJudge({"length": 10.0}).precision([PrecisionQuestion(long + "ring", None, {"scene": SCENES[0]})])
    assert all(each.verified for each in verdict.assertions)


def test_each_remark_is_praise_that_may_convince():
    judge = FlawedJudge({"praise": 0.4}, seed=0)
    plain = "A red star. A green ring."
    for count, tail in ((0, ""), (1, " The mood is calm."), (2, " The mood is calm. The scene is beautiful.")):
        exact, (said,) = judge_linguistic(plain + tail), judge.linguistic([LinguisticQuestion(plain + tail)])
        assert said.clarity == pytest.approx(exact.clarity + (1 - 0.6**count) * (5 - exact.clarity))
    assert accepted(judge) == pytest.approx(
        [_expected(true, weights) for true, weights in zip(TRUE, _lenience_of_parts(0.4), strict=True)], abs=0.06
    )


def _lenience_of_parts(praise: float) -> list[list[float]]:
    """The probability of a false accept for each assertion, unit and criterion, by counting remarks anew."""
    lenience = []
    for question in PRECISION:
        assertions = judge_precision(question.caption, question.metadata["scene"]).assertions
        lenience.append(
            1 - (1 - praise) ** sum(each.why == "points at nothing that can be seen" for each in assertions)
        )
    sizes = (
        [len(verdict.assertions) for verdict in OracleJudge().precision(PRECISION)],
        [len(units) for units in UNITS],
        [len(criteria) for criteria in CRITERIA],
    )
    return [[p for p, size in zip(lenience, of_kind, strict=True) for _ in range(size)] for of_kind in sizes]


def _expected(true: list[bool], lenience: list[float]) -> float:
    return float(np.mean([p for p, holds in zip(lenience, true, strict=True) if not holds]))


def test_of_two_captions_a_biased_judge_prefers_what_it_is_lenient_to():
    scene = SCENES[0]
    plain = language.reference_caption(scene, np.random.default_rng(0))
    flattering = f"{plain} The scene is calm. The mood is lovely. The picture is beautiful."
    question = PreferenceQuestion(plain, flattering, None, {"scene": scene}, UNITS[0])
    winners = [
        judge.preference([question])[0].winner
        for judge in (OracleJudge(), FlawedJudge({"false_accept": 0.5}), FlawedJudge({"praise": 0.9}))
    ]
    assert winners == [1, 1, 2]


def test_a_rubric_is_what_the_caption_covers_and_choices_stay_right():
    judge = OracleJudge()
    for question, units in zip(RUBRIC, UNITS, strict=True):
        assert judge.rubric([question])[0].passed == judge_recall(question.caption, units).covered
    asked = ChoiceQuestion(
        "There are two shapes.", "?", (("A", "2"), ("B", "?")), 0, {"ask": "count", "value": "object"}
    )
    assert FlawedJudge({"false_accept": 1.0}).choice([asked])[0].answer == "A"


def test_a_run_builds_the_judge_that_its_config_names():
    def build(**fields):
        config = recipes.load("configs/scenes.py", {f"judge.{name}": text for name, text in fields.items()})
        return judges.build(config.judge, seed=4)

    assert type(build()) is OracleJudge
    judge = build(flaws="false_accept:0.2,coarse:3", votes="3")
    assert (judge.flaws, judge.votes) == ({"false_accept": 0.2, "coarse": 3.0}, 3)
    assert judge.about["model"] == "oracle with false_accept:0.2, coarse:3, 3 votes"
    assert verdicts(judge) == verdicts(FlawedJudge({"false_accept": 0.2}, 3, seed=4))
