"""Updates with packed responses against padded ones: log-probabilities, loss, gradients and metrics."""

import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_llava
import tiny_qwen

from balcap_jax.models import attention, kernels, lora, packing
from balcap_jax.models.packing import UNIT
from balcap_jax.models.policy import Prompt, TextPolicy
from balcap_jax.parallel import sharding
from balcap_jax.parallel.host_batch import make_reordering
from balcap_jax.rollout import Sampling, make_rollout
from balcap_jax.train_step import (
    RLBatch,
    RLObjective,
    SFTBatch,
    TrainState,
    finalise,
    init_state,
    make_rl_step,
    make_sft_step,
)
from balcap_jax.training.programs import state_shardings

B, G, R = 8, 3, 70
# No token, one, a unit, one more, all: 70 tokens are three units.
LENGTHS = np.array(
    [[0, 1, 70], [32, 33, 64], [65, 70, 2], [31, 30, 1], [40, 70, 5], [0, 0, 0], [12, 34, 1], [9, 64, 33]]
)
BUCKET = 45  # Its capacity for 24 responses is that of their 34 units; that of 44 is one less.
MASK = np.arange(R) < LENGTHS[..., None]


def responses_of(vocab: int) -> np.ndarray:
    return np.where(MASK, np.random.default_rng(0).integers(4, vocab, MASK.shape), 0).astype(np.int32)


def flat(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def assert_equal_trees(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    """To `tolerance` of each array's largest entry, or of a thousandth of the largest of all."""
    assert got.keys() == want.keys()
    floor = 1e-3 * max(np.abs(leaf).max() for leaf in want.values())
    errors = {path: np.abs(got[path] - want[path]).max() / max(np.abs(want[path]).max(), floor) for path in want}
    assert max(errors.values()) < tolerance, errors


# ------------------------------------------------------------------------------------------------- log-probabilities


def llava():
    policy = tiny_llava.make_policy(layers=2)
    params = tiny_llava.make_params(policy)
    prompt = tiny_llava.make_prompt(policy, "left", batch=B)
    return policy, params, prompt, jax.jit(policy.encode)(params, prompt.images)


def qwen():
    policy = tiny_qwen.make_policy(layers=2, remat="full")
    tokens = np.random.default_rng(1).integers(4, tiny_qwen.V, (B, 14)).astype(np.int32)
    mask = np.arange(14) < np.array([[14], [12], [13], [14], [10], [11], [14], [12]])
    tokens[:, 2:8] = tiny_qwen.IMAGE
    positions = np.tile(np.arange(14)[:, None], (B, 1, 3)).astype(np.int32)
    # As for an image of 2 x 3: time stands still, and text goes on behind the largest position.
    positions[:, 2:8] = 2 + np.array([(0, row, column) for row in range(2) for column in range(3)])
    positions[:, 8:] -= 3
    embeds = np.random.default_rng(2).normal(size=(B, 6, policy.decoder.width)).astype(np.float32)
    return policy, tiny_qwen.make_params(policy), Prompt(*map(jnp.asarray, (tokens, mask, positions)), None), embeds


def with_adapters(policy, params, *rest):
    params = lora.add(params, 2, "^decoder/layers/(q|k|v|o|gate|up|down)$", jax.random.key(4))

    def moved(path, x):  # They start at 0, where the other half has no gradient.
        return x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) if path[-1].key == "lora_b" else x

    return lora.Adapted(policy, 1.5), jax.tree_util.tree_map_with_path(moved, params), *rest


@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        # The steps below are on llava.
        (qwen, True),
        pytest.param(qwen, False, marks=pytest.mark.slow),
        pytest.param(llava, True, marks=pytest.mark.slow),
        pytest.param(llava, False, marks=pytest.mark.slow),
    ],
)
def test_log_probs_and_their_gradients_are_those_of_padded_responses(family, adapted):
    policy, params, prompt, embeds = with_adapters(*family()) if adapted else family()
    tokens = responses_of(policy.vocab)
    cotangent = np.where(MASK, np.random.default_rng(3).normal(size=MASK.shape), 0)

    def pull(token_bucket):
        def product(params, embeds):
            options = {"temperature": 0.7, "mask": jnp.asarray(MASK), "token_bucket": token_bucket}
            found = policy.log_probs(params, prompt, embeds, tokens, **options)
            return jnp.sum(jnp.where(MASK, found, 0) * cotangent), found

        (_, found), (gradient, of_embeds) = jax.jit(jax.value_and_grad(product, (0, 1), has_aux=True))(params, embeds)
        return np.asarray(found), flat({"decoder": gradient["decoder"], "embeds": of_embeds})

    (want, wanted_gradient), (got, gradient) = pull(0), pull(BUCKET)
    assert (got[~MASK] == 0).all()
    assert np.abs(got - want)[MASK].max() < 1e-5 * np.abs(want[MASK]).max()
    assert any("lora_a" in path for path in gradient) == adapted
    assert_equal_trees(gradient, wanted_gradient)


