"""Commands whose files lie in a bucket: killed, resumed, and with a server that fails now and then."""

import json
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from command_runs import arguments, assert_same_run, finish, start, start_script, the_one_line

from balcap_jax import caption, compare, convert, evaluate, recaption
from balcap_jax.cli import bucket, storage
from balcap_jax.report import __main__ as report
from balcap_jax.training.checkpoint import Checkpointer

RUN, DATA = "gs://bucket/runs/a", "gs://bucket/data"
POINTS = 20


@pytest.fixture(autouse=True)
def empty(server):
    server.buckets["bucket"].clear()
    storage._remote.clear()
    storage._here.clear()


def dumped(server, folder, prefix):
    """A copy on the disk of all below `prefix`."""
    for name in server.names(prefix):
        path = folder / name.removeprefix(prefix).strip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(server[name])
    return folder


def killed(server, stop_at, *given, stop_done=False, module="balcap_jax.train"):
    """A command that dies by SIGKILL with the change number `stop_at` of the bucket."""
    process = []
    faults = {"stop_at": stop_at, "stop_done": stop_done, "on_stop": lambda: process[0].kill()}
    with server.failing(**faults):
        process.append(start(module, *given) if module else start_script("saved_in_bucket.py", *given))
        finish(process[0], -signal.SIGKILL)
    assert server.changes >= stop_at


def finished_in(server, folder):
    run = dumped(server, folder, "runs/a")
    assert not (run / ".lock").exists()
    return run


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_and_resumed_equals_one_on_a_disk(server, tmp_path, finished):
    """The disk's run used the same config but for the directories."""
    given = arguments(RUN, DATA)
    for stop_at in (3, 30, 55, 65, 75):
        killed(server, stop_at, *given)
        assert server.names("runs/a/.lock")
    done = finish(start("balcap_jax.train", *given))
    assert "going on after step" in done.stdout
    assert f"model:  {RUN}/model" in done.stdout
    assert "/tmp" not in done.stdout + done.stderr
    assert_same_run(finished_in(server, tmp_path / "run"), finished.workdir)
    again = finish(start("balcap_jax.train", *given))
    assert f"report: {RUN}/report.html" in again.stdout


@pytest.mark.slow
def test_two_processes_share_a_run_in_a_bucket(server, tmp_path, data_dir):
    """Each writes its part of the checkpoints there; the first alone has the logs."""
    from test_processes import STEPS
    from test_processes import start as start_several

    disk = [finish(one) for one in start_several(arguments(tmp_path / "disk", data_dir, **STEPS), 2, 2)]
    assert len(disk) == 2
    given, processes = arguments(RUN, DATA, **STEPS), []
    with server.failing(stop_at=90, on_stop=lambda: [one.kill() for one in processes]):
        processes += start_several(given, 2, 2)
        for one in processes:
            finish(one, -signal.SIGKILL)
    for one in start_several(given, 2, 2):
        finish(one)
    assert_same_run(finished_in(server, tmp_path / "run"), tmp_path / "disk")


@pytest.mark.slow
def test_a_server_that_fails_costs_time_alone(server, tmp_path, finished):
    with server.failing(share=0.05, delay=0.005):
        before = server.failed
        finish(start("balcap_jax.train", *arguments(RUN, DATA)))
    assert server.failed - before > 10
    assert_same_run(finished_in(server, tmp_path / "run"), finished.workdir)


@pytest.mark.slow
def test_a_reader_meets_the_old_or_the_new_state_wherever_an_upload_ends(server):
    finish(start_script("saved_in_bucket.py", RUN, "1"))
    first = dict(server.buckets["bucket"])
    with server.failing():
        finish(start_script("saved_in_bucket.py", RUN, "2"))
        count = server.changes
    points = np.unique(np.linspace(1, count, POINTS).astype(int))
    assert len(points) == POINTS
    seen = []
    for number, point in enumerate(points):
        server.buckets["bucket"] = dict(first)
        killed(server, int(point), RUN, "2", stop_done=bool(number % 2), module="")
        steps = [json.loads(line)["step"] for line in server["runs/a/metrics.jsonl"].splitlines()]
        assert steps in ([1], [1, 2])
        left = dict(server.buckets["bucket"])
        with Checkpointer(f"{RUN}/checkpoints") as checkpointer:
            step = checkpointer.latest_step()
            arrays, extra = checkpointer.restore(step, {"w": jnp.zeros((32, 32), int), "b": jnp.zeros(5, int)})
        assert extra == {"step": step}
        np.testing.assert_array_equal(arrays["w"], np.full((32, 32), step))
        np.testing.assert_array_equal(arrays["b"], np.full(5, -step))
        assert max(steps) >= step, "the log is older than the checkpoint"
        seen.append(step)
        server.buckets["bucket"] = left
        finish(start_script("saved_in_bucket.py", RUN, "2"))
        assert {name.split("/")[3] for name in server.names("runs/a/checkpoints/")} == {"2"}
        assert not server.names("runs/a/.lock")
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


