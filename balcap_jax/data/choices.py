"""Multiple-choice questions as they are asked: lettered, shuffled, and with a way to say that one cannot answer.

As in the released reward server of CapRL. A question is {"question", "choices", "answer"}; choices may bring letters
along ("A) red"), and the answer may be a letter or the text of a choice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LETTERS = "ABCDEFGHI"
MAX_OPTIONS = len(LETTERS) - 1  # beside the one that says that the caption does not tell
CANNOT_ANSWER = "The caption does not say."
_CANNOT_LETTER = "F"  # where fewer than six options come before it
Options = tuple[tuple[str, str], ...]  # (letter, text)


def lettered(question: Mapping[str, Any]) -> tuple[Options, str]:
    """The options in their own order, the one of "cannot answer" last, and the letter of the right one.

    An older such option is dropped. The answer may be a letter or an option's text; "" where it is none of them.
    """
    texts, gold = _options(question)
    return _with_letters(texts), LETTERS[gold] if gold is not None else ""


def shuffled(question: Mapping[str, Any], rng: np.random.Generator) -> tuple[Options, str]:
    """As `lettered`, in random order; one whose answer cannot be told is left as it is."""
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
    choices = [str(choice).strip() for choice in question["choices"]]
    marked = all(
        len(text) > 2 and text[0] == letter and text[1] in ").:" for letter, text in zip(LETTERS, choices, strict=False)
    )
    texts = [text[2:].strip() if marked else text for text in choices]
    answer = str(question["answer"]).strip()
    gold = texts.index(answer) if answer in texts else None
    if gold is None and answer[:1] and answer[:1] in LETTERS and answer[1:] in ("", ")", "."):
        place = LETTERS.index(answer[0])
        gold = place if place < len(texts) else None
    kept = [i for i, text in enumerate(texts) if not _is_cannot_answer(text)]
    return [texts[i] for i in kept], kept.index(gold) if gold in kept else None


def _is_cannot_answer(text: str) -> bool:
    words = " ".join(text.casefold().rstrip(".").split())
    return words in ("cannot answer", "can't answer", "cannot be determined", "none of the above") or (
        words == CANNOT_ANSWER.casefold().rstrip(".")
    )
