"""What a check has found: a verdict, one line of finding and one line of what to do; and the table of all."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError

OK, FAULT, UNCHECKED = "ok", "fault", "not checked"
_SHOWN_FIRST = (FAULT, UNCHECKED, OK)
_STYLES = {FAULT: "bold red", OK: "green", UNCHECKED: "dim"}
_WIDEST = 10_000  # columns where nobody's terminal bounds a line


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the check named `check` has found. `details` are lines that are shown below the table.

    In all texts a place in a bucket has the name that users know.
    """

    check: str
    verdict: str
    found: str
    remedy: str = ""
    details: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("found", "remedy"):
            object.__setattr__(self, name, shown(getattr(self, name)))
        object.__setattr__(self, "details", tuple(map(shown, self.details)))

    def __str__(self) -> str:
        return f"{self.check}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def fault(check: str, error: UserError, remedy: str = "mend that") -> Finding:
    """The finding of an error, whose message ends in what to do behind the last semicolon, or `remedy`."""
    what, separator, todo = str(error).rpartition("; ")
    return Finding(check, FAULT, what, todo) if separator else Finding(check, FAULT, todo, remedy)


def first_fault(findings: Sequence[Finding]) -> Finding | None:
    """The fault to be mended first: what is checked earlier comes before what depends on it."""
    return next((finding for finding in findings if finding.verdict == FAULT), None)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"ready": first_fault(findings) is None, "checks": [dataclasses.asdict(finding) for finding in findings]}


def table(findings: Sequence[Finding]) -> str:
    """The findings as a table, faults first; without a terminal each is one line."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table("verdict", "check", "found", "to do", box=SIMPLE_HEAD)
    for verdict in _SHOWN_FIRST:
        for finding in findings:
            if finding.verdict == verdict:
                cells = (Text(verdict, _STYLES[verdict]), *map(Text, (finding.check, finding.found, finding.remedy)))
                grid.add_row(*cells)
    is_terminal = sys.stdout.isatty()  # As for progress: FORCE_COLOR must not put control codes into a log file.
    console = Console(width=None if is_terminal else _WIDEST, force_terminal=is_terminal)
    with console.capture() as capture:
        console.print(grid)
    lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()]
    for finding in findings:
        lines += finding.details
    return "\n".join(lines)
