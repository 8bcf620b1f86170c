"""The launch scripts of Cloud TPUs, from nothing to a trained model, through a preemption, in tests/fake_cloud.py."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_runs import ROOT, TIMEOUT, arguments, assert_same_run, checkpoints, read_metrics, read_summary, train
from fake_cloud import Cloud

HELD_STEP = 7  # of 10; sft is steps 1 to 4, and every second step has a checkpoint


class Pod:
    """A configuration file for an empty fake cloud, and the scripts run with it."""

    def __init__(self, folder: Path, data_dir: Path, accelerator: str, queue: str, **overrides: Any):
        self.workdir, self.logs = folder / "a run", folder / "logs"
        self.cloud, self.hold = Cloud.make(folder / "cloud"), folder / "hold"
        self.hold.touch()
        held = [sys.executable, str(Path(__file__).with_name("held.py")), str(HELD_STEP), str(self.hold)]
        trainer = self.cloud.state / "trainer"
        trainer.write_text(f'#!/bin/bash\nPYTHONPATH=. exec {shlex.join(held)} "$@"\n')
        trainer.chmod(0o755)
        train = [f"train = {argument}" for argument in arguments(self.workdir, data_dir, **overrides)]
        self.conf = folder / "tpu.conf"
        self.conf.write_text(
            f"name = pod\nproject = p\nzone = z\naccelerator = {accelerator}\nruntime = tpu-ubuntu2204-base\n"
            f"provisioning = spot\nqueue = {queue}\nbackoff = 0\npoll_seconds = 1\nlog_dir = {self.logs}\n"
            + "\n".join(train)
        )

    def start(self, script: str, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / f"tpu_{script}.sh"), f"--config={self.conf}", *flags],
            env=os.environ | self.cloud.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen) -> str:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
        logs = "".join(f"\n--- {path.name}\n{path.read_text()[-2000:]}" for path in self.logs.glob("*"))
        assert process.returncode == 0, f"status {process.returncode}\n{output}{logs}"
        return output

    def run(self, script: str, *flags: str) -> str:
        return self.finish(self.start(script, *flags))

    def wait_until_held(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not self.hold.with_name("hold.reached").exists():
            assert time.monotonic() < deadline, "".join(path.read_text()[-3000:] for path in self.logs.glob("*"))
            time.sleep(0.05)


def test_created_run_killed_by_a_preemption_and_resumed_equals_uninterrupted(tmp_path, data_dir, finished):
    pod = Pod(tmp_path, data_dir, "v4-8", queue="no")
    pod.cloud.comes_to("capacity", "capacity")
    output = pod.run("create")
    assert "attempt 2 of 20 got no TPU" in output
    assert len(pod.cloud.calls("tpu-vm create")) == 3
    pod.run("setup")
    assert "t1v-n-fake-w-0: started" in pod.run("run")
    assert "t1v-n-fake-w-0: running" in pod.run("run"), "a second start beside the first"

    pod.wait_until_held()
    pod.cloud.preempt(grace=0)
    pod.hold.unlink()
    assert checkpoints(pod.workdir)[-1] in (4, 6)  # that of step 6 may still be in the making
    output = pod.run("resume")
    assert "preempted" in output
    assert len(pod.cloud.calls("tpu-vm delete")) == 1

    output = pod.run("run", "--attach")
    assert "b-CapScore" in output, "the log was not shown to its end"
    assert "t1v-n-fake-w-0: finished" in pod.run("run", "--status")
    assert "going on after step" in (pod.logs / "t1v-n-fake-w-0.log").read_text()
    assert_same_run(pod.workdir, finished.workdir)

    assert "the run is finished" in pod.run("resume")
    pod.run("delete")
    assert "there is no pod in z" in pod.run("delete")


@pytest.mark.slow
def test_a_watched_run_of_two_workers_goes_on_by_itself_after_a_preemption(tmp_path, data_dir):
    # As in test_processes: Adam must not make full steps of what is zero but for rounding.
    steady = {"optim__eps": 1e-4}
    pod = Pod(tmp_path, data_dir, "v4-16", queue="yes", **steady)
    pod.cloud.comes_to("queued", "failed")
    watching = pod.start("resume", "--watch")
    pod.wait_until_held()
    pod.cloud.preempt(grace=100, signalled=pod.hold.unlink)
    saved = checkpoints(pod.workdir)[-1]
    assert HELD_STEP <= saved <= HELD_STEP + 1, "the step under way was not saved"
    output = pod.finish(watching)
    assert output.splitlines()[-1] == "the run is finished"
    assert output.count("waiting for pod") == 1
    assert len(pod.cloud.calls("queued-resources create")) == 3  # queued, failed after the preemption, and again

    logs = [(pod.logs / f"t1v-n-fake-w-{index}.log").read_text() for index in range(2)]
    for index, log in enumerate(logs):
        assert len(re.findall(rf"process {index} of 2 on .* local of ", log)) == 2
    assert f"going on after step {saved} of 10" in logs[0]
    assert "b-CapScore" in logs[0]
    assert "b-CapScore" not in logs[1]
    train(tmp_path / "straight", data_dir, **steady)
    for ours, theirs in zip(read_metrics(pod.workdir), read_metrics(tmp_path / "straight"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # The stage's name, and None for what there is nothing to take the mean of, are compared as they are.
            near = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
            assert ours[key] == near, (theirs["step"], key)
    assert read_summary(pod.workdir).keys() == read_summary(tmp_path / "straight").keys()
