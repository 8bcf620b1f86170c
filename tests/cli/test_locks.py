"""Whom a lock keeps out, and what is said where the disk has none."""

import contextlib
import errno
import fcntl
import os

import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, _warn_once, hold_lock
from balcap_jax.config import recipes
from balcap_jax.training import workdir


@pytest.fixture
def refusing(monkeypatch):
    """`refusing(number)`: from then on flock fails with that errno."""
    _warn_once.cache_clear()

    def set_errno(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return set_errno


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_used_and_said_once(refusing, tmp_path, caplog, number):
    refusing(number)
    for name in ("a.jsonl", "b.jsonl"):
        with AppendedLines(tmp_path / name) as lines:
            lines.append([{"id": name}])
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} has no locks ({os.strerror(number)}): nothing keeps another process from writing there too"
    ]
    with workdir.claim(tmp_path / "run", recipes.default_config()):
        assert not workdir.is_held(tmp_path / "run")
    assert len(caplog.records) == 2


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EWOULDBLOCK])
def test_only_a_held_lock_is_another_process(refusing, stack, tmp_path, number):
    refusing(number)
    with pytest.raises(UserError, match="is being written by another process"):
        stack.enter_context(AppendedLines(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="another process is training in"):
        stack.enter_context(workdir.claim(tmp_path / "run", recipes.default_config()))


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.EINVAL])
def test_any_other_error_names_its_cause(refusing, stack, tmp_path, number):
    refusing(number)
    with pytest.raises(UserError, match=f"cannot be written .{os.strerror(number)}"):
        stack.enter_context(AppendedLines(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=f"cannot write to workdir .*: {os.strerror(number)}"):
        stack.enter_context(workdir.claim(tmp_path / "run", recipes.default_config()))


def test_a_lock_that_another_holds(tmp_path):
    path = tmp_path / "a"
    with path.open("w") as one, path.open("w") as other:
        assert hold_lock(one, path)
        assert not hold_lock(other, path)
    with path.open("w") as later:
        assert hold_lock(later, path)
