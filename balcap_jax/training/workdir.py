"""The directory of a run: whose it is, and the small files in it that are not metrics, checkpoints or models."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.cli import bucket_lock, json_text, storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import (
    hold_lock,
    make_directory,
    read_bytes,
    read_json_object,
    read_jsonl,
    resolved,
    write_text,
)
from balcap_jax.config import recipes as configuration
from balcap_jax.data.input import LeftOut, damaged
from balcap_jax.parallel import distributed
from balcap_jax.training.evaluation import KINDS
from balcap_jax.training.logging import writing_below
from balcap_jax.training.weights_and_biases import RUN_ID

# What a run writes.
FILES = ("config.json", "summary.json", "metrics.jsonl", "report.html", "judge.json", RUN_ID)
DIRECTORIES = ("best", "checkpoints", "model", "profile", "samples", "tensorboard")
# In a bucket: what is read and written there, and no part of the copy on this machine.
UNKEPT = ("best", "checkpoints", "model")

# Disks that several hosts share show a new file elsewhere after some seconds.
_SHARED_SECONDS = 30


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Holds the workdir. It refuses that of another config's run, and one that another process is training in.

    Of the processes of one run the first holds it, and the others check that they see the same directory. One in a
    bucket is fetched, but for what is read from there (`storage.kept`), and its logs are sent from time to time.

    Raises:
      UserError: the workdir is another run's, cannot be written, or is not shared by all processes.
    """
    if not distributed.is_first():
        _see_claim(workdir)
        yield
        return
    if storage.url_of(workdir):
        with storage.kept(workdir, but=UNKEPT) as kept:
            refuse_another_run(workdir / "config.json", config)
            distributed.from_first(kept.lock.token)
            yield
        return
    try:
        str(workdir).encode()
    except UnicodeEncodeError as error:  # Orbax would say so at the first checkpoint.
        raise UserError(f"workdir {workdir} is not UTF-8 text; choose another --workdir") from error
    missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
    lock = _hold(workdir)
    try:
        for name in (*FILES, *DIRECTORIES):
            path = workdir / name
            if path.exists() and not (path.is_dir() if name in DIRECTORIES else path.is_file()):
                kind = "directory" if name in DIRECTORIES else "regular file"
                raise UserError(f"{path} is no {kind}; move it away, or choose another --workdir")
            if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
                raise UserError(f"cannot write to {path}; let it be written to, or choose another --workdir")
        refuse_another_run(workdir / "config.json", config)
        token = os.urandom(8).hex()
        with writing_below(workdir / ".lock"):
            os.pwrite(lock, token.encode(), 0)
            os.fsync(lock)
        distributed.from_first(token)
        yield
    finally:
        if not (workdir / "config.json").is_file():  # No run has begun here: a refused one leaves nothing behind.
            with contextlib.suppress(OSError):
                (workdir / ".lock").unlink()
                for path in missing:
                    path.rmdir()
        os.close(lock)


def _hold(workdir: Path) -> int:
    """The descriptor of the workdir's lock file, locked; both are made where they are missing."""
    while True:
        try:
            make_directory(workdir)
            lock = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT)
            held = hold_lock(lock, workdir / ".lock")
        except OSError as error:
            reason = "it is a file, and a run takes a folder" if workdir.is_file() else error.strerror
            raise UserError(f"cannot write to workdir {workdir}: {reason}; choose another --workdir") from error
        if not held:
            os.close(lock)
            raise UserError(f"another process is training in {workdir}; choose another --workdir")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), os.stat(workdir / ".lock")):
                return lock
        os.close(lock)  # Another run made the file, was refused, and has removed it.


def is_held(workdir: Path) -> bool:
    """Whether another process is training in the workdir, which is on a disk."""
    try:
        lock = os.open(workdir / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        return not hold_lock(lock, workdir / ".lock")
    finally:
        os.close(lock)


def _see_claim(workdir: Path) -> None:
    """Returns when this process sees the claim of process 0. Raises UserError when it sees another disk."""
    token = distributed.from_first(None)
    deadline = time.monotonic() + _SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if _claimed_by(workdir) == token:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"workdir {workdir} is not the one that process 0 writes to; give a --workdir on a disk that all "
                "processes share"
            )
        time.sleep(0.2)


def _claimed_by(workdir: Path) -> str | None:
    """The token of the process that holds the workdir. Raises OSError where none does, BucketError."""
    if storage.url_of(workdir):
        return bucket_lock.owner_of(storage.lock_of(workdir)).get("token")
    return (workdir / ".lock").read_text()


def refuse_another_run(path: Path, config: ConfigDict) -> None:
    remedy = "choose another --workdir"
    try:
        saved = configuration.from_text(read_bytes(path), str(path), remedy)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    changed = configuration.differences(saved, config)
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{path.parent} holds a run of another config ({changed[0]}{more}); "
            "choose another --workdir, or give that run's config to go on with it"
        )


def model_alone(workdir: Path, model: Path) -> UserError:
    """The error for a workdir in which nothing can go on, as its checkpoints are gone, and nothing may begin."""
    return UserError(
        f"{workdir} holds a trained model and no checkpoint to go on from; choose another --workdir, or move {model} "
        "away to train from the start"
    )


def read_summary(workdir: Path) -> dict[str, Any]:
    """The summary of the steps done so far, empty where there is none.

    Raises:
      UserError: it is unreadable, or not of the form that `train` writes.
    """
    path, remedy = workdir / "summary.json", "delete it to have it made anew"
    try:
        summary = read_json_object(path, remedy)
    except FileNotFoundError:
        return {}
    for kind in KINDS:
        evaluations = summary.get(kind, {})
        if not isinstance(evaluations, dict) or not all(isinstance(means, dict) for means in evaluations.values()):
            raise UserError(f"{path} is no summary of a run ({kind} must hold an object for each evaluation); {remedy}")
    return summary


def read_left_out(workdir: Path) -> list[LeftOut]:
    """The pictures that a run has left out so far.

    Raises:
      UserError: the list is there and not of the form that `train` writes.
    """
    path, remedy = workdir / "left_out.jsonl", "delete it to have it made anew"
    if not path.exists():
        return []
    entries = read_jsonl(path, remedy)
    return [LeftOut(str(entry.get("image", "")), str(entry.get("reason", ""))) for _, entry in entries]


def dump_samples(workdir: Path, step: int, records: Sequence[dict[str, Any]]) -> None:
    """Every caption of a training step with its verdicts: samples/step-000120.jsonl."""
    write_text(workdir / "samples" / f"step-{step:06d}.jsonl", json_text.lines(records))


@contextlib.contextmanager
def readable(settings: ConfigDict) -> Iterator[None]:
    """Reading of the data set `settings.name`: what its C++ reader raises for a damaged file becomes a UserError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if settings.name != "scenes":  # nothing of ours: never to be deleted
            place = settings.manual_dir if settings.name == "sharegpt4v" else settings.data_dir
            raise UserError(f"the pictures of {place} cannot be read ({reason}); mend or move them") from error
        raise damaged(resolved(settings.data_dir) / settings.name, reason) from error
