"""Where arrays live: the device mesh, and tables from parameter paths over logical axes to mesh axes.

Flax's logical axis rules (`with_logical_constraint`) cannot do this: an axis that does not divide must stay whole here,
and there are two layouts.

Training splits parameters over `fsdp` and gathers them layer by layer. In sampling each device keeps its part of every
matrix, and the few tokens of a decoding step move instead: the decoding loop gathers no weight. `make_relay` goes from
the one layout to the other, once per rollout. The fewer devices a matrix is split over, the less moves, so sampling may
have a mesh of its own: `sampling_mesh`.
"""

import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balcap_jax.cli.errors import UserError

# `replica` crosses slices, `data` is plain data parallelism, `fsdp` also splits parameters, `tensor` splits features.
AXES = ("replica", "data", "fsdp", "tensor")
BATCH_AXES = ("replica", "data", "fsdp")

Table = Mapping[str, tuple[str, ...]]

# Logical axis -> mesh axes. `rows` is the batch axis of activations that meet a weight, `batch` that of those that meet
# each other (attention, sampling). A logical axis without an entry is not split. In training the output
# projection is the one weight that stays, and the hidden states move: at 152,000 words it is nine times their size.
TRAINING: Table = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "rows": BATCH_AXES,
    "batch": BATCH_AXES,
    "output_vocab": ("fsdp", "tensor"),
    "output_rows": ("replica", "data"),
}
SAMPLING: Table = {
    "heads": ("tensor",),
    "head_size": ("fsdp",),
    "mlp": ("fsdp", "tensor"),
    "vocab": ("fsdp", "tensor"),
    "rows": ("replica", "data"),
    "batch": BATCH_AXES,
}

# (parameter path, logical axes); every parameter matches exactly one row (tested).
# The leading None of stacked layers is the layer axis, which the scan runs over: it is never split.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"^decoder/embed$", ("vocab", "embed")),
    (r"^decoder/head$", ("embed", "vocab")),
    (r"layers/[qkv]/kernel$", (None, "embed", "heads", "head_size")),
    (r"layers/[qkv]/bias$", (None, "heads", "head_size")),
    (r"layers/o/kernel$", (None, "heads", "head_size", "embed")),
    (r"layers/(gate|up)/kernel$", (None, "embed", "mlp")),
    (r"layers/(gate|up)/bias$", (None, "mlp")),
    (r"layers/down/kernel$", (None, "mlp", "embed")),
    # Adapters (`lora`): split as the kernel's axis that they share, but never along their rank.
    (r"layers/([qkv]|gate|up)/lora_a$", (None, "embed", None)),
    (r"layers/o/lora_a$", (None, "heads", None)),
    (r"layers/down/lora_a$", (None, "mlp", None)),
    (r"layers/[qkv]/lora_b$", (None, None, "heads")),
    (r"layers/(gate|up)/lora_b$", (None, None, "mlp")),
    (r"layers/(o|down)/lora_b$", (None, None, "embed")),
    (r"^(projector|merger|deepstack/layers)/(first|second)/lora_[ab]$", ()),
    (r"^vision/patches/patch/kernel$", (None, "embed")),
    (r"^vision/patch/kernel$", (None, None, "embed")),
    (r"^(projector|merger)/(first|second)/kernel$", (None, "embed")),
    (r"^deepstack/layers/(first|second)/kernel$", (None, None, "embed")),
    # Norms, remaining biases, positions and the class token: too small to be worth a gather.
    (r"norm/(scale|bias)$|/(o|down|first|second|patch)/bias$|^vision/(patches/(class_token|positions)|positions)$", ()),
)


