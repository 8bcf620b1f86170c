"""Names of TPU topologies, such as v5e:4x8: what can be told of them without libtpu."""

import math
import re

from balcap_jax.cli.errors import UserError

LARGEST = 2**17
"""Chips in all slices. The largest slices have some thousand; a list of many millions of devices would take hours."""

_SIDES = {"1": "1x1", "4": "2x2", "8": "2x4", "16": "4x4", "32": "4x8", "64": "8x8", "128": "8x16", "256": "16x16"}
"""Chips of a slice of v5e or v6e -> how they lie (cloud.google.com/tpu/docs/v5e, v6e)."""


def sides(topology: str) -> list[int]:
    """The chips along each side: [4, 8] of v5e:4x8."""
    return [int(size) for size in topology.partition(":")[2].split("x")]


def check_topology(topology: str, slices: int) -> None:
    """Raises UserError for what is no name of a topology, no number of slices, or more than can be planned for."""
    if not re.fullmatch(r"\w+:\d{1,9}(x\d{1,9})+", topology):
        raise UserError(f"--topology is {topology!r}; {_as_topology(topology) or 'name one as v5e:4x8 or v5p:2x2x2'}")
    if slices < 1:
        raise UserError(f"--slices is {slices}: it is the number of slices of --topology, at least 1")
    if (chips := math.prod(sides(topology)) * slices) > LARGEST:
        what = f"--topology={topology}" + (f" --slices={slices}" if slices > 1 else "")
        raise UserError(f"{what}: {chips:,} chips in all, at most {LARGEST:,} can be planned for; name fewer")


def _as_topology(accelerator: str) -> str:
    """What to write for the name that Cloud TPU gives a slice of one layer, such as v5litepod-32; "" for others."""
    named = re.fullmatch(r"(v5e|v5litepod|v6e)-(\d{1,3})", accelerator)
    if not named or named[2] not in _SIDES:
        return ""
    return f"{named[2]} of its chips are {named[1].replace('v5litepod', 'v5e')}:{_SIDES[named[2]]}"
