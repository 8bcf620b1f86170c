"""Rewards other than BalCap's on the miniature, from command to report."""

import json

import pytest
from commands import read_metrics, read_summary, train


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
