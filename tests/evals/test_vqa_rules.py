"""The scoring rules of the general benchmarks against slow implementations of other kinds, and worked examples."""

import functools
import itertools
import random

import pytest

from balcap_jax.evals.vqa_rules import (
    anls,
    contains_answer,
    first_character,
    first_letter,
    infer_option,
    letter_or_prefix,
    levenshtein,
    relaxed_match,
    vqa_accuracy,
    vqa_normalised,
)

OPTIONS = {"A": "a red car", "B": "a blue van", "C": "no vehicle"}


def slow_distance(one: str, other: str) -> int:
    """Edit distance by the definition: the cheapest way to make the rest of one the rest of the other."""

    @functools.cache
    def rest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return len(one) - i + len(other) - j
        if one[i] == other[j]:
            return rest(i + 1, j + 1)
        return 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

    return rest(0, 0)


def words(rng: random.Random, letters: str, longest: int) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, longest)))


def test_edit_distance():
    rng = random.Random(0)
    for _ in range(400):
        one, other = words(rng, "ab ", 9), words(rng, "ab ", 9)
        assert levenshtein(one, other) == slow_distance(one, other), (one, other)
    long = "x" * 300 + "y"
    assert levenshtein(long, "x" * 300) == 1
    assert levenshtein("kitten", "sitting") == 3


def slow_anls(prediction: str, answers: list[str]) -> float:
    best = 0.0
    for answer in answers:
        distance = slow_distance(" ".join(prediction.lower().split()), " ".join(answer.lower().split()))
        longest = max(len(prediction), len(answer))
        best = max(best, 1 - distance / longest if longest else 1.0)
    return best if best >= 0.5 else 0.0


def test_anls_equals_its_definition_whatever_is_not_computed():
    rng = random.Random(1)
    for _ in range(400):
        prediction = words(rng, "aB  ", 10)
        answers = [words(rng, "Ab ", 10) for _ in range(rng.randint(1, 3))]
        assert anls(prediction, answers) == pytest.approx(slow_anls(prediction, answers)), (prediction, answers)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Hello", ["hello"], 1.0),
        ("hell", ["hello"], 0.8),
        ("abcd", ["abef"], 0.5),  # at the threshold
        ("abc", ["axy"], 0.0),  # 1/3 is below it
        ("a  b", ["a b"], 1.0),  # equal once normalised
        ("x", ["yyyyyyyy", "x"], 1.0),
        ("", [""], 1.0),
        ("anything", [], 0.0),
    ],
)
def test_anls_examples(prediction, answers, expected):
    assert anls(prediction, answers) == pytest.approx(expected)


def test_anls_takes_its_length_from_the_texts_as_they_are():
    assert anls("a   c", ["a b"]) == pytest.approx(1 - 1 / 5)
    assert anls("word " * 100_000, ["word"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("104", "100", True),
        ("105", "100", True),
        ("105.01", "100", False),
        ("95", "100", True),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("12%", "0.12", True),
        ("12", "12%", False),  # 12 against 0.12
        ("0", "0", True),  # compared as text
        ("0.0", "0", False),
        ("Yes", "yes", True),
        ("1,000", "1000", False),  # no number in Python's sense
        ("inf", "100", False),
        ("nan", "1", False),
        ("", "1", False),
    ],
)
def test_relaxed_accuracy(prediction, target, expected):
    assert relaxed_match(prediction, target) is expected


def test_relaxed_accuracy_of_random_numbers():
    rng = random.Random(2)
    for _ in range(500):
        target, factor = rng.choice([-1, 1]) * rng.uniform(0.1, 1000), rng.uniform(0.9, 1.1)
        if abs(abs(factor - 1) - 0.05) > 1e-6:
            inside = 0.95 < factor < 1.05
            assert relaxed_match(repr(target * factor), repr(target)) is inside


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("lets", "lets"),  # a word without its apostrophe
        ("shell", "shell"),
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("red,blue", "redblue"),  # commas go before any mark is looked at
        ("john's", "john 's"),
        ("who's", "who 's"),
        ("whos", "who's"),
        ("3.5 m.", "3.5 m"),
        ("an  old-fashioned\nhat", "old fashioned hat"),
        ("old - fashioned-hat", "old fashionedhat"),  # the scorer drops every hyphen where one stands apart
        ("none", "0"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, expected):
    assert vqa_normalised(text) == expected


