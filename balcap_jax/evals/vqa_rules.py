"""When an answer to a question about a picture is right: the rules of the published benchmarks, quirks included.

Sources: EvolvingLMMs-Lab/lmms-eval, commit 75571cf, and for MMStar and MMBench open-compass/VLMEvalKit, e8e78f0.
Neither strips blanks from a reference before it compares texts. docs/evaluation.md names the functions.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence

RELAXED_TOLERANCE = 0.05  # ChartQA: of the target
ANLS_THRESHOLD = 0.5
AGREEING = 3  # TextVQA: people who must have given an answer for it to be wholly right
_LAST_TOKENS = 4  # among which VLMEvalKit looks for a letter: index > length - 5
REFUSED = "Z"  # VLMEvalKit's letter of an answer that refuses


# ---- ChartQA ---------------------------------------------------------------------------------------------------------


def relaxed_match(prediction: str, target: str) -> bool:
    """ChartQA's relaxed accuracy: numbers within 5% of the target, other answers equal but for case.

    "12%" is 0.12. A target of 0, and an answer that is no number, are compared as text, blanks at the ends included.
    """
    predicted, expected = _number(prediction), _number(target)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


# ---- DocVQA, InfoVQA -------------------------------------------------------------------------------------------------


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest answer, in [0, 1]; below 0.5 it is 0 (Biten et al. 2019).

    Distances are those of the lower-case texts with single spaces, lengths those of the whole texts in capitals.
    """
    best = max((_similarity(prediction, answer) for answer in answers), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(prediction: str, answer: str) -> float:
    longest = max(len(prediction.upper()), len(answer.upper()))  # "ß" in capitals has two letters.
    if not longest:
        return 1.0
    one, other = (" ".join(text.lower().split()) for text in (prediction, answer))
    # The distance is at least the difference of the lengths; beyond this one no distance reaches the threshold.
    if abs(len(one) - len(other)) > (1 - ANLS_THRESHOLD) * longest:
        return 0.0
    return 1.0 - levenshtein(one, other) / longest


def levenshtein(one: str, other: str) -> int:
    """Edit distance by bit-vectors (Myers 1999, in Hyyro's form): one step of long integers for each character.

    Bit i of `up` says that the table grows from row i to row i + 1 of the current column; of `down`, that it shrinks.
    """
    if not one:
        return len(other)
    positions: dict[str, int] = {}
    for i, character in enumerate(one):
        positions[character] = positions.get(character, 0) | 1 << i
    full, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    up, down, distance = full, 0, len(one)
    for character in other:
        matches = positions.get(character, 0)
        diagonal = (((matches & up) + up) ^ up) | matches | down
        grows, shrinks = (down | ~(diagonal | up)) & full, up & diagonal
        distance += bool(grows & last) - bool(shrinks & last)
        grows = grows << 1 | 1
        up, down = (shrinks << 1 | ~(diagonal | grows)) & full, grows & diagonal & full
    return distance


# ---- TextVQA ---------------------------------------------------------------------------------------------------------

_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
_ARTICLES = ("a", "an", "the")
# Forms that the scorer restores where an apostrophe is missing. It leaves out forms that are words without it: he'll,
# she'll, we'll, it's, let's, we'd, she'd. It restores what ends in 's, and yet splits what came with its apostrophe.
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
_RESTORED = {
    form[:i] + form[i + 1 :]: form
    for form in _CONTRACTED.split()
    for i, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the scorer
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = int(re.UNICODE)  # dropped at most: the scorer gives the flag where the count belongs


def vqa_normalised(text: str) -> str:
    """An answer as the VQA scorer compares it: lower case, without punctuation and articles, numbers as digits."""
    # Commas go before all other marks, so that "a, b" is apart and "a,b" is one word; "'s" becomes a word.
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        # The scorer looks at the original text, and replaces in the changed one.
        apart = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if apart else " ")
    spaced = _FULL_STOP.sub("", spaced, count=_FULL_STOPS)
    words = (_NUMBERS.get(word, word) for word in spaced.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy: min(1, n/3) with n people who agree, averaged over leaving out each of the 10 people."""
    if not answers:
        return 0.0
    normalised, others = vqa_normalised(prediction), [vqa_normalised(answer) for answer in answers]
    same = sum(other == normalised for other in others)
    return math.fsum(min(1.0, (same - (other == normalised)) / AGREEING) for other in others) / len(others)


# ---- OCRBench --------------------------------------------------------------------------------------------------------


_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}  # "１" is "1"


def contains_answer(prediction: str, answers: Sequence[str], *, formula: bool = False) -> bool:
    """OCRBench: the prediction holds an answer, in lower case and half-width characters; a `formula` (HME100k) as it
    is, without spaces. Every prediction holds an empty answer."""
    text, *expected = (_formula(text) if formula else _folded(text) for text in (prediction, *answers))
    return any(answer in text for answer in expected)


def _formula(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")


def _folded(text: str) -> str:
    return text.translate(_HALF_WIDTH).lower().strip().replace("\n", " ")


# ---- multiple choice -------------------------------------------------------------------------------------------------

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# Cells that pandas, which reads VLMEvalKit's tables, takes for missing: no answer chooses an option "None" there.
_MISSING = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
_MISSING |= {"NULL", "NaN", "None", "n/a", "nan", "null"}
_NO_ANSWER = "Failed to obtain answer via API"  # VLMEvalKit's own text in place of an answer
_STATED = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)
_LETTER = re.compile(r"[(\s]*([A-Z])", re.IGNORECASE)


def infer_option(answer: str, options: Mapping[str, str]) -> str:
    """The letter that an answer names, as VLMEvalKit infers it; REFUSED of a refusal, "" where it names none.

    It takes the letter of one option alone among the words, whose first place is within the last four of them. Else it
    takes the letter behind "answer is", of a word too ("the answer is blue" is B). Else it takes the one option whose
    text is in an answer that is at most twice as long as all options together. An article "A" is a letter too.
    """
    options = {letter: text for letter, text in options.items() if text not in _MISSING}
    if _NO_ANSWER not in answer and (letter := _named_option(answer, options)):
        return letter
    lower = answer.lower()
    if len(lower) <= 2 * sum(len(text) for text in options.values()):
        contained = [letter for letter, text in options.items() if text.lower() in lower]
        if len(contained) == 1:
            return contained[0]
    return ""


def _named_option(answer: str, options: Mapping[str, str]) -> str:
    if any(phrase in answer for phrase in _REFUSALS):
        return REFUSED
    words = answer.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_TOKENS:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    stated = _STATED.search(answer)
    return stated[1].upper() if stated and stated[1].upper() in options else ""


def first_letter(answer: str, options: Mapping[str, str]) -> str:
    """BLINK (lmms-eval): the first letter of the answer, of a word too, behind brackets; "" where it is no option."""
    letter = _LETTER.match(answer.strip())
    return letter[1].upper() if letter and letter[1].upper() in options else ""


def first_character(answer: str, options: Mapping[str, str]) -> str:
    """SEED-Bench (lmms-eval): the first character of the answer; "" where it is no option."""
    return _either_case(answer.strip()[:1], options)


def letter_or_prefix(answer: str, options: Mapping[str, str]) -> str:
    """ScienceQA (lmms-eval): the letter alone, or a capital letter and a full stop at the beginning; otherwise ""."""
    text = answer.strip()
    return _either_case(text[:1] if text[:1].isupper() and text[1:2] == "." else text, options)


def _either_case(text: str, options: Mapping[str, str]) -> str:
    return next((letter for letter in options if letter.lower() == text.lower()), "")


LETTERS = string.ascii_uppercase
