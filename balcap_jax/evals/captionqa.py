"""CaptionQA: how many multiple-choice questions about a picture its caption answers (3.2).

Source: bronyayang/CaptionQA, commit f729489, qa.py.
"""

import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_or_jsonl
from balcap_jax.evals.engine import Item, Metric, mean_of_known, means_of_pairs, pairs, ratio
from balcap_jax.evals.inputs import Texts, read_document
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.types import Ask

LETTERS = string.ascii_uppercase
CANNOT_ANSWER = "The caption does not say."
BONUS = 0.05  # of "cannot answer", beyond guessing
UNPARSABLE = 0.05  # share of answers without an option above which the judge does not do what it is asked
_DIGITS = 4  # of the points of a question, which are rounded
DOMAINS = {"nat": "natural", "doc": "document", "ecom": "e-commerce", "emb": "embodied"}
_VERBS = "is are was were do does did have has had can could will would should shall may might must"
_YES_NO_STARTS = tuple(f"{word} " for word in _VERBS.split())
_ISOLATED = re.compile(r"\b([A-Z])\b")
_NUMBER = re.compile(r"\b([1-9][0-9]?)\b")
_REMEDY = '--questions takes entries {"id", "questions": [{"question", "choices", "answer", "category"}]}'


def is_yes_no(question: str, choices: Sequence[str]) -> bool:
    """Whether a question needs no way to say that one cannot answer.

    As published: some choice contains the letters "yes" and some contains "no", or the question begins like one.
    """
    lower = [choice.lower() for choice in choices]
    pair = any("yes" in choice for choice in lower) and any("no" in choice for choice in lower)
    return pair or question.strip().lower().startswith(_YES_NO_STARTS)


def parse_letter(answer: str, options: int) -> int | None:
    """The place of the option that an answer names, by the published order of rules; None where it cannot be told.

    The rules drop all up to the first "</think>", then up to the first "Answer: ", then up to the first line break.
    Of the rest they take the first letter that stands alone, in either case, if there are as many options. Or else
    they take the first number from 1, if there are as many.
    """
    for mark in ("</think>", "Answer: ", "\n"):
        before, match, after = answer.partition(mark)
        answer = after if match else before
    letter = _ISOLATED.search(answer.upper())
    if letter and LETTERS.index(letter[1]) < options:
        return LETTERS.index(letter[1])
    number = _NUMBER.search(answer)
    return int(number[1]) - 1 if number and int(number[1]) <= options else None


