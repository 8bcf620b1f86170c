"""Locks in buckets: an object that one process holds and renews, by preconditions on its generation."""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.bucket import BucketError, Changed, delete, read, stat, write
from balcap_jax.cli.errors import UserError


class Lock(contextlib.AbstractContextManager):
    """An object that one process at a time holds, and renews; it is deleted at the end.

    A holder that has gone without deleting it is noticed: at once where it ran on this machine, else when the object
    has not been renewed for `patience` seconds. Then the lock changes hands, and one line says so.
    """

    RENEWED = 10.0  # seconds
    PATIENCE = 45.0

    def __init__(self, url: str, what: str, say: Callable[[str], None] = print):
        """`what` is held, for messages such as "... is writing gs://b/run". Raises as `__enter__`."""
        self.url, self.token, self._what, self._say = url, os.urandom(8).hex(), what, say
        self.problem = ""  # why it is held no longer
        self._generation = 0
        self._stop = threading.Event()

    def __enter__(self) -> "Lock":
        """Raises UserError where another process holds it, BucketError."""
        self._take()
        self._thread = threading.Thread(target=self._renew, name="bucket-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.problem:
            with contextlib.suppress(Changed, BucketError):
                delete(self.url, self._generation)

    def check(self) -> None:
        """Raises UserError where another process has taken it since."""
        if self.problem:
            raise UserError(f"{self._what}: {self.problem}; nothing more is written, look at which of them shall go on")

    def _content(self) -> bytes:
        return json_text.dumps(
            {
                "token": self.token,
                "host": socket.gethostname(),
                "machine": _machine(),
                "process": os.getpid(),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        ).encode()

    def _take(self) -> None:
        try:
            self._generation = write(self.url, self._content(), 0)
            return
        except Changed:
            pass
        seen, since, told = None, time.monotonic(), False
        while True:
            held = stat(self.url)
            if held is None:
                with contextlib.suppress(Changed):
                    self._generation = write(self.url, self._content(), 0)
                    return
                continue
            owner = self._owner()
            if owner.get("token") == self.token:  # The answer to our own request was lost.
                self._generation = held.generation
                return
            if seen not in (None, held.generation):
                raise UserError(
                    f"{self._what}: another process is writing there ({_named(owner)}); wait for it, stop it, or name "
                    "another place"
                )
            seen = held.generation
            is_gone = owner.get("machine") == _machine() and not _is_running(owner.get("process"))
            if not told and not is_gone:
                self._say(f"{self.url} is held by {_named(owner)}; looking for {self.PATIENCE:.0f} s whether it lives")
                told = True
            if is_gone or time.monotonic() - since > self.PATIENCE:
                with contextlib.suppress(Changed):
                    self._generation = write(self.url, self._content(), held.generation)
                    self._say(f"{self.url} was left behind by {_named(owner)}, which is gone: taken over")
                    return
            time.sleep(min(1.0, self.RENEWED / 5))

    def _owner(self) -> dict[str, Any]:
        try:
            found = json_text.decode(read(self.url))
            return found if isinstance(found, dict) else {}
        except (FileNotFoundError, ValueError):
            return {}

    def _renew(self) -> None:
        while not self._stop.wait(self.RENEWED):
            try:
                self._generation = write(self.url, self._content(), self._generation)
            except Changed:
                owner = self._owner()
                if owner.get("token") == self.token and (held := stat(self.url)):
                    self._generation = held.generation
                    continue
                self.problem = f"its lock {self.url} was taken over by {_named(owner) if owner else 'somebody'}"
                return
            except UserError as error:
                self._say(f"{self.url} cannot be renewed: {error}")


def owner_of(url: str) -> dict[str, Any]:
    """What the lock object `url` says of its holder; {} where there is none. Raises BucketError."""
    return Lock(url, "")._owner()


def _named(owner: Mapping[str, Any]) -> str:
    return f"process {owner.get('process', '?')} of host {owner.get('host', '?')}, {owner.get('time', '?')}"


@functools.cache
def _machine() -> str:
    """What tells this machine, or container, from others while it is up."""
    texts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        texts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        texts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(texts)


def _is_running(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except OSError:
        return True
    return True
