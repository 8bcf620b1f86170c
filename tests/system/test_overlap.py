"""`pipeline.depth` 1: a batch is judged beside the rollout of the next, one update off-policy, and resumes exactly."""

import dataclasses
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import plain_llava
import pytest
from command_runs import (
    RECIPE,
    arguments,
    assert_same_run,
    checkpoints,
    finish,
    read_arrays,
    read_metrics,
    start_interrupted,
    the_one_line,
    train,
)

from balcap_jax import data, models
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as configuration
from balcap_jax.data.input import make_dataset
from balcap_jax.parallel import sharding
from balcap_jax.rewards import Scores
from balcap_jax.rollout import make_rollout
from balcap_jax.train import STAGES
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.training.job import Job
from balcap_jax.training.pipeline import Judging
from balcap_jax.training.programs import Programs
from balcap_jax.training.progress import HIDDEN, PhaseClock
from balcap_jax.training.stages import RLStage

# A tenth of the judge's calls fails, and an evaluation at step 4 asks it in between.
AHEAD = {"stages__order": "rl", "pipeline__depth": 1, "judge__failure_rate": 0.1, "checkpoint__every": 1}
AHEAD |= {"log__tensorboard": False}
NAMES = ("precision", "recall", "linguistic")


def load(**overrides: Any):
    return configuration.load(str(RECIPE), {name.replace("__", "."): str(value) for name, value in overrides.items()})


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir) -> Path:
    """The workdir of an uninterrupted run of 6 steps."""
    workdir = tmp_path_factory.mktemp("overlap") / "whole"
    assert train(workdir, data_dir, **AHEAD).stderr == ""
    return workdir


def captions_of(file) -> list[dict]:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [caption for record in records for caption in record["captions"]]


@pytest.mark.slow
def test_a_tenth_of_the_calls_fails_at_depth_0(tmp_path, data_dir):
    assert train(tmp_path, data_dir, **AHEAD | {"pipeline__depth": 0}).stderr == ""
    test_a_tenth_of_the_calls_fails_and_the_run_goes_on(tmp_path)


def test_a_tenth_of_the_calls_fails_and_the_run_goes_on(whole):
    rates = {line["step"]: line["judge/failure_rate"] for line in read_metrics(whole)}
    assert list(rates) == [1, 2, 3, 4, 5, 6]
    calls = 4 * 3 * len(NAMES)  # of a step, and 216 in all: a standard deviation of 0.02.
    assert 0.04 < np.mean(list(rates.values())) < 0.16
    for step in (3, 6):
        captions = captions_of(whole / "samples" / f"step-{step:06d}.jsonl")
        missing = [{name for name in NAMES if caption["rewards"][name] is None} for caption in captions]
        assert sum(map(len, missing)) == round(rates[step] * calls)
        assert rates[step] * calls == pytest.approx(round(rates[step] * calls), abs=1e-4)
        assert any(missing)
        for caption, names in zip(captions, missing, strict=True):
            assert caption["failures"] == {
                name: f"simulated failure of the {name} judge (failure_rate 0.1)" for name in names
            }
            assert (caption["b_capscore"] is None) == bool(names)
    evaluations = json.loads((whole / "summary.json").read_text())["evaluations"]
    for label in ("base", "rl"):
        captions = captions_of(whole / "samples" / f"eval-{label}.jsonl")
        incomplete = [caption for caption in captions if None in caption["rewards"].values()]
        assert evaluations[label]["invalid"] == len(incomplete)
        kept = [caption["rewards"]["recall"] for caption in captions if caption["rewards"]["recall"] is not None]
        assert evaluations[label]["recall"]["mean"] == pytest.approx(np.mean(kept))


@pytest.mark.slow
def test_lengthened_equals_uninterrupted(tmp_path, data_dir, whole):
    """A batch is in flight at the end of the shorter run too."""
    train(tmp_path / "run", data_dir, **AHEAD | {"stages__rl__steps": 2})
    done = train(tmp_path / "run", data_dir, **AHEAD)
    assert "going on after step 2 of 6 (rl)" in done.stdout
    assert_same_run(tmp_path / "run", whole)


def test_killed_and_stopped_equals_uninterrupted(tmp_path, data_dir, whole):
    """A batch is in flight each time."""
    given = AHEAD | {"checkpoint__every": 2}

    def interrupt(number: signal.Signals, where: str) -> str:
        status = 0 if number == signal.SIGTERM else -number
        command = arguments(tmp_path / "run", data_dir, **given)
        done = finish(start_interrupted(number, where, *command), status)
        assert done.stderr == ""
        return done.stdout

    interrupt(signal.SIGKILL, "log:4")
    assert checkpoints(tmp_path / "run") == [2]
    assert "SIGTERM: saved after step 3; the same" in interrupt(signal.SIGTERM, "log:3")
    assert checkpoints(tmp_path / "run") == [2, 3]
    done = train(tmp_path / "run", data_dir, **given)
    assert "going on after step 3 of 6 (rl)" in done.stdout
    assert_same_run(tmp_path / "run", whole)


