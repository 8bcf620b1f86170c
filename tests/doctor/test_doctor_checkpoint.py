"""What `doctor` finds of a checkpoint: each planted fault by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor.set_up import assert_fault, cut

from balcap_jax.doctor import checkpoint

torch = pytest.importorskip("torch", reason="transformers needs torch to write a model")
from hub_directories import hub_directory  # noqa: E402

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4967215360\n"


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def reshape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (model / "config.json").write_text(json.dumps(config))


CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a shard is missing": (lambda model: shards(model)[1].unlink(), "is missing, though model", "download this shard"),
    "half of a shard": (lambda model: cut(shards(model)[0]), "is cut short", "download or copy it again"),
    "a pointer for a shard": (
        lambda model: shards(model)[0].write_text(POINTER),
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "a pointer for the tokenizer": (
        lambda model: (model / "tokenizer.json").write_text(POINTER),
        "tokenizer.json is a pointer of Git LFS",
        "git lfs pull",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json is missing", "copy"),
    "no processor": (
        lambda model: (model / "preprocessor_config.json").unlink(),
        "has no preprocessor_config.json",
        "download that file too",
    ),
    "other sizes": (reshape, "by config.json it is [40, 24]", "give the checkpoint that belongs to this config.json"),
    "no config": (lambda model: (model / "config.json").unlink(), "config.json is missing", "give a directory"),
}


@pytest.mark.parametrize("name", CHECKPOINT_FAULTS)
def test_faults_of_a_checkpoint(sound, tmp_path, name):
    plant, found, remedy = CHECKPOINT_FAULTS[name]
    shutil.copytree(sound.folder / "model", tmp_path / "model")
    plant(tmp_path / "model")
    (finding,), _ = checkpoint.look(sound.config(model__path=tmp_path / "model"), None)
    assert_fault(finding, "checkpoint", found, remedy)


def test_a_checkpoint_of_another_family(sound, tmp_path):
    hub_directory("llava", tmp_path / "model", torch.bfloat16)
    (finding,), _ = checkpoint.look(sound.config(model__path=tmp_path / "model"), None)
    assert_fault(finding, "checkpoint", "is of the family llava, the recipe 'qwen25vl_3b' is one of qwen2_5_vl", "take")


def test_a_frozen_part_that_is_not_there(sound):
    (finding,), _ = checkpoint.look(sound.config(stages__rl__freeze="^projector/"), None)
    assert_fault(finding, "checkpoint", "'stages.rl.freeze' ('^projector/') matches no parameter", "paths begin with")
