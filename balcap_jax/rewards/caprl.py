"""CapRL (arXiv 2509.22647): a caption is as good as the questions that a reader of it alone can answer.

Drawing, shuffling and parsing are those of the released reward server; see `data.choices` and `first_letter`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from balcap_jax.data.choices import LETTERS, lettered, shuffled
from balcap_jax.judges.schema import ChoiceQuestion, Failure
from balcap_jax.rewards.base import RewardFn, Samples, Scored, Scores, ask_kinds, collect


class CaprlReward(RewardFn):
    """K = 1: the share of `settings["draws"]` questions, drawn with replacement, that are answered rightly.

    0 draws ask every question once, with its options in their own order. The draws depend on the run's seed, the
    example, the place in the group and the caption alone: a resumed run asks the same.
    """

    names: tuple[str, ...] = ("accuracy",)
    gated: tuple[bool, ...] = (False,)
    needs: tuple[str, ...] = ("questions",)
    asks: tuple[str, ...] = ("choice",)

    def __call__(self, samples: Samples) -> Scores:
        """A detail holds "answers", [{"question", "answer", "right"}]. Calls that failed are left out of the mean; the
        value is missing where more than half of them did, or where an example has no questions."""
        draws = [self._draw(samples, b, g) for b, g in samples.where]
        asked = [
            samples.asked("choice", b, g, question)
            for (b, g), each in zip(samples.where, draws, strict=True)
            for question, _ in each
        ]
        answers = iter(ask_kinds(self.judge, choice=asked)[0])
        verdicts = [[(question, gold, next(answers)) for question, gold in each] for each in draws]
        scored = [
            [score_answers(each, samples.example_ids[b])] for (b, _), each in zip(samples.where, verdicts, strict=True)
        ]
        return collect(self, samples, scored, self.judge)

    def _draw(self, samples: Samples, b: int, g: int) -> list[tuple[ChoiceQuestion, str]]:
        """(question, letter of its answer) for one caption."""
        draws, seed = self.settings.get("draws", 8), self.settings.get("seed", 0)
        questions, caption = json.loads(samples.metadata[b].get("questions") or "[]"), samples.captions[b][g]
        if not draws:
            return [_ask(caption, question, *lettered(question)) for question in questions]
        if not questions:
            return []
        parts = (str(seed), samples.example_ids[b], str(g), caption)
        digest = hashlib.blake2b("\x1f".join(parts).encode(errors="replace"), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        indices = rng.integers(len(questions), size=draws)
        return [_ask(caption, questions[m], *shuffled(questions[m], rng), draw=k) for k, m in enumerate(indices)]


def _ask(caption: str, question: Mapping[str, Any], options, gold: str, draw: int = 0) -> tuple[ChoiceQuestion, str]:
    return ChoiceQuestion(caption, question["question"], options, draw, question.get("query")), gold


def first_letter(answer: str) -> str:
    """The first character of the answer that is one of A to I; "" where there is none."""
    return next((character for character in answer if character in LETTERS), "")


def score_answers(verdicts: Sequence[tuple[ChoiceQuestion, str, Any]], example_id: str) -> Scored:
    """The share of right answers; an answer without a letter is wrong.

    The value is missing where more than half of the draws failed: the rest would be mostly chance.
    """
    if not verdicts:
        return Failure(f"example {example_id} has no questions"), {}
    failures = [verdict for _, _, verdict in verdicts if isinstance(verdict, Failure)]
    if 2 * len(failures) > len(verdicts):
        return failures[0], {}
    answers = [
        {"question": question.question, "answer": (letter := first_letter(verdict.answer)), "right": letter == gold}
        for question, gold, verdict in verdicts
        if not isinstance(verdict, Failure)
    ]
    parts: dict[str, Any] = {"answers": answers} | ({"failed_draws": failures[0].reason} if failures else {})
    return sum(answer["right"] for answer in answers) / len(answers), parts
