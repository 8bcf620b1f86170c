"""Writes the labelled set that judges are measured on: what scenes show, what captions say of it, and how well.

    PYTHONPATH=. python tests/judges/make_labelled.py

Texts are made from the scene graph: a true unit, the same with one value changed, a remark about nothing; a caption
that leaves half of the units out; good and broken language; two captions of which one is better. Labels follow from how
a text was made. The tests hold them against the oracle, which reads texts and knows nothing of this.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.data.scenes import captioner, language, world
from balcap_jax.judges.oracle import judge_linguistic, judge_precision, judge_recall

SET = Path(__file__).with_name("labelled.jsonl")
SCENES = 64
FIRST_SEED = 9_000_000  # of no split of a data set of the default seed
EACH = 3  # true and false assertions of a scene
_SLOPPY = dict.fromkeys(("dropped verb", "dropped article", "lower case", "closing remark", "omitted opening"), 1.0)
_SLOPPY |= {"omitted colour": 1.0, "omitted place": 0.7}
_FLORID = {"invented object": 0.6, "wrong colour": 0.5, "omitted object": 0.3, "closing remark": 1.0}


def line_of(seed: int) -> dict[str, Any]:
    """One scene: {"seed", "assertions", "recall", "captions", "pair"}, see the module."""
    scene, rng = world.sample_scene(seed), np.random.default_rng([0x1ABE1, seed])
    reference = language.reference_caption(scene, rng)
    units = language.reference_units(scene)
    true = [units[i] for i in rng.permutation(len(units))[:EACH]]
    assertions = [{"text": sentence(text), "holds": True, "pointable": True} for text in true]
    assertions += [{"text": sentence(text), "holds": False, "pointable": True} for text in false_units(scene, rng)]
    remark = language.pick(language.REMARKS, rng)
    assertions.append({"text": language.sentence(remark), "holds": False, "pointable": False})
    stated = {units[i] for i in rng.permutation(len(units))[: len(units) // 2]}
    partial = " ".join(sentence(unit) for unit in units if unit in stated)
    captions = [reference]
    captions += [captioner.write_caption(scene, rates, rng) for rates in (_SLOPPY, _FLORID)]
    return {
        "seed": seed,
        "assertions": assertions,
        "recall": {"caption": partial, "units": units, "covered": [is_stated(unit, stated) for unit in units]},
        "captions": [scored(text, scene, units) for text in captions],
        "reference": reference,
        "pair": [reference, captions[2]],
    }


def is_stated(unit: str, stated: set[str]) -> bool:
    """Whether a unit is among those `stated`, or follows from one: what has a size or a place is there."""
    thing = unit.partition("there is ")[2].removeprefix("an ").removeprefix("a ")
    return unit in stated or bool(thing and any(f"the {thing} " in f"{other} " for other in stated))


def sentence(unit: str) -> str:
    return language.sentence(unit) + "."


def false_units(scene: world.Scene, rng: np.random.Generator) -> list[str]:
    """EACH statements with one value that the scene refutes."""
    things = [scene.objects[int(rng.integers(len(scene.objects)))] for _ in range(2)]

    def other(value: str, values: tuple[str, ...]) -> str:
        return language.pick([each for each in values if each != value], rng)

    there = {thing.subject for thing in scene.objects}
    absent = [(colour, shape) for colour in world.COLOURS for shape in world.SHAPES if (colour, shape) not in there]
    kind, values = language.pick([("place", world.PLACES), ("size", world.SIZES)], rng)
    return [
        language.object_text(language.pick(absent, rng)),
        language.attribute_text(things[0].subject, kind, other(getattr(things[0], kind), values)),
        f"the background is {other(scene.ground, world.GROUNDS)}",
    ]


def scored(caption: str, scene: world.Scene, units: list[str]) -> dict[str, Any]:
    """A caption with the scores that it deserves, and the marks of its language."""
    assertions = judge_precision(caption, scene).assertions
    marks = list(judge_linguistic(caption).model_dump().values())
    covered = judge_recall(caption, units).covered
    precision = sum(each.verified and each.pointable for each in assertions) / max(len(assertions), 1)
    return {"text": caption, "precision": precision, "recall": sum(covered) / len(covered), "marks": marks}


def lines(count: int = SCENES) -> str:
    return "".join(json.dumps(line_of(FIRST_SEED + number)) + "\n" for number in range(count))


if __name__ == "__main__":
    SET.write_text(lines())
