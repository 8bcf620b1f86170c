"""Where in a caption its judge's assertions stand: the caption's text in pieces, each with what was said about it.

Judges rephrase: "there is a green circle" and "the green circle is at the top left" stand for one sentence.
An assertion is found by its words, in the sentence that has most of them. It is given the words that no earlier
assertion took, so that a wrong place is marked apart from the object that is there.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from balcap_jax.judges.schema import Assertion

GOOD, BAD, VAGUE = "good", "bad", "vague"  # verified; not verified; not pointable, whoever verified it
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?;]+(?=\s|$)|\n+")
# Words that say nothing of which part of a sentence is meant.
_LIGHT = frozenset(
    _WORD.findall("""a an the this that these those there here it its is are was were be been being has have had with
    of in on at to by for from as and or but some any image picture photo scene shows show appears appear seen can
    we see""")
)
_LEAST_SHARE = 0.5  # of an assertion's words: one that shares fewer with each sentence is not placed


class Piece(NamedTuple):
    """A part of a caption's text; where an assertion is about it, the `kind` of that one.

    `number` is the assertion's, from 1, and 0 in the second and further pieces of one.
    """

    text: str
    kind: str = ""
    number: int = 0


def kind_of(assertion: Assertion) -> str:
    """One of GOOD, BAD and VAGUE."""
    if not assertion.pointable:
        return VAGUE
    return GOOD if assertion.verified else BAD


def _stem(word: str) -> str:
    word = word.casefold().removesuffix("'s").removesuffix("’s")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _content(text: str) -> set[str]:
    words = {_stem(match.group()) for match in _WORD.finditer(text)}
    return words - _LIGHT or words


def pieces(caption: str, assertions: Sequence[Assertion] | None) -> list[Piece]:
    """The caption in order; the texts of all pieces together are the caption."""
    words = [(match.start(), match.end(), _stem(match.group())) for match in _WORD.finditer(caption)]
    if not assertions or not words:
        return [Piece(caption)]
    ends = [match.start() for match in _SENTENCE_END.finditer(caption)] + [len(caption)]
    sentences: list[list[int]] = [[] for _ in ends]
    at = 0
    for index, (start, _, _) in enumerate(words):
        while start > ends[at]:
            at += 1
        sentences[at].append(index)
    stems = [{words[index][2] for index in sentence} for sentence in sentences]
    owner = [0] * len(words)
    for number, assertion in enumerate(assertions, 1):
        wanted = _content(assertion.text)
        found = [len(wanted & stem) for stem in stems]
        most = max(found)
        if most == 0 or most < _LEAST_SHARE * len(wanted):
            continue
        # Of equal sentences the first in which something is left to take.
        free = [[i for i in sentence if not owner[i] and words[i][2] in wanted] for sentence in sentences]
        best = max(range(len(sentences)), key=lambda place: (found[place] == most, len(free[place]) > 0, -place))
        taken: set[str] = set()
        for index in free[best]:
            if words[index][2] not in taken:  # Each word once: a second one is another assertion's.
                owner[index] = number
                taken.add(words[index][2])
    return _joined(caption, words, owner, assertions)


def _joined(
    caption: str, words: Sequence[tuple[int, int, str]], owner: Sequence[int], assertions: Sequence[Assertion]
) -> list[Piece]:
    """Neighbouring words of one assertion, and what stands between them, are one piece."""
    spans: list[list[int]] = []  # start, end, number
    for (start, end, _), number in zip(words, owner, strict=True):
        if not number:
            continue
        between = _WORD.findall(caption[spans[-1][1] : start]) if spans else []
        if spans and spans[-1][2] == number and all(_stem(word) in _LIGHT for word in between):
            spans[-1][1] = end
        else:
            spans.append([start, end, number])
    result, at, seen = [], 0, set()
    for start, end, number in spans:
        if start > at:
            result.append(Piece(caption[at:start]))
        result.append(Piece(caption[start:end], kind_of(assertions[number - 1]), 0 if number in seen else number))
        seen.add(number)
        at = end
    return [*result, Piece(caption[at:])] if at < len(caption) else result
