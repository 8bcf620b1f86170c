"""The block at the start of a run: each line against what the configuration and the data say."""

import types

import jax
import numpy as np
import pytest

from balcap_jax.config import recipes as configuration
from balcap_jax.data.input import Data
from balcap_jax.judges import cost
from balcap_jax.training import announce

GIVEN = {
    "data.manual_dir": "/sg4v",
    "data.units": "/sg4v/units.jsonl",
    "judge.endpoints": "http://a/v1,http://b/v1",
    "model.path": "/models/3b",
}
PARAMS = {"a": jax.ShapeDtypeStruct((1000, 1000), np.float32), "b": {"c": jax.ShapeDtypeStruct((234,), np.int8)}}
SPLITS = Data([None] * 1234, [None] * 9, [None] * 8, frozenset())
JUDGE = types.SimpleNamespace(about={"model": "judge-7b"})
SHOWN = [{"prompt": "What is\nhere?"}]


def lines_of(recipe: str, **overrides: str) -> dict[str, str]:
    config = configuration.load(recipe, GIVEN | {name.replace("__", "."): text for name, text in overrides.items()})
    text = announce.block(config, "qwen2_5_vl", PARAMS, SPLITS, SHOWN, JUDGE)
    return {line[:8].strip(): line[8:] for line in text.splitlines() if line[:8].strip()} | {"all": text}


def test_a_run_of_a_published_recipe():
    lines = lines_of("configs/qwen25vl_3b.py:lora")
    assert lines["model"] == "/models/3b: qwen2_5_vl, 1,000,234 parameters, computes in bfloat16; adapters of rank 64"
    assert lines["data"] == (
        "sharegpt4v in /sg4v: 1,234 samples to train on, 9 for validation, 8 for tests, with what "
        "/sg4v/units.jsonl says about them"
    )
    assert lines["reward"] == "balcap: precision 1, recall 1, linguistic 1; advantages by c_gdpo"
    joined = lines_of("configs/qwen25vl_3b.py:soft_min")["reward"]
    assert joined == f"{lines['reward']}, joined by soft_min"
    assert lines["judge"] == (
        "remote: judge-7b at http://a/v1,http://b/v1, 512 requests at once, beside the next rollout"
    )
    assert lines["prompt"] == "each sample's own, such as 'What is here?'"
    assert lines["rl"] == "700 steps of 128 prompts x 8 captions of up to 1,024 tokens, learning rate 1e-05"
    # Those of rl; the base, 13 steps and the end on 128 pictures, 2 sampled and 1 greedy each; 14 times the best.
    captions = 700 * 128 * 8 + 15 * 128 * 3 + 14 * 128
    assert lines["judging"].startswith(f"{captions:,} captions to judge")
    config = configuration.load("configs/qwen25vl_3b.py:lora", GIVEN)
    assert cost.captions_of(config, ("rl",)) == captions
    assert f"{3 * captions:,}" in next(line for line in lines["all"].splitlines() if line.strip().startswith("total"))


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("scenes.py", {}, {"judge": "oracle: the rules of the scenes", "vision": "1,000 steps of 32 prompts, "}),
        ("scenes.py:lexical", {}, {"judging": "the reward asks no judge"}),
        (
            "photos.py",
            {"data__prompt": "Say it.", "data__data_dir": "/p"},
            {"prompt": "'Say it.'", "data": "photos in /p"},
        ),
        ("photos.py", {"data__prompt": "x" * 200}, {"prompt": f"'{'x' * 100}...'"}),
    ],
)
def test_other_runs(recipe, overrides, expected):
    lines = lines_of(f"configs/{recipe}", **overrides)
    for name, start in expected.items():
        assert lines[name].startswith(start)
