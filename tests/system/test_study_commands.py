"""Runs of studies leave results, by which none is made twice; a study that was killed goes on."""

import json
import shutil
import signal
import time

import pytest
from command_runs import RECIPE, finish, start

from balcap_jax.ablate import plans, report, results
from balcap_jax.ablate.plans import Plan
from balcap_jax.ablate.studies import HABITS, Arm, Study
from balcap_jax.cli.files import AppendedLines
from balcap_jax.cli.process import PreemptionFlag

SHORT = {
    "stages.vision.steps": 3,
    "stages.align.steps": 3,
    "stages.sft.steps": 3,
    "stages.rl.steps": 3,
    "stages.rl.warmup_steps": 1,
    "log.eval_images": 4,
    "checkpoint.every": 1,
}


def conduct(plan, study, *, keep=False):
    with PreemptionFlag() as stop, AppendedLines(plan.out / "study.jsonl") as log:
        return plans.conduct(plan, [study], None, jobs=1, keep=keep, log=log, stop=stop)


def test_a_finished_run_leaves_its_result_and_goes(tmp_path, data_dir, finished, capsys):
    study = Study("s", "q", HABITS, {"full": Arm("x")}, seeds=(0,))
    fields = {"data.data_dir": str(data_dir), "stages.rl.steps": "6", "log.eval_images": "4"}
    plan = Plan(str(RECIPE), fields, tmp_path / "out", tmp_path / "results")
    [run] = [run for run in plan.missing([study]) if not run.is_base]
    shutil.copytree(finished.workdir, run.workdir)
    (plan.out / "study.jsonl").write_text(
        json.dumps({"run": run.name, "status": "finished", "started": 10.0, "ended": 22.5})
        + "\n"
        + json.dumps({"run": "another", "status": "finished", "started": 10.0, "ended": 99.0})
        + "\n"
    )
    half = run.workdir.with_name(".old-seed0.done")
    half.mkdir()

    assert conduct(plan, study) == {}
    assert not run.workdir.exists()
    assert not half.exists()
    assert plan.missing([study]) == []
    saved = results.read(tmp_path / "results" / "habits-full-seed0.json")
    summary = json.loads((finished.workdir / "summary.json").read_text())
    for ours, kind in (("greedy", "greedy"), ("sampled", "evaluations")):
        for role, label in (("base", "sft"), ("after", "rl")):
            for name, factor in (("b_capscore", 1), ("recall", 100), ("arena", 100), ("words", 1), ("tokens", 1)):
                mean = factor * summary[kind][label][name]["mean"]
                assert saved[ours][role][name] == pytest.approx(mean, abs=1e-4)
            assert saved[ours][role]["digest"] == summary[kind][label]["digest"]
            assert saved[ours][role]["n"] == summary[kind][label]["n"]
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]
    spreads = [line["reward/recall_std"] for line in lines if line["stage"] == "rl"]
    assert saved["group_std"]["recall"] == pytest.approx(sum(spreads) / len(spreads))
    assert saved["judge_calls"] == 6 * 4 * 3 * 3  # updates x pictures x captions x questions
    assert (saved["seconds"], saved["jobs"], saved["seed"]) == (12.5, 1, 0)
    assert (saved["versions"], saved["device"]) == (summary["versions"], summary["device"])
    assert "trajectory" not in saved
    text = report.section(study, report.load(plan, study))
    assert f"| full | {summary['greedy']['rl']['b_capscore']['mean']:.1f} |" in text

    before = (tmp_path / "results" / "habits-full-seed0.json").stat().st_mtime_ns
    assert conduct(plan, study) == {}
    assert (tmp_path / "results" / "habits-full-seed0.json").stat().st_mtime_ns == before
    assert "started" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_with_what_is_missing(tmp_path, data_dir):
    out = tmp_path / "out"
    given = [f"--config.{name}={value}" for name, value in SHORT.items()]
    given += ["--study=budget", "--config=configs/scenes.py:tiny", f"--out={out}", "--seeds=0", "--jobs=1"]
    given += [f"--config.data.data_dir={data_dir}"]
    process = start("balcap_jax.ablate", *given)
    first = out / "results" / "habits-full-seed0.json"
    while process.poll() is None and not first.exists():
        time.sleep(0.02)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert first.exists()
    before = first.stat().st_mtime_ns

    done = finish(start("balcap_jax.ablate", *given))
    assert "habits-full-seed0 started" not in done.stdout
    assert first.stat().st_mtime_ns == before
    names = ["align", "habits-ask_0.25", "habits-ask_0.5", "habits-base", "habits-full"]
    assert sorted(path.name for path in (out / "results").iterdir()) == [f"{name}-seed0.json" for name in names]
    # Bases stay for other studies; the run whose result was written just before the kill may stay too.
    assert {path.name for path in (out / "runs").iterdir()} - {"habits-full-seed0"} == {
        "align-seed0", "habits-base-seed0",
    }  # fmt: skip
    digests = {name: results.read(out / "results" / f"habits-{name}-seed0.json") for name in ("full", "ask_0.5")}
    assert digests["full"]["greedy"]["base"] == digests["ask_0.5"]["greedy"]["base"]
    assert digests["full"]["greedy"]["ceiling"] == digests["ask_0.5"]["greedy"]["ceiling"]
    assert "| share asked |" in (out / "budget.md").read_text()
    assert (out / "figures" / "study_budget.svg").read_text().startswith("<svg")
    again = finish(start("balcap_jax.ablate", *given))
    assert again.stdout == f"table: {out / 'budget.md'}\n"
