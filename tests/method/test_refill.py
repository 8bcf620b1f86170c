"""Refill: which branch a row takes and when, and that it changes no sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_packed_update import with_adapters
from test_staging import POLICY, P, R, branch_keys, drawn, lengths_of, make_prompt, mesh_named, start

from balcap_jax import refill
from balcap_jax.models import attention
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Sampling, refilled, sample
from balcap_jax.staging import Stage


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The ring of R positions is five blocks."""
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)


# --- the queue, by a slow replay ---


class Replay:
    """One part: rows take branches in order, each prompt from its own line on; see `refill._take`."""

    def __init__(self, lengths: np.ndarray, width: int, lines: int):
        """lengths: [prompts, G] tokens of each branch, the first of which needs no row."""
        self.queue = [(p, g) for p, g in np.ndindex(*lengths.shape) if lengths[p, g] > 1]
        self.lengths, self.rows, self.lines = lengths, [None] * width, lines
        self.opened, self.waited = set(), False

    def take(self) -> None:
        while self.queue and None in self.rows:
            prompt, g = self.queue[0]
            held = {row[0] for row in self.rows if row} | ({prompt} & self.opened)
            if prompt not in held and len(held) == self.lines:
                self.waited = True
                return
            self.opened.add(prompt)
            self.rows[self.rows.index(None)] = [prompt, g, self.lengths[prompt, g] - 1]
            self.queue.pop(0)

    def step(self) -> bool:
        """A token of each row; False where nothing was left to do."""
        self.take()
        if not any(self.rows):
            return False
        for index, row in enumerate(self.rows):
            if row:
                row[2] -= 1
                self.rows[index] = row if row[2] else None
        return True


def steps_of(lengths: np.ndarray, width: int, parts: int = 1) -> int:
    """Steps of a rollout whose branches have these lengths [B, G]."""
    steps = []
    for of_part in np.split(lengths, parts):
        replay = Replay(of_part, width, refill.lines_of(*of_part.shape, width))
        steps.append(0)
        while replay.step():
            steps[-1] += 1
    return max(steps)


@pytest.mark.parametrize(
    ("prompts", "group", "width", "lines"), [(6, 3, 4, 2), (9, 2, 5, 2), (4, 8, 9, 2), (7, 1, 2, 2)]
)
def test_rows_take_branches_as_the_replay_does(prompts, group, width, lines):
    """At every step: who decodes what, in which line, and nothing before its prompt has one."""
    rng = np.random.default_rng(prompts)
    take = jax.jit(functools.partial(refill._take, group=group))
    seats = jax.jit(functools.partial(refill._seats, group=group))
    waited = 0
    for _ in range(3):
        lengths = rng.integers(1, 6, (prompts, group)) ** 2
        replay = Replay(lengths, width, lines)
        queue = refill._queue(jnp.asarray(lengths <= 1).reshape(1, -1), group)
        none = jnp.zeros((1, width), jnp.int32)
        rows = refill._Rows(none, none, none, none == 0, jnp.full((1, lines), -1))
        first, open_lines = jnp.arange(prompts * group)[None], np.full(lines, -1)
        for step in range(lengths.sum()):
            replay.take()
            opens, queue, rows = take(queue, rows, step, first)
            expected = [-1 if row is None else row[0] * group + row[1] for row in replay.rows]
            found = np.where(rows.ended, -1, rows.branch)[0]
            np.testing.assert_array_equal(found, expected)
            assert int(queue.count[0] - queue.taken[0]) == len(replay.queue)
            # A line keeps its prompt unless it opens with another, and each branch sits in a line of its prompt.
            open_lines = np.where(opens[0], rows.lines[0], open_lines)
            np.testing.assert_array_equal(open_lines, rows.lines[0])
            at = seats(rows, step, none)
            for row, branch in enumerate(expected):
                if branch >= 0:
                    place = int(at.place[0, row])
                    assert int(at.row[0, place]) == row
                    assert open_lines[place // group] == branch // group
                    assert int(rows.tokens[0, row]) == branch or int(rows.start[0, row]) < step
            if not replay.step():
                break
            ended = [row is None for row in replay.rows]
            rows = rows._replace(tokens=none - 1, ended=jnp.asarray([ended]))
        assert not replay.queue
        waited += replay.waited
    assert waited or group == 1  # Of prompts of one branch each, as many have a line as rows go.


# --- samples ---


@functools.cache
def program(batch: int, group: int, count: int, mesh=None, greedy: bool = False):
    """`run(limits)` of a refilled rollout with the rows of one of `count` parts."""
    prompt, keys = make_prompt(batch), branch_keys(batch, group)
    sampling = Sampling(group, R, top_p=0.95, greedy=greedy, parts=count, refill=True)
    params = start()
    if mesh is not None:
        relaid = sharding.sampling_shardings(mesh, {"decoder": params["decoder"]})
        params = jax.device_put(jax.device_get(params), sharding.tree_shardings(mesh, params) | relaid)
        prompt, keys = jax.device_put((prompt, keys), sharding.batch_sharding(mesh))
    run = jax.jit(lambda *inputs, limits: refilled(POLICY, *inputs, sampling, mesh, limits=limits))

    def of(limits: np.ndarray):
        given = jax.device_put(limits, None if mesh is None else sharding.batch_sharding(mesh))
        return jax.device_get(run(params, prompt, keys, limits=given))

    return of


def assert_same_samples(found, whole) -> None:
    for name in ("tokens", "mask", "lengths", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(found.policy_log_probs, whole.policy_log_probs, atol=1e-5)
    np.testing.assert_allclose(found.image_embeds, whole.image_embeds, atol=1e-5)


KINDS = ("uneven", "equal", "full", "first", "one prompt")


@pytest.mark.parametrize("spare", [2, -3], ids="spare {}".format)
def test_refill_changes_no_sample(spare, monkeypatch):
    """Nine prompts of three branches on nine rows: with enough lines for all, and with three."""
    monkeypatch.setattr(refill, "SPARE", spare)
    program.cache_clear()
    for kind in KINDS:
        limits = lengths_of(kind, 9, 3)
        whole = drawn(9, 3, (Stage(9, 3),), limits)
        found = program(9, 3, 3)(limits)
        assert_same_samples(found, whole)
        np.testing.assert_allclose(found.slots.sum(), 27 + 9 * steps_of(whole.lengths, 9), rtol=1e-6, err_msg=kind)
        np.testing.assert_allclose(found.slots, found.slots.mean(), rtol=1e-6)
    program.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "group", "count"), [(8, 1, 4), (6, 2, 6), (4, 8, 2)])
