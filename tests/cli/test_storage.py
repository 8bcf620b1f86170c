"""Outputs in a bucket: whole objects, the order in which they are sent, locks, and what a reader meets after a kill."""

import dataclasses
import fcntl
import importlib.util
import itertools
import json
import os
import random
import shutil
import types

import pytest
from fake_bucket import serving

from balcap_jax.cli import bucket, bucket_lock, storage
from balcap_jax.cli.bucket import BucketError, Changed
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, resolved


@pytest.fixture(scope="module")
def server():
    with serving("bucket", "other") as found:
        yield found


@pytest.fixture(autouse=True)
def fresh(server, monkeypatch):
    for objects in server.buckets.values():
        objects.clear()
    storage._remote.clear()
    storage._here.clear()
    for path in bucket.root().iterdir():
        shutil.rmtree(path)
    server.requests.clear()
    server.bytes.clear()
    # Pauses between tries take seconds.
    import gcsfs.retry

    async def soon(seconds):
        del seconds

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=soon))
    monkeypatch.setattr(bucket, "_PAUSE", 0.0)


# ---- paths


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("gs://bucket/a/b", "gs://bucket/a/b"),
        ("gs://bucket//a///b/", "gs://bucket/a/b"),
        ("gs://bucket", "gs://bucket"),
        ("gs://my-bucket.example.com/run v2/é", "gs://my-bucket.example.com/run v2/é"),
    ],
)
def test_a_path_of_this_machine_stands_for_an_object(given, url):
    path = resolved(given)
    assert storage.url_of(path) == url
    assert path.is_absolute()
    assert bucket.shown(f"no file {path}, line 3") == f"no file {url}, line 3"
    assert not path.exists()


@pytest.mark.parametrize("given", ["gs://", "gs:///a", "gs://B/x", "gs://bucket/../x", "gs://bucket/a\n", "gs://b c/d"])
def test_no_place_in_a_bucket(given):
    with pytest.raises(UserError, match="is no place in a bucket; write gs://BUCKET/FOLDER"):
        resolved(given)


def test_other_paths_are_nobodys(tmp_path):
    bucket.root()
    assert storage.url_of(tmp_path / "gs" / "x") is None
    assert bucket.shown(tmp_path) == str(tmp_path)


def test_without_gcsfs_one_line_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else found(name))
    with pytest.raises(UserError, match=r"gs://b.c/x: a gs:// path needs gcsfs; install it with `pip install 'balcap"):
        resolved("gs://b.c/x")


# ---- objects


def test_objects_are_written_listed_and_read(server, monkeypatch):
    monkeypatch.setattr(bucket, "_PAGE", 3)
    for number in range(8):
        bucket.write(f"gs://bucket/a/{number}", b"x" * number)
    bucket.write("gs://bucket/a", b"itself")
    bucket.write("gs://bucket/ab", b"another")
    bucket.write("gs://bucket/a/deep/er", b"01234567")
    found = bucket.objects("gs://bucket/a")
    assert [entry.url.removeprefix("gs://bucket/") for entry in found] == [
        "a", *(f"a/{n}" for n in range(8)), "a/deep/er"
    ]  # fmt: skip
    assert [entry.size for entry in found] == [6, *range(8), 8]
    assert [entry.url for entry in bucket.objects("gs://bucket/a", deep=False)][-1] == "gs://bucket/a/7"
    assert bucket.children("gs://bucket/a") == [*"01234567", "deep"]
    assert bucket.read_range("gs://bucket/a/deep/er", 2, 3) == b"234"
    assert bucket.stat("gs://bucket/none") is None
    bucket.copy("gs://bucket/a/deep/er", "gs://other/copied")
    assert bucket.read("gs://other/copied") == b"01234567"
    bucket.delete("gs://bucket/a/deep/er")
    bucket.delete("gs://bucket/a/deep/er")
    with pytest.raises(FileNotFoundError):
        bucket.read("gs://bucket/a/deep/er")


def test_a_precondition_keeps_two_writers_apart():
    first = bucket.write("gs://bucket/x", b"1", 0)
    with pytest.raises(Changed):
        bucket.write("gs://bucket/x", b"2", 0)
    second = bucket.write("gs://bucket/x", b"3", first)
    with pytest.raises(Changed):
        bucket.write("gs://bucket/x", b"4", first)
    with pytest.raises(Changed):
        bucket.delete("gs://bucket/x", first)
    assert bucket.read("gs://bucket/x") == b"3"
    bucket.delete("gs://bucket/x", second)
    assert bucket.stat("gs://bucket/x") is None