@pytest.mark.slow
def test_commands_read_and_write_in_a_bucket(server, tmp_path, finished, capsys, monkeypatch):
    """What each gives is what it gives on a disk."""
    monkeypatch.chdir(tmp_path)
    finished = finished.workdir
    pictures = shutil.copytree(finished / "samples" / "images", tmp_path / "pictures")
    model = f"{RUN}/model"
    convert.main([f"--from={finished / 'model'}", f"--out={model}"])
    convert.main([f"--from={model}", "--out=gs://bucket/half", "--dtype=bfloat16"])
    convert.main([f"--from={finished / 'model'}", f"--out={tmp_path / 'half'}", "--dtype=bfloat16"])
    convert.main(["--from=gs://bucket/half", "--check"])
    for path in (tmp_path / "half").iterdir():
        assert server[f"half/{path.name}"] == path.read_bytes(), path.name
    with pytest.raises(SystemExit):
        convert.main([f"--from={model}", "--out=gs://bucket/half"])
    assert "gs://bucket/half exists; delete it" in capsys.readouterr().err

    given = [f"--images={pictures}", "--max_tokens=8", "--batch_size=1", "--dtype=float32"]
    caption.main([*given, f"--model={finished / 'model'}", f"--out={tmp_path / 'c.jsonl'}"])
    killed(server, 4, *given, f"--model={model}", "--out=gs://bucket/c.jsonl", module="balcap_jax.caption")
    finish(start("balcap_jax.caption", *given, f"--model={model}", "--out=gs://bucket/c.jsonl"))
    assert server["c.jsonl"] == (tmp_path / "c.jsonl").read_bytes()
    assert json.loads(server["c.settings.json"])["model"] == model

    references = [
        {"id": path.name, "image": path.name, "reference_units": ["a red cube"]} for path in sorted(pictures.iterdir())
    ]
    graphs = [
        {"id": path.name, "candidate": {"objects": ["cube"]}, "references": [{"objects": ["cube", "ball"]}]}
        for path in sorted(pictures.iterdir())
    ]
    server.put("refs.jsonl", "".join(json.dumps(line) + "\n" for line in references).encode())
    server.put("graphs.jsonl", "".join(json.dumps(line) + "\n" for line in graphs).encode())
    for name in ("one", "two"):
        evaluate.main(["--metric=capture", "--graphs=gs://bucket/graphs.jsonl", f"--out=gs://bucket/eval/{name}"])
    assert json.loads(server["eval/one/results.json"]) == json.loads(server["eval/two/results.json"])
    capsys.readouterr()
    compare.main(["gs://bucket/eval/one", "gs://bucket/eval/two", "--out=gs://bucket/eval/table"])
    assert "gs://bucket/eval/two" in capsys.readouterr().out
    assert json.loads(server["eval/table/comparison.json"])[1]["folder"] == "gs://bucket/eval/two"

    for path in finished.rglob("*"):
        if path.is_file() and path.name != ".lock" and not {"checkpoints", "model"} & {*path.parts}:
            server.put(f"runs/a/{path.relative_to(finished).as_posix()}", path.read_bytes())
    report.main([RUN])
    assert capsys.readouterr().out.splitlines()[-1] == f"{RUN}/report.html"
    assert server["runs/a/report.html"].lower().startswith(b"<!doctype html>")
    assert not [name for name in server.names() if name.endswith(".lock")]


@pytest.mark.slow
def test_references_are_written_to_a_bucket(server, tmp_path, finished):
    from judges.misbehaving import JudgeServer, well_behaved

    pictures = shutil.copytree(finished.workdir / "samples" / "images", tmp_path / "pictures")
    with JudgeServer(well_behaved) as judge:
        given = [f"--images={pictures}", f"--judge.endpoints={judge.url}", f"--judge.cache_dir={tmp_path / 'cache'}"]
        recaption.main([*given, "--out=gs://bucket/r.jsonl"])
        recaption.main([*given, f"--out={tmp_path / 'r.jsonl'}"])
    ours = [json.loads(line) for line in server["r.jsonl"].splitlines()]
    theirs = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line | {"image": ""} for line in ours] == [line | {"image": ""} for line in theirs]
    assert all(line["image"].startswith(str(pictures)) for line in ours)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("balcap_jax.train --config={micro} {eight} --workdir=gs://nowhere/run", "no bucket gs://nowhere; make it"),
        ("balcap_jax.caption --model=gs://bucket/none --images={here} --out=x.jsonl", "no model at gs://bucket/none:"),
        ("balcap_jax.caption --model={here} --images=gs://bucket/photos --out=x.jsonl", "no model at {here}"),
        ("balcap_jax.evaluate --suite=captions --data=gs://bucket/bench --captions=c.jsonl --out=o", "must lie on a"),
        ("balcap_jax.ablate --config={micro} --out=gs://bucket/study", "gs://bucket/study: it must lie on a disk;"),
        ("balcap_jax.report gs://bucket/none", "gs://bucket/none: no such directory"),
        ("balcap_jax.compare gs://bucket/none", "gs://bucket/none has no results.json"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(server, tmp_path, capsys, monkeypatch, given, reason):
    import importlib
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    places = {"here": tmp_path, "micro": Path(__file__).with_name("micro.py")}
    places["eight"] = "--config.stages.sft.batch_size=8 --config.stages.rl.batch_size=8"  # for the devices of tests
    name, *words = given.format(**places).split()
    module = importlib.import_module(name)
    module = importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
    with pytest.raises(SystemExit) as ended:
        module.main(words)
    assert ended.value.code == 2
    assert reason.format(**places) in the_one_line(capsys.readouterr().err)
    assert server.names() == []
    assert str(bucket.root()) not in reason
