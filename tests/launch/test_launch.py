"""The launch scripts, run on a copy of the repository against a fake Python, and the packaging metadata."""

import fnmatch
import itertools
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

import balcap_jax

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["launch/environment.sh", "launch/quickstart.sh", "launch/test.sh", ".ci/run"]

# Stands for every interpreter: logs how it is called, and does of `-m venv`, `-m pip install` and the trainer what the
# scripts rely on. FAKE_VERSION is what it pretends to be. A file named fail-pip or slow-pip or slow-train beside the
# log makes that step fail or hang.
FAKE_PYTHON = r"""#!/bin/bash
state="$FAKE_STATE"
case "$1 $2" in
  "-c import sys;"*) case "$FAKE_VERSION" in 3.10.*|2.*) exit 1 ;; *) exit 0 ;; esac ;;
  "-c import ensurepip"*) [[ ! -e "$state/no-venv" ]]; exit ;;
  "-V "*) echo "Python $FAKE_VERSION"; exit ;;
esac
echo "$*" >> "$state/log"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip")
    [[ -e "$state/fail-pip" ]] && { echo "no network" >&2; exit 1; }
    [[ -e "$state/slow-pip" ]] && { touch "$state/in-pip"; sleep 60; }
    exit 0 ;;
  "-m balcap_jax.train")
    for argument in "$@"; do
      case "$argument" in --workdir=*) workdir="${argument#--workdir=}" ;; esac
    done
    mkdir -p "$workdir"
    if [[ -e "$state/slow-train" ]]; then
      save() {
        touch "$state/in-save"
        while [[ -e "$state/slow-save" ]]; do sleep 0.05; done
        echo "saved at step 3"
        exit 0
      }
      trap save TERM
      touch "$state/in-train"
      while true; do sleep 0.05; done
    fi
    [[ -e "$state/fail-train" ]] && { echo "error: bad config" >&2; exit 2; }
    echo "before/after table"
    echo page > "$workdir/report.html" ;;
  "-m ruff") [[ ! -e "$state/fail-ruff" ]] ;;
  "-m pytest") echo "7 passed in 0.01s" ;;
esac
"""


