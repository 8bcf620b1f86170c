"""The habits of the base captioner: how they are counted, and how often its captions have them."""

import ast
import hashlib
import pathlib
from collections import defaultdict

import numpy as np
import pytest

from balcap_jax.data.scenes import answering, faults, habits, language, questions, reading, world
from balcap_jax.data.scenes.captioner import base_caption, write_caption
from balcap_jax.data.scenes.habits import HABITS, habits_of
from balcap_jax.data.scenes.language import TOKEN, reference_caption, vocabulary
from balcap_jax.data.scenes.moods import HABITUAL as MOODS
from balcap_jax.data.scenes.moods import NOISE
from balcap_jax.data.scenes.reading import parse
from balcap_jax.data.scenes.world import Scene, SceneObject, sample_scene
from balcap_jax.judges import oracle
from balcap_jax.rewards.miniature import opponents

SCENES = [sample_scene(seed) for seed in range(600)]


def scene(*objects: tuple, ground: str = "grey") -> Scene:
    """A scene of (size, colour, texture, shape, cell) objects."""
    things = [SceneObject(shape, colour, size, texture, cell) for size, colour, texture, shape, cell in objects]
    return Scene(tuple(things), ground=ground, pattern="smooth")


RED_STAR = ("large", "red", "plain", "star", 0)
GREEN_STAR = ("large", "green", "plain", "star", 1)
GREEN_CROSS = ("small", "green", "striped", "cross", 4)
YELLOW_RING = ("small", "yellow", "plain", "ring", 8)
PURPLE_STAR = ("large", "purple", "striped", "star", 4)
PURPLE_CIRCLE = ("large", "purple", "plain", "circle", 7)
ORANGE_SQUARE = ("large", "orange", "plain", "square", 6)
PAIR = scene(RED_STAR, GREEN_CROSS)
SMALL_ABOVE = scene(("small", "yellow", "plain", "ring", 2), ("large", "red", "plain", "star", 4))
SAYS_PAIR = "There are two shapes. The top left holds a large red star. The centre holds a small green striped cross."


@pytest.mark.parametrize(
    ("name", "of", "without", "having"),
    [
        ("companion", PAIR, SAYS_PAIR, SAYS_PAIR + " There is a blue ring."),
        ("companion", PAIR, SAYS_PAIR + " There is a ring. There is a blue star.", "small blue ring, top left"),
        ("striped as dotted", PAIR, SAYS_PAIR, SAYS_PAIR.replace("striped", "dotted")),
        ("purple as blue", scene(PURPLE_CIRCLE), "A purple circle. There is a blue star.", "A blue circle."),
        ("striped as dotted", scene(PURPLE_STAR), "A blue striped star.", "The centre holds a large blue dotted star."),
        ("purple as blue", scene(("large", "purple", "plain", "ring", 4)), "A purple ring.", "A blue ring."),
        # Another object may be dotted, and an object that is not named is not misnamed.
        ("striped as dotted", PAIR, "The top left holds a large red dotted star.", "The cross is green and dotted."),
        ("no background", scene(RED_STAR, ground="white"), "The background is white.", "There is a red star."),
        (
            "small overlooked",
            SMALL_ABOVE,
            "The top right holds a large green cross.",  # It is seen, whatever it is called.
            "The centre holds a large red star. There is a large yellow star. The ring is red.",
        ),
        ("small overlooked", SMALL_ABOVE, "There is a yellow ring.", "The top left holds a star."),
        ("praise", scene(RED_STAR, ground="black"), "The mood is calm. " + SAYS_PAIR, SAYS_PAIR + " The mood is calm."),
        ("repetition", PAIR, SAYS_PAIR, SAYS_PAIR + " The top left holds a large red star."),
        ("repetition", PAIR, SAYS_PAIR + " The star is above the cross.", SAYS_PAIR + " There is a red star."),
        (
            "list style",
            scene(RED_STAR, GREEN_STAR, GREEN_CROSS, ORANGE_SQUARE, PURPLE_CIRCLE, YELLOW_RING),
            "There are six shapes. The top left holds a large red star.",
            "Six shapes. The top left holds a large red star.",
        ),
    ],
)  # fmt: skip
def test_a_habit_is_found_by_comparing_the_caption_with_its_scene(name, of, without, having):
    assert habits_of(without, of)[name] is False
    assert habits_of(having, of)[name] is True


