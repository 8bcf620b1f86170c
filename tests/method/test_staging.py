"""Stages of the rollout: which there are, that no branch is lost between two, and that they change no sample."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llava import BOS, EOS, IMAGE, PAD

from balcap_jax import staging
from balcap_jax.aot import hlo
from balcap_jax.models import attention
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import Prompt, TextPolicy
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Sampling, sample
from balcap_jax.staging import Stage

R = 37
P, V = 6, 24
POLICY = TextPolicy(DecoderConfig(V, 24, 2, 4, 4, 6, 32), pad_token=PAD, end_tokens=(EOS,), forbidden=(PAD, BOS, IMAGE))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The cache of R positions is five blocks, the last of them not whole."""
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)


# --- which stages there are ---


@pytest.mark.parametrize(
    ("prompts", "group", "expected"),
    [
        (4, 8, [(4, 8), (4, 2), (2, 1)]),
        (8, 8, [(8, 8), (8, 2), (4, 1)]),
        (6, 8, [(6, 8), (6, 2), (3, 1)]),
        (16, 6, [(16, 6), (16, 2), (8, 1)]),
        (5, 3, [(5, 3), (3, 1)]),
        (64, 1, [(64, 1), (16, 1), (4, 1)]),
        (1, 8, [(1, 8), (1, 2)]),
        (1, 2, [(1, 2)]),
        (3, 1, [(3, 1)]),
    ],
)
def test_each_stage_has_a_quarter_of_the_rows(prompts, group, expected):
    assert staging.plan(prompts, group, 1024) == tuple(expected)
    assert staging.plan(prompts, group, staging.SHORTEST - 1) == ((prompts, group),)


def test_stages_shrink_and_never_have_more_lines_than_prompts():
    for prompts in range(1, 40):
        for group in range(1, 13):
            stages = staging.plan(prompts, group, 1024)
            rows = [stage.rows for stage in stages]
            assert rows == sorted(set(rows), reverse=True)
            assert all(1 <= stage.lines <= prompts for stage in stages)


# --- moves ---