def test_the_capacities_are_the_last_that_holds_them_and_the_first_that_does_not():
    assert packing.units_of(LENGTHS).sum() == 34
    assert [packing.capacity(bucket, B * G) for bucket in (BUCKET, BUCKET - 1)] == [34, 33]


# ------------------------------------------------------------------------------------------------- attention


class Attended:
    """Four responses of three lengths over two prompts, and what they read with its gradients."""

    def __init__(self):
        batch, group, self.length, prompt, heads, kv_heads, size = 2, 2, 140, 21, 4, 2, 16
        # More tiles of keys than one, a block of units with several responses, a last block that is not full.
        lengths = np.array([[140, 5], [0, 70]])
        self.mask = np.arange(self.length) < lengths[..., None]
        self.prompt_mask = jnp.asarray(np.arange(prompt) >= np.array([[0], [4]]))
        self.at = packing.places(jnp.asarray(lengths[None]), self.length, bucket=80)  # 10 places for 9 units
        shapes = [(batch, group, self.length, heads, size), *[(batch, kv_heads, prompt, size)] * 2]
        shapes += [(batch, group, self.length, kv_heads, size)] * 2
        keys = jax.random.split(jax.random.key(0), len(shapes))
        self.arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        weight = jnp.cos(jnp.arange(self.mask.size * heads * size)).reshape(shapes[0])
        self.weight = weight * self.mask[..., None, None]

    def padded(self, q, prefix_k, prefix_v, k, v):
        visible = jnp.tril(jnp.ones((self.length, self.length), bool))
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
        return attention.prefix_and_branch(q, prefix_k, prefix_v, self.prompt_mask, k, v, visible)

    def packed(self, kind, q, prefix_k, prefix_v, k, v):
        q, k, v = (packing.pack(x, self.at) for x in (q, k, v))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        read = kernels.over_prompt_packed(kind, q, prefix_k, prefix_v, self.prompt_mask, k, v, self.at, self.length)
        return packing.unpack(read, self.at, self.length)

    def pull(self, attend):
        def product(*arrays):
            read = attend(*arrays)
            return jnp.sum(jnp.sin(read) * self.weight), read * self.mask[..., None, None]

        return jax.jit(jax.grad(product, range(5), has_aux=True))(*self.arrays)


@pytest.fixture(scope="module")
def attended():
    """(the example, gradients of the padded responses, what they read)"""
    example = Attended()
    return example, *example.pull(example.padded)


@pytest.mark.parametrize("kind", ["einsum", "dot_product", "splash"])
def test_packed_responses_attend_as_padded_ones(kind, attended):
    example, want_gradients, want = attended
    gradients, got = example.pull(functools.partial(example.packed, kind))
    np.testing.assert_allclose(got, want, atol=1e-5)
    for name, gradient, wanted in zip(("q", "prefix_k", "prefix_v", "k", "v"), gradients, want_gradients, strict=True):
        assert float(jnp.abs(gradient - wanted).max()) < 1e-5 * float(jnp.abs(wanted).max()), name


# ------------------------------------------------------------------------------------------------- the steps

POLICY = tiny_llava.make_policy(layers=2, vocab=24)
FREEZE = "^(vision|projector)/"
# After the first update the trace is the gradient itself.
OPTIMIZER = optax.chain(optax.trace(decay=0.9), optax.scale(-0.1))
OBJECTIVE = RLObjective(
    ("precision", "recall", "linguistic"), (1.0, 0.5, 2.0), (False, False, True), R, kl_coef=0.3, temperature=0.7
)
SIZES = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
MICRO_BATCHES, DEALT = 2, 48  # Capacities of 18 units on one device: the fullest part, where prompts are dealt out.


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(SIZES | sizes, jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))])


