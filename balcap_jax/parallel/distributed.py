"""Several processes as one program: their start, what hosts must agree on, and the end when one of them is lost.

All processes run the same command. The environment says which of them this one is:

    BALCAP_COORDINATOR=host:port BALCAP_PROCESS_COUNT=n BALCAP_PROCESS_ID=i    given by hand, i from 0 to n - 1
    BALCAP_DISTRIBUTED=1                                                      JAX finds out: TPU, Slurm, Kubernetes, MPI
    neither                                                                   one process

Only programs on the devices exchange data between processes, and all processes launch them in the same order. Host
values (sizes, signals, judged captions) go the same way, through `all_gather`.
"""

import contextlib
import functools
import itertools
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import on_abort

_EXPLICIT = ("BALCAP_COORDINATOR", "BALCAP_PROCESS_COUNT", "BALCAP_PROCESS_ID")
_DETECT = "BALCAP_DISTRIBUTED"

# The most of a gathered array that is whole on every device at a time.
_PIECE_BYTES = 256 * 2**20

# JAX takes a process that has been silent for this long for dead, and ends all others. That is within a minute, unlike
# JAX's own 100 s, and longer than a host may stand still.
HEARTBEAT_SECONDS = 30
JOIN_SECONDS = 300
# The coordinator lives in process 0: when it ends, JAX ends the others, before they have printed their reason.
_LAST_WORDS_SECONDS = 2.0
# Signs of the end of another process in the errors of collectives.
_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection reset", "Connection closed", "Socket closed", "NCCL")
_TOGETHER = (
    "start all processes at about the same time, each with its own BALCAP_PROCESS_ID and all with the same "
    "coordinator, which is process 0's host and a free port"
)
_GO_ON = "the same command, started again in all processes, goes on from the newest checkpoint"


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the processes for the block; they leave together.

    With several processes an error ends this process at once, with one line that says so. An orderly wait for the
    others would hang, since they may be in the middle of a step or gone.

    Raises:
      UserError: the environment is wrong, a process cannot be reached, or the all-reduce over all devices is wrong.
    """
    initialize()
    if not jax.distributed.is_initialized():
        yield
        return
    try:
        check_all_reduce()
        yield
        barrier()  # Process 0 writes the result while the others are done.
        jax.distributed.shutdown()
    except BaseException as error:
        _stop(error)


def initialize() -> None:
    """Starts JAX's distributed runtime if the environment asks for it; before anything else touches a device.

    Raises:
      UserError: the environment is contradictory, or the coordinator cannot be reached.
    """
    arguments = read_environment(os.environ)
    if arguments is None:
        return
    if arguments.get("process_id") == 0:
        check_port(arguments["coordinator_address"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The run's own SIGTERM handler, which agrees on the last step through `largest`, would replace JAX's.
    jax.config.update("jax_enable_preemption_service", False)
    on_abort(_line_of_abort)
    if arguments:
        print(
            f"process {arguments['process_id']} of {arguments['num_processes']} on {socket.gethostname()}: waiting for "
            f"the others at {arguments['coordinator_address']}, for up to {JOIN_SECONDS} s",
            flush=True,
        )
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
        processes = jax.process_count()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if not arguments:
            raise UserError(
                f"{_DETECT} is set, but JAX finds neither a TPU pod nor a job of Slurm, Kubernetes or MPI around this "
                f"process ({reason}); set {', '.join(_EXPLICIT)} instead"
            ) from error
        raise UserError(
            f"cannot join the other processes as process {arguments['process_id']}: {reason}; {_TOGETHER}"
        ) from error
    _joined.append(True)
    counts = [sum(device.process_index == p for device in jax.devices()) for p in range(processes)]
    if len(set(counts)) > 1:
        raise UserError(f"the processes have {counts} devices; give each of them the same number")


def read_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize, empty where JAX shall detect them; None for a single process.

    Raises:
      UserError: some of the three variables are missing, or a value makes no sense.
    """
    present = [name for name in _EXPLICIT if environment.get(name)]
    if not present:
        return {} if environment.get(_DETECT, "0") not in ("", "0") else None
    if len(present) < len(_EXPLICIT):
        missing = ", ".join(name for name in _EXPLICIT if name not in present)
        raise UserError(f"{present[0]} is set, but not {missing}; set all three of {', '.join(_EXPLICIT)}, or none")
    address, *numbers = (environment[name] for name in _EXPLICIT)
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise UserError(f"BALCAP_COORDINATOR is {address!r}; give host:port of process 0")
    for name, number in zip(_EXPLICIT[1:], numbers, strict=True):
        if not number.isdecimal():
            raise UserError(f"{name} is {number!r}; give a number")
    count, index = map(int, numbers)
    if index >= count:
        raise UserError(f"BALCAP_PROCESS_ID is {index}, but BALCAP_PROCESS_COUNT {count}; ids count from 0")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def check_port(address: str) -> None:
    """Raises UserError when the port of host:port is taken on this host: JAX would end in a segmentation fault."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"BALCAP_COORDINATOR is {address}, but port {port} cannot be used on {socket.gethostname()} ({reason}); "
            "give all processes another one, or, if it is this run's process 0 that has it, each its own "
            "BALCAP_PROCESS_ID"
        ) from error


def check_all_reduce() -> None:
    """Adds up one number per device over all of them and prints this process's start-up line.

    Raises:
      UserError: the sum is wrong, so some devices do not take part.
    """
    devices = np.array(jax.devices())
    split = NamedSharding(Mesh(devices, ("devices",)), PartitionSpec("devices"))
    numbers = np.arange(1, devices.size + 1, dtype=np.int32)
    placed = jax.make_array_from_callback(numbers.shape, split, lambda index: numbers[index])
    everywhere = NamedSharding(split.mesh, PartitionSpec())
    start = time.perf_counter()
    total = int(jax.jit(jnp.sum, out_shardings=everywhere)(placed))
    elapsed = time.perf_counter() - start
    if total != numbers.sum():
        raise UserError(
            f"the all-reduce over {devices.size} devices gave {total}, not {numbers.sum()}; check the interconnect"
        )
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    print(
        f"{_name()} on {socket.gethostname()}: {jax.local_device_count()} local of {devices.size} devices, {kinds}; "
        f"all-reduce {elapsed:.2f} s",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------- agreement


def is_first() -> bool:
    """Whether this is process 0, which alone writes files and prints."""
    return jax.process_index() == 0


def _is_alone() -> bool:
    """Whether there is no other process, or none any more: those of a `session` part at its end."""
    return jax.process_count() == 1 or not jax.distributed.is_initialized()


def all_gather(value: Any) -> list[Any]:
    """The `value` of each process, by process, in all of them; anything that pickles. All must call it at once."""
    if _is_alone():
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = _gather_array(np.array([content.size], np.int32))[:, 0]
    # Powers of two: each other length would be one more program to compile.
    room = max(256, 1 << int(sizes.max() - 1).bit_length())
    padded = np.zeros(room, np.uint8)
    padded[: content.size] = content
    gathered = _gather_array(padded)
    return [pickle.loads(part[:size].tobytes()) for part, size in zip(gathered, sizes, strict=True)]


def from_first(value: Any) -> Any:
    """Process 0's `value` in all processes: what a disk holds must not depend on the reader and the time."""
    return all_gather(value if is_first() else None)[0]