class Clone:
    """A copy of the scripts under a path with a space, and a PATH whose every python is the fake one."""

    def __init__(self, tmp_path: Path):
        self.root = tmp_path / "a clone"
        self.state = tmp_path / "state"
        self.bin = tmp_path / "bin"
        for directory in (self.root, self.state, self.bin):
            directory.mkdir()
        for name in ("launch", ".ci"):
            shutil.copytree(ROOT / name, self.root / name)
        (self.root / "setup.py").write_text("first\n")
        for name in ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14"):
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)

    def environment(self, version: str = "3.11.7", **extra: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "FAKE_STATE": str(self.state),
            "FAKE_VERSION": version,
            "HOME": str(self.state),
            **extra,
        }

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str):
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=cwd or self.root,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=30,
        )

    def start(self, script: str) -> subprocess.Popen:
        """Starts a script in a process group of its own, as a terminal does."""
        return subprocess.Popen(
            ["bash", str(self.root / script)],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def calls(self, module: str) -> list[str]:
        """The logged calls of `python -m module`, without the module's name."""
        log = self.state / "log"
        prefix = f"-m {module} "
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]

    def mark(self, name: str) -> None:
        (self.state / name).touch()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.state / name).exists():
            assert time.monotonic() < deadline, f"{name} did not appear"
            time.sleep(0.02)


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    result = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_no_findings(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == ""


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh", ".ci/run"])
def test_entry_scripts_are_executable(script):
    assert os.access(ROOT / script, os.X_OK)


# --- the environment ---


def test_first_run_installs_and_the_second_does_not_call_pip(clone):
    first = clone.run("launch/quickstart.sh")
    assert first.returncode == 0, first.stderr
    assert clone.calls("venv") == [f"{clone.root}/.venv"]
    assert [call.split()[0] for call in clone.calls("pip")] == ["install"]
    assert clone.calls("pip")[0].endswith(f"--editable {clone.root}")
    clone.mark("fail-pip")  # as if the network were gone
    second = clone.run("launch/quickstart.sh")
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("before/after table")
    assert len(clone.calls("pip")) == len(clone.calls("venv")) == 1
    assert len(clone.calls("balcap_jax.train")) == 2


def test_a_changed_setup_installs_again_into_the_same_environment(clone):
    clone.run("launch/quickstart.sh")
    (clone.root / "setup.py").write_text("second\n")
    clone.run("launch/quickstart.sh")
    clone.run("launch/quickstart.sh")
    assert (len(clone.calls("venv")), len(clone.calls("pip"))) == (1, 2)


def test_another_python_in_the_environment_installs_again(clone):
    clone.run("launch/quickstart.sh", version="3.11.7")
    clone.run("launch/quickstart.sh", version="3.12.1")
    assert len(clone.calls("pip")) == 2


def test_a_moved_clone_installs_again(clone):
    clone.run("launch/quickstart.sh")
    clone.root = clone.root.rename(clone.root.with_name("moved here"))
    assert clone.run("launch/quickstart.sh").returncode == 0
    assert clone.calls("pip")[1].endswith("--editable " + str(clone.root))


def test_the_test_environment_serves_quickstart_but_not_the_other_way_round(clone):
    clone.run("launch/test.sh")
    clone.run("launch/quickstart.sh")
    assert [call.rsplit("/", 1)[1] for call in clone.calls("pip")] == ["a clone[dev]"]
    shutil.rmtree(clone.root / ".venv")
    clone.run("launch/quickstart.sh")
    clone.run("launch/test.sh")
    assert [call.rsplit("/", 1)[1] for call in clone.calls("pip")][1:] == ["a clone", "a clone[dev]"]


def test_a_failed_installation_is_reported_and_tried_again(clone):
    clone.mark("fail-pip")
    failed = clone.run("launch/quickstart.sh")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: the installation failed")
    assert clone.calls("balcap_jax.train") == []
    (clone.state / "fail-pip").unlink()
    assert clone.run("launch/quickstart.sh").returncode == 0
    assert (len(clone.calls("venv")), len(clone.calls("pip"))) == (1, 2)


def test_a_killed_installation_makes_the_environment_again(clone):
    clone.mark("slow-pip")
    process = clone.start("launch/quickstart.sh")
    clone.wait_for("in-pip")
    (clone.root / ".venv/half-written").touch()
    concurrent = clone.run("launch/quickstart.sh")
    assert concurrent.returncode == 2
    assert f"process {process.pid} is installing" in concurrent.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (clone.state / "slow-pip").unlink()
    result = clone.run("launch/quickstart.sh")
    assert result.returncode == 0, result.stderr
    assert "interrupted" in result.stdout
    assert not (clone.root / ".venv/half-written").exists()
    assert (len(clone.calls("venv")), len(clone.calls("pip"))) == (2, 2)


def test_an_environment_whose_python_does_not_run_is_made_again(clone):
    clone.run("launch/quickstart.sh")
    (clone.root / ".venv/bin/python").write_text("#!/nowhere/python\n")
    assert clone.run("launch/quickstart.sh").returncode == 0
    assert (len(clone.calls("venv")), len(clone.calls("pip"))) == (2, 2)


def test_no_python_that_is_new_enough(clone):
    result = clone.run("launch/quickstart.sh", version="3.10.13")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Python 3.11 or newer on PATH")
    assert len(result.stderr.splitlines()) == 1
    assert not (clone.root / ".venv").exists()


def test_a_stub_that_does_not_run_is_passed_over(clone):
    for name in ("python3", "python3.13"):
        (clone.bin / name).write_text("#!/bin/bash\necho 'no such version' >&2\nexit 127\n")
    result = clone.run("launch/quickstart.sh")
    assert (result.returncode, result.stderr) == (0, "")


def test_python_without_venv_is_named(clone):
    clone.mark("no-venv")
    result = clone.run("launch/quickstart.sh")
    assert result.returncode == 2
    assert "lacks the venv module" in result.stderr


def test_python_variable_chooses_the_interpreter_and_is_not_replaced_silently(clone):
    chosen = clone.root / "my python"
    shutil.copy(clone.bin / "python3", chosen)
    for path in clone.bin.iterdir():
        path.unlink()
    assert clone.run("launch/quickstart.sh", PYTHON=str(chosen)).returncode == 0
    shutil.rmtree(clone.root / ".venv")
    missing = clone.run("launch/quickstart.sh", PYTHON=str(clone.root / "none"))
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: PYTHON=")


# --- quickstart.sh ---


def test_quickstart_trains_in_its_default_workdir_and_names_the_report(clone, tmp_path):
    result = clone.run("launch/quickstart.sh", "--config.seed=3", "--config.model.path=a b", cwd=tmp_path)
    workdir = clone.root / "runs/quickstart"
    assert clone.calls("balcap_jax.train") == [
        f"--config=configs/scenes.py --workdir={workdir} --config.seed=3 --config.model.path=a b"
    ]
    done, report = result.stdout.splitlines()[-2:]
    assert re.fullmatch(r"quickstart: done in \d+ min \d+ s", done)
    assert report == f"report: {workdir}/report.html"


def test_quickstart_takes_a_workdir_relative_to_the_caller(clone, tmp_path):
    clone.run("launch/quickstart.sh", "my run", "--config.seed=3", cwd=tmp_path)
    assert clone.calls("balcap_jax.train") == [
        f"--config=configs/scenes.py --workdir={tmp_path}/my run --config.seed=3"
    ]


def test_quickstart_passes_a_failure_on(clone):
    clone.mark("fail-train")
    result = clone.run("launch/quickstart.sh")
    assert result.returncode == 2
    assert "error: bad config" in result.stderr
    assert "done in" not in result.stdout


@pytest.mark.parametrize("to_group", [False, True], ids=["SIGTERM to the script", "Ctrl-C to the group"])
def test_quickstart_lets_the_trainer_save_when_it_is_stopped(clone, to_group):
    clone.mark("slow-train")
    process = clone.start("launch/quickstart.sh")
    clone.wait_for("in-train")
    if to_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "saved at step 3" in output
    assert "the same command goes on from there" in output.splitlines()[-1]


def test_quickstart_ends_at_once_on_the_second_ctrl_c(clone):
    clone.mark("slow-train")
    clone.mark("slow-save")
    process = clone.start("launch/quickstart.sh")
    clone.wait_for("in-train")
    os.killpg(process.pid, signal.SIGINT)
    clone.wait_for("in-save")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 137
    text = (output + (errors or "")).splitlines()
    assert [line for line in text if "Killed" in line] == []
    assert "stopping after this step (once more: stop at once)" in text
    assert any(line.startswith("quickstart: training ended with status 137 after ") for line in text)


def test_quickstart_prints_its_help_without_installing(clone):
    result = clone.run("launch/quickstart.sh", "--help")
    assert result.returncode == 0
    assert "bash launch/quickstart.sh [WORKDIR]" in result.stdout
    assert not (clone.root / ".venv").exists()


# --- test.sh and .ci/run ---


@pytest.mark.parametrize("script", ["launch/test.sh", ".ci/run"])
def test_checks_run_in_order_and_end_with_pytests_closing_line(clone, tmp_path, script):
    result = clone.run(script, "tests/method", "-k", "gate", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert clone.calls("ruff") == ["check .", "format --check ."]
    options = "-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder"
    assert clone.calls("pytest") == [f"{options} tests/method -k gate"]
    assert result.stdout.splitlines()[-1] == "7 passed in 0.01s"


def test_a_finding_of_ruff_fails_the_whole_but_does_not_hide_the_tests(clone):
    clone.mark("fail-ruff")
    result = clone.run(".ci/run")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "7 passed in 0.01s"


# --- packaging ---


PACKAGE = Path(balcap_jax.__file__).parent  # That of the repository, or of an installed wheel.


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The arguments that setup.py hands to setuptools, which pip brings along and an environment need not have."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, root)
    (root / "balcap_jax").symlink_to(PACKAGE)

    def find_packages(include):
        names = [
            ".".join(("balcap_jax", *path.relative_to(PACKAGE).parts[:-1])) for path in PACKAGE.rglob("__init__.py")
        ]
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in include)]

    seen: dict = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.setup, stand_in.find_packages = lambda **arguments: seen.update(arguments), find_packages
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", stand_in)
        runpy.run_path(str(root / "setup.py"))
    return seen


