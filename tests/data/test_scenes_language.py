"""The caption English of the scenes world, written and read, and the captions with faults."""

import re
import string
import time

import numpy as np
import pytest

from balcap_jax.data.scenes.faults import MAX_TOKENS, MAX_WORDS, RATES, faulty_caption, write_caption
from balcap_jax.data.scenes.language import TOKEN, Claim, reference_caption, reference_units, vocabulary
from balcap_jax.data.scenes.reading import claim_from_unit, covers, parse
from balcap_jax.data.scenes.world import Scene, SceneObject, sample_scene

SEEDS = range(500)
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def reference(seed: int) -> tuple[Scene, str]:
    scene = sample_scene(seed)
    return scene, reference_caption(scene, np.random.default_rng(seed))


def facts(scene: Scene) -> set[tuple]:
    """What a reference states of a scene, written down from the graph and not from the language code."""
    found = {("count", None, NUMBER_WORDS[len(scene.objects)])}
    found |= {("ground", None, scene.ground), ("pattern", None, scene.pattern)}
    for one in scene.objects:
        kind = (one.colour, one.shape)
        found |= {("object", kind, ""), ("size", kind, one.size), ("place", kind, one.place)}
        if one.texture != "plain":
            found.add(("texture", kind, one.texture))
    if len(scene.objects) <= 3:
        first, last = scene.objects[0], scene.objects[-1]
        word = "left of" if first.cell // 3 == last.cell // 3 else "above"
        found.add(("relation", ((first.colour, first.shape), (last.colour, last.shape)), word))
    return found


def as_tuples(claims) -> set[tuple]:
    return {(one.kind, one.subject, one.value) for one in claims}


def findings(caption: str) -> list[str]:
    return [one.name for one in parse(caption).findings]


def texts(caption: str) -> list[str]:
    return [one.text for one in parse(caption).claims]


def test_references_read_back_as_exactly_the_facts_of_their_scene():
    for seed in SEEDS:
        scene, caption = reference(seed)
        parsed = parse(caption)
        assert as_tuples(parsed.claims) == facts(scene), caption
        assert parsed.findings == (), caption


def test_units_are_the_facts_and_every_reference_covers_them_all():
    for seed in SEEDS:
        scene, caption = reference(seed)
        units = reference_units(scene)
        assert len(units) == len(set(units)) == len(facts(scene))
        assert as_tuples(claim_from_unit(unit) for unit in units) == facts(scene)
        assert all(covers(parse(caption), unit) for unit in units), caption


def test_a_unit_is_not_covered_by_the_reference_of_a_scene_without_it():
    for seed in range(100):
        (scene, _), (other, caption) = reference(seed), reference(seed + 1)
        covered = {unit for unit in reference_units(scene) if covers(parse(caption), unit)}
        assert covered == set(reference_units(scene)) & set(reference_units(other))


def test_reference_lengths():
    words = [len(reference(seed)[1].split()) for seed in SEEDS]
    assert max(words) <= 64
    assert 44 <= np.mean(words) <= 49


def test_units_read_as_plain_english():
    scene = Scene(
        (SceneObject("star", "red", "large", "striped", 0), SceneObject("ring", "orange", "small", "plain", 4)),
        ground="grey",
        pattern="gridded",
    )
    assert reference_units(scene) == [
        "there are two shapes",
        "there is a red star",
        "the red star is large",
        "the red star is striped",
        "the red star is at the top left",
        "there is an orange ring",
        "the orange ring is small",
        "the orange ring is at the centre",
        "the red star is above the orange ring",
        "the background is grey",
        "the background is gridded",
    ]


def test_captions_are_deterministic_and_vary():
    scene = sample_scene(3)
    for write in (reference_caption, faulty_caption):
        assert write(scene, np.random.default_rng(5)) == write(scene, np.random.default_rng(5))
        assert len({write(scene, np.random.default_rng(seed)) for seed in range(20)}) > 5


def test_the_vocabulary_is_closed_small_and_the_text_follows_from_its_tokens():
    words = set(vocabulary())
    assert len(words) == len(vocabulary()) <= 160
    for seed in range(1500):
        scene, caption = reference(seed % 500)
        for text in (caption, faulty_caption(scene, np.random.default_rng([1, seed]))[0]):
            tokens = TOKEN.findall(text)
            assert words.issuperset(tokens), set(tokens) - words
            assert re.sub(r" ([.,;!])", r"\1", " ".join(tokens)) == text


