"""The install cell: what it installs beside which device, after a failed try, and when it asks for a restart."""

import glob
import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import pytest
from notebooks.kernels import NOTEBOOKS

CODE = compile((NOTEBOOKS / "install.py").read_text(), "install.py", "exec")
DEVICES = {"cuda": "/dev/nvidia[0-9]*", "tpu": "/dev/accel*"}
PLUGINS = {"cuda": "jax_cuda12_plugin", "tpu": "libtpu"}
ADDRESS = "git+https://github.com/your-account/balcap_jax"


class Session:
    """A kernel that lacks the modules `absent` and has a device for `extra`; `pip` says what each installation does."""

    def __init__(self, monkeypatch, absent=(), extra="", pip=()):
        self.absent, self.names, self.commands = set(absent), {}, []
        self.versions, pip = {"numpy": "1.0", "pillow": "1.0"}, iter(pip)
        found = importlib.util.find_spec
        here = lambda name: name not in self.absent and (name in PLUGINS.values() or found(name))  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", here)
        monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] if pattern == DEVICES.get(extra) else [])

        def run(command, **options):
            self.commands.append(command)
            return next(pip)(self)

        monkeypatch.setattr(subprocess, "run", run)
        real = importlib.metadata.distributions

        def distributions(**context):  # Those of jax's plugins are among the real ones.
            own = [
                types.SimpleNamespace(metadata={"Name": name}, version=version, _normalized_name=name, entry_points=())
                for name, version in self.versions.items()
            ]
            return [*real(**context), *own]

        monkeypatch.setattr(importlib.metadata, "distributions", distributions)
        owners = {"numpy": ["numpy"], "a_module_not_loaded": ["pillow"]}
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
        monkeypatch.delenv("BALCAP_JAX_PACKAGE", raising=False)

    def cell(self):
        exec(CODE, self.names)

    def stops(self) -> str:
        """The one line that the cell ends with."""
        with pytest.raises(Exception) as raised:
            self.cell()
        assert type(raised.value).__name__ == "Stop"
        assert raised.value._render_traceback_() == [str(raised.value)]
        return str(raised.value)


def succeeds(session):
    session.absent.clear()
    return types.SimpleNamespace(returncode=0, stdout="", stderr="")


def fails(session):
    return types.SimpleNamespace(returncode=1, stdout="", stderr="ERROR: no such host\n")


def renews(*names):
    def pip(session):
        session.versions |= dict.fromkeys(names, "2.0")
        return succeeds(session)

    return pip


def test_nothing_is_installed_where_all_is_there(monkeypatch, capsys):
    session = Session(monkeypatch)
    session.cell()
    assert session.commands == []
    versions, devices = capsys.readouterr().out.splitlines()
    assert versions.startswith("balcap_jax ")
    assert devices == "[CpuDevice(id=0), " + ", ".join(f"CpuDevice(id={i})" for i in range(1, 8)) + "]"


@pytest.mark.parametrize("extra", ["", "cuda", "tpu"])
def test_it_installs_for_the_device_that_is_there(monkeypatch, extra):
    session = Session(monkeypatch, {"balcap_jax", PLUGINS.get(extra, "")}, extra, [succeeds])
    if extra:
        # These tests see CPUs alone: as on a machine whose driver does not fit.
        assert session.stops().startswith(f"jax does not see the device for [{extra}]: restart the session")
    else:
        session.cell()
    requirement = f"balcap-jax{f'[{extra}]' if extra else ''} @ {ADDRESS}"
    assert session.commands == [[sys.executable, "-m", "pip", "install", "-q", requirement, "matplotlib"]]


def test_a_cpu_that_is_asked_for_needs_no_plugin(monkeypatch):
    session = Session(monkeypatch, {PLUGINS["cuda"]}, "cuda")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    session.cell()
    assert session.commands == []


def test_a_failed_try_is_repeated(monkeypatch, capsys):
    session = Session(monkeypatch, {"balcap_jax"}, pip=[fails, fails, succeeds])
    for _ in range(2):
        assert session.stops() == f"pip could not install balcap-jax @ {ADDRESS}: see above, and run this cell again."
        assert "ERROR: no such host" in capsys.readouterr().out
    session.cell()
    assert len(session.commands) == 3
    session.cell()
    assert len(session.commands) == 3


def test_a_restart_is_asked_for_until_it_comes_where_a_loaded_package_changed(monkeypatch):
    session = Session(monkeypatch, {"balcap_jax"}, pip=[renews("numpy", "pillow")])
    asked = "Restart the session and run all cells again: it still holds the old numpy."
    assert [session.stops(), session.stops()] == [asked, asked]
    session.names = {}  # What a restart leaves.
    session.cell()
    assert len(session.commands) == 1


def test_no_restart_where_nothing_that_is_loaded_changed(monkeypatch):
    session = Session(monkeypatch, {"balcap_jax"}, pip=[renews("pillow", "a new one")])
    session.cell()
    assert len(session.commands) == 1


def test_a_wheel_is_named_by_its_path_or_address(monkeypatch, tmp_path):
    wheel = tmp_path / "with a blank" / "balcap_jax-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    for package, end in ((str(wheel), f" @ {wheel.as_uri()}"), ("https://a.example/b.whl", " @ https://a.example/b.whl"),
                         ("", "")):  # fmt: skip
        session = Session(monkeypatch, {"balcap_jax"}, pip=[succeeds])
        monkeypatch.setenv("BALCAP_JAX_PACKAGE", package)
        session.cell()
        assert session.commands[0][-2] == f"balcap-jax{end}"
    assert "%20" in wheel.as_uri()
