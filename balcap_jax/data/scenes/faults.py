"""Captions with faults at random: what the arena's opponents say, and the noise of the base captioner (`captioner`).

Each fault is an independent draw, per caption, per object or per sentence. A draw per caption makes some captions
nearly faultless. The judge sees nothing of this module.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from balcap_jax.data.scenes import language, world
from balcap_jax.data.scenes.language import noun_phrase, pick
from balcap_jax.data.scenes.world import Scene

MAX_WORDS, MAX_TOKENS = 70, 78
# Share of nearly faultless captions, and how much rarer each fault is in them.
CLEAN_SHARE, CLEAN_FACTOR = 0.15, 0.06

# Probability of each fault where it can occur: per caption, per object (o) or per sentence (s).
RATES: dict[str, float] = {
    # content that is not there
    "invented object": 0.07,  # o
    "wrong colour": 0.04,  # o
    "wrong shape": 0.04,  # o
    "wrong size": 0.06,  # o
    "wrong texture": 0.06,  # o
    "wrong place": 0.07,  # o
    "wrong count": 0.15,
    "wrong relation": 0.25,
    "wrong background": 0.15,
    # content left out
    "stops early": 0.45,
    "too short": 0.16,
    "omitted object": 0.05,  # o
    "omitted colour": 0.06,  # o
    "omitted size": 0.62,  # o
    "omitted texture": 0.62,  # o
    "omitted place": 0.1,  # o
    "omitted opening": 0.18,
    "omitted relation": 0.5,
    "omitted background": 0.5,
    "omitted pattern": 0.2,
    # statements that point at nothing
    "remark": 0.12,  # s
    "remark tail": 0.12,  # o
    "closing remark": 0.65,
    # language
    "repetition": 0.13,  # s
    "list": 0.16,  # s
    "dropped verb": 0.14,  # s
    "dropped article": 0.12,  # s
    "word order": 0.1,  # s
    "lower case": 0.06,  # s
    "shuffled": 0.15,
    "no final stop": 0.1,
    "too long": 0.12,
}
_VERBS = ("is", "are", "holds", "occupies", "lies", "appear", "see")


def faulty_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A caption of the scene and the names of the faults put into it; at most MAX_WORDS words and MAX_TOKENS tokens."""
    factor = CLEAN_FACTOR if rng.random() < CLEAN_SHARE else 1.0
    return write_caption(scene, {name: rate * factor for name, rate in RATES.items()}, rng)


@dataclasses.dataclass
class Draft:
    """What a sentence about one object will say; "" leaves an attribute out."""

    shape: str
    colour: str
    size: str
    texture: str
    place: str

    def noun(self, article: str = "a") -> str:
        return noun_phrase(self.shape, self.colour, self.size, self.texture, article)


class Dice:
    """Draws faults and remembers those that occur."""

    def __init__(self, rates: Mapping[str, float], rng: np.random.Generator):
        self.rates, self.rng, self.faults = rates, rng, {}

    def __call__(self, name: str) -> bool:
        hit = self.rng.random() < self.rates.get(name, 0.0)
        if hit:
            self.faults[name] = None
        return hit


def other(value: str, options, rng: np.random.Generator) -> str:
    return pick([option for option in options if option != value], rng)


def _absent_kind(scene: Scene, rng: np.random.Generator, colour: str = "", shape: str = "") -> tuple[str, str]:
    """A (colour, shape) that no object of the scene has, with the colour or the shape that is given."""
    present = {thing.subject for thing in scene.objects}
    colours, shapes = (colour,) if colour else world.COLOURS, (shape,) if shape else world.SHAPES
    absent = [(c, s) for c in colours for s in shapes if (c, s) not in present]
    return pick(absent, rng) if absent else (colour, shape)