def check_jaxlib(devices: Sequence[jax.Device]) -> None:
    """Refuses CPU devices under a jaxlib that computes wrongly there.

    On several threads XLA:CPU may add parts of a broadcast operand twice (github.com/jax-ml/jax/issues/39741,
    github.com/tensorflow/tensorflow/issues/126812). The norm of a gradient is such a sum, so clipping goes wrong by
    chance. 0.10.1 and 0.12.0 are right (tests/parallel/test_sums.py). setup.py excludes the same versions.

    Raises:
      UserError: the installed jaxlib is one of them.
    """
    if devices[0].platform == "cpu" and jaxlib.__version__.startswith(("0.10.2", "0.11.")):
        raise UserError(
            f"jaxlib {jaxlib.__version__} gets sums wrong on CPUs, by chance; install another: "
            "pip install 'jax>=0.10.1,!=0.10.2,!=0.11.*,<0.13'"
        )


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """The mesh of axes AXES over all devices; one size may be -1 and takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the installed jaxlib is wrong on them.
    """
    devices = jax.devices() if devices is None else devices
    check_jaxlib(devices)
    shape = {axis: int(sizes[axis]) for axis in AXES}
    open_axes = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(open_axes) > 1:
        raise UserError(f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1; only one size may be left open")
    if open_axes and len(devices) % fixed == 0:
        shape[open_axes[0]] = len(devices) // fixed
    if math.prod(shape.values()) != len(devices):
        text = " x ".join(f"{axis} {size}" for axis, size in shape.items())
        raise UserError(f"the mesh ({text}) does not fit {len(devices)} devices; change the mesh.* sizes")
    return Mesh(np.array(devices).reshape(tuple(shape.values())), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis B over every data axis; the G samples of a prompt stay together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, stage: str, batch_size: int, micro_batches: int = 1) -> None:
    """Raises UserError when the B prompts of a stage, or those of a micro-batch, do not divide over the data axes.

    A micro-batch of fewer prompts than devices would run, but every device would compute what others compute too.
    """
    parts = parts_of(mesh)
    over = f"does not divide over {parts} devices (mesh {' x '.join(BATCH_AXES)})"
    if batch_size % parts:
        raise UserError(f"stages.{stage}.batch_size is {batch_size}, which {over}")
    if (batch_size // micro_batches) % parts:
        most = next(count for count in range(micro_batches, 0, -1) if not batch_size % (count * parts))
        raise UserError(
            f"stages.{stage}.micro_batches is {micro_batches}: a part of {batch_size // micro_batches} prompts {over}; "
            f"set it to {most} or less, or raise mesh.tensor or the batch size"
        )


def check_parts(mesh: Mesh, batch_size: int, parts: int) -> None:
    """Raises UserError when the prompts that are sampled at a time do not divide over the data axes."""
    possible = possible_parts(mesh, batch_size)
    if parts not in possible:
        raise UserError(
            f"rollout.parts is {parts}: {batch_size} prompts over {parts_of(mesh)} devices "
            f"(mesh {' x '.join(BATCH_AXES)}) can be sampled in {_listed(possible)} parts of one size; "
            "set it to one of these, or to auto"
        )


def possible_parts(mesh: Mesh, batch_size: int) -> list[int]:
    """The numbers of equal parts of a batch in which every device has rows of each."""
    most = batch_size // parts_of(mesh)
    return [parts for parts in range(1, most + 1) if most % parts == 0]


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

    def place(path, leaf) -> NamedSharding:
        name = _name(path)
        if not leaf.shape:
            return replicated(mesh)
        spec = _spec(TRAINING, logical_axes(name))
        for size, axes in zip(leaf.shape, spec, strict=False):
            if size % _parts(mesh, axes):
                axis = max(axes, key=lambda axis: mesh.shape[axis])
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide an axis of size {size} of parameter {name} "
                    f"{tuple(leaf.shape)}; choose another mesh.{axis}"
                )
        return _sharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


# ------------------------------------------------------------------------------------------------- sampling


def possible_splits(mesh: Mesh) -> list[int]:
    """Over how many devices a matrix can be split while sampling: `tensor` times a part of `data` x `fsdp`."""
    others = mesh.shape["data"] * mesh.shape["fsdp"]
    return [mesh.shape["tensor"] * size for size in range(1, others + 1) if others % size == 0]


def check_split(mesh: Mesh, split: int) -> None:
    """Raises UserError where matrices cannot be split over `split` devices of the mesh while sampling."""
    if split not in (possible := possible_splits(mesh)):
        shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"mesh.sampling is {split}, but on the mesh {shape} a matrix can be split over {_listed(possible)} devices "
            "while sampling; set it to one of these, or to auto"
        )


