"""The checks before a run, as a whole: a sound set-up passes without a word of warning, and a fault is told once."""

import json
import os

import pytest
from doctor.set_up import RECIPE, ROOT, assert_fault

from balcap_jax.config import recipes
from balcap_jax.doctor import __main__ as doctor
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, first_fault


def test_a_sound_set_up_passes_without_a_word_of_warning(sound, tmp_path, capsys):
    before = sound.server.requests
    doctor.main(sound.command(tmp_path / "run"))
    # Three questions of the reward, six about pictures and grey ones of three samples, whose references are the same,
    # three about units, and the trial's.
    assert sound.server.requests - before == 44
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.splitlines()[-1] == "ready"
    assert not [word for word in ("fault", "warning", "error", "left out") if word in output.lower()]
    assert f"model   {sound.folder / 'model'}: qwen2_5_vl, " in output, "the block of training"
    rows = {line.split()[1]: line for line in output.splitlines() if line.startswith("  ok ")}
    checks = {"settings", "checkpoint", "data", "prompts", "references", "judge", "workdir", "disk", "time", "money"}
    assert rows.keys() == checks
    assert "13 samples to train on, 4 for validation, 7 held out for tests" in rows["data"]
    assert "units.jsonl has lines about 24 of 24 samples" in rows["references"]
    assert f"judge {sound.server.url}" in rows["judge"]
    # The answers are shown: two assertions, two units, and marks.
    shown = [line for line in output.splitlines() if line.startswith("  precision ")]
    assert [line.split(":")[0].split()[1:] for line in shown] == [["A", "picture"], ["Of", "a", "thing"]]
    assert all(" verified, " in line for line in shown)
    assert sum(line.startswith("  recall      ") for line in output.splitlines()) == 2
    assert sum(line.startswith("  linguistic  clarity ") for line in output.splitlines()) == 1
    assert not (tmp_path / "run").exists(), "it left something"


def test_faults_come_first_and_the_first_of_them_last_on_stderr(sound, tmp_path, capsys):
    more = {"model.path": sound.folder / "none", "data.prompt": "word " * 300}
    with pytest.raises(SystemExit) as ended:
        doctor.main(sound.command(tmp_path, **more))
    assert ended.value.code == 1
    output, errors = capsys.readouterr()
    verdicts = [
        line.split()[0] for line in output.splitlines() if line.startswith(("  fault", "  ok", "  not checked"))
    ]
    assert verdicts == sorted(verdicts, key=["fault", "not", "ok"].index)
    (last,) = errors.splitlines()
    assert last.startswith(f"not ready: checkpoint: no model at {sound.folder / 'none'}")
    assert last.endswith("give a directory of a Hugging Face checkpoint, of an adapter, or one that training wrote")


def test_json_says_the_same(capsys, monkeypatch, tmp_path):
    """Of a published recipe to which nothing was given."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", "--json"])
    assert ended.value.code == 1
    output, errors = capsys.readouterr()
    told = json.loads(output)
    assert told["ready"] is False
    verdicts = {entry["check"]: entry["verdict"] for entry in told["checks"]}
    assert [check for check, verdict in verdicts.items() if verdict == FAULT] == ["settings", "checkpoint", "data"]
    first = told["checks"][0]
    assert errors.strip() == f"not ready: {first['check']}: {first['found']}; {first['remedy']}"
    assert verdicts["time"] == OK, "steps and tokens are known all the same"


def test_without_units_all_else_is_checked(sound):
    found, block = doctor.examine(sound.config(data__units=sound.folder / "none.jsonl"))
    verdicts = {finding.check: finding.verdict for finding in found}
    faults = [check for check, verdict in verdicts.items() if verdict == FAULT]
    assert faults == ["references"]
    assert verdicts[f"judge {sound.server.url}"] == OK, "by sentences in place of units"
    assert "13 samples to train on" in block


def test_the_scenes_need_nothing(tmp_path, capsys):
    given = [f"--config.data.data_dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"]
    doctor.main([f"--config={ROOT / 'configs' / 'scenes.py'}", *given])
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.endswith("\nready\n")
    assert "8,192 + 64 + 128 pictures will be made" in output
    assert "data    scenes: 8,192 samples to train on, 64 for validation, 128 for tests" in output
    assert "precision 1.00, recall 1.00, linguistic 1.00 for the reference of scenes-test-000000" in output
    assert os.listdir(tmp_path) == []


def test_a_bad_configuration_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", "--config.rollout.bucket=5"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown config field 'rollout.bucket'; did you mean ")
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", "--workdir=s3://bucket/run"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --workdir: it is a URL, and files are ")


@pytest.mark.parametrize("given", [["--slices=0", "--topology=v5e:4x4"], ["--slices=-2"], ["--slices=2"]])
def test_a_number_of_slices_that_says_nothing(capsys, given):
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", *given])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {given[0].replace('=', ' is ')}: it is the number of slices of --topology, at least"
    )


def test_no_topology_is_told_before_anything_is_looked_at(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", f"--workdir={tmp_path}/run", "--topology=v5litepod-16"])
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert written.err == "error: --topology is 'v5litepod-16'; 16 of its chips are v5e:4x4\n"
    assert written.out == ""


def test_what_a_recipe_leaves_to_its_user(capsys):
    finding = doctor._settings(recipes.load(RECIPE))
    assert_fault(finding, "settings", "the recipe 'qwen25vl_3b' leaves to you: --config.data.manual_dir=FOLDER", "give")


def test_the_first_fault_is_the_earliest():
    findings = [Finding("a", OK, "x"), Finding("b", UNCHECKED, "y"), Finding("c", FAULT, "z"), Finding("d", FAULT, "w")]
    assert first_fault(findings).check == "c"
