"""Writes the captions that the base policy imitates: habits of `habits` and faults of `faults`, by the rates of a mood.

A habit occurs in its context with a probability well above a half, so that greedy captions have it. The other captions
do without: reinforcement learning can only amplify what the base policy does at times. Moods put the objectives at
odds, as those of real captioners do.
"""

from collections.abc import Mapping

import numpy as np

from balcap_jax.data.scenes import faults, habits, language
from balcap_jax.data.scenes.faults import Dice, Draft
from balcap_jax.data.scenes.language import Subject, pick
from balcap_jax.data.scenes.moods import CAPTIONERS
from balcap_jax.data.scenes.world import Scene


def base_caption(scene: Scene, rng: np.random.Generator, captioner: str = "habits") -> str:
    """A caption of the scene in some mood of the `captioner`, one of CAPTIONERS.

    It has at most faults.MAX_WORDS words and faults.MAX_TOKENS tokens.
    """
    moods = tuple(CAPTIONERS[captioner].values())
    mood = moods[rng.choice(len(moods), p=[mood.share for mood in moods])]
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
    if "padding" in rates:  # Others must draw as many numbers as ever: their captions are a part of results.
        body += _padding(dice)
    if scene.ground == habits.PRAISED_GROUND and dice("praise"):
        body.append(habits.PRAISE)
    elif dice("closing remark"):
        body.append(pick(language.REMARKS, rng))
    if dice("too long"):
        body += faults.padding(scene, body, rng)
    text = " ".join(faults.start(text, dice) for text in faults.capped(body))
    return text[:-1] if dice("no final stop") else text


def _padding(dice: Dice) -> list[str]:
    """The first of the ASIDES, each at the rate "more padding" after the one before it.

    They have one order: of several, none would be likelier than the end of the caption.
    """
    asides: list[str] = []
    for text in language.ASIDES:
        if not dice("more padding" if asides else "padding"):
            break
        asides.append(text)
    return asides


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