def sampling_mesh(mesh: Mesh, split: int) -> Mesh:
    """The same devices in the same order, with `fsdp` x `tensor` = `split`: what is left of `fsdp` goes to `data`.

    A batch lies on both meshes alike.

    Raises:
      UserError: the mesh has no such split.
    """
    check_split(mesh, split)
    fsdp = split // mesh.shape["tensor"]
    if fsdp == mesh.shape["fsdp"]:
        return mesh
    return Mesh(mesh.devices.reshape(mesh.shape["replica"], -1, fsdp, mesh.shape["tensor"]), AXES)


def sampling_shardings(mesh: Mesh, decoder: Any) -> Any:
    """Shardings of {"decoder": parameters} while sampling; an axis that does not divide is whole on every device."""

    def place(path, leaf) -> NamedSharding:
        spec = _spec(SAMPLING, logical_axes(_name(path)))
        return _sharding(mesh, _dividing(mesh, leaf.shape, spec))

    return jax.tree_util.tree_map_with_path(place, decoder)


class Relay:
    """Brings a policy's decoder from training's layout to that of sampling, in the compute type; see `make_relay`.

    `targets` are the places of the parameters that have to be moved or cast for it. All others stay the arrays that
    they are.
    """

    def __init__(self, targets: Mapping[str, NamedSharding], dtype: str):
        self.targets = targets
        self._jit = jax.jit(
            lambda leaves: {path: leaf.astype(dtype) for path, leaf in leaves.items()}, out_shardings=dict(targets)
        )

    def take(self, params: Any) -> dict[str, Any]:
        """{path: array} of what has to be moved or cast: the argument of the compiled move."""
        return {path: leaf for path, leaf in _by_path({"decoder": params["decoder"]}) if path in self.targets}

    def lower(self, params: Any) -> jax.stages.Lowered:
        """The move of {path: array}, traced for (abstract) parameters like these."""
        return self._jit.lower(self.take(params))

    def join(self, params: Any, moved: Mapping[str, Any]) -> Any:
        """`params` with {path: array} `moved` in place of those that they were made from."""
        decoder = {"decoder": params["decoder"]}
        return {**params, **jax.tree_util.tree_map_with_path(lambda path, x: moved.get(_name(path), x), decoder)}

    def __call__(self, params: Any) -> Any:
        return self.join(params, self._jit(self.take(params)))


def make_relay(mesh: Mesh, params: Any, dtype: str, target: Mesh | None = None) -> Relay | None:
    """The change from training's layout of `params` on `mesh` to sampling's on `target`, `mesh` itself unless given.

    None where nothing has to be moved or cast. The decoder casts its weights to the compute type anyway, so the cast
    does not change samples. The vision side runs once per picture and keeps the layout of training.
    """
    decoder = {"decoder": params["decoder"]}
    trees = (decoder, tree_shardings(mesh, decoder), sampling_shardings(target or mesh, decoder))
    targets = {
        path: new
        for (path, leaf), (_, old), (_, new) in zip(*map(_by_path, trees), strict=True)
        if leaf.dtype != jnp.dtype(dtype) or not old.is_equivalent_to(new, leaf.ndim)
    }
    return Relay(targets, dtype) if targets else None


def abstract(tree: Any, shardings: Any) -> Any:
    """`tree` without its numbers, placed by `shardings`."""

    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """Bytes of an (abstract) tree on each device, by its shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------------- activations

_layout: contextvars.ContextVar[tuple[Mesh, Table] | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def layout(mesh: Mesh | None, table: Table) -> Iterator[None]:
    """Programs traced in this block are for `mesh`, and `constrain` splits their activations by `table`."""
    token = _layout.set(None if mesh is None else (mesh, table))
    try:
        yield
    finally:
        _layout.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with its leading axes split by the logical names `axes`, where a layout is set; axes not named are whole.

    Left alone, the partitioner may gather activations where weights should move, or the reverse.
    """
    if (current := _several()) is None:
        return x
    mesh, table = current
    spec = _dividing(mesh, x.shape, _spec(table, axes))
    return jax.lax.with_sharding_constraint(x, _sharding(mesh, spec))


