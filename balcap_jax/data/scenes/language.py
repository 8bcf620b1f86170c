"""The English of the scenes, as captions are written in it: sentence forms, references, claims, vocabulary.

`reading` goes the other way, from any text to the claims of this module.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import numpy as np

from balcap_jax.data.scenes.world import COLOURS, GROUNDS, PATTERNS, PLACES, SHAPES, SIZES, Scene

Subject = tuple[str, str]  # (colour, shape); the colour is "" where the text names none
# A text is the sequence of these tokens: words, and single marks.
TOKEN = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*|[^\sA-Za-z]")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Every sentence form of the language. `noun` is a noun phrase such as "a large red striped star".
OPENINGS = ("there are {count} shapes.", "{count} shapes appear.", "we see {count} shapes.")
PLACED = ("the {place} holds {noun}.", "{noun} occupies the {place}.", "{noun} is at the {place}.")
UNPLACED = "there is {noun}."
RELATION = "the {first} is {relation} the {second}"  # `first` and `second` are such as "red star".
BACKGROUNDS = (
    "the background is {ground} and {pattern}.",
    "a {pattern} {ground} background lies behind.",
    "the {ground} background is {pattern}.",
)
GROUND_ONLY = "the background is {ground}."
# Statements that point at nothing visible: they earn nothing and count as false positives (method, "pointable").
REMARKS = (
    "the picture has a cosy atmosphere.",
    "the scene is beautiful.",
    "this adds depth to the image.",
    "it is a lovely picture.",
    "the mood is calm.",
    "this caption describes the image.",
    "I hope this caption helps!",
)
# The same in good style: they point at nothing either, and cost no mark of language. Only what must be pointable keeps
# them out. Their words are those of other sentences, so that a vocabulary does not depend on who uses them.
ASIDES = (
    "the scene is calm.",
    "the mood is lovely.",
    "the picture is beautiful.",
    "the atmosphere is cosy.",
    "the image has depth.",
)
REMARK_TAILS = ("which adds depth to the image", "which is lovely", "giving a cosy mood")
# A scene of at most this many objects gets one relation sentence; the caption of a larger one is long enough.
RELATION_OBJECTS = 3
# The form with "is at the" takes one word more, with which six objects would take more than 64 words.
LONG_FORM_OBJECTS = 3


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def noun_phrase(shape: str, colour: str, size: str = "", texture: str = "", article: str = "a") -> str:
    """ "a large red striped star"; an empty attribute, and the texture "plain", is left unsaid."""
    words = [word for word in (size, colour, "" if texture == "plain" else texture, shape) if word]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words]) if article else " ".join(words)


def pick(options: Iterable, rng: np.random.Generator):
    """A uniform choice; much faster than `rng.choice` on a short tuple."""
    options = tuple(options)
    return options[int(rng.random() * len(options))]


def stated_relation(scene: Scene) -> tuple[Subject, str, Subject] | None:
    """The one relation that references state: the first object against the last, in small scenes alone."""
    if len(scene.objects) > RELATION_OBJECTS:
        return None
    first, last = scene.objects[0], scene.objects[-1]
    # Reading order: either the first is in a higher row, or they share the row and the first is further left.
    return first.subject, "above" if first.row < last.row else "left of", last.subject


def reference_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Sentences that state every unit of `reference_units`: count, objects in reading order, relation, background.

    At most 64 words between spaces (six textured objects); the mean over sampled scenes is about 46.
    """
    sentences = [pick(OPENINGS, rng).format(count=NUMBERS[len(scene.objects)])]
    forms = PLACED if len(scene.objects) <= LONG_FORM_OBJECTS else PLACED[:2]
    for thing in scene.objects:
        noun = noun_phrase(thing.shape, thing.colour, thing.size, thing.texture)
        sentences.append(pick(forms, rng).format(noun=noun, place=thing.place))
    if related := stated_relation(scene):
        first, relation, second = related
        if rng.random() < 0.5:
            first, relation, second = second, INVERSE[relation], first
        sentences.append(relation_text(first, relation, second) + ".")
    sentences.append(pick(BACKGROUNDS, rng).format(ground=scene.ground, pattern=scene.pattern))
    return " ".join(sentence(text) for text in sentences)