def test_large_files_are_sent_in_pieces(server, tmp_path):
    content = random.Random(0).randbytes(6 << 20)  # gcsfs sends 5 MiB and more so.
    (tmp_path / "large").write_bytes(content)
    bucket.upload(tmp_path / "large", "gs://bucket/large")
    assert server["large"] == content
    assert server.requests == {"POST": 2}
    seen = bucket.stat("gs://bucket/large")
    assert bucket.download(seen, tmp_path / "here" / "again") == seen.generation
    assert (tmp_path / "here" / "again").read_bytes() == content
    assert seen.crc == bucket.checksum(tmp_path / "large")
    server.put("large", b"newer")
    assert bucket.download(seen, tmp_path / "here" / "again") == bucket.stat("gs://bucket/large").generation
    assert (tmp_path / "here" / "again").read_bytes() == b"newer"
    now = bucket.stat("gs://bucket/large")
    with pytest.raises(BucketError, match="gs://bucket/large came with other bytes than the bucket holds"):
        bucket.download(dataclasses.replace(now, crc=seen.crc), tmp_path / "x")
    assert os.listdir(tmp_path / "here") == ["again"]


@pytest.mark.parametrize(
    ("url", "refuse", "reason"),
    [
        ("gs://nowhere/x", None, "there is no bucket gs://nowhere; make it, or mend its name"),
        ("gs://bucket/x", (401, "Anonymous caller"), "gs://bucket asks for credentials.*; run `gcloud auth applicat"),
        ("gs://bucket/x", (403, "no objects.create"), "gs://bucket/x: access is denied; give this account the roles"),
        ("gs://bucket/x", (400, "odd"), "gs://bucket/x cannot be reached .*odd.*; what is in the bucket is whole"),
    ],
)
def test_what_a_bucket_refuses_is_one_line(server, tmp_path, capfd, url, refuse, reason):
    (tmp_path / "x").write_text("x")
    calls = [
        lambda: bucket.check(url),
        lambda: bucket.write(url, b"x"),
        lambda: bucket.upload(tmp_path / "x", url),
        lambda: bucket.children(url),
    ]
    with server.failing(refuse=refuse):
        for call in calls:
            with pytest.raises(BucketError, match=reason) as raised:
                call()
            assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_bucket_that_fails_is_asked_again(server, tmp_path):
    with server.failing(share=0.3):
        for number in range(20):
            bucket.write(f"gs://bucket/{number}", bytes([number]))
            assert bucket.read(f"gs://bucket/{number}") == bytes([number])
    assert server.failed > 8
    assert server.state() == {str(number): bytes([number]) for number in range(20)}


def test_a_bucket_that_stays_away_is_said_in_one_line(server, monkeypatch):
    monkeypatch.setattr(bucket, "_PATIENCE", 0.0)
    with server.failing(share=1.0), pytest.raises(BucketError, match="gs://bucket/x cannot be reached"):
        bucket.write("gs://bucket/x", b"x")


# ---- reading


def test_what_is_fetched_once_is_not_fetched_again(server):
    folder = resolved("gs://bucket/model")
    for name in ("config.json", "a.safetensors", "deep/c"):
        server.put(f"model/{name}", name.encode())
    storage.fetch(folder, but=(".safetensors",))
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["c", "config.json"]
    assert storage.is_file(folder / "a.safetensors")
    assert storage.size_of(folder / "a.safetensors") == 13
    assert storage.read_range(folder / "a.safetensors", 2, 4) == b"safe"
    assert storage.files_in(folder, ".safetensors") == [folder / "a.safetensors"]
    before = server.bytes["out"]
    server.put("model/deep/c", b"changed")
    storage.fetch(folder, but=(".safetensors",))
    assert (folder / "deep" / "c").read_text() == "changed"
    assert server.bytes["out"] - before < 3000  # lists, and that one object
    assert storage.fetch(resolved("gs://bucket/none")) == resolved("gs://bucket/none")


def test_without_the_marker_nothing_is_there(server):
    folder = resolved("gs://bucket/data")
    server.put("data/a", b"a")
    storage.fetch(folder, marker="end")
    assert not folder.exists()
    server.put("data/end", b"")
    storage.fetch(folder, marker="end")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "end"]


# ---- writing


