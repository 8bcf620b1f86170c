"""Supervised training on the best of the base's captions: who writes them, and a run that is killed."""

import signal

import pytest
from command_runs import arguments, assert_same_run, finish, read_metrics, read_samples, start_interrupted, train

OVERRIDES = {"stages__order": "rl", "stages__rl__steps": 4, "advantage__estimator": "best_of", "log__samples_every": 1}


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
def test_a_killed_run_goes_on_with_the_captions_of_the_start(tmp_path, data_dir, depth):
    overrides = OVERRIDES | {"pipeline__depth": depth}
    train(tmp_path / "whole", data_dir, **overrides)
    killed = arguments(tmp_path / "killed", data_dir, **overrides)
    finish(start_interrupted(signal.SIGKILL, "log:3", *killed), -signal.SIGKILL)
    train(tmp_path / "killed", data_dir, **overrides)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    three = ("precision", "recall", "linguistic")
    for line in lines:
        # The sum is the best of its group, whatever single objectives are.
        assert sum(line[f"best/{name}"] for name in three) >= sum(line[f"reward/{name}"] for name in three)
    assert lines[-1]["ratio/mean"] != pytest.approx(1, abs=1e-3), "the policy has left the one that samples"


@pytest.mark.slow
def test_captions_are_those_of_the_policy_at_the_start(tmp_path, data_dir):
    """What is learnt in between changes no caption of training."""
    for name, rate in (("learning", "0.01"), ("still", "0")):
        train(tmp_path / name, data_dir, **OVERRIDES, stages__rl__learning_rate=rate)
    learning, still = (read_samples(tmp_path / name) for name in ("learning", "still"))
    steps = [name for name in learning if name.startswith("step-")]
    assert len(steps) == 4
    assert all(learning[name] == still[name] for name in steps)
    assert learning["eval-rl.jsonl"] != still["eval-rl.jsonl"]
    calls = [line["gate/in_band"] for line in read_metrics(tmp_path / "learning")]
    assert calls == [line["gate/in_band"] for line in read_metrics(tmp_path / "still")]
