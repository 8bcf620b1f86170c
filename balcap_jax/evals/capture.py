"""CAPTURE: F1 of objects, attributes and relations of a caption's scene graph against references' (3.5, steps 3 and 4).

The graphs are given: the published parser is a model of its own. Of the three passes of matching this module has the
exact one and the substring part of the synonym one. The WordNet part and the soft pass need models or data that are not
here. So scores are lower bounds of the published ones, unless `similarity` is given.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl
from balcap_jax.evals.engine import Item, Metric, ratio
from balcap_jax.evals.inputs import Texts

PARTS = {"objects": 0.5, "attributes": 0.5, "relations": 0.2}
_TINY = 1e-6
_REMEDY = '--graphs takes lines {"id", "candidate": {"objects", "attributes", "relations"}, "references": [...]}'
Text = str | tuple[str, ...]  # of a relation its elements
Similarity = Callable[[Sequence[Text], Sequence[Text]], np.ndarray]


def match(
    candidate: Sequence[Text], reference: Sequence[Text], similarity: Similarity | None = None
) -> tuple[float, float]:
    """(matched of the candidate, matched of the reference).

    The first pass matches equal texts, one to one. The second matches texts of which one contains the other, relations
    element by element. Where `similarity` [n, m] is given, the third adds the largest of each row and of each column
    of what is left.
    """
    ours, theirs, matched = list(candidate), list(reference), 0
    for fits in (lambda a, b: a == b, _alike):
        for text in list(ours):
            partner = next((other for other in theirs if fits(text, other)), None)
            if partner is not None:
                ours.remove(text)
                theirs.remove(partner)
                matched += 1
    if similarity is None or not ours or not theirs:
        return float(matched), float(matched)
    soft = similarity(ours, theirs)
    return matched + float(soft.max(1).sum()), matched + float(soft.max(0).sum())


def _alike(one: Text, other: Text) -> bool:
    if isinstance(one, str) != isinstance(other, str):
        return False
    if isinstance(one, str):
        return one in other or other in one
    return len(one) == len(other) and all(map(_alike, one, other))


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
    entries = graph.get(name, [])
    if isinstance(entries, Mapping):  # Attributes are pooled over objects.
        if not all(isinstance(texts, list) for texts in entries.values()):
            raise ValueError(f"its {name} are no lists of texts")
        entries = [text for texts in entries.values() for text in texts]
    if not isinstance(entries, list):
        raise ValueError(f"its {name} are no list")
    texts: list[Text] = []
    for entry in entries:
        words = entry if isinstance(entry, list) else [entry]
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"its {name} hold something that is no text")
        plain = tuple(" ".join(word.lower().split()) for word in words)
        texts.append(plain if isinstance(entry, list) else plain[0])
    return texts


class Capture(Metric):
    """Items are pictures, with data (candidate graph, reference graphs); nobody is asked."""

    name = "capture"

    def items(self, graphs: Path, captions: Mapping[str, str]) -> list[Item]:
        items, texts = [], Texts.of(captions)
        for where, line in read_jsonl(graphs, _REMEDY):
            candidate, references = line.get("candidate"), line.get("references")
            are_graphs = isinstance(references, list) and references and all(isinstance(g, dict) for g in references)
            if not isinstance(line.get("id"), str) or not are_graphs or not isinstance(candidate, dict | None):
                raise UserError(f"{where} has no graphs; {_REMEDY}")
            try:
                for graph in (candidate or {}, *references):
                    for name in PARTS:
                        _texts(graph, name)
            except ValueError as error:
                raise UserError(f"{where} has a graph of another form: {error}; {_REMEDY}") from error
            text = texts.find(line["id"])
            caption = (text or "") if candidate is not None else None
            items.append(Item(line["id"], caption, (candidate, references), has_text=text is not None))
        return items

    def judge(self, client: Any, items: Sequence[Item]) -> list[Mapping[str, Any]]:
        del client
        judgements = []
        for item in items:
            candidate, references = item.data
            mean = np.mean([graph_score(candidate, reference) for reference in references], axis=0)
            judgements.append(dict(zip(("score", *PARTS), map(float, mean), strict=True)))
        return judgements

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float]:
        values = [float(judgement[name]) for name in ("score", *PARTS)]
        if not all(0 <= value <= 1 + _TINY for value in values):
            raise ValueError(f"scores beyond [0, 1]: {values}")
        return (*values, 1.0)

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        return {f"f1/{name}": float(ratio(sums[k], sums[-1])) for k, name in enumerate(PARTS, start=1)}
