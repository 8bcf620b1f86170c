"""Paths are resolved once: what TensorStore refuses or reads otherwise never reaches it, and no URL is a folder."""

import importlib
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import balcap_jax
from balcap_jax.cli.arguments import argparse, place
from balcap_jax.cli.disk_errors import for_tensorstore
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.config import recipes
from balcap_jax.models.formats import safetensors
from balcap_jax.training.checkpoint import Checkpointer

URLS = ("s3://bucket/x", "http://host/x", "hdfs://host/x", "file:///tmp/x", "gs:/bucket/run", " gs://b", "hf://a/b")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a/b", "a/b"),
        ("./a//b/.", "a/b"),
        ("a/b/", "a/b"),
        ("{here}/x/../y", "{here}/y"),
        ("/{here}/y/", "{here}/y"),
        ("///{here}//y", "{here}/y"),
        ("{here}/none/../../y", "{parent}/y"),
        ("{here}/link/../y", "{here}/deep/y"),  # As the system goes: from where the link leads.
        ("{here}/link", "{here}/link"),
        ("x/../y", "{here}/y"),
        ("../y", "{parent}/y"),
        ("/../../y", "/y"),
        ("..", "{parent}"),
        ("~/y", "{here}/home/y"),
        ("~/../y", "{here}/y"),
        ("./~/y", "~/y"),
        ("a\\b", "a\\b"),
        ("./gs://b", "gs:/b"),
        ("é\u0301 \U0001f600#?*", "é\u0301 \U0001f600#?*"),
    ],
)
def test_resolved(tmp_path, monkeypatch, given, found):
    here = tmp_path / "here"
    (here / "deep" / "inner").mkdir(parents=True)
    (here / "link").symlink_to(here / "deep" / "inner")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here / "home"))
    places = {"here": str(here), "parent": str(tmp_path)}
    assert str(resolved(given.format(**places))) == found.format(**places)


@pytest.mark.parametrize("given", URLS)
def test_a_url_is_refused_wherever_a_path_is_given(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    for use in (resolved, lambda path: Checkpointer(path), place):
        with pytest.raises((UserError, argparse.ArgumentTypeError), match=" is a URL, and "):
            use(given)
    for field in recipes.FIELDS.values():
        if field.is_path:
            changed = recipes.default_config()
            group, name = field.name.split(".")
            changed[group][name] = given
            with pytest.raises(UserError, match=f"config field '{field.name}' is a URL"):
                recipes.check(changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("~nobody-of-that-name/x", "names the home of a user that does not exist"),
        ("a\0b", "holds a character 0"),
        ("x" * 300, "cannot be a file .File name too long."),
    ],
)
def test_no_name_of_a_file(given, reason):
    with pytest.raises(UserError, match=f"model {reason}.*, got "):
        resolved(given, "model")


@pytest.mark.parametrize(
    "given",
    [
        "train --config={configs}/scenes.py:tiny --workdir=s3://bucket/run",
        "train --config={configs}/scenes.py:tiny --workdir={out} --config.data.data_dir=az://bucket/data",
        "config --config={configs}/scenes.py:tiny --config.model.path=s3://bucket/model",
        "report s3://bucket/run",
        "compare {out} hdfs://host/eval",
        "evaluate --metric=dcscore --out={out} --captions=http://host/c.jsonl",
        "evaluate --metric=capture --out={out} --judge.cache_dir=s3://bucket/judge",
        "recaption --images=file:///pictures --out={out}",
        "caption --model=s3://bucket/model --images={out} --out={out}.jsonl",
        "convert --from=hf://Qwen/x --out={out}",
        "ablate --config={configs}/scenes.py:tiny --out=gs:/bucket/study",
    ],
)
def test_commands_refuse_urls_at_the_start(tmp_path, monkeypatch, capsys, given):
    command, *words = given.format(out=tmp_path / "out", configs=Path(__file__).parents[2] / "configs").split()
    monkeypatch.chdir(tmp_path)
    is_folder = (Path(balcap_jax.__file__).parent / command).is_dir()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"balcap_jax.{command}{'.__main__' if is_folder else ''}").main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert " is a URL, and " in line
    assert not list(tmp_path.iterdir())


ODD = (
    "x/../plain",
    "a\\b",
    "a\\b/c",
    "x.__lock",
    "x.__lock/in",
    "nl\n",
    "\udcff",
    "é\u0301 %20#?",
    "trailing/",
    "gs:x",
)


@pytest.mark.parametrize("name", ODD)
def test_models_and_checkpoints_are_written_and_read_in_any_directory(tmp_path, name):
    place = resolved(f"{tmp_path}/{name}")
    place.mkdir(parents=True)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = [safetensors.NewTensor(name, array.dtype, array.shape, lambda: array) for name in "ab"]
    safetensors.write_directory(place, tensors, shard_bytes=1)
    for tensor in safetensors.read_directory(place).values():
        np.testing.assert_array_equal(tensor.mapped(), array)
        np.testing.assert_array_equal(tensor.read(1, 2), array[1:])
    with Checkpointer(f"{tmp_path}/{name}/checkpoints") as checkpointer:
        checkpointer.save(2, {"w": jnp.full(3, 2)}, {"clock": 1})
        checkpointer.wait()
        assert checkpointer.steps() == [2]
        restored, extra = checkpointer.restore(2, {"w": jnp.zeros(3, int)})
        assert restored["w"].tolist() == [2, 2, 2]
        assert extra == {"clock": 1}
    assert sorted(os.listdir(tmp_path)) == [Path(name).parts[-1 if ".." in name else 0]]


def test_a_plain_directory_is_reached_as_it_is(tmp_path):
    assert for_tensorstore(tmp_path / "checkpoints") == tmp_path / "checkpoints"


def test_a_run_is_resumed_by_another_spelling_of_its_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved, now = recipes.default_config(), recipes.default_config()
    for one, other in (("data", "./data/"), ("data", f"{tmp_path}/data"), ("x/../data", "data")):
        saved.data.data_dir, now.data.data_dir = one, other
        assert recipes.differences(saved, now) == []
    now.data.data_dir = "other"
    assert recipes.differences(saved, now) == ["data.data_dir: 'x/../data' -> 'other'"]


@pytest.mark.parametrize(
    ("given", "meant"), [("gs:/bucket/x", "gs://bucket/x"), (" gs://b", "gs://b"), ("GS://b/x", "gs://b/x")]
)
def test_a_gs_path_that_is_misspelt(given, meant):
    with pytest.raises(UserError, match=rf"; did you mean {meant}\?$"):
        resolved(given)
