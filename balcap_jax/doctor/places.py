"""Checks of disks and buckets: the workdir takes what training does to it, and there is room for what a run leaves."""

import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from balcap_jax.cli import bucket, storage
from balcap_jax.cli.bucket import BucketError, Changed
from balcap_jax.cli.bucket_lock import Lock
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import hold_lock, make_directory, rename_directory, replace_file, resolved
from balcap_jax.config.recipes import stage_order
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, fault
from balcap_jax.parallel import sharding
from balcap_jax.training import programs
from balcap_jax.training.checkpoint_places import place_of
from balcap_jax.training.evaluation import SHOWN_PIXELS
from balcap_jax.training.programs import Programs
from balcap_jax.training.workdir import claim, model_alone, refuse_another_run

WORKDIR, DISK = "workdir", "disk"
GB = 1e9
_PROBE = ".doctor"  # of a folder that is made, renamed and removed, and of an object
# Bytes, by what runs of ours have left: a line of metrics.jsonl with its TensorBoard events; a token of a caption in
# samples/ with its verdicts; a number of a picture that is kept as PNG.
_STEP_BYTES, _TOKEN_BYTES, _PIXEL_BYTES = 4000, 40, 2


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


# ---- the workdir -----------------------------------------------------------------------------------------------------


def workdir(config: ConfigDict, place: str) -> Finding:
    """Whether a run of the config may begin or go on there, and the disk does what training asks of it.

    Nothing of it stays.
    """
    if not place:
        return Finding(WORKDIR, UNCHECKED, "name it with --workdir")
    url = None
    try:
        folder = resolved(place).absolute()
        if url := storage.url_of(folder):
            return _in_bucket(config, folder, url)
        is_new = not (folder / "config.json").exists()
        with claim(folder, config):
            _refuse_model_alone(config, folder)
            _try_out(folder)
    except UserError as error:
        return fault(WORKDIR, error)
    except OSError as error:
        if url:
            found = f"no copy of what is in {url} can be kept in {bucket.copies()}: {error.strerror}"
            return Finding(WORKDIR, FAULT, found, bucket.MAKE_ROOM)
        found = f"{folder} does not take what training does to it: {error.strerror} ({error.filename})"
        return Finding(WORKDIR, FAULT, found, "choose another --workdir, on a disk with renames and locks")
    return Finding(WORKDIR, OK, f"{folder}: {_begins(is_new)}; writes, renames and locks work")


def _refuse_model_alone(config: ConfigDict, folder: Path) -> None:
    """Raises UserError where a run cannot begin beside the model that is there, and has no checkpoint to go on from."""
    model, trains = folder / "model", any(config.stages[name].steps for name in stage_order(config))
    if trains and storage.exists(model) and not place_of(folder / "checkpoints").steps():
        raise model_alone(folder, model)


def _begins(is_new: bool) -> str:
    return "a run will begin there" if is_new else "the run there goes on"


def _try_out(folder: Path) -> None:
    """Makes, writes, locks, renames and removes a folder. Raises OSError as the disk does."""
    with tempfile.TemporaryDirectory(prefix=_PROBE, dir=folder) as aside:
        made, final = Path(aside, "made"), Path(aside, "final")
        make_directory(made)
        replace_file(made / "file", b"first")
        replace_file(made / "file", b"second")  # One name takes the place of the other, as with every log.
        with (made / "file").open("rb+") as file:
            hold_lock(file, made / "file")
        rename_directory(made, final)
        if (final / "file").read_bytes() != b"second":
            raise OSError(None, "what was written is not what is read", str(final / "file"))


def _in_bucket(config: ConfigDict, folder: Path, url: str) -> Finding:
    """As `workdir`, for one in a bucket. Of the run there its config is fetched alone.

    Raises:
      UserError: it is another config's, in use, or has a model alone. BucketError. OSError: of the disk of copies.
    """
    bucket.check(url)
    own = storage.fetch(folder / "config.json")
    refuse_another_run(own, config)
    _refuse_model_alone(config, folder)
    try_objects(url)
    said: list[str] = []
    with Lock(storage.lock_of(folder), url, said.append):
        pass
    found = f"{url}: {_begins(not own.exists())}; objects are written, read and deleted, and its lock is free"
    return Finding(WORKDIR, OK, found, details=tuple(f"{WORKDIR}: {line}" for line in said))


def try_objects(url: str) -> None:
    """Writes, replaces, reads and deletes an object below a gs:// path, as runs do it.

    Raises:
      BucketError: the bucket is missing or refuses, or replaces what a precondition protects.
    """
    place = f"{url}/{_PROBE}-{os.urandom(8).hex()}"
    _written(place, b"second", _written(place, b"first", 0))
    try:
        bucket.write(place, b"third", 0)
        raise BucketError(f"{url} replaces objects against a precondition, so that no lock holds; choose another place")
    except Changed:
        pass
    finally:
        bucket.delete(place)


def _written(place: str, content: bytes, generation: int) -> int:
    """The generation of the object, whose name nobody else knows: one that has changed was written by us before."""
    with contextlib.suppress(Changed):
        generation = bucket.write(place, content, generation)
    try:
        if bucket.read(place) == content and (held := bucket.stat(place)):
            return held.generation
    except FileNotFoundError:
        pass
    raise BucketError(f"{place} is not what was written there; choose another place")


# ---- room ------------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Bytes of a run: checkpoints at their most, models that it writes, logs and samples."""

    checkpoints: int
    each: int
    models: int
    logs: int


