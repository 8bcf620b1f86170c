"""A peer of a benchmark: a process in an environment of its own that answers JSON lines with JSON lines.

The driver sends a job, {"key": value, ...} on one line, and reads one line; a peer that is timed loads in answer to it
and does one step in answer to each further line, so that two sides can take turns without loading twice. A peer imports
nothing of ours and we import nothing of a peer's. peers/install.sh makes the environments.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from balcap_jax.cli.errors import UserError

PEERS = Path(__file__).parent / "peers"


class Peer:
    """One process of `peers/SCRIPT`; a context manager that ends it. `env` replaces variables of the environment.

    Raises (here and in `ask`):
      UserError: the interpreter does not start, or the peer ended or answered something else than JSON; with the last
        line that it wrote to stderr.
    """

    def __init__(self, python: str, script: str, folder: Path = PEERS, env: Mapping[str, str] | None = None) -> None:
        self.name = script.removesuffix(".py")
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        try:
            self._process = subprocess.Popen(
                [python, str(folder / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=os.environ | dict(env or {}),
            )
        except OSError as error:
            self._stderr.close()
            raise UserError(f"{self.name}: its Python {python} does not start: {error.strerror}") from error

    def tell(self, **request: Any) -> None:
        """Sends a request without waiting for its answer."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> dict[str, Any]:
        """Waits for the answer to the oldest request."""
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise self._ended() from None

    def ask(self, **request: Any) -> dict[str, Any]:
        self.tell(**request)
        return self.answer()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ended(self) -> UserError:
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it answered something else than JSON
            self._process.kill()
            status = self._process.wait()
        self._stderr.seek(0)
        last = ([line for line in self._stderr.read().splitlines() if line.strip()] or ["no output"])[-1]
        return UserError(
            f"the peer {self.name} gave no answer (exit status {status}): {last.strip()}; "
            "benchmarks/peers/install.sh makes its environment"
        )


def compare(name: str, ours: float, theirs: float, tolerance: float) -> None:
    """Ends the benchmark unless both sides computed one number.

    Raises:
      UserError: |ours - theirs| > tolerance * |theirs|, or either is not finite.
    """
    difference = abs(ours - theirs)
    print(f"{name}: {ours:.7g} here, {theirs:.7g} at the peer, relative difference {difference / abs(theirs):.1e}")
    if not difference <= tolerance * abs(theirs):
        raise UserError(
            f"{name} is {ours:.7g} here and {theirs:.7g} at the peer, more than {tolerance:g} apart, so this is not "
            "one computation; no times are reported"
        )


def take_turns(sides: dict[str, Any], rounds: int, wait: bool = False) -> dict[str, list[float]]:
    """Seconds of each side, run in turns (A, B, A, B, ...) so that a machine that slows down slows all of them.

    Args:
      sides: {name: function of no argument that does one step and returns its seconds}.
      wait: for a line on stdin before each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        if wait:
            print(f"round {turn + 1} of {rounds}: press Enter", flush=True)
            sys.stdin.readline()
        for name, step in sides.items():
            seconds[name].append(step())
            print(f"round {turn + 1} of {rounds}: {name} {seconds[name][-1]:.2f} s", flush=True)
    print("all rounds done", flush=True)
    return seconds


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()

    return "\n".join(map(line, rows))