def test_moves_keep_every_branch_with_its_prompt_and_in_order():
    """Against a slow version: prompt by prompt, line by line."""
    rng = np.random.default_rng(0)
    for prompts, group, size, parts in ((1, 4, 3, 1), (5, 8, 3, 2), (4, 3, 1, 3), (6, 2, 2, 1)):
        lines_needed = jax.jit(functools.partial(staging.lines_needed, prompts=prompts, size=size))
        stage = Stage(prompts * -(-group // size), size)  # holds whatever goes on
        moves_to = jax.jit(functools.partial(staging.moves, prompts=prompts, stage=stage))
        for _ in range(12):
            # Lines of now; some share a prompt and some prompts have none, as an earlier move leaves them.
            owner = np.sort(rng.integers(0, prompts, (parts, prompts)), axis=1)
            going = rng.random((parts, prompts, group)) < rng.random()
            moves = jax.tree.map(np.asarray, moves_to(going, owner))
            check_moves(moves, going, owner, stage, lines_needed(going, owner))


def check_moves(moves, going, owner, stage, needed):
    parts, prompts, group = going.shape
    for p in range(parts):
        expected, owners = [], []
        for prompt in range(prompts):
            rows = [
                line * group + g
                for line in range(prompts)
                for g in range(group)
                if owner[p, line] == prompt and going[p, line, g]
            ]
            for start in range(0, len(rows), stage.group):
                found = rows[start : start + stage.group]
                expected += found + [None] * (stage.group - len(found))
                owners.append(prompt)
        assert needed[p] == len(owners)
        expected += [None] * (stage.rows - len(expected))
        got = [int(place) if real else None for place, real in zip(moves.places[p], moves.real[p], strict=True)]
        assert got == expected
        assert list(moves.owner[p, : len(owners)]) == owners
        assert (np.diff(moves.owner[p]) >= 0).all()  # the next move relies on it
        np.testing.assert_array_equal(owner[p, moves.lines[p, : len(owners)]], owners)


# --- samples ---


def lengths_of(kind: str, batch: int, group: int) -> np.ndarray:
    rng = np.random.default_rng(batch + group)
    uneven = np.clip(np.exp(rng.normal(np.log(5), 0.6, (batch, group))), 1, R).astype(np.int32)
    if kind == "uneven":
        uneven[batch // 2, 0] = R
    return {
        "uneven": uneven,
        "equal": np.full((batch, group), 7, np.int32),
        "full": np.full((batch, group), R, np.int32),
        "first": np.ones((batch, group), np.int32),
        "one prompt": np.where(np.arange(batch)[:, None] == batch - 1, R, 2) * np.ones((1, group), np.int32),
    }[kind]


def make_prompt(batch: int) -> Prompt:
    """Prompts of three lengths in turn."""
    rng = np.random.default_rng(batch)
    mask = np.arange(P) < np.array([P, 3, 5])[np.arange(batch) % 3][:, None]
    tokens = np.where(mask, rng.integers(4, V, (batch, P)), PAD).astype(np.int32)
    positions = np.where(mask, np.arange(P), 0).astype(np.int32)
    return Prompt(*map(jnp.asarray, (tokens, mask, positions, POLICY.no_images(batch))))


def branch_keys(batch: int, group: int) -> jax.Array:
    return jax.random.split(jax.random.key(7), (batch, group))


@functools.cache
def start():
    """The parameters of all rollouts."""
    return jax.jit(POLICY.init)(jax.random.key(0))


@functools.cache
def program(batch: int, group: int, stages: tuple[Stage, ...] | None, mesh=None, greedy: bool = False):
    """(the compiled rollout, `run(limits)` of it)."""
    prompt, sampling = make_prompt(batch), Sampling(group, R, top_p=0.95, greedy=greedy)

    def run(params, prompt, keys, limits):
        return sample(POLICY, params, prompt, keys, sampling, mesh, limits=limits, stages=stages)

    params = start()
    keys = branch_keys(batch, group)
    limits = jnp.zeros((batch, group), jnp.int32)
    if mesh is not None:
        relaid = sharding.sampling_shardings(mesh, {"decoder": params["decoder"]})
        placed = sharding.tree_shardings(mesh, params) | relaid
        params = jax.device_put(jax.device_get(params), placed)
        prompt, keys, limits = jax.device_put((prompt, keys, limits), sharding.batch_sharding(mesh))
    compiled = jax.jit(run).lower(params, prompt, keys, limits).compile()
    where = limits.sharding
    return compiled, lambda given: jax.tree.map(
        np.asarray, compiled(params, prompt, keys, jax.device_put(jnp.asarray(given), where))
    )


def drawn(batch, group, stages, limits, mesh=None, greedy=False):
    return program(batch, group, stages, mesh, greedy)[1](limits)


def slots_of(limits: np.ndarray, lengths: np.ndarray, stages, parts: int = 1) -> float:
    """Rows times steps of a rollout, by a slow replay."""
    batch, group = lengths.shape
    slots, now, t = batch * group, 0, 1
    while True:
        going = lengths.reshape(parts, -1, group) > t

        def fits(stage):
            lines = [-(-count // stage[1]) for count in going.sum(-1).ravel()]  # noqa: B023
            return (np.array(lines).reshape(parts, -1).sum(-1) <= stage[0]).all()

        while now + 1 < len(stages) and fits(stages[now + 1]):
            now += 1
        if not going.any():
            return slots
        slots += parts * stages[now][0] * stages[now][1]
        t += 1


# G 1, 2, 3 and 8; B no power of two; lines that split, lines that end, fewer rows than prompts.
SHAPES = {
    (3, 8): ((3, 8), (3, 3), (2, 1)),
    (5, 3): ((5, 3), (4, 1), (2, 1)),
    (6, 2): ((6, 2), (6, 1), (3, 1)),
    (7, 1): ((7, 1), (2, 1)),
}


# Two programs of a few seconds of compilation each: the first shape has all that can happen between two stages.
@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[] if shape == (3, 8) else pytest.mark.slow) for shape in SHAPES], ids=str
)
def test_stages_change_no_sample(shape):
    stages = tuple(Stage(*stage) for stage in SHAPES[shape])
    for kind in ("uneven", "equal", "full", "first", "one prompt"):
        limits = lengths_of(kind, *shape)
        whole = drawn(*shape, stages[:1], limits)
        staged = drawn(*shape, stages, limits)
        np.testing.assert_array_equal(staged.tokens, whole.tokens, err_msg=kind)
        np.testing.assert_array_equal(staged.mask, whole.mask)
        np.testing.assert_array_equal(staged.lengths, whole.lengths)
        np.testing.assert_array_equal(staged.truncated, whole.truncated)
        np.testing.assert_allclose(staged.policy_log_probs, whole.policy_log_probs, atol=1e-5)
        assert (whole.lengths <= limits).all()
        for out, plan in ((whole, stages[:1]), (staged, stages)):
            np.testing.assert_allclose(out.slots.sum(), slots_of(limits, out.lengths, plan), rtol=1e-6)
            np.testing.assert_allclose(out.slots, out.slots.mean(), rtol=1e-6)


def test_a_step_reads_blocks_of_the_cache_and_never_a_whole_layer_of_it():
    compiled, _ = program(3, 8, tuple(Stage(*stage) for stage in SHAPES[3, 8]))
    heads, size, block, length = POLICY.decoder.kv_heads, POLICY.decoder.head_size, 8, 40
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())}
    whole = {math.prod(shape) for shape in shapes if length in shape and size in shape}
    assert whole == {POLICY.decoder.layers * 3 * 8 * heads * length * size}  # the cache itself
    read = {math.prod(shape) for shape in shapes if {block, heads, size} <= set(shape)}
    for rows in (3 * 8, 3 * 3, 2):  # of each stage
        assert rows * heads * block * size in read


