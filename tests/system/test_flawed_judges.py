"""A run on a judge that is wrong on purpose: what it learns from, what it logs beside that, and who evaluates it."""

import json

import pytest
from command_runs import read_metrics, read_summary, train

THREE = ("precision", "recall", "linguistic")


def test_training_alone_believes_a_flawed_judge(tmp_path, data_dir, finished):
    flaws = {"judge__flaws": "false_accept:0.5,praise:0.5,noise:0.1,failed:0.5", "judge__votes": 3}
    train(tmp_path / "run", data_dir, **flaws, stages__rl__steps=2, stages__rl__eval_every=0, log__samples_every=1)
    ours, exact = (
        [line for line in read_metrics(run) if line["stage"] == "rl"] for run in (tmp_path / "run", finished.workdir)
    )
    # The first step samples from the same policy with the same random numbers.
    for name in (*(f"reward/{one}" for one in THREE), "b_capscore"):
        assert ours[0][name.replace("reward/", "true/") if "/" in name else "true/b_capscore"] == pytest.approx(
            exact[0][name], rel=1e-5
        )
    assert ours[0]["reward/recall"] > exact[0]["reward/recall"] + 0.1
    assert 0 < sum(line["judge/failure_rate"] for line in ours) < 0.3
    assert not any(name.startswith("true/") for name in exact[0])
    # Evaluations are those of the exact judge.
    base = read_summary(finished.workdir)
    assert read_summary(tmp_path / "run")["greedy"]["sft"] == base["greedy"]["sft"]
    assert read_summary(tmp_path / "run")["evaluations"]["sft"] == base["evaluations"]["sft"]
    first = json.loads((tmp_path / "run" / "samples" / "step-000005.jsonl").read_text().splitlines()[0])
    caption = first["captions"][0]
    assert caption["judge"]["model"] == "oracle with false_accept:0.5, praise:0.5, noise:0.1, failed:0.5, 3 votes"
    for name, score in caption["exact"].items():
        assert caption["rewards"][name] != score
