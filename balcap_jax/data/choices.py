"""Multiple-choice questions in the form in which models see them: lettered, shuffled, with "cannot answer" as a choice.

The form is that of the released reward server of CapRL. A question is {"question", "choices", "answer"}. Choices may
have letters of their own ("A) red"), and the answer may be a letter or the text of a choice.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LETTERS = "ABCDEFGHI"
MAX_OPTIONS = len(LETTERS) - 1  # beside CANNOT_ANSWER
CANNOT_ANSWER = "The caption does not say."
_CANNOT_LETTER = "F"  # where fewer than six options come before it
_MARK = re.compile(r"\(?([A-Ia-i])\s*(?:[).:]|-\s)\s*")  # "A) ", "(A) ", "a. ", "A - "
_CANNOT = re.compile(
    r"(i |it )?(cannot|can not|can't) (be )?(answer(ed)?|determined?|told|say|tell)( this question)?"
    r"( (from|based on|with) (the|this) (caption|description|text|image))?|not enough information|unanswerable"
    r"|none of the above"
)
Options = tuple[tuple[str, str], ...]  # (letter, text)


def lettered(question: Mapping[str, Any]) -> tuple[Options, str]:
    """The options in their own order with "cannot answer" as the last, and the letter of the right one.

    A "cannot answer" among the choices is dropped. The letter is "" where the answer is no option.
    """
    texts, gold = _options(question)
    return _with_letters(texts), LETTERS[gold] if gold is not None else ""


def shuffled(question: Mapping[str, Any], rng: np.random.Generator) -> tuple[Options, str]:
    """As `lettered`, in random order; a question whose answer is no option keeps its order."""
    texts, gold = _options(question)
    if gold is None:
        return lettered(question)
    order = [int(i) for i in rng.permutation(len(texts))]
    return _with_letters([texts[i] for i in order]), LETTERS[order.index(gold)]


def _with_letters(texts: Sequence[str]) -> Options:
    last = _CANNOT_LETTER if len(texts) < LETTERS.index(_CANNOT_LETTER) + 1 else LETTERS[len(texts)]
    return (*zip(LETTERS, texts, strict=False), (last, CANNOT_ANSWER))


def _options(question: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """Texts of the options without letters and without "cannot answer", and which of them is right."""
    choices = [" ".join(str(choice).split()) for choice in question["choices"]]
    marks = [_MARK.match(text) for text in choices]
    marked = all(mark and mark[1].upper() == letter for letter, mark in zip(LETTERS, marks, strict=False))
    texts = [text[mark.end() :] if marked else text for text, mark in zip(choices, marks, strict=True)]
    answer = " ".join(str(question["answer"]).split())
    gold = next((options.index(answer) for options in (texts, choices) if answer in options), None)
    letter = _MARK.fullmatch(answer) or re.fullmatch(r"\(?([A-Ia-i])", answer)
    if gold is None and letter:
        place = LETTERS.index(letter[1].upper())
        gold = place if place < len(texts) else None
    remaining = [i for i, text in enumerate(texts) if not _is_cannot_answer(text)]
    return [texts[i] for i in remaining], remaining.index(gold) if gold in remaining else None


def _is_cannot_answer(text: str) -> bool:
    words = " ".join(text.casefold().rstrip(".").split())
    return bool(_CANNOT.fullmatch(words)) or words == CANNOT_ANSWER.casefold().rstrip(".")
