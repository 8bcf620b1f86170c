"""What `doctor` says of hours, money and devices, against numbers by hand."""

import json
import subprocess
from pathlib import Path

import pytest
from doctor.set_up import ROOT, assert_fault
from ml_collections import ConfigDict

from balcap_jax.doctor import devices, judge, outlay
from balcap_jax.doctor.findings import OK, Finding
from balcap_jax.judges.schema import Usage
from balcap_jax.training.judge_trial import Trial

# ---- time and money --------------------------------------------------------------------------------------------------


HEARD = judge.Heard(
    {"model": "m"}, Trial(Usage(12, 0, 12_000, 6_000), {"precision": 3.0, "recall": 2.0, "linguistic": 1.0}, 12, 2)
)


def of_outlay(config: ConfigDict, planned: devices.Slice | None = None, **limits: float) -> tuple[Finding, Finding]:
    of_time, money = outlay.look(config, HEARD, planned, outlay.Limits(**limits))
    return of_time, money


def test_the_hours_of_a_run_by_hand(sound):
    """700 steps of 128 x 8 captions, 2 s an answer on average, 512 at once: 12 s a step."""
    published = {"stages.rl.steps": 700, "stages.rl.batch_size": 128, "rollout.group_size": 8, "judge.concurrency": 512}
    published |= {"stages.rl.eval_every": 0, "checkpoint.best_metric": "", "log.eval_images": 1, "log.eval_samples": 1}
    config = sound.config(**published)
    questions = 3 * (700 * 128 * 8 + 2 * 2)
    hours = 12.0 / 3600 * questions / 3072
    of_time, money = of_outlay(config)
    assert (
        f"716,800 captions, at most 11,468,800 tokens to sample; {questions:,} questions to the judge, {hours:.2f} h"
        in of_time.found
    )
    assert (of_time.verdict, money.verdict) == (OK, OK)
    assert_fault(
        of_outlay(config, max_hours=2.0)[0],
        "time",
        f"{hours:.2f} h are more than --max_hours (2)",
        "raise judge.concurrency",
    )
    slow = of_outlay(config, step_seconds=36.0, max_hours=6.0)[0]
    assert_fault(slow, "time", "7.00 h are more than --max_hours (6)", "take more chips or fewer steps")
    serial = of_outlay(sound.config(**published, pipeline__depth=0), step_seconds=36.0, max_hours=7.5)[0]
    assert_fault(serial, "time", f"{7 + hours:.2f} h are more than", "take more chips")
    limited = sound.config(**published, judge__rpm=100)  # 2 servers: 3,072 questions take 15.36 minutes.
    assert_fault(
        of_outlay(limited, max_hours=100.0)[0], "time", f"{15.36 / 60 * questions / 3072:.2f} h are more", "judge.rpm"
    )
    # 1,000 tokens in and 500 out a question, at 0.5 and 2 per million.
    priced = {"judge.price_in": 0.5, "judge.price_out": 2.0}
    cost = questions * (1000 * 0.5 + 500 * 2) / 1e6
    finding = of_outlay(sound.config(**published, **priced, judge__max_cost=50))[1]
    assert_fault(
        finding, "money", f"the judge will cost about {cost:,.2f}, and the run stops at judge.max_cost (50)", "raise it"
    )
    chips = devices.Slice(16, 9.0)
    finding = of_outlay(sound.config(**published, **priced), chips, chip_hour_price=1.2, budget=100.0)[1]
    held = 16 * 1.2 * hours  # by the judge, which is slower than the chips
    assert_fault(finding, "money", f"{cost + held:,.2f} are more than --budget (100)", "lower stages.rl.steps")
    assert (
        of_outlay(sound.config(**published, **priced), chips, chip_hour_price=1.2, budget=cost + held + 1)[1].verdict
        == OK
    )


# ---- devices ---------------------------------------------------------------------------------------------------------


GIB = 2**30


def program(name: str, gib: float, seconds: float, **more: object) -> dict:
    """A program as `aot` writes it."""
    return {
        "program": name,
        "fits": gib <= 15.75,
        "hbm": 15.75 * GIB,
        "total": gib * GIB,
        "peak_seconds": seconds,
    } | more


def of_devices(monkeypatch, programs: list[dict], errors: str = "") -> tuple[Finding, devices.Slice | None]:
    """What is found where `aot` has written `programs`, or has ended with `errors`."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:5] == ["-m", "balcap_jax.aot", "--config=x", "--topology=v5e:4x4"]
        if programs:
            Path(command[-1].partition("=")[2]).write_text(json.dumps(programs))
        return subprocess.CompletedProcess(command, 2, "", errors)

    monkeypatch.setattr(devices.subprocess, "run", run)
    return devices.look(["--config=x"], "v5e:4x4", 2)


def test_programs_that_fit(monkeypatch):
    programs = [
        program("rollout", 8.0, 0.5),
        program("update padded 96", 12.0, 3.0),
        program("update packed 48", 9.0, 2.0),
    ]
    finding, planned = of_devices(monkeypatch, programs)
    assert finding.verdict == OK
    assert finding.found.startswith("v5e:4x4: 32 chips of 15.75 GiB take rollout 8.00, update padded 96 12.00, ")
    assert planned == devices.Slice(32, 2.5), "a rollout and the least update"


def test_programs_that_do_not_fit(monkeypatch):
    finding, planned = of_devices(monkeypatch, [program("rollout", 8.0, 0.5), program("update", 21.5, 3.0)])
    assert_fault(finding, "devices", "and the update needs 21.50 GiB", "take a larger slice")
    refused = {"program": "rollout", "fits": False, "hbm": 15.75 * GIB, "refused": "Used 30G of 15G hbm"}
    assert_fault(
        of_devices(monkeypatch, [refused])[0], "devices", "the rollout needs Used 30G of 15G hbm", "larger slice"
    )
    error = "error: --topology=v5e:9x9: libtpu knows no such topology; name one as v5e:4x8 or v5p:2x2x2\n"
    finding, planned = of_devices(monkeypatch, [], error)
    assert_fault(finding, "devices", "libtpu knows no such topology", "name one as v5e:4x8 or v5p:2x2x2")
    assert planned is None


@pytest.mark.slow
def test_a_small_slice_that_is_compiled_for(tmp_path):
    pytest.importorskip("libtpu", reason="the compiler for TPUs is in the extra [aot]")
    given = [f"--config={ROOT / 'configs' / 'scenes.py'}:tiny"]
    finding, planned = devices.look(given, "v5e:1x1", 1)
    assert finding.verdict == OK, finding
    assert planned.chips == 1
    assert 0 < planned.peak_seconds < 1
    finding, _ = devices.look(given, "v5e:nope", 1)
    assert_fault(finding, "devices", "--topology is 'v5e:nope'", "name one as v5e:4x8")
