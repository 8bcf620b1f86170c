"""Checkpoints of a run (Orbax).

    DIR/<step>/arrays/     Orbax arrays: parameters, optimizer state, PRNG key data, counters
    DIR/<step>/extra/      JSON: data iterator state, clock, configuration, versions
    DIR/<step>/sums.json   sizes and checksums of these files, by which a step is whole or torn
    DIR/incomplete-<step>  a torn step that was passed over, kept until that step or a later one is whole

`checkpoint_places` has what makes a step whole, on a disk or in a bucket: neither a killed run nor a power cut leaves
half of one that is taken for whole.
"""

import base64
import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from balcap_jax.cli import json_text
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.disk_errors import reason_of
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved, sync_tree
from balcap_jax.parallel import distributed
from balcap_jax.training.checkpoint_places import directories, place_of
from balcap_jax.training.checksums import find_damage

_log = logging.getLogger(__name__)

_BYTES = "__bytes__"


class Checkpointer(contextlib.AbstractContextManager):
    """Saves and restores the state of one run under one directory; close it, or use it in a `with` block.

    Of several processes each makes one of the same directory and calls the same methods in the same order; each writes
    and reads its own part of the arrays, and the first does the rest.

    Every method raises UserError when the disk refuses (read-only, full, not a directory). An asynchronous save that
    fails is reported by the next `save`, `wait` or `close`; the checkpoints written before it stay valid.
    """

    def __init__(
        self, directory: str | os.PathLike, *, keep: int = 2, beside: Collection[Path] = (), asynchronous: bool = True
    ):
        """
        Args:
          directory: on a disk or in a bucket. Made if it is missing; leftovers of killed runs in it are cleared.
          keep: newest checkpoints that are kept; those of `keep_also` are kept besides.
          beside: files outside of `directory` that a resumed run needs as they were at a `save`; they are put on disk
            before the checkpoint counts.
          asynchronous: write in the background. `save` still copies the arrays to the host before it returns, so
            that the caller may donate or change them at once.

        Torn steps newer than the newest whole one are passed over, with a line each. Raises UserError if none is whole.
        """
        self.directory = resolved(directory).absolute()
        self._keep = keep
        self._roles: dict[str, int | None] = {}
        self._asynchronous = asynchronous
        self._place = place_of(self.directory)
        if distributed.is_first():
            self._place.prepare()
        self._verified: set[int] = set()
        self._pass_over_torn()
        self._manager = checkpoint_managers.CheckpointManager(
            self._place.for_orbax,
            options=checkpoint_managers.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                temporary_path_class=self._place.temporary_paths(beside, self._lasting),
                # Were directories made beside the run, threads would wait ten minutes for those a full disk refused.
                async_options=ocp.AsyncOptions(
                    barrier_sync_fn=self._sync_own_and_meet, create_directories_asynchronously=False
                ),
            ),
            handler_registry=ocp.handlers.create_default_handler_registry(
                arrays=ocp.handlers.PyTreeCheckpointHandler(), extra=ocp.handlers.JsonCheckpointHandler()
            ),
        )

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None or jax.process_count() == 1:
            self.close()
        # Else the other processes may be gone, and to finish a save would be to wait for them.

    def save(self, step: int, arrays: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Saves a step, unless it is on disk already.

        Args:
          step: non-negative, growing.
          arrays: pytree with jax.Array or NumPy leaves; None and empty containers are part of its structure.
          extra: nested dict of JSON values and `bytes`; what is not in `arrays` but needed to go on.
        """
        flat = _flatten(arrays)
        text = _encode(json_text.with_nulls(dict(extra or {})), "extra")
        self.wait()
        parts = {"arrays": ocp.args.PyTreeSave(unflatten_dict(flat)), "extra": ocp.args.JsonSave(text)}
        with self._writing(f"checkpoint {step}"):
            self._place.look()
            if step not in self.steps():
                # Which steps are saved is the caller's decision.
                self._manager.save(step, args=ocp.args.Composite(**parts), force=True)
        if not self._asynchronous:
            self.wait()

    def keep_also(self, role: str, step: int | None) -> None:
        """Keeps `step`, such as the end of a stage, however old; the one that had the role goes with the next save."""
        if role in self._roles:
            self.wait()  # Until the step is whole, the one before it stays.
        self._roles[role] = step

    def steps(self) -> list[int]:
        """Steps that are whole on disk, ascending; only their sizes are looked at."""
        return distributed.from_first(self._steps_seen() if distributed.is_first() else None)

    def _steps_seen(self) -> list[int]:
        try:
            return [step for step in self._place.steps() if not self._place.damage(step, content=False)]
        except OSError as error:
            raise _read_error(self.directory, error) from error

    def _latest_seen(self) -> int | None:
        """The newest whole step after a failure, unknown to the other processes; None where none is seen."""
        try:
            return max(self._steps_seen(), default=None)
        except UserError:  # A bucket that has failed may still do so.
            return None

    def latest_step(self) -> int | None:
        """The newest whole step, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int, like: Any, *, partial: bool = False) -> tuple[Any, dict[str, Any]]:
        """Reads a step.

        Args:
          step: one of `steps()`.
          like: pytree with the structure, shapes and types of what was saved: jax.ShapeDtypeStruct (with a sharding,
            or placed on the first device), jax.Array (its sharding is used) or np.ndarray leaves.
          partial: `like` may leave out saved arrays; they are not read.

        Returns:
          (arrays as `like`, extra as saved, tuples as lists).

        Raises:
          UserError: the step is torn or cannot be read, or another tree than `like` was saved (the first differing
            path is named).
        """
        self.wait()
        self._verify(step)
        path = self.directory / str(step)
        wanted = _flatten(like)
        try:
            saved = flatten_dict(self._manager.item_metadata(step)["arrays"].tree)
        except Exception as error:
            raise _read_error(path, error) from error
        _compare(path, wanted, saved, partial)
        nested = unflatten_dict({name: _placed(leaf) for name, leaf in wanted.items()})
        args = ocp.args.PyTreeRestore(
            nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested), partial_restore=partial
        )
        restored = self._read(step, arrays=args, extra=ocp.args.JsonRestore())
        arrays = flatten_dict(restored["arrays"])
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), restored["extra"]

    def extra(self, step: int) -> dict[str, Any]:
        """The JSON part of a step alone, without its arrays. Raises UserError when it cannot be read."""
        self.wait()
        self._verify(step)
        return self._read(step, extra=ocp.args.JsonRestore())["extra"]

    def _read(self, step: int, **parts: Any) -> dict[str, Any]:
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
            return {name: restored[name] for name in parts} | {"extra": _decode(restored["extra"])}
        except Exception as error:
            raise _read_error(self.directory / str(step), error) from error

    def wait(self) -> None:
        """Returns when no save is under way. Raises UserError when the last one failed."""
        with self._writing("a checkpoint"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Finishes the last save. Raises UserError when it failed."""
        with self._writing("a checkpoint"):
            self._manager.close()

    # ---- torn or whole: all processes agree

    def _pass_over_torn(self) -> None:
        """Sets what is newer than the newest whole step aside, where it is in nobody's way."""
        torn: dict[int, str] = {}
        steps = distributed.from_first(self._place.steps() if distributed.is_first() else None)
        for step in reversed(steps):
            if not (damage := self._damage(step)):
                break
            torn[step] = damage
        if steps and len(torn) == len(steps):
            reasons = "; ".join(f"{step}: {damage}" for step, damage in torn.items())
            raise UserError(
                f"none of the checkpoints in {self.directory} is whole ({reasons}); put a whole one there, or choose "
                "another workdir"
            )
        for step, damage in torn.items() if distributed.is_first() else ():
            path = self.directory / str(step)
            try:
                aside = self._place.set_aside(step)
            except OSError as error:
                raise UserError(
                    f"can't move the torn checkpoint {path} aside: {reason_of(error)}; mend that"
                ) from error
            text = "checkpoint %s is torn (%s): passed over, and kept as %s for now"
            _log.warning(text, shown(path), damage, aside)

    def _damage(self, step: int) -> str:
        """The damage that a process has found in its share of the files; "" where the step is whole.

        Raises:
          UserError: in all of them, where one of them cannot tell.
        """
        path = self.directory / str(step)
        own: str | UserError
        try:
            own = self._place.damage(step, share=(jax.process_index(), jax.process_count()))
        except (OSError, MemoryError) as error:
            own = _read_error(path, error)
        answers = distributed.all_gather(own)
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
        damage = next(filter(None, answers), "")
        if not damage:
            self._verified.add(step)
        return damage

    def _verify(self, step: int) -> None:
        if step not in self._verified and (damage := self._damage(step)):
            raise UserError(
                f"checkpoint {self.directory / str(step)} is torn ({damage}); put a whole one there, or choose another "
                "workdir"
            )

    # ---- on the threads that write

    def _sync_own_and_meet(self, *, key: str, timeout_ms: int) -> None:
        """Puts on disk what this process wrote, then waits for the others: no host can sync what another has in memory.

        Orbax meets once more when the first process, which may be renaming by now, is done.
        """
        self._place.sync_own()
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _lasting(self, whole: Sequence[int]) -> set[int | None]:
        """The steps that stay once these are whole."""
        return {*whole[-self._keep :], *self._roles.values()}

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Raises UserError in place of whatever the block raises, and says what is whole."""
        try:
            yield
        except Exception as error:
            if distributed.is_first():
                self._place.clear_unfinished()
            latest = self._latest_seen()
            go_on = "nothing was saved yet" if latest is None else f"checkpoint {latest} is whole"
            raise UserError(
                f"can't write {what} in {self.directory}: {reason_of(error)}; {go_on}, "
                "make room or choose another workdir, and run the same command again"
            ) from error


def branch(source: Path, target: Path) -> int:
    """Makes `target` a checkpoint directory that holds the newest whole step of `source` alone; returns that step.

    Raises:
      UserError: `source` holds no whole step, or the disk refuses.
    """
    try:
        step = next((step for step, path in reversed(directories(source)) if not find_damage(path)), None)
        if step is None:
            raise UserError(f"{source} holds no whole checkpoint; delete that run to have it made anew")
        shutil.copytree(source / str(step), target / str(step))
        sync_tree(target)
    except OSError as error:
        raise UserError(
            f"can't copy a checkpoint of {source} to {target}: {reason_of(error)}; make room there"
        ) from error
    return step


# ---- trees ----------------------------------------------------------------------------------------------------------
# Orbax gets nested dicts of arrays only: a path and an array always come back as they went in. What it makes of
# NamedTuples, tuples, None and empty containers depends on its version.


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """{path: leaf}; the order is that of the tree's leaves."""
    flat, stored = {}, []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"{'/'.join(name)}: a checkpoint holds arrays, got {type(leaf).__name__}")
        flat[name] = leaf
        stored.append(".".join(name))  # What Orbax calls the array on disk.
    for name, following in itertools.pairwise(sorted(stored)):
        if name == following:
            raise ValueError(f"two leaves of the tree have the path {name}")
    return flat


def _compare(path: Path, wanted: Mapping, saved: Mapping, partial: bool) -> None:
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved:
            problem = "is not in it"
        elif name not in wanted:
            if partial:
                continue
            problem = "is in it, but not in the model and optimizer to be restored"
        else:
            was, now = (f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in (saved[name], wanted[name]))
            if was == now:
                continue
            problem = f"is {was} in it, but {now} is wanted"
        raise UserError(
            f"checkpoint {path} is of another model or optimizer: {'/'.join(name)} {problem}; "
            "restore the configuration of the run, or choose another workdir"
        )


def _placed(leaf: Any) -> Any:
    """The leaf as Orbax wants it: without a sharding it would take the saved one, whose devices may not exist here."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _encode(value: Any, where: str) -> Any:
    """JSON values as they are, bytes as base64."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{where}: keys must be strings")
        return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where}: {type(value).__name__} is neither JSON nor bytes")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_BYTES}:
            return base64.b64decode(value[_BYTES])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _read_error(path: Path, error: Exception) -> UserError:
    return UserError(f"can't read {path}: {reason_of(error)}; mend that and run the same command again")
