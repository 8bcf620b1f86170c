"""A run that was killed or asked to stop, and went on by the same command, equals one that never stopped."""

import json
import shutil
import signal
import time

import pytest
from command_runs import (
    arguments,
    assert_same_model,
    assert_same_run,
    checkpoints,
    finish,
    read_arrays,
    read_metrics,
    read_model,
    read_summary,
    start,
    start_interrupted,
    the_one_line,
    train,
)


def kill_at(where, workdir, data_dir, **overrides):
    """A run that dies by SIGKILL at `where`; nothing of it may claim to be an error of the user."""
    done = finish(start_interrupted(signal.SIGKILL, where, *arguments(workdir, data_dir, **overrides)), -signal.SIGKILL)
    assert done.stderr == ""
    return done


def half_written(workdir) -> list[str]:
    return [path.name for path in (workdir / "checkpoints").iterdir() if "tmp" in path.name and path.is_dir()]


def stop_at(step, workdir, data_dir, **overrides):
    """A run that is asked to stop by SIGTERM while it computes `step`."""
    done = finish(start_interrupted(signal.SIGTERM, f"log:{step}", *arguments(workdir, data_dir, **overrides)), 0)
    assert done.stdout.splitlines()[-1] == f"SIGTERM: saved after step {step}; the same command goes on from here"
    assert done.stderr == ""
    assert checkpoints(workdir)[-1] == step, "the step under way was not saved"
    assert read_metrics(workdir)[-1]["step"] == step
    assert read_metrics(workdir)[-1]["stage"] == ("sft" if step <= 4 else "rl")
    assert not (workdir / "model").exists()
    return done


def test_stopped_and_killed_at_every_turn_and_resumed_equals_uninterrupted(tmp_path, data_dir, finished):
    """The recipe saves every 2 steps in the background: sft is steps 1 to 4, rl 5 to 10, with an evaluation at 8."""
    workdir = tmp_path / "run"
    kept = {"checkpoint__keep": 2}  # resumable, so that deleting old checkpoints is part of the trial

    stop_at(3, workdir, data_dir, **kept)  # in the middle of sft
    assert checkpoints(workdir) == [2, 3]

    kill_at("rename:4", workdir, data_dir, **kept)  # in the middle of the checkpoint that ends sft
    assert len(read_metrics(workdir)) == 4
    assert checkpoints(workdir) == [2, 3], "the half-written checkpoint was taken for a whole one"
    assert half_written(workdir), "the save had ended before the kill: nothing was tested"

    done = kill_at("rename:eval-sft.jsonl", workdir, data_dir, **kept)  # on the boundary, before it is evaluated
    assert "going on after step 3 of 10 (sft)" in done.stdout
    assert not half_written(workdir)
    assert checkpoints(workdir) == [3, 4]
    assert not (workdir / "summary.json").exists()

    done = stop_at(7, workdir, data_dir, **kept)  # in the middle of rl
    assert "going on after step 4 of 10 (sft)" in done.stdout
    assert checkpoints(workdir) == [4, 6, 7]
    assert (workdir / "samples" / "step-000006.jsonl").exists()

    done = kill_at("rename:eval-rl-8.jsonl", workdir, data_dir, **kept)  # saved, the evaluation of that step is not
    assert "going on after step 7 of 10 (rl)" in done.stdout
    assert checkpoints(workdir) == [4, 7, 8]
    assert "rl-8" not in json.loads((workdir / "summary.json").read_text())["evaluations"]

    kill_at("rename:eval-rl.jsonl", workdir, data_dir, **kept)  # all steps done, the result is not
    kill_at("rename:model", workdir, data_dir, **kept)  # the model is whole, under another name

    done = train(workdir, data_dir, **kept)
    assert "going on after step 10 of 10 (rl)" in done.stdout
    assert done.stderr == ""
    assert checkpoints(workdir) == [4, 8, 10]  # the two newest and the end of sft
    assert not half_written(workdir)
    assert_same_run(workdir, finished.workdir)


# The test above is asked to stop there.
@pytest.mark.slow
def test_killed_in_the_middle_of_each_stage_and_resumed_equals_uninterrupted(tmp_path, data_dir, finished):
    workdir, kept = tmp_path / "run", {"checkpoint__keep": 2}
    kill_at("log:3", workdir, data_dir, **kept)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]
    assert checkpoints(workdir) == [2]
    done = kill_at("log:7", workdir, data_dir, **kept)
    assert "going on after step 2 of 10 (sft)" in done.stdout
    assert checkpoints(workdir) == [4, 6]
    done = train(workdir, data_dir, **kept)
    assert "going on after step 6 of 10 (rl)" in done.stdout
    assert_same_run(workdir, finished.workdir)


# test_best_checkpoint.py has the same with a chosen point.
@pytest.mark.slow
def test_killed_at_no_chosen_point_with_a_kl_term(tmp_path, data_dir):
    """The parameters at the stage's start, which the KL term compares with, come back too; saves are synchronous."""
    overrides = {
        "stages__order": "rl",
        "loss__kl_coef": 0.5,
        "checkpoint__asynchronous": False,
    }
    train(tmp_path / "straight", data_dir, **overrides)
    process = start("balcap_jax.train", *arguments(tmp_path / "killed", data_dir, **overrides))
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert (
        not (tmp_path / "killed" / "summary.json").exists()
        or "rl" not in json.loads((tmp_path / "killed" / "summary.json").read_text())["evaluations"]
    ), "the run had ended before the kill: nothing was tested"

    done = train(tmp_path / "killed", data_dir, **overrides)
    assert "going on after step" in done.stdout
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    divergence = [line["kl"] for line in read_metrics(tmp_path / "killed")]
    assert divergence[0] < 1e-6 < divergence[-1], "the KL term never left 0: nothing was tested"