def test_refill_of_other_shapes_greedily(batch, group, count):
    limits = lengths_of("uneven", batch, group)
    whole = drawn(batch, group, (Stage(batch, group),), limits, greedy=True)
    found = program(batch, group, count, greedy=True)(limits)
    assert_same_samples(found, whole)
    width = batch * group // count
    np.testing.assert_allclose(found.slots.sum(), batch * group + width * steps_of(whole.lengths, width), rtol=1e-6)


@pytest.mark.parametrize("name", [pytest.param("data 8", marks=pytest.mark.slow), "data 2, fsdp 2, tensor 2"])
def test_eight_devices_refill_each_on_its_own_and_sample_what_one_does(name):
    mesh, batch, group, count = mesh_named(name), 16, 4, 2
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    width = batch * group // count // parts
    limits = lengths_of("uneven", batch, group)
    whole = drawn(batch, group, (Stage(batch, group),), limits)
    found = program(batch, group, count, mesh)(limits)
    assert_same_samples(found, whole)
    slots = batch * group + parts * width * steps_of(whole.lengths, width, parts)
    np.testing.assert_allclose(found.slots.sum(), slots, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mrope", pytest.param("adapters", marks=pytest.mark.slow)])
def test_refill_of_three_positions_and_of_adapters(kind):
    """A response goes on after the largest position of its prompt, and adapters are in every step."""
    batch, group = 6, 2
    policy, params, prompt = POLICY, start(), make_prompt(batch)
    if kind == "adapters":
        policy, params = with_adapters(policy, params)
    else:
        config = dataclasses.replace(policy.decoder, mrope_section=(1, 1, 1))
        policy = dataclasses.replace(policy, decoder=config)
        rows = np.where(prompt.mask, np.random.default_rng(3).integers(0, 9, (batch, P)), 0)
        prompt = prompt._replace(positions=jnp.stack([prompt.positions, jnp.asarray(rows), prompt.positions], -1))
    keys, limits = branch_keys(batch, group), jnp.asarray(lengths_of("uneven", batch, group))
    settings = Sampling(group, R, parts=3, refill=True)
    one, other = (
        jax.jit(lambda params, run=run: run(policy, params, prompt, keys, settings, limits=limits))(params)
        for run in (functools.partial(sample, stages=(Stage(batch, group),)), refilled)
    )
    assert_same_samples(other, one)
