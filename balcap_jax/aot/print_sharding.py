"""What `--print_sharding` prints: where each parameter lies while training and while sampling, and what that takes."""

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax import train_step
from balcap_jax.aot import memory
from balcap_jax.parallel import sharding
from balcap_jax.training.job import freeze_of, make_optimizer, params_of, state_shardings


def describe(config: ConfigDict, mesh: Mesh) -> str:
    """The table for the recipe's last stage, one parameter per line; from shapes alone, so nothing is allocated.

    Raises:
      UserError: the mesh does not divide a parameter, named with the axis and its size, or the batch.
    """
    stage = memory.stages_of(config)[-1]
    sharding.check_batch(mesh, stage, config.stages[stage].batch_size, config.stages[stage].micro_batches)
    policy, _ = memory.build_policy(config)
    state = jax.eval_shape(
        lambda key: train_step.init_state(
            params_of(config, policy.init(key), stage),
            make_optimizer(config, stage),
            freeze_of(config, stage),
        ),
        jax.random.key(0),
    )
    state = sharding.abstract(state, state_shardings(mesh, state))
    sampled = {"decoder": state.params["decoder"]}
    sampled = sharding.abstract(sampled, sharding.sampling_shardings(mesh, sampled))
    params, sampled = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (state.params, sampled))
    trainable = train_step.split(state.params, freeze_of(config, stage))[0]

    rows = [("parameter", "shape", "type", "training", "sampling", "MiB per device")]
    for path, leaf in params.items():
        while_sampling = _axes(sampled[path]) if path in sampled else "as in training"
        size = memory.bytes_per_device(leaf) / 2**20
        kind = leaf.dtype.name + ("" if path in trainable else ", frozen")
        shape = "x".join(map(str, leaf.shape))
        rows.append((path, shape, kind, _axes(leaf), while_sampling, f"{size:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    whole = sum(leaf.size for leaf in params.values())
    width = jnp.dtype(config.model.dtype).itemsize
    copy = sum(memory.bytes_per_device(leaf) // leaf.dtype.itemsize * width for leaf in sampled.values())
    relaid = stage == "rl" and sharding.make_relay(mesh, state.params, config.model.dtype) is not None
    held = [("parameters", state.params), ("moments", state.opt_state), ("gradient", trainable)]
    if stage == "rl" and config.loss.kl_coef:
        held.append(("the reference", trainable))
    sizes = ", ".join(f"{name} {memory.bytes_per_device(tree) / 2**20:,.1f} MiB" for name, tree in held)
    totals = (
        f"mesh {shape}, stage {stage}: {whole:,} parameters, {sum(leaf.size for leaf in trainable.values()):,} trained",
        f"per device: {sizes}" + (f", a copy of the decoder while sampling {copy / 2**20:,.1f} MiB" if relaid else ""),
    )
    return "\n".join((*lines, *totals))


def _axes(leaf: jax.ShapeDtypeStruct) -> str:
    """The mesh axes of each axis of an array, such as "-, fsdp, tensor"; "whole" where it is not split."""
    sizes = leaf.sharding.mesh.shape
    named = [(axes,) if isinstance(axes, str) else axes or () for axes in leaf.sharding.spec]
    parts = ["+".join(axis for axis in axes if sizes[axis] > 1) or "-" for axes in named]
    return ", ".join(parts) if any(part != "-" for part in parts) else "whole"
