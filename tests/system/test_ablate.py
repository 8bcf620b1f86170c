"""A study of the micro recipe: its runs are those of the whole recipe, and what fails or is killed loses no others."""

import json
import shutil
import signal
import time

import pytest
from command_runs import (
    RECIPE,
    assert_same_run,
    checkpoints,
    finish,
    read_metrics,
    read_summary,
    rewind,
    start,
    start_afresh,
)

from balcap_jax.ablate import __main__ as ablate
from balcap_jax.ablate.leave_one_out import plan, with_variant
from balcap_jax.ablate.running import copy_base, cost, is_finished
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import write_text
from balcap_jax.config import recipes
from balcap_jax.training.workdir import is_held

VARIANTS = f"""
import runpy

def get_config(variant=""):
    config = runpy.run_path({str(RECIPE)!r})["get_config"]()
    for name in filter(None, variant.split(",")):
        if name == "grpo":
            config.advantage.estimator = "grpo"
        elif name == "lost":  # nobody answers at its judge's address
            config.judge.name, config.judge.endpoints = "remote", "http://127.0.0.1:9/v1"
        elif name != "same":
            raise ValueError(f"no variant {{name}}")
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(VARIANTS)
    return str(path)


def make_base(finished, out, recipe, overrides):
    """The base run of seed 0, from a finished run of the whole recipe whose sft ended with step 4."""
    base = plan(recipe, overrides, ["full"], [0], out)[0][0]
    base.workdir.parent.mkdir(parents=True)
    rewind(finished.workdir, base.workdir, 4)
    shutil.copytree(finished.workdir / "model", base.workdir / "model")
    write_text(base.workdir / "config.json", recipes.to_text(base.config))
    lines = (base.workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (base.workdir / "metrics.jsonl").write_text("".join(lines[:4]))
    assert is_finished(base)


def test_a_study_goes_on_from_its_base_exactly_and_names_the_run_that_fails(tmp_path, data_dir, finished, recipe):
    out = tmp_path / "study"
    make_base(finished, out, recipe, {"data.data_dir": str(data_dir)})
    given = [f"--config={recipe}", f"--out={out}", "--seeds=0", f"--config.data.data_dir={data_dir}"]
    done = finish(start_afresh("balcap_jax.ablate", *given, "--variants=lost,full", "--jobs=2"), 1)

    assert_same_run(out / "runs" / "full-seed0", finished.workdir)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: lost-seed0: exit status 2: error: ")
    assert "http://127.0.0.1:9/v1" in line
    assert str(out / "logs" / "lost-seed0.log") in line
    assert "[2/3] full-seed0 finished" in done.stdout or "[3/3] full-seed0 finished" in done.stdout

    result = json.loads((out / "table.json").read_text())
    summary = json.loads((finished.workdir / "summary.json").read_text())
    for kind in ("evaluations", "greedy"):
        base, full = result[kind]
        assert (base["variant"], full["variant"]) == ("base", "full")
        for row, label in ((base, "sft"), (full, "rl")):
            for metric, scale in (
                ("b_capscore", 1),
                ("dcscore", 100),
                ("captionqa", 100),
                ("arena", 100),
                ("words", 1),
            ):
                expected = scale * summary[kind][label][metric]["mean"]
                assert row["metrics"][metric]["mean"] == pytest.approx(expected), (kind, label, metric)
    assert [one["status"] for one in map(json.loads, (out / "study.jsonl").read_text().splitlines())].count(
        "failed"
    ) == 1
    assert "| full |" in (out / "table.md").read_text()
    assert (out / "plot.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on(tmp_path, data_dir, finished, recipe):
    """Its runs are asked to stop by the system; those that were finished are not touched again."""
    out = tmp_path / "study"
    given = [f"--config={recipe}", f"--out={out}", "--seeds=0", f"--config.data.data_dir={data_dir}"]
    given += ["--variants=full,grpo", "--jobs=1"]
    process = start("balcap_jax.ablate", *given)
    grpo = out / "runs" / "grpo-seed0"
    log = grpo / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 6):
        time.sleep(0.01)
    process.kill()
    finish(process, -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while is_held(grpo) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(read_metrics(grpo)) < 10, "the run had ended before the kill: nothing was tested"
    full = out / "runs" / "full-seed0"
    before = {path: path.stat().st_mtime_ns for path in full.rglob("*")}

    done = finish(start("balcap_jax.ablate", *given))
    assert "[2/3] grpo-seed0 started" in done.stdout
    assert "full-seed0" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in full.rglob("*")}
    assert_same_run(full, finished.workdir)
    assert len(read_metrics(grpo)) == 10
    done = finish(start("balcap_jax.ablate", *given))
    assert done.stdout == f"table: {out / 'table.md'}\n"


def test_a_variant_has_the_ceiling_of_its_base(tmp_path, finished):
    """And no more of its results: what rl starts from is evaluated in the variant's own run."""
    base, workdir = tmp_path / "base", tmp_path / "runs" / "full-seed0"
    rewind(finished.workdir, base, 4)
    summary = read_summary(base)
    ceiling = {kind: {"align": evaluations["rl"]} for kind, evaluations in summary.items()}
    both = {kind: ceiling[kind] | {"sft": evaluations["sft"]} for kind, evaluations in summary.items()}
    (base / "summary.json").write_text(json.dumps(both | {"seconds": {"wall": 3.0}}))
    (base / "samples" / "greedy-align.jsonl").write_text("a line\n")
    copy_base(base, workdir)
    assert json.loads((workdir / "summary.json").read_text()) == ceiling
    assert [path.name for path in (workdir / "samples").iterdir()] == ["greedy-align.jsonl"]
    assert checkpoints(workdir) == [4]


