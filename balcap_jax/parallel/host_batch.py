"""The rows of a global batch that a process reads, holds and judges, and their exchange between hosts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from balcap_jax.parallel import distributed, sharding


class Rows:
    """The rows of a batch of B that lie on this process's devices.

    held: [b] indices into the batch, ascending. Where the `tensor` axis of the mesh spans processes, several of them
      hold the same rows.
    own: [o] positions in `held` of the rows that this process judges. Every row has one owner, the first process that
      holds it, which sends its scores to the others. A judge need not give the same answer twice, and copies of one
      array that differ between devices would let the parameters drift apart unseen.
    """

    def __init__(self, mesh: Mesh, size: int):
        self.size = size
        self._sharding = sharding.batch_sharding(mesh)
        processes, me = jax.process_count(), jax.process_index()
        owner, held = np.full(size, processes), np.zeros(size, bool)
        for device, (rows,) in self._sharding.devices_indices_map((size,)).items():
            owner[rows] = np.minimum(owner[rows], device.process_index)
            held[rows] |= device.process_index == me
        self.held = np.flatnonzero(held)
        self._owned = [np.flatnonzero(owner == process) for process in range(processes)]
        self._order = np.argsort(np.concatenate(self._owned))  # of gathered rows
        self.own = np.searchsorted(self.held, self._owned[me])

    def put(self, tree: Any) -> Any:
        """Host arrays [b, ...] of the held rows to global arrays [B, ...] on the mesh."""

        def place(leaf: np.ndarray) -> jax.Array:
            def rows_of_device(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(self.size)
                first = int(np.searchsorted(self.held, start))
                return leaf[first : first + stop - start]

            return jax.make_array_from_callback((self.size, *leaf.shape[1:]), self._sharding, rows_of_device)

        with jax.transfer_guard_host_to_device("allow"):  # JAX counts this as an implicit transfer.
            return jax.tree.map(place, tree)

    def fetch(self, tree: Any) -> Any:
        """Global arrays [B, ...] to host arrays [b, ...] of the held rows; nothing crosses between processes."""
        leaves, structure = jax.tree.flatten(tree)
        # One transfer for all leaves, each whole where this process has it whole.
        parts = jax.device_get([[x] if _is_whole_here(x) else self._blocks(x) for x in leaves])
        host = []
        for x, blocks in zip(leaves, parts, strict=True):
            joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
            host.append(joined[self.held] if _is_whole_here(x) and len(self.held) < self.size else joined)
        return jax.tree.unflatten(structure, host)

    def _blocks(self, x: jax.Array) -> list[jax.Array]:
        if not x.sharding.is_equivalent_to(self._sharding, x.ndim):
            x = jax.device_put(x, self._sharding)
        by_start = {shard.index[0].indices(self.size)[0]: shard.data for shard in x.addressable_shards}
        return [by_start[start] for start in sorted(by_start)]

    def gather(self, tree: Any) -> Any:
        """Host arrays [o, ...] of each process's own rows to [B, ...] in all processes, which all call this at once."""
        if len(self._owned) == 1:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        by_leaf = zip(*distributed.all_gather(leaves), strict=True)
        return jax.tree.unflatten(structure, [np.concatenate(parts)[self._order] for parts in by_leaf])

    def gather_list(self, items: Sequence[Any]) -> list[Any]:
        """The same for a list of o objects, such as records with text: all B of them in the batch's order."""
        if len(self._owned) == 1:
            return list(items)
        gathered = [item for part in distributed.all_gather(list(items)) for item in part]
        return [gathered[place] for place in self._order]


def take(columns: Mapping[str, Any], indices: np.ndarray) -> dict[str, Any]:
    """The rows `indices` of a dict of columns (arrays or lists)."""
    return {
        name: column[indices] if isinstance(column, np.ndarray) else [column[i] for i in indices]
        for name, column in columns.items()
    }


def make_reordering(mesh: Mesh) -> Any:
    """The jitted function (batch, order) -> the rows `order` [B] of a tree of [B, ...], both split as batches are.

    It consumes the batch. The blocks of rows go around the devices once, and each takes out of them what is to be its
    own: at no time does it hold more than two blocks beside its rows, where indexing would gather the whole batch.
    """
    parts = sharding.parts_of(mesh)
    around = [(i, (i - 1) % parts) for i in range(parts)]

    def of_device(batch: Any, order: jax.Array) -> Any:
        rows, me = len(order), jax.lax.axis_index(sharding.BATCH_AXES)

        def turn(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            passing, taken = carry
            row = order - (me + i) % parts * rows  # In the block that is here now.
            is_here = (row >= 0) & (row < rows)

            def take_from(block: jax.Array, old: jax.Array) -> jax.Array:
                here = is_here.reshape(-1, *[1] * (block.ndim - 1))
                return jnp.where(here, block[jnp.clip(row, 0, rows - 1)], old)

            taken = jax.tree.map(take_from, passing, taken)
            if parts > 1:
                passing = jax.tree.map(lambda x: jax.lax.ppermute(x, sharding.BATCH_AXES, around), passing)
            return passing, taken

        return jax.lax.fori_loop(0, parts, turn, (batch, batch))[1]

    rows = sharding.batch_sharding(mesh)
    split = jax.shard_map(of_device, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec, check_vma=False)
    return jax.jit(split, donate_argnums=0, out_shardings=rows)


def _is_whole_here(x: jax.Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated
