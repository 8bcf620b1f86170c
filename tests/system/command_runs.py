"""Starts the training command as a user does, and reads back everything that a run leaves behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from forked import Forked

from balcap_jax import models

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("micro.py")
TIMEOUT = 300  # seconds
# XLA says so on stderr when a compilation takes more than two minutes: on a busy machine that is nobody's mistake.
_SLOW_COMPILATION = re.compile(r"^E\d{4} .*slow_operation_alarm\.cc.*\n\*+\n(?:.*\n)*?\*+\n", re.MULTILINE)


def arguments(workdir: Path | str, data_dir: Path, **overrides: Any) -> list[str]:
    """Arguments of balcap_jax.train; an override's name has "__" for each dot."""
    given = [f"--config={RECIPE}", f"--workdir={workdir}", f"--config.data.data_dir={data_dir}"]
    return given + [f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()]


def start(module: str, *given: str, **environment: str) -> Forked | subprocess.Popen:
    """`python -m module arguments`, in a process that sees one device, as on a user's machine."""
    return _start(["-m", module, *given], environment=environment)


def start_afresh(module: str, *given: str, cwd: Path = ROOT) -> subprocess.Popen:
    """The same by an interpreter of its own, as a user starts it."""
    return _start(["-m", module, *given], cwd, afresh=True)


def start_interrupted(number: signal.Signals, where: str, *given: str) -> Forked | subprocess.Popen:
    """Training that receives a signal at a point of `interrupted.py`."""
    return start_script("interrupted.py", number.name, where, *given)


def start_script(name: str, *given: str, **environment: str) -> Forked | subprocess.Popen:
    """A script of this folder."""
    return _start([str(Path(__file__).with_name(name)), *given], environment=environment)


def _start(
    command: list[str], cwd: Path = ROOT, *, afresh: bool = False, environment: Mapping[str, str] | None = None
) -> Forked | subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    if sys.platform == "linux" and not afresh:  # A Mac's system libraries do not work in a forked process.
        return Forked(command, cwd, environment)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: Forked | subprocess.Popen, expected: int = 0) -> subprocess.CompletedProcess:
    """Waits for the end, which must have the exit status `expected`."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == expected, f"exit status {process.returncode}\n{output[-2000:]}\n{errors[-4000:]}"
    return subprocess.CompletedProcess(process.args, process.returncode, output, _SLOW_COMPILATION.sub("", errors))


def train(workdir: Path | str, data_dir: Path, *, expected: int = 0, **overrides: Any):
    """A whole training command."""
    return finish(start("balcap_jax.train", *arguments(workdir, data_dir, **overrides)), expected)


def the_one_line(errors: str) -> str:
    """The only line on stderr, which a user error ends with."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    return lines[0]


# ---- what a run leaves behind ---------------------------------------------------------------------------------------


def checkpoints(workdir: Path) -> list[int]:
    """Steps whose directories bear their final names."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every array of an Orbax directory by its path, whoever wrote it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(folder, restore_args=as_numpy)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def read_model(directory: Path) -> dict[str, np.ndarray]:
    """The parameters of a model directory by path, in the type that they are stored in."""
    _, params, _ = models.load(directory, param_dtype=None)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what is a time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith("time/") and name != "tokens_per_second"}
        for line in lines
    ]


def read_summary(workdir: Path) -> dict[str, Any]:
    summary = json.loads((workdir / "summary.json").read_text())
    return {kind: summary[kind] for kind in ("evaluations", "greedy")}


def read_samples(workdir: Path) -> dict[str, bytes]:
    folder = workdir / "samples"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_model(one: Path, other: Path) -> None:
    assert_same_arrays(one, other, read_model)


def assert_same_arrays(one: Path, other: Path, read: Callable[[Path], dict[str, np.ndarray]] | None = None) -> None:
    left, right = map(read or read_arrays, (one, other))
    assert left.keys() == right.keys()
    assert left
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.shape == right[name].shape, name
        assert array.tobytes() == right[name].tobytes(), name


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    """Bit for bit the same: logged values, samples, evaluations, checkpoints (those that both kept), the model."""
    assert read_metrics(run) == read_metrics(uninterrupted)
    ours, theirs = read_samples(run), read_samples(uninterrupted)
    assert list(ours) == list(theirs)
    for name, content in ours.items():
        assert content == theirs[name], name
    assert read_summary(run) == read_summary(uninterrupted)
    steps = checkpoints(run), checkpoints(uninterrupted)
    assert steps[0][-1] == steps[1][-1]
    for step in set(steps[0]) & set(steps[1]):
        one, other = (workdir / "checkpoints" / str(step) for workdir in (run, uninterrupted))
        assert_same_arrays(one / "arrays", other / "arrays")
        for field in ("stage", "iterator", "failures", "config"):
            assert _extra(one, field) == _extra(other, field) or field == "config"
    assert_same_model(run / "model", uninterrupted / "model")


def _extra(checkpoint: Path, field: str) -> Any:
    return json.loads((checkpoint / "extra" / "metadata").read_text())[field]


def rewind(finished: Path, workdir: Path, step: int) -> None:
    """Copies a finished run to `workdir` as if it had been killed soon after the checkpoint of `step`."""
    shutil.copytree(finished, workdir)
    for later in checkpoints(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    shutil.rmtree(workdir / "model")
    (workdir / "report.html").unlink()
