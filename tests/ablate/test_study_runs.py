"""Which runs a study makes, in which order and from what, with training replaced by files as it leaves them."""

import json
import shutil
from pathlib import Path

import pytest

from balcap_jax.ablate import plans, report, results, running
from balcap_jax.ablate.plans import Plan
from balcap_jax.ablate.studies import HABITS, RECIPE, Arm, Study
from balcap_jax.cli.arguments import split_overrides
from balcap_jax.cli.files import AppendedLines
from balcap_jax.cli.process import PreemptionFlag
from balcap_jax.config import recipes

ARMS = {
    "full": Arm("x"),
    "fixed": Arm("y", "grpo", inverse_std_of="grpo"),
    "grpo": Arm("z", "grpo"),
    "no_gate": Arm("w", "no_gate"),
}
STUDY = Study("s", "q", HABITS, ARMS, seeds=(0, 1))
STD = {"precision": 0.1, "recall": 0.2, "linguistic": 0.05}


@pytest.fixture
def trained(monkeypatch):
    """The names of runs in the order in which they were trained; those in its `fails` end with an error."""

    class Trained(list):
        fails = ()

    made = Trained()

    class Process:
        def __init__(self, command, **_):
            assert command[1:3] == ["-m", "balcap_jax.train"]
            rest, fields = split_overrides(command[3:])
            recipe, workdir = (argument.partition("=")[2] for argument in rest)
            self.workdir, self.returncode = Path(workdir), None
            made.append(self.workdir.name)
            if self.workdir.name in made.fails:
                self.returncode = 3
                return
            leave(self.workdir, recipes.load(recipe, fields))
            self.returncode = 0

        def poll(self):
            return self.returncode

    monkeypatch.setattr(running.subprocess, "Popen", Process)
    monkeypatch.setattr(running.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(running, "copy_base", lambda base, workdir: workdir.mkdir(parents=True))
    return made


def leave(workdir, config):
    """What training leaves: greedy b-CapScores of 70 + seed, 5 lower for GRPO, and the spread of its rewards."""
    (workdir / "model").mkdir(parents=True)
    (workdir / "config.json").write_text(recipes.to_text(config))
    score = 70.0 + config.seed - 5 * (config.advantage.estimator == "grpo")
    means = {"b_capscore": {"mean": score}} | {name: {"mean": score / 100} for name in STD}
    order = recipes.stage_order(config)
    both = {order[-1]: means, "align": means, order[-2]: means}
    summary = {"greedy": both, "evaluations": both, "device": "1 x cpu", "versions": {"jax": "0"}}
    (workdir / "summary.json").write_text(json.dumps(summary))
    line = {"stage": order[-1]} | {f"reward/{name}_std": std for name, std in STD.items()}
    (workdir / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")


def make(tmp_path, study=STUDY, *, jobs=1, keep=False, **fields):
    plan = Plan(RECIPE, fields, tmp_path / "out", tmp_path / "results")
    with PreemptionFlag() as stop, AppendedLines(plan.out / "study.jsonl") as log:
        return plan, plans.conduct(plan, [study], None, jobs=jobs, keep=keep, log=log, stop=stop)


def test_runs_are_made_seed_by_seed_behind_their_bases_and_once(tmp_path, trained):
    plan, failed = make(tmp_path)
    assert failed == {}
    assert trained == [
        *("align-seed0", "habits-base-seed0", "habits-full-seed0", "habits-grpo-seed0", "habits-no_gate-seed0"),
        *("align-seed1", "habits-base-seed1", "habits-full-seed1", "habits-grpo-seed1", "habits-no_gate-seed1"),
        *("habits-fixed-seed0", "habits-fixed-seed1"),  # They depend on grpo's results.
    ]
    assert plans.left(plan, [STUDY], None) == []
    assert {path.name for path in (plan.out / "runs").iterdir()} == {
        *("align-seed0", "align-seed1", "habits-base-seed0", "habits-base-seed1"),
    }
    fixed = results.read(tmp_path / "results" / "habits-fixed-seed0.json")
    assert fixed["config"]["rewards.weights"] == pytest.approx([0.8571, 0.4286, 1.7143])
    assert fixed["fields"]["rewards.weights"] == "0.8571,0.4286,1.7143"
    text = report.section(STUDY, report.load(plan, STUDY))
    assert "| grpo | **65.5 ± 0.7** |" in text
    assert "8 runs, seeds 0, 1;" in text

    del trained[:]
    make(tmp_path)
    assert trained == []


def test_only_what_is_missing_or_of_another_config_is_made(tmp_path, trained, capsys):
    plan, _ = make(tmp_path)
    (tmp_path / "results" / "habits-full-seed1.json").unlink()
    path = tmp_path / "results" / "habits-no_gate-seed0.json"
    old = results.read(path)
    results.write(path, old | {"config": old["config"] | {"rewards.gate": True}, "config_digest": "0"})
    del trained[:]
    make(tmp_path)
    assert trained == ["habits-no_gate-seed0", "habits-full-seed1"]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "of another config" in line]
    assert "habits-no_gate-seed0.json is of another config (rewards.gate: True -> False)" in line
    assert results.read(path) == old | {"seconds": results.read(path)["seconds"]}
    assert plans.left(plan, [STUDY], None) == []


def test_what_fails_holds_up_only_what_needs_it(tmp_path, trained):
    trained.fails = ("habits-grpo-seed0", "habits-base-seed1")
    plan, failed = make(tmp_path, jobs=2)
    assert {*failed} == {
        *("habits-grpo-seed0", "habits-base-seed1"),
        *("habits-full-seed1", "habits-grpo-seed1", "habits-no_gate-seed1"),
    }
    assert failed["habits-grpo-seed0"].startswith("exit status 3")
    assert failed["habits-full-seed1"] == "its base habits-base-seed1 failed"
    assert {*plans.left(plan, [STUDY], None)} == {
        *("habits-grpo-seed0", "habits-fixed-seed0"),
        *("habits-full-seed1", "habits-grpo-seed1", "habits-no_gate-seed1", "habits-fixed-seed1"),
    }
    trained.fails = ()
    del trained[:]
    shutil.rmtree(plan.out / "runs" / "habits-grpo-seed0")
    shutil.rmtree(plan.out / "runs" / "habits-base-seed1")
    make(tmp_path)
    assert "habits-full-seed0" not in trained
    assert trained[-2:] == ["habits-fixed-seed0", "habits-fixed-seed1"]
    assert plans.left(plan, [STUDY], None) == []


def test_directories_can_be_kept(tmp_path, trained):
    plan, _ = make(tmp_path, Study("s", "q", HABITS, {"full": Arm("x")}, seeds=(3,)), keep=True)
    assert (plan.out / "runs" / "habits-full-seed3" / "summary.json").exists()
    assert results.seeds_of(plan.results, "habits-full") == [3]
