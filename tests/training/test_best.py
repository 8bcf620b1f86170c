"""Which checkpoint is the best one, given a sequence of scores; and metrics that nobody measures."""

import math

import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.training.evaluation import Best, check_best_metric


def scripted(scores: list) -> Best:
    """A run of rl whose evaluation gives these scores at steps 2, 4, 6, ..."""
    waiting = iter(scores)
    best = Best("b_capscore", lambda params: {"b_capscore": {"mean": next(waiting)}})
    for step in range(1, 2 * len(scores) + 1):
        if best.is_due("rl", step, 2, 2 * len(scores)):
            best.measure(step, None)
    return best


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([1.0, 3.0, 2.0], 4),
        ([1.0, 3.0, 3.0], 4),  # the first of equals
        ([-5.0, -7.0], 2),
        ([None, 2.0, math.nan], 4),  # nobody answered
        ([None, None], None),
    ],
)
def test_the_highest_score_is_the_best(scores, step):
    assert scripted(scores).step == step


def test_a_step_is_measured_once_and_scores_come_back():
    best = scripted([1.0, 2.0])
    best.measure(4, None)  # would exhaust the script
    other = Best("b_capscore", lambda params: {"b_capscore": {"mean": 9.0}})
    assert other.restore(best.state(), [4, 8]) == 4
    assert (other.scores, other.step) == ({2: 1.0, 4: 2.0}, 4)
    other.measure(6, None)
    assert other.step == 6
    found = {"metric": "b_capscore", "step": 6, "score": 9.0, "scores": {"2": 1.0, "4": 2.0, "6": 9.0}}
    assert other.summary() == {"best": found}
    assert Best("b_capscore", None).summary() == {}


def test_better_steps_that_are_not_whole_any_more_are_forgotten():
    best = Best("b_capscore", None)
    assert best.restore({"2": 1.0, "4": 3.0, "6": 2.0, "8": None}, whole=[2, 6, 8]) == 6
    assert best.scores == {2: 1.0, 6: 2.0, 8: None}
    assert best.restore({"2": 1.0}, whole=[]) is None


def test_when_steps_are_due():
    best = Best("precision", lambda params: {})
    assert [step for step in range(1, 8) if best.is_due("rl", step, 3, 7)] == [3, 6, 7]
    assert not best.is_due("sft", 3, 3, 7)
    assert not Best("", lambda params: {}).is_due("rl", 3, 3, 7)


def test_what_nobody_measures_is_refused():
    three = ("precision", "recall", "linguistic")
    check_best_metric("", (), 0)
    check_best_metric("b_capscore", three, 1)
    check_best_metric("recall", three, 1)
    with pytest.raises(UserError, match="must be one of accuracy, got 'b_capscore'"):
        check_best_metric("b_capscore", ("accuracy",), 1)
    with pytest.raises(UserError, match="no validation images"):
        check_best_metric("recall", three, 0)
