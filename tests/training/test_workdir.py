"""Whose a workdir is, and what `train` finds in the small files of one."""

import fcntl
import os

import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as configuration
from balcap_jax.training.run import read_position
from balcap_jax.training.workdir import DIRECTORIES, FILES, claim, read_summary

CONFIG = configuration.default_config()
SAVED = {"stage": "rl", "iterator": {"next": 3}, "clock": {"other": 1.5, "save": 2}, "failures": [[0, 9], [1, 9]]}


def message_of(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def take(workdir, error: type[BaseException] | None = None) -> None:
    with claim(workdir, CONFIG):
        assert (workdir / ".lock").exists()
        if error:
            raise error


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError):
        take(tmp_path / "runs" / "new", UserError)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError):
        take(tmp_path / "there", UserError)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_name_that_is_no_text_is_refused(tmp_path):
    assert message_of(take, tmp_path / "a\udcff").endswith("is not UTF-8 text; choose another --workdir")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        take(tmp_path / "run", UserError)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_run_that_has_begun_stays(tmp_path):
    (tmp_path / "config.json").write_text(configuration.to_text(CONFIG))
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, KeyboardInterrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


def test_the_lock_file_of_a_run_that_is_gone_holds_nobody(tmp_path, monkeypatch):
    """Opened before the other run removed it, locked after."""
    flock, late = fcntl.flock, []

    def remove_once(descriptor, operation):
        flock(descriptor, operation)
        if not late:
            late.append(os.dup(descriptor))
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", remove_once)
    with claim(tmp_path, CONFIG):
        assert not os.path.samestat(os.fstat(late[0]), os.stat(tmp_path / ".lock"))
        assert "another process is training" in message_of(take, tmp_path)
    os.close(late[0])


@pytest.mark.parametrize("name", [*FILES, *DIRECTORIES])
def test_a_file_of_another_kind_is_found_before_the_training(tmp_path, name):
    path = tmp_path / name
    path.touch() if name in DIRECTORIES else path.mkdir()
    kind = "directory" if name in DIRECTORIES else "regular file"
    assert message_of(take, tmp_path) == f"{path} is no {kind}; move it away, or choose another --workdir"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("content", ['{"seed": ', "[]", "[" * 100_000, '{"a": 2, "a.b": 1}', "\udcff"])
def test_config_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    message = message_of(take, tmp_path)
    assert message.startswith(f"{tmp_path}/config.json is no")
    assert message.endswith("; choose another --workdir")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '"text"',
        '{"evaluations": {',
        '{"evaluations": "text"}',
        '{"evaluations": NaN}',
        '{"greedy": {"sft": 3}}',
        '{"evaluations": {"sft": null}}',
        '{"a": ' * 100_000,
        "\udcff",
    ],
)
def test_summary_that_is_none(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content.encode(errors="surrogateescape"))
    message = message_of(read_summary, tmp_path)
    assert message.startswith(f"{tmp_path}/summary.json is no")
    assert message.endswith("; delete it to have it made anew")


def test_summary(tmp_path):
    assert read_summary(tmp_path) == {}
    (tmp_path / "summary.json").write_text('{"evaluations": {"sft": {"n": 3}}, "seconds": 3}')
    assert read_summary(tmp_path) == {"evaluations": {"sft": {"n": 3}}, "seconds": 3}


def test_checkpoint_of_ours(tmp_path):
    position = read_position(SAVED, tmp_path / "8")
    assert position.model_dump(include=SAVED.keys()) == SAVED
    assert position.step == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in SAVED),
        ("stage", 3),
        ("clock", {"other": "1"}),
        ("failures", [[1]]),
        ("failures", [["a", 1]]),
        ("failures", 3),
    ],
)
def test_checkpoint_of_something_else(tmp_path, name, value):
    message = message_of(read_position, SAVED | {name: value}, tmp_path / "8")
    assert message.startswith(f"unreadable checkpoint {tmp_path}/8: {name} is missing or odd in its part extra; delete")
    without = {key: entry for key, entry in SAVED.items() if key != name}
    assert message_of(read_position, without, tmp_path / "8") == message
