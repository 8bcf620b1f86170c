"""Whether the programs fit a TPU slice: `aot` compiles them, in a process that sees no other device."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import stage_order
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, fault
from balcap_jax.models.policy import Params
from balcap_jax.parallel import sharding
from balcap_jax.parallel.topology import sides
from balcap_jax.training.programs import check_mesh

CHECK = "devices"
_GIB = 2**30
_NAME = "name the slice with --topology, such as v5e:4x4; it takes minutes"


class Slice(NamedTuple):
    """Chips, and seconds of a step of rl on them if they ran at their peak."""

    chips: int
    peak_seconds: float


def is_given(config: ConfigDict) -> bool:
    """Whether the mesh asks for more than all devices along one axis."""
    return any(config.mesh[axis] > 1 for axis in sharding.AXES)


def mesh(config: ConfigDict, params: Params | None) -> Finding:
    """What is known of the mesh without devices: sizes that no number of them makes fit are a fault.

    An axis that takes what is left (-1) counts as 1: what one device there does not divide, more do not either.
    params: shapes, None = not known.
    """
    if not is_given(config):
        return Finding(CHECK, UNCHECKED, _NAME)
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    is_open = -1 in sizes.values()
    least = jax.sharding.AbstractMesh(tuple(max(size, 1) for size in sizes.values()), sharding.AXES)
    known = config.copy_and_resolve_references()
    if is_open:
        with known.unlocked():
            known.mesh.sampling = "auto"  # How far the axis goes decides what is possible.
    try:
        for name in stage_order(config):
            if config.stages[name].steps:
                check_mesh(known, least, name)
        split, tensor = config.mesh.sampling, sizes["tensor"]
        if split != "auto" and tensor > 1 and split % tensor:
            raise UserError(f"mesh.sampling is {split}, and mesh.tensor ({tensor}) does not divide it; set it to auto")
        if params is not None:
            sharding.tree_shardings(least, params)
    except UserError as error:
        return fault(CHECK, error, "change the mesh.* sizes, or the batch size")
    shape = " x ".join(f"{axis} {size if size > 0 else 'what is left'}" for axis, size in sizes.items() if size != 1)
    divides = "the batches" if params is None else "the batches and the parameters"
    unseen = [f"the devices that mesh.{axis} takes" for axis, size in sizes.items() if size == -1]
    unseen += ["their number", "their memory"]
    found = f"the mesh ({shape}) divides {divides}; not looked at: {', '.join(unseen)}; {_NAME}"
    return Finding(CHECK, UNCHECKED, found)


def look(given: Sequence[str], topology: str, slices: int) -> tuple[Finding, Slice | None]:
    """The finding on a topology such as "v5e:4x4". `given`: the arguments of `aot` that name the configuration."""
    with tempfile.TemporaryDirectory(prefix="balcap-doctor-") as aside:
        figures = Path(aside, "figures.json")
        command = [sys.executable, "-m", "balcap_jax.aot", *given, f"--topology={topology}", f"--slices={slices}"]
        done = subprocess.run([*command, f"--json={figures}"], text=True, capture_output=True, check=False)
        if not figures.exists():
            last = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
            return fault(CHECK, UserError(last or f"aot ended with {done.returncode}"), "run aot itself"), None
        programs = json.loads(figures.read_text())
    chips = math.prod(sides(topology)) * slices
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