def reference_units(scene: Scene) -> list[str]:
    """The atomic facts that every reference caption of the scene states, in plain English (recall asks for these)."""
    units = [f"there are {NUMBERS[len(scene.objects)]} shapes"]
    for thing in scene.objects:
        units.append(object_text(thing.subject))
        for kind in ("size", "texture", "place"):
            if getattr(thing, kind) != "plain":
                units.append(attribute_text(thing.subject, kind, getattr(thing, kind)))
    if related := stated_relation(scene):
        units.append(relation_text(*related))
    units += [f"the background is {scene.ground}", f"the background is {scene.pattern}"]
    return units


# ---- claims ----------------------------------------------------------------------------------------------------------

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# A subject has exactly one value of these kinds, so that two different values contradict each other.
SINGLE_VALUED = frozenset({"size", "texture", "place", "count", "ground", "pattern"})


@dataclasses.dataclass(frozen=True)
class Claim:
    """One atomic statement.

    kind        subject                   value
    object      (colour, shape)           ""
    size        (colour, shape)           "small" | "large"
    texture     (colour, shape)           "plain" | "striped" | "dotted"
    place       (colour, shape)           one of world.PLACES
    relation    (subject, subject)        "left of" | "above"   ("right of" and "below" are turned round)
    count       None                      the number as a word
    ground      None                      the colour of the background
    pattern     None                      the pattern of the background
    remark      None                      the words: a statement that points at nothing
    unparsable  None                      the words: text that states nothing in this language
    """

    kind: str
    subject: Subject | tuple[Subject, Subject] | None
    value: str
    text: str = dataclasses.field(compare=False)


def subject_text(subject: Subject) -> str:
    return " ".join(word for word in subject if word)


def object_text(subject: Subject) -> str:
    return f"there is {noun_phrase(subject[1], subject[0])}"


def attribute_text(subject: Subject, kind: str, value: str) -> str:
    return f"the {subject_text(subject)} is {'at the ' if kind == 'place' else ''}{value}"


def relation_text(first: Subject, relation: str, second: Subject) -> str:
    return RELATION.format(first=subject_text(first), relation=relation, second=subject_text(second))


@functools.lru_cache(maxsize=8192)
def object_claim(subject: Subject) -> Claim:
    return Claim("object", subject, "", object_text(subject))


@functools.lru_cache(maxsize=16384)
def attribute_claim(kind: str, subject: Subject, value: str) -> Claim:
    return Claim(kind, subject, value, attribute_text(subject, kind, value))


def relation_claim(first: Subject, relation: str, second: Subject) -> Claim:
    # One direction only, so that a relation and its inverse are the same claim.
    if relation in ("right of", "below"):
        first, relation, second = second, INVERSE[relation], first
    return Claim("relation", (first, second), relation, relation_text(first, relation, second))


# ---- vocabulary ------------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every token that reference and faulty captions can hold, capitalised sentence starts included, sorted."""
    fixed = [*OPENINGS, *PLACED, UNPLACED, RELATION, *BACKGROUNDS, GROUND_ONLY, *REMARKS, *REMARK_TAILS]
    text = re.sub(r"\{\w+\}", " ", " ".join(fixed))
    slots = [*SHAPES, *COLOURS, *SIZES, "striped", "dotted", *PLACES, *GROUNDS, *PATTERNS, *NUMBERS[2:7], *INVERSE]
    words = set(TOKEN.findall(text)) | set(TOKEN.findall(" ".join(slots))) | {"an", ","}
    # Words that a sentence may begin with, also when a fault has dropped its article.
    starts = ["a", "an", "background", "striped", "dotted", "top", "middle", "bottom", "centre", *NUMBERS[2:7]]
    starts += [*SHAPES, *SIZES, *COLOURS, *GROUNDS, *PATTERNS]
    starts += [TOKEN.match(form)[0] for form in (*OPENINGS, *REMARKS, UNPLACED, RELATION) if form[0] != "{"]
    # The pronoun is never lower-case; every other start also is, by the lower-case fault.
    words |= {sentence(word) for word in starts} | {word.lower() for word in starts} - {"i"}
    return sorted(words)
