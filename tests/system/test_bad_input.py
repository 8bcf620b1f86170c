"""Bad input and bad disks: one clear line, a non-zero exit, nothing half-written, and the run can go on afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_runs import (
    RECIPE,
    arguments,
    assert_same_run,
    checkpoints,
    rewind,
    the_one_line,
    train,
)

from balcap_jax import train as training
from balcap_jax.parallel import sharding
from balcap_jax.training.checksums import seal
from balcap_jax.training.workdir import claim


@pytest.fixture
def refused(capfd, data_dir, monkeypatch):
    """Runs the command in this process, which is much faster, and returns the one line that it ends with."""
    # The tests' process has 8 devices; a user's has one.
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make_mesh(sizes, training.jax.devices()[:1]))

    def run(workdir, given: list[str] | None = None, **overrides) -> str:
        capfd.readouterr()
        overrides = {"data__data_dir": data_dir} | overrides
        with pytest.raises(SystemExit) as end:
            training.main(given or arguments(workdir, overrides.pop("data__data_dir"), **overrides))
        assert end.value.code == 2
        return the_one_line(capfd.readouterr().err)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def partial_files(folder: Path) -> list[str]:
    """What a command that failed must not leave: files under a temporary name."""
    return [name for name in contents(folder) if ".tmp" in name or ".writing" in name or "orbax-checkpoint-tmp" in name]


# ---- the command line and the recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rollout__group_sise": 4}, "unknown config field 'rollout.group_sise'; did you mean 'rollout.group_size'?"),
        ({"rollout__group_size": 1}, "'rollout.group_size' is 1: a group needs at least 2 samples"),
        ({"stages__rl__batch_size": "four"}, "'stages.rl.batch_size' must be an integer, got 'four'"),
        ({"stages__rl__batch_size": 25}, "'stages.rl.batch_size' (25) is more than data.train_size (24)"),
        ({"advantage__estimator": "c_gpdo"}, "did you mean 'c_gdpo'?"),
        ({"stages__rl__steps": 10**18}, "'stages.rl.steps' must be in [0, 100000000], got 1000000000000000000"),
        ({"data__prompt": "Beschreibe \udcff"}, "'data.prompt' must be Unicode text"),
        (
            {"data__data_dir": "~nobody-of-that-name/data"},
            "'data.data_dir' names the home of a user that does not exist",
        ),
        ({"rollout__parts": 3}, "rollout.parts is 3: 4 prompts over 1 devices"),
        ({"mesh__sampling": 2}, "mesh.sampling is 2, but on the mesh replica 1 x data 1 x fsdp 1 x tensor 1"),
        ({"checkpoint__best_metric": "bleu"}, "'checkpoint.best_metric' must be one of"),
        ({"stages__rl__freeze": "^visoin/"}, "'stages.rl.freeze' ('^visoin/') matches no parameter; their paths begin"),
    ],
)
def test_settings_are_refused_before_anything_is_written(tmp_path, refused, overrides, expected):
    assert expected in refused(tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed_is_found_before_anything_is_written(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "log.wandb is set but wandb is not installed" in refused(tmp_path / "run", log__wandb="mine")
    assert not (tmp_path / "run").exists()


def test_recipe_is_missing(tmp_path, refused):
    line = refused(tmp_path, [f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/run"])
    assert line == (
        f"error: recipe {tmp_path}/none.py: No such file or directory; "
        "--config takes a Python file or a name such as scenes"
    )
    assert not (tmp_path / "run").exists()


def test_prompt_that_is_too_long_does_not_take_the_workdir(tmp_path, refused):
    """9 image tokens, the beginning of sequence and 4 words do not go into P = 12."""
    line = refused(tmp_path / "run", model__prompt_tokens=12)
    assert "the prompt of scenes-test-000000 needs 14 tokens (9 of them the image's)" in line
    assert "model.prompt_tokens is 12; raise model.prompt_tokens or shorten the prompt" in line
    assert not (tmp_path / "run").exists()


def test_two_processes_in_one_workdir(tmp_path, refused):
    with claim(tmp_path, None):
        assert refused(tmp_path) == (f"error: another process is training in {tmp_path}; choose another --workdir")


# ---- data and models ------------------------------------------------------------------------------------------------


def test_data_directory_that_is_missing_and_can_not_be_made(tmp_path, refused):
    (tmp_path / "file").write_text("")
    line = refused(tmp_path / "run", data__data_dir=tmp_path / "file" / "data")
    assert f"cannot prepare the data set scenes in {tmp_path}/file/data: Not a directory" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("split", "damage"), [("test", "truncated"), ("test", "removed"), ("test", "overwritten"), ("train", "truncated")]
)
def test_damaged_data_set(tmp_path, refused, data_dir, split, damage):
    copy = tmp_path / "data"
    shutil.copytree(data_dir, copy)
    (file,) = copy.rglob(f"*{split}.array_record*")
    content = file.read_bytes()
    if damage == "truncated":
        os.truncate(file, len(content) // 2)
    elif damage == "removed":
        file.unlink()
    else:
        file.write_bytes(bytes(reversed(content)))
    line = refused(tmp_path / "run", data__data_dir=copy)
    assert line.startswith(f"error: the data set {copy}/scenes cannot be read (")
    assert line.endswith("); delete this directory to have it made anew")
    if split == "test":
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "reason"), [("{", "Failed to"), (None, "dataset_info.json is missing")])
def test_data_set_that_does_not_say_what_it_is(tmp_path, refused, data_dir, content, reason):
    shutil.copytree(data_dir, tmp_path / "data")
    (info,) = (tmp_path / "data").rglob("dataset_info.json")
    info.write_text(content) if content else info.unlink()
    line = refused(tmp_path / "run", data__data_dir=tmp_path / "data")
    assert line.startswith(f"error: the data set {tmp_path}/data/scenes/")
    assert f"cannot be read ({reason}" in line
    assert line.endswith("; delete this directory to have it made anew")
    assert not (tmp_path / "run").exists()


def test_model_path_that_is_no_model(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty", RECIPE):
        line = refused(tmp_path / "run", model__path=path)
        assert line.startswith(f"error: no model at {path}: config.json is missing; give a directory of a Hugging Face")
    assert not (tmp_path / "run").exists()


# ---- the workdir ----------------------------------------------------------------------------------------------------


def test_workdir_of_another_run_is_left_alone(refused, finished):
    before = contents(finished.workdir)
    line = refused(finished.workdir, seed=1)
    assert line.startswith(f"error: {finished.workdir} holds a run of another config (")
    assert "choose another --workdir" in line
    assert contents(finished.workdir) == before


def test_workdir_that_is_a_file_or_below_one(tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for workdir, reason in (
        (tmp_path / "file", "it is a file, and a run takes a folder"),
        (tmp_path / "file" / "run", "Not a directory"),
    ):
        assert refused(workdir) == f"error: cannot write to workdir {workdir}: {reason}; choose another --workdir"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("summary.json", '{"evaluations": {', "delete it to have it made anew"),
        ("summary.json", "[]", "delete it to have it made anew"),
        ("config.json", '{"seed": ', "choose another --workdir"),
        ("checkpoints/10/extra/metadata", "{}", "stage is missing or odd in its part extra; delete this directory"),
        ("checkpoints/10/extra/metadata", '{"iterator": {}}', "delete this directory to go on from the checkpoint"),
        ("metrics.jsonl", "\x93\n\x94\n", "line 1 is not JSON"),
    ],
)
def test_damaged_files_of_a_run(tmp_path, refused, finished, name, content, expected):
    shutil.copytree(finished.workdir, tmp_path / "run")
    file = tmp_path / "run" / name
    if content.startswith('{"iterator"'):  # All that is asked for, and one of it no state of the data's order.
        content = json.dumps(json.loads(file.read_text()) | json.loads(content))
    file.write_text(content)
    if name.startswith("checkpoints"):  # Its sums are right: somebody else wrote it so.
        seal(file.parents[1])
    before = contents(tmp_path / "run" / "checkpoints")
    line = refused(tmp_path / "run")
    assert str(file).removesuffix("/extra/metadata") in line
    assert expected in line
    assert contents(tmp_path / "run" / "checkpoints") == before


def test_torn_checkpoint(tmp_path, data_dir, finished):
    """The newest is torn: it is passed over with one line, and what was done after the one before is done again.

    The summary is lost besides: the result before rl is made anew, from the parameters before rl.
    """
    workdir = tmp_path / "run"
    rewind(finished.workdir, workdir, 8)
    for file in (workdir / "checkpoints" / "8" / "arrays").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    (workdir / "summary.json").unlink()
    done = train(workdir, data_dir)
    (line,) = done.stderr.splitlines()
    assert f"checkpoint {workdir}/checkpoints/8 is torn (arrays/" in line
    assert line.endswith("): passed over, and kept as incomplete-8 for now")
    assert "going on after step 6 of 10 (rl)" in done.stdout
    assert_same_run(workdir, finished.workdir)
    assert not (workdir / "checkpoints" / "incomplete-8").exists()


def test_no_checkpoint_is_whole(tmp_path, refused, finished):
    """As after a copy without the large files."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").rglob("manifest.ocdbt"):
        file.unlink()
    before = contents(tmp_path / "run")
    line = refused(tmp_path / "run")
    assert line.startswith(f"error: none of the checkpoints in {tmp_path}/run/checkpoints is whole (10: arrays/")
    assert line.endswith("; put a whole one there, or choose another workdir")
    assert contents(tmp_path / "run") | {".lock": b""} == before | {".lock": b""}


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounting.returncode:
        pytest.skip("a disk of its own can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_read_only_disk(disk, refused, finished):
    shutil.copytree(finished.workdir, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    before = contents(disk / "run")
    for workdir in (disk / "run", disk / "new"):
        line = refused(workdir)
        assert line == f"error: cannot write to workdir {workdir}: Read-only file system; choose another --workdir"
    line = refused(disk.parent / "run", data__data_dir=disk / "data")
    assert f"cannot prepare the data set scenes in {disk}/data: Read-only file system; choose another data dir" in line
    assert contents(disk / "run") == before


def test_a_directory_of_the_run_that_can_not_be_written(disk, refused, finished, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "samples", disk, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    shutil.rmtree(tmp_path / "run" / "samples")
    (tmp_path / "run" / "samples").symlink_to(disk)
    before = contents(tmp_path / "run")
    line = refused(tmp_path / "run", stages__rl__steps=8)
    assert line == (f"error: cannot write to {tmp_path}/run/samples; let it be written to, or choose another --workdir")
    assert contents(tmp_path / "run") == before


def test_full_disk(disk, data_dir, finished):
    """A disk with less room than is needed, once for each kind of file that a run writes; then it is made free."""
    workdir, trained, filler = disk / "run", disk / "trained", disk / "filler"
    rewind(finished.workdir, workdir, 8)
    (workdir / "samples" / "eval-rl.jsonl").unlink()  # The first run that resumes would, and use its room.
    rewind(finished.workdir, trained, 10)  # Only the model is to be written: checkpoints differ in size by half.
    weights = (finished.workdir / "model" / "model.safetensors").stat().st_size
    rooms = {"config.json": 0, "samples": 8_192, "checkpoints": 131_072, "model": weights // 2}
    for kind, room in rooms.items():
        run, steps = (trained, [2, 4, 6, 8, 10]) if kind == "model" else (workdir, [2, 4, 6, 8])
        filler.unlink(missing_ok=True)
        state = os.statvfs(disk)
        filler.write_bytes(bytes(state.f_bavail * state.f_frsize - room))
        line = the_one_line(train(run, data_dir, expected=2).stderr)
        assert "no space left on" in line.lower()
        assert f"{run}/{kind}" in line
        assert partial_files(disk) == []
        assert checkpoints(run) == steps
    filler.unlink()
    for run in (workdir, trained):
        train(run, data_dir)
        assert_same_run(run, finished.workdir)