def requirements(metadata):
    from packaging.requirements import Requirement

    extras = [line for lines in metadata["extras_require"].values() for line in lines]
    return [Requirement(line) for line in metadata["install_requires"]], [Requirement(line) for line in extras]


def test_every_dependency_is_bounded_above_and_below(metadata):
    run_time, extras = requirements(metadata)
    assert len(run_time) >= 15
    for requirement in run_time + extras:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {"=="} or operators - {"!="} == {">=", "<"}, str(requirement)


def test_the_bounds_hold_what_is_installed(metadata):
    import importlib.metadata

    for requirement in requirements(metadata)[0]:
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), str(requirement)


def test_torch_and_tensorflow_do_not_come_with_an_installation(metadata):
    run_time, _ = requirements(metadata)
    assert {"torch", "tensorflow", "tf-nightly"}.isdisjoint(requirement.name for requirement in run_time)
    for extra, lines in metadata["extras_require"].items():
        assert extra == "dev" or not any(line.startswith(("torch", "tensorflow")) for line in lines)


@pytest.mark.parametrize(("version", "wanted"), [("3.11", True), ("3.12", False), ("3.13", False), ("3.14", False)])
def test_the_dev_extra_brings_torch_to_the_oldest_python_alone(metadata, version, wanted):
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in metadata["extras_require"]["dev"]]
    (torch,) = [requirement for requirement in found if requirement.name == "torch"]
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    assert (torch.marker is None or torch.marker.evaluate(environment)) == wanted


