"""The ten general benchmarks: the rule that scores an answer, the average, and the question for a model.

    ChartQA, DocVQA, InfoVQA, TextVQA, OCRBench, MMBench, BLINK, SEED-Bench (images), MMStar, ScienceQA (images)

Unparsable answers to multiple-choice questions are wrong, and counted; nothing is drawn at random for them, as some
harnesses do.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from balcap_jax.cli.errors import UserError
from balcap_jax.evals import vqa_rules as rules
from balcap_jax.evals.engine import Item, Metric, means_of_pairs, pairs, ratio
from balcap_jax.evals.vqa_data import Question

_SHORT = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a benchmark is scored.

    score: points of a prediction, in [0, 1], and the letter read from it ("" = it names none; None = the benchmark has
    no letters). tokens: longest answer. ask: what is added to the question. average: "mean" over questions, "count" of
    right ones, "circular" over groups of rotations that are all right. by_kind: figures by `Question.kind` too, such
    as ChartQA's human and augmented, or l2-categories. letters: questions have options.
    """

    score: Callable[[Question, str], tuple[float, str | None]]
    tokens: int
    ask: str
    average: str = "mean"
    by_kind: bool = False
    letters: bool = False


def _free(rule: Callable[[str, Sequence[str]], float]) -> Callable[[Question, str], tuple[float, None]]:
    return lambda question, prediction: (float(rule(prediction, question.answers)), None)


def _choice(letter_of: Callable[[str, Mapping[str, str]], str]) -> Callable[[Question, str], tuple[float, str]]:
    def score(question: Question, prediction: str) -> tuple[float, str]:
        letter = letter_of(prediction, question.options)
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
    "mmbench": Benchmark(_choice(rules.infer_option), 16, _LETTER, average="circular", by_kind=True, letters=True),
    "blink": Benchmark(_choice(rules.first_letter), 16, _LETTER, letters=True),
    "seedbench": Benchmark(_choice(rules.first_character), 16, _LETTER, letters=True),
    "mmstar": Benchmark(_choice(rules.infer_option), 16, _LETTER, by_kind=True, letters=True),
    "scienceqa": Benchmark(_choice(rules.letter_or_prefix), 16, _LETTER, letters=True),
}


def prompt_of(benchmark: Benchmark, question: Question) -> str:
    """What a model is asked: hint, question, options by letter, and how to answer."""
    lines = [f"Hint: {question.hint}"] if question.hint else []
    lines += [question.text, *(f"{letter}. {text}" for letter, text in question.options.items())]
    return "\n".join([*lines, benchmark.ask] if benchmark.ask else lines)


_OCR_GROUP = "Text Recognition"  # OCRBench reports its six kinds of recognition as one, with 300 questions


class Answers(Metric):
    """A benchmark as a metric. Items are questions, or, with rotations, groups of them; `caption` is the prediction.

    data is [(question, prediction or None), ...]; nobody is asked. A question without a prediction is an invalid item,
    a group with one too. A judgement is {"points", "read"}, a list of each, by question.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name, self.benchmark = name, BENCHMARKS[name]
        self._kinds: list[str] = []

    def items(self, questions: Iterable[Question], predictions: Mapping[str, str]) -> list[Item]:
        groups: dict[str, list[Question]] = {}
        circular = self.benchmark.average == "circular"
        for question in questions:
            if self.benchmark.letters and not question.options:
                raise UserError(f"the question {question.id!r} has no options, which {self.name} needs")
            groups.setdefault(question.group if circular else question.id, []).append(question)
        items = []
        for name, members in groups.items():
            data = [(question, predictions.get(question.id)) for question in members]
            texts = [prediction for _, prediction in data]
            text = None if None in texts else "\n".join(texts)
            category = members[0].category
            recognition = self.name == "ocrbench" and category.endswith("Recognition") and "Expression" not in category
            items.append(Item(name, text, data, _OCR_GROUP if recognition else category))
        self._kinds = sorted({members[0].kind for members in groups.values()} - {""}) if self.benchmark.by_kind else []
        return items

    def judge(self, client: Any, items: Sequence[Item]) -> list[Mapping[str, Any]]:
        del client
        scores = [[self.benchmark.score(question, text) for question, text in item.data] for item in items]
        return [{"points": [points for points, _ in one], "read": [letter for _, letter in one]} for one in scores]

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float]:
        """(points of the item, 1, points of its questions, questions, unparsable ones, 1 if rotations are missing) and
        (points, 1) by kind."""
        each, kind = [float(one) for one in judgement["points"]], item.data[0][0].kind
        if len(each) != len(item.data) or not all(0 <= one <= 1 for one in each):
            raise ValueError(f"points of {len(item.data)} questions are {each}")
        points = float(all(one == 1.0 for one in each)) if self.benchmark.average == "circular" else float(each[0])
        lacks = self.benchmark.average == "circular" and len(each) < len(item.data[0][0].options)
        unparsable, of_kind = float(judgement["read"].count("")), pairs(self._kinds, kind, points)
        return (points, 1.0, sum(each), float(len(each)), unparsable, float(lacks), *of_kind)

    def score(self, sums: np.ndarray) -> np.ndarray:
        """x100; of OCRBench the number of right answers."""
        if self.benchmark.average == "count":
            return np.asarray(sums)[..., 0]
        return ratio(sums[..., 0], sums[..., 1])

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        figures = {"questions": float(sums[3]), "unparsable": float(sums[4])}
        kinds = {name: float(mean) for name, mean in means_of_pairs(self._kinds, sums[6:]).items()}
        figures |= {f"kind/{name}": mean for name, mean in kinds.items()}
        if self.benchmark.average == "circular":
            figures["each_rotation"] = float(ratio(sums[2], sums[3]))
            figures["fewer_rotations_than_options"] = float(sums[5])
        if self.name == "mmstar" and kinds:
            figures["mean_of_kinds"] = float(np.mean(list(kinds.values())))  # what lmms-eval reports
        return figures
