"""What is on disk before what: a name counts once its content is synced, and the directory that holds it after it."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, sync, write_text
from balcap_jax.training import checksums
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.training.checksums import _sum, find_damage, seal
from balcap_jax.training.logging import MetricsWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks in /proc at what is synced")


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, Path]]:
    """("sync" or "rename", path) in their order; a rename's is the new name."""
    seen: list[tuple[str, Path]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noting(move):
        def note(self, target):
            result = move(self, target)
            seen.append(("rename", Path(target)))
            return result

        return note

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", noting(rename))
    monkeypatch.setattr(Path, "replace", noting(replace))
    return seen


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_disk_and_only_then_another_goes(tmp_path, events):
    log = tmp_path / "metrics.jsonl"
    with Checkpointer(tmp_path / "new" / "c", keep=1, beside=[log]) as checkpointer:
        assert {("sync", tmp_path), ("sync", tmp_path / "new")} <= set(events)
        checkpointer.save(1, {"x": np.arange(5)})
        checkpointer.wait()
        events.clear()
        log.write_text("{}\n")
        checkpointer.save(2, {"x": np.arange(5)}, {"y": 1})
    named = events.index(("rename", checkpointer.directory / "2"))
    written = checkpointer.directory / "2.orbax-checkpoint-tmp-whole"
    there = [checkpointer.directory / "2", *(checkpointer.directory / "2").rglob("*")]
    synced = {path for kind, path in events[:named] if kind == "sync"}
    for path in there:
        aside = written / path.relative_to(there[0])
        assert {aside, aside.with_name(f"{aside.name}.tmp")} & synced, aside
    assert {log, tmp_path} <= synced
    rest = events[named + 1 :]
    going = rest.index(("rename", checkpointer.directory / "1.orbax-checkpoint-tmp-old"))
    assert ("sync", checkpointer.directory) in rest[:going]


@pytest.mark.parametrize("name", ["held_out", "lines", "metrics"])
def test_a_file_is_replaced_by_one_that_is_on_disk(tmp_path, events, name):
    path = tmp_path / {"held_out": "made/summary.json", "lines": "lines.jsonl", "metrics": "metrics.jsonl"}[name]
    if name == "held_out":
        write_text(path, "{}")
        assert events[0] == ("sync", tmp_path)
    elif name == "lines":
        with AppendedLines(path) as lines:
            lines.append([{"a": 1}])
            assert events == [("sync", tmp_path), ("sync", path)]
            lines.replace([])
    else:
        path.write_text('{"step": 1}\n{"step": 2}\n')
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.truncate(1)
        assert path.read_text() == '{"step": 1}\n'
    renamed = events.index(("rename", path))
    assert events[renamed - 1 : renamed + 2] == [
        ("sync", path.with_name(f"{path.name}.tmp")),
        ("rename", path),
        ("sync", path.parent),
    ]


def test_directories_that_have_nothing_to_sync(tmp_path, monkeypatch):
    """Some network disks say so; a file that cannot be synced is an error, and so is anything else."""
    (tmp_path / "file").write_text("")
    for number, path, fails in (
        (errno.EINVAL, tmp_path, False),
        (errno.EINVAL, tmp_path / "file", True),
        (errno.EIO, tmp_path, True),
    ):

        def refuse(descriptor: int, number=number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        if fails:
            with pytest.raises(OSError, match=os.strerror(number)):
                sync(path)
        else:
            sync(path)


def test_a_checkpoint_that_cannot_be_synced_is_none(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, {"x": np.arange(5)})
        checkpointer.wait()

        def refuse(descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            checkpointer.save(2, {"x": np.arange(5)})
            with pytest.raises(UserError, match=r"input/output error; checkpoint 1 is whole"):
                checkpointer.wait()
        assert checkpointer.steps() == [1]
        checkpointer.save(3, {"x": np.arange(5)})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_what_was_sealed_before_is_not_read_again(tmp_path, monkeypatch):
    for name in ("a/one", "a/b/two", "three"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    seal(tmp_path / "a")
    read, sums = [], _sum
    monkeypatch.setattr(checksums, "_sum", lambda path: read.append(path.name) or sums(path))
    seal(tmp_path)
    assert sorted(read) == ["sums.json", "three"]
    assert find_damage(tmp_path) == find_damage(tmp_path / "a") == ""
    (tmp_path / "a" / "b" / "two").write_text("a/b/twO")
    assert find_damage(tmp_path, content=False) == ""
    assert find_damage(tmp_path) == "a/b/two is damaged"
    shares = [find_damage(tmp_path, share=(part, 4)) for part in range(4)]
    assert sorted(shares) == ["", "", "", "a/b/two is damaged"]
    seal(tmp_path / "a")
    seal(tmp_path)  # What is there now is what is right.
    assert find_damage(tmp_path) == ""
