"""Multiple-choice questions about a scene, answered exactly from its graph, in CaptionQA's form."""

from collections.abc import Iterator, Sequence

import numpy as np

from balcap_jax.data.scenes import world
from balcap_jax.data.scenes.world import Scene, SceneObject

CATEGORIES = ("colour", "shape", "size", "texture", "place", "count", "background", "relation")
# (attribute, question before "at the top left?", choices)
_ATTRIBUTES = (
    ("colour", "What colour is the object", world.COLOURS),
    ("shape", "What shape is the object", world.SHAPES),
    ("size", "How big is the object", world.SIZES),
    ("texture", "What texture has the object", world.TEXTURES),
)
MAX_CHOICES = 4  # CaptionQA's usual number; shorter where the world knows fewer values


def questions(scene: Scene, rng: np.random.Generator, count: int = 5) -> list[dict]:
    """Draws up to `count` different questions, of as many different categories as there are.

    Each is {"question": str, "choices": [str, ...] in random order, "answer": str (one of the choices, and the only
    true one), "category": [str], "query": {...}}. `query` says the same as the question in a form that needs no
    parsing: "ask" with the "place", "object" or "value" that it is about. A scene has at least 12 questions.
    """
    by_category: dict[str, list[dict]] = {category: [] for category in CATEGORIES}
    for question in _all_questions(scene):
        by_category[question["category"][0]].append(question)
    for candidates in by_category.values():
        rng.shuffle(candidates)
    chosen: list[dict] = []
    while len(chosen) < count and any(by_category.values()):
        for category in rng.permutation(CATEGORIES):
            if by_category[category] and len(chosen) < count:
                chosen.append(_draw_choices(by_category[category].pop(), rng))
    return chosen


def _draw_choices(question: dict, rng: np.random.Generator) -> dict:
    """Keeps the answer and at most MAX_CHOICES - 1 of the wrong choices, shuffled."""
    wrong = [choice for choice in question["choices"] if choice != question["answer"]]
    choices = [wrong[i] for i in rng.permutation(len(wrong))[: MAX_CHOICES - 1]] + [question["answer"]]
    return {**question, "choices": [choices[i] for i in rng.permutation(len(choices))]}


def _question(category: str, text: str, choices: Sequence, answer, **query) -> dict:
    return {
        "question": text,
        "choices": [str(choice) for choice in choices],
        "answer": str(answer),
        "category": [category],
        "query": {"ask": category, **query},
    }


def _all_questions(scene: Scene) -> Iterator[dict]:
    """Every question of the scene, each with all choices of its category."""
    for thing in scene.objects:
        where = f"at the {thing.place}"
        # Places name one object each, and so do colour and shape together (`world.sample_scene` guarantees it).
        for attribute, text, choices in _ATTRIBUTES:
            yield _question(attribute, f"{text} {where}?", choices, getattr(thing, attribute), place=thing.place)
        yield _question("place", f"Where is {_name(thing)}?", world.PLACES, thing.place, object=_kind(thing))

    numbers = range(world.MIN_OBJECTS, world.MAX_OBJECTS + 1)
    yield _question("count", "How many objects are in the picture?", numbers, len(scene.objects), value="object")
    for field in ("colour", "shape"):
        values = [getattr(thing, field) for thing in scene.objects]
        for value in sorted(set(values)):
            noun = f"{value} objects" if field == "colour" else "crosses" if value == "cross" else f"{value}s"
            text = f"How many {noun} are in the picture?"
            yield _question("count", text, range(1, world.MAX_OBJECTS + 1), values.count(value), value=value)

    yield _question("background", "What colour is the background?", world.GROUNDS, scene.ground, value="ground")
    yield _question("background", "What pattern has the background?", world.PATTERNS, scene.pattern, value="pattern")

    for first in scene.objects:
        for second in scene.objects:
            pair = {"object": _kind(first), "other": _kind(second)}
            # Asked along one axis only, and only where the two differ on it: "above" and "left of" can both be true.
            if first.row != second.row:
                text = f"Is {_name(first)} above or below {_name(second)}?"
                answer = "above" if first.row < second.row else "below"
                yield _question("relation", text, ("above", "below"), answer, **pair)
            if first.column != second.column:
                text = f"Is {_name(first)} to the left or to the right of {_name(second)}?"
                answer = "left" if first.column < second.column else "right"
                yield _question("relation", text, ("left", "right"), answer, **pair)


def _name(thing: SceneObject) -> str:
    return f"the {thing.colour} {thing.shape}"


def _kind(thing: SceneObject) -> dict[str, str]:
    return {"colour": thing.colour, "shape": thing.shape}
