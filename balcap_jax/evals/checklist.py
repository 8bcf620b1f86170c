"""Checklists (CAPEval): yes/no questions about a picture, answered from its caption alone (3.8).

Coverage is the share of questions that the caption answers at all. Precision is the share of these that it answers with
yes, which is right for the picture.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl
from balcap_jax.evals.engine import Item, Metric, ratio
from balcap_jax.evals.inputs import Texts
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.types import Ask

CHECKLIST = "checklist.v1"
_REMEDY = '--checklists takes CAPEval\'s lines, or {"id", "items": [{"kind", "question"}, ...]}'


# Keys of cached answers hold the names of these two: a rename would ask the judge anew.
class _One(pydantic.BaseModel):
    question: int
    why: str
    answer: Literal["yes", "no", "not_mentioned"]


class _Answers(pydantic.BaseModel):
    answers: list[_One]


class Checklist(Metric):
    """Items are pictures, with data [(kind, question), ...]; the score is precision, coverage is another figure.

    A judgement is {"answers": {number from 1, as text: answer}}; a question that the judge left out is "not_mentioned".
    """

    name = "checklist"
    prompts = (CHECKLIST,)
    max_tokens = 4096
    _kinds: Sequence[str] = ()

    def items(self, captions: Mapping[str, str], checklists: Path) -> list[Item]:
        items, texts = [], Texts.of(captions)
        for where, line in read_jsonl(checklists, _REMEDY):
            questions = line.get("items", _published(line))
            if not isinstance(line.get("id"), str) or not isinstance(questions, list) or not questions:
                raise UserError(f"{where} is no checklist; {_REMEDY}")
            try:
                data = [(str(one.get("kind", "")), one["question"]) for one in questions]
                if not all(isinstance(question, str) for _, question in data):
                    raise TypeError
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{where} has an item without a question; {_REMEDY}") from error
            picture = str(line.get("image", line.get("img_path", "")))
            items.append(Item(line["id"], texts.find(line["id"], picture), data))
        self._kinds = sorted({kind for item in items for kind, _ in item.data})
        return items

    def question(self, item: Item) -> Ask:
        messages = prompts.render(CHECKLIST, caption=item.caption, questions=[text for _, text in item.data])
        return Ask(CHECKLIST, messages, _Answers, self.max_tokens)

    def judgement(self, item: Item, answer: _Answers) -> dict[str, Any]:
        return {"answers": {str(one.question): one.answer for one in answer.answers}}

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float]:
        """(yes, no, questions) of all kinds together, then of each."""
        answers = judgement["answers"]
        sums = {kind: [0.0, 0.0, 0.0] for kind in ["", *self._kinds]}
        for number, (kind, _) in enumerate(item.data, start=1):
            answer = answers.get(str(number), "not_mentioned")
            if answer not in ("yes", "no", "not_mentioned"):
                raise ValueError(f"answer {answer!r}")
            for total in {"", kind}:
                sums[total][0] += answer == "yes"
                sums[total][1] += answer == "no"
                sums[total][2] += 1
        return [value for kind in ["", *self._kinds] for value in sums[kind]]

    def score(self, sums: np.ndarray) -> np.ndarray:
        return ratio(sums[..., 0], sums[..., 0] + sums[..., 1])

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        figures = {"coverage": float(ratio(sums[0] + sums[1], sums[2])), "questions": float(sums[2])}
        for k, kind in enumerate(self._kinds, start=1):
            if kind:
                yes, no, total = sums[3 * k : 3 * k + 3]
                figures[f"coverage/{kind}"] = float(ratio(yes + no, total))
                figures[f"precision/{kind}"] = float(ratio(yes, yes + no))
        return figures


def _published(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Items of a line as CAPEval publishes them: "KIND_checklist": [{"Tags", "Question"}, ...] for each kind."""
    lists = {key.removesuffix("_checklist"): value for key, value in line.items() if key.endswith("_checklist")}
    return [
        {"kind": kind, "question": one["Question"]}
        for kind, listed in lists.items()
        if isinstance(listed, list)
        for one in listed
        if isinstance(one, dict) and isinstance(one.get("Question"), str)
    ]
