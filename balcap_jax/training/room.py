"""How a rollout fits into the memory of the devices: in how many parts, and over how many devices its matrices lie.

Both are chosen by arithmetic on shapes. `compile_first` then asks the compiler, which knows of all other arrays too.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from balcap_jax import refill
from balcap_jax.models.policy import Params, Policy
from balcap_jax.parallel import distributed, sharding
from balcap_jax.rollout import CompiledRollout, LoweredRollout, Sampling

# Bytes from a device's own memory that count as much as a byte from another device. A choice, not a measurement: peak
# rates differ by about 4, and small messages leave a link mostly unused.
LINK = 8
# Bytes that a device reads while others wait for the first byte of a sum: ten microseconds' worth.
START = 8 * 2**20
# Share of the free memory that arithmetic may plan with; it leaves the activations of a layer and the logits out.
PLANNED = 0.8


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a rollout samples: `prompts` of `tokens` each, in all of `parts` that are to be chosen from."""

    prompts: int
    tokens: int
    sampling: Sampling
    parts: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A way to sample: the number of parts and the mesh of sampling.

    bytes: what it takes of a device, of the `free` ones (None: not known).
    """

    parts: int
    mesh: Mesh
    bytes: int
    free: int | None

    @property
    def split(self) -> int:
        """Devices that a matrix is split over."""
        return self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]

    def __str__(self) -> str:
        among = f", matrices over {self.split} of {self.mesh.size} devices" if self.mesh.size > 1 else ""
        room = "the devices do not tell their memory"
        if self.free is not None:
            room = f"{self.bytes / 2**30:.2f} of {self.free / 2**30:.2f} GiB that are free on a device"
        return f"in {self.parts} {'part' if self.parts == 1 else 'parts'}{among}; {room}"


def fits(
    policy: Policy, params: Params, batch: Batch, dtype: str, mesh: Mesh, splits: Sequence[int], free: int | None
) -> list[Fit]:
    """The ways to sample that may fit into `free` bytes of a device, fewest parts first; at least one.

    params: (abstract) parameters in training's layout on `mesh`. splits: numbers of devices to choose from.

    Of several splits that leave room for activations, the one that a decoding step reads and sends the fewest bytes
    with is taken. The smallest split would send the least, but every device would read more of the weights, in each of
    many hundred steps. With `free` None, where nothing is known, it is fsdp x tensor: training holds that.
    """
    if free is None:
        split = splits[0] if len(splits) == 1 else mesh.shape["fsdp"] * mesh.shape["tensor"]
        target = sharding.sampling_mesh(mesh, split)
        parts = min(batch.parts)
        needs = _weights(params, dtype, mesh, target)[0] + _cache(policy, batch, mesh, parts)
        return [Fit(parts, target, needs, None)]
    choices = []
    weights = {split: _weights(params, dtype, mesh, sharding.sampling_mesh(mesh, split)) for split in splits}
    for parts in sorted(batch.parts):
        cache = _cache(policy, batch, mesh, parts)
        needs = {split: copied + cache for split, (copied, _) in weights.items()}
        roomy = [split for split in splits if needs[split] <= PLANNED * free] or [min(splits, key=needs.get)]

        def cost(split: int, parts: int = parts) -> float:
            sums, sent = _sums(policy, batch, dtype, mesh, split, parts)
            return weights[split][1] + LINK * sent + START * sums

        split = min(roomy, key=cost)
        choices.append(Fit(parts, sharding.sampling_mesh(mesh, split), needs[split], free))
    return [fit for fit in choices if fit.bytes <= free] or choices[-1:]


def compile_first(
    ways: Sequence[Fit], lower: Callable[[Fit], LoweredRollout], free: int | None
) -> tuple[Fit, CompiledRollout]:
    """The first of `ways` whose compiled programs take at most `free` bytes beside their arguments, or the last one.

    A program that the compiler refuses for its memory does not fit. All processes agree on the choice.
    """
    for fit in ways[:-1]:
        compiled = None
        try:
            compiled = lower(fit).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        is_too_large = compiled is None or (free is not None and compiled.new_bytes > free)
        if not distributed.largest(is_too_large):
            return dataclasses.replace(fit, bytes=compiled.new_bytes), compiled
    compiled = lower(ways[-1]).compile()
    return dataclasses.replace(ways[-1], bytes=compiled.new_bytes), compiled


def free_bytes(mesh: Mesh) -> int | None:
    """Bytes of a device that nothing lies in, the least of all devices of all processes; None where one can't tell."""
    free = []
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if not {"bytes_limit", "bytes_in_use"} <= stats.keys():
            free = []
            break
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    # In MiB: what processes exchange is int32.
    least = -distributed.largest(-(min(free, default=0) >> 20))
    return least << 20 if least > 0 else None


def _weights(params: Params, dtype: str, mesh: Mesh, target: Mesh) -> tuple[int, int]:
    """Bytes of a device: (new ones, that the change of layout makes; those that a decoding step reads)."""
    decoder = {"decoder": params["decoder"]}
    placed = sharding.abstract(decoder, sharding.sampling_shardings(target, decoder))
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), placed)
    relay = sharding.make_relay(mesh, params, dtype, target)
    copied = 0 if relay is None else sharding.bytes_per_device(relay.take(cast))
    # A step takes some rows of the embedding, and all of it where it is the output projection too.
    rows = {} if "head" not in params["decoder"] else cast["decoder"]["embed"]
    return copied, sharding.bytes_per_device(cast) - sharding.bytes_per_device(rows)


def _cache(policy: Policy, batch: Batch, mesh: Mesh, parts: int) -> int:
    """Bytes of a device: the keys and values of a part's prompts and of its branches.

    With `refill` all prompts are held, and those in lines twice.
    """
    sampling, prompts = batch.sampling, _rows(batch, mesh, parts)

    def tree(count: int, tokens: int):
        return jax.eval_shape(lambda: policy.empty_branch(count, 1, tokens))

    branches, held = prompts * sampling.group_size, prompts
    if sampling.refill and parts > 1:
        whole = _rows(batch, mesh, 1)
        held = whole + refill.lines_of(whole, sampling.group_size, branches)
    leaves = jax.tree.leaves((tree(held, batch.tokens), tree(branches, sampling.max_tokens)))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    tensor = mesh.shape["tensor"]
    return size if policy.decoder.kv_heads % tensor else size // tensor


def _sums(policy: Policy, batch: Batch, dtype: str, mesh: Mesh, split: int, parts: int) -> tuple[int, float]:
    """(sums over devices in a decoding step, bytes that a device sends for them).

    Two per layer and one for the logits add up what the parts of a matrix make of the rows of `split` devices. A sum of
    n bytes over k devices takes 2 (k - 1) / k n.
    """
    if split == 1:
        return 0, 0.0
    sums = 2 * policy.decoder.layers + 1
    rows = _rows(batch, mesh, parts) * batch.sampling.group_size * split // mesh.shape["tensor"]
    return sums, sums * 2 * (split - 1) / split * rows * policy.decoder.width * jnp.dtype(dtype).itemsize


def _rows(batch: Batch, mesh: Mesh, parts: int) -> int:
    """Prompts of a part on each device."""
    return batch.prompts // parts // sharding.parts_of(mesh)
