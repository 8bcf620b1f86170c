"""Rewards other than BalCap's on the miniature, from command to report."""

import json

import pytest
from command_runs import read_metrics, read_summary, the_one_line, train


@pytest.mark.parametrize(
    ("name", "weights", "objectives"),
    [
        pytest.param("caprl", "1,0.2", ("accuracy", "length"), marks=pytest.mark.slow),
        ("feedquill", "1,1,0.2", ("verified_fraction", "verified_count", "length")),
    ],
)
def test_a_run(tmp_path, data_dir, name, weights, objectives):
    overrides = {"rewards__name": name, "rewards__weights": weights, "rewards__length": "two_sided"}
    steps = {"stages__order": "rl", "stages__rl__steps": 3, "stages__rl__eval_every": 0}
    train(tmp_path / "run", data_dir, **overrides, **steps)
    logged = read_metrics(tmp_path / "run")
    assert len(logged) == 3
    for line in logged:
        assert {f"reward/{one}" for one in objectives} <= line.keys()
        assert line["b_capscore"] is None
        assert line["judge/failure_rate"] == 0
    # Runs of different rewards are compared by the same three.
    after = read_summary(tmp_path / "run")["evaluations"]["rl"]
    assert {"precision", "recall", "linguistic", *objectives} <= after.keys()
    assert after["b_capscore"]["mean"] is not None
    page = (tmp_path / "run" / "report.html").read_text()
    assert objectives[0].replace("_", " ") in page
    json.dumps(after)


@pytest.mark.parametrize(
    "name", ["NoK", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ReturnsNone", "NumpyDetail"))]
)
def test_a_reward_of_another_form_ends_before_the_first_stage(tmp_path, data_dir, name):
    overrides = {"rewards__name": f"tests.odd_rewards:{name}", "rewards__weights": "1,1"}
    line = the_one_line(train(tmp_path / "run", data_dir, expected=2, **overrides).stderr)
    assert f"config field 'rewards.name' is 'tests.odd_rewards:{name}': " in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_reward_of_nan_alone_stops_the_run_as_failed_calls_do(tmp_path, data_dir):
    overrides = {"rewards__name": "tests.odd_rewards:AllNaN", "rewards__weights": "1,1", "log__samples_every": 1}
    steps = {"stages__order": "rl", "stages__rl__steps": 4, "stages__rl__eval_every": 0}
    line = the_one_line(train(tmp_path / "run", data_dir, expected=2, **overrides, **steps).stderr)
    assert line.startswith("error: stopped at step 1: 24 of the last 24 judge calls failed")
    assert [one["judge/failure_rate"] for one in read_metrics(tmp_path / "run")] == [1.0]
    files = list((tmp_path / "run").glob("**/*.json*"))
    assert any(path.name == "step-000001.jsonl" for path in files)
    for path in files:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=lambda word: pytest.fail(f"{path} holds {word}"))  # noqa: B023
    assert "the reward is nan" in (tmp_path / "run" / "samples" / "step-000001.jsonl").read_text()
