"""Checkpoints come back bit for bit or not at all; signals only set a flag."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balcap_jax.cli import files
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import open_regular
from balcap_jax.cli.process import PreemptionFlag, quieten_libraries
from balcap_jax.training import checksums
from balcap_jax.training.checkpoint import Checkpointer, branch
from balcap_jax.training.checksums import find_damage

ROOT = Path(__file__).parents[2]


class State(NamedTuple):
    step: jax.Array
    params: dict
    optimizer: tuple


def make_state(seed: int = 0):
    """A state with every kind of leaf and container that training uses."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "decoder": {"embed": jax.random.normal(keys[0], (33, 8)), "norm.scale": jnp.ones(8)},
        "vision": [jax.random.normal(keys[1], (4, 3, 2)).astype(jnp.bfloat16), jnp.array([jnp.nan, -0.0, jnp.inf])],
    }
    # Trainable parameters as one flat dict whose keys hold slashes, as in the train step.
    trainable = {"decoder/embed": params["decoder"]["embed"], "decoder/norm.scale": params["decoder"]["norm.scale"]}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), dict.fromkeys(trainable, True))
    )
    moments = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, optimizer.init(trainable))
    return {
        "state": State(jnp.int32(seed + 5), params, moments),
        "rng": jax.random.key_data(keys[2]),
        "clock": np.array([2**53 + 1, -1], np.int64),
        "reference": None,
        "empty": {},
        "flags": (jnp.array([True, False]), jnp.float16(0.1)),
    }


