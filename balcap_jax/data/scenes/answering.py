"""Answers questions about a scene from what a caption states, and from nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.data.scenes.language import NUMBERS, Subject
from balcap_jax.data.scenes.reading import Parsed
from balcap_jax.data.scenes.world import PLACES

_PLAIN = "plain"  # the texture of an object whose place is stated without one


def answer_from(parsed: Parsed, query: Mapping[str, Any], choices: Sequence[str]) -> str | None:
    """The choice that the caption states; None where it states none of them, or more than one.

    `query` is that of a question of `questions.questions`.
    """
    answers = set(_answers(parsed, query, choices))
    return answers.pop() if len(answers) == 1 else None


def _answers(parsed: Parsed, query: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    ask = query["ask"]
    if ask == "background":
        return [claim.value for claim in parsed.claims if claim.kind == query["value"]]
    if ask == "count":
        return _counts(parsed, query["value"])
    if ask == "place":
        return _values(parsed, "place", _kind(query["object"]))
    if ask == "relation":
        return _relations(parsed, _kind(query["object"]), _kind(query["other"]), choices)
    subjects = [claim.subject for claim in parsed.claims if claim.kind == "place" and claim.value == query["place"]]
    if ask in ("colour", "shape"):
        return [value for subject in subjects if (value := subject[ask == "shape"])]
    values = [value for subject in subjects for value in _values(parsed, ask, subject)]
    return values or ([_PLAIN] if ask == "texture" and subjects else [])


def _kind(thing: Mapping[str, str]) -> Subject:
    return thing["colour"], thing["shape"]


def _values(parsed: Parsed, kind: str, subject: Subject) -> list[str]:
    return [claim.value for claim in parsed.claims if claim.kind == kind and claim.subject == subject]


def _counts(parsed: Parsed, value: str) -> list[str]:
    """The number that the caption states; else that of the objects that it names, where it names any."""
    if value == "object" and (stated := [claim.value for claim in parsed.claims if claim.kind == "count"]):
        return [str(NUMBERS.index(word)) for word in stated]
    named = [claim.subject for claim in parsed.claims if claim.kind == "object"]
    count = sum(value == "object" or value in subject for subject in named)
    return [str(count)] if count else []


def _relations(parsed: Parsed, first: Subject, second: Subject, choices: Sequence[str]) -> list[str]:
    """Which of "above" and "below", or of "left" and "right" is stated, or follows from the stated places."""
    forward, backward, relation = ("above", "below", "above") if "above" in choices else ("left", "right", "left of")
    stated = [claim.subject for claim in parsed.claims if claim.kind == "relation" and claim.value == relation]
    answers = [forward for pair in stated if pair == (first, second)]
    answers += [backward for pair in stated if pair == (second, first)]
    places = [_values(parsed, "place", subject) for subject in (first, second)]
    if answers or not all(len(values) == 1 for values in places):
        return answers
    cells = [PLACES.index(values[0]) for values in places]
    position, other = (cell // 3 if relation == "above" else cell % 3 for cell in cells)
    return [forward] if position < other else [backward] if position > other else []
