"""How commands end: on Ctrl-C before and after they begin, and on JSON that others wrote."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import balcap_jax
from balcap_jax.cli import disk_errors, json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, read_json, read_json_object, read_jsonl, replace_file
from balcap_jax.cli.process import quieten_libraries
from balcap_jax.training.workdir import dump_samples

ROOT = Path(__file__).parents[2]

IMPORTS = """from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
"""


def ending(program: str) -> tuple[int, str]:
    """(exit status, stderr) of a Python program that begins with the usual handler of Ctrl-C."""
    begin = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    done = subprocess.run([sys.executable, "-c", begin + program], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_ctrl_c_while_a_command_is_imported_is_one_line():
    """`python -m balcap_jax.train` imports the package with argv ["-m"], and the command's own imports follow."""
    swallowed = "try:\n os.kill(os.getpid(), signal.SIGINT)\n for _ in range(9): pass\nexcept BaseException: pass"
    assert ending(f"sys.argv = ['-m']\nimport balcap_jax\n{swallowed}") == (130, "interrupted\n")
    # A program that uses the package, or a job in the background, keeps what it had.
    kept = "import balcap_jax\nassert signal.getsignal(signal.SIGINT) is {}"
    assert ending("sys.argv = ['-c']\n" + kept.format("signal.default_int_handler")) == (0, "")
    ignored = "sys.argv = ['-m']\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert ending(ignored + kept.format("signal.SIG_IGN")) == (0, "")


def test_ctrl_c_in_a_command_lets_it_clean_up():
    program = """sys.argv = ['-m']
from balcap_jax.cli.process import exit_on_user_error
@exit_on_user_error
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(9): pass
    finally:
        print("cleaned", file=sys.stderr)
main()"""
    assert ending(program) == (130, "cleaned\ninterrupted\n")


def test_paths_that_are_no_text_can_be_printed():
    program = "from balcap_jax.cli.process import exit_on_user_error\nexit_on_user_error(print)('a\\udcff.jpg')"
    assert ending(program) == (0, "")


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("opened", ["open('/dev/full', 'w')", "io.TextIOWrapper(open('/dev/full', 'wb', 0), 'utf-8')"])
def test_a_full_disk_that_a_log_is_written_to_is_one_line(opened, flush):
    program = f"import io\nfrom balcap_jax.cli.process import exit_on_user_error\nsys.stdout = {opened}\n"
    status, errors = ending(program + f"exit_on_user_error(print)('a line', flush={flush})")
    line = "error: cannot write what this command prints: No space left on device; make room and run it again\n"
    assert (status, errors) == (2, line)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("os.write(os.open('/dev/full', os.O_WRONLY), b'x')", r"No space left on device; mend .*"),
        ("os.fsync(os.pipe()[0])", r"Invalid argument; mend .*"),
        ("os.unlink('none')", "none: No such file or directory; mend .*"),
        ("os.rename('none', 'other')", "none -> other: No such file or directory; mend .*"),
        ("os.mkdir(b'/proc/\\xff')", r"/proc/\\udcff: No such file or directory; mend .*"),
        ("[0] * 2**60", "there is too little memory .*"),
        ("exec('raise OSError(12, \"Cannot allocate memory\")')", "there is too little memory .*"),
        ("exec('raise RuntimeError(\"RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\")')", "there is too .*"),
        ("exec('raise RuntimeError(\"can\\\\\\'t start new thread\")')", "there is too little memory .*"),
        ("exec('raise UserError(\"a\\\\nb\")')", r"a\\nb"),
    ],
)
def test_what_the_system_refuses_is_one_line(raised, line):
    program = f"{IMPORTS}exit_on_user_error(lambda: {raised})()"
    status, errors = ending(program)
    assert status == 2
    assert re.fullmatch(rf"error: (<string>, line 4 \(.*\): |process.py, line \d+ \(.*\): )?{line}\n", errors), errors


def test_a_mistake_of_ours_keeps_its_traceback():
    for raised in ("RuntimeError('odd')", "OSError('odd')", "ValueError('RESOURCE_EXHAUSTED')"):
        program = (
            f"from balcap_jax.cli.process import exit_on_user_error\nexit_on_user_error(exec)({f'raise {raised}'!r})"
        )
        status, errors = ending(program)
        assert status == 1
        assert errors.startswith("Traceback")


@pytest.mark.parametrize("lost", ["sys.stderr.close()", "sys.stderr = None", "sys.stderr.detach()"])
def test_a_line_is_said_without_stderr(lost):
    program = f"{IMPORTS}def main():\n"
    assert ending(f"{program}    {lost}\n    raise UserError('ö')\nexit_on_user_error(main)()") == (2, "error: ö\n")


def test_a_closed_stdout_is_no_error():
    program = "from balcap_jax.cli.process import exit_on_user_error\nsys.stdout = None\n"
    assert ending(program + "exit_on_user_error(print)('a line')") == (0, "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": ', "Expecting value: line 1 column 7 (char 6)"),
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b'{"a": "\xff"}', "not a text file"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 200_000, "nested too deeply"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair is no character"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair is no character"),
        (b'"\xed\xa0\x80"', "not a text file"),
        (b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b'{"a": ' * 150 + b"1" + b"}" * 150, "nested too deeply"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, "write it again")
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{path} is not JSON ")
    assert str(caught.value).endswith("); write it again")
    assert "\n" not in str(caught.value)


def test_json_that_can_be_read(tmp_path):
    path = tmp_path / "a.json"
    value = {"a": "\U0001f600 ü", "b": [1, None, "\\ud83d"]}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), "\ufeff" + json.dumps(value)):
        path.write_text(text)
        assert read_json_object(path, "") == value
    path.write_text("[]")
    with pytest.raises(UserError, match=r"a\.json is no JSON object; write it again"):
        read_json_object(path, "write it again")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); write it again"):
        read_json(tmp_path, "write it again")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", "")