def test_runs_of_a_plan(tmp_path, recipe):
    bases, runs = plan(recipe, {"stages.rl.steps": "3"}, ["full", "grpo"], [4, 7], tmp_path)
    assert [run.name for run in runs] == ["full-seed4", "grpo-seed4", "full-seed7", "grpo-seed7"]
    assert [bases[seed].config.stages.order for seed in (4, 7)] == ["sft", "sft"]
    assert [bases[seed].config.seed for seed in (4, 7)] == [4, 7]
    assert runs[3].config.advantage.estimator == "grpo"
    assert (runs[3].config.seed, runs[3].config.stages.rl.steps, runs[3].config.stages.order) == (7, 3, "sft,rl")
    assert runs[3].arguments == (f"--config={recipe}:grpo", "--config.stages.rl.steps=3", "--config.seed=7")
    assert not is_finished(runs[0])
    assert with_variant("a.py", "full") == "a.py"
    assert with_variant("a.py:tiny", "grpo") == "a.py:tiny,grpo"


def test_seconds_of_overlapping_runs():
    spans = [(10.0, 20.0), (12.0, 15.0), (18.0, 30.0), (40.0, 41.0)]
    entries = [{"started": start, "ended": end} for start, end in spans]
    assert cost(entries) == {"runs_seconds": 10 + 3 + 12 + 1, "wall_seconds": 20 + 1}
    assert cost([]) == {"runs_seconds": 0, "wall_seconds": 0.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variants=full,nope"], "no variant nope"),
        (["--variants=full,same"], "the variants 'full' and 'same' are the same with these settings"),
        (["--variants=full,,grpo"], "--variants takes different names"),
        (["--variants=base"], "--variants takes different names"),
        (["--seeds=0,0"], "--seeds takes different whole numbers"),
        (["--seeds=0,00"], "--seeds takes different whole numbers"),
        (["--seeds=-1"], "--seeds takes different whole numbers"),
        (["--jobs=0"], "--jobs must be at least 1"),
        (["--jobs=two"], "argument --jobs: invalid int value"),
        (["--config.seed=3"], "--config.seed is the study's own to set"),
        (["--config.advantage.estimator=grpo", "--variants=full,grpo"], "are the same with these settings"),
        (["--config.rewards.weight=1"], "did you mean 'rewards.weights'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, recipe, capsys, given, message):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        ablate.main(
            [f"--config={recipe}", f"--out={out}", *([] if "--var" in str(given) else ["--variants=full"]), *given]
        )
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("error: ")
    assert message in line
    assert not out.exists()


def test_a_directory_of_another_study_is_refused(tmp_path, recipe):
    _, [run] = plan(recipe, {}, ["full"], [0], tmp_path)
    write_text(run.workdir / "config.json", recipes.to_text(run.config))
    plan(recipe, {}, ["full"], [0], tmp_path)
    with pytest.raises(UserError, match=r"holds a run of another config \(rollout.group_size: 3 -> 4\)"):
        plan(recipe, {"rollout.group_size": "4"}, ["full"], [0], tmp_path)


def test_a_recipe_that_does_not_end_with_rl_is_refused(tmp_path):
    path = tmp_path / "sft.py"
    path.write_text("from balcap_jax.config import default_config\ndef get_config():\n"
                    "    config = default_config()\n    config.stages.order = 'sft'\n    return config\n")  # fmt: skip
    with pytest.raises(UserError, match=r"'stages.order' must end with rl, .* got sft"):
        plan(str(path), {}, ["full"], [0], tmp_path)
