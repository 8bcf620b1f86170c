"""After the first step of a stage nothing is traced or compiled again, whatever the lengths of the responses are."""

import json
from pathlib import Path

import jax
import pytest
from commands import RECIPE, arguments, finish, start_script

from balcap_jax import config, models
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer


@pytest.fixture(scope="module")
def brief_model(tmp_path_factory) -> Path:
    """A model that ends a response with a chance of about 1 in 30 a token, so that lengths spread over both buckets.

    Feature 0 outweighs the others in every token's embedding, so it is what is left of the hidden state after the
    final norm, and its weight in the head is a bias.
    """
    fields = config.load(str(RECIPE)).model.to_dict()
    policy, processor = models.build(fields, scenes_tokenizer())
    params = policy.init(jax.random.key(0))
    decoder = params["decoder"]
    decoder["embed"] = decoder["embed"].at[:, 0].set(100.0)
    decoder["head"] = decoder["head"].at[0, policy.eos_token].set(0.33)
    return models.save(tmp_path_factory.mktemp("model") / "brief", fields, params, processor)


def test_ten_steps_of_varying_lengths(tmp_path, data_dir, brief_model):
    """Logging, samples, checkpoints and an evaluation lie between the steps that are compared."""
    overrides = {
        "model__path": brief_model,
        "rollout__max_tokens": 80,
        "rollout__buckets": "72,80",
        "stages__sft__steps": 11,
        "stages__sft__batch_size": 2,
        "stages__sft__learning_rate": 0,  # or the model would learn how long captions are
        "stages__rl__steps": 11,
        "stages__rl__batch_size": 2,
        "stages__rl__learning_rate": 1e-4,
    }
    done = finish(start_script("counted.py", *arguments(tmp_path / "run", data_dir, **overrides)))
    steps = json.loads(done.stdout.splitlines()[-1])
    for stage in ("SFTStage", "RLStage"):
        own = [step for step in steps if step[0] == stage]
        assert len(own) == 11
        counts = [of_step for _, _, _, of_step in own]
        assert {"jaxpr_trace_duration", "backend_compile_duration"} <= counts[0].keys()
        assert counts[1:] == counts[:1] * 10, stage
        assert {bucket for _, _, bucket, _ in own[1:]} == {72, 80}, "lengths did not vary: nothing was tested"
