"""What `--print_sharding` prints: where each parameter lies while training and while sampling, and what that takes."""

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax.parallel import sharding
from balcap_jax.parallel.sharding import bytes_per_device
from balcap_jax.training import programs as training


def describe(config: ConfigDict, mesh: Mesh, hbm: float | None = None) -> str:
    """The table for the recipe's last stage, one parameter per line; from shapes alone, so nothing is allocated.

    hbm: bytes that programs may use on one device, for devices that are not here.

    Raises:
      UserError: the mesh does not divide a parameter, named with the axis and its size, or the batch.
    """
    programs, params = training.of_last_stage(config, mesh)
    state = programs.abstract_state(params)
    room = hbm if hbm is not None else training.room.free_bytes(mesh)
    free = None if room is None else int(room) - bytes_per_device((state, programs.reference(state)))
    target = programs.fits(state.params, free)[0].mesh
    relay = sharding.make_relay(mesh, state.params, config.model.dtype, target)
    moved = {} if relay is None else relay.take(state.params)
    sampled = {"decoder": state.params["decoder"]}
    sampled = sharding.abstract(sampled, sharding.sampling_shardings(target, sampled))
    params, sampled = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (state.params, sampled))
    trainable = programs.split(state.params)[0]

    rows = [("parameter", "shape", "type", "training", "sampling", "MiB per device")]
    for path, leaf in params.items():
        while_sampling = _axes(sampled[path]) if path in sampled else "as in training"
        size = bytes_per_device(leaf) / 2**20
        kind = leaf.dtype.name + ("" if path in trainable else ", frozen")
        shape = "x".join(map(str, leaf.shape))
        rows.append((path, shape, kind, _axes(leaf), while_sampling, f"{size:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count, trained = (sum(leaf.size for leaf in leaves.values()) for leaves in (params, trainable))
    width = jnp.dtype(config.model.dtype).itemsize
    copy = sum(bytes_per_device(sampled[path]) // sampled[path].dtype.itemsize * width for path in moved)
    relaid = programs.name == "rl" and relay is not None
    held = [("parameters", state.params), ("moments", state.opt_state), ("gradient", trainable)]
    if programs.anchored:
        held.append(("the reference", trainable))
    sizes = ", ".join(f"{name} {bytes_per_device(tree) / 2**20:,.1f} MiB" for name, tree in held)
    totals = (
        f"mesh {shape}, stage {programs.name}: {count:,} parameters, {trained:,} trained",
        f"per device: {sizes}" + (f", a copy of the decoder while sampling {copy / 2**20:,.1f} MiB" if relaid else ""),
    )
    if target is not mesh:
        shape = " x ".join(f"{axis} {size}" for axis, size in target.shape.items())
        totals = (*totals, f"sampling has a mesh of its own: {shape}")
    return "\n".join((*lines, *totals))


def _axes(leaf: jax.ShapeDtypeStruct) -> str:
    """The mesh axes of each axis of an array, such as "-, fsdp, tensor"; "whole" where it is not split."""
    sizes = leaf.sharding.mesh.shape
    named = [(axes,) if isinstance(axes, str) else axes or () for axes in leaf.sharding.spec]
    parts = ["+".join(axis for axis in axes if sizes[axis] > 1) or "-" for axes in named]
    return ", ".join(parts) if any(part != "-" for part in parts) else "whole"
