"""DCScore on DeCapBench: F1 over primitive statements of a caption, matched with a reference's and checked (3.1).

A judge answers three questions: it splits the caption into statements, matches them with the reference's, and checks
them against the picture. It matches and checks `DRAWS` times each, and all pairs of draws are averaged.

Source: MAGAer13/DeCapBench, commit 9f3fb10, `compute_precision_recall` of eval/evaluation_decapbench.py.
"""

import collections
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl
from balcap_jax.evals.engine import Item, Metric, ratio
from balcap_jax.evals.inputs import Texts, read_picture
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.forms import of_length
from balcap_jax.judges.chat.types import Ask
from balcap_jax.judges.chat_judge import numbered
from balcap_jax.judges.schema import Failure

DRAWS = 3
_TINY = 1e-8  # in the official F1
EXTRACT, MATCH, VERIFY = "dc_extract.v1", "dc_match.v1", "dc_verify.v1"
_REMEDY = '--references takes lines {"image_name", "oracle_caption", "oracle_facts": [...]}'


# As in the published script, a flag is set where it equals 1: a relevance of 0.5 is not. Ours may also be "true".
_Relevance = Annotated[int, pydantic.Field(ge=0, le=1), pydantic.BeforeValidator(lambda value: int(value == 1))]
_Verified = Annotated[bool, pydantic.BeforeValidator(lambda value: value if isinstance(value, str) else value == 1)]


class _Fact(pydantic.BaseModel):
    fact: str
    relevance: _Relevance


class _Facts(pydantic.BaseModel):
    facts: list[_Fact]


class _Match(pydantic.BaseModel):
    fact: int
    why: str
    match: int


class _Matches(pydantic.BaseModel):
    matches: list[_Match]


class _Checked(pydantic.BaseModel):
    fact: int
    why: str
    verified: _Verified


class _Checks(pydantic.BaseModel):
    facts: list[_Checked]


def precision_recall_f1(
    verified: Sequence[int], matched: Sequence[int | None], counts: Mapping[int, int], oracle: int
) -> tuple[float, float, float]:
    """One trial over some statements.

    verified[p] 0 or 1, matched[p] the reference's statement or None; counts[k] is how many statements of the whole
    caption, true ones or not, are matched with k: saying one thing often must not count often. oracle: how many
    statements the reference has. A true statement that the reference lacks counts for recall, above and below.

    Raises:
      ZeroDivisionError: no statements, or nothing that recall is of; the published script has no score then either.
    """
    precision = sum(verified) / len(verified)
    extra = sum(1 for v, k in zip(verified, matched, strict=True) if v and k is None)
    covered = sum(1.0 / counts[k] for v, k in zip(verified, matched, strict=True) if v and k is not None)
    recall = (covered + extra) / (oracle + extra)
    return precision, recall, 2 * precision * recall / (precision + recall + _TINY)


def image_score(
    relevance: Sequence[int], matches: Sequence[Sequence[int | None]], checks: Sequence[Sequence[int]], oracle: int
) -> tuple[float, float, float, float, float, float]:
    """(P, R, F1 of all statements, P, R, F1 of the relevant ones), averaged over all pairs of draws.

    The relevant ones use the counts of all statements, as the published script does. Raises ZeroDivisionError as
    `precision_recall_f1` does.
    """
    trials = []
    for matched, verified in itertools.product(matches, checks):
        counts = collections.Counter(k for k in matched if k is not None)
        chosen = [p for p, is_relevant in enumerate(relevance) if is_relevant]
        every = precision_recall_f1(verified, matched, counts, oracle)
        relevant = precision_recall_f1([verified[p] for p in chosen], [matched[p] for p in chosen], counts, oracle)
        trials.append((*every, *relevant))
    return tuple(np.mean(trials, axis=0))  # type: ignore[return-value]