def shard_mapped(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[tuple[str | None, ...]]
) -> Callable[..., jax.Array]:
    """`function` of `arrays`, run on each device for its part of them, for what the partitioner can't split.

    axes: for each array the logical names of its leading axes; the result is split as the first array is. A name whose
    mesh axes do not divide all arrays that have it is whole everywhere: parts that belong together must meet.
    """
    if (current := _several()) is None:
        return function
    mesh, table = current
    unsplit = {
        name
        for array, names in zip(arrays, axes, strict=True)
        for size, name in zip(array.shape, names, strict=False)
        if name and size % _parts(mesh, table.get(name, ()))
    }
    axes = [tuple(None if name in unsplit else name for name in names) for names in axes]
    specs = [_sharding(mesh, _spec(table, names)).spec for names in axes]
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)


def platform() -> str:
    """The platform of the program under trace: "cpu", "gpu" or "tpu", which need not be this machine's."""
    return current[0].devices.flat[0].platform if (current := _layout.get()) else jax.default_backend()


def batch_parts(batch: int = 0) -> int:
    """The number of parts that a batch is in: 1 where no layout is set, or it does not divide the `batch` rows."""
    parts = parts_of(current[0]) if (current := _layout.get()) else 1
    return parts if batch % parts == 0 else 1


def parts_of(mesh: Mesh) -> int:
    """The number of parts that a batch on `mesh` is in."""
    return _parts(mesh, BATCH_AXES)


def in_parts(function: Callable[..., Any], arrays: Any, parts: int) -> Any:
    """`function` of `arrays`, a tuple of trees with a leading axis B, computed for B / parts rows at a time.

    It is traced once. A part has every parts-th row: B is split over the devices, and each of them has its share of
    every part, so that nothing moves between them. The rows of the results are in the order of the rows of `arrays`.
    """
    return function(*arrays) if parts == 1 else join_parts(stacked_parts(function, arrays, parts))


def stacked_parts(function: Callable[..., Any], arrays: Any, parts: int) -> Any:
    """The results of `function` for each part, see `in_parts`, on a new leading axis."""
    # Rows are counted, and not left to -1: text alone has images [B, 0].
    arrays = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), arrays)

    def part(index: jax.Array) -> Any:
        def rows(x: jax.Array) -> jax.Array:
            return constrain(jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), "batch")

        return function(*jax.tree.map(rows, arrays))

    return jax.lax.map(part, jnp.arange(parts))


def join_parts(stacked: Any) -> Any:
    """`stacked_parts` whose leaves have a leading axis B / parts, in the order of the rows that they came from."""

    def join(x: jax.Array) -> jax.Array:
        return constrain(x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), "batch")

    return jax.tree.map(join, stacked)


def constrain_tree(tree: Any) -> Any:
    """A tree with parameters' paths (a gradient), split as the parameters are in training, where a layout is set."""
    if (current := _several()) is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, tree_shardings(current[0], tree))


def _several() -> tuple[Mesh, Table] | None:
    """The layout, where there is one of more than one device."""
    current = _layout.get()
    return current if current and current[0].size > 1 else None


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the (abstract) arrays of `tree` lie on, None where they do not lie on one."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(getattr(leaf, "sharding", None), NamedSharding) and isinstance(leaf.sharding.mesh, Mesh):
            return leaf.sharding.mesh
    return None


# ------------------------------------------------------------------------------------------------- small parts


_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _spec(table: Table, axes: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    return [table.get(axis, ()) if axis else () for axis in axes]


def _parts(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _dividing(mesh: Mesh, shape: tuple[int, ...], spec: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """`spec` without the mesh axes that do not divide their side of an array."""
    return [axes if size % _parts(mesh, axes) == 0 else () for size, axes in zip(shape, spec, strict=False)]


def _sharding(mesh: Mesh, spec: list[tuple[str, ...]]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in spec)))