def nested(arrays: dict[str, np.ndarray], part: str) -> dict:
    """The arrays of a checkpoint below a path such as "['state']['params']"."""
    flat = {
        tuple(re.findall(r"\['(.+?)'\]", name.removeprefix(part))): array
        for name, array in arrays.items()
        if name.startswith(part)
    }
    return flax.traverse_util.unflatten_dict(flat)


def test_ratio_is_that_of_the_updated_policy_to_the_one_that_sampled(whole, data_dir):
    """Against one full sequence per sample, from what the checkpoints hold: parameters, and the captions in flight.

    The captions of step t + 1 lie in the checkpoint of step t, and are drawn from the parameters of step t - 1.
    """
    config = load(data__data_dir=data_dir, **AHEAD)
    splits = data.load(config.data, config.model.image_size)
    policy, processor = models.build(config.model, splits.tokenizer)
    logged = {line["step"]: line for line in read_metrics(whole)}
    assert logged[1]["ratio/mean"] == pytest.approx(1, abs=1e-5)  # The first two batches are of the same parameters.

    for step in (2, 4):
        now, before = (read_arrays(whole / "checkpoints" / str(t) / "arrays") for t in (step, step - 1))
        batches = make_dataset(splits.train, batch_size=4, seed=0, threads=0)
        with Checkpointer(whole / "checkpoints", keep=20) as checkpointer:
            batches.set_state(checkpointer.extra(step)["iterator"])
        examples = next(batches)
        prompt = processor(examples["image"], examples["prompt"], examples["id"])
        rows = [tokens[mask] for tokens, mask in zip(prompt.tokens, prompt.mask, strict=True)]
        flight = nested(now, "['in_flight']")
        mask = flight["mask"]

        plain = jax.jit(
            lambda params, rows=rows, images=prompt.images, tokens=flight["tokens"]: plain_llava.log_probs(
                policy, params, rows, images, tokens
            )
        )
        sampled, updated = (np.float64(plain(nested(arrays, "['state']['params']")))[mask] for arrays in (before, now))
        np.testing.assert_allclose(flight["policy_log_probs"][mask], sampled, atol=2e-5)
        ratio, drift = np.exp(updated - sampled), np.abs(updated - sampled)
        assert logged[step + 1]["ratio/mean"] == pytest.approx(ratio.mean(), abs=1e-4)
        assert logged[step + 1]["drift/max_abs_logp"] == pytest.approx(drift.max(), abs=1e-4)
        assert drift.max() > 1e-2, "the update changed next to nothing: nothing was tested"


def test_too_many_failures_stop_the_run_at_the_step_at_which_they_would_at_depth_0(tmp_path, data_dir):
    given = AHEAD | {"stages__rl__steps": 8, "judge__failure_rate": 0.9}
    line = the_one_line(train(tmp_path, data_dir, expected=2, **given).stderr)
    assert line.startswith("error: stopped at step 2: ")
    assert "of the last 72 judge calls failed, more than judge.max_failure_rate = 0.2 allows over 8 steps" in line
    assert checkpoints(tmp_path)[-1] == 2
    assert "['in_flight']['tokens']" in read_arrays(tmp_path / "checkpoints" / "2" / "arrays")


# ---- one stage, with a judge and a rollout of chosen durations ------------------------------------------------------


class Listener:
    """A reward that says who calls it, and does something before it answers."""

    names = ("precision", "recall", "linguistic")
    gated = (False, False, True)

    def __init__(self) -> None:
        self.begun: list[list[str]] = []
        self.threads: set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self, samples) -> Scores:
        self.begun.append(list(samples.example_ids))
        self.threads.add(threading.current_thread().name)
        self.meanwhile()
        lengths = np.asarray(samples.tokens, np.float32)
        shape = (*lengths.shape, 3)
        return Scores(np.broadcast_to(lengths[..., None] / 24, shape), np.ones(shape, bool), [])


@dataclasses.dataclass
class Run:
    """A stage on four devices, its judge, and what moves on with each step."""

    stage: RLStage
    reward: Listener
    state: Any
    batches: Iterator[dict]
    step: int = 0
    goes_on: bool = True
    slow_rollout: Callable[[], None] = lambda: None

    def begin(self) -> None:
        self.reward.begun.clear()
        self.reward.meanwhile = lambda: None
        self.goes_on, self.slow_rollout = True, lambda: None
        self.stage.begin(self.state, next(self.batches), self.step + 1)

    def advance(self) -> dict[str, float]:
        """One step. -> the values for the log, its times among them."""
        self.step += 1
        self.state, values, _ = self.stage.advance(self.state, next(self.batches), self.step)
        return values | self.stage.job.clock.step()