class CaptionQA(Metric):
    """Items are questions, with data {"question", "options", "gold", "cannot" (place or None), "choices" (K)}.

    A judgement is {"answer": text, "options": in the order in which they were shown; the item's own without it}. One
    that names no option scores 0, and is counted as "unparsable". The option "cannot answer" scores 1/K + 0.05.
    """

    name = "captionqa"
    prompts = (prompts.name_of("choice"),)
    max_tokens = 64
    _domains: Sequence[str] = ()
    _skipped = 0

    def items(self, captions: Mapping[str, str], questions: Path) -> list[Item]:
        """One item per usable question, in the order of the file, all shuffled by one generator, as published.

        Questions with fewer than two choices, or whose answer is none of them, and those of pictures without a caption
        draw nothing from the generator. A picture's questions are one group.
        """
        rng, items, domains, self._skipped = random.Random(0), [], set(), 0
        texts = Texts.of(captions)
        for where, entry in read_entries(questions):
            name, listed = entry.get("id"), entry.get("questions")
            if not isinstance(name, str) or not isinstance(listed, list):
                raise UserError(f"{where} has no id and questions; {_REMEDY}")
            prefix, underscore, _ = name.partition("_")
            domain = DOMAINS.get(prefix, prefix) if underscore else ""
            domains.add(domain)
            pictures = [str(one) for one in entry.get("images") or []] if isinstance(entry.get("images"), list) else []
            caption = texts.find(name, *pictures, f"{name}.png", f"{name}.jpg")
            for number, question in enumerate(listed):
                question = question if isinstance(question, dict) else {}
                text, choices, answer = (question.get(field) for field in ("question", "choices", "answer"))
                choices = [str(choice).strip() for choice in choices] if isinstance(choices, list) else []
                answer = answer.strip() if isinstance(answer, str) else None
                if len(choices) < 2 or answer not in choices or not isinstance(text, str):
                    self._skipped += 1
                    continue
                if caption is None:
                    items.append(Item(f"{name}#{number}", None, None, _category(question), name))
                    continue
                options = [*choices] if is_yes_no(text, choices) else [*choices, CANNOT_ANSWER]
                order = list(range(len(options)))
                rng.shuffle(order)
                shuffled = [options[k] for k in order]
                cannot = shuffled.index(CANNOT_ANSWER) if len(options) > len(choices) else None
                data = {"question": text, "options": shuffled, "gold": order.index(choices.index(answer))}
                data |= {"cannot": cannot, "choices": len(choices), "domain": domain}
                items.append(Item(f"{name}#{number}", caption, data, _category(question), name))
        self._domains = sorted(domains)
        return items

    def state(self) -> dict[str, Any]:
        return {"domains": self._domains}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._domains = [str(name) for name in state["domains"]]

    def question(self, item: Item) -> Ask:
        options = [[letter, text] for letter, text in zip(LETTERS, item.data["options"], strict=False)]
        texts = {"caption": item.caption, "question": item.data["question"], "options": options}
        return Ask(self.prompts[0], prompts.render("choice", **texts), _Letter, self.max_tokens)

    def judgement(self, item: Item, answer: "_Letter") -> dict[str, Any]:
        return {"answer": answer.answer, "options": item.data["options"]}

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float]:
        """(points, right, cannot answer, unparsable, 1) and (points, 1) of each domain."""
        data = item.data
        # Which letter was which depends on the questions before it that had captions.
        options = judgement.get("options", data["options"])
        if sorted(options) != sorted(data["options"]):
            raise ValueError("options of another question")
        place = parse_letter(judgement["answer"], len(options))
        cannot = place is not None and data["cannot"] is not None and options[place] == CANNOT_ANSWER
        # Of two choices alike the first is the right one, as published; in another order they cannot be told apart.
        same, gold = options == data["options"], data["gold"]
        right = place is not None and (place == gold if same else options[place] == data["options"][gold])
        points = 1.0 if right else round(1.0 / data["choices"] + BONUS, _DIGITS) if cannot else 0.0
        of_domain = pairs(self._domains, data["domain"], points)
        return (points, float(right), float(cannot), float(place is None), 1.0, *of_domain)

    def score(self, sums: np.ndarray) -> np.ndarray:
        """Mean over questions; of several domains the mean of their means, which is the board's "overall"."""
        return mean_of_known([*means_of_pairs(self._domains, sums[..., 5:]).values()])

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        """Of all questions: points and right answers in percent; numbers of "cannot answer", of unparsable answers, and
        of questions that could not be asked."""
        means = means_of_pairs(self._domains, sums[5:])
        if [*means] == [""]:  # Pictures without domains: `micro` is their mean.
            means = {}
        domains = {f"domain/{name or 'none'}": float(mean) for name, mean in means.items()}
        micro = {"micro": float(ratio(sums[0], sums[4])), "right": float(ratio(sums[1], sums[4]))}
        counts = {"cannot_answer": float(sums[2]), "unparsable": float(sums[3]), "skipped": float(self._skipped)}
        return micro | counts | domains


class _Letter(pydantic.BaseModel):
    answer: str

    @classmethod
    def of_text(cls, text: str) -> "_Letter":
        """The published judge answers with a bare letter, and servers without schemas may do so too. Any other text
        scores 0, as published."""
        return cls(answer=text)


def _category(question: Mapping[str, Any]) -> str:
    category = question.get("category")
    return str(category[0]) if isinstance(category, list) and category else str(category or "")


def read_entries(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, entry) of the official JSON ({picture: questions}, or a list of entries), or of a JSONL file.

    Raises UserError for anything else.
    """
    if Path(path).suffix == ".json":
        content = read_document(path, _REMEDY)
        if isinstance(content, dict):
            for name, questions in content.items():
                yield f"{path}, {name!r}", {"id": name, "questions": questions}
            return
    yield from read_json_or_jsonl(path, _REMEDY)