@pytest.mark.parametrize(
    ("caption", "claims", "slips"),
    [
        (
            "A large red striped star is at the top left.",
            [
                "there is a red star",
                "the red star is large",
                "the red star is striped",
                "the red star is at the top left",
            ],
            ["no opening", "no background"],
        ),
        # The same content as a list: nothing is lost but the grammar.
        (
            "Red star. Large. Top left.",
            ["there is a red star", "the red star is large", "the red star is at the top left"],
            ["fragment", "fragment", "fragment", "no opening", "no background"],
        ),
        (
            "Red star, large, top left.",
            ["there is a red star", "the red star is large", "the red star is at the top left"],
            ["fragment", "no opening", "no background"],
        ),
        # Broken sentences still state what they state.
        (
            "A star large red holds the top left",
            ["there is a red star", "the red star is large", "the red star is at the top left"],
            ["missing stop", "broken", "no opening", "no background"],
        ),
        ("There four shapes.", ["there are four shapes"], ["fragment", "no background"]),
        (
            "There are two shapes. the background is grey and gridded.",
            ["there are two shapes", "the background is grey", "the background is gridded"],
            ["lower-case start"],
        ),
        (
            "There is a orange star. The star is small.",
            ["there is an orange star", "the orange star is small"],
            ["article", "choppy", "unplaced object", "no opening", "no background"],
        ),
        # Relations and their inverses are one claim.
        (
            "The red star is left of the blue ring. The blue ring is to the right of the red star.",
            ["there is a red star", "there is a blue ring", "the red star is left of the blue ring"],
            ["repeated claim", "unplaced object", "unplaced object", "no opening", "no background"],
        ),
        # A remark behind a comma leaves the sentence before it whole.
        (
            "We see two shapes, which is lovely. The background is grey.",
            ["which is lovely", "there are two shapes", "the background is grey"],
            ["remark in between"],
        ),
        ("The scene is beautiful.", ["the scene is beautiful"], ["remark at the end", "no opening", "no background"]),
        # A ground colour on an object is a claim about the object, not about the background.
        ("There is a grey star.", ["there is a grey star"], ["unplaced object", "no opening", "no background"]),
        # Several values are several claims.
        (
            "There is a red green star.",
            ["there is a green star", "there is a red star"],
            ["broken", "contradiction", "unplaced object", "no opening", "no background"],
        ),
        (
            "Two zebras dance.",
            ["two zebras dance"],
            ["fragment", "unparsable", "no opening", "no background"],
        ),
        ("", [], []),
        (" . ! ", [], []),
    ],
)
def test_reading(caption, claims, slips):
    assert texts(caption) == claims
    assert sorted(findings(caption)) == sorted(slips)


def test_order_opening_and_background_are_found():
    ring = "The centre holds a small blue ring."
    star = "The top left holds a large red star."
    opening, background = "There are two shapes.", "The background is grey and smooth."
    assert findings(" ".join([opening, star, ring, background])) == []
    assert findings(" ".join([opening, ring, star, background])) == ["order jump"]
    assert findings(" ".join([opening, star, background, ring])) == ["misplaced background"]
    assert findings(" ".join([star, opening, ring, background])) == ["late opening"]
    assert findings(" ".join([opening, star, star, ring, background])) == ["repeated sentence"]
    assert findings(" ".join([opening, star, ring, "The red star is striped.", background])) == [
        "choppy",
        "order jump",
    ]


def test_a_caption_that_contradicts_itself_states_neither_value():
    parsed = parse("There is a large red star at the top left. The red star is small.")
    assert {"the red star is large", "the red star is small"} <= {one.text for one in parsed.claims}
    assert not covers(parsed, "the red star is large")
    assert not covers(parsed, "the red star is small")
    assert covers(parsed, "there is a red star")
    assert covers(parsed, "the red star is at the top left")


def test_an_object_without_its_colour_covers_no_unit_of_a_coloured_one():
    parsed = parse("There is a large star at the top left.")
    assert Claim("size", ("", "star"), "large", "") in parsed.claims
    assert "vague object" in findings("There is a large star at the top left.")
    assert not covers(parsed, "there is a red star")
    assert not covers(parsed, "the red star is large")


def test_any_text_can_be_read():
    rng = np.random.default_rng(0)
    words = [*vocabulary(), "of the", "zebra", "é", "漢字", "\ud800", "\x00", "42", "<b>", "--", ";", "?", "\n"]
    for length in (0, 1, 2, 3, 5, 10, 30, 100):
        for _ in range(150):
            caption = " ".join(rng.choice(words, size=length))
            parsed = parse(caption)
            assert len(parsed.claims) <= 4 * length + 1
            if length and re.search(r"[A-Za-z]", caption):
                assert parsed.claims
    for _ in range(200):
        parse("".join(rng.choice(list(string.printable), size=80)))
    assert all(one.kind == "unparsable" for one in parse("zebra " * 100).claims)


def test_reading_takes_time_linear_in_the_text():
    def seconds(words: int) -> float:
        """Of this process alone, and the least of several texts: what else runs on the machine does not count."""
        times = []
        for seed in range(5):  # another text each time: what has been read is remembered
            caption = " ".join(np.random.default_rng([words, seed]).choice(vocabulary(), size=words))
            started = time.process_time()
            parse(caption)
            times.append(time.process_time() - started)
        return min(times)

    seconds(1000)
    assert seconds(40_000) < 10 * seconds(10_000)  # linear time is 4 times, quadratic would be 16 times


def test_faulty_captions_keep_within_their_limits():
    for seed in range(2000):
        caption, names = faulty_caption(sample_scene(seed), np.random.default_rng([2, seed]))
        assert 0 < len(caption.split()) <= MAX_WORDS
        assert len(TOKEN.findall(caption)) <= MAX_TOKENS
        assert set(names) <= RATES.keys()


def test_every_fault_occurs_and_some_captions_have_hardly_any():
    drawn = [faulty_caption(sample_scene(seed), np.random.default_rng([3, seed]))[1] for seed in range(2000)]
    assert {name for names in drawn for name in names} == RATES.keys()
    assert 0.08 < np.mean([len(names) <= 2 for names in drawn]) < 0.25


def test_without_faults_the_fault_model_writes_captions_that_state_all_facts():
    for seed in range(100):
        scene = sample_scene(seed)
        caption, names = write_caption(scene, {}, np.random.default_rng(seed))
        assert names == ()
        assert as_tuples(parse(caption).claims) == facts(scene)
        assert findings(caption) == []
