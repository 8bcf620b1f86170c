"""Several processes are one program: the same numbers, one end for all of them, and runs that go on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import (
    ROOT,
    arguments,
    assert_same_run,
    checkpoints,
    finish,
    read_arrays,
    read_metrics,
    read_model,
    read_samples,
    read_summary,
    start_script,
)
from command_runs import start as start_command
from forked import DEVICES, Forked

# Where a gradient is zero but for rounding, Adam makes a full step of the rounding error unless eps is above it.
STEPS = {"stages__sft__steps": 5, "stages__rl__steps": 5, "optim__eps": 1e-4, "stages__rl__eval_every": 0}
RTOL = 1e-5


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(
    given: list[str], processes: int, devices: int, program: str = "", **victims: str
) -> list[Forked | subprocess.Popen]:
    """Training, or the text of a `program`, in `processes` of `devices` each.

    process_<i>="SIGNAL WHERE" strikes one (see interrupted.py).
    """
    port, started = free_port(), []
    for index in range(processes):
        environment = {"PYTHONPATH": str(ROOT), DEVICES: str(devices)}
        if processes > 1:
            environment["BALCAP_COORDINATOR"] = f"127.0.0.1:{port}"
            environment["BALCAP_PROCESS_COUNT"] = str(processes)
            environment["BALCAP_PROCESS_ID"] = str(index)
        if strike := victims.get(f"process_{index}", "").split():
            started.append(start_script("interrupted.py", *strike, *given, **environment))
        elif program:
            command = [sys.executable, "-c", program, *given]
            options = {"cwd": ROOT, "env": os.environ | environment, "text": True}
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options))
        else:
            started.append(start_command("balcap_jax.train", *given, **environment))
    return started


def train(workdir: Path, data_dir: Path, processes: int, devices: int, **overrides: Any) -> list[str]:
    """A whole run; what each process printed."""
    started = start(arguments(workdir, data_dir, **STEPS | overrides), processes, devices)
    return [finish(process).stdout for process in started]


def seconds_to_stop(started: list[Forked | subprocess.Popen], victim: int) -> tuple[list[str], float]:
    """What the others wrote to stderr once the victim was killed, and how long the last of them went on."""
    errors = {}
    finish(started[victim], -signal.SIGKILL)
    killed = time.monotonic()
    for index, process in enumerate(started):
        if index != victim:
            errors[index] = process.communicate(timeout=90)[1]
            assert process.returncode not in (0, None), f"process {index} ended as if nothing had been"
    return list(errors.values()), time.monotonic() - killed


def assert_close_run(run: Path, other: Path) -> float:
    """Samples equal, logged values and every saved array within fp32 rounding; returns the largest error seen."""
    assert list(read_samples(run)) == list(read_samples(other))
    for name, content in read_samples(run).items():
        assert content == read_samples(other)[name], name
    largest = 0.0
    for ours, theirs in zip(read_metrics(run), read_metrics(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if isinstance(ours[name], float) and isinstance(theirs[name], float):
                np.testing.assert_allclose(ours[name], theirs[name], RTOL, RTOL, err_msg=f"{name} at {ours['step']}")
                largest = max(largest, abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1.0))
            else:
                assert ours[name] == theirs[name], name
    last = checkpoints(run)[-1]
    assert last == checkpoints(other)[-1]
    ours, theirs = (read_arrays(workdir / "checkpoints" / str(last) / "arrays") for workdir in (run, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], RTOL, RTOL, err_msg=name)
        largest = max(largest, float(np.abs(ours[name].astype(float) - theirs[name]).max()))
    return largest


def assert_says_why_it_stopped(errors: str) -> None:
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert "another process has ended or cannot be reached" in last or "another one has ended" in last
    assert last.endswith("the same command, started again in all processes, goes on from the newest checkpoint")


def test_two_processes_one_of_which_is_killed_equal_one_process_with_as_many_devices(tmp_path, data_dir):
    """Two processes with two devices each and one with four; the slow tests have sft before rl."""
    only_rl = STEPS | {"stages__order": "rl"}
    train(tmp_path / "one", data_dir, 1, 4, **only_rl)
    given = arguments(tmp_path / "two", data_dir, **only_rl)
    errors, seconds = seconds_to_stop(start(given, 2, 2, process_1="SIGKILL log:4"), 1)
    assert seconds < 60
    assert_says_why_it_stopped(errors[0])
    assert checkpoints(tmp_path / "two")[-1] == 2

    outputs = train(tmp_path / "two", data_dir, 2, 2, **only_rl)
    for index, output in enumerate(outputs):
        assert f"process {index} of 2 on {socket.gethostname()}: 2 local of 4 devices, cpu" in output
    assert "going on after step 2 of 5 (rl)" in outputs[0]
    assert "rl 5/5" in outputs[0]
    assert "/5  " not in outputs[1], "process 0 alone shows progress"
    assert len(read_metrics(tmp_path / "two")) == 5
    assert_close_run(tmp_path / "two", tmp_path / "one")
    for kind, evaluations in read_summary(tmp_path / "two").items():
        assert list(evaluations) == ["base", "rl"]
        assert evaluations == read_summary(tmp_path / "one")[kind]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
def test_stopped_and_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, data_dir, depth):
    ahead = {"pipeline__depth": depth}
    train(tmp_path / "straight", data_dir, 2, 2, **ahead)
    given = arguments(tmp_path / "run", data_dir, **STEPS, **ahead)

    done = [finish(process) for process in start(given, 2, 2, process_1="SIGTERM log:3")]
    assert done[0].stdout.splitlines()[-1] == "SIGTERM: saved after step 3; the same command goes on from here"
    assert checkpoints(tmp_path / "run") == [2, 3]

    # The coordinator lives in process 0: without it JAX aborts the others.
    errors, seconds = seconds_to_stop(start(given, 2, 2, process_0="SIGKILL log:8"), 0)
    print(f"stopped after {seconds:.1f} s: {errors[0].splitlines()[-1]}")
    assert seconds < 60
    assert_says_why_it_stopped(errors[0])

    train(tmp_path / "run", data_dir, 2, 2, **ahead)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
def test_four_processes_and_a_resume_with_two_equal_one(tmp_path, data_dir, depth):
    ahead = {"pipeline__depth": depth}
    train(tmp_path / "one", data_dir, 1, 4, **ahead)
    train(tmp_path / "four", data_dir, 4, 1, **ahead)
    print(f"four processes: largest error {assert_close_run(tmp_path / 'four', tmp_path / 'one'):.2g}")
    given = arguments(tmp_path / "mixed", data_dir, **STEPS, **ahead)
    for process in start(given, 4, 1, process_3="SIGTERM log:7", process_1="SIGTERM log:7"):
        finish(process)
    train(tmp_path / "mixed", data_dir, 2, 2, **ahead)
    print(f"four, then two: largest error {assert_close_run(tmp_path / 'mixed', tmp_path / 'one'):.2g}")


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
def test_parameters_and_adapters_split_over_processes_equal_one(tmp_path, data_dir, depth):
    """No process holds a whole array: the checkpoints and the merged model are put together from both."""
    overrides = {"mesh__data": 1, "mesh__fsdp": 2, "lora__rank": 2, "pipeline__depth": depth}
    train(tmp_path / "one", data_dir, 1, 2, **overrides)
    train(tmp_path / "two", data_dir, 2, 1, **overrides)
    print(f"split parameters: largest error {assert_close_run(tmp_path / 'two', tmp_path / 'one'):.2g}")
    ours, theirs = (read_model(tmp_path / run / "model") for run in ("two", "one"))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], RTOL, RTOL, err_msg=name)


ROWS = """
import jax, numpy as np
from balcap_jax.parallel import distributed, sharding
from balcap_jax.parallel.host_batch import Rows, make_reordering, take
with distributed.session():
    p0, p1 = ([d for d in jax.devices() if d.process_index == p] for p in range(2))
    mixed = [p0[0], p1[0], p0[1], p1[1]]
    batch = {"x": np.arange(24).reshape(8, 3), "id": [f"row {i}" for i in range(8)]}
    for sizes, devices, held in (
        ((1, 4, 1, 1), jax.devices(), 4),
        ((1, 4, 1, 1), mixed, 4),
        ((1, 2, 1, 2), jax.devices(), 4),
        ((1, 2, 1, 2), mixed, 8),
        ((1, 1, 1, 4), jax.devices(), 8),
    ):
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices)
        rows = Rows(mesh, 8)
        assert len(rows.held) == held, (sizes, rows.held)
        mine = take(batch, rows.held)
        placed = rows.put(mine["x"])
        assert placed.shape == (8, 3)
        assert int(jax.jit(lambda x: (x * x).sum())(placed)) == (batch["x"] ** 2).sum()
        assert (rows.fetch(placed) == mine["x"]).all()
        assert (rows.fetch(jax.jit(lambda x: x + 1)(placed)) == mine["x"] + 1).all()
        assert (rows.gather(mine["x"][rows.own]) == batch["x"]).all()
        assert rows.gather_list([mine["id"][i] for i in rows.own]) == batch["id"]
        order = np.array([5, 0, 7, 2, 1, 6, 3, 4], np.int32)
        tree = {"x": mine["x"], "y": mine["x"][:, 0] % 2 == 0}
        dealt = rows.fetch(make_reordering(mesh)(rows.put(tree), rows.put(order[rows.held])))
        assert (dealt["x"] == batch["x"][order][rows.held]).all()
        assert (dealt["y"] == (batch["x"][order, 0] % 2 == 0)[rows.held]).all()
        owners = np.concatenate(distributed.all_gather(rows.held[rows.own]))
        assert sorted(owners) == list(range(8)), owners
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, (1, 1, 4, 1))), jax.devices())
    whole, wrote = np.arange(32, dtype=np.float32).reshape(4, 8), []
    for axes in (("fsdp",), (None, "fsdp"), ()):
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        array = jax.make_array_from_callback(whole.shape, spread, lambda index: whole[index])

        def write(tree):
            x = tree["a"]["x"]
            assert (np.asarray(x) == whole).all() and np.asarray(x[2], np.float64).dtype == np.float64
            assert x[2].shape == (8,) and (np.asarray(x[2]) == whole[2]).all()
            wrote.append(axes)

        distributed.write_whole({"a": {"x": array}}, write)
    assert len(wrote) == (3 if jax.process_index() == 0 else 0), wrote
    distributed.check_same("nothing", 1)
    try:
        distributed.check_same("number", jax.process_index())
    except Exception as error:
        print(error)
    print("all rows")
