"""A split whose examples are read when they are asked for, and in which those that cannot be read have stand-ins."""

import abc
import bisect
import itertools
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
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
        self._damaged: dict[int, str] = {}
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
        return self._first(self._from(index.__index__()))

    def itself(self, index: int) -> dict[str, Any] | None:
        """Example `index` itself; None where it cannot be read, which is named."""
        if index in self._damaged:
            return None
        try:
            return self.read(index)
        except ImageError as error:
            self._leave_out(index, str(error))
            return None

    def in_batch(self, indices: Sequence[int], row: int) -> dict[str, Any]:
        """Example `indices[row]`, or a stand-in that no other row of the batch has, where there are enough examples.

        Raises:
          UserError: no example of the split can be read.
        """
        start, batch = int(indices[row]), sorted(map(int, indices))
        return self._first(itertools.chain([start], self._stand_ins(start, batch, row), self._from(start)))

    def _stand_ins(self, start: int, batch: Sequence[int], row: int) -> Iterator[int]:
        """Of the examples outside of a batch those that are for one of its rows, those behind `start` first.

        So no row takes that of another one, of which a process that reads some rows alone knows nothing.
        """
        inside = set(batch)
        for at in self._from(start):
            if at not in inside and (at - bisect.bisect_left(batch, at)) % len(batch) == row:
                yield at

    def _from(self, start: int) -> Iterator[int]:
        """All examples, from `start` on and then those before it."""
        return ((start + step) % len(self) for step in range(len(self)))

    def _first(self, places: Iterable[int]) -> dict[str, Any]:
        """The first that can be read. Raises UserError where none can."""
        for at in places:
            if (example := self.itself(at)) is not None:
                return example
        at, reason = next(iter(self._damaged.items()), (0, "there is none"))
        raise UserError(
            f"none of the {len(self)} pictures of a split can be read, such as {self.name(at)} ({reason}); mend these, "
            "or give other data (data.data_dir)"
        )

    def _leave_out(self, at: int, reason: str) -> None:
        with self._lock:
            if at not in self._damaged:
                self._damaged[at] = reason
                self._found.append(LeftOut(self.name(at), reason))
                print(f"left out: {self.name(at)}: {reason}", file=sys.stderr, flush=True)
