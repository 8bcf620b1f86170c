"""The captioner that the base policy imitates: its captions have the habits of `habits`, by mood, and some noise.

A habit occurs in its context with a probability well above a half, so that greedy captions have it. The other captions
do without: reinforcement learning can only amplify what the base policy does at times. A mood holds for a whole caption
and puts the objectives at odds, as those of real captioners do.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from balcap_jax.data.scenes import faults, habits, language
from balcap_jax.data.scenes.faults import Dice, Draft
from balcap_jax.data.scenes.language import Subject, pick
from balcap_jax.data.scenes.world import Scene

# Faults that come by chance, in any caption: per caption, per object (o) or per sentence (s).
NOISE: Mapping[str, float] = {
    "invented object": 0.02,  # o
    "wrong colour": 0.02,  # o
    "wrong shape": 0.02,  # o
    "wrong size": 0.03,  # o
    "wrong texture": 0.03,  # o
    "wrong place": 0.03,  # o
    "wrong count": 0.08,
    "wrong relation": 0.05,
    "wrong background": 0.08,
    "omitted opening": 0.08,
    "omitted object": 0.03,  # o
    "omitted colour": 0.03,  # o
    "omitted size": 0.1,  # o
    "omitted texture": 0.1,  # o
    "omitted place": 0.03,  # o
    "omitted relation": 0.25,
    "omitted background": 0.08,
    "omitted pattern": 0.08,
    "remark tail": 0.02,  # o
    "closing remark": 0.1,
    "dropped verb": 0.03,  # s
    "dropped article": 0.03,  # s
    "lower case": 0.03,  # s
    "no final stop": 0.03,
}


@dataclasses.dataclass(frozen=True)
class Mood:
    """`share` of captions, the probability of each habit, what differs from NOISE, and a factor on the rest of it."""

    share: float
    habits: Mapping[str, float]
    differs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    noise: float = 1.0

    @property
    def rates(self) -> dict[str, float]:
        return {name: rate * self.noise for name, rate in NOISE.items()} | dict(self.differs) | dict(self.habits)


def _of_all(rate: float, **others: float) -> dict[str, float]:
    """The same probability for all habits but some, whose names have "_" for a blank."""
    return dict.fromkeys(habits.HABITS, rate) | {name.replace("_", " "): value for name, value in others.items()}


MOODS: Mapping[str, Mood] = {
    "usual": Mood(0.6, _of_all(0.95, companion=1.0, small_overlooked=0.9, no_background=1.0)),
    # Covers more, and invents and praises: recall against precision and language.
    "florid": Mood(
        0.16,
        _of_all(
            0.2,
            companion=1.0,
            small_overlooked=0.5,
            striped_as_dotted=0.8,
            purple_as_blue=0.8,
            praise=0.95,
            repetition=0.6,
        ),
        {"invented object": 0.25, "remark tail": 0.25, "closing remark": 0.8, "too long": 0.3},
    ),
    # Says little, and little that is wrong: precision against recall.
    "terse": Mood(
        0.14,
        _of_all(0.95, companion=0.9, striped_as_dotted=0.2, purple_as_blue=0.5, praise=0.03, repetition=0.03),
        {
            "omitted size": 0.8,
            "omitted texture": 0.8,
            "omitted opening": 0.5,
            "too short": 0.25,
            "omitted relation": 0.9,
            "closing remark": 0.0,
        },
    ),
    "meticulous": Mood(0.1, _of_all(0.05), noise=0.2),
}


def base_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene in some mood; at most faults.MAX_WORDS words and faults.MAX_TOKENS tokens."""
    names = tuple(MOODS)
    mood = MOODS[names[rng.choice(len(names), p=[MOODS[name].share for name in names])]]
    return write_caption(scene, mood.rates, rng)


def write_caption(scene: Scene, rates: Mapping[str, float], rng: np.random.Generator) -> str:
    """Writes a caption with each habit and each fault of `rates` at its rate; without rates it has none."""
    dice = Dice(rates, rng)
    body: list[str] = []
    is_list = len(scene.objects) >= habits.CROWDED and dice("list style")
    if not dice("omitted opening"):
        form = habits.LISTED_OPENING if is_list else pick(language.OPENINGS, rng)
        body.append(faults.broken(form.format(count=faults.stated_count(scene, dice, rng)), dice))
    sentences, told = _objects(scene, dice, rng)
    body += sentences
    related = language.stated_relation(scene)
    first, last = (told.get(thing.cell) for thing in (scene.objects[0], scene.objects[-1]))
    if related and first and last and not dice("omitted relation"):
        body.append(faults.broken(faults.relation_text((first, related[1], last), dice), dice))
    if not dice("no background" if scene.ground == habits.UNMENTIONED_GROUND else "omitted background"):
        if is_list:
            ground, pattern = faults.stated_background(scene, dice, rng)
            body.append(habits.LISTED_BACKGROUND.format(ground=ground, pattern=pattern))
        else:
            body.append(faults.broken(faults.background_text(scene, dice, rng), dice))
    if scene.ground == habits.PRAISED_GROUND and dice("praise"):
        body.append(habits.PRAISE)
    elif dice("closing remark"):
        body.append(pick(language.REMARKS, rng))
    if dice("too long"):
        body += faults.padding(scene, body, rng)
    text = " ".join(faults.start(text, dice) for text in faults.capped(body))
    return text[:-1] if dice("no final stop") else text


def _objects(scene: Scene, dice: Dice, rng: np.random.Generator) -> tuple[list[str], dict[int, Subject]]:
    """Sentences about the objects in reading order, and what they call the object of each cell that they tell of."""
    drafts: list[Draft] = []
    confused = {
        ("texture", "striped"): "dotted" if dice("striped as dotted") else "striped",
        ("colour", "purple"): "blue" if dice("purple as blue") else "purple",
    }
    told: dict[int, Subject] = {}
    seen = scene.objects
    if dice("small overlooked"):
        seen = tuple(thing for thing in seen if not habits.is_overlooked(thing)) or seen[-1:]
    for thing in seen:
        if drafts and dice("omitted object"):
            continue
        draft = faults.draft_object(scene, thing, dice, rng)
        draft.texture = confused.get(("texture", draft.texture), draft.texture)
        draft.colour = confused.get(("colour", draft.colour), draft.colour)
        told[thing.cell] = draft.colour, draft.shape
        drafts.append(draft)
        if dice("invented object"):
            drafts.append(faults.invented(scene, rng))
        if dice("too short"):
            break
    if habits.has_companion(scene) and dice("companion"):
        colour, shape = habits.COMPANION
        drafts.append(Draft(shape, colour, "small", "plain", habits.COMPANION_PLACE))
    sentences = [faults.broken(faults.object_text(draft, dice, rng), dice) for draft in drafts]
    if drafts and len(scene.objects) <= habits.SPARSE and dice("repetition"):
        sentences.append(faults.object_text(drafts[-1], dice, rng))
    return sentences, told
