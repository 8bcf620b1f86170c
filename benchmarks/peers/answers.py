"""A peer's side of the contract in ../peer.py: JSON lines in on stdin, one JSON line out for each; the rest is noise.

Imported by the peers, which run in environments of their own: standard library only.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any


class Answers:
    """Writes JSON lines to what was stdout; whatever else the libraries print goes to stderr."""

    def __init__(self) -> None:
        self._lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, **fields: Any) -> None:
        self._lines.write(json.dumps(fields) + "\n")
        self._lines.flush()


def requests() -> Iterator[dict[str, Any]]:
    """The driver's requests, first of all the job; ends when the driver closes its side."""
    for line in sys.stdin:
        yield json.loads(line)


def peak_gb() -> float:
    """Most resident memory of this process so far (ru_maxrss is in kB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