def largest(number: int) -> int:
    """The largest `number` of all processes."""
    if _is_alone():
        return int(number)
    return int(_gather_array(np.array([number], np.int32)).max())


def barrier() -> None:
    """Returns when all processes have called it."""
    largest(0)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """A block that process 0 leaves before the others enter: it makes what they find."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def check_same(what: str, value: Any) -> None:
    """Raises UserError when `value` differs between processes."""
    for process, other in enumerate(all_gather(value)):
        if other != value:
            where = _example(value, other)
            raise UserError(f"this one and process {process} differ in {what}{where}; start all of them alike")


def _example(value: Any, other: Any) -> str:
    """The first difference of two values; texts have one line per field."""
    if not (isinstance(value, str) and isinstance(other, str)):
        return f" ({value} and {other})"
    lines, others = value.splitlines(), other.splitlines()
    pairs = [(a, b) for a, b in itertools.zip_longest(lines, others, fillvalue="nothing") if a != b]
    return f" ({pairs[0][0].strip()} here, {pairs[0][1].strip()} there)" if pairs else ""


def _gather_array(x: np.ndarray) -> np.ndarray:
    """Arrays [...] of one shape and type to [processes, ...], bit for bit.

    `multihost_utils.process_allgather` fetches the result by an implicit transfer, which the training loop forbids.
    """
    processes = jax.process_count()
    by_process = [[d for d in jax.devices() if d.process_index == p] for p in range(processes)]
    mesh = Mesh(np.array(by_process), ("process", "local"))
    copies = [jax.device_put(x[None], device) for device in by_process[jax.process_index()]]
    split = NamedSharding(mesh, PartitionSpec("process"))
    by_row = jax.make_array_from_single_device_arrays((processes, *x.shape), split, copies)
    gathered = jax.jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))(by_row)
    return jax.device_get(gathered.addressable_data(0))


def _identity(x: jax.Array) -> jax.Array:
    return x


# ------------------------------------------------------------------------------------------------- whole arrays


class _Whole:
    """An array of several processes, or row `row` of it, that process 0 gathers, with all of them, when NumPy asks."""

    def __init__(self, path: str, array: jax.Array, row: int | None = None):
        self._path, self._array, self._row = path, array, row
        self.shape, self.dtype = array.shape if row is None else array.shape[1:], array.dtype

    def __getitem__(self, row: int) -> "_Whole":
        return _Whole(self._path, self._array, row)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # It is a copy.
        from_first((self._path, self._row))
        parts = [jax.device_get(piece) for piece in _pieces(self._array, self._row)]
        whole = parts[0] if self._row is not None else np.concatenate(parts)
        return whole.astype(dtype or self.dtype, copy=False)


def write_whole(tree: Mapping[str, Any], write: Callable[[Mapping[str, Any]], Any]) -> None:
    """Calls `write(tree)` in process 0, with leaves that NumPy can read although no process holds them whole.

    The processes gather each leaf when NumPy reads it, and of `leaf[row]` that row alone.
    """
    if jax.process_count() == 1:
        write(tree)
        return
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    if is_first():
        lazy = {path: _Whole(path, leaf) for path, leaf in flat.items()}
        write(flax.traverse_util.unflatten_dict(lazy, sep="/"))
        from_first(None)
    else:
        while (wanted := from_first(None)) is not None:
            path, row = wanted
            for piece in _pieces(flat[path], row):
                piece.block_until_ready()


def _pieces(x: jax.Array, row: int | None = None) -> Iterator[jax.Array]:
    """A global array in parts along its first axis, or one row of it; each is whole on every device for a while."""
    if row is not None:
        yield _row_of(x.sharding.mesh)(x, np.int32(row))
        return
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    gather = jax.jit(lambda x, start, stop: x[start:stop], static_argnums=(1, 2), out_shardings=everywhere)
    rows = x.shape[0] if x.ndim else 1
    # A gather takes an axis that is split over devices as a whole anyway.
    split = bool(x.sharding.spec) and x.sharding.spec[0] is not None
    step = rows if split else max(1, rows * _PIECE_BYTES // max(x.nbytes, 1))
    for start in range(0, rows, step):
        yield gather(x, start, min(start + step, rows))


@functools.cache
def _row_of(mesh: Mesh) -> Callable[[jax.Array, np.int32], jax.Array]:
    """The program that gives one row of an array, whole on every device; which row is no part of the program."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x, row: jax.lax.dynamic_index_in_dim(x, row, keepdims=False), out_shardings=whole)


