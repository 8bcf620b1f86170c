"""Adapters against a plain reference with explicit weights, in every function of a policy."""

import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_llava import make_params, make_policy, make_prompt, make_responses

from balcap_jax import train_step
from balcap_jax.cli.errors import UserError
from balcap_jax.models import lora
from balcap_jax.parallel import sharding

RANK, SCALE = 2, 1.5
DECODER = "^decoder/layers/(q|k|v|o|gate|up|down)$"
EVERY_DENSE = "^(decoder|vision)/layers/(q|k|v|o|gate|up|down)$|^projector/(first|second)$"

PROMPT, (RESPONSES, MASK) = make_prompt(make_policy()), make_responses()

# Each program runs once: compiling it well is not worth the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")  # noqa: E731


def with_adapters(policy, targets: str = EVERY_DENSE):
    """Parameters whose adapters are not at their start: lora_b is no longer 0."""
    flat = flatten(lora.add(make_params(policy), RANK, targets, jax.random.key(0)))
    rng = np.random.default_rng(5)
    for path, leaf in flat.items():
        if path.endswith("lora_b"):
            flat[path] = jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def explicit(params):
    """NumPy: the kernels with their adapters summed in, layer by layer and in fp64; no adapters."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    for path in [path for path in flat if path.endswith("/lora_a")]:
        layer = path.removesuffix("/lora_a")
        a, b = flat.pop(f"{layer}/lora_a").astype(np.float64), flat.pop(f"{layer}/lora_b").astype(np.float64)
        kernel = flat[f"{layer}/kernel"]
        delta = a @ b if a.ndim == 2 else np.stack([one @ other for one, other in zip(a, b, strict=True)])
        flat[f"{layer}/kernel"] = (kernel + SCALE * delta.reshape(kernel.shape)).astype(np.float32)
    return flax.traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, flat), sep="/")


def outputs(policy, params):
    """What each function of a policy gives: image embeddings, prefill, two steps of decoding, log-probabilities."""
    embeds = policy.encode(params, PROMPT.images)
    prefix, first = policy.prefill(params, PROMPT, embeds)
    branch, after = policy.empty_branch(*RESPONSES.shape), []
    for t in range(2):
        branch, logits = policy.decode(params, prefix, branch, RESPONSES[..., t], jnp.int32(t))
        after.append(logits)
    log_probs = policy.log_probs(params, PROMPT, embeds, RESPONSES, temperature=0.9)
    return {"embeds": embeds, "prefix": prefix.keys, "prefill": first, "decode": after, "log_probs": log_probs}


@functools.cache
def compiled_outputs(policy):
    """`outputs(policy, params)`, traced once for parameters of one form."""
    return compiled(functools.partial(outputs, policy))


def assert_close(found, wanted, tolerance: float = 1e-5) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        scale = np.abs(np.where(np.abs(leaf) < 1e20, leaf, 0)).max()
        name = jax.tree_util.keystr(path)
        other = np.asarray(dict(jax.tree_util.tree_leaves_with_path(found))[path])
        np.testing.assert_allclose(other, leaf, rtol=0, atol=tolerance * scale, err_msg=name)


def total(policy, params) -> jax.Array:
    """A scalar that reaches every dense layer."""
    embeds = policy.encode(params, PROMPT.images)
    return jnp.sum(jnp.where(MASK, policy.log_probs(params, PROMPT, embeds, RESPONSES), 0.0))


# ------------------------------------------------------------------------------------------------- the maths


def test_outputs_equal_those_of_the_summed_kernels():
    policy = make_policy(qkv_bias=True)
    params = with_adapters(policy)
    wanted = compiled_outputs(policy)(explicit(params))
    found = compiled_outputs(lora.Adapted(policy, SCALE))(params)
    assert_close(found, wanted)
    base = compiled_outputs(policy)(params)  # Entries that the models do not know do them no harm.
    for name in ("embeds", "prefix", "log_probs"):
        assert np.abs(base[name] - wanted[name]).max() > 0.05, f"{name}: the adapters hardly change it"


def test_gradients_follow_from_those_of_the_summed_kernels():
    """dL/da = scale dL/dW b' and dL/db = scale a' dL/dW, for W = kernel + scale a b; through rematerialised layers."""
    policy = make_policy(remat="full")
    params = with_adapters(policy)
    of_kernels = flatten(compiled(jax.grad(lambda p: total(policy, p)))(explicit(params)))
    found = flatten(compiled(jax.grad(lambda p: total(lora.Adapted(policy, SCALE), p)))(params))
    flat = flatten(params)
    checked = 0
    for path in flat:
        layer, _, leaf = path.rpartition("/")
        if leaf != "lora_a":
            continue
        a, b = flat[path], flat[f"{layer}/lora_b"]
        of_kernel = of_kernels[f"{layer}/kernel"].reshape(*a.shape[:-1], b.shape[-1])
        assert_close(found[path], SCALE * np.einsum("...io,...ro->...ir", of_kernel, b), 1e-4)
        assert_close(found[f"{layer}/lora_b"], SCALE * np.einsum("...ir,...io->...ro", a, of_kernel), 1e-4)
        assert_close(found[f"{layer}/kernel"], of_kernels[f"{layer}/kernel"], 1e-4)
        checked += 1
    assert checked == 7 + 6 + 2


def test_it_starts_as_the_base_exactly():
    policy = make_policy(qkv_bias=True)
    base = make_params(policy)
    params = lora.add(base, RANK, EVERY_DENSE, jax.random.key(1))
    found = compiled_outputs(lora.Adapted(policy, SCALE))(params)
    jax.tree.map(np.testing.assert_array_equal, found, compiled_outputs(policy)(base))
    a = flatten(params)["decoder/layers/down/lora_a"]
    bound = make_policy().decoder.mlp ** -0.5
    assert 0.5 * bound < np.abs(a).max() <= bound
    assert len({layer.tobytes() for layer in np.asarray(a)}) == len(a), "layers start alike"
    fewer = flatten(lora.add(base, RANK, "^decoder/layers/down$", jax.random.key(1)))
    np.testing.assert_array_equal(fewer["decoder/layers/down/lora_a"], a)


def test_merge_equals_the_summed_kernels_and_keeps_the_type():
    policy = make_policy()
    params = with_adapters(policy)
    merged, wanted = lora.merge(params, SCALE), explicit(params)
    assert flatten(merged).keys() == flatten(make_params(policy)).keys()
    assert_close(merged, wanted, 1e-6)

    halved = lora.cast_base(params, "bfloat16")
    assert {leaf.dtype for path, leaf in flatten(halved).items() if "lora" in path} == {jnp.dtype("float32")}
    merged = flatten(lora.merge(halved, SCALE))
    assert {leaf.dtype for leaf in merged.values()} == {jnp.dtype("bfloat16")}
    summed = flatten(explicit(jax.tree.map(lambda x: x.astype(jnp.float32), halved)))
    for path, leaf in merged.items():  # One rounding, of the sum: at most one unit of the last place where sums tie.
        off = np.abs(leaf.astype(jnp.float32) - summed[path])
        assert (off <= 2**-8 * np.abs(summed[path]) + 1e-12).all(), path


def test_vmap_over_adapters():
    """Several sets of adapters over one batch of images: each is as if alone."""
    policy = lora.Adapted(make_policy(), SCALE)
    one = with_adapters(policy.policy)
    other = lora.add(make_params(policy.policy), RANK, EVERY_DENSE, jax.random.key(2))
    encode = lambda p: policy.encode(p, PROMPT.images)  # noqa: E731
    found = compiled(jax.vmap(encode))(jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other))
    encode = compiled(encode)
    assert_close(list(found), [encode(one), encode(other)])
    assert np.abs(found[0] - found[1]).max() > 0.05


def test_bfloat16_adds_in_the_compute_type():
    policy = make_policy(dtype="bfloat16", tower={"dtype": "bfloat16"})
    params = lora.cast_base(with_adapters(policy), "bfloat16")
    embeds = compiled(lora.Adapted(policy, SCALE).encode)(params, PROMPT.images)
    assert embeds.dtype == jnp.bfloat16
    summed = explicit(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    wanted = compiled(make_policy().encode)(summed, PROMPT.images)
    assert_close(embeds.astype(jnp.float32), wanted, 0.05)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("^decoder/layers/attention$", r"matches no dense layer; the dense layers are decoder/layers/down, "),
        ("decoder/(embed|layers/q)$", r"matches decoder/embed, which is no dense layer"),
        ("^decoder/head", r"matches decoder/head, which is no dense layer"),
        ("^decoder/layers/.*norm", r"matches decoder/layers/(attention|mlp)_norm, which is no dense layer"),
        ("^vision/patches/patch", r"matches vision/patches/patch, which is no dense layer"),
        ("(q", r"'lora.targets' is no regular expression"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(targets, message):
    with pytest.raises(UserError, match=message):
        lora.add(make_params(make_policy()), RANK, targets, jax.random.key(0))


# ------------------------------------------------------------------------------------------------- training


def test_updates_leave_the_base_bit_for_bit():
    policy = lora.Adapted(make_policy(), SCALE)
    params = lora.cast_base(lora.add(make_params(policy.policy), RANK, DECODER, jax.random.key(0)), "bfloat16")
    before = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    optimizer = optax.adam(0.05)
    state = train_step.init_state(params, optimizer, lora.FREEZE_BASE)
    assert set(state.opt_state[0].mu) == {path for path in before if "lora" in path}
    assert train_step.vision_is_frozen(params, lora.FREEZE_BASE)
    step = train_step.make_sft_step(policy, optimizer, freeze=lora.FREEZE_BASE)
    batch = train_step.SFTBatch(PROMPT, RESPONSES, MASK)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].total))
    assert losses[-1] < losses[0] - 0.2
    for path, leaf in flatten(state.params).items():
        assert leaf.dtype == before[path].dtype
        assert np.array_equal(leaf, before[path]) == ("lora" not in path), path


def test_every_adapter_has_one_row_of_the_sharding_table():
    for path, leaf in flatten(with_adapters(make_policy())).items():
        axes = sharding.logical_axes(path)
        assert len(axes) in (0, leaf.ndim), path
    assert sharding.logical_axes("decoder/layers/o/lora_a") == (None, "heads", None)
    assert sharding.logical_axes("decoder/layers/up/lora_b") == (None, None, "mlp")


def test_the_wrapped_policy_is_hashable_and_equal_to_its_like():
    policy = make_policy()
    assert hash(lora.Adapted(policy, SCALE)) == hash(lora.Adapted(dataclasses.replace(policy), SCALE))
    assert lora.Adapted(policy, SCALE) != lora.Adapted(policy, 1.0)