def test_every_module_imports_where_torch_and_tensorflow_are_absent():
    """They are hidden, not only looked for afterwards: where torch is installed, transformers imports it by itself."""
    program = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

HIDDEN = ("torch", "tensorflow")
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name in HIDDEN else found(name, path, target)

import balcap_jax
for module in pkgutil.walk_packages(balcap_jax.__path__, "balcap_jax."):
    importlib.import_module(module.name)
    print(module.name)
assert "transformers" in sys.modules and not set(HIDDEN) & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "balcap_jax.advantages" in result.stdout.split()


def test_the_package_holds_its_templates_and_prompts(metadata):
    """Every file of the package that is no module is matched by a pattern of package_data."""
    patterns = [
        Path(package.replace(".", "/"), pattern)
        for package, names in metadata["package_data"].items()
        for pattern in names
    ]
    files = [path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file()]
    others = [path for path in files if path.suffix not in {".py", ".pyc", ".md"}]
    assert [path for path in others if not any(path.match(str(pattern)) for pattern in patterns)] == []
    assert {"balcap_jax.judges", "balcap_jax.configs"} <= set(metadata["packages"])
    assert metadata["package_dir"] == {"balcap_jax.configs": "configs"}


def test_the_command_is_there_and_its_version_is_the_packages(metadata):
    assert metadata["entry_points"] == {"console_scripts": ["balcap = balcap_jax.__main__:main"]}
    assert metadata["version"] == balcap_jax.__version__
    changes = (ROOT / "CHANGELOG.md").read_text().splitlines()
    newest = next(line for line in changes if line.startswith("## "))
    assert newest == f"## {balcap_jax.__version__}"


def test_the_workflow_calls_the_same_command_on_every_python_that_is_named(metadata):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    named = [name.rpartition(" ")[2] for name in metadata["classifiers"] if "Python :: 3." in name]
    for job in ("tests", "wheel"):
        assert workflow["jobs"][job]["strategy"]["matrix"]["python"] == named
    runs = {job: [step["run"] for step in steps["steps"] if "run" in step] for job, steps in workflow["jobs"].items()}
    assert runs["tests"] == [".ci/run"]
    for command in itertools.chain(*runs.values()):
        for word in command.split():
            assert "/" not in word or (ROOT / word).is_file(), word
