"""Training on parquet files: killed inside of one and resumed it is as if never killed; bad rows are named."""

import json
import signal

import pytest
from command_runs import ROOT, assert_same_run, finish, start, start_interrupted
from data.parquet_tables import pictures, write


@pytest.fixture
def source(tmp_path):
    rows = {"image": pictures(range(60)), "text": [f"Noise of number {i} of many." for i in range(60)]}
    for bad in range(5, 60, 10):
        rows["image"][bad] = None
    write(tmp_path / "data" / "train-0.parquet", rows, group=10)
    write(tmp_path / "data" / "train-1.parquet", rows, group=7)
    return tmp_path / "data" / "train-*.parquet"


def given(source, workdir):
    overrides = {
        "data.name": "parquet",
        "data.data_dir": source,
        "data.columns": "caption=text",
        "rollout.max_tokens": 16,
        "rollout.buckets": 16,
        "stages.order": "sft",
        "stages.sft.steps": 8,
        "stages.sft.batch_size": 8,
        "checkpoint.every": 2,
        "log.eval_images": 48,  # more than the split has
    }
    arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
    return [f"--config={ROOT / 'configs/photos.py'}", f"--workdir={workdir}", *arguments]


@pytest.mark.slow
def test_killed_inside_a_file_and_resumed_equals_uninterrupted(tmp_path, source):
    done = finish(start("balcap_jax.train", *given(source, tmp_path / "whole")))
    assert "parquet: 120 pictures; 2 files, 15 row groups\n" in done.stdout
    assert f"\ndata    parquet in {source}: " in done.stdout
    named = [json.loads(line) for line in (tmp_path / "whole" / "left_out.jsonl").read_text().splitlines()]
    bad = {f"train-{file}.parquet#{row}" for file in range(2) for row in range(5, 60, 10)}
    assert 0 < len(named) == len({entry["image"] for entry in named} & bad)
    assert {entry["reason"] for entry in named} == {"no picture"}
    evaluations = sorted((tmp_path / "whole" / "samples").glob("greedy-*.jsonl"))
    assert evaluations
    for file in evaluations:
        shown = [json.loads(line)["id"] for line in file.read_text().splitlines()]
        assert len(shown) == len(set(shown) - bad) > 3, "a picture stands for another"
        assert f"held out: {len(shown)} of " in done.stdout
    for step in (4, 7):
        killed = start_interrupted(signal.SIGKILL, f"log:{step}", *given(source, tmp_path / "killed"))
        finish(killed, -signal.SIGKILL)
    done = finish(start("balcap_jax.train", *given(source, tmp_path / "killed")))
    assert "going on after step 6 of 8 (sft)" in done.stdout
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