def test_a_reader_meets_all_or_nothing_of_what_is_sent(server):
    """Whatever request is the last one that the server gets: it may have done it or not."""
    folder = resolved("gs://bucket/model")
    for name in ("a", "b", "c/d", "end", "config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("new " + name)
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket, "_PATIENCE", 0.0)
        for stop, done in [(stop, done) for stop in range(1, 6) for done in (False, True)]:
            server.buckets["bucket"].clear()
            with server.failing(stop_at=stop, stop_done=done), pytest.raises(BucketError):
                storage.send(folder, last=("end", "config"))
            names = server.names()
            assert names.count("model/config") == (stop == 5 and done)
            if "model/config" in names:
                assert len(names) == 5
            seen.add(len(names))
    assert {0, 5} <= seen
    storage.send(folder, last=("end", "config"))
    assert server["model/c/d"] == b"new c/d"
    with pytest.MonkeyPatch.context() as patch, server.failing(stop_at=2):
        patch.setattr(bucket, "_PATIENCE", 0.0)
        with pytest.raises(BucketError):
            storage.remove(folder, first=("config", "end"))
    assert "model/config" not in server.names()
    storage.remove(folder, first=("config", "end"))
    assert server.names() == []


def test_what_grows_is_sent_whole_and_in_order(server):
    out = resolved("gs://bucket/eval")
    server.put("eval/old.json", b"old")
    server.put("eval/gone.json", b"gone")
    server.put("eval/skipped/x", b"x")
    with storage.kept(out, but=("skipped",)) as kept:
        assert (out / "old.json").read_text() == "old"
        assert not (out / "skipped").exists()
        assert server.names("eval") == [
            "eval/.lock", "eval/gone.json", "eval/old.json", "eval/skipped/x"
        ]  # fmt: skip
        (out / "items.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}\n{"to')
        (out / "gone.json").unlink()
        (out / ".hidden").write_text("")
        (out / "x.tmp").write_text("")
        (out / "model.writing").mkdir()
        (out / "model.writing" / "x").write_text("")
        with storage.kept(out / "inside.jsonl") as inner:
            assert inner is None
        kept.send()
        assert server["eval/items.jsonl"] == b'{"a": 1}\n{"a": 2}\n'
        assert server.names("eval") == ["eval/.lock", "eval/items.jsonl", "eval/old.json", "eval/skipped/x"]
        sent = bucket.stat("gs://bucket/eval/items.jsonl").generation
        (out / "items.jsonl").write_bytes(b"newer here")
        assert storage.fetch(out / "items.jsonl").read_bytes() == b"newer here"  # Not the bucket's.
        (out / "items.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}\n{"to')
        kept._sent[out / "items.jsonl"] = storage._stamp(out / "items.jsonl")
        assert [kept.holds(path) for path in (out, out / "a" / "b", out / "skipped" / "x", out.parent)] == [
            True, True, False, False
        ]  # fmt: skip
        kept.send()
        assert bucket.stat("gs://bucket/eval/items.jsonl").generation == sent  # Nothing has changed.
        (out / "items.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}\n{"to": 3}\n')
        os.utime(out / "items.jsonl", ns=(1, 1))
        (out / "results.json").write_text("{}")
        with server.failing(stop_at=1, stop_done=True), pytest.MonkeyPatch.context() as patch:
            patch.setattr(bucket, "_PATIENCE", 0.0)
            with pytest.raises(BucketError):
                kept.send()
        assert "eval/results.json" not in server.names()  # The older change goes first.
    assert server["eval/items.jsonl"].endswith(b'{"to": 3}\n')
    assert server.names("eval") == ["eval/items.jsonl", "eval/old.json", "eval/results.json", "eval/skipped/x"]


def test_lines_go_on_where_another_machine_stopped(server):
    out = resolved("gs://bucket/captions.jsonl")
    beside = [out.with_name("captions.settings.json")]
    for number in range(3):
        with storage.kept(out, beside), AppendedLines(out) as lines:
            assert lines.entries == [{"n": k} for k in range(number)]
            lines.append([{"n": number}])
            beside[0].write_text(str(number))
        out.unlink()  # Another machine has no copy.
        storage._here.clear()
    assert server.state() == {"captions.jsonl": b'{"n": 0}\n{"n": 1}\n{"n": 2}\n', "captions.settings.json": b"2"}


def test_what_could_not_be_sent_stays_on_this_machine(server, monkeypatch):
    monkeypatch.setattr(bucket, "_PATIENCE", 0.0)
    monkeypatch.setattr(bucket, "_is_kept", False)
    out = resolved("gs://bucket/eval")

    def work() -> None:
        with storage.kept(out):
            out.mkdir(parents=True)
            (out / "items.jsonl").write_text("{}\n")
            server.faults.refuse = (403, "Forbidden 403")

    with pytest.raises(UserError, match=r"gs://bucket/eval lacks the newest .*403.*; that is in ") as raised:
        work()
    server.faults.refuse = None
    place = bucket.shown(raised.value).rpartition(" ")[2]
    with open(f"{place}/items.jsonl") as file:
        assert file.read() == "{}\n"
    assert bucket._is_kept


# ---- locks


def test_one_process_holds_an_output(server, monkeypatch):
    monkeypatch.setattr(bucket_lock.Lock, "RENEWED", 0.1)
    with storage.kept(resolved("gs://bucket/run")) as kept:
        held = json.loads(server["run/.lock"])
        assert held["token"] == kept.lock.token == bucket_lock.owner_of("gs://bucket/run/.lock")["token"]
        assert held["process"] == os.getpid()
        second = bucket_lock.Lock("gs://bucket/run/.lock", "gs://bucket/run")
        with pytest.raises(UserError, match=r"gs://bucket/run: another process is writing there \(process \d+ of host"):
            second.__enter__()
    assert server.names() == []


def test_the_lock_of_a_process_that_is_gone_changes_hands_at_once(server):
    said = []
    server.put("run/.lock", json.dumps({"machine": bucket_lock._machine(), "process": 2**22 + 1, "host": "h"}).encode())
    with bucket_lock.Lock("gs://bucket/run/.lock", "gs://bucket/run", said.append) as lock:
        assert json.loads(server["run/.lock"])["token"] == lock.token
    assert said == [
        f"gs://bucket/run/.lock was left behind by process {2**22 + 1} of host h, ?, which is gone: taken over"
    ]
    assert server.names() == []


def test_the_lock_of_a_lost_machine_changes_hands_after_a_while(server):
    said = []
    server.put("run/.lock", b'{"machine": "another", "process": 1, "host": "lost", "time": "then", "token": "t"}')
    lock = bucket_lock.Lock("gs://bucket/run/.lock", "gs://bucket/run", said.append)
    lock.PATIENCE, lock.RENEWED = 0.3, 0.2
    with lock:
        assert json.loads(server["run/.lock"])["token"] == lock.token
    assert "is held by process 1 of host lost, then; looking for" in said[0]
    assert said[1].endswith("taken over")


def test_a_holder_whose_lock_was_taken_writes_no_more(server, monkeypatch):
    monkeypatch.setattr(bucket, "_is_kept", False)
    out = resolved("gs://bucket/run")

    def work() -> None:
        with storage.kept(out) as kept:
            server.put("run/.lock", b'{"token": "other", "process": 7, "host": "thief", "time": "now"}')
            kept.lock.RENEWED = 0.01
            kept.lock._renew()
            out.mkdir(parents=True)
            (out / "x").write_text("x")

    with pytest.raises(UserError, match="was taken over by process 7 of host thief, now; nothing more is written"):
        work()
    assert server.names() == ["run/.lock"]


def test_an_answer_that_was_lost_costs_no_lock(server, monkeypatch):
    """The first request is done, and its answer lost: asked again, the server says that the object is there."""
    chances = itertools.chain([0.0], itertools.repeat(1.0))
    chosen = types.SimpleNamespace(random=lambda: next(chances), randrange=lambda n: 2)
    monkeypatch.setattr(server, "_random", chosen)
    with server.failing(share=0.5), bucket_lock.Lock("gs://bucket/run/.lock", "gs://bucket/run") as lock:
        assert json.loads(server["run/.lock"])["token"] == lock.token
    assert server.failed >= 1


def test_what_a_killed_process_left_here_is_removed(tmp_path, monkeypatch):
    dead, alive, unsent, new = (tmp_path / name for name in ("1-dead", "2-alive", "3-unsent", ".new"))
    for folder in (dead, alive, unsent, new):
        (folder / "gs").mkdir(parents=True)
        (folder / "alive").touch()
    (unsent / "unsent").symlink_to("gs")
    with (alive / "alive").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        bucket._remove_dead(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new", "2-alive", "3-unsent"]