class DCScore(Metric):
    """Items have data (reference caption, its statements, path of the picture).

    A judgement is {"facts", "relevance", "matches" [draws][facts] (null = none), "verified" [draws][facts]}. A caption
    without a statement, or without a relevant one, is invalid, as in the published script.

    The script knows statements by their text. A repeated one is relevant where either is, and both have the match of
    the last. A match with a statement that the reference lacks is a match.
    """

    name = "dcscore"
    prompts = (EXTRACT, MATCH, VERIFY)
    sees = True
    without_parts = "no statement, or no relevant one"

    def items(self, captions: Mapping[str, str], references: Path, folder: Path) -> list[Item]:
        """One item per line of `references`. Raises UserError for a line of another form."""
        items, texts = [], Texts.of(captions)
        for where, line in read_jsonl(references, _REMEDY):
            name, facts = line.get("image_name"), line.get("oracle_facts")
            if not isinstance(name, str) or not isinstance(facts, list) or not all(isinstance(f, str) for f in facts):
                raise UserError(f"{where} is no reference; {_REMEDY}")
            data = (str(line.get("oracle_caption", "")), facts, folder / name)
            items.append(Item(name, texts.find(name), data))
        return items

    def judge(self, client: ChatClient, items: Sequence[Item]) -> list[Mapping[str, Any] | Failure]:
        # An empty caption states nothing, whatever a judge might make of it.
        judgements: list[Any] = [{"facts": [], "relevance": []} for _ in items]
        stating = []
        for i, item in enumerate(items):
            if not item.data[2].is_file():
                judgements[i] = Failure(f"{item.data[2].name}: no such file")  # Before the split is paid for.
            elif item.caption.strip():
                stating.append(i)
        texts = [prompts.render(EXTRACT, caption=items[i].caption) for i in stating]
        splits = client.ask([Ask(EXTRACT, messages, _Facts, self.max_tokens) for messages in texts])
        asks: list[tuple[int, str, Ask]] = []
        for i, answer in zip(stating, splits, strict=True):
            if isinstance(answer, Failure):
                judgements[i] = answer
                continue
            facts = [one.fact for one in answer.value.facts]
            judgements[i] = {"facts": facts, "relevance": [one.relevance for one in answer.value.facts]}
            if not facts:
                continue
            picture = read_picture(items[i].data[2], items[i].data[2].name)
            if isinstance(picture, Failure):
                judgements[i] = picture
                continue
            asks += [(i, kind, ask) for kind, ask in self._asks(items[i], facts, picture)]
        for (i, kind, _), answer in zip(asks, client.ask([ask for *_, ask in asks]), strict=True):
            if isinstance(judgements[i], Failure):
                continue
            if isinstance(answer, Failure):
                judgements[i] = answer
            else:
                judgements[i].setdefault(kind, []).append(_in_order(answer.value))
        return judgements

    def _asks(self, item: Item, facts: list[str], picture: np.ndarray) -> list[tuple[str, Ask]]:
        """The questions about `facts`, each with the judgement's field that its answer belongs to."""
        reference, oracle, _ = item.data
        match = prompts.render(MATCH, facts=facts, oracle=oracle)
        verify = prompts.render(VERIFY, facts=facts, reference=reference)
        every = range(len(facts))
        check_match = numbered(every, "statements", lambda answer: [one.fact for one in answer.matches])
        check_facts = numbered(every, "statements", lambda answer: [one.fact for one in answer.facts])
        matches, checks = of_length(_Matches, len(facts)), of_length(_Checks, len(facts))
        asks = []
        for draw in range(DRAWS):
            asks.append(("matches", Ask(MATCH, match, matches, self.max_tokens, None, check_match, draw)))
            asks.append(("verified", Ask(VERIFY, verify, checks, self.max_tokens, picture, check_facts, draw)))
        return asks

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float] | None:
        relevance = [flag == 1 for flag in judgement["relevance"]]
        if not relevance:
            return None
        draws = [*judgement["matches"], *judgement["verified"]]
        if not judgement["matches"] or not judgement["verified"] or any(len(d) != len(relevance) for d in draws):
            raise ValueError("draws of other lengths than there are statements")
        facts = judgement.get("facts", range(len(relevance)))
        relevant = {fact for fact, is_relevant in zip(facts, relevance, strict=True) if is_relevant}
        last = {fact: p for p, fact in enumerate(facts)}
        matches = [[draw[last[fact]] for fact in facts] for draw in judgement["matches"]]
        checks = [[int(flag == 1) for flag in draw] for draw in judgement["verified"]]
        try:
            return (*image_score([fact in relevant for fact in facts], matches, checks, len(item.data[1])), 1.0)
        except ZeroDivisionError:
            return None

    def score(self, sums: np.ndarray) -> np.ndarray:
        return ratio((sums[..., 2] + sums[..., 5]) / 2, sums[..., -1])

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        names = ("precision", "recall", "f1", "precision_relevant", "recall_relevant", "f1_relevant")
        return {name: float(ratio(sums[k], sums[-1])) for k, name in enumerate(names)}


def _in_order(answer: _Matches | _Checks) -> list[int | None]:
    if isinstance(answer, _Matches):
        ordered = sorted(answer.matches, key=lambda one: one.fact)
        return [None if one.match < 0 else one.match for one in ordered]
    return [int(one.verified) for one in sorted(answer.facts, key=lambda one: one.fact)]
