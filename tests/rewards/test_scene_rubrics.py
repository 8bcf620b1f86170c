"""RubiCap's criteria about scenes, and what the exact judge makes of them."""

import json

import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.data.records import read_record
from balcap_jax.data.scenes import builder, language
from balcap_jax.data.scenes.rubrics import rubrics
from balcap_jax.data.scenes.world import Scene, SceneObject, sample_scene
from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.judges.schema import RubricQuestion
from balcap_jax.rewards.base import Samples
from balcap_jax.rewards.rubicap import RubicapReward

STAR, RING = SceneObject("star", "red", "large", "striped", 0), SceneObject("ring", "blue", "small", "plain", 4)
SCENE = Scene((STAR, RING), ground="grey", pattern="smooth")


def test_each_unit_is_a_criterion_whose_weight_is_of_its_kind():
    weights = {each["criterion"].removeprefix("states that "): each["weight"] for each in rubrics(SCENE)}
    assert weights == {
        "there are two shapes": 2,
        "there is a red star": 3,
        "the red star is large": 1,
        "the red star is striped": 1,
        "the red star is at the top left": 2,
        "there is a blue ring": 3,
        "the blue ring is small": 1,
        "the blue ring is at the centre": 2,
        "the red star is above the blue ring": 1,
        "the background is grey": 2,
        "the background is smooth": 1,
    }
    # Data of one's own may hold the same.
    assert json.loads(read_record({"image": "a.png", "caption": "x", "rubrics": rubrics(SCENE)}, "here")["rubrics"])


def test_a_caption_gets_the_weight_of_what_it_states():
    texts = ["There are two shapes. The top left holds a large red star.", "A green cross.", "", "The ring is blue."]
    texts[3] = language.reference_caption(SCENE, np.random.default_rng(0))
    samples = Samples(["a"], [texts], ["r"], [["u"]], None, [{"rubrics": json.dumps(rubrics(SCENE))}])
    scores = RubicapReward(OracleJudge())(samples)
    np.testing.assert_allclose(scores.rewards[0, :, 0], [(2 + 3 + 1 + 2) / 19, 0, 0, 1], rtol=1e-6)
    assert scores.detail[0][0]["rubric"][1] == {
        "criterion": "states that there is a red star",
        "weight": 3,
        "passed": True,
    }


def test_every_scene_has_rubrics_that_its_reference_meets():
    for seed in range(50):
        scene = sample_scene(seed)
        criteria = [each["criterion"] for each in rubrics(scene)]
        caption = language.reference_caption(scene, np.random.default_rng(seed))
        assert all(OracleJudge().rubric([RubricQuestion(caption, criteria)])[0].passed)
    made = builder.make_example("test", 0, builder.ScenesSettings())
    assert json.loads(made["rubrics"]) == rubrics(Scene.from_json(made["scene"]))


def test_the_oracle_knows_no_other_criteria():
    with pytest.raises(UserError, match=r"criteria of scenes only, which begin with 'states that', not 'is in verse'"):
        OracleJudge().rubric([RubricQuestion("A caption.", ["states that there is a red star", "is in verse"])])