VALUE = {"a": [float("nan"), (float("inf"), np.float64("nan"))], "b": {"c": -float("inf")}, "d": 1.5, "e": "NaN"}
WRITTEN = {"a": [None, [None, None]], "b": {"c": None}, "d": 1.5, "e": "NaN"}


def strictly(text: str):
    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_no_json_that_we_write_holds_nan(tmp_path):
    assert strictly(json_text.dumps(VALUE, indent=1)) == WRITTEN
    assert list(map(strictly, json_text.lines([VALUE, {}]).splitlines())) == [WRITTEN, {}]
    fine = {"b": [1, 2.5, None, "ü"], "a": True}
    for layout in ({}, {"indent": 2, "sort_keys": True}, {"ensure_ascii": False}):
        assert json_text.dumps(fine, **layout) == json.dumps(fine, **layout)
    with AppendedLines(tmp_path / "a.jsonl") as lines:
        lines.append([VALUE])
        lines.replace([VALUE, VALUE])
    with AppendedLines(tmp_path / "a.jsonl") as lines:
        assert lines.entries == [WRITTEN] * 2
    assert list(map(strictly, (tmp_path / "a.jsonl").read_text().splitlines())) == [WRITTEN] * 2
    dump_samples(tmp_path, 3, [VALUE])
    assert strictly((tmp_path / "samples" / "step-000003.jsonl").read_text()) == WRITTEN
    for value in ({"a": {1, 2}}, {"a": np.float32(1)}, {("a", 1): 1}, {"a": b"x"}):
        with pytest.raises(TypeError):
            json_text.dumps(value)


def test_all_json_that_is_kept_is_written_by_one_function():
    """Beside it: digests and what is sent to servers, and the data of scenes, which holds whole numbers."""
    others = {"client.py", "endpoint.py", "replies.py", "facts.py", "world.py", "builder.py"}
    files = Path(balcap_jax.__file__).parent.rglob("*.py")
    found = {path.name for path in files if "json.dump" in path.read_text().replace("json_text.dump", "")}
    assert found - others == {"json_text.py"}


def test_what_tensorstore_says_of_a_full_disk_is_not_logged_beside_the_line(caplog):
    quieten_libraries()
    log = logging.getLogger("asyncio")
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        log.error(
            "Future exception was never retrieved\nfuture: <Future exception=ValueError('RESOURCE_EXHAUSTED: Error "
            'writing local file "/disk/run/model.writing/params/0": No space left on device\')>'
        )
        log.error("another task was destroyed")
    assert [record.getMessage() for record in caplog.records] == ["another task was destroyed"]


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "a", b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("writes", "patience", "stays"), [(0, 60, False), (3, 60, False), (10**6, 0, True)])
def test_a_directory_that_is_still_written_to_is_removed_for_good(tmp_path, monkeypatch, writes, patience, stays):
    """As by TensorStore, whose other writes go on after the first one has failed."""
    folder, calls = tmp_path / "aside", []

    def sleep(seconds: float) -> None:
        calls.append(seconds)
        if len(calls) <= writes:
            (folder / "array").mkdir(parents=True)
            (folder / "array" / "0").write_text("x")

    monkeypatch.setattr(disk_errors.time, "sleep", sleep)
    disk_errors.remove_unfinished(folder, patience=patience)
    assert folder.exists() == stays
    assert len(calls) == (1 if stays else writes + 1)


def test_numbers_that_no_float_holds():
    odd = (10**400, -(10**5000), Fraction(10**400, 3), math.nan, math.inf, True, "1", None, 1j, [1])
    assert [json_text.is_number(value) for value in odd] == [False] * len(odd)
    assert all(map(json_text.is_number, (0, -1.5, 10**300, Fraction(1, 3), np.float32(1))))
    assert json_text.decode("[" * 99 + "1" * 300 + "]" * 99)
    assert json_text.decode(f"[{10**400}, -{'9' * 5000}, {10**299}]") == [math.inf, -math.inf, 10**299]


def test_an_error_is_one_line_whatever_it_quotes():
    for odd in ("a\nb", "\r\n", "\x85\u2028\x0c", "\x1b[2J", "\0"):
        assert len(str(UserError(f"{odd} is wrong")).splitlines()) == 1
        assert "\x1b" not in str(UserError(odd))
    long = str(UserError("file: " + "x" * 100_000 + "; write it again"))
    assert len(long) < 3000
    assert long.startswith("file: xxx")
    assert long.endswith("xxx; write it again")
    assert str(UserError("a\\nb ü \u3000")) == "a\\nb ü \u3000"


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "device")
    (tmp_path / "lines.jsonl").write_bytes(b"{}\n")
    os.truncate(tmp_path / "lines.jsonl", 1 << 40)
    for name, reason in (("pipe", "no regular file"), ("device", "no regular file"), ("", "Is a directory")):
        with pytest.raises(UserError, match=rf"cannot be read \({reason}\); mend it"):
            read_json(tmp_path / name, "mend it")
        with pytest.raises(UserError, match=rf"cannot be read \({reason}\); mend it"):
            next(read_jsonl(tmp_path / name, "mend it"))
    with pytest.raises(UserError, match="1,099,511,627,776 bytes are more than"):
        read_json(tmp_path / "lines.jsonl", "mend it")
    lines = read_jsonl(tmp_path / "lines.jsonl", "mend it")
    assert next(lines) == (f"{tmp_path}/lines.jsonl, line 1", {})
    with pytest.raises(UserError, match="a line has more than 64 MiB"):
        next(lines)
