"""Checkpoints in a bucket: a step is one once it is sealed, and what a kill or a deletion leaves is passed over."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from balcap_jax.cli import bucket, storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.training.checksums import find_damage

URL = "gs://bucket/run/checkpoints"
FOLDER = "run/checkpoints"


@pytest.fixture(autouse=True)
def empty(server):
    server.buckets["bucket"].clear()


def state(step: int) -> dict:
    return {"w": jnp.arange(6.0) * step, "deep": {"count": jnp.int32(step)}}


def save(*steps: int, **options) -> None:
    with Checkpointer(URL, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), {"clock": step})


def dump(server, folder) -> None:
    for name, content in server.state().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_steps_are_saved_kept_and_read_by_another_process(server):
    with Checkpointer(URL, keep=1) as checkpointer:
        checkpointer.keep_also("stage", 2)
        for step in (1, 2, 3, 4):
            checkpointer.save(step, state(step), {"clock": step, "bytes": b"\0\1"})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 4]
    names = server.names()
    assert {name.split("/")[2] for name in names} == {"2", "4"}
    assert sum(name.endswith("/sums.json") for name in names) == 2
    with Checkpointer(URL) as checkpointer:
        assert checkpointer.latest_step() == 4
        arrays, extra = checkpointer.restore(4, state(0))
        np.testing.assert_array_equal(arrays["w"], np.arange(6.0) * 4)
        assert int(arrays["deep"]["count"]) == 4
        assert extra == {"clock": 4, "bytes": b"\0\1"}
        assert checkpointer.extra(2)["clock"] == 2
        arrays, _ = checkpointer.restore(2, {"deep": {"count": jnp.int32(0)}}, partial=True)
        assert int(arrays["deep"]["count"]) == 2


def test_a_step_without_its_seal_is_none_and_is_cleared(server):
    save(1, 2)
    for name in ("sums.json", "commit_success.txt"):
        del server.buckets["bucket"][f"{FOLDER}/2/{name}"]
    with Checkpointer(URL) as checkpointer:
        assert checkpointer.steps() == [1]
        assert server.names(f"{FOLDER}/2") == []
        checkpointer.save(2, state(2), {"clock": 20})
    with Checkpointer(URL) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        assert checkpointer.extra(2) == {"clock": 20}


def test_the_first_step_of_a_killed_run_is_no_obstacle(server):
    server.put(f"{FOLDER}/5/arrays/manifest.ocdbt", b"half")
    save(5)
    with Checkpointer(URL) as checkpointer:
        assert checkpointer.steps() == [5]


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_torn_step_is_passed_over_and_set_aside(server, caplog, damage):
    save(1, 2)
    name = next(name for name in server.names(f"{FOLDER}/2/arrays/") if "/d/" in name)
    content = server[name]
    if damage == "missing":
        del server.buckets["bucket"][name]
    else:
        server.put(name, content[:-1] if damage == "shorter" else bytes([content[0] ^ 1]) + content[1:])
    with caplog.at_level(logging.WARNING), Checkpointer(URL) as checkpointer:
        assert checkpointer.steps() == [1]
        assert f"checkpoint {URL}/2 is torn (arrays/" in caplog.text
        assert server.names(f"{FOLDER}/incomplete-2/arrays")
        assert not server.names(f"{FOLDER}/2/")
        checkpointer.save(2, state(2), {})
    assert not server.names(f"{FOLDER}/incomplete-2")


def test_without_a_whole_step_nothing_is_touched(server):
    save(1)
    name = next(name for name in server.names(f"{FOLDER}/1/arrays/") if "/d/" in name)
    del server.buckets["bucket"][name]
    before = server.state()
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is whole \(1: arrays/.* is missing\)") as error:
        Checkpointer(URL)
    assert bucket.shown(error.value).startswith(f"none of the checkpoints in {URL} is whole")
    assert server.state() == before


def test_what_a_resumed_run_needs_is_sent_before_the_seal(server, monkeypatch):
    workdir, order = resolved("gs://bucket/run"), []
    write, upload = bucket.write, bucket.upload
    monkeypatch.setattr(bucket, "write", lambda url, *rest: (order.append(url), write(url, *rest))[1])
    monkeypatch.setattr(bucket, "upload", lambda path, url: (order.append(url), upload(path, url))[1])
    with storage.kept(workdir, but=("checkpoints",)), Checkpointer(URL) as checkpointer:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"ste')
        checkpointer.save(1, state(1))
        checkpointer.wait()
        assert server["run/metrics.jsonl"] == b'{"step": 1}\n'
    order = [url.removeprefix("gs://bucket/run/") for url in order]
    assert order.index("metrics.jsonl") < order.index("checkpoints/1/sums.json")


def test_checkpoints_are_copied_to_a_disk_and_back(server, tmp_path):
    save(1)
    dump(server, tmp_path)
    place = tmp_path / FOLDER
    assert find_damage(place / "1") == ""
    with Checkpointer(place) as checkpointer:
        assert checkpointer.restore(1, state(0))[1] == {"clock": 1}
        checkpointer.save(2, state(2), {"clock": 2})
    server.buckets["bucket"].clear()
    for path in (place / "2").rglob("*"):
        if path.is_file():
            server.put(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    with Checkpointer(URL) as checkpointer:
        arrays, extra = checkpointer.restore(2, state(0))
        np.testing.assert_array_equal(arrays["w"], np.arange(6.0) * 2)
        assert extra == {"clock": 2}
    torn = next((place / "1" / "arrays" / "d").iterdir())
    content = torn.read_bytes()
    torn.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert find_damage(place / "1") == f"arrays/d/{torn.name} is damaged"


def test_a_bucket_that_refuses_is_one_line_and_nothing_is_lost(server):
    with Checkpointer(URL) as checkpointer:
        checkpointer.save(1, state(1))
        checkpointer.wait()
        with server.failing(refuse=(403, "Forbidden")):
            with pytest.raises(UserError, match=r"can't write checkpoint 2 in .*access is denied; give this account"):
                checkpointer.save(2, state(2))
            assert json.loads(server[f"{FOLDER}/1/sums.json"])
    with Checkpointer(URL) as checkpointer:
        assert checkpointer.steps() == [1]
    with pytest.raises(UserError, match="there is no bucket gs://nowhere"):
        Checkpointer("gs://nowhere/run/checkpoints")