def slow_vqa_accuracy(said: str, answers: list[str]) -> float:
    """Leave one person out, ten times."""
    total = 0.0
    for left_out in range(len(answers)):
        others = [answer for i, answer in enumerate(answers) if i != left_out]
        total += min(1.0, others.count(said) / 3)
    return total / len(answers)


def test_vqa_accuracy_for_every_number_of_agreeing_people():
    for same in range(11):
        answers = ["cat"] * same + [f"other{i}" for i in range(10 - same)]
        assert vqa_accuracy("The cat.", answers) == pytest.approx(slow_vqa_accuracy("cat", answers))
    # 10 people: 0, 0.3, 0.6, 0.9, 1
    assert [vqa_accuracy("x", ["x"] * n + ["y"] * (10 - n)) for n in range(5)] == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    assert vqa_accuracy("x", []) == 0.0


def test_ocrbench():
    assert contains_answer("It says STOP\nnow", ["stop now"])
    assert not contains_answer("It says stp", ["stop"])
    assert contains_answer("a + b = c", ["a+b=c"], formula=True)
    assert not contains_answer("A + b", ["a+b"], formula=True)  # the case of a formula counts
    assert contains_answer("anything", [""])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("The answer is B.", "B"),
        ("The answer is A.", "A"),
        ("I cannot say: sorry, i can't help", ""),  # refusals are the published sentences
        ("B, because of its colour, its size and its wheels", ""),  # too far from the end
        ("A or B", ""),
        ("A car is what I see", ""),  # too far from the end
        ("So a car A is", "A"),
        ("A", "A"),
        ("it is a blue van", "B"),
        ("a red car or a blue van", ""),
        ("Z", "Z"),
        ("Sorry, I can't help with images of people yet.", "Z"),
        ("no idea", ""),
        ("", ""),
        ("a blue van " * 10, ""),  # more than twice as long as all options
    ],
)
def test_option_inference(answer, expected):
    assert infer_option(answer, OPTIONS) == expected


def plain_inference(words_: list[str], options: dict[str, str]) -> str:
    """The rule for answers that are words alone, none of them an option's text, counted by hand."""
    letters = {word for word in words_ if word in options}
    if len(letters) == 1:
        (letter,) = letters
        where = min(i for i, word in enumerate(words_) if word == letter)
        if where > len(words_) - 5:
            return letter
    return ""


def test_option_inference_of_all_short_answers():
    alphabet = ["A", "B", "x"]
    for length in range(1, 8):
        for words_ in itertools.product(alphabet, repeat=length):
            assert infer_option(" ".join(words_), OPTIONS) == plain_inference(list(words_), OPTIONS), words_


def test_letters_of_the_other_benchmarks():
    assert first_letter("(C) no vehicle", OPTIONS) == "C"
    assert first_letter("I think B", OPTIONS) == ""  # The first letter is I, and no option.
    assert [first_letter(text, OPTIONS) for text in ("blue", "(b) x", " ( C", "The answer is B")] == ["B", "B", "C", ""]
    assert first_character(" b) yes", OPTIONS) == "B"
    assert first_character("The B", OPTIONS) == ""
    assert [letter_or_prefix(text, OPTIONS) for text in ("B", " B ", "B. van", "B) van", "b", "Banana", "")] == [
        "B",
        "B",
        "B",
        "",
        "B",
        "",
        "",
    ]
    for answer in ("A", "B", "C"):
        assert {rule(answer, OPTIONS) for rule in (first_letter, first_character, letter_or_prefix, infer_option)} == {
            answer
        }