def _draft_objects(scene: Scene, dice: Dice, rng: np.random.Generator) -> list[Draft]:
    objects = list(scene.objects)
    if dice("too short"):
        objects = objects[:1]
    elif dice("stops early"):
        objects = objects[: (len(objects) + 1) // 2]
    drafts = []
    for thing in objects:
        if len(objects) > 1 and dice("omitted object"):
            continue
        draft = draft_object(scene, thing, dice, rng)
        drafts.append(draft)
        if dice("invented object"):
            drafts.append(invented(scene, rng))
    if dice("shuffled") and len(drafts) > 1:
        order = rng.permutation(len(drafts))
        drafts = [drafts[i] for i in order]
    return drafts


def draft_object(scene: Scene, thing: world.SceneObject, dice: Dice, rng: np.random.Generator) -> Draft:
    """What is said about an object of the scene, with wrong attributes and some left out."""
    draft = Draft(thing.shape, thing.colour, thing.size, thing.texture, thing.place)
    if dice("wrong colour"):
        draft.colour, _ = _absent_kind(scene, rng, shape=thing.shape)
    elif dice("wrong shape"):
        _, draft.shape = _absent_kind(scene, rng, colour=thing.colour)
    for attribute, values in (("size", world.SIZES), ("texture", world.TEXTURES[1:]), ("place", world.PLACES)):
        if dice(f"wrong {attribute}"):
            setattr(draft, attribute, other(getattr(thing, attribute), values, rng))
    for attribute in ("colour", "size", "texture", "place"):
        if getattr(draft, attribute) != "plain" and dice(f"omitted {attribute}"):  # Nothing states a plain texture.
            setattr(draft, attribute, "")
    return draft


def invented(scene: Scene, rng: np.random.Generator) -> Draft:
    colour, shape = _absent_kind(scene, rng)
    return Draft(shape, colour, pick(world.SIZES, rng), pick(world.TEXTURES, rng), pick(world.PLACES, rng))


def stated_count(scene: Scene, dice: Dice, rng: np.random.Generator) -> str:
    count = len(scene.objects)
    if dice("wrong count"):
        count = int(other(str(count), map(str, range(world.MIN_OBJECTS, world.MAX_OBJECTS + 1)), rng))
    return language.NUMBERS[count]


def object_text(draft: Draft, dice: Dice, rng: np.random.Generator) -> str:
    """One sentence about the object, or list-like fragments."""
    if dice("list"):
        if rng.random() < 0.5:
            noun = draft.noun(article="")
            return f"{noun}. {draft.place}." if draft.place else f"{noun}."
        noun = noun_phrase(draft.shape, draft.colour, article="")
        texture = "" if draft.texture == "plain" else draft.texture
        return ", ".join(word for word in (noun, draft.size, texture, draft.place) if word) + "."
    noun = draft.noun()
    if dice("word order"):
        words = noun.split()
        noun = " ".join([words[0], words[-1], *words[1:-1]])
    text = (
        pick(language.PLACED, rng).format(noun=noun, place=draft.place)
        if draft.place
        else language.UNPLACED.format(noun=noun)
    )
    if dice("remark tail"):
        text = f"{text[:-1]}, {pick(language.REMARK_TAILS, rng)}."
    return text


def relation_text(related: tuple[language.Subject, str, language.Subject], dice: Dice) -> str:
    first, relation, second = related
    if dice("wrong relation"):
        relation = language.INVERSE[relation]
    return language.relation_text(first, relation, second) + "."


def stated_background(scene: Scene, dice: Dice, rng: np.random.Generator) -> tuple[str, str]:
    """The ground and the pattern that a caption names."""
    ground, pattern = scene.ground, scene.pattern
    if dice("wrong background"):
        if rng.random() < 0.5:
            ground = other(ground, world.GROUNDS, rng)
        else:
            pattern = other(pattern, world.PATTERNS, rng)
    return ground, pattern


def background_text(scene: Scene, dice: Dice, rng: np.random.Generator) -> str:
    ground, pattern = stated_background(scene, dice, rng)
    form = language.GROUND_ONLY if dice("omitted pattern") else pick(language.BACKGROUNDS, rng)
    return form.format(ground=ground, pattern=pattern)


def broken(text: str, dice: Dice) -> str:
    """Drops the verb or the first article of a sentence."""
    words = text.split()
    if dice("dropped verb"):
        words = [word for word in words if word.strip(".") not in _VERBS]
    if words[0] in ("a", "an", "the") and dice("dropped article"):
        words = words[1:]
    text = " ".join(words)
    return text if text.endswith((".", "!")) else text + "."


def write_caption(scene: Scene, rates: Mapping[str, float], rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """Writes a caption in which each fault of `rates` occurs with its rate; without rates it has no fault."""
    dice = Dice(rates, rng)
    body: list[str] = []  # sentences, lower-case starts, each with its stop
    if not dice("omitted opening"):
        count = stated_count(scene, dice, rng)
        body.append(broken(pick(language.OPENINGS, rng).format(count=count), dice))
    for draft in _draft_objects(scene, dice, rng):
        body.append(broken(object_text(draft, dice, rng), dice))
        if dice("remark"):
            body.append(pick(language.REMARKS, rng))
    related = language.stated_relation(scene)
    if related and not dice("omitted relation"):
        body.append(broken(relation_text(related, dice), dice))
    if not dice("omitted background"):
        body.append(broken(background_text(scene, dice, rng), dice))
    if dice("closing remark"):
        body.append(pick(language.REMARKS, rng))
    body = _repeat(body, dice, rng)
    if dice("too long"):
        body += padding(scene, body, rng)
    text = " ".join(start(text, dice) for text in capped(body))
    if dice("no final stop"):
        text = text[:-1]
    return text, tuple(dice.faults)


def _repeat(body: list[str], dice: Dice, rng: np.random.Generator) -> list[str]:
    """Repeats some sentences, at once or at the end."""
    sentences, repeats_at_end = [], []
    for text in body:
        sentences.append(text)
        if dice("repetition"):
            (sentences if rng.random() < 0.5 else repeats_at_end).append(text)
    return sentences + repeats_at_end


def padding(scene: Scene, body: list[str], rng: np.random.Generator) -> list[str]:
    """Sentences that carry a caption past twice its reference's length: repeats, remarks, invented objects."""
    words = sum(len(text.split()) for text in body)
    reference_words = 11 + 9 * len(scene.objects) + (9 if language.stated_relation(scene) else 0)
    added: list[str] = []
    while words <= 2 * reference_words + 4 and words < MAX_WORDS:
        kind = rng.random()
        if kind < 0.4:
            added.append(pick(body, rng))
        elif kind < 0.7:
            added.append(pick(language.REMARKS, rng))
        else:
            draft = invented(scene, rng)
            added.append(pick(language.PLACED, rng).format(noun=draft.noun(), place=draft.place))
        words += len(added[-1].split())
    return added


def start(text: str, dice: Dice) -> str:
    # A list entry such as "red star. top left." holds several sentences: each gets its capital.
    parts = text.split(". ")
    if not dice("lower case"):
        parts = [language.sentence(part) for part in parts]
    return ". ".join(parts)


def capped(body: list[str]) -> list[str]:
    """The sentences that fit into the caption's hard limits."""
    words = tokens = 0
    for at, text in enumerate(body):
        words += len(text.split())
        tokens += len(text.split()) + sum(text.count(mark) for mark in ".,!")
        if words > MAX_WORDS or tokens > MAX_TOKENS:
            return body[:at]
    return body
