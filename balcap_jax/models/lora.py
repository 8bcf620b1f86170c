"""LoRA (Hu et al., arXiv 2106.09685): low-rank adapters beside frozen dense kernels.

Adapters are entries of the parameter tree next to the kernel that they add to:

    decoder/layers/q/kernel [L, D, N, H]    lora_a [L, D, r]    lora_b [L, r, N * H]

so that sharding, checkpoints and the freezing of parameters by path treat them like any other array. A layer gives
y + scale * (x a) b, with scale = alpha / rank. Models know nothing of adapters: `Adapted` runs any policy's own
functions and adds the term to each dense layer that holds adapters.
"""

import dataclasses
import functools
import math
import re
import zlib
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from balcap_jax.cli.errors import UserError
from balcap_jax.models.policy import Params, Wrapped

ADAPTERS = ("lora_a", "lora_b")
FREEZE_BASE = r"^(?!.*/lora_[ab]$)"
"""Matches the path of every parameter that is no adapter; a value for `freeze`."""


# ------------------------------------------------------------------------------------------------- the tree


def add(params: Params, rank: int, targets: str, rng: jax.Array) -> Params:
    """Adds adapters of `rank` to the dense layers whose path, such as "decoder/layers/q", matches `targets`.

    `targets` is a regular expression that is searched for in the path. lora_a is uniform in +-1 / sqrt(in) (what peft's
    Kaiming initialisation amounts to). lora_b is 0, so that the adapted policy starts as the base. Both are fp32. An
    adapter's values depend on `rng` and its path alone.

    Raises:
      UserError: `targets` is no regular expression, matches no dense layer, or matches something else too.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    dense, others = dense_layers(params)
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(f"config field 'lora.targets' is no regular expression: {error}, got {targets!r}") from error
    targeted = [path for path in dense if pattern.search(path)]
    not_dense = [path for path in others if pattern.search(path)]
    if not_dense or not targeted:
        problem = f"matches {not_dense[0]}, which is no dense layer" if not_dense else "matches no dense layer"
        raise UserError(
            f"config field 'lora.targets' ({targets!r}) {problem}; the dense layers are {', '.join(sorted(dense))}"
        )
    for path in targeted:
        kernel = flat[f"{path}/kernel"]
        stack, size_in, size_out = _sizes(path, kernel.shape)
        key, bound = jax.random.fold_in(rng, zlib.crc32(path.encode())), size_in**-0.5
        flat[f"{path}/lora_a"] = jax.random.uniform(key, (*stack, size_in, rank), minval=-bound, maxval=bound)
        flat[f"{path}/lora_b"] = jnp.zeros((*stack, rank, size_out))
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def merge(params: Params, scale: float, *, keep_adapters: bool = False) -> Params:
    """kernel + scale * lora_a lora_b for every adapted layer, summed in fp32 and cast back to the kernel's type.

    The result is a tree of the policy without `Adapted`; it holds adapters only if they are kept beside what they were
    added to. Without adapters it equals `params`.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    merged = {path: leaf for path, leaf in flat.items() if keep_adapters or not path.endswith(ADAPTERS)}
    for path, a in flat.items():
        layer, _, leaf = path.rpartition("/")
        if leaf == "lora_a":
            merged[f"{layer}/kernel"] = _merge_kernel(flat[f"{layer}/kernel"], a, flat[f"{layer}/lora_b"], scale)
    return flax.traverse_util.unflatten_dict(merged, sep="/")


def cast_base(params: Params, dtype: str) -> Params:
    """Every parameter but the adapters in the type `dtype`; the adapters stay fp32, as they are trained."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    cast = {path: leaf if path.endswith(ADAPTERS) else leaf.astype(dtype) for path, leaf in flat.items()}
    return flax.traverse_util.unflatten_dict(cast, sep="/")


def has_adapters(params: Params) -> bool:
    return any(path.endswith(ADAPTERS) for path in flax.traverse_util.flatten_dict(params, sep="/"))


def dense_layers(params: Params) -> tuple[list[str], list[str]]:
    """Paths of the dense layers of a tree, and paths of everything else in it (embeddings, norms, the head).

    The patch embedding counts as something else: its inputs are pixels, and Qwen2.5-VL's is a convolution over time.
    """
    dense, others = [], []
    for path in flax.traverse_util.flatten_dict(params, sep="/"):
        layer, _, leaf = path.rpartition("/")
        if leaf == "scale" or layer.startswith("vision/patch"):
            others.append(layer)
        elif leaf == "kernel":
            dense.append(layer)
        elif leaf not in ("bias", *ADAPTERS):
            others.append(path)
    return dense, others


def _sizes(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """(the layer axis if the kernel is stacked, input features, output features) of a dense kernel."""
    stack, kernel = (shape[:1], shape[1:]) if "layers/" in path else ((), shape)
    # The projection out of attention contracts [N, H] to [D]; every other layer contracts one axis.
    contracted = len(kernel) - 1 if path.endswith("/o") else 1
    return stack, math.prod(kernel[:contracted]), math.prod(kernel[contracted:])


@jax.jit
def _merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    def merge_layer(kernel, a, b):
        delta = jnp.matmul(a, b, precision="highest").reshape(kernel.shape)
        return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)

    # Layer by layer: the fp32 sum of a whole stack would be a second model.
    return merge_layer(kernel, a, b) if a.ndim == 2 else jax.lax.map(lambda x: merge_layer(*x), (kernel, a, b))


# ------------------------------------------------------------------------------------------------- the policy


@dataclasses.dataclass(frozen=True)
class Adapted(Wrapped):
    """A policy (see `models.policy.Policy`) whose dense layers add their adapters' term, where they hold adapters.

    On parameters without adapters it is `policy`. Rollouts and updates both run it, rather than merged weights: merged
    into bf16 the sampler would be another distribution than the one that is trained.
    """

    scale: float

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def with_adapters(*args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(self._add_term):
                return value(*args, **kwargs)

        return with_adapters

    def _add_term(self, call, args, kwargs, context):
        y = call(*args, **kwargs)
        layer = context.module
        is_dense = isinstance(layer, nn.Dense | nn.DenseGeneral) and context.method_name == "__call__"
        if not is_dense or not layer.has_variable("params", "lora_a"):
            return y
        a, b = (layer.get_variable("params", name).astype(y.dtype) for name in ADAPTERS)
        # The contracted axes are the last ones, as in every kernel that `_sizes` can split.
        contracted = len(layer.axis) if isinstance(getattr(layer, "axis", None), tuple) else 1
        x = args[0].astype(y.dtype).reshape(*args[0].shape[: args[0].ndim - contracted], a.shape[0])
        return y + self.scale * ((x @ a) @ b).reshape(y.shape)
