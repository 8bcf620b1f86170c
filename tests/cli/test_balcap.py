"""The command `balcap`: what it lists, what it imports, and that it is the command that it starts."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import balcap_jax
from balcap_jax import __main__ as balcap
from balcap_jax.cli.process import memory_problem

PACKAGE = Path(balcap_jax.__file__).parent


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_it_has_every_command_of_the_package():
    """Those are the modules that end by running themselves."""
    modules = [path for path in PACKAGE.rglob("*.py") if '\nif __name__ == "__main__":\n' in path.read_text()]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in modules} - {"__main__"}
    assert {name.removesuffix(".__main__") for name in names} == set(balcap.COMMANDS)
    assert {name.removesuffix(".__main__") for name in names if "." in name} == set(balcap._FOLDERS)


def test_help_has_a_line_of_each_command_in_80_columns(capsys):
    balcap.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(balcap.COMMANDS)


def test_version(capsys):
    balcap.main(["--version"])
    assert capsys.readouterr().out == f"balcap {balcap_jax.__version__}\n"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "error: name a command (see balcap --help)"),
        (["trian", "--config=scenes"], "error: there is no command 'trian'; did you mean train?"),
        (["--config=scenes"], "error: there is no command '--config=scenes'; balcap --help lists them"),
        (["a\nb"], r"error: there is no command 'a\nb'; balcap --help lists them"),
    ],
)
def test_no_such_command(given, line, capsys):
    with pytest.raises(SystemExit) as ended:
        balcap.main(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("command", balcap.COMMANDS)
def test_each_command_is_called_by_its_own_name(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(balcap, "prepare_import", lambda command: None)  # It would change the tests' own process.
    module = importlib.import_module(f"balcap_jax.{command}{'.__main__' if command in balcap._FOLDERS else ''}")
    monkeypatch.setattr(module, "main", module.main.__wrapped__)  # Without the changes that a command makes.
    with pytest.raises(SystemExit) as ended:
        balcap.main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: balcap {command} ")


def test_it_imports_nothing_but_the_command():
    program = """
import sys
from balcap_jax import __main__ as balcap
balcap.main(["--help"])
assert not {"numpy", "pydantic", "ml_collections"} & set(sys.modules)
balcap.main(["config", "--source=forkme"])
assert "ml_collections" in sys.modules
assert not {"jax", "balcap_jax.train", "balcap_jax.report"} & set(sys.modules)
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert "def get_config(variant" in done.stdout


def test_exit_status_and_message_are_those_of_the_command():
    arguments = ["--config=scenes", "--config.seed=x"]
    program = "import sys; from balcap_jax.__main__ import main; main(['config', *sys.argv[1:]])"
    by_name = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    module = [sys.executable, "-m", "balcap_jax.config", *arguments]
    by_module = subprocess.run(module, capture_output=True, text=True, timeout=120)
    assert (by_name.returncode, by_name.stderr) == (by_module.returncode, by_module.stderr)
    assert by_name.returncode == 2
    assert by_name.stderr.startswith("error: config field 'seed' must be an integer, got 'x' (seed of ")


def test_a_reward_of_ones_own_lies_in_the_current_folder(tmp_path):
    """An installed command, other than `python -m`, has only its own folder and the packages to import from."""
    folder, scripts = tmp_path / "mine", tmp_path / "bin"
    folder.mkdir()
    scripts.mkdir()
    (folder / "myrewards.py").write_text(
        "from balcap_jax.rewards.base import RewardFn\n\n\nclass Colours(RewardFn):\n    names = ('colours',)\n"
        "    gated = (False,)\n    __call__ = None\n"
    )
    (folder / "numpy.py").write_text("raise ImportError('a file of the user, which hides no package')\n")
    (scripts / "balcap").write_text("from balcap_jax.__main__ import main\nmain()\n")
    fields = ["--config.rewards.name=myrewards:Colours", "--config.rewards.weights=1"]
    command = [sys.executable, str(scripts / "balcap"), "config", "--config=scenes", *fields]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    elsewhere = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert elsewhere.returncode == 2
    assert "No module named 'myrewards'" in elsewhere.stderr


def test_ctrl_c_during_imports_ends_in_a_line():
    program = """
import importlib, os, signal
from balcap_jax import __main__ as balcap
importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)
balcap.main(["train"])
"""
    done = run(program)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_too_little_memory_for_a_command_is_said_before_its_imports():
    program = """
import resource
from balcap_jax.__main__ import main
resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))
main(["train"])
"""
    assert memory_problem("train") is None
    done = run(program)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this process is limited to 1.00 GB of address space (ulimit -v), and train ")