def assert_same(a, b):
    """Same structure, container types, leaf types, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def run_script(body: str, *arguments: object, wait: bool = True):
    """Runs a script in a process of its own that sees one device, as a user's does."""
    command = [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)]
    # Commands keep both quiet: transformers misses PyTorch, and XLA raises false alarms about programs from the cache.
    quiet = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = os.environ | quiet
    options = {"text": True, "cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **options)
    if not wait:
        return process
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    return subprocess.CompletedProcess(command, 0, output, errors)


@pytest.fixture(autouse=True)
def quiet_libraries(monkeypatch):
    """As in a command: what Orbax logs of failures beside the line is dropped."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "filters", list(logger.filters))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    quieten_libraries()


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_bit_exact(tmp_path, asynchronous):
    state = make_state()
    extra = {"iterator": b"\x00\xff grain", "clock": {"rollout": 0.1 + 0.2}, "text": "ümlaut\n", "none": None, "l": [1]}
    with Checkpointer(tmp_path / "a" / "b", asynchronous=asynchronous) as checkpointer:
        checkpointer.save(7, state, extra)
        checkpointer.wait()
        assert checkpointer.latest_step() == 7
        restored, back = checkpointer.restore(7, state)
    assert_same(restored, state)
    assert back == extra
    with Checkpointer(tmp_path / "a" / "b") as later:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        shapes["clock"] = state["clock"]  # NumPy in, NumPy out: jax would cut int64 to 32 bits
        restored, back = later.restore(7, shapes)
        assert_same(restored, state)
        assert back == later.extra(7) == extra


def test_save_copies_before_the_caller_donates_or_changes(tmp_path):
    step = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x, host = jnp.arange(3_000_000, dtype=jnp.float32), np.arange(100_000)
    x, host_before = step(x), host.copy()
    before = np.array(x)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"x": x, "host": host})
        for _ in range(4):
            x = step(x)
            host += 1
        x.block_until_ready()
        restored, _ = checkpointer.restore(0, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype), "host": host})
    assert np.array_equal(restored["x"], before)
    assert np.array_equal(restored["host"], host_before)


def test_restored_arrays_can_be_donated_and_trained_on(tmp_path):
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    optimizer = optax.adam(0.1)

    def update(params, moments):
        updates, moments = optimizer.update(jax.tree.map(jnp.cos, params), moments)
        return optax.apply_updates(params, updates), moments

    update = jax.jit(update, donate_argnums=(0, 1))
    straight = (params, optimizer.init(params))
    for _ in range(4):
        straight = update(*jax.tree.map(jnp.copy, straight))
    halfway = (params, optimizer.init(params))
    for _ in range(2):
        halfway = update(*jax.tree.map(jnp.copy, halfway))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, halfway)
        resumed, _ = checkpointer.restore(2, halfway)
    for _ in range(2):
        resumed = update(*resumed)
    assert_same(resumed, straight)


def test_eight_devices_and_one_restore_each_others_checkpoints(tmp_path):
    value = np.arange(64, dtype=np.float32).reshape(16, 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with Checkpointer(tmp_path / "eight") as checkpointer:
        checkpointer.save(1, {"w": jax.device_put(value, sharding)})
    done = run_script(
        """
        import sys, jax, numpy as np
        from balcap_jax.training.checkpoint import Checkpointer
        assert jax.device_count() == 1, jax.devices()
        with Checkpointer(sys.argv[1]) as checkpointer:
            restored, _ = checkpointer.restore(1, {"w": jax.ShapeDtypeStruct((16, 4), np.float32)})
        assert np.array_equal(restored["w"], np.arange(64.0).reshape(16, 4))
        with Checkpointer(sys.argv[2]) as checkpointer:
            checkpointer.save(2, {"w": restored["w"] * 2})
        """,
        tmp_path / "eight",
        tmp_path / "one",
    )
    assert done.stdout == ""
    assert done.stderr == ""  # Orbax keeps quiet
    with Checkpointer(tmp_path / "one") as checkpointer:
        like = {"w": jax.ShapeDtypeStruct((16, 4), np.float32, sharding=sharding)}
        restored, _ = checkpointer.restore(2, like)
    assert restored["w"].sharding == sharding
    assert np.array_equal(restored["w"], 2 * value)


def test_partial_restore_reads_the_parameters_alone(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        like = {"state": State(None, state["state"].params, None)}
        restored, _ = checkpointer.restore(1, like, partial=True)
        assert_same(restored, like)
        message = message_of(checkpointer.restore, 1, {"stat": like["state"]}, partial=True)
    assert "stat/params/decoder/embed is not in it" in message


# ---- which steps are kept -------------------------------------------------------------------------------------------


def test_newest_steps_and_those_with_a_role_are_kept_also_by_a_later_run(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.keep_also("sft", 1)
        for step in range(5):
            checkpointer.save(step, {"x": jnp.int32(step)})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3, 4]
    with Checkpointer(tmp_path, keep=1) as later:
        later.keep_also("sft", 1)
        later.save(10, {"x": jnp.int32(10)})
        later.wait()
        assert later.steps() == [1, 10]
        assert int(later.restore(1, {"x": jnp.int32(0)})[0]["x"]) == 1


def test_a_role_that_moves_lets_the_step_before_go_with_the_next_save(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in range(4):
            checkpointer.save(step, {"x": jnp.int32(step)})
            checkpointer.keep_also("best", step if step < 2 else 1)
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]
        checkpointer.keep_also("best", None)
        checkpointer.save(4, {"x": jnp.int32(4)})
        checkpointer.wait()
        assert checkpointer.steps() == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(3, {"x": jnp.int32(1)})
        checkpointer.save(3, {"x": jnp.int32(2)})
        checkpointer.save(4, {"x": jnp.int32(3)})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 4]
        assert int(checkpointer.restore(3, {"x": jnp.int32(0)})[0]["x"]) == 1


@pytest.mark.parametrize("content", ["", '{"sft": ', "[]", '{"sft": "x"}'])
def test_a_list_of_tags_that_earlier_versions_wrote_is_not_read(tmp_path, content):
    (tmp_path / "tags.json").write_text(content)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.int32(1)})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1]


# ---- half-written and unreadable ------------------------------------------------------------------------------------


def test_hand_made_partial_directories_are_not_picked_up(tmp_path, caplog):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state)
    (tmp_path / "9").mkdir()  # nothing in it
    shutil.copytree(tmp_path / "3", tmp_path / "8")
    shutil.rmtree(tmp_path / "8" / "extra")  # a copy that was cut short
    shutil.copytree(tmp_path / "3", tmp_path / "7")
    (tmp_path / "7" / "arrays" / "manifest.ocdbt").unlink()
    shutil.copytree(tmp_path / "3", tmp_path / "6.orbax-checkpoint-tmp")
    (tmp_path / "5").write_text("a file")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [3]
        left = sorted(path.name for path in tmp_path.glob("incomplete-*"))
        assert left == ["incomplete-7", "incomplete-8", "incomplete-9"]
        assert_same(checkpointer.restore(checkpointer.latest_step(), state)[0], state)
        checkpointer.save(8, state)  # the number is free again
        checkpointer.wait()
        assert checkpointer.steps() == [3, 8]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["3", "8", "incomplete-9"]
    told = [record.message for record in caplog.records]
    assert told == [
        f"checkpoint {tmp_path}/{step} is torn ({found}): passed over, and kept as incomplete-{step} for now"
        for step, found in (
            (9, "sums.json is missing"),
            (8, "extra/commit_success.txt is missing"),
            (7, "arrays/manifest.ocdbt is missing"),
        )
    ]


def test_a_folder_whose_name_is_no_step_as_we_write_it_is_left_alone(two_steps, tmp_path, caplog):
    folder = copied(two_steps, tmp_path)
    others = ["0002", "007", "\N{ARABIC-INDIC DIGIT NINE}", "incomplete-01"]
    for name in others:
        shutil.copytree(folder / "2", folder / name)
    (folder / "007" / "sums.json").unlink()
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        for step in (7, 9):
            checkpointer.save(step, make_state())
        checkpointer.wait()
        assert checkpointer.steps() == [7, 9]
    assert branch(folder, tmp_path / "copy") == 9
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"7", "9", *others}
    assert not caplog.records


def test_kill_in_the_middle_of_a_save(tmp_path):
    process = run_script(
        """
        import sys, jax
        from balcap_jax.training.checkpoint import Checkpointer
        big = {"x": jax.random.normal(jax.random.key(0), (20_000_000,))}
        checkpointer = Checkpointer(sys.argv[1])
        checkpointer.save(1, {"x": big["x"][:5]})
        checkpointer.wait()
        print("ready", flush=True)
        checkpointer.save(2, big)
        checkpointer.wait()
        """,
        tmp_path,
        wait=False,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("2.*/arrays*/**/d/*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "2").exists(), "the save had ended before the kill: nothing was tested"
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored, _ = checkpointer.restore(1, {"x": jax.ShapeDtypeStruct((5,), jnp.float32)})
        assert np.array_equal(restored["x"], jax.random.normal(jax.random.key(0), (20_000_000,))[:5])
        checkpointer.save(2, restored)
        checkpointer.wait()
        assert checkpointer.latest_step() == 2
    assert not list(tmp_path.glob("*tmp*")), "leftovers of the killed run were not cleared"


PARTS = (
    "arrays/ocdbt.process_0/d/*",
    "arrays/d/*",
    "arrays/manifest.ocdbt",
    "arrays/_METADATA",
    "arrays/_sharding",
    "arrays/array_metadatas/*",
    "extra/metadata",
    "_CHECKPOINT_METADATA",
    "sums.json",
)
DAMAGES = {
    "empty": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two steps")
    with Checkpointer(folder, keep=5) as checkpointer:
        checkpointer.save(1, make_state())
        checkpointer.save(2, make_state(1), {"x": "long enough"})
    return folder


def copied(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_of_any_file_is_found(two_steps, tmp_path, damage):
    """That of the newest step; what a power cut leaves is among it."""
    for part in PARTS:
        folder = copied(two_steps, tmp_path / part.replace("/", "-").replace("*", "x"))
        file = max((folder / "2").glob(part), key=lambda path: path.stat().st_size)
        DAMAGES[damage](file)
        found = find_damage(folder / "2")
        assert found.startswith(str(file.relative_to(folder / "2"))) or part == "sums.json", (part, found)
        assert found
        assert not find_damage(folder / "1")


@pytest.mark.parametrize(("part", "damage"), [("arrays/ocdbt.process_0/d/*", "zeros"), ("extra/metadata", "empty")])
def test_a_torn_checkpoint_is_passed_over_with_one_line(two_steps, tmp_path, caplog, capfd, part, damage):
    folder, state = copied(two_steps, tmp_path), make_state()
    file = max((folder / "2").glob(part), key=lambda path: path.stat().st_size)
    DAMAGES[damage](file)
    with Checkpointer(folder, keep=1) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert_same(checkpointer.restore(1, state)[0], state)
        (line,) = [record.message for record in caplog.records]
        what = {"zeros": "is damaged", "empty": "is empty"}[damage]
        name = file.relative_to(folder / "2")
        assert line == f"checkpoint {folder}/2 is torn ({name} {what}): passed over, and kept as incomplete-2 for now"
        assert (folder / "incomplete-2").is_dir()
        checkpointer.save(2, state)  # The torn one is in nobody's way, and goes now.
        checkpointer.wait()
        assert checkpointer.steps() == [2]
        assert_same(checkpointer.restore(2, state)[0], state)
    assert [path.name for path in folder.iterdir()] == ["2"]
    assert capfd.readouterr().err == ""


def test_a_torn_step_between_whole_ones_is_no_step_and_goes_when_it_is_due(two_steps, tmp_path, caplog):
    """As an interrupted deletion leaves it."""
    folder = copied(two_steps, tmp_path)
    shutil.rmtree(folder / "1" / "arrays")
    with Checkpointer(folder, keep=2) as checkpointer:
        assert checkpointer.steps() == [2]
        message = message_of(checkpointer.restore, 1, make_state())
        assert message.startswith(f"checkpoint {folder}/1 is torn (arrays/")
        checkpointer.save(3, make_state())
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    assert not caplog.records


def test_where_no_checkpoint_is_whole_nothing_is_touched(two_steps, tmp_path, caplog):
    folder = copied(two_steps, tmp_path)
    DAMAGES["empty"](folder / "1" / "arrays" / "_METADATA")
    DAMAGES["missing"](folder / "2" / "extra" / "metadata")
    before = sorted(folder.rglob("*"))
    assert message_of(Checkpointer, folder) == (
        f"none of the checkpoints in {folder} is whole (2: extra/metadata is missing; 1: arrays/_METADATA is empty); "
        "put a whole one there, or choose another workdir"
    )
    assert sorted(folder.rglob("*")) == before
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "found"),
    [
        *[("{}", "sums.json is damaged"), ("[" * 10**5, "sums.json is damaged"), (None, "sums.json is no file")],
        *(
            (json.dumps({name: [1, 2]}), "sums.json is damaged")
            for name in ("a\0", "\ud800", "/etc/passwd", "../1/sums.json", "a/../../b", "a\nb")
        ),
        ('{"%s": [1, 2]}' % ("x" * 300), "x is missing"),
        ('{"x": [1, %s]}' % ("9" * 5000), "sums.json is damaged"),
    ],
)
def test_sums_that_are_no_list_of_files_are_damage(two_steps, tmp_path, content, found):
    """Whatever they hold: nothing of it is believed, looked for elsewhere, or waited for."""
    folder = copied(two_steps, tmp_path)
    sums = folder / "2" / "sums.json"
    sums.unlink()
    if content is None:
        os.mkfifo(sums)
    else:
        sums.write_text(content)
    assert find_damage(folder / "2").endswith(found)
    assert find_damage(folder / "2", content=False).endswith(found)
    shutil.rmtree(folder / "2" / "arrays")
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.steps() == [1]


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "x"), OSError(errno.EIO, "x"), PermissionError(errno.EACCES, "x"), MemoryError()]
)
@pytest.mark.parametrize("part", ["sums.json", "_METADATA"])
def test_what_does_not_say_that_a_checkpoint_is_torn_stops_the_run(two_steps, tmp_path, monkeypatch, error, part):
    """Memory, descriptors, rights and the disk itself: with them mended the newest checkpoint is there."""
    folder, opened = copied(two_steps, tmp_path), open_regular

    def refuse(path):
        if path.name == part and path.parents[1 if part == "_METADATA" else 0].name == "2":
            raise error
        return opened(path)

    with monkeypatch.context() as patched:
        patched.setattr(checksums, "open_regular", refuse)
        patched.setattr(files, "open_regular", refuse)
        reason = os.strerror(error.errno).lower() if isinstance(error, OSError) else "MemoryError: "
        message = message_of(Checkpointer, folder)
    assert message.startswith(f"can't read {folder}/2: ")
    assert message.endswith("; mend that and run the same command again")
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.steps() == [1, 2], reason


@pytest.mark.parametrize("error", [MemoryError("out of memory"), ValueError("RESOURCE_EXHAUSTED: Too many open files")])
def test_an_error_while_a_whole_checkpoint_is_restored_does_not_blame_it(two_steps, tmp_path, monkeypatch, error):
    folder = copied(two_steps, tmp_path)

    def refuse(*_, **__):
        raise error

    with Checkpointer(folder) as checkpointer:
        monkeypatch.setattr(checkpointer._manager, "restore", refuse)
        for message in (message_of(checkpointer.restore, 2, make_state()), message_of(checkpointer.extra, 2)):
            assert message.startswith(f"can't read {folder}/2: ")
            assert message.endswith("; mend that and run the same command again")
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s["state"].params["decoder"].update(extra=jnp.ones(2)), "state/params/decoder/extra is not in it"),
        (lambda s: s["state"].params["decoder"].pop("embed"), "state/params/decoder/embed is in it, but not"),
        (
            lambda s: s["state"].params["decoder"].update(embed=jnp.ones((33, 9))),
            "state/params/decoder/embed is float32 (33, 8) in it, but float32 (33, 9) is wanted",
        ),
        (lambda s: s.update(rng=jnp.zeros(2, jnp.int32)), "rng is uint32 (2,) in it, but int32 (2,) is wanted"),
        (lambda s: s.update(reference=jnp.zeros(2)), "reference is not in it"),
    ],
)
def test_another_model_names_the_first_path_that_differs(tmp_path, change, expected):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
        other = make_state()
        change(other)
        message = message_of(checkpointer.restore, 1, other)
    assert f"checkpoint {tmp_path}/1 is of another model or optimizer: {expected}" in message


@pytest.mark.parametrize(
    ("arrays", "extra", "expected"),
    [
        ({"a": {"b": 3}}, {}, "a/b: a checkpoint holds arrays, got int"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, {}, r"two leaves of the tree have the path a\.b"),
        ({"a": np.ones(1)}, {"x": [np.float32(1)]}, r"extra\.x\[0\]: float32 is neither JSON nor bytes"),
        ({"a": np.ones(1)}, {"x": {1: 2}}, r"extra\.x: keys must be strings"),
    ],
)
def test_what_can_not_come_back_is_refused(tmp_path, arrays, extra, expected):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises((TypeError, ValueError), match=expected):
            checkpointer.save(1, arrays, extra)
        assert checkpointer.steps() == []


# ---- a disk that refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_full_disk_is_one_line_and_the_checkpoint_before_stays_valid(tmp_path, asynchronous):
    """A limit on the size of files stands in for the full disk: writes fail half-way in the same place."""
    done = run_script(
        """
        import resource, signal, sys, jax
        from balcap_jax.cli.process import install
        from balcap_jax.training.checkpoint import Checkpointer
        from balcap_jax.cli.errors import UserError
        install()
        checkpointer = Checkpointer(sys.argv[1], keep=1, asynchronous=sys.argv[2] == "True")
        x = jax.random.normal(jax.random.key(0), (1_000_000,))
        checkpointer.save(1, {"x": x[:1000]})
        checkpointer.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            checkpointer.save(2, {"x": x})
            checkpointer.wait()
        except UserError as error:
            print(error)
        assert checkpointer.steps() == [1]
        checkpointer.close()
        """,
        tmp_path,
        asynchronous,
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    for part in ("can't write", str(tmp_path), "File too large", "checkpoint 1 is whole", "another workdir"):
        assert part in done.stdout
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.steps() == [1]
        restored, _ = checkpointer.restore(1, {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)})
        assert np.array_equal(restored["x"], jax.random.normal(jax.random.key(0), (1_000_000,))[:1000])
        checkpointer.save(2, restored)
        checkpointer.wait()
        assert checkpointer.steps() == [2]


def test_directory_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = message_of(Checkpointer, tmp_path / "file" / "checkpoints")
    assert message.startswith(f"can't write checkpoints in {tmp_path}/file/checkpoints: not a directory")
    assert "another workdir" in message
    assert "file exists" in message_of(Checkpointer, tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory_is_found_at_once(tmp_path):
    tmp_path.chmod(0o555)
    try:
        assert "permission denied" in message_of(Checkpointer, tmp_path)
    finally:
        tmp_path.chmod(0o755)


def test_directory_that_is_removed_under_the_run(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c", asynchronous=False)
    checkpointer.save(1, {"x": jnp.ones(3)})
    shutil.rmtree(tmp_path / "c")
    assert "no such file or directory" in message_of(checkpointer.save, 2, {"x": jnp.ones(3)})


def test_no_room_at_all_is_found_at_once(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "no space left on the disk" in message_of(Checkpointer, tmp_path)


# ---- signals --------------------------------------------------------------------------------------------------------


def test_sigterm_and_the_first_sigint_only_set_the_flag():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with PreemptionFlag() as flag:
            assert not flag.requested
            os.kill(os.getpid(), number)
            assert flag.requested
            assert flag.signal_name == number.name
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_sigint_interrupts_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT)
    with PreemptionFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested

    def press_twice():
        with PreemptionFlag() as flag:
            os.kill(os.getpid(), signal.SIGINT)
            assert flag.requested
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second one did not interrupt")

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) == before


def test_ignored_sigint_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PreemptionFlag() as flag:
            os.kill(os.getpid(), signal.SIGINT)
            assert not flag.requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_terminated_loop_saves_its_step_and_exits_0(tmp_path):
    process = run_script(
        """
        import sys, time
        import jax.numpy as jnp
        from balcap_jax.cli.process import PreemptionFlag
        from balcap_jax.training.checkpoint import Checkpointer
        step = 0
        with Checkpointer(sys.argv[1]) as checkpointer, PreemptionFlag() as flag:
            print("running", flush=True)
            while not flag.requested:
                time.sleep(0.01)
                step += 1
            checkpointer.save(step, {"step": jnp.int32(step)})
        print(step)
        """,
        tmp_path,
        wait=False,
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == int(output)


def test_tasks_of_tensorstore_that_end_too_late_print_nothing(tmp_path, monkeypatch):
    """They do so while a save fails, before anybody knows of it: what is theirs is dropped from the start."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: told.append(str(one.exc_value)))
    quieten_libraries()
    with Checkpointer(tmp_path):
        for reason in ("Event loop is closed", "something else"):
            sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(reason)))
    assert told == ["something else"]


def test_a_directory_that_is_refused_ends_in_one_line_and_at_once(tmp_path):
    """Orbax's threads would wait ten minutes for directories that they make themselves."""
    done = run_script(
        """
        import os, sys, threading
        import numpy as np
        from balcap_jax.training.checkpoint import Checkpointer
        from balcap_jax.cli.errors import UserError
        from balcap_jax.cli.process import install
        install()
        make = os.mkdir
        def mkdir(path, *args, **kwargs):
            if "orbax-checkpoint-tmp" in str(path):
                raise OSError(28, "No space left on device", str(path))
            return make(path, *args, **kwargs)
        checkpointer = Checkpointer(sys.argv[1])
        os.mkdir = mkdir
        try:
            checkpointer.save(1, {"w": np.zeros(3)})
            checkpointer.wait()
        except UserError as error:
            print(error)
        """,
        tmp_path / "run",
    )
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert "no space left on the disk; nothing was saved yet" in line
