"""Metrics: exact accumulation, the lines of metrics.jsonl over kill and resume, the phase clock, progress lines."""

import io
import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.train_step import Max, Mean, finalise
from balcap_jax.training.logging import MetricsWriter
from balcap_jax.training.progress import PhaseClock, Progress


class Ticks:
    """A clock that moves only when told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# --- (sum, count) ---


def test_nothing_counted_is_nan():
    empty = {"kl": Mean(np.float32(0), np.float32(0)), "drift": Max(np.float32(-np.inf))}
    assert all(math.isnan(value) for value in finalise(empty).values())


# --- metrics.jsonl ---


def test_one_json_object_per_line_with_null_for_what_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "sft", {"loss": np.float32(0.5), "kl": math.nan})
        assert lines_of(tmp_path) == [{"step": 1, "stage": "sft", "loss": 0.5, "kl": None}]  # on disk before close
        writer.write(2, "rl", {"loss": -math.inf, "count": np.int32(3), "device": jnp.float32(0.25)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert lines_of(tmp_path)[1] == {"step": 2, "stage": "rl", "loss": None, "count": 3, "device": 0.25}


def test_killed_and_resumed_has_the_lines_of_an_uninterrupted_run(tmp_path):
    def run(workdir, steps):
        with MetricsWriter(workdir, tensorboard=False) as writer:
            for step in steps:
                writer.write(step, "rl", {"loss": 1 / step})

    run(tmp_path / "whole", range(1, 9))
    killed = tmp_path / "killed"
    run(killed, range(1, 7))
    with (killed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "stage": "rl", "lo')  # killed in the middle of a write
    with MetricsWriter(killed, tensorboard=False) as writer:  # the checkpoint was that of step 4
        assert writer.truncate(4) == 2
        for step in range(5, 9):
            writer.write(step, "rl", {"loss": 1 / step})
    assert (killed / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [path.name for path in killed.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2', b'{"step": 2, "stage": "rl"}', b"\xff\xfe\n", b"\x00\x00\x00", b"[2]\n"]
)
def test_opening_drops_a_torn_last_line(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "stage": "rl"}\n' + torn)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, "rl", {})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "number"),
    [
        (bytes(range(128, 256)), 1),
        (b"\x80\n\xff\n\n\xfe", 1),
        (b'{"step": 1}\nnoise\n{"step": 3}\n', 2),
        (b'{"step": 1}\n{"loss": 1}\n{"step": 3}\n', 2),
        (b'{"step": 1}\n' + b"[" * 100_000 + b'\n{"step": 3}\n', 2),
        (b'{"step": 1}\n\x00\n{"st', 2),
    ],
)
def test_what_no_run_wrote_is_refused_and_left_alone(tmp_path, content, number):
    """A crash tears the last line of a file and nothing else."""
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        MetricsWriter(tmp_path, tensorboard=False)
    assert str(caught.value).startswith(f"{tmp_path}/metrics.jsonl, line {number} ")
    assert "move the file away" in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_truncate_to_minus_one_starts_afresh(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, "rl", {})
        assert writer.truncate(-1) == 1
    assert lines_of(tmp_path) == []


def test_a_writer_that_is_not_enabled_touches_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.truncate(0)
        writer.write(1, "rl", {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def read_events(path):
    """Events of a TensorBoard file: records of (length u64, crc u32, event, crc u32)."""
    from tensorboardX.proto import event_pb2

    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_tensorboard_events_and_purge_on_resume(tmp_path):
    for first, last in ((1, 4), (3, 5)):
        with MetricsWriter(tmp_path) as writer:
            if first > 1:
                writer.truncate(first - 1)
            for step in range(first, last + 1):
                writer.write(step, "rl", {"reward/precision": step / 8, "kl": math.nan})
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2  # within one second: the second run did not overwrite the first's file
    second = read_events(files[1])
    starts = [event.step for event in second if event.HasField("session_log")]
    assert starts == [3]
    scalars = [(e.step, v.tag, v.simple_value) for e in second for v in e.summary.value]
    assert scalars == [(step, "reward/precision", step / 8) for step in (3, 4, 5)]


def test_flushed_events_survive_a_kill(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, "sft", {"loss": float(step)})
    writer.flush()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert [event.step for event in read_events(file) if event.summary.value] == [1, 2, 3]  # the writer is still open
    writer.close()


def test_full_disk_names_the_file(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer._file.close()
    writer._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - the writer closes it
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write \(No space left on device\)"):
        writer.write(1, "rl", {"loss": 1.0})
    writer.close()


def test_full_disk_under_tensorboard_is_an_error_and_does_not_hang(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer._events._writer._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    writer._events._flushed = -math.inf
    with pytest.raises(UserError, match="tensorboard: cannot write"):
        writer.write(1, "rl", {"loss": 1.0})


@pytest.mark.parametrize("blocker", ["", "metrics.jsonl/x", "tensorboard"])
def test_a_place_that_cannot_be_written(tmp_path, blocker):
    workdir = tmp_path / "run"
    if blocker.endswith("/x"):  # a directory in the place of the file
        (workdir / blocker).mkdir(parents=True)
    else:  # a file in the place of the directory
        (workdir / blocker).parent.mkdir(exist_ok=True)
        (workdir / blocker).write_text("in the way")
    with pytest.raises(UserError, match=r"run.*cannot write"):
        MetricsWriter(workdir)


# --- phase clock ---


def spend(clock, ticks, name, seconds):
    with clock.phase(name):
        ticks.seconds += seconds


def fail_after(clock, ticks, seconds):
    with clock.phase("judge"):
        ticks.seconds += seconds
        raise UserError("no judge")


def test_clock_splits_a_step_and_leaves_compiling_out():
    ticks = Ticks()
    clock = PhaseClock(now=ticks)
    ticks.seconds += 7  # set-up
    clock.step()
    spend(clock, ticks, "rollout", 3)
    ticks.seconds += 0.5
    with clock.phase("update"):
        ticks.seconds += 1
        spend(clock, ticks, "compile", 20)
        ticks.seconds += 1
    assert clock.step() == {"time/rollout": 3, "time/judge": 0, "time/update": 2, "time/other": 0.5}
    spend(clock, ticks, "judge", 0.25)
    assert clock.step() == {"time/rollout": 0, "time/judge": 0.25, "time/update": 0, "time/other": 0}
    assert clock.totals() == {"wall": 32.75, "rollout": 3, "judge": 0.25, "update": 2, "compile": 20, "other": 7.5}


def test_clock_of_a_resumed_run_goes_on():
    ticks = Ticks()
    clock = PhaseClock(now=ticks)
    spend(clock, ticks, "rollout", 3)
    with clock.phase("save"):
        ticks.seconds += 2
        state = json.loads(json.dumps(clock.state()))  # taken inside a phase: what has passed of it counts
    ticks.seconds += 1000  # killed, and away for a while
    resumed = PhaseClock(now=ticks)
    resumed.restore(state)
    spend(resumed, ticks, "rollout", 1)
    spend(resumed, ticks, "compile", 5)
    assert resumed.totals() == {"wall": 11, "rollout": 4, "save": 2, "compile": 5, "other": 0}
    assert resumed.step()["time/rollout"] == 1  # the step's share is this process's alone


def test_clock_phase_closes_on_an_exception():
    ticks = Ticks()
    clock = PhaseClock(now=ticks)
    with pytest.raises(UserError):
        fail_after(clock, ticks, 1)
    ticks.seconds += 1
    assert clock.totals() == {"wall": 2, "judge": 1, "other": 1}


# --- progress ---

RL_VALUES = {
    "reward/precision": 0.712,
    "reward/precision_std": 0.1,
    "reward/recall": 0.6,
    "reward/linguistic": math.nan,
    "b_capscore": 64.25,
    "length/mean": 33.6,
    "gate/in_band": 0.934,
    "padding/rollout_useful": 0.664,
    "loss": 0.01,
    "time/rollout": 0.61,
    "time/judge": 0.05,
    "time/update": 0.33,
    "time/other": 0.01,
    "tokens_per_second": 5234.0,
}


def test_plain_lines_when_not_a_terminal():
    stream = io.StringIO()
    with Progress(200, "rl", stream=stream) as progress:
        for step in range(1, 201):
            progress.update(step, RL_VALUES)
        progress.note("saved [bold]checkpoint[/bold] 200")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 22  # the first, every tenth, the note
    assert lines[1] == (  # the reward names are shortened to fit
        "rl 10/200  eta 3:10  1 s/step (rollout 61 judge 5 update 33%)  5.23k tok/s  use 66%  "
        "pr 71.2 re 60.0 li -  b-cap 64.2  34 words  in band 93%"
    )
    assert lines[-2].startswith("rl 200/200  done")
    assert lines[-1] == "saved [bold]checkpoint[/bold] 200"
    assert max(map(len, lines)) <= 140
    assert "\x1b" not in stream.getvalue()


def test_sft_shows_the_loss():
    stream = io.StringIO()
    with Progress(40, "sft", stream=stream) as progress:
        for step in range(1, 41):
            progress.update(step, {"loss": 1.25, "tokens_per_second": math.nan, "time/other": 0.5})
    lines = stream.getvalue().splitlines()
    assert [lines[0], lines[10], lines[20]] == [
        "sft 1/40  eta 0:20  0.5 s/step  loss 1.2500",
        "sft 20/40  eta 0:10  0.5 s/step  loss 1.2500",
        "sft 40/40  done  0.5 s/step  loss 1.2500",
    ]


def test_the_share_that_is_no_padding_is_shown():
    progress = Progress(40, "sft", stream=io.StringIO())
    values = {"loss": 1.25, "time/update": 0.5, "padding/update_useful": 0.934}
    progress.update(40, values)
    assert progress.line(40, values) == "sft 40/40  done  0.5 s/step (update 100%)  use 93%  loss 1.2500"
    both = values | {"padding/rollout_useful": 0.706}
    assert "  use 71/93%  " in progress.line(40, both)
    assert "  use " not in progress.line(40, both | {name: math.nan for name in both if name.startswith("padding/")})


@pytest.mark.parametrize("width", [140, 100, 60, 20])
def test_lines_fit(width):
    values = RL_VALUES | {f"reward/objective_number_{k}": 1.0 for k in range(3)}
    progress = Progress(200_000, "rl", stream=io.StringIO())
    progress.update(123_456, values)
    assert len(progress.line(123_456, values, width)) <= width


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_redrawn_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(200, "rl", stream=stream) as progress:
        for step in range(1, 31):
            progress.update(step, RL_VALUES)
        progress.note("saved [x]")
    text = stream.getvalue()
    assert "\x1b[2K" in text  # erases the line it draws over
    assert all(f"rl {step}/200" in text for step in range(1, 31))
    assert text.count("\n") == 2  # the note, and the end of the line
    assert text.index("rl 30/200") < text.index("saved [x]"), "the note is followed by a line that it repeats"
    assert text.endswith("saved [x]\n")


def test_a_stage_with_nothing_left_to_do_shows_no_line():
    stream = Terminal()
    with Progress(200, "rl", first_step=200, stream=stream):
        pass
    assert stream.getvalue() == ""