# ------------------------------------------------------------------------------------------------- the end


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _stop(error: BaseException) -> None:
    """Ends this process with one line. An orderly end would wait for processes that may be gone."""
    text = " ".join(str(error).split())
    status = 1
    if isinstance(error, UserError):
        message, status = f"{_name()}: {error}", 2
    elif isinstance(error, SystemExit):
        message, status = f"{_name()} ends", error.code if isinstance(error.code, int) else 1
    elif isinstance(error, KeyboardInterrupt):
        message, status = f"{_name()} was interrupted", 130
    elif any(sign in text for sign in _LOST):
        message = f"{_name()} stops, because another process has ended or cannot be reached ({text[:200]}); {_GO_ON}"
    else:
        traceback.print_exception(error)
        message = f"{_name()} stops, because of the error above"
    print(f"error: {shown(message)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if is_first():
        time.sleep(_LAST_WORDS_SECONDS)
    os._exit(status)


def _line_of_abort() -> str:
    """The line after JAX's own end of a process whose peer is dead: a log of many lines and abort().

    JAX's runtime client takes a callback for lost heartbeats instead, but its call fails: std::bad_cast, jax 0.10.2.
    """
    if _joined:
        return f"error: this process stops, because another one has ended or cannot be reached (see above); {_GO_ON}\n"
    return f"error: the processes have not found each other within {JOIN_SECONDS} s (see above); {_TOGETHER}\n"


_joined: list[bool] = []