def put(mesh, tree):
    return jax.device_put(tree, sharding.batch_sharding(mesh))


@functools.cache
def host_batch() -> RLBatch:
    rng = np.random.default_rng(7)
    prompt = tiny_llava.make_prompt(POLICY, batch=B)
    return jax.device_get(
        RLBatch(
            prompt=prompt,
            image_embeds=jax.jit(POLICY.encode)(tiny_llava.make_params(POLICY), prompt.images),
            responses=responses_of(POLICY.vocab),
            mask=MASK,
            old_log_probs=np.where(MASK, -4 + 0.5 * rng.standard_normal(MASK.shape), 0).astype(np.float32),
            rewards=rng.random((B, G, 3)).astype(np.float32),
            valid=rng.random((B, G, 3)) > 0.1,
            words=rng.integers(3, 30, (B, G)),
            reference_words=rng.integers(8, 12, B),
            truncated=LENGTHS == R,
        )
    )


class Update:
    """A compiled RL update, which each call starts from the same parameters and a reference that is away from them."""

    def __init__(self, mesh, **options):
        self.mesh = mesh
        step = make_rl_step(POLICY, OPTIMIZER, OBJECTIVE, freeze=FREEZE, **options)
        self.program = step.lower(*self._states(), put(mesh, host_batch()), self._reference()).compile()

    def __call__(self, batch: RLBatch) -> tuple[TrainState, dict[str, float]]:
        state, metrics = self.program(*self._states(), put(self.mesh, batch), self._reference())
        return state, finalise(metrics)

    def _states(self) -> list[TrainState]:
        state = init_state(tiny_llava.make_params(POLICY), OPTIMIZER, FREEZE)
        return [jax.device_put(jax.device_get(state), state_shardings(self.mesh, state))]

    def _reference(self):
        return jax.tree.map(lambda x: 1.02 * x, {"decoder": self._states()[0].params["decoder"]})


@functools.cache
def padded() -> Update:
    return Update(mesh_of(data=1), micro_batches=MICRO_BATCHES)


@functools.cache
def packed() -> Update:
    return Update(mesh_of(data=1), micro_batches=MICRO_BATCHES, token_bucket=DEALT)


def dealt(mesh, micro_batches: int) -> RLBatch:
    """The batch on the mesh, in the order in which it fits, exactly; as it is it does not."""
    parts = sharding.parts_of(mesh), micro_batches
    order = packing.choose(LENGTHS, {DEALT: micro_batches}, parts[0], padded=96).order
    units = packing.units_of(LENGTHS).sum(1)
    room = packing.capacity(DEALT, B * G // (parts[0] * parts[1]))
    assert packing.largest_part(units[order], *parts) == room < packing.largest_part(units, *parts)
    batch = make_reordering(mesh)(put(mesh, host_batch()), put(mesh, order))
    for leaf, wanted in zip(jax.tree.leaves(batch), jax.tree.leaves(host_batch()), strict=True):
        np.testing.assert_array_equal(leaf, wanted[order])
        assert leaf.sharding.is_equivalent_to(sharding.batch_sharding(mesh), leaf.ndim)
    return batch


def trace_of(state: TrainState) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in state.opt_state[0].trace.items()}


def assert_same_update(got, useful: float) -> None:
    (state, values), (wanted_state, wanted) = got, padded()(host_batch())
    np.testing.assert_allclose(wanted.pop("padding/update_useful"), LENGTHS.sum() / (B * G * R), rtol=1e-6)
    np.testing.assert_allclose(values.pop("padding/update_useful"), useful, rtol=1e-6)
    assert values.keys() == wanted.keys()
    assert values["kl"] > 1e-4
    for name, value in values.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert_equal_trees(trace_of(state), trace_of(wanted_state))


def test_a_packed_update_is_the_padded_one():
    assert_same_update(packed()(dealt(packed().mesh, 2)), useful=LENGTHS.sum() / (2 * 18 * UNIT))


