"""A run whose judge is asked about half of the captions, killed and gone on, equals one that never stopped."""

import json
import signal

from command_runs import arguments, assert_same_run, finish, read_metrics, start_interrupted, train


def test_a_half_asked_run_resumes_bit_for_bit(tmp_path, data_dir):
    overrides = {
        "stages__order": "rl",
        "stages__rl__steps": 4,
        "judge__ask": "precision:0.5,linguistic:0.7",
        "log__samples_every": 2,
    }
    train(tmp_path / "whole", data_dir, **overrides)
    killed = arguments(tmp_path / "killed", data_dir, **overrides)
    finish(start_interrupted(signal.SIGKILL, "log:3", *killed), -signal.SIGKILL)
    train(tmp_path / "killed", data_dir, **overrides)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")

    lines = [line for line in read_metrics(tmp_path / "whole") if line["stage"] == "rl"]
    # Of 4 groups of 3, two are asked about precision and two about language: nothing failed.
    assert [line["judge/left_out"] for line in lines] == [8.0] * 4
    assert [line["judge/failure_rate"] for line in lines] == [0.0] * 4
    records = map(json.loads, (tmp_path / "whole" / "samples" / "step-000002.jsonl").read_text().splitlines())
    for record in records:
        known = [caption["rewards"] for caption in record["captions"]]
        assert [sum(each[name] is not None for each in known) for name in ("precision", "recall")] == [2, 3]
    evaluations = json.loads((tmp_path / "whole" / "summary.json").read_text())["evaluations"]
    assert evaluations["rl"]["invalid"] == 0, "evaluations ask everything"
