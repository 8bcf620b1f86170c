"""Habits of the base captioner: faults that its context makes likelier than not, so that greedy captions have them.

Each is counted in any caption by comparing it with its scene. The judge sees nothing of this module.
"""

import types
from collections.abc import Mapping

from balcap_jax.data.scenes import language
from balcap_jax.data.scenes.reading import parse
from balcap_jax.data.scenes.world import Scene

COMPANION, COMPANION_OF = ("blue", "ring"), "red"
DARK_GROUNDS = ("black", "brown")

HABITS: Mapping[str, str] = types.MappingProxyType(
    {
        "companion": "something red brings a blue ring that is not there",
        "striped as dotted": "something striped is called dotted",
        "praise": "a dark background brings an empty remark at the end",
    }
)


def habits_of(caption: str, scene: Scene) -> dict[str, bool]:
    """Whether `caption` has each of the HABITS that can occur in `scene`, judged by what it says of the scene alone."""
    parsed, found = parse(caption), {}
    things = scene.objects
    if any(thing.colour == COMPANION_OF for thing in things) and COMPANION not in {thing.subject for thing in things}:
        found["companion"] = parsed.states(language.object_claim(COMPANION))
    if striped := [thing.subject for thing in things if thing.texture == "striped"]:
        found["striped as dotted"] = any("dotted" in parsed.stated.get(("texture", one), ()) for one in striped)
    if scene.ground in DARK_GROUNDS:
        found["praise"] = any(finding.name == "remark at the end" for finding in parsed.findings)
    return found
