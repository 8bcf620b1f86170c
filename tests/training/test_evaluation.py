"""Means of an evaluation: how often captions have each habit, of those in which it can occur."""

from balcap_jax.data.scenes.habits import HABITS
from balcap_jax.training.evaluation import captions_file, summarise

FIRST, SECOND, THIRD = list(HABITS)[:3]


def record(*habits):
    """An image with one caption for each of `habits`, what a detail has under that name."""
    plain = {"rewards": {}, "b_capscore": None, "words": 1, "tokens": 1, "in_band": True, "truncated": False}
    return {"captions": [plain | ({} if has is None else {"habits": has}) for has in habits]}


def test_habits_are_counted_where_they_can_occur_in_the_order_of_the_table():
    records = [record({SECOND: True, FIRST: False}, {SECOND: True}), record({SECOND: False, FIRST: True}, {})]
    habits = summarise(records, ())["habits"]
    assert habits == {FIRST: {"share": 1 / 2, "n": 2}, SECOND: {"share": 2 / 3, "n": 3}}
    assert list(habits) == [FIRST, SECOND]


def test_nothing_is_said_of_habits_where_none_was_looked_for():
    assert "habits" not in summarise([record(None, None)], ())
    assert "habits" not in summarise([record({})], ())


def test_a_reward_that_uses_the_name_for_something_else_does_no_harm():
    odd = record("companion", 3, [FIRST], {FIRST: "yes", "mine": True, THIRD: True})
    assert summarise([odd], ())["habits"] == {THIRD: {"share": 1.0, "n": 1}}


def test_equal_captions_have_equal_digests():
    plain = record(None, None)
    texts = [
        {"captions": [one | {"caption": text} for one, text in zip(plain["captions"], pair, strict=True)]}
        for pair in (("a", "b"), ("a", "b"), ("ab", ""))
    ]
    first, same, other = (summarise([one], ())["digest"] for one in texts)
    assert first == same != other


def test_each_kind_of_evaluation_has_a_file_of_its_own(tmp_path):
    assert captions_file(tmp_path, "greedy", "rl-40") == tmp_path / "samples" / "greedy-rl-40.jsonl"
    assert captions_file(tmp_path, "evaluations", "rl-40") == tmp_path / "samples" / "eval-rl-40.jsonl"
