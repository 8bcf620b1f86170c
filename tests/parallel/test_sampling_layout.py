"""A rollout in parts, and with its matrices over fewer devices than in training: the same tokens, less memory."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_llava import EOS, make_params, make_policy, make_prompt

from balcap_jax.aot import hlo
from balcap_jax.cli.errors import UserError
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Rollout, Sampling, example_keys, lower_rollout, make_rollout

B, G, R, V = 16, 4, 9, 24
POLICY = make_policy(tower={"heads": 4}, vocab=V, kv_heads=4)
SIZES = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1}
MESHES = {
    "one": {},
    "fsdp 8": {"fsdp": 8},
    "data 2, fsdp 4": {"data": 2, "fsdp": 4},
    "replica 2, fsdp 2, tensor 2": {"replica": 2, "fsdp": 2, "tensor": 2},
}


def mesh_named(name: str) -> jax.sharding.Mesh:
    sizes = SIZES | MESHES[name]
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@functools.cache
def inputs(name: str) -> tuple:
    mesh, params = mesh_named(name), make_params(POLICY)
    params = jax.device_put(jax.device_get(params), sharding.tree_shardings(mesh, params))
    rows = jax.device_get((make_prompt(POLICY, batch=B), example_keys([f"picture {b}" for b in range(B)])))
    scalars = jax.device_put((np.uint32(3), np.uint32(5)), sharding.replicated(mesh))
    return (params, *jax.device_put(rows, sharding.batch_sharding(mesh)), *scalars)


def sampled(name: str, parts: int, split: int | None = None, refill: bool = False) -> tuple[Rollout, str]:
    """The rollout on the host, and the text of its compiled program."""
    mesh, arguments = mesh_named(name), inputs(name)
    target = None if split is None else sharding.sampling_mesh(mesh, split)
    sampling = Sampling(G, R, top_p=0.95, parts=parts, refill=refill)
    compiled = lower_rollout(POLICY, sampling, "float32", *arguments, mesh=target).compile()
    out = compiled(*arguments)
    assert all(leaf.sharding.is_equivalent_to(sharding.batch_sharding(mesh), leaf.ndim) for leaf in out)
    return jax.device_get(out), compiled.program.as_text()


@functools.cache
def whole() -> Rollout:
    return sampled("one", 1)[0]


def compare(out: Rollout) -> None:
    expected = whole()
    assert 0 < (expected.tokens == EOS).sum() < B * G
    assert expected.lengths.min() < expected.lengths.max() == R
    for name in ("tokens", "mask", "lengths", "truncated"):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(out.policy_log_probs, expected.policy_log_probs, atol=1e-5)
    np.testing.assert_allclose(out.image_embeds, expected.image_embeds, atol=1e-5)


@pytest.mark.parametrize("parts", [4, *(pytest.param(parts, marks=pytest.mark.slow) for parts in (1, 2, 16))])
def test_parts_have_the_tokens_of_the_whole(parts):
    compare(sampled("one", parts)[0])


@pytest.mark.parametrize(
    ("name", "parts", "split"),
    [
        *[pytest.param("one", parts, None, marks=pytest.mark.slow) for parts in (2, 16)],
        *[pytest.param("fsdp 8", 2, split, marks=pytest.mark.slow) for split in (1, 4)],
        ("replica 2, fsdp 2, tensor 2", 4, 2),
    ],
)
def test_refill_has_the_tokens_of_the_whole_and_moves_no_weight_and_no_cache(name, parts, split):
    out, text = sampled(name, parts, split, refill=True)
    compare(out)
    inside = [moved for moved in hlo.Program(text).analyse(R - 1).collectives if moved.in_open_loop]
    assert not any(moved.of_invariant for moved in inside)
    # Whether any device goes on, and the oldest token; with split matrices what each row sends.
    rows = B * G // parts // (mesh_named(name).size // (split or 1))
    largest = 4 * rows * max(POLICY.decoder.width, V) if split and split > 1 else 4
    assert max((moved.size for moved in inside), default=0) <= largest


LAYOUTS = [("fsdp 8", 2, 1), ("replica 2, fsdp 2, tensor 2", 4, 2)]
# Half a minute of compilation each where the machine is busy.
SLOW = [
    *[("fsdp 8", 1, split) for split in (1, 2, 4, 8)],
    *[("data 2, fsdp 4", 2, split) for split in (1, 2, 4, 8)],
    *[("replica 2, fsdp 2, tensor 2", parts, 4) for parts in (1, 2)],
]


@pytest.mark.parametrize(
    ("name", "parts", "split"), [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW)]
)
def test_every_layout_has_the_tokens_of_one_device_and_moves_no_weight_in_its_loop(name, parts, split):
    out, text = sampled(name, parts, split)
    compare(out)
    inside = [moved for moved in hlo.Program(text).analyse(R - 1).collectives if moved.in_open_loop]
    assert not any(moved.of_invariant for moved in inside)
    # With whole matrices, all that may remain is whether any device goes on.
    assert (max((moved.size for moved in inside), default=0) > 4) == (split > 1)


def test_one_program_samples_all_parts():
    """Its loops are those of a whole batch and the one over the parts, whatever their number."""
    loops = {}
    for parts in (1, 8):
        text = make_rollout(POLICY, Sampling(G, R, parts=parts)).lower(*inputs("one")).as_text()
        loops[parts] = text.count("stablehlo.while")
    assert loops[8] == loops[1] + 1


def test_an_evaluation_that_samples_as_training_does_is_not_compiled_again():
    (params, prompt, *rest), sampling = inputs("one"), Sampling(G, R, top_p=0.95)
    lowered = lower_rollout(POLICY, sampling, "float32", params, prompt, *rest)
    # Other arrays, laid out alike.
    alike = jax.tree.map(lambda x: x.copy(), (params, prompt))
    again = lower_rollout(POLICY, sampling, "float32", *alike, *rest)
    assert again.program is lowered.program
    half = jax.tree.map(lambda x: jax.device_put(x[: B // 2], x.sharding), (prompt, rest[0]))
    other = lower_rollout(POLICY, sampling, "float32", params, *half, *rest[1:])
    assert other.program is not lowered.program
    assert jax.tree.leaves(other.program.out_info)[0].shape == (B // 2, G, R)


def test_memory_falls_with_the_number_of_parts():
    """The cache of 64 branches of 240 tokens, too few to shrink in stages, is most of the memory here."""
    policy, length = make_policy(vocab=V, kv_heads=4), 240
    temporaries, cache = {}, 2 * 4 * policy.decoder.layers * B * G * 4 * length * policy.decoder.head_size
    for parts in (1, 8):
        lowered = make_rollout(policy, Sampling(G, length, parts=parts)).lower(make_params(policy), *inputs("one")[1:])
        temporaries[parts] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporaries[1] > cache
    assert temporaries[8] < 0.16 * temporaries[1]


# ------------------------------------------------------------------------------------------------- the mesh


def test_the_mesh_of_sampling_has_the_same_devices_in_the_same_order():
    mesh = mesh_named("data 2, fsdp 4")
    assert sharding.possible_splits(mesh) == [1, 2, 4, 8]
    rows = sharding.batch_sharding(mesh)
    for split in (1, 2, 4, 8):
        target = sharding.sampling_mesh(mesh, split)
        assert dict(target.shape) == SIZES | {"data": 8 // split, "fsdp": split}
        assert list(target.devices.flat) == list(mesh.devices.flat)
        assert sharding.batch_sharding(target).is_equivalent_to(rows, 3)
    assert sharding.sampling_mesh(mesh, 4) is mesh


def test_a_split_keeps_the_tensor_axis():
    mesh = mesh_named("replica 2, fsdp 2, tensor 2")
    assert sharding.possible_splits(mesh) == [2, 4]
    target = sharding.sampling_mesh(mesh, 2)
    assert dict(target.shape) == SIZES | {"replica": 2, "data": 2, "tensor": 2}
    down = {"decoder": {"layers": {"down": {"kernel": jax.ShapeDtypeStruct((3, 32, 24), np.float32)}}}}
    (placed,) = jax.tree.leaves(sharding.sampling_shardings(target, down))
    assert placed.shard_shape((3, 32, 24)) == (3, 16, 24)


@pytest.mark.parametrize("split", [1, 3, 8, 16])
def test_a_split_that_the_mesh_does_not_have_is_refused(split):
    message = rf"mesh\.sampling is {split}, but on the mesh replica 2 x data 1 x fsdp 2 x tensor 2 .* over 2, 4 devices"
    with pytest.raises(UserError, match=message):
        sharding.sampling_mesh(mesh_named("replica 2, fsdp 2, tensor 2"), split)


def test_parts_that_do_not_divide_are_refused_with_those_that_do():
    mesh = mesh_named("data 2, fsdp 4")
    assert sharding.possible_parts(mesh, 96) == [1, 2, 3, 4, 6, 12]
    sharding.check_parts(mesh, 96, 12)
    message = r"rollout\.parts is 5: 96 prompts over 8 devices \(mesh .*\) can be sampled in 1, 2, 3, 4, 6, 12 parts"
    with pytest.raises(UserError, match=message):
        sharding.check_parts(mesh, 96, 5)


def test_rows_in_parts_keep_their_order():
    rows, no_images = np.arange(24, dtype=np.float32).reshape(12, 2), np.zeros((12, 0), np.uint8)
    work = jax.jit(lambda *arrays: sharding.in_parts(lambda x, none: (2 * x, none, x.sum(-1)), arrays, 3))
    doubled, none, sums = work(rows, no_images)
    np.testing.assert_array_equal(doubled, 2 * rows)
    assert none.shape == no_images.shape  # what text alone has for pictures
    np.testing.assert_array_equal(sums, rows.sum(-1))


# ------------------------------------------------------------------------------------------------- what is moved


def test_only_what_changes_is_moved():
    """Adapters on a base that is in the compute type already: no second copy of the base."""
    mesh = mesh_named("one")
    place = sharding.replicated(mesh)
    kernel = {name: jax.ShapeDtypeStruct((3, 24, 32), "bfloat16", sharding=place) for name in ("kernel",)}
    adapters = {name: jax.ShapeDtypeStruct((3, 24, 2), "float32", sharding=place) for name in ("lora_a",)}
    params = {"decoder": {"layers": {"gate": kernel | adapters}}}
    relay = sharding.make_relay(mesh, params, "bfloat16")
    assert set(relay.targets) == {"decoder/layers/gate/lora_a"}
    assert sharding.bytes_per_device(relay.take(params)) == 3 * 24 * 2 * 4
    base = jax.device_put(np.ones((3, 24, 32), "bfloat16"), place)
    given = {"decoder": {"layers": {"gate": {"kernel": base, "lora_a": jax.device_put(np.ones((3, 24, 2)), place)}}}}
    relaid = relay(given)["decoder"]["layers"]["gate"]
    assert relaid["kernel"] is base
    assert relaid["lora_a"].dtype == "bfloat16"
    assert sharding.make_relay(mesh, {"decoder": {"layers": {"gate": kernel}}}, "bfloat16") is None


def test_the_change_of_layout_goes_to_the_mesh_of_sampling():
    mesh = mesh_named("fsdp 8")
    target = sharding.sampling_mesh(mesh, 2)
    params = inputs("fsdp 8")[0]
    down = sharding.make_relay(mesh, params, "float32", target)(params)["decoder"]["layers"]["down"]["kernel"]
    assert down.sharding == NamedSharding(target, PartitionSpec(None, ("fsdp", "tensor"), None))
    np.testing.assert_array_equal(down, params["decoder"]["layers"]["down"]["kernel"])
