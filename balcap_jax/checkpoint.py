"""Checkpoints of a run (Orbax) and the flag that says a run should stop.

    DIR/<step>/arrays/    Orbax arrays: parameters, optimizer state, PRNG key data, counters
    DIR/<step>/extra/     JSON: data iterator state, clock, configuration, versions
    DIR/tags.json         {tag: step} of the checkpoints that are never deleted, such as stage ends

A step is written under a temporary name and renamed when it is whole, so a killed run leaves no half-written step.
"""

import base64
import itertools
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from balcap_jax import distributed, json_text
from balcap_jax.disk_errors import drop_stragglers, quieten_orbax, reason_of, remove_unfinished
from balcap_jax.errors import UserError

_log = logging.getLogger(__name__)

_PARTS = ("_CHECKPOINT_METADATA", "arrays/_METADATA", "arrays/manifest.ocdbt", "extra/metadata")
"""Files without which a step directory is no whole checkpoint (a copy that was cut short, for example)."""

_TAGS = "tags.json"
_BYTES = "__bytes__"


class Checkpointer:
    """Saves and restores the state of one run under one directory; close it, or use it in a `with` block.

    Of several processes each makes one of the same directory and calls the same methods in the same order; each writes
    and reads its own part of the arrays, and the first does the rest.

    Every method raises UserError when the disk refuses (read-only, full, not a directory). An asynchronous save that
    fails is reported by the next `save`, `wait` or `close`; the checkpoints written before it stay valid.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2, asynchronous: bool = True):
        """
        Args:
          directory: made if it is missing; leftovers of killed runs in it are cleared.
          keep: newest checkpoints that are kept; tagged ones are kept besides.
          asynchronous: write in the background. `save` still copies the arrays to the host before it returns, so
            that the caller may donate or change them at once.
        """
        self.directory = Path(directory).expanduser().absolute()
        quieten_orbax()
        if distributed.is_first():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.directory):
                    pass  # A read-only disk is better found now than after the first fifty steps.
                self._set_incomplete_aside()
            except OSError as error:
                raise UserError(
                    f"can't write checkpoints in {self.directory}: {reason_of(error)}; choose another workdir"
                ) from error
        self._tags = distributed.from_first(self._read_tags() if distributed.is_first() else {})
        self._manager = checkpoint_managers.CheckpointManager(
            self.directory,
            options=checkpoint_managers.CheckpointManagerOptions(
                preservation_policy=_LatestAndTagged(keep, self._tags),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=asynchronous,
            ),
            handler_registry=ocp.handlers.create_default_handler_registry(
                arrays=ocp.handlers.PyTreeCheckpointHandler(), extra=ocp.handlers.JsonCheckpointHandler()
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None or jax.process_count() == 1:
            self.close()
        # Else the other processes may be gone, and to finish a save would be to wait for them.

    def save(self, step: int, arrays: Any, extra: Mapping[str, Any] | None = None, *, tag: str = "") -> None:
        """Saves a step; when the step is already on disk only the tag is added.

        Args:
          step: non-negative, growing.
          arrays: pytree with jax.Array or NumPy leaves; None and empty containers are part of its structure.
          extra: nested dict of JSON values and `bytes`; what is not in `arrays` but needed to go on.
          tag: keeps this checkpoint for good and makes it findable by `tagged_step(tag)`.
        """
        flat = _flatten(arrays)
        text = _encode(dict(extra or {}), "extra")
        self.wait()
        try:
            self._set_tag(step, tag)
            if step not in self.steps():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        arrays=ocp.args.PyTreeSave(_nest(flat)),
                        extra=ocp.args.JsonSave(text),
                    ),
                    force=True,  # Which steps are saved is the caller's decision.
                )
        except Exception as error:
            raise self._write_error(error, f"checkpoint {step}") from error

    def tag(self, step: int, tag: str) -> None:
        """Moves `tag` to `step`, one that was saved; what it kept before goes with the next save."""
        self.wait()  # Until the step is whole, the tag protects the one before it.
        try:
            self._set_tag(step, tag)
        except OSError as error:
            raise self._write_error(error, f"the tag of checkpoint {step}") from error

    def _set_tag(self, step: int, tag: str) -> None:
        if tag and self._tags.get(tag) != step:
            self._tags[tag] = step
            if distributed.is_first():
                self._write_tags()

    def steps(self) -> list[int]:
        """Steps that are whole on disk, ascending."""
        return distributed.from_first(self._steps_seen())

    def _steps_seen(self) -> list[int]:
        return sorted(step for step, path in self._step_directories() if not _missing_parts(path))

    def latest_step(self) -> int | None:
        """The newest whole step, or None."""
        return max(self.steps(), default=None)

    def tagged_step(self, tag: str) -> int | None:
        """The whole step that was saved with this tag, or None."""
        step = self._tags.get(tag)
        return step if step in self.steps() else None

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
          UserError: the step is unreadable, or another tree than `like` was saved (the first differing path is named).
        """
        self.wait()
        path = self.directory / str(step)
        wanted = _flatten(like)
        try:
            saved = _flatten_nested(self._manager.item_metadata(step)["arrays"].tree)
        except Exception as error:
            raise _read_error(path, error) from error
        _compare(path, wanted, saved, partial)
        nested = _nest({name: _placed(leaf) for name, leaf in wanted.items()})
        drop_stragglers()
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeRestore(
                        nested,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
                        partial_restore=partial,
                    ),
                    extra=ocp.args.JsonRestore(),
                ),
            )
            arrays, extra = _flatten_nested(restored["arrays"]), _decode(restored["extra"])
        except Exception as error:
            raise _read_error(path, error) from error
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), extra

    def extra(self, step: int) -> dict[str, Any]:
        """The JSON part of a step alone, without its arrays. Raises UserError when it is unreadable."""
        self.wait()
        path = self.directory / str(step)
        try:
            return _decode(self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"])
        except Exception as error:
            raise _read_error(path, error) from error

    def wait(self) -> None:
        """Returns when no save is under way. Raises UserError when the last one failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._write_error(error, "a checkpoint") from error

    def close(self) -> None:
        """Finishes the last save. Raises UserError when it failed."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._write_error(error, "a checkpoint") from error

    def _step_directories(self) -> Iterator[tuple[int, Path]]:
        if not self.directory.is_dir():
            return  # Removed under the run; the write that fails for it says so.
        for path in self.directory.iterdir():
            if path.name.isdecimal() and path.is_dir():
                yield int(path.name), path

    def _set_incomplete_aside(self) -> None:
        for step, path in list(self._step_directories()):
            missing = _missing_parts(path)
            if missing:
                aside = Path(tempfile.mkdtemp(prefix=f"incomplete-{step}-", dir=self.directory))
                path.rename(aside / path.name)
                _log.warning("%s is no whole checkpoint (%s is missing); moved to %s", path, missing[0], aside)

    def _read_tags(self) -> dict[str, int]:
        path = self.directory / _TAGS
        try:
            tags = json_text.read_object(path, "delete it, or choose another workdir")
            return {str(tag): int(step) for tag, step in tags.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"unreadable {path}: {reason_of(error)}; delete it, or choose another workdir") from error

    def _write_tags(self) -> None:
        aside = self.directory / f"{_TAGS}.tmp"
        aside.write_text(json.dumps(self._tags, sort_keys=True) + "\n")
        aside.replace(self.directory / _TAGS)

    def _write_error(self, error: Exception, what: str) -> UserError:
        drop_stragglers()
        if distributed.is_first():
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                remove_unfinished(path)  # Half a step is of no use, and may fill the disk.
        latest = max(self._steps_seen(), default=None)  # The others need not have failed.
        go_on = "nothing was saved yet" if latest is None else f"checkpoint {latest} is whole"
        return UserError(
            f"can't write {what} in {self.directory}: {reason_of(error)}; {go_on}, "
            "make room or choose another workdir, and run the same command again"
        )


def branch(source: Path, target: Path) -> int:
    """Makes `target` a checkpoint directory that holds the newest whole step of `source` alone; returns that step.

    The step stays tagged as it was, so that a run that goes on from it never deletes it.

    Raises:
      UserError: `source` holds no whole step, or the disk refuses.
    """
    steps = [int(path.name) for path in source.glob("*") if path.name.isdecimal() and not _missing_parts(path)]
    if not steps:
        raise UserError(f"{source} holds no whole checkpoint; delete that run to have it made anew")
    step = max(steps)
    try:
        tags = json_text.read_object(source / _TAGS, "delete that run to have it made anew")
        kept = {tag: tagged for tag, tagged in tags.items() if tagged == step}
        shutil.copytree(source / str(step), target / str(step))
        (target / _TAGS).write_text(json.dumps(kept, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"can't copy {source / str(step)} to {target}: {reason_of(error)}; make room there") from error
    return step


class _LatestAndTagged(checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoints and every tagged one; `tags` is the Checkpointer's own dict, which grows."""

    def __init__(self, keep: int, tags: Mapping[str, int]):
        self._keep = keep
        self._tags = tags

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        first_kept = len(checkpoints) - self._keep
        tagged = set(self._tags.values())
        return [index >= first_kept or info.step in tagged for index, info in enumerate(checkpoints)]


# ---- trees ----------------------------------------------------------------------------------------------------------
# Orbax gets nested dicts of arrays only: what it makes of NamedTuples, tuples, None and empty containers depends on
# its version, while a path and an array always come back as they went in.


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


def _nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for (*groups, last), leaf in flat.items():
        at = nested
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = leaf
    return nested


def _flatten_nested(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten_nested(value, (*prefix, key))
        else:
            flat[(*prefix, key)] = value
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


# ---- errors ---------------------------------------------------------------------------------------------------------


def _missing_parts(path: Path) -> list[str]:
    return [part for part in _PARTS if not (path / part).is_file()]


def _read_error(path: Path, error: Exception) -> UserError:
    return UserError(
        f"unreadable checkpoint {path}: {reason_of(error)}; delete this directory to go on from the checkpoint "
        "before it, or choose another workdir"
    )


# ---- preemption -----------------------------------------------------------------------------------------------------


class PreemptionFlag:
    """Notes SIGTERM and the first SIGINT, so that a run can finish its step, save and exit 0.

    Use it in a `with` block in the main thread and look at `requested`, or at the signal's `number`, after each step. A
    second SIGINT interrupts at once (KeyboardInterrupt). The handlers from before are back after the block.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.number != 0

    @property
    def signal_name(self) -> str | None:
        return signal.Signals(self.number).name if self.number else None

    def __enter__(self) -> "PreemptionFlag":
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # Ignored by the parent: a shell's background job.
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _: object) -> None:
        self.number = int(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
