"""What `doctor` finds of places in a bucket, against a server of its API in this process."""

import errno
import importlib.util
import json
import os
import shutil
import socket
import threading
import types
import urllib.parse
from pathlib import Path

import pytest
from doctor.set_up import ANNOTATIONS, ROOT, assert_fault, write_lines
from fake_bucket import Refused

from balcap_jax.cli import bucket, bucket_lock, storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.config import recipes
from balcap_jax.data import parquet_files
from balcap_jax.data.items import items_of
from balcap_jax.doctor import __main__ as doctor
from balcap_jax.doctor import checkpoint, pictures, places
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding

RUN = "gs://bucket/runs/a"
ROLES = "give this account the roles storage.objectUser and storage.legacyBucketReader on gs://bucket"


@pytest.fixture(autouse=True)
def empty(server, monkeypatch):
    server.buckets["bucket"].clear()
    storage._remote.clear()
    storage._here.clear()
    for path in bucket.root().iterdir():
        shutil.rmtree(path)
    import gcsfs.retry

    async def soon(seconds):
        del seconds

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=soon))
    monkeypatch.setattr(bucket, "_PAUSE", 0.0)


def send(server, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            server.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def plant(server, monkeypatch, attribute: str, refuses) -> None:
    """The server refuses where `refuses(*arguments)` of one of its methods."""
    real = getattr(server, attribute)

    def method(*given):
        if refuses(*given):
            raise Refused(403, "no permission")
        return real(*given)

    monkeypatch.setattr(server, attribute, method)


# ---- the workdir -----------------------------------------------------------------------------------------------------


def test_a_new_workdir_is_tried_and_nothing_stays(server, sound):
    before = server.changes
    finding = places.workdir(sound.config(), RUN)
    assert finding == Finding(
        "workdir",
        OK,
        f"{RUN}: a run will begin there; objects are written, read and deleted, and its lock is free",
    )
    assert server.changes - before == 6, "three writes, one of them refused, and a deletion; the lock, and its end"
    assert server.names() == []


def test_a_bucket_as_a_whole_is_a_place(server, sound):
    assert places.workdir(sound.config(), "gs://bucket").verdict == OK
    assert server.names() == []
    send(server, sound.folder / "model", "")
    for name in server.names():
        server.buckets["bucket"][name.lstrip("/")] = server.buckets["bucket"].pop(name)
    [found], _ = checkpoint.look(sound.config(model__path="gs://bucket"), None)
    assert found.verdict == OK


def test_the_run_of_another_config(server, sound):
    server.put("runs/a/config.json", recipes.to_text(sound.config(seed=7)).encode())
    server.put("runs/a/metrics.jsonl", b"{}\n")
    before = server.state()
    changes = server.changes
    finding = places.workdir(sound.config(), RUN)
    assert_fault(finding, "workdir", f"{RUN} holds a run of another config (seed: 7 -> 0)", "choose another --workdir")
    assert server.changes == changes, "nothing was tried in somebody's run"
    assert "the run there goes on" in places.workdir(sound.config(seed=7), RUN).found
    assert server.state() == before
    assert not (resolved(RUN) / "metrics.jsonl").exists(), "the config alone is fetched"


def test_a_workdir_in_use(server, sound, monkeypatch):
    monkeypatch.setattr(bucket_lock.Lock, "RENEWED", 0.2)
    with bucket_lock.Lock(f"{RUN}/.lock", RUN):
        finding = places.workdir(sound.config(), RUN)
        assert server.names() == ["runs/a/.lock"]
    assert_fault(finding, "workdir", f"{RUN}: another process is writing there (process ", "wait for it, stop it, or")


def test_the_lock_of_a_process_that_is_gone(server, sound):
    owner = {"machine": bucket_lock._machine(), "process": 2**22 + 1, "host": "h"}
    server.put("runs/a/.lock", json.dumps(owner).encode())
    finding = places.workdir(sound.config(), RUN)
    assert finding.verdict == OK
    assert finding.details == (
        f"workdir: {RUN}/.lock was left behind by process {2**22 + 1} of host h, ?, which is gone: taken over",
    )
    assert server.names() == []


REFUSED = {
    "no bucket": ("gs://nowhere/run", None, "there is no bucket gs://nowhere", "make it, or mend its name"),
    "no name of a bucket": ("gs://B/run", None, "'gs://B/run' is no place in a bucket", "write gs://BUCKET/FOLDER"),
    "credentials": (RUN, (401, "Anonymous caller"), "gs://bucket asks for credentials", "run `gcloud auth applicat"),
    "access": (RUN, (403, "no objects.list"), f"{RUN}: access is denied", ROLES),
    "down": (RUN, (503, "Backend Error"), f"{RUN} cannot be reached", "look at this machine's network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bucket_that_cannot_be_used(server, sound, capfd, name):
    place, refuse, found, remedy = REFUSED[name]
    with server.failing(refuse=refuse), bucket.patience(0.0):
        finding = places.workdir(sound.config(), place)
    assert_fault(finding, "workdir", found, remedy)
    assert capfd.readouterr() == ("", "")


UNREACHABLE = {"a closed port": "http://127.0.0.1:9", "no such host": "http://balcap-no-such-host.invalid:80"}


@pytest.fixture
def clock(monkeypatch):
    """Time as `bucket` has it: pauses alone pass it, at once."""
    passed = [0.0]

    def sleep(seconds: float) -> None:
        passed[0] += seconds

    monkeypatch.setattr(bucket, "time", types.SimpleNamespace(monotonic=lambda: passed[0], sleep=sleep))
    return passed


@pytest.fixture
def connections(monkeypatch) -> list[str]:
    """The hosts that gcsfs tries to connect to, each time anew."""
    import aiohttp

    tried: list[str] = []
    connect = aiohttp.BaseConnector.connect

    async def counted(self, request, *more, **query):
        tried.append(request.url.host)
        return await connect(self, request, *more, **query)

    monkeypatch.setattr(aiohttp.BaseConnector, "connect", counted)
    return tried


def told_of_a_bucket_everywhere(sound, capsys) -> dict[str, dict[str, str]]:
    """What doctor says, by check, where all places that take a bucket have one and the server is not to be reached."""
    given = {"model.path": "gs://bucket/model", "data.units": "gs://bucket/u.jsonl", "data.data_dir": "gs://bucket/d"}
    with pytest.raises(SystemExit) as ended:
        doctor.main([*sound.command(RUN, **given), "--json"])
    assert ended.value.code == 1
    told = {entry["check"]: entry for entry in json.loads(capsys.readouterr().out)["checks"]}
    faults = {check for check, entry in told.items() if entry["verdict"] == FAULT}
    assert faults == {"checkpoint", "data", "references", "workdir"}
    for check, place in (("checkpoint", "gs://bucket/model"), ("workdir", RUN)):
        assert told[check]["found"].startswith(f"{place} cannot be reached (")
        remedy = "look at this machine's network, at the bucket's name, and at STORAGE_EMULATOR_HOST if that is set"
        assert told[check]["remedy"] == remedy
    return told


@pytest.mark.parametrize("name", UNREACHABLE)
def test_a_server_that_cannot_be_reached_is_tried_for_seconds_in_all(
    sound, capsys, monkeypatch, clock, connections, name
):
    """Once a second, by the first of all places that have a bucket; gcsfs by itself tries six times for each."""
    monkeypatch.setattr(bucket, "_PAUSE", 5.0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", UNREACHABLE[name])
    told = told_of_a_bucket_everywhere(sound, capsys)
    for check, place in (("checkpoint", "gs://bucket/model"), ("workdir", RUN)):
        assert told[check]["found"].startswith(f"{place} cannot be reached (Client")
    seconds = int(doctor.BUCKET_SECONDS)
    assert clock == [seconds]
    assert connections.count(urllib.parse.urlsplit(UNREACHABLE[name]).hostname) == seconds + 1


def test_a_server_that_never_answers_is_asked_once(sound, capsys, monkeypatch, connections):
    """It takes connections and keeps them: a silence that is longer than the seconds of a bucket is the last.

    Who would wait for ever is let go after a while, and says so.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        letting_go = threading.Timer(30.0, silent.close)
        letting_go.start()
        monkeypatch.setattr(bucket, "_SILENCE", 0.2)
        monkeypatch.setattr(doctor, "BUCKET_SECONDS", 0.1)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        told = told_of_a_bucket_everywhere(sound, capsys)
        letting_go.cancel()
    assert told["workdir"]["found"] == f"{RUN} cannot be reached (FSTimeoutError)"
    assert len(connections) == 1


def test_a_request_that_is_lost_is_sent_again_in_a_hurry_too(server, sound):
    with server.failing(share=0.3), bucket.patience(10.0):
        for _ in range(3):
            assert places.workdir(sound.config(), RUN).verdict == OK
    assert server.failed > 5
    assert server.names() == []


def without_gcsfs(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else found(name))


def test_without_gcsfs_all_else_is_checked(sound, capsys, monkeypatch):
    without_gcsfs(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        doctor.main([*sound.command(RUN), "--json"])
    assert ended.value.code == 1
    output, errors = capsys.readouterr()
    verdicts = {entry["check"]: entry["verdict"] for entry in json.loads(output)["checks"]}
    assert [check for check, verdict in verdicts.items() if verdict == FAULT] == ["workdir"]
    assert verdicts["disk"] == UNCHECKED
    assert errors == (
        f"not ready: workdir: {RUN}: a gs:// path needs gcsfs; install it with `pip install 'balcap-jax[gcs]'`, or "
        "mount the bucket\n"
    )


def test_a_bucket_that_may_only_be_read(server, sound, monkeypatch):
    plant(server, monkeypatch, "_store", lambda *_: True)
    assert_fault(places.workdir(sound.config(), RUN), "workdir", f"{RUN}/.doctor-", ROLES)
    assert server.names() == []


def test_a_bucket_in_which_nothing_may_be_deleted(server, sound, monkeypatch):
    plant(server, monkeypatch, "_object", lambda method, *_: method == "DELETE")
    assert_fault(places.workdir(sound.config(), RUN), "workdir", ": access is denied", ROLES)
    (left,) = server.names()
    assert left.startswith("runs/a/.doctor-"), "and no lock, which would keep the run waiting"


def test_a_store_without_preconditions(server, sound, monkeypatch):
    monkeypatch.setattr(server, "_check", lambda *_: None)
    finding = places.workdir(sound.config(), RUN)
    assert_fault(finding, "workdir", f"{RUN} replaces objects against a precondition", "choose another place")
    assert server.names() == []


def test_answers_that_are_lost_are_no_finding(server, sound):
    with server.failing(share=0.3):
        for _ in range(3):
            assert places.workdir(sound.config(), RUN).verdict == OK
    assert server.failed > 5
    assert server.names() == []


# ---- disk ------------------------------------------------------------------------------------------------------------


def test_a_model_must_fit_on_this_machine_and_checkpoints_need_not(sound, monkeypatch):
    config = sound.config(checkpoint__keep=100_000_000, judge__cache_dir="")
    size = places.sizes(config)
    assert min(size.models, size.logs) > 0
    free = size.models // 2 + size.logs  # One of two models at a time.
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    finding = places.disk(config, RUN)
    assert finding.verdict == OK
    assert f"for copies of what goes to {RUN}: a model of " in finding.found
    assert "a run leaves in its bucket checkpoints of" in finding.found
    free -= 1
    finding = places.disk(config, RUN)
    assert_fault(finding, "disk", f"are free at {bucket.copies()}, ", "make room there, or set TMPDIR to")
    assert f"most of it for copies of what goes to {RUN}" in finding.found
    assert bucket.copies().parent.is_dir()
    assert not storage.url_of(bucket.copies())
    free += 10
    made = (resolved("gs://bucket/data/scenes"), 10 + 10**12)
    finding = places.disk(config, RUN, made)
    assert_fault(finding, "disk", "most of it for a copy of the data set", "set TMPDIR to")


def test_a_copy_that_has_no_room(server, sound, monkeypatch):
    server.put("units.jsonl", b"{}\n")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bucket._client(), "get_file", full)
    found = {f.check: f for f in pictures.look(sound.config(data__units="gs://bucket/units.jsonl"), 96, False)[0]}
    assert found["data"].verdict == OK
    what = f"gs://bucket/units.jsonl: a copy of it has no room in {bucket.copies()} (No space left on device)"
    assert_fault(found["references"], "references", what, "make room there, or set TMPDIR to")


def test_the_judges_answers_need_a_disk(sound):
    finding = places.disk(sound.config(judge__cache_dir="gs://bucket/cache"), RUN)
    assert_fault(finding, "disk", "gs://bucket/cache: the judge's answers (judge.cache_dir) must lie on a disk", "copy")


# ---- checkpoint, data and what the reward reads ----------------------------------------------------------------------


def test_a_sound_set_up_in_a_bucket_passes_without_a_word_of_warning(server, sound, capsys):
    send(server, sound.folder / "model", "model")
    send(server, sound.folder / "prepared", "prepared")
    lines = [json.loads(line) for line in (sound.folder / "units.jsonl").read_text().splitlines()]
    lines = [line | {"image": str(sound.folder / line["image"])} for line in lines]
    server.put("units.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    given = {"model.path": "gs://bucket/model", "data.units": "gs://bucket/units.jsonl"}
    doctor.main(sound.command(RUN, **given, **{"data.data_dir": "gs://bucket/prepared"}))
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.splitlines()[-1] == "ready"
    assert str(bucket.root()) not in output
    assert not [word for word in ("fault", "warning", "error", "left out") if word in output.lower()]
    rows = {line.split()[1]: line for line in output.splitlines() if line.startswith("  ok ")}
    assert "gs://bucket/model: qwen2_5_vl, " in rows["checkpoint"]
    assert "13 samples to train on, 4 for validation, 7 held out for tests" in rows["data"]
    assert "units.jsonl has lines about 24 of 24 samples" in rows["references"]
    assert f"{RUN}: a run will begin there" in rows["workdir"]
    assert not list(bucket.root().rglob("*.safetensors")), "weights stay where they are"
    assert server.names("runs") == []


def test_a_checkpoint_in_a_bucket_without_a_shard(server, sound):
    send(server, sound.folder / "model", "model")
    name = server.names("model/model-")[1]
    del server.buckets["bucket"][name]
    (finding,), _ = checkpoint.look(sound.config(model__path="gs://bucket/model"), None)
    assert_fault(finding, "checkpoint", f"{bucket.SCHEME}bucket/{name} is missing", "download this shard")
    (finding,), _ = checkpoint.look(sound.config(model__path="gs://nowhere/model"), None)
    assert_fault(finding, "checkpoint", "there is no bucket gs://nowhere", "make it, or mend its name")


def test_units_that_are_not_in_the_bucket(sound):
    found = {f.check: f for f in pictures.look(sound.config(data__units="gs://bucket/none.jsonl"), 96, False)[0]}
    assert found["data"].verdict == OK
    assert_fault(found["references"], "references", "gs://bucket/none.jsonl", "")


def scenes(**more: object):
    sizes = {"data.train_size": 4, "data.validation_size": 2, "data.test_size": 4}
    batches = {f"stages.{name}.batch_size": 2 for name in ("vision", "align", "sft", "rl")}
    fields = sizes | batches | {"data.data_dir": "gs://bucket/data"}
    given = fields | {name.replace("__", "."): value for name, value in more.items()}
    return recipes.load(str(ROOT / "configs" / "scenes.py"), {name: str(value) for name, value in given.items()})


def test_scenes_in_a_bucket_are_made_once(server):
    config = scenes()
    findings, seen = pictures.look(config, 32, tokenizer=False)
    assert findings[0].found == f"scenes: 4 + 2 + 4 pictures will be made in {bucket.shown(seen.to_make[0])}"
    assert findings[0].found.partition(" made in ")[2].startswith("gs://bucket/data/scenes/")
    assert server.names() == []
    with pytest.MonkeyPatch.context() as patch:
        plant(server, patch, "_store", lambda *_: True)
        assert_fault(pictures.look(config, 32, tokenizer=False)[0][0], "data", ": access is denied", ROLES)
    pictures.data.load(config.data, 32, tokenizer=False)
    storage._here.clear()
    shutil.rmtree(bucket.root() / "bucket")
    (of_data, _), seen = pictures.look(config, 32, tokenizer=False)
    assert (of_data.verdict, seen.to_make) == (OK, None)
    assert of_data.found.startswith("scenes: 4 samples to train on, 2 for validation, 4 held out for tests")


PICTURES = {
    "a parquet file": ("parquet", "gs://bucket/docci/a.parquet", "a parquet file"),
    "a glob": ("parquet", "gs://bucket/docci/train-*.parquet", "a parquet file"),
    "a folder of parquet": ("parquet", "gs://bucket/docci", "a parquet file"),
    "a folder of pictures": ("photos", "gs://bucket/docci", "a folder of pictures (data.data_dir)"),
    "pictures of lines": ("photos", "gs://bucket/docci/list.jsonl", "a picture"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_in_a_bucket_must_lie_on_a_disk(server, sound, name):
    kind, place, what = PICTURES[name]
    for each in ("a.parquet", "train-00000.parquet", "0.png"):
        server.put(f"docci/{each}", b"PAR1")
    server.put("docci/list.jsonl", b'{"image": "0.png", "caption": "A thing."}\n')
    config = sound.config(data__name=kind, data__data_dir=place, data__manual_dir="")
    of_data, _ = pictures.look(config, 96, tokenizer=False)[0]
    remedy = "copy it (`gcloud storage cp -r`), or mount the bucket"
    assert_fault(of_data, "data", f": {what} must lie on a disk", remedy)
    assert of_data.found.startswith("gs://bucket/docci")
    assert of_data.remedy == remedy


def test_the_pictures_of_sharegpt4v_must_lie_on_a_disk(server, sound):
    server.put(f"data/{ANNOTATIONS}", b"[]")
    of_data, _ = pictures.look(sound.config(data__manual_dir="gs://bucket/data"), 96, tokenizer=False)[0]
    assert_fault(of_data, "data", "gs://bucket/data: the folder of the pictures (data.manual_dir) must lie on", "copy")


@pytest.mark.parametrize("place", ["a.parquet", "train-*.parquet", "A.PQ"])
def test_commands_refuse_parquet_files_in_a_bucket(server, place):
    server.put("docci/a.parquet", b"PAR1")
    path = resolved(f"gs://bucket/docci/{place}")
    reason = "a parquet file must lie on a disk; copy it"
    with pytest.raises(UserError, match=reason):
        items_of(path, "")
    with pytest.raises(UserError, match=reason):
        parquet_files.find(path, "what")
    with pytest.raises(UserError, match="must lie on a disk; copy it"):
        items_of(path.parent, "")
    assert not path.parent.exists(), "nothing is fetched"


@pytest.mark.parametrize("image", ["a.parquet#3", "0.png"])
def test_lines_about_pictures_in_a_bucket(server, sound, tmp_path, image):
    """Named by their URLs in a file on a disk, or beside a file in a bucket."""
    write_lines(tmp_path / "list.jsonl", [{"image": f"gs://bucket/{image}", "caption": "A thing."}])
    server.put("list.jsonl", json.dumps({"image": image, "caption": "A thing."}).encode())
    for place in (tmp_path / "list.jsonl", resolved("gs://bucket/list.jsonl")):
        with pytest.raises(UserError, match=f"/{image}: a picture must lie on a disk; copy it"):
            items_of(place, "")
        config = sound.config(data__name="photos", data__data_dir=bucket.shown(place), data__manual_dir="")
        of_data, _ = pictures.look(config, 96, tokenizer=False)[0]
        assert_fault(of_data, "data", f"gs://bucket/{image}: a picture must lie on a disk", "copy it")
