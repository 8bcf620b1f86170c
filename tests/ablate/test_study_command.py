"""The command's studies: what it lists and refuses, and the runs that depend on a result."""

import pytest

from balcap_jax.ablate import __main__ as ablate
from balcap_jax.ablate import results
from balcap_jax.ablate.plans import Plan, left
from balcap_jax.ablate.studies import HABITS, RECIPE, STUDIES, Arm, Study


def test_the_list_names_every_study_and_arm(capsys):
    ablate.main(["--study=list"])
    text = capsys.readouterr().out
    for study in STUDIES.values():
        assert f"{study.name} ({len(study.arms)} variants x {len(study.seeds)} seeds): {study.question}" in text
        assert all(f"    {name} " in text for name in study.arms)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--study=spreads"], "--study knows no 'spreads'; there are spread, moods,"),
        (["--study=budget,list"], "--study knows no 'list'"),
        (["--study=budget", "--pilot", "--seeds=3"], "--pilot has seeds of its own"),
        (["--study=budget", "--seeds=1,1"], "--seeds takes different whole numbers"),
        (["--study=budget", "--seeds="], "--seeds takes different whole numbers"),
        (["--study=budget", "--variants=full"], "--variants says nothing beside --study"),
        (["--report", "--seeds=1"], "--seeds says nothing beside --report"),
        (["--report", "--seeds="], "--seeds says nothing beside --report"),
        (["--report", "--results={tmp}/typo"], "typo holds no result of a study"),
        (["--config=scenes", "--pilot"], "--pilot says nothing beside a recipe of one's own"),
        (["--study=budget", "--results={tmp}/file/results"], "file/results: Not a directory"),
        (["--study=budget", "--out={tmp}/file"], "file is a file; name a directory"),
        (["--study=budget", "--config.seed=1"], "--config.seed is the study's own to set"),
        (["--study=budget", "--config.rewards.weight=1"], "did you mean 'rewards.weights'"),
        (["--study=leave_one_out", "--config.rewards.gate=maybe"], "rewards.gate"),
        (["--study=budget", "--config=missing.py"], "recipe missing.py: No such file"),
        (["--study=budget", "--report", "--config.rewards.gate=0"], "needs --results=DIR"),
        (["--study=budget", "--report", "--page={tmp}/none.md"], "none.md cannot be read"),
        (["--study=budget", "--jobs=0"], "--jobs must be at least 1"),
        ([], "one of the arguments --config, --study, --report is required"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, given, message):
    out = tmp_path / "out"
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        ablate.main([f"--out={out}", *(one.format(tmp=tmp_path) for one in given)])
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("error: ")
    assert message in line
    assert not out.exists()


def test_a_place_for_the_runs_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--study=budget"])
    assert "the following arguments are required: --out" in capsys.readouterr().err


def test_weights_come_from_the_run_that_they_depend_on(tmp_path):
    arms = {"grpo": Arm("x", "grpo"), "fixed": Arm("y", "grpo", inverse_std_of="grpo")}
    study = Study("s", "q", HABITS, arms, against="grpo", seeds=(4,))
    plan = Plan(RECIPE, {}, tmp_path, tmp_path / "results")
    assert [run.name for run in plan.missing([study]) if not run.is_base] == ["habits-grpo-seed4"]
    assert left(plan, [study], None) == ["habits-grpo-seed4", "habits-fixed-seed4"]
    identity = results.identity(plan.of(study, "grpo", 4)[2])
    result = {"config": identity, "config_digest": results.digest(identity), "greedy": {}, "sampled": {}}
    result |= {"seconds": 1.0, "jobs": 1, "device": "cpu", "versions": {}}
    result["group_std"] = {"precision": 0.1, "recall": 0.2, "linguistic": 0.05}
    results.write(results.path_of(plan.results, "habits-grpo", 4), result)
    [run] = [run for run in plan.missing([study]) if not run.is_base]
    assert run.name == "habits-fixed-seed4"
    assert run.config.rewards.weights == pytest.approx((0.8571, 0.4286, 1.7143))
    assert run.config.advantage.estimator == "grpo"
    # With other weights in the file it is another run.
    old = results.identity(run.config)
    fixed = result | {"config": old, "config_digest": results.digest(old)}
    results.write(results.path_of(plan.results, "habits-fixed", 4), fixed)
    assert plan.missing([study]) == []
    results.write(
        results.path_of(plan.results, "habits-grpo", 4), result | {"group_std": {**result["group_std"], "recall": 0.1}}
    )
    assert [run.name for run in plan.missing([study]) if not run.is_base] == ["habits-fixed-seed4"]