def test_a_second_ctrl_c_ends_at_once_with_one_line(tmp_path, data_dir):
    """While the checkpoint of the first one is written."""
    given = arguments(tmp_path, data_dir)
    done = finish(start_interrupted(signal.SIGINT, "log:3+rename:3", *given), 130)
    assert done.stderr == "interrupted; the same command goes on from the newest checkpoint\n"
    assert checkpoints(tmp_path)[0] == 2


def test_a_finished_run_shows_its_result_again(data_dir, finished):
    table = finished.output[finished.output.index("4 held-out images") :]
    assert "b-CapScore" in table
    assert finished.errors == ""
    kept = [path for part in ("checkpoints", "model") for path in (finished.workdir / part).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    done = train(finished.workdir, data_dir)
    assert done.stdout.endswith(table)
    assert "going on after step 10 of 10 (rl)" in done.stdout
    assert done.stderr == ""
    assert before == {path: path.stat().st_mtime_ns for path in kept}
    assert len(read_metrics(finished.workdir)) == 10


def test_a_finished_run_that_is_given_more_steps(tmp_path, data_dir, finished):
    """Its result and its model are those of the later step, and what it had done stays."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    kill_at("log:12", workdir, data_dir, stages__rl__steps=8)
    assert not (workdir / "model").exists(), "a model of 10 steps under the name of one of 12"
    done = train(workdir, data_dir, stages__rl__steps=8)
    assert "going on after step 10 of 12 (rl)" in done.stdout
    assert read_metrics(workdir)[:10] == read_metrics(finished.workdir)
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, 13))
    before, after = (read_summary(run)["evaluations"] for run in (finished.workdir, workdir))
    assert after["sft"] == before["sft"]
    assert after["rl-8"] == before["rl-8"]
    assert after["rl"] != before["rl"]
    model = read_model(workdir / "model")
    saved = read_arrays(workdir / "checkpoints" / "12" / "arrays")
    for name, array in model.items():
        assert array.tobytes() == saved[f"['state']['params']{name}"].tobytes(), name


def test_a_finished_run_whose_files_were_deleted_or_damaged(tmp_path, data_dir, finished):
    """A model that is not whole is written again; one of fewer steps goes, although the summary does not tell."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    (workdir / "model" / "model.safetensors").unlink()
    train(workdir, data_dir)
    assert_same_run(workdir, finished.workdir)

    (workdir / "summary.json").unlink()
    kill_at("log:11", workdir, data_dir, stages__rl__steps=8)
    assert not (workdir / "model").exists(), "a model of 10 steps under the name of one of 12"
    assert not (workdir / "samples" / "eval-rl.jsonl").exists()
    assert not (workdir / "samples" / "greedy-rl.jsonl").exists()


def test_a_finished_run_without_checkpoints_is_not_trained_over(tmp_path, data_dir, finished):
    """Checkpoints are the largest part of a run: somebody may have deleted them to make room."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints")
    line = the_one_line(train(workdir, data_dir, expected=2).stderr)
    assert line == (
        f"error: {workdir} holds a trained model and no checkpoint to go on from; choose another --workdir, or move "
        f"{workdir}/model away to train from the start"
    )
    assert read_metrics(workdir) == read_metrics(finished.workdir)
    assert_same_model(workdir / "model", finished.workdir / "model")


# test_families.py resumes the other family after other stages.
@pytest.mark.slow
def test_a_run_of_all_stages_killed_while_aligning_equals_uninterrupted(tmp_path, data_dir):
    stages = {
        "stages__order": "vision,align,sft,rl",
        "stages__vision__steps": 3,
        "stages__align__steps": 3,
        "stages__sft__steps": 2,
        "stages__rl__steps": 2,
        "stages__vision__freeze": "^(projector|decoder)/",
        "model__vision_width": 32,  # at least as many as there are classes
    }
    stages |= {f"stages__{name}__batch_size": 4 for name in ("vision", "align")}
    stages |= {f"stages__{name}__warmup_steps": 2 for name in ("vision", "align")}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole, data_dir, **stages)
    kill_at("log:2", resumed, data_dir, **stages)  # while the tower is pretrained
    kill_at("log:6", resumed, data_dir, **stages)  # while aligning
    kill_at("rename:eval-align.jsonl", resumed, data_dir, **stages)  # aligned, and not evaluated
    assert not (resumed / "summary.json").exists()
    done = train(resumed, data_dir, **stages)
    assert "going on after step 6 of 10 (align)" in done.stdout
    assert_same_run(resumed, whole)
    assert [line["stage"] for line in read_metrics(whole)] == ["vision"] * 3 + ["align"] * 3 + ["sft"] * 2 + ["rl"] * 2
    assert list(read_summary(whole)["evaluations"]) == ["align", "sft", "rl"]


# A corner: no recipe has such a stage.
@pytest.mark.slow
def test_a_stage_without_steps_is_passed_on_resume(tmp_path, data_dir):
    """What the checkpoint before it holds belongs to an earlier stage, which trains other parameters."""
    overrides = {
        "stages__order": "sft,align,rl",
        "stages__align__steps": 0,
        "stages__align__freeze": "^vision/",
        "stages__rl__steps": 1,
    }
    kill_at("log:5", tmp_path, data_dir, **overrides)
    assert checkpoints(tmp_path) == [2, 4]
    done = train(tmp_path, data_dir, **overrides)
    assert "going on after step 4 of 5 (sft)" in done.stdout
    assert [line["stage"] for line in read_metrics(tmp_path)] == ["sft"] * 4 + ["rl"]
