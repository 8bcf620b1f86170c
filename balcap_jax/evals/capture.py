"""CAPTURE: F1 of objects, attributes and relations of a caption's scene graph against references' (3.5, steps 3 and 4).

The graphs are given: the published parser is a model of its own. Of the three passes of matching the exact one and the
substring part of the synonym one are here; the latter's WordNet part and the soft pass need models or data that are
not, so that scores are lower bounds of the published ones, unless `similarity` is given.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl
from balcap_jax.evals.engine import Item, Metric, Texts, ratio

PARTS = {"objects": 0.5, "attributes": 0.5, "relations": 0.2}
_TINY = 1e-6
_REMEDY = '--graphs takes lines {"id", "candidate": {"objects", "attributes", "relations"}, "references": [...]}'
Text = str | tuple[str, ...]  # of a relation its elements
Similarity = Callable[[Sequence[Text], Sequence[Text]], np.ndarray]


def match(
    candidate: Sequence[Text], reference: Sequence[Text], similarity: Similarity | None = None
) -> tuple[float, float]:
    """(matched of the candidate, matched of the reference).

    First equal texts, one to one; then, of what is left, texts of which one contains the other, of relations element by
    element; then, where `similarity` [n, m] is given, the largest of each row and of each column of what is still left.
    """
    mine, theirs, matched = list(candidate), list(reference), 0
    for fits in (lambda a, b: a == b, _alike):
        for text in list(mine):
            partner = next((other for other in theirs if fits(text, other)), None)
            if partner is not None:
                mine.remove(text)
                theirs.remove(partner)
                matched += 1
    soft = np.zeros((len(mine), len(theirs)))
    if similarity is not None and mine and theirs:
        soft = similarity(mine, theirs)
    rows = soft.max(1).sum() if soft.size else 0.0
    columns = soft.max(0).sum() if soft.size else 0.0
    return matched + float(rows), matched + float(columns)


def _alike(one: Text, other: Text) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one in other or other in one
    if isinstance(one, str) or isinstance(other, str) or len(one) != len(other):
        return False
    return all(map(_alike, one, other))


def f1(candidate: Sequence[Text], reference: Sequence[Text], similarity: Similarity | None = None) -> float:
    of_candidate, of_reference = match(candidate, reference, similarity)
    precision = of_candidate / (len(candidate) + _TINY)
    recall = of_reference / (len(reference) + _TINY)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def graph_score(candidate: Mapping, reference: Mapping, similarity: Similarity | None = None) -> tuple[float, ...]:
    """(score, F1 of objects, of attributes, of relations) in [0, 1]."""
    parts = [f1(_texts(candidate, name), _texts(reference, name), similarity) for name in PARTS]
    weights = list(PARTS.values())
    return (sum(w * f for w, f in zip(weights, parts, strict=True)) / sum(weights), *parts)


def _texts(graph: Mapping, name: str) -> list[Text]:
    """Lower-case texts; attributes may be given by object, relations as lists of subject, predicate and object.

    Raises ValueError for a graph of another form.
    """
    given = graph.get(name, [])
    if isinstance(given, Mapping):  # Attributes are pooled over objects.
        if not all(isinstance(texts, list) for texts in given.values()):
            raise ValueError(f"its {name} are no lists of texts")
        given = [text for texts in given.values() for text in texts]
    if not isinstance(given, list):
        raise ValueError(f"its {name} are no list")
    found: list[Text] = []
    for one in given:
        words = one if isinstance(one, list) else [one]
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"its {name} hold something that is no text")
        plain = tuple(" ".join(word.lower().split()) for word in words)
        found.append(plain if isinstance(one, list) else plain[0])
    return found


class Capture(Metric):
    """Items are pictures, with data (candidate graph, reference graphs); nobody is asked."""

    name = "capture"
    prompts: tuple[str, ...] = ()

    def items(self, graphs: Path, captions: Mapping[str, str]) -> list[Item]:
        found, texts = [], Texts.of(captions)
        for where, line in read_jsonl(graphs, _REMEDY):
            candidate, references = line.get("candidate"), line.get("references")
            whole = isinstance(references, list) and references and all(isinstance(g, dict) for g in references)
            if not isinstance(line.get("id"), str) or not whole or not isinstance(candidate, dict | None):
                raise UserError(f"{where} has no graphs; {_REMEDY}")
            try:
                for graph in (candidate or {}, *references):
                    for name in PARTS:
                        _texts(graph, name)
            except ValueError as error:
                raise UserError(f"{where} has a graph of another form: {error}; {_REMEDY}") from error
            text = texts.find(line["id"])
            caption = (text or "") if candidate is not None else None
            found.append(Item(line["id"], caption, (candidate, references), told=text is not None))
        return found

    def judge(self, client: Any, items: Sequence[Item]) -> list[Mapping[str, Any]]:
        del client
        scored = []
        for item in items:
            candidate, references = item.data
            mean = np.mean([graph_score(candidate, reference) for reference in references], axis=0)
            scored.append(dict(zip(("score", *PARTS), map(float, mean), strict=True)))
        return scored

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float]:
        values = [float(judgement[name]) for name in ("score", *PARTS)]
        if not all(0 <= value <= 1 + _TINY for value in values):
            raise ValueError(f"scores beyond [0, 1]: {values}")
        return (*values, 1.0)

    def score(self, sums: np.ndarray) -> np.ndarray:
        return ratio(sums[..., 0], sums[..., -1])

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        return {f"f1/{name}": float(ratio(sums[k], sums[-1])) for k, name in enumerate(PARTS, start=1)}
