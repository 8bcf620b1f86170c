"""The ten general benchmarks: which rule scores an answer, what is averaged, and what is asked of a model.

    ChartQA, DocVQA, InfoVQA, TextVQA, OCRBench, MMBench, BLINK, SEED-Bench (images), MMStar, ScienceQA (images)

Unparsable answers to multiple-choice questions are wrong, and counted; nothing is drawn at random for them, as some
harnesses do.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from balcap_jax.evals import vqa_rules as rules
from balcap_jax.evals.vqa_data import Question

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a benchmark is scored.

    score: points of a prediction, in [0, 1], and what was read from it ("" = a letter could not be told; None = there
    is nothing to read). tokens: longest answer. ask: what is added to the question. average: "mean" over questions,
    "count" of right ones, "circular" over groups of rotations that are all right, "categories" the mean of the
    categories' means (lmms-eval's MMStar). by: the field of a question that categories are, besides its own.
    """

    score: Callable[[Question, str], tuple[float, str | None]]
    tokens: int
    ask: str
    average: str = "mean"
    by_kind: bool = False


def _free(rule: Callable[[str, Sequence[str]], float]) -> Callable[[Question, str], tuple[float, None]]:
    return lambda question, prediction: (float(rule(prediction, question.answers)), None)


def _choice(read: Callable[[str, Mapping[str, str]], str]) -> Callable[[Question, str], tuple[float, str]]:
    def score(question: Question, prediction: str) -> tuple[float, str]:
        letter = read(prediction, question.options)
        return float(letter == question.answers[0]), letter

    return score


def _relaxed(prediction: str, answers: Sequence[str]) -> bool:
    return any(rules.relaxed_match(prediction, answer) for answer in answers)


def _contained(question: Question, prediction: str) -> tuple[float, None]:
    formula = "hme100k" in question.kind.lower() or "handwritten mathematical" in question.category.lower()
    return float(rules.contains_answer(prediction, question.answers, formula=formula)), None


BENCHMARKS: dict[str, Benchmark] = {
    "chartqa": Benchmark(_free(_relaxed), 16, _SHORT, by_kind=True),
    "docvqa": Benchmark(_free(rules.anls), 32, _SHORT),
    "infovqa": Benchmark(_free(rules.anls), 32, _SHORT),
    "textvqa": Benchmark(_free(rules.vqa_accuracy), 16, _SHORT),
    "ocrbench": Benchmark(_contained, 128, "", average="count"),
    "mmbench": Benchmark(_choice(rules.infer_option), 16, _LETTER, average="circular", by_kind=True),
    "blink": Benchmark(_choice(rules.first_letter), 16, _LETTER),
    "seedbench": Benchmark(_choice(rules.first_character), 16, _LETTER),
    "mmstar": Benchmark(_choice(rules.infer_option), 16, _LETTER, by_kind=True),
    "scienceqa": Benchmark(_choice(rules.letter_or_prefix), 16, _LETTER),
}


def prompt_of(benchmark: Benchmark, question: Question) -> str:
    """What a model is asked: hint, question, options by letter, and how to answer."""
    lines = [f"Hint: {question.hint}"] if question.hint else []
    lines += [question.text, *(f"{letter}. {text}" for letter, text in question.options.items())]
    return "\n".join([*lines, benchmark.ask] if benchmark.ask else lines)


@dataclasses.dataclass(frozen=True)
class Scored:
    """One question's points; `read` as in `Benchmark.score`, `answered` False where there was no prediction."""

    id: str
    group: str
    category: str
    kind: str
    points: float
    read: str | None
    answered: bool = True


def score(benchmark: Benchmark, question: Question, prediction: str | None) -> Scored:
    """The points of one prediction; a question without one has none, and is counted."""
    points, read = (0.0, None) if prediction is None else benchmark.score(question, prediction)
    return Scored(question.id, question.group, question.category, question.kind, points, read, prediction is not None)


def units(benchmark: Benchmark, scored: Iterable[Scored]) -> list[tuple[Scored, float]]:
    """What is averaged: (a question, its points), or with rotations (the first of a group, whether all are right)."""
    if benchmark.average != "circular":
        return [(one, one.points) for one in scored]
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.group, []).append(one)
    return [(members[0], float(all(one.points == 1.0 for one in members))) for members in groups.values()]


def aggregate(benchmark: Benchmark, scored: Sequence[Scored]) -> dict[str, Any]:
    """{"score", "n", "questions", "unparsable", "unanswered", "categories", and for some "kinds", "circular_free"}.

    Scores are x100, of OCRBench the number of right answers. Unparsable and unanswered questions are in the mean,
    as wrong.
    """
    averaged = units(benchmark, scored)
    points = [value for _, value in averaged]
    count = benchmark.average == "count"
    result: dict[str, Any] = {
        "score": (sum(points) if count else 100.0 * _mean(points)),
        "n": len(averaged),
        "questions": len(scored),
        "unparsable": sum(one.answered and one.read == "" for one in scored),
        "unanswered": sum(not one.answered for one in scored),
        "categories": _by(averaged, lambda one: one.category, count),
    }
    if benchmark.by_kind:
        result["kinds"] = _by(averaged, lambda one: one.kind, count)
    if benchmark.average == "circular":
        result["each_rotation"] = 100.0 * _mean([one.points for one in scored])
    if benchmark is BENCHMARKS["mmstar"]:
        means = [one["score"] for one in result["kinds"].values()]
        result["mean_of_kinds"] = _mean(means)
    return result


def _by(averaged: Sequence[tuple[Scored, float]], key: Callable[[Scored], str], count: bool) -> dict[str, Any]:
    parts: dict[str, list[float]] = collections.defaultdict(list)
    for one, value in averaged:
        parts[key(one)].append(value)
    return {
        name: {"score": sum(values) if count else 100.0 * _mean(values), "n": len(values)}
        for name, values in sorted(parts.items())
        if name
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
