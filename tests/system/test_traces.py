"""After the first step of a stage nothing is traced or compiled again, whatever the lengths of the responses are."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command_runs import RECIPE, arguments, finish, start_script

from balcap_jax import models
from balcap_jax.config import recipes
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer

# (length, token bucket) of the updates that are compiled, all of which the steps after the first take.
SHAPES = {(80, 0), (80, 40), (80, 64)}


@pytest.fixture(scope="module")
def brief_model(tmp_path_factory) -> Path:
    """A model that ends a response with a chance of about 1 in 30 a token, so that lengths spread over all buckets.

    Feature 0 outweighs the others in every token's embedding, so it is what is left of the hidden state after the
    final norm, and its weight in the head is a bias.
    """
    fields = recipes.load(str(RECIPE)).model.to_dict() | {"mlp": 24}
    policy, processor = models.build(fields, scenes_tokenizer())
    params = jax.jit(policy.init)(jax.random.key(0))
    decoder = params["decoder"]
    decoder["embed"] = decoder["embed"].at[:, 0].set(100.0)
    decoder["head"] = decoder["head"].at[0, policy.end_tokens[0]].set(0.33)
    return models.save(tmp_path_factory.mktemp("model") / "brief", fields, params, processor)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir, brief_model) -> tuple[Path, list]:
    """The workdir of a run of both stages from the brief model, and [stage, step, shape, counts] of each step."""
    overrides = {
        "model__path": brief_model,
        "rollout__max_tokens": 80,
        "rollout__buckets": "80",
        "rollout__token_buckets": "40,64",
        "stages__sft__steps": 11,
        "stages__sft__batch_size": 2,
        "stages__sft__micro_batches": 2,  # Prompts are dealt out to them.
        "stages__sft__learning_rate": 0,  # or the model would learn how long captions are
        "stages__rl__steps": 11,
        "stages__rl__batch_size": 2,
        "stages__rl__learning_rate": 1e-4,
    }
    workdir = tmp_path_factory.mktemp("traces") / "run"
    done = finish(start_script("counted.py", *arguments(workdir, data_dir, **overrides)))
    return workdir, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["SFTStage", "RLStage"])
def test_ten_steps_of_varying_lengths(run, stage):
    """Logging, samples, checkpoints and an evaluation lie between the steps that are compared."""
    own = [step for step in run[1] if step[0] == stage]
    assert len(own) == 11
    counts = [of_step for _, _, _, of_step in own]
    assert {"jaxpr_trace_duration", "backend_compile_duration"} <= counts[0].keys()
    assert counts[1:] == counts[:1] * 10
    assert {tuple(shape) for _, _, shape, _ in own[1:]} == SHAPES, "lengths did not vary: nothing was tested"


def test_a_loaded_model_keeps_its_sizes(run, brief_model):
    """They are the saved model's, not the recipe's, and what training makes of it can be loaded again."""
    fields = models.read_fields(run[0] / "model")
    assert fields.pop("prompt")  # What the model answers is known now, and for how long.
    assert fields.pop("max_tokens") == 80
    assert fields == models.read_fields(brief_model)
    _, params, _ = models.load(run[0] / "model")
    _, start, _ = models.load(brief_model)
    kernels = [tree["vision"]["patches"]["patch"]["kernel"] for tree in (params, start)]
    assert np.array_equal(*kernels)  # at rest in sft, frozen in rl
    assert not np.array_equal(params["decoder"]["head"], start["decoder"]["head"])