@pytest.fixture(scope="module")
def run(data_dir) -> Run:
    config = load(data__data_dir=data_dir, pipeline__depth=1)
    splits = data.load(config.data, config.model.image_size)
    policy, processor = models.build(config.model, splits.tokenizer)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
    reward = Listener()
    job = Job(config, mesh, policy, processor, reward, PhaseClock(), settle=lambda *_: made.goes_on)
    stage = RLStage(job)
    made = Run(
        stage,
        reward,
        stage.load({"state": stage.programs.start(jax.jit(policy.init)(jax.random.key(0)))}),
        iter(make_dataset(splits.train, batch_size=4, seed=0, threads=0)),
    )
    made.begin()
    made.advance()  # compiles
    rollout = made.stage._rollout

    def slowed(*given):
        made.slow_rollout()
        return rollout(*given)

    made.stage._rollout = slowed
    return made


def test_a_judge_is_hidden_behind_a_rollout_that_takes_as_long(run):
    """The rollout ends after the judge has: how busy the machine is decides nothing."""
    seconds, answered, clock = 0.4, threading.Semaphore(0), run.stage.job.clock

    def judge() -> None:
        time.sleep(seconds)
        answered.release()

    run.begin()
    run.reward.meanwhile = judge
    run.advance()
    run.slow_rollout = lambda: time.sleep(seconds) or answered.acquire()
    for _ in range(2):
        begun = clock._mark  # A reading of the wall clock, as is the one below.
        values = run.advance()
        wall = clock._mark - begun
        assert values["time/rollout"] >= seconds
        assert values["time/judge"] < 0.2 * seconds
        assert values[HIDDEN] > 0.8 * seconds
        phases = sum(value for name, value in values.items() if name.startswith("time/") and name != HIDDEN)
        assert phases == pytest.approx(wall, rel=0.02)
    assert run.reward.threads == {"judging"}


def test_what_is_waited_for_is_shown_and_not_called_hidden(run, monkeypatch):
    """Some of the judging lies beside the update and the rollout; the rest, 0.2 s, begins when it is waited for."""
    waited_for, taken, wait = threading.Event(), [], Judging.wait

    def judge() -> None:
        begun = time.perf_counter()
        waited_for.wait()
        time.sleep(0.2)
        taken.append(time.perf_counter() - begun)

    run.begin()
    run.reward.meanwhile = judge
    run.advance()
    monkeypatch.setattr(Judging, "wait", lambda self: waited_for.set() or wait(self))
    values = run.advance()
    assert values["time/judge"] >= 0.2
    assert 0 < values[HIDDEN] < taken[0]
    assert values["time/judge"] + values[HIDDEN] > 0.99 * taken[0]


def test_the_next_batch_is_judged_during_the_update_and_not_when_the_run_is_to_stop(run):
    run.begin()
    run.advance()
    assert len(run.reward.begun) == 1 + 1  # of this step and of the next
    answer = threading.Event()
    run.reward.meanwhile = answer.wait
    run.stage.finish_judging()
    answer.set()
    run.advance()
    answer.clear()
    run.goes_on = False
    run.advance()
    asked = len(run.reward.begun)
    run.stage.finish_judging()  # There is nothing to wait for.
    time.sleep(0.05)
    assert len(run.reward.begun) == asked
    run.goes_on, run.reward.meanwhile = True, lambda: None
    run.advance()
    run.stage.finish_judging()
    assert len(run.reward.begun) == asked + 2
    assert len({tuple(ids) for ids in run.reward.begun}) == len(run.reward.begun), "a batch was judged twice"


def test_what_a_judge_raises_ends_the_step_that_needs_its_answer(run):
    run.begin()

    def fail() -> None:
        raise UserError("the judge has lost its mind")

    run.reward.meanwhile = fail
    run.advance()  # Its own batch was judged before.
    with pytest.raises(UserError, match="lost its mind"):
        run.advance()


def test_a_judge_may_not_copy_unseen_either():
    with jax.transfer_guard("disallow"):
        judging = Judging(lambda: jnp.add(jnp.zeros(3), np.ones(3)))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        judging.wait()


def test_a_checkpoint_is_restored_in_the_layout_in_which_rollouts_are_kept(run):
    wanted = run.stage.programs.abstract_rollout(run.state.params)
    run.begin()
    found = run.stage.arrays(run.state)["in_flight"]
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)


def test_shapes_of_another_family(run):
    from test_families import QWEN

    config = load(**QWEN)
    policy, processor = models.build(config.model, run.stage.job.processor.tokenizer)
    programs = Programs(config, "rl", run.stage.job.mesh, policy, processor)
    params, sampling = jax.eval_shape(policy.init, jax.random.key(0)), programs.sampling
    wanted = programs.abstract_rollout(params)
    prompt = processor([np.zeros((30, 40, 3), np.uint8)] * 4, ["describe"] * 4)
    number = jax.ShapeDtypeStruct((), jnp.uint32)
    rollout = make_rollout(policy, sampling)
    drawn = rollout.lower(params, prompt, np.zeros(4, np.uint32), number, number).out_info
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(wanted), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"rl"}))
def test_other_stages_hold_nothing(stage):
    made = STAGES[stage]
    assert getattr(made, "func", made).depth == 0
