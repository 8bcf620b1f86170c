"""Captions and scores of held-out images during training: the numbers of the before/after table and the report."""

import dataclasses
import io
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from balcap_jax import durable, json_text
from balcap_jax.errors import UserError
from balcap_jax.evals.bcapscore import OBJECTIVES, b_capscore, corpus_b_capscore, harmonic_mean, three_of
from balcap_jax.rewards.base import Samples, Scores
from balcap_jax.rewards.words import count_words

# Samples of evaluations draw from a stream of their own: no training step has this number.
EVALUATION_STEP = 2**31 - 1
SHOWN_PIXELS = 512  # longer side of a picture that is kept beside its captions


def to_samples(
    examples: Mapping[str, Sequence], captions: Sequence[Sequence[str]], tokens: np.ndarray | None = None
) -> Samples:
    """Columns of B examples and their captions [B][G], of `tokens` [B, G] each, as a reward function takes them."""
    known = ("id", "image", "reference", "reference_units", "prompt", "captions")
    rows = range(len(captions))
    return Samples(
        example_ids=examples["id"],
        captions=captions,
        references=examples["reference"],
        reference_units=examples["reference_units"],
        images=examples["image"],
        metadata=[{name: examples[name][i] for name in examples if name not in known} for i in rows],
        tokens=tokens,
    )


def references_as_samples(examples: Sequence[Mapping[str, Any]], columns: Callable) -> Samples:
    """Samples of two examples (of the only one, twice), with their references as three captions of each."""
    ((batch, _),) = batches(examples[:2], 2, columns)
    captions = [[text] * 3 for text in batch["reference"]]
    return to_samples(batch, captions, np.array([list(map(count_words, group)) for group in captions]))


@dataclasses.dataclass(frozen=True)
class Judged:
    """Captions [B][G] of B examples (columns) with their scores; tokens, truncated [B, G]."""

    examples: Mapping[str, Sequence]
    captions: Sequence[Sequence[str]]
    tokens: np.ndarray
    truncated: np.ndarray
    scores: Scores

    def records(self, names: Sequence[str], gate: tuple[float, float]) -> list[dict[str, Any]]:
        """One JSON-able record per image, as the report reads them.

        The b-CapScore of a caption uses the ungated rewards and is None where a score is missing. `gate` are the bounds
        of the length band.
        """
        examples, scores = self.examples, self.scores
        words = np.array([[count_words(text) for text in group] for group in self.captions])
        reference_words = np.array([count_words(text) for text in examples["reference"]])
        inside = in_band(words, reference_words, *gate)
        *three, whole = three_of(scores.rewards, scores.valid, names)
        balanced = 100.0 * harmonic_mean(*three)

        def caption(b: int, g: int) -> dict[str, Any]:
            valid, rewards = scores.valid[b, g], scores.rewards[b, g]
            ours = {
                "caption": self.captions[b][g],
                "words": int(words[b, g]),
                "tokens": int(self.tokens[b, g]),
                "truncated": bool(self.truncated[b, g]),
                "in_band": bool(inside[b, g]),
                "rewards": {name: float(rewards[k]) if valid[k] else None for k, name in enumerate(names)},
                "b_capscore": float(balanced[b, g]) if whole[b, g] else None,
            }
            return {
                **ours,
                **scores.detail[b][g],
                **ours,
            }  # Whatever names a detail uses, these are ours.

        return [
            {
                "id": examples["id"][b],
                "image": f"images/{picture_name(examples['id'][b])}",
                "prompt": examples["prompt"][b],
                "reference": examples["reference"][b],
                "reference_units": list(examples["reference_units"][b]),
                "captions": [caption(b, g) for g in range(len(group))],
            }
            for b, group in enumerate(self.captions)
        ]


def in_band(words: np.ndarray, reference_words: np.ndarray, low: float, high: float) -> np.ndarray:
    """`advantages.length_gate` of words [B, G] and [B] as bool, on the host: there it would be compiled for each shape,
    in the middle of training."""
    slack = 1e-6  # As there: the bounds are inclusive whatever the rounding.
    reference = reference_words[:, None].astype(float)
    inside = (words >= low * reference * (1 - slack)) & (words <= high * reference * (1 + slack))
    return inside & (reference > 0)


def summarise(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Means of an evaluation: {name: {"mean", "std"}} with the spread over captions, "n" captions, "invalid" scores."""
    captions = [caption for record in records for caption in record["captions"]]
    columns = {name: [caption["rewards"][name] for caption in captions] for name in names}
    valid = np.array([[column[i] is not None for column in columns.values()] for i in range(len(captions))]).all(-1)
    kept = {name: [value for value in column if value is not None] for name, column in columns.items()}
    kept["b_capscore"] = [caption["b_capscore"] for caption in captions if caption["b_capscore"] is not None]
    for name in ("words", "tokens", "in_band", "truncated"):
        kept[name] = [float(caption[name]) for caption in captions]
    summary: dict[str, Any] = {name: _spread(column) for name, column in kept.items()}
    if set(OBJECTIVES) <= set(names):
        # Equal to the mean of the captions' own scores up to rounding; kept as the metric's one definition.
        values = [np.array([value or 0.0 for value in columns[name]]) for name in OBJECTIVES]
        whole = np.array([[columns[name][i] is not None for name in OBJECTIVES] for i in range(len(captions))]).all(-1)
        summary["b_capscore"]["mean"] = _finite(b_capscore(*values, whole))
        summary["corpus_b_capscore"] = {"mean": _finite(corpus_b_capscore(*values, whole)), "std": None}
    return summary | {"n": len(captions), "images": len(records), "invalid": int((~valid).sum())}


def write(workdir: Path, label: str, records: Sequence[Mapping[str, Any]], images: Mapping[str, np.ndarray]) -> None:
    """Writes samples/eval-<label>.jsonl and the pictures it names, where they are not there yet.

    Photographs are shrunk to SHOWN_PIXELS: they are there to be looked at in the report.
    """
    for name, image in images.items():
        path = workdir / "samples" / "images" / picture_name(name)
        if not path.exists():
            file = io.BytesIO()
            picture = Image.fromarray(np.asarray(image))
            if max(picture.size) > SHOWN_PIXELS:
                picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
            picture.save(file, format="PNG")
            write_bytes(path, file.getvalue())
    write_text(workdir / "samples" / f"eval-{label}.jsonl", json_text.lines(records))


def picture_name(example_id: str) -> str:
    """The file of an example's picture: ids are a data set's own, and may hold slashes."""
    return urllib.parse.quote(example_id, safe="") + ".png"


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one step, so that no reader, no crash and no power cut ever meets half of it.

    Raises:
      UserError: the disk is full or read-only.
    """
    try:
        durable.make_directory(path.parent)
        durable.replace_file(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there or name another directory") from error


def batches(examples: Sequence[Mapping[str, Any]], size: int, columns: Callable) -> list[tuple[Mapping[str, Any], int]]:
    """Columns of `size` examples at a time; the last is filled up with its first examples. -> [(columns, real rows)]"""
    cut = []
    for start in range(0, len(examples), size):
        rows = list(examples[start : start + size])
        filled = rows + [rows[i % len(rows)] for i in range(size - len(rows))]
        cut.append((columns(filled), len(rows)))
    return cut


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
