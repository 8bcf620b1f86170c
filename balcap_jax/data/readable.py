"""A split whose examples are read when they are asked for, and in which those that cannot be read have stand-ins."""

import abc
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

from balcap_jax.cli.errors import UserError
from balcap_jax.data.images import ImageError
from balcap_jax.data.input import LeftOut


class Readable(abc.ABC):
    """`split[i]` reads example i; the next one that can be read stands in for one that cannot.

    A line on stderr names each of these once, and so does `damaged`, the list of all splits of a data set. Which one
    stands in depends on the data alone, not on what was read before.
    """

    def __init__(self, damaged: list[LeftOut] | None = None):
        self._found = [] if damaged is None else damaged
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    @abc.abstractmethod
    def prompts(self) -> Sequence[str]:
        """Those of all examples, of which no picture is opened."""

    @abc.abstractmethod
    def texts(self) -> Iterator[tuple[str, ...]]:
        """The prompt and the captions of each example, of which no picture is opened."""

    @abc.abstractmethod
    def name(self, at: int) -> str:
        """The id of an example."""

    @abc.abstractmethod
    def read(self, at: int) -> dict[str, Any]:
        """Example `at`. Raises ImageError where it cannot be read."""

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Raises UserError when no example of the split can be read."""
        start = index.__index__()
        for step in range(len(self)):
            at = (start + step) % len(self)
            if at in self._damaged:
                continue
            try:
                return self.read(at)
            except ImageError as error:
                self._leave_out(at, str(error))
        raise UserError(f"none of the {len(self)} pictures of a split can be read; the lines above say why")

    def _leave_out(self, at: int, reason: str) -> None:
        with self._lock:
            if at not in self._damaged:
                self._damaged.add(at)
                self._found.append(LeftOut(self.name(at), reason))
                line = f"left out: {self.name(at)}: {reason}; another picture takes its place"
                print(line, file=sys.stderr, flush=True)
