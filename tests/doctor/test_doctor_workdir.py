"""What `doctor` finds of the workdir and its disk: each planted fault by name."""

import os
import types
from pathlib import Path

import pytest
from doctor.set_up import assert_fault

from balcap_jax.config import recipes
from balcap_jax.doctor import __main__ as doctor
from balcap_jax.doctor import checkpoint, places
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding
from balcap_jax.training.workdir import claim


def test_the_workdir_of_another_config(sound, tmp_path):
    (tmp_path / "config.json").write_text(recipes.to_text(sound.config(seed=7)))
    finding = places.workdir(sound.config(), str(tmp_path))
    assert_fault(finding, "workdir", "holds a run of another config (seed: 7 -> 0)", "choose another --workdir")
    assert "the run there goes on" in places.workdir(sound.config(seed=7), str(tmp_path)).found


def test_a_workdir_with_a_model_and_no_checkpoint(sound, tmp_path):
    (tmp_path / "config.json").write_text(recipes.to_text(sound.config()))
    (tmp_path / "model").mkdir()
    finding = places.workdir(sound.config(), str(tmp_path))
    assert_fault(
        finding, "workdir", "holds a trained model and no checkpoint to go on from", "choose another --workdir"
    )
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert places.workdir(sound.config(), str(tmp_path)).verdict == OK


def test_a_workdir_that_is_a_file(sound, tmp_path):
    (tmp_path / "file").touch()
    finding = places.workdir(sound.config(), str(tmp_path / "file"))
    found = f"cannot write to workdir {tmp_path / 'file'}: it is a file, and a run takes a folder"
    assert_fault(finding, "workdir", found, "choose another --workdir")


def test_without_a_workdir_the_last_line_says_so(sound, tmp_path, capsys):
    given = [argument for argument in sound.command(tmp_path) if not argument.startswith("--workdir")]
    doctor.main(given)
    output, errors = capsys.readouterr()
    last = "ready, but for the place of the run: without --workdir neither that nor the room on its disk was looked at"
    assert (output.splitlines()[-1], errors) == (last, "")


def test_a_workdir_below_a_file(sound, tmp_path):
    (tmp_path / "file").touch()
    finding = places.workdir(sound.config(), str(tmp_path / "file" / "run"))
    assert_fault(finding, "workdir", "cannot write to workdir", "choose another --workdir")


def test_a_workdir_in_use(sound, tmp_path):
    with claim(tmp_path / "run", sound.config()):
        finding = places.workdir(sound.config(), str(tmp_path / "run"))
    assert_fault(finding, "workdir", "another process is training in", "choose another --workdir")


def test_a_disk_without_renames(sound, tmp_path, monkeypatch):
    def refused(path: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported", str(path))

    monkeypatch.setattr(places, "rename_directory", refused)
    finding = places.workdir(sound.config(), str(tmp_path / "run"))
    assert_fault(finding, "workdir", "does not take what training does to it: Operation not supported", "renames")
    assert os.listdir(tmp_path) == []


def test_room_is_not_guessed_for_a_model_or_a_place_that_is_not_known(sound, tmp_path):
    path, place = sound.folder / "none", "/proc/nope/x"
    for workdir, given, first in (
        (tmp_path / "run", {"model__path": path}, "checkpoint"),
        (place, {}, "workdir"),
    ):
        found = {finding.check: finding for finding in doctor.examine(sound.config(**given), str(workdir))[0]}
        assert [name for name, finding in found.items() if finding.verdict == FAULT] == [first]
        assert found["disk"] == Finding("disk", UNCHECKED, f"the {first} comes first")


def test_both_amounts_have_one_unit(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3_150_000))
    finding = places.disk(sound.config(judge__cache_gb=0.02), str(tmp_path / "run"))
    assert finding.found.startswith("0.00 GB are free at ")
    assert " 0.02 GB are needed" in finding.found


def test_too_many_checkpoints_for_the_disk(sound, tmp_path):
    finding = places.disk(sound.config(checkpoint__keep=100_000_000), str(tmp_path / "run"))
    assert_fault(finding, "disk", f"are free at {tmp_path / 'run'}, ", "lower checkpoint.keep")


def test_a_cache_larger_than_its_disk(sound, tmp_path):
    finding = places.disk(sound.config(judge__cache_gb=1e6), str(tmp_path / "run"))
    assert_fault(finding, "disk", "1,000,000.00 GB", "lower judge.cache_gb")


def test_a_cache_that_cannot_be_written(sound, tmp_path):
    (tmp_path / "file").touch()
    finding = places.disk(sound.config(judge__cache_dir=tmp_path / "file" / "cache"), str(tmp_path / "run"))
    assert_fault(finding, "disk", f"cannot be kept in {tmp_path / 'file' / 'cache'} (judge.cache_dir): Not a", "name a")
    finding = places.disk(sound.config(judge__cache_dir=tmp_path / "new" / "cache"), str(tmp_path / "run"))
    assert finding.verdict == OK
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_bytes_of_a_checkpoint(sound, built):
    """By hand: trained numbers in float32 with two moments, the frozen tower in bfloat16, and captions in flight."""
    size = places.sizes(sound.config(), built.file_bytes)
    flat = {
        "/".join(key.key for key in path): leaf for path, leaf in checkpoint.jax.tree.leaves_with_path(built.params)
    }
    frozen = sum(leaf.size for path, leaf in flat.items() if path.startswith(("vision/", "merger/")))
    trained = sum(leaf.size for leaf in flat.values()) - frozen
    tokens = 2 * 4 * 16 * (4 + 1 + 4) + 2 * 4 * (4 + 1) + 2 * 4 + 2 * 16 * 24 * 4
    assert size.each == pytest.approx(12 * trained + 2 * frozen + tokens, abs=4096)
    assert size.checkpoints == (2 + 1 + 1) * size.each, "two are kept, one is written, one is the best"
    assert size.models == 2 * 2 * (trained + frozen)
