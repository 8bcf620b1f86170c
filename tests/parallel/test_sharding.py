"""The sharding table, the mesh's errors, and the same numbers on 8 devices as on one."""

import dataclasses
import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_qwen
from jax.sharding import PartitionSpec
from tiny_llava import EOS, make_params, make_policy, make_prompt

from balcap_jax.aot import hlo
from balcap_jax.cli.errors import UserError
from balcap_jax.models import lora
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Sampling, compile_rollout, example_keys
from balcap_jax.train_step import RLBatch, RLObjective, SFTBatch, finalise, init_state, make_rl_step, make_sft_step
from balcap_jax.training.programs import state_shardings
from balcap_jax.training.vision_stage import VisionBatch, make_vision_step

B, G, R, V = 16, 4, 9, 24
SIZES = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
MESHES = {
    "data 8": {"data": 8},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 2, tensor 4": {"fsdp": 2, "tensor": 4},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    devices = int(np.prod(list(sizes.values()), dtype=int))
    return sharding.make_mesh(SIZES | sizes, jax.devices()[:devices])


def paths_of(policy, targets: str = "") -> dict[str, tuple[int, ...]]:
    def init(key):
        params = policy.init(key)
        return lora.add(params, 2, targets, key) if targets else params

    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")
    return {path: leaf.shape for path, leaf in shapes.items()}


# ------------------------------------------------------------------------------------------------- the table


def test_every_parameter_matches_exactly_one_row_and_every_row_a_parameter():
    variants = ({}, {"tied_embeddings": True}, {"qkv_bias": True})
    policies = [*(make_policy(**changes) for changes in variants), *map(tiny_qwen.make_policy, tiny_qwen.FAMILIES)]
    dense = "/(q|k|v|o|gate|up|down|first|second)$"
    shapes = {path: shape for policy in policies for path, shape in paths_of(policy, dense).items()}
    used = set()
    for path, shape in shapes.items():
        rows = [row for row in sharding.PARAMETER_AXES if re.search(row[0], path)]
        assert len(rows) == 1, (path, rows)
        used.add(rows[0])
        # A row is as long as the array it is for, or says nothing about it.
        assert len(rows[0][1]) in (0, len(shape)), (path, shape, rows[0])
    assert used == set(sharding.PARAMETER_AXES)
    assert "decoder/head" not in paths_of(make_policy(tied_embeddings=True))


def test_a_parameter_without_a_row_is_named():
    with pytest.raises(KeyError, match="decoder/adapter"):
        sharding.logical_axes("decoder/adapter")


def test_parameters_lie_where_the_table_says():
    mesh = mesh_of(**MESHES["data 2, fsdp 2, tensor 2"])
    policy = make_policy(vocab=V)
    placed = sharding.tree_shardings(mesh, jax.eval_shape(policy.init, jax.random.key(0)))
    specs = {path: leaf.spec for path, leaf in flax.traverse_util.flatten_dict(placed, sep="/").items()}
    assert specs["decoder/embed"] == PartitionSpec("tensor", "fsdp")
    assert specs["decoder/head"] == PartitionSpec("fsdp", "tensor")
    assert specs["decoder/layers/q/kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["decoder/layers/o/kernel"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["decoder/layers/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["vision/layers/up/bias"] == PartitionSpec(None, "tensor")
    assert specs["decoder/norm/scale"] == PartitionSpec()


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "replica 1 x data 3 x fsdp 1 x tensor 1.*does not fit 8 devices"),
        ({"data": -1, "tensor": 3}, "tensor 3.*does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "mesh.data and mesh.fsdp are both -1"),
        ({"data": 16}, "data 16.*does not fit 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(SIZES | sizes)


def test_an_open_axis_takes_what_is_left():
    assert dict(sharding.make_mesh(SIZES | {"data": -1, "tensor": 2}).shape) == SIZES | {"data": 4, "tensor": 2}


def test_a_batch_that_does_not_divide_is_refused():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    sharding.check_batch(mesh, "rl", 8)
    sharding.check_batch(mesh, "rl", 8, micro_batches=2)
    with pytest.raises(UserError, match=r"stages\.rl\.batch_size is 6, which does not divide over 4 devices"):
        sharding.check_batch(mesh, "rl", 6)
    message = r"stages\.rl\.micro_batches is 8: a part of 2 prompts does not divide over 4 .*; set it to 4 or less"
    with pytest.raises(UserError, match=message):
        sharding.check_batch(mesh, "rl", 16, micro_batches=8)


def test_a_parameter_that_does_not_divide_is_named():
    abstract = jax.eval_shape(make_policy(vocab=23).init, jax.random.key(0))
    with pytest.raises(
        UserError, match=r"mesh\.tensor = 2 does not divide an axis of size 23 .* decoder/embed \(23, 24\)"
    ):
        sharding.tree_shardings(mesh_of(tensor=2), abstract)


# ------------------------------------------------------------------------------------------------- equal numbers

POLICY = make_policy(tower={"heads": 4}, vocab=V, kv_heads=4, logits_chunk=32)
# AdamW as in training, but with an epsilon above the rounding of a zero gradient, whose sign it would make a full step.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-3))
OBJECTIVE = RLObjective(
    ("precision", "recall", "linguistic"), (1.0, 0.5, 2.0), (False, False, True), max_tokens=R, kl_coef=0.1
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one mesh made of the same inputs, on the host."""

    tokens: np.ndarray
    log_probs: np.ndarray
    params: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    values: dict[str, float]
    sft_params: dict[str, np.ndarray]
    sft_values: dict[str, float]
    vision_params: dict[str, np.ndarray]
    vision_values: dict[str, float]


def mesh_named(name: str) -> jax.sharding.Mesh:
    return mesh_of(**MESHES.get(name, {}))


def put_rows(mesh, tree):
    return jax.device_put(jax.device_get(tree), sharding.batch_sharding(mesh))


def new_state_on(mesh, freeze):
    state = init_state(make_params(POLICY), OPTIMIZER, freeze)
    return jax.device_put(jax.device_get(state), state_shardings(mesh, state))


@functools.cache
def sft_program(name: str) -> jax.stages.Compiled:
    mesh, tokens = mesh_named(name), np.zeros((B, G, R), np.int32)
    batch = put_rows(mesh, SFTBatch(make_prompt(POLICY, batch=B), tokens, tokens == 0))
    return make_sft_step(POLICY, OPTIMIZER, micro_batches=2).lower(new_state_on(mesh, ""), batch).compile()


@functools.cache
def run_on(name: str) -> Run:
    """Rollout, two RL, an SFT and two vision updates on the mesh of that name ("one" for a single device)."""
    mesh = mesh_named(name)
    put, new_state = functools.partial(put_rows, mesh), functools.partial(new_state_on, mesh)

    def scalar(value):
        return jax.device_put(np.uint32(value), sharding.replicated(mesh))

    freeze = "^(vision|projector)/"
    state, prompt = new_state(freeze), put(make_prompt(POLICY, batch=B))
    reference = jax.tree.map(jnp.array, state.params)
    keys = put(example_keys([f"picture {b}" for b in range(B)]))
    draw = (state.params, prompt, keys, scalar(3), scalar(5))
    out = compile_rollout(POLICY, Sampling(G, R, top_p=0.95), "float32", *draw)(*draw)

    rng = np.random.default_rng(8)
    valid = rng.random((B, G, 3)) > 0.1
    batch = RLBatch(
        prompt,
        out.image_embeds,
        *put((out.tokens, out.mask, out.policy_log_probs)),
        *put((np.where(valid, rng.random((B, G, 3)), 0).astype(np.float32), valid)),
        *put((rng.integers(4, 24, (B, G)), rng.integers(8, 12, B), out.truncated)),
    )

    def twice(step, state, *inputs):
        """Compiled ahead and called again with its own result, as the stages do: a moved state would be refused."""
        where = jax.tree.map(lambda x: x.sharding, state)
        program = step.lower(state, *inputs).compile()
        for _ in range(2):
            state, metrics = program(state, *inputs)
        for placed, leaf in zip(jax.tree.leaves(where), jax.tree.leaves(state), strict=True):
            assert leaf.sharding.is_equivalent_to(placed, leaf.ndim), (leaf.sharding, placed)
        return state, metrics

    state, metrics = twice(make_rl_step(POLICY, OPTIMIZER, OBJECTIVE, freeze=freeze), state, batch, reference)
    labels = put(rng.integers(0, 5, (B, POLICY.image_tokens, 2)))
    vision_step = make_vision_step(POLICY, OPTIMIZER, (5, 5), freeze="^(projector|decoder)/")
    vision_state, vision_metrics = twice(
        vision_step, new_state("^(projector|decoder)/"), VisionBatch(prompt.images, labels)
    )
    sft_state, sft_metrics = sft_program(name)(new_state(""), SFTBatch(prompt, batch.responses, batch.mask))
    flat = functools.partial(flax.traverse_util.flatten_dict, sep="/")
    host = jax.device_get(
        (flat(state.params), state.opt_state[1][0].mu, flat(sft_state.params), flat(vision_state.params))
    )
    return Run(
        np.asarray(out.tokens), np.asarray(out.policy_log_probs), host[0], host[1], finalise(metrics), host[2],
        finalise(sft_metrics), host[3], finalise(vision_metrics),
    )  # fmt: skip


# A quarter of a minute of compilation each; the last mesh has all of their axes.
SLOW_MESHES = ("data 8", "fsdp 4, tensor 2", "fsdp 2, tensor 4")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_MESHES else name for name in MESHES]
)
def test_eight_devices_give_the_numbers_of_one(name):
    one, many = run_on("one"), run_on(name)
    assert (one.tokens == EOS).any()
    np.testing.assert_array_equal(many.tokens, one.tokens)
    np.testing.assert_allclose(many.log_probs, one.log_probs, atol=1e-5)
    for name in ("values", "sft_values", "vision_values"):
        values, expected = getattr(many, name), getattr(one, name)
        assert values.keys() == expected.keys()
        for metric, value in expected.items():
            np.testing.assert_allclose(values[metric], value, rtol=1e-5, atol=1e-5, err_msg=metric)
    assert one.values["kl"] > 1e-5  # the second update was away from the reference
    for trees in ("params", "moments", "sft_params", "vision_params"):
        got, want = getattr(many, trees), getattr(one, trees)
        assert got.keys() == want.keys()
        for path, leaf in want.items():
            np.testing.assert_allclose(got[path], leaf, atol=1e-5, err_msg=f"{trees} {path}")


def test_data_parallel_devices_share_the_work_and_only_add_up():
    """Each device does its eighth of both micro-batches, and all they exchange are sums of gradients and losses."""
    one, many = (sft_program(name) for name in ("one", "data 8"))
    work_of_one, work_of_many = (hlo.Program(program.as_text()).analyse().flops for program in (one, many))
    assert work_of_many < 1.05 / 8 * work_of_one  # The last chunk of logits is padded.
    collectives = r"(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)(?:-start)?\("
    assert set(re.findall(collectives, many.as_text())) == {"all-reduce"}