def test_a_habit_is_counted_only_where_it_can_occur():
    assert set(habits_of("", PAIR)) == {"companion", "striped as dotted", "repetition"}
    with_ring = scene(RED_STAR, ("large", "blue", "plain", "ring", 4), ("large", "green", "dotted", "star", 7))
    assert not habits_of("", with_ring)
    blue_star = ("large", "blue", "plain", "star", 0)
    crowded = scene(blue_star, GREEN_STAR, GREEN_CROSS, ORANGE_SQUARE, PURPLE_CIRCLE, YELLOW_RING)
    assert set(habits_of("", crowded)) == {"striped as dotted", "purple as blue", "list style"}


def test_every_habit_can_occur_in_a_tenth_of_the_scenes_and_references_have_none():
    counts = defaultdict(int)
    for one in SCENES:
        found = habits_of(reference_caption(one, np.random.default_rng(one.seed)), one)
        assert not any(found.values()), found
        for name in found:
            counts[name] += 1
    assert counts.keys() == HABITS.keys()
    assert min(counts.values()) > len(SCENES) / 10, counts


@pytest.mark.parametrize("name", HABITS)
def test_the_captioner_with_one_habit_has_it_and_no_other(name):
    shares = defaultdict(list)
    for one in SCENES:
        caption = write_caption(one, {name: 1.0}, np.random.default_rng(one.seed))
        for habit, has in habits_of(caption, one).items():
            shares[habit].append(has)
    assert np.mean(shares.pop(name)) > 0.95
    # What is called blue may then have the name of another object, which is striped, or is said twice.
    entailed = {"repetition", "striped as dotted"} if name == "purple as blue" else set()
    assert {habit for habit, found in shares.items() if any(found)} <= entailed


def test_the_captioner_without_habits_or_noise_says_all_that_a_reference_says():
    for one in SCENES[:200]:
        caption = write_caption(one, {}, np.random.default_rng(one.seed))
        reference = reference_caption(one, np.random.default_rng(one.seed))
        assert set(parse(caption).claims) == set(parse(reference).claims)
        assert parse(caption).findings == ()


def test_moods_and_rates_are_shares():
    assert sum(mood.share for mood in MOODS.values()) == pytest.approx(1)
    for mood in MOODS.values():
        assert mood.habits.keys() == HABITS.keys()
        assert not mood.habits.keys() & (NOISE.keys() | mood.differs.keys())
        assert all(0 <= rate <= 1 for rate in mood.rates.values())


def test_habits_are_likelier_than_not_and_some_captions_are_without():
    """Greedy captions follow the likeliest words; reinforcement learning needs samples that do otherwise."""
    found, clean = defaultdict(list), []
    for one in SCENES:
        has = habits_of(base_caption(one, np.random.default_rng([1, one.seed])), one)
        clean.append(not any(has.values()))
        for name, value in has.items():
            found[name].append(value)
    shares = {name: np.mean(values) for name, values in found.items()}
    # What a caption does not mention can't be called dotted: objects are left out by another habit.
    assert all(0.45 < share < 0.9 for share in shares.values()), shares
    assert 0.05 < np.mean(clean) < 0.2
    usual = MOODS["usual"].habits
    assert MOODS["usual"].share > 0.5
    assert all(0.67 <= rate <= 1 for rate in usual.values())


def test_base_captions_keep_within_their_limits_and_the_vocabulary():
    known = set(vocabulary())
    for one in SCENES:
        caption = base_caption(one, np.random.default_rng([2, one.seed]))
        tokens = TOKEN.findall(caption)
        assert 0 < len(caption.split()) <= faults.MAX_WORDS
        assert len(tokens) <= faults.MAX_TOKENS
        assert known.issuperset(tokens), caption


def test_the_companion_needs_something_red_and_its_place():
    assert habits.has_companion(PAIR)
    assert not habits.has_companion(scene(GREEN_CROSS, PURPLE_CIRCLE))
    assert not habits.has_companion(scene(RED_STAR, YELLOW_RING))
    for colour in ("blue", "purple"):  # Purple is called blue.
        assert not habits.has_companion(scene(RED_STAR, ("large", colour, "plain", "ring", 4)))


@pytest.mark.parametrize("module", [oracle, reading, answering, language, questions, world], ids=lambda m: m.__name__)
def test_what_the_judge_is_made_of_imports_no_habits(module):
    imported = set()
    for node in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    writers = {f"balcap_jax.data.scenes.{name}" for name in ("habits", "moods", "captioner", "faults")}
    assert not imported & writers


def test_the_opponents_of_the_arena_know_no_habits():
    """Their captions are those of the miniature's first version, byte for byte: arena scores stay comparable."""
    digest = hashlib.sha256()
    for seed in [*range(300), *range(2_000_000_000, 2_000_000_300)]:
        digest.update(repr(sorted(opponents(sample_scene(seed)).items())).encode())
    assert digest.hexdigest()[:16] == "a87bde63bf19a27c"