"""


def test_rows_that_processes_hold_alone_or_share():
    """Where the tensor axis lies over processes both hold the same rows, and one of them judges each.

    An array that no process holds whole is written whole, or row by row, by the first.
    """
    first, second = [finish(process).stdout for process in start([], 2, 2, program=ROWS)]
    assert "all rows" in first
    assert "this one and process 0 differ in number (1 and 0); start all of them alike" in second


TORN = """
import errno, os, sys
from pathlib import Path
import jax, numpy as np
from balcap_jax.parallel import distributed
from balcap_jax.training import checkpoint_places as checkpoint
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.cli.errors import UserError
folder = Path(sys.argv[1])
with distributed.session():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = np.arange(4096.0, dtype=np.float32)
    make = lambda step: {"x": jax.make_array_from_callback(whole.shape, spread, lambda index: whole[index] + step)}
    with Checkpointer(folder, keep=5) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(step, make(step))
    me, damage = jax.process_index(), checkpoint.find_damage
    sealed = [checkpoint.find_damage(folder / "4" / "arrays" / f"ocdbt.process_{i}") for i in range(2)]
    assert sealed == ["", ""], sealed

    def seen_here(path, **options):  # a disk that shows process 1 alone something else
        if me == 1 and path.name == "4" and options.get("content", True):
            raise PermissionError(errno.EACCES, "Permission denied")
        return damage(path, **options)

    checkpoint.find_damage = seen_here
    try:
        Checkpointer(folder)
    except UserError as error:
        print("stops:", error)

    def seen_here(path, **options):
        torn = me == 1 and path.name == "4" and options.get("content", True)
        return "extra/metadata is empty" if torn else damage(path, **options)

    checkpoint.find_damage = seen_here
    if me == 0:
        file = max((folder / "3" / "arrays" / "ocdbt.process_1").glob("d/*"), key=lambda path: path.stat().st_size)
        file.write_bytes(bytes(file.stat().st_size))
    distributed.barrier()
    with Checkpointer(folder, keep=5) as checkpointer:
        checkpoint.find_damage = damage
        print("latest:", checkpointer.latest_step())
        found = checkpointer.restore(2, make(0))[0]["x"]
        assert all((shard.data == whole[shard.index] + 2).all() for shard in found.addressable_shards)
        checkpointer.save(4, make(4))
        checkpointer.wait()
        print("saved:", checkpointer.steps(), sorted(path.name for path in folder.iterdir()))
        distributed.barrier()
