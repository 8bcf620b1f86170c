"""Rewards of a user's own: what they give is a reward, a missing value, or one line before training starts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import odd_rewards
import pytest
from test_rewards import make_samples

from balcap_jax import rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.json_text import lines
from balcap_jax.config.recipes import default_config
from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.judges.schema import LinguisticVerdict
from balcap_jax.rewards.base import Scores
from balcap_jax.training.evaluation import references_as_samples, summarise
from balcap_jax.training.job import Judged
from balcap_jax.training.run import failure_budget_spent

SAMPLES = make_samples([["a", "b", "c"]] * 2)


def build(name, judge=None, tried_on=SAMPLES, **settings):
    config = default_config().rewards
    config.name = f"odd_rewards:{name}"
    for key, value in settings.items():
        config[key] = value
    return rewards.build(config, judge or OracleJudge(), 0, tried_on)


def strictly(text):
    """The values of JSONL that may hold no NaN or Infinity."""

    def refuse(word):
        raise ValueError(word)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["Good", "Float64", "Int8", "Bool"])
def test_numbers_of_any_kind_are_rewards(name):
    scores = build(name)(SAMPLES)
    wanted = np.arange(12).reshape(2, 3, 2)
    np.testing.assert_array_equal(scores.rewards, wanted > 0 if name == "Bool" else wanted)
    assert scores.rewards.dtype == np.float32
    assert scores.valid.all()
    assert scores.detail[1][2] == {"note": "so"}


def test_a_score_that_is_no_finite_number_is_missing_with_its_reason():
    scores = build("OneEach")(SAMPLES)
    assert scores.valid.ravel().tolist() == [False] * 5 + [True] * 7
    assert scores.rewards.ravel().tolist() == [0.0] * 5 + [1.0] * 7
    reasons = [scores.detail[b][g].get("failures") for b, g in SAMPLES.where]
    nan, inf, below = (f"the reward is {one}, which is no finite number" for one in ("nan", "inf", "-inf"))
    assert reasons == [{"mine": nan, "yours": inf}, {"mine": below, "yours": inf}, *[None] * 4]


def test_what_is_written_of_missing_scores_is_json_and_their_share_stops_a_run():
    reward = build("OneEach", length="two_sided")
    scores = reward(SAMPLES)
    examples = {
        "id": ["e", "f"],
        "prompt": ["p"] * 2,
        "reference": ["a reference"] * 2,
        "reference_units": [[]] * 2,
    }
    counts = np.ones((2, 3), int)
    records = Judged(examples, SAMPLES.captions, counts, counts < 0, scores).records(reward.names, (0.5, 2.0))
    summary = summarise(records, reward.names)
    first = strictly(lines(records))[0]["captions"][0]
    assert first["rewards"] == {"mine": None, "yours": None, "length": 0.5}
    assert (first["score"], first["words"]) == (None, 1)
    assert first["failures"]["mine"].startswith("the reward is nan")
    assert summary["invalid"] == 3
    assert summary["mine"]["mean"] == 1.0

    config = default_config()
    config.judge.failure_window, config.stages.rl.steps = 1, 1
    for name, spent in (("AllNaN", True), ("Good", False)):
        valid = build(name)(SAMPLES).valid
        assert failure_budget_spent([(int((~valid).sum()), valid.size)], config) == spent


@pytest.mark.parametrize(
    ("name", "wanted", "given"),
    [
        ("OneForAll", "Scores.rewards must be a NumPy array of numbers of shape [2, 3, 2]", "of shape [1, 1, 1]"),
        ("OnePerPrompt", "[2, 3, 2]", "of shape [2, 1, 2]"),
        ("Flat", "[2, 3, 2]", "ndarray (float32) of shape [12]"),
        ("NoK", "[2, 3, 2]", "of shape [2, 3]"),
        ("GroupsFirst", "[2, 3, 2]", "of shape [3, 2, 2]"),
        ("Lists", "[2, 3, 2]", "got list of shape [2, 3, 2]"),
        ("Ragged", "[2, 3, 2]", "got list of 2 parts of different lengths"),
        ("Objects", "of numbers of shape", "ndarray (object) of shape [2, 3, 2]"),
        ("Complex", "of numbers of shape", "ndarray (complex64)"),
        ("Masked", "NumPy array of numbers", "got MaskedArray (float64)"),
        ("NoRewards", "Scores.rewards must be", "got NoneType"),
        ("NumbersValid", "Scores.valid must be a NumPy array of bools of shape [2, 3, 2]", "ndarray (float64)"),
        ("FlatValid", "Scores.valid must be", "ndarray (bool) of shape [2, 3]"),
        ("NoDetail", "Scores.detail must be 2 lists of 3 dicts each", "got NoneType"),
        ("ShortDetail", "2 lists of 3 dicts", "got list of shape [1, 3]"),
        ("FlatDetail", "2 lists of 3 dicts", "got list of shape [6]"),
        ("TextDetail", "Scores.detail[0][0], and 'failures' in it, must be a dict", "got str"),
        ("NumpyDetail", "Scores.detail[0][0] must hold what JSON can (Object of type float32", "with float() or"),
        ("ReturnsNone", "must return Scores with rewards of shape [2, 3, 2]", "got NoneType"),
        ("ReturnsArray", "must return Scores", "got ndarray (float32) of shape [2, 3, 2]"),
        ("ReturnsTuple", "must return Scores", "got tuple"),
        ("Raises", "a call of it raised KeyError: 'reference'", "odd_rewards.py, line "),
        ("Exits", "a call of it raised SystemExit: 0", "odd_rewards.py, line "),
        ("Recurses", "a call of it raised RecursionError: ", "odd_rewards.py, line "),
        ("ReturnsTensor", "must return Scores", "got OnDevice (torch.float32); see"),
        ("Tensors", "Scores.rewards must be", "got OnDevice (torch.float32); see"),
        ("TensorsListed", "Scores.rewards must be", "got list; see"),
        ("RaisesUnshown", "raised Unshown: a Unshown that cannot be shown (RuntimeError)", "odd_rewards.py, line "),
        ("Cancels", "a call of it raised CancelledError", "odd_rewards.py, line "),
        ("Closes", "a call of it raised GeneratorExit", "odd_rewards.py, line "),
        ("RaisesBase", "a call of it raised OwnBase: mine", "odd_rewards.py, line "),
        ("RaisesBaseInMaking", "making it raised OwnBase: made", "odd_rewards.py, line "),
        ("OddDetail", "a call of it raised OwnBase: no length", "odd_rewards.py, line "),
        ("ListNames", "its 'names' must be a tuple of str", "got (['a'], 'b')"),
        ("NumberNames", "its 'names' must be a tuple of str", "got (1,)"),
        ("NumberAsks", "its 'asks' must be a tuple of str", "got (5,)"),
        ("NumberNeeds", "its 'needs' must be a tuple of str", "got ('reference', None)"),
        ("TextGated", "its 'gated' must be a tuple of bool", "got ('no',)"),
        ("RaisingNames", "looking at it raised Unshown: ", "cannot be shown"),
        ("Absent", "it cannot be imported (", "(OwnBase)"),
        ("NoArguments", "making it raised TypeError: ", "takes 1 positional argument but 3"),
    ],
)
def test_what_is_no_reward_is_one_line_at_the_start(name, wanted, given):
    with pytest.raises(UserError) as caught:
        build(name, length="two_sided" if name == "Lists" else "none")
    line = str(caught.value)
    assert line.startswith(f"config field 'rewards.name' is 'odd_rewards:{name}': ")
    assert wanted in line
    assert given in line
    assert "\n" not in line


def test_no_two_objectives_are_called_length():
    config = default_config().rewards
    config.name, config.length = "odd_rewards:UsesLength", "none"
    assert rewards.objectives(config) == ("mine", "length")
    config.length = "two_sided"
    with pytest.raises(UserError, match=r"'rewards.name' is 'odd_rewards:UsesLength': its objective 'length'"):
        rewards.objectives(config)


def test_each_later_call_is_checked_too():
    reward = build("GoesWrongLater")
    reward(SAMPLES)
    with pytest.raises(UserError, match=r"numbers of shape \[2, 3, 2\].* got ndarray \(float32\) of shape \[2, 3\]"):
        reward(SAMPLES)


def test_trying_out_asks_the_judge_nothing():
    class Costly:
        about, questions = {}, 0

        def precision(self, questions):
            raise AssertionError("asked")

        recall = choice = mixed = precision

        def linguistic(self, questions):
            self.questions += len(questions)
            return [LinguisticVerdict(clarity=5, fluency=5, coherency=5) for _ in questions]

        def usage(self):
            return self.questions

    judge = Costly()
    reward = build("Asks", judge)
    assert judge.questions == 0
    assert reward._judge.usage() == 0
    with pytest.raises(UserError, match="AssertionError: asked"):
        reward(SAMPLES)
    assert len(reward._judge.linguistic([None] * 4)) == judge.questions == 4


def test_what_is_tried_out_are_the_data_s_own_pictures_with_their_references():
    example = {"id": "e", "image": np.zeros((4, 5, 3), np.uint8), "reference": "a dog .", "reference_units": ["dog"]}
    example |= {"prompt": "p", "captions": ["a cat ."], "scene": "{}"}
    samples = references_as_samples([example])
    assert samples.shape == (2, 3)
    assert samples.captions == [["a dog ."] * 3] * 2
    assert samples.images[1].shape == (4, 5, 3)
    assert samples.metadata[1] == {"scene": "{}"}
    assert samples.tokens.tolist() == [[3] * 3] * 2


def test_a_reward_may_compute_with_jax_where_the_loop_forbids_transfers(monkeypatch):
    def call(self, samples):
        rewards = np.asarray(jnp.ones((*samples.shape, 2)) * np.float32(0.5))
        return Scores(rewards, np.ones(rewards.shape, bool), self.detail(rewards.shape))

    monkeypatch.setattr(odd_rewards.Good, "__call__", call)
    with jax.transfer_guard("disallow"):
        np.testing.assert_array_equal(build("Good")(SAMPLES).rewards, np.full((2, 3, 2), 0.5))


def test_the_line_names_the_place_in_the_author_s_file(monkeypatch):
    monkeypatch.setattr(odd_rewards.Good, "rewards", lambda self, shape: np.linalg.inv(np.zeros((2, 2))))
    with pytest.raises(UserError, match=r"LinAlgError: Singular matrix \(.*odd_rewards\.py, line \d+\)"):
        build("Good")
