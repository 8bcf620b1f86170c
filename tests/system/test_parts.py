"""A stage of training that samples its batch in parts: the captions of the whole batch, in a checkpoint's layout."""

import jax
import numpy as np
import pytest
from test_overlap import Listener, load

from balcap_jax import data, models
from balcap_jax.data.input import make_dataset
from balcap_jax.parallel import sharding
from balcap_jax.training import room
from balcap_jax.training.job import Job
from balcap_jax.training.progress import PhaseClock
from balcap_jax.training.stages import RLStage


@pytest.fixture
def sampled(data_dir, monkeypatch, capsys):
    """(flight, what is printed) of the first batch, of four pictures, on one device."""

    def sample(**overrides):
        config = load(data__data_dir=data_dir, pipeline__depth=1, **overrides)
        splits = data.load(config.data, config.model.image_size)
        policy, processor = models.build(config.model, splits.tokenizer)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        stage = RLStage(Job(config, mesh, policy, processor, Listener(), PhaseClock()))
        state = stage.load({"state": stage.programs.start(jax.jit(policy.init)(jax.random.key(0)))})
        if overrides:
            # A batch in flight lies beside the next rollout. Of what remains, half is too little for a whole cache.
            (whole,) = stage.programs.fits(state.params, None, sampling=None)
            beside = (stage.programs.abstract_rollout(state.params), stage.programs.abstract_prompt())
            in_flight = sharding.bytes_per_device(beside)
            cache = whole.bytes * (1 if config.rollout.parts == "auto" else config.rollout.parts)
            monkeypatch.setattr(room, "free_bytes", lambda mesh: in_flight + 3 * cache // 4)
        examples = next(iter(make_dataset(splits.train, batch_size=4, seed=0, threads=0)))
        flight = stage._sample(state.params, examples, 1)
        wanted = stage.programs.abstract_rollout(state.params)
        for one, other in zip(jax.tree.leaves(flight.out), jax.tree.leaves(wanted), strict=True):
            assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)
        return flight, capsys.readouterr().out

    return sample


def test_a_stage_samples_the_same_captions_in_parts_and_says_how_many(sampled):
    whole, said = sampled()
    assert said == ""
    parts, said = sampled(rollout__parts="auto")
    assert said.startswith("rollout of 4 prompts in ")
    assert " parts; " in said
    assert said.endswith(" GiB that are free on a device\n")
    for name in ("tokens", "mask", "lengths", "truncated"):
        np.testing.assert_array_equal(getattr(parts.samples, name), getattr(whole.samples, name))
    np.testing.assert_allclose(parts.samples.policy_log_probs, whole.samples.policy_log_probs, atol=1e-5)
    np.testing.assert_allclose(parts.out.image_embeds, whole.out.image_embeds, atol=1e-5)