def sizes(config: ConfigDict, file_bytes: int = 0) -> Size:
    """What a run of the config leaves in its workdir, from shapes.

    file_bytes: of the weights that it starts from, whose types a written model has; 0 = float32.

    The newest `checkpoint.keep` are kept, the ends of the stages before, the best one, and there is one more while it
    is written.

    Raises:
      UserError: the model cannot be read.
    """
    last, _ = programs.of_last_stage(config)
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])
    params = jax.eval_shape(last.policy.init, jax.random.key(0))
    plain, ends = params, []
    for name in stage_order(config):
        stage = Programs(config, name, mesh, last.policy, last.processor)
        params = jax.eval_shape(lambda params, name=name: programs.params_of(config, params, name), params)
        if config.stages[name].steps:
            ends.append(sharding.bytes_per_device(stage.abstract_checkpoint(params)))
    each = ends[-1] if ends else 0
    kept = config.checkpoint.keep + 1 + bool(config.checkpoint.best_metric)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(plain))
    models = (file_bytes or 4 * numbers) * (1 + bool(config.checkpoint.best_metric))
    return Size(sum(ends[:-1]) + kept * each, each, models, _logs(config))


def _logs(config: ConfigDict) -> int:
    order, log, rollout = stage_order(config), config.log, config.rollout
    steps = sum(config.stages[name].steps for name in order)
    rl = config.stages.rl if "rl" in order else None
    captions = 0
    if rl is not None and log.samples_every:
        captions += rl.steps // log.samples_every * rl.batch_size * rollout.group_size
    evaluations = 2 + sum(
        config.stages[name].steps // every
        for name in order
        if name in ("sft", "rl") and (every := config.stages[name].eval_every)
    )
    captions += evaluations * log.eval_images * (log.eval_samples + 1)
    pictures = log.eval_images * SHOWN_PIXELS**2 * _PIXEL_BYTES
    return steps * _STEP_BYTES + captions * rollout.max_tokens * _TOKEN_BYTES + pictures


class Part(NamedTuple):
    """Something that takes `size` more bytes at `place`, and what to do where that is too much."""

    what: str
    place: Path
    size: int
    remedy: str


def disk(config: ConfigDict, place: str, to_make: tuple[Path, int] | None = None, file_bytes: int = 0) -> Finding:
    """Whether the disks have room for the run, the judge's cache, and a data set `to_make` (where, bytes).

    What lies on one disk adds up. Of a workdir in a bucket logs and models are written here first, and checkpoints are
    not. file_bytes: as of `sizes`.
    """
    if not place:
        return Finding(DISK, UNCHECKED, "name the workdir with --workdir")
    try:
        size = sizes(config, file_bytes)
    except UserError:
        return Finding(DISK, UNCHECKED, "the checkpoint comes first")
    run = (
        f"checkpoints of {_gb(size.each)} each that come to {_gb(size.checkpoints)}, models of {_gb(size.models)}, "
        f"logs of about {_gb(size.logs)}"
    )
    try:
        folder = resolved(place).absolute()
    except UserError:
        return Finding(DISK, UNCHECKED, "the workdir comes first")
    if url := storage.url_of(folder):
        folder, one = bucket.copies(), size.models // (1 + bool(config.checkpoint.best_metric))
        here = f"copies of what goes to {url}: a model of {_gb(one)}, logs of about {_gb(size.logs)}"
        parts = [Part(here, folder, one + size.logs, bucket.MAKE_ROOM)]
    else:
        todo = "lower checkpoint.keep, make room there, or choose another --workdir"
        parts = [Part(run, folder, size.checkpoints + size.models + size.logs - _used(folder), todo)]
    if config.judge.name == "remote" and config.judge.cache_dir:
        try:
            cache = resolved(config.judge.cache_dir)
            storage.refuse(cache, "the judge's answers (judge.cache_dir)")
            with tempfile.TemporaryDirectory(prefix=_PROBE, dir=existing(cache)):
                pass
        except UserError as error:
            return fault(DISK, error)
        except OSError as error:
            found = f"the judge's answers cannot be kept in {cache} (judge.cache_dir): {error.strerror}"
            return Finding(DISK, FAULT, found, "name a folder that can be written to, or leave it empty")
        todo = "lower judge.cache_gb, or set judge.cache_dir to another disk"
        parts.append(Part("the judge's cache", cache, int(config.judge.cache_gb * GB) - _used(cache), todo))
    if to_make and storage.url_of(to_make[0]):
        parts.append(Part("a copy of the data set", bucket.copies(), to_make[1], bucket.MAKE_ROOM))
    elif to_make:
        parts.append(Part("the data set", *to_make, "set data.data_dir to a disk with room"))
    disks: dict[int, list[Part]] = defaultdict(list)
    for part in parts:
        disks[existing(part.place).stat().st_dev].append(part._replace(size=max(part.size, 0)))
    for on_disk in disks.values():
        largest, needed = max(on_disk, key=lambda part: part.size), sum(part.size for part in on_disk)
        free = shutil.disk_usage(existing(largest.place)).free
        if needed > free:
            found = f"{_gb(free, needed)} are free at {largest.place}, {_gb(needed)} are needed, most of it for "
            found += largest.what
            return Finding(DISK, FAULT, found, largest.remedy)
    free = f"{_gb(shutil.disk_usage(existing(folder)).free)} are free at {folder}"
    if url:
        return Finding(DISK, OK, f"{free} for {here}; a run leaves in its bucket {run}")
    return Finding(DISK, OK, f"{free}; a run leaves {run}")


def _used(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(os.lstat(path).st_size for path in folder.rglob("*") if not path.is_dir()) if folder.is_dir() else 0


def _gb(count: float, beside: float = 0) -> str:
    """In GB, or in MB where neither it nor what it stands beside has a hundredth of one."""
    return f"{count / GB:,.2f} GB" if max(count, beside) >= GB / 100 else f"{count / 1e6:,.2f} MB"
