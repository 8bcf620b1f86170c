"""Where arrays live: the device mesh, and one table from parameter paths over logical axes to mesh axes."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balcap_jax.errors import UserError

# `replica` crosses slices, `data` is plain data parallelism, `fsdp` also splits parameters, `tensor` splits features.
AXES = ("replica", "data", "fsdp", "tensor")
BATCH_AXES = ("replica", "data", "fsdp")

# Logical axis -> mesh axis while training.
MESH_AXIS = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

# (parameter path, logical axes); every parameter matches exactly one row (tested).
# A leading None of stacked layers is the layer axis: it is scanned over, so it is never split.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"^decoder/embed$", ("vocab", "embed")),
    (r"^decoder/head$", ("embed", "vocab")),
    (r"layers/[qkv]/kernel$", (None, "embed", "heads", None)),
    (r"layers/[qkv]/bias$", (None, "heads", None)),
    (r"layers/o/kernel$", (None, "heads", None, "embed")),
    (r"layers/(gate|up)/kernel$", (None, "embed", "mlp")),
    (r"layers/up/bias$", (None, "mlp")),
    (r"layers/down/kernel$", (None, "mlp", "embed")),
    (r"^vision/patches/patch/kernel$", (None, "embed")),
    (r"^projector/(first|second)/kernel$", (None, "embed")),
    # Norms, remaining biases, positions and the class token: too small to be worth a gather.
    (r"norm/(scale|bias)$|/(o|down|first|second)/bias$|^vision/patches/(class_token|positions)$", ()),
)


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """The mesh of axes AXES over all devices; one size may be -1 and takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    wanted = {axis: int(sizes[axis]) for axis in AXES}
    open_axes = [axis for axis, size in wanted.items() if size == -1]
    fixed = math.prod(size for size in wanted.values() if size != -1)
    if len(open_axes) > 1:
        raise UserError(f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1; only one size may be left open")
    if open_axes and len(devices) % fixed == 0:
        wanted[open_axes[0]] = len(devices) // fixed
    if math.prod(wanted.values()) != len(devices):
        shown = " x ".join(f"{axis} {size}" for axis, size in wanted.items())
        raise UserError(f"the mesh ({shown}) does not fit {len(devices)} devices; change the mesh.* sizes")
    return Mesh(np.array(devices).reshape(tuple(wanted.values())), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis B over every data axis; the G samples of a prompt stay together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises UserError when B prompts do not divide over the mesh's data axes."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise UserError(
            f"{field} is {batch_size}, which does not divide over {parts} devices (mesh {' x '.join(BATCH_AXES)})"
        )


def logical_axes(path: str) -> tuple[str | None, ...]:
    """The table's row for a parameter path such as "decoder/layers/q/kernel". Raises KeyError if it is not one row."""
    rows = [axes for pattern, axes in PARAMETER_AXES if re.search(pattern, path)]
    if len(rows) != 1:
        raise KeyError(f"{len(rows)} rows of sharding.PARAMETER_AXES match parameter {path!r}, it must be one")
    return rows[0]


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings for a pytree that holds parameters (or optimiser moments) under their paths; scalars are replicated.

    Raises:
      UserError: a split axis does not divide its parameter's size.
    """

    def one(path, leaf) -> NamedSharding:
        name = "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)
        if not leaf.shape:
            return replicated(mesh)
        spec = [MESH_AXIS.get(axis) for axis in logical_axes(name)]
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide an axis of size {size} of parameter {name} "
                    f"{tuple(leaf.shape)}; choose another mesh.{axis}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, tree)