# A quarter of a minute of compilation each.
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_packed_update_on_several_devices_is_the_padded_one_on_one(sizes):
    mesh = mesh_of(**sizes)
    update = Update(mesh, token_bucket=DEALT)
    assert_same_update(update(dealt(mesh, 1)), useful=LENGTHS.sum() / (4 * 9 * UNIT))
    if sizes == {"data": 4}:  # Where no parameter is split, devices exchange sums alone: no response leaves its own.
        collectives = r"(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)(?:-start)?\("
        assert set(re.findall(collectives, update.program.as_text())) == {"all-reduce"}


def test_what_does_not_fit_changes_nothing():
    """The host never asks for it. If it did, no part would be taken for the whole."""
    state, values = packed()(host_batch())
    assert np.isnan(values["grad_norm"])
    assert values["nonfinite"] == 1
    for path, leaf in flat(tiny_llava.make_params(POLICY)).items():
        np.testing.assert_array_equal(flat(state.params)[path], leaf, err_msg=path)


def test_the_first_packed_update_after_a_rollout_is_on_policy():
    params, prompt = tiny_llava.make_params(POLICY), tiny_llava.make_prompt(POLICY, batch=B)
    keys = jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(1)
    out = make_rollout(POLICY, Sampling(G, R, temperature=OBJECTIVE.temperature))(params, prompt, *keys)
    lengths = np.asarray(out.lengths)
    assert len(np.unique(packing.units_of(lengths))) > 1, lengths
    order = packing.choose(lengths, {DEALT: MICRO_BATCHES}, 1, padded=96).order
    batch = host_batch()._replace(
        prompt=prompt,
        image_embeds=out.image_embeds,
        responses=out.tokens,
        mask=out.mask,
        old_log_probs=out.policy_log_probs,
        truncated=out.truncated,
    )
    _, values = packed()(jax.tree.map(lambda x: np.asarray(x)[order], batch))
    assert abs(values["ratio/mean"] - 1) < 1e-5
    assert values["drift/max_abs_logp"] < 1e-5
    assert values["ratio/clipped_frac"] == 0


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_packed_sft_update_is_the_padded_one(micro_batches):
    policy = TextPolicy(POLICY.decoder, pad_token=0, end_tokens=(2,), logits_chunk=100)
    prompt, bucket = tiny_llava.make_prompt(POLICY, batch=B), 56
    batch = SFTBatch(prompt._replace(images=policy.no_images(B)), responses_of(POLICY.vocab), MASK)

    def update(**options):
        state = init_state({"decoder": tiny_llava.make_params(POLICY)["decoder"]}, OPTIMIZER, "")
        state, metrics = make_sft_step(policy, OPTIMIZER, **options)(jax.device_put(state, jax.devices()[0]), batch)
        return trace_of(state), finalise(metrics)

    (gradient, values), (wanted, wanted_values) = update(micro_batches=micro_batches, token_bucket=bucket), update()
    np.testing.assert_allclose(values["loss"], wanted_values["loss"], rtol=1e-5)
    assert_equal_trees(gradient, wanted)
    room = packing.capacity(bucket, B * G // micro_batches) * micro_batches
    np.testing.assert_allclose(values["padding/update_useful"], LENGTHS.sum() / (room * UNIT), rtol=1e-6)


def tokens_in_products(program: jax.stages.Compiled) -> set[int]:
    """Sizes of axes beside one of the residual stream's width, in matrix products: of the tokens that a layer sees."""
    text, found = program.as_text(), set()
    shapes = dict(re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", text))
    for result, operands in re.findall(r"%?([\w.-]+) = \w+\[[\d,]*\]\S* dot\(([^)]*)\)", text):
        for name in (result, *re.findall(r"%([\w.-]+)", operands)):
            sizes = [int(size) for size in shapes[name].split(",") if size]
            found |= set(sizes) if POLICY.decoder.width in sizes else set()
    return found


def test_dense_layers_and_logits_see_packed_units_alone():
    as_padded, as_packed = (tokens_in_products(update().program) for update in (padded, packed))
    tokens, units = B * G * R // MICRO_BATCHES, 18 * UNIT
    assert tokens in as_padded
    assert units in as_packed
    assert not {tokens, R, B * G // MICRO_BATCHES * packing.units_of(R) * UNIT} & as_packed