"""


@pytest.mark.slow
def test_what_one_process_finds_torn_all_pass_over(tmp_path):
    done = [finish(process) for process in start([str(tmp_path)], 2, 2, program=TORN)]
    for process in done:
        lines = process.stdout.splitlines()
        stops = f"stops: can't read {tmp_path}/4: permission denied; mend that and run the same command again"
        assert lines[-3:] == [stops, "latest: 2", "saved: [1, 2, 4] ['1', '2', '4']"]
    first, second = ([line for line in process.stderr.splitlines() if "torn" in line] for process in done)
    assert f"checkpoint {tmp_path}/4 is torn (extra/metadata is empty): passed over" in first[0]
    assert f"checkpoint {tmp_path}/3 is torn (arrays/ocdbt.process_1/d/" in first[1]
    assert (len(first), second) == (2, []), "process 0 says it for all"


SLEEPER = """
import os, signal, time
import jax
from balcap_jax.parallel import distributed
with distributed.session():
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)
"""


@pytest.mark.slow
def test_a_process_that_waits_for_nobody_stops_too():
    """As while it judges: no collective fails, but JAX misses the heartbeats of the one that was killed."""
    started = start([], 2, 1, program=SLEEPER)
    errors, seconds = seconds_to_stop(started, 1)
    print(f"stopped after {seconds:.1f} s")
    assert seconds < 60
    assert_says_why_it_stopped(errors[0])