@pytest.mark.slow
def test_limits_end_branches_that_count_as_truncated():
    limits = lengths_of("uneven", 5, 3)
    free = drawn(5, 3, None, np.full((5, 3), R, np.int32))
    cut = drawn(5, 3, None, limits)
    ended = np.minimum(free.lengths, limits)
    np.testing.assert_array_equal(cut.lengths, ended)
    last = np.take_along_axis(cut.tokens, ended[..., None] - 1, -1)[..., 0]
    np.testing.assert_array_equal(cut.truncated, last != EOS)
    assert cut.truncated.any()
    assert not cut.truncated.all()
    for b in range(5):
        for g in range(3):
            n = ended[b, g]
            np.testing.assert_array_equal(cut.tokens[b, g, :n], free.tokens[b, g, :n])
            assert (cut.tokens[b, g, n:] == PAD).all()


@pytest.mark.slow
def test_one_branch_a_prompt_is_staged_too():
    """As a judge on the mesh and the evaluation sample: greedily."""
    limits = lengths_of("uneven", 9, 1)
    stages = (Stage(9, 1), Stage(4, 1), Stage(2, 1))
    whole, staged = (drawn(9, 1, plan, limits, greedy=True) for plan in (stages[:1], stages))
    np.testing.assert_array_equal(staged.tokens, whole.tokens)
    np.testing.assert_allclose(staged.policy_log_probs, whole.policy_log_probs, atol=1e-5)
    assert staged.slots.sum() < 0.7 * whole.slots.sum()


MESHES = {"data 8": {"data": 8}, "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2}}


def mesh_named(name: str):
    sizes = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1} | MESHES[name]
    return sharding.make_mesh(sizes, jax.devices())


@pytest.mark.parametrize("name", [pytest.param("data 8", marks=pytest.mark.slow), "data 2, fsdp 2, tensor 2"])
def test_eight_devices_shrink_each_on_its_own_and_sample_what_one_does(name):
    mesh = mesh_named(name)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    batch, group = 16, 4
    prompts = batch // parts
    stages = (Stage(prompts, 4), Stage(prompts, 2), Stage(max(prompts // 2, 1), 1))
    limits = lengths_of("uneven", batch, group)
    one = drawn(batch, group, (Stage(batch, group),), limits)
    many = drawn(batch, group, stages, limits, mesh)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.policy_log_probs, one.policy_log_probs, atol=1e-5)
    np.testing.assert_allclose(many.slots.sum(), slots_of(limits, many.lengths, stages, parts), rtol=1e-6)
    assert many.slots.sum() < 0.8 * one.slots.sum()


@pytest.mark.parametrize("name", [pytest.param("data 8", marks=pytest.mark.slow), "data 2, fsdp 2, tensor 2"])
def test_no_stage_gathers_weights_or_cache(name):
    """All that stages add are predicates of a byte; a cache never leaves its device, nor a weight its place."""
    mesh = mesh_named(name)
    prompts = 16 // (mesh.shape["data"] * mesh.shape["fsdp"])
    stages = (Stage(prompts, 4), Stage(prompts, 2), Stage(max(prompts // 2, 1), 1))

    def collectives(stages):
        text = program(16, 4, stages, mesh)[0].as_text()
        return hlo.Program(text).analyse(R - 1).collectives

    staged, whole = collectives(stages), collectives(stages[:1])
    assert [moved for moved in staged if moved.of_invariant] == []
    assert [moved for moved in staged if "regroup/" in moved.op_name] == []
    # Where no matrix is split, a step of one stage moves nothing: then a predicate is all that may be added.
    largest = max((moved.size for moved in whole if moved.in_open_loop), default=1)
    assert [moved for moved in staged if moved.in_open_loop and moved.size > largest] == []
    # A decoding step may have its own outside its loop, and so has the prompt: all else is between two stages.
    between = [moved for moved in staged if not moved.in_open_loop and not re.search("prefill/|decode/", moved.op_name)]
    assert {moved.size for moved in between} == {1}, between
