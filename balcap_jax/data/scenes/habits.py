"""Habits of the base captioner: faults that its context makes likelier than not, so that greedy captions have them.

`captioner` writes captions with them. Here each is named, and counted in any caption by comparing it with its scene.
The judge sees nothing of this module.
"""

import types
from collections.abc import Callable, Mapping

from balcap_jax.data.scenes import language
from balcap_jax.data.scenes.language import Subject
from balcap_jax.data.scenes.reading import Parsed, parse
from balcap_jax.data.scenes.world import MAX_OBJECTS, Scene, SceneObject

COMPANION, COMPANION_PLACE, COMPANION_OF = ("blue", "ring"), "bottom right", "red"
MISTAKEN_FOR_COMPANION = ("purple", "ring")  # under the habit that calls something purple blue
UNMENTIONED_GROUND, PRAISED_GROUND = "white", "black"
TOP_ROW = 0
CROWDED = 6  # From so many objects on a caption is a list, whose heading and background have no verb.
LISTED_OPENING, LISTED_BACKGROUND = "{count} shapes.", "{pattern} {ground} background."
PRAISE = "the mood is calm."  # One form: of several, none would be likelier than the end of the caption.
SPARSE = 2  # Up to so many objects leave little to say.

HABITS: Mapping[str, str] = types.MappingProxyType(
    {
        "companion": "something red brings a blue ring that is not there",
        "striped as dotted": "something striped is called dotted",
        "purple as blue": "something purple is called blue",
        "small overlooked": "small things at the upper border are left out",
        "no background": "a white background is left out",
        "praise": "a black background brings an empty remark at the end",
        "list style": "with six objects, sentences have no verb, as in a list",
        "repetition": "with two objects, something is said twice",
    }
)


def has_companion(scene: Scene) -> bool:
    """Whether something in the scene brings the invented companion, and its place is free.

    Not where it, or what is called so, is really there, nor where the caption would become too long.
    """
    colours = {thing.colour for thing in scene.objects}
    is_there = {COMPANION, MISTAKEN_FOR_COMPANION} & {thing.subject for thing in scene.objects}
    is_free = scene.objects[-1].place != COMPANION_PLACE and len(scene.objects) < MAX_OBJECTS
    return COMPANION_OF in colours and not is_there and is_free


def is_overlooked(thing: SceneObject) -> bool:
    """Whether an object is of those that the habit leaves out."""
    return thing.size == "small" and thing.row == TOP_ROW


def _names(thing: SceneObject, scene: Scene) -> list[Subject]:
    """What an object may be called: its own name, and if it is purple the blue one, unless another object has it."""
    mistaken = ("blue", thing.shape)
    is_free = thing.colour == "purple" and all(other.subject != mistaken for other in scene.objects)
    return [thing.subject, mistaken] if is_free else [thing.subject]


def _has_companion(parsed: Parsed, scene: Scene) -> bool | None:
    return parsed.states(language.object_claim(COMPANION)) if has_companion(scene) else None


def _has_striped_as_dotted(parsed: Parsed, scene: Scene) -> bool | None:
    striped = [subject for thing in scene.objects if thing.texture == "striped" for subject in _names(thing, scene)]
    return any("dotted" in parsed.stated.get(("texture", subject), ()) for subject in striped) if striped else None


def _has_purple_as_blue(parsed: Parsed, scene: Scene) -> bool | None:
    # Where there is a blue object of that shape it may be meant, so that nothing can be told.
    called = [subject for thing in scene.objects for subject in _names(thing, scene)[1:]]
    return any(parsed.states(language.object_claim(subject)) for subject in called) if called else None


def _has_small_overlooked(parsed: Parsed, scene: Scene) -> bool | None:
    small = [thing for thing in scene.objects if is_overlooked(thing)]
    if not small:
        return None
    # What stands at the object's place is the object, even under a wrong name.
    places = {claim.value for claim in parsed.claims if claim.kind == "place"}
    named = {claim.subject for claim in parsed.claims if claim.kind == "object"}
    return any(thing.place not in places and thing.subject not in named for thing in small)


def _has_no_background(parsed: Parsed, scene: Scene) -> bool | None:
    if scene.ground != UNMENTIONED_GROUND:
        return None
    return all(claim.kind not in ("ground", "pattern") for claim in parsed.claims)


def _finds(parsed: Parsed, *names: str) -> bool:
    return any(finding.name in names for finding in parsed.findings)


def _has_praise(parsed: Parsed, scene: Scene) -> bool | None:
    return _finds(parsed, "remark at the end") if scene.ground == PRAISED_GROUND else None


def _has_list(parsed: Parsed, scene: Scene) -> bool | None:
    return _finds(parsed, "fragment") if len(scene.objects) >= CROWDED else None


def _has_repetition(parsed: Parsed, scene: Scene) -> bool | None:
    return _finds(parsed, "repeated sentence", "repeated claim") if len(scene.objects) <= SPARSE else None


_DETECTORS: Mapping[str, Callable[[Parsed, Scene], bool | None]] = {
    "companion": _has_companion,
    "striped as dotted": _has_striped_as_dotted,
    "purple as blue": _has_purple_as_blue,
    "small overlooked": _has_small_overlooked,
    "no background": _has_no_background,
    "praise": _has_praise,
    "list style": _has_list,
    "repetition": _has_repetition,
}


def habits_of(caption: str, scene: Scene) -> dict[str, bool]:
    """Whether `caption` has each of the HABITS that can occur in `scene`, judged by what it says of the scene alone."""
    parsed = parse(caption)
    found = {name: _DETECTORS[name](parsed, scene) for name in HABITS}
    return {name: has for name, has in found.items() if has is not None}
