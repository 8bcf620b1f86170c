"""Whether the programs fit a TPU slice: `aot` compiles them, in a process that sees no other device."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from balcap_jax.cli.errors import UserError
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, fault

CHECK = "devices"
_GIB = 2**30


class Slice(NamedTuple):
    """Chips, and seconds of a step of rl on them if they ran at their peak."""

    chips: int
    peak_seconds: float


def look(given: Sequence[str], topology: str, slices: int) -> tuple[Finding, Slice | None]:
    """The finding on a topology such as "v5e:4x4". `given`: the arguments of `aot` that name the configuration."""
    if not topology:
        return Finding(CHECK, UNCHECKED, "name the slice with --topology, such as v5e:4x4; it takes minutes"), None
    with tempfile.TemporaryDirectory(prefix="balcap-doctor-") as aside:
        figures = Path(aside, "figures.json")
        command = [sys.executable, "-m", "balcap_jax.aot", *given, f"--topology={topology}", f"--slices={slices}"]
        done = subprocess.run([*command, f"--json={figures}"], text=True, capture_output=True, check=False)
        if not figures.exists():
            last = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
            return fault(CHECK, UserError(last or f"aot ended with {done.returncode}"), "run aot itself"), None
        programs = json.loads(figures.read_text())
    sizes = [int(size) for size in topology.partition(":")[2].split("x")]
    chips = math.prod(sizes) * slices
    room = f"{topology}: {chips} chips of {programs[0]['hbm'] / _GIB:.2f} GiB"
    if too_large := [program for program in programs if not program["fits"]]:
        first = too_large[0]
        needs = f"{first['total'] / _GIB:.2f} GiB" if "total" in first else first["refused"]
        found = f"{room}, and the {first['program']} needs {needs}"
        remedy = (
            "take a larger slice, raise stages.rl.micro_batches or rollout.parts, or raise mesh.fsdp or mesh.tensor"
        )
        return Finding(CHECK, FAULT, found, remedy), None
    taken = ", ".join(f"{program['program']} {program['total'] / _GIB:.2f}" for program in programs)
    return Finding(CHECK, OK, f"{room} take {taken} GiB"), Slice(chips, _step(programs))


def _step(programs: Sequence[dict]) -> float:
    """Of a step: the layout, the rollout, and the least of the updates that a batch may take."""
    updates = [program["peak_seconds"] for program in programs if "update" in program["program"]]
    others = [program["peak_seconds"] for program in programs if "update" not in program["program"]]
    return sum(others) + min(updates, default=0.0)
