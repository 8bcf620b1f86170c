"""Training whose judge is a model on the same devices."""

import importlib.resources

import jax
import pytest
from command_runs import read_metrics, read_summary, the_one_line, train

from balcap_jax import models
from balcap_jax.config import recipes as configuration
from balcap_jax.data import photos
from balcap_jax.judges import prompts

CORPUS = "yes no Yes No YES NO one two three four five picture caption data marks code fact statement answer "


@pytest.fixture(scope="module")
def judge_directory(tmp_path_factory):
    """A random LLaVA of toy sizes whose tokenizer knows the words of an answer and of the questions."""
    questions = "".join(
        file.read_text() for file in importlib.resources.files(prompts).iterdir() if file.suffix == ".j2"
    )
    record = photos.Record("a", "", CORPUS * 20, (questions,))
    tokenizer = photos.caption_tokenizer(photos.Photos([record] * 3, 1, 0))
    sizes = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 16, "mlp": 16, "layers": 2}
    sizes |= {"width": 16, "heads": 2, "kv_heads": 1, "head_size": 8, "image_size": 24, "patch_size": 8}
    fields = configuration.default_config().model.to_dict() | sizes
    policy, processor = models.build(fields, tokenizer)
    params = jax.jit(policy.init)(jax.random.key(3))
    return models.save(tmp_path_factory.mktemp("judge") / "small", fields, params, processor)


def test_training_with_a_judge_on_the_mesh(tmp_path, data_dir, judge_directory):
    given = {
        "judge__name": "policy",
        "judge__path": judge_directory,
        "judge__scoring": "yes_no",
        "judge__dtype": "float32",
        "judge__prompt_buckets": "600",
        "judge__batch_size": 8,
        "stages__order": "rl",
        "stages__rl__steps": 2,
        "stages__rl__batch_size": 2,
        "stages__rl__eval_every": 0,
        "rollout__group_size": 2,
        "log__eval_images": 1,
        "log__eval_samples": 1,
    }
    train(tmp_path / "run", data_dir, **given)
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 2
    assert all(line["judge/failure_rate"] == 0 for line in lines)
    assert all(line["judge/calls"] > 0 for line in lines)
    assert all(0.2 <= line["reward/linguistic"] <= 1 for line in lines)
    assert read_summary(tmp_path / "run")["evaluations"]["rl"]["n"] == 1
    done = train(tmp_path / "other", data_dir, expected=2, **given | {"judge__path": tmp_path / "nowhere"})
    assert "no such folder" in the_one_line(done.stderr)
