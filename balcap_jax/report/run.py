"""Reads what a training run leaves in its directory; each file may be missing or torn, and a note says so.

The files: metrics.jsonl, config.json, summary.json and samples/ with eval-<label>.jsonl (one `JudgedImage` a line) and
the pictures that those name. Rewards and shares are fractions there, b-CapScore is in points, 0 to 100.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes
from balcap_jax.judges.schema import Assertion

STAGE_LABELS = {"base": "Base", "vision": "Vision", "align": "Alignment", "sft": "SFT", "rl": "RL"}
USUAL_ORDER = ("vision", "align", "sft", "rl")


_LARGEST = 1e300  # Sums, differences and percentages of what is shown are numbers too.


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be shown; a larger one counts as missing."""
    return json_text.is_number(value) and abs(value) <= _LARGEST


def label_text(label: str) -> str:
    stage, dash, step = label.partition("-")
    return f"{STAGE_LABELS.get(stage, stage)} at {step}" if dash else STAGE_LABELS.get(stage, stage)


def before_and_after(labels: Iterable[str], order: Sequence[str] = USUAL_ORDER) -> list[str]:
    """The first and the last evaluation of a run with the stages `order`, or the only one.

    A label is a stage ("sft": at its end; "base": before the first stage) or a stage and a step ("rl-40": on the way);
    the latter count as first or last only while no two stages have ended.
    """
    stages = ["base", *order]

    def place(label: str) -> tuple:
        stage, _, step = label.partition("-")
        known = stages.index(stage) if stage in stages else len(stages)
        return known, stage, int(step) if step.isdecimal() else math.inf

    ordered = sorted(labels, key=place)
    ended = [label for label in ordered if label in STAGE_LABELS]
    ordered = ended if len(ended) > 1 else ordered
    return ordered if len(ordered) < 3 else [ordered[0], ordered[-1]]


Number = Annotated[float | None, pydantic.AfterValidator(lambda value: value if is_number(value) else None)]


class JudgedCaption(pydantic.BaseModel):
    """One caption with everything that its judges answered; without an answer entries are None or absent."""

    caption: str
    words: int | None = None
    tokens: int | None = None
    truncated: bool = False
    in_band: bool | None = None
    rewards: dict[str, Number] = {}
    b_capscore: Number = None
    assertions: list[Assertion] | None = None
    covered: list[bool] | None = None
    clarity: Number = None
    fluency: Number = None
    coherency: Number = None
    failures: dict[str, str] = {}
    suspicious: list[str] = []


class JudgedImage(pydantic.BaseModel):
    """One line of samples/eval-<label>.jsonl; `image` is a PNG's path relative to samples/."""

    id: str
    image: str | None = None
    prompt: str = ""
    reference: str = ""
    reference_units: list[str] = []
    captions: list[JudgedCaption]

    @property
    def b_capscore(self) -> float | None:
        """Mean over the image's captions that have one."""
        scores = [caption.b_capscore for caption in self.captions if caption.b_capscore is not None]
        return sum(scores) / len(scores) if scores else None


@dataclasses.dataclass
class Run:
    """A run as it was read; each of `notes` is a line about a missing or unreadable part."""

    path: Path
    name: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    evaluations: dict[str, dict[str, JudgedImage]]  # label -> image id -> image
    notes: list[str]

    @property
    def labels(self) -> list[str]:
        """The first and the last evaluated stage: what "before" and "after" mean for this run."""
        return before_and_after({*self.evaluations, *mapping(self.summary.get("evaluations"))}, self.order)

    @property
    def order(self) -> Sequence[str]:
        """The stages in the order in which they ran, as far as the config says so."""
        order = mapping(self.config.get("stages")).get("order")
        return [part.strip() for part in order.split(",")] if isinstance(order, str) else USUAL_ORDER

    @property
    def image_ids(self) -> list[str]:
        """The images of the evaluations `labels`."""
        return list(dict.fromkeys(image_id for label in self.labels for image_id in self.evaluations.get(label, {})))

    def images(self, image_id: str) -> dict[str, JudgedImage | None]:
        """One image in each of the evaluations `labels`; None where it was not evaluated."""
        return {label: self.evaluations.get(label, {}).get(image_id) for label in self.labels}

    def evaluation(self, label: str, kind: str = "evaluations") -> Mapping[str, Any]:
        """What summary.json says about one evaluation ("greedy" is the other kind); empty where it says nothing."""
        return mapping(mapping(self.summary.get(kind)).get(label))


def load_run(directory: str | os.PathLike) -> Run:
    """Reads a run directory; missing or torn files become notes. Raises UserError if it holds no run at all."""
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; name the --workdir of a training run")
    notes: list[str] = []
    records = [record for _, record in _read_lines(path / "metrics.jsonl", notes)]
    config = _read_object(path / "config.json", notes)
    summary = _read_object(path / "summary.json", notes)
    evaluations = {}
    for file in sorted((path / "samples").glob("eval-*.jsonl")):
        images = {}
        for number, line in _read_lines(file, notes):
            try:
                image = JudgedImage.model_validate(line)
            except pydantic.ValidationError as error:
                where = ".".join(str(part) for part in error.errors()[0]["loc"])
                notes.append(f"samples/{file.name} line {number}: skipped, bad field {where}")
                continue
            images[image.id] = image
        evaluations[file.stem.removeprefix("eval-")] = images
    if not (records or config or summary or any(evaluations.values())):
        raise UserError(
            f"{path}: not a run (nothing readable in metrics.jsonl, config.json, summary.json or samples/); name a "
            "run's --workdir"
        )
    if not any(evaluations.values()):
        notes.append("samples/: no captions to show (no eval-*.jsonl with a readable line)")
    name = config.get("name") if isinstance(config.get("name"), str) else path.resolve().name
    return Run(path, name, _continuous(records), config, summary, evaluations, notes)


def _read_lines(file: Path, notes: list[str]) -> list[tuple[int, dict]]:
    """(line number, object) of each readable line; one note counts the others."""
    try:
        lines = read_bytes(file).splitlines()
    except OSError as error:
        notes.append(f"{file.name}: not readable ({error.strerror})")
        return []
    values = [(number, _object(line)) for number, line in enumerate(lines, start=1)]
    objects = [(number, value) for number, value in values if value is not None]
    if torn := [number for number, value in values if value is None]:
        more = f" and {len(torn) - 1} more" if len(torn) > 1 else ""
        notes.append(f"{file.name}: line {torn[0]}{more} torn or not an object, skipped")
    elif not objects:
        notes.append(f"{file.name}: empty")
    return objects


def _read_object(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = _object(read_bytes(file))
    except OSError as error:
        notes.append(f"{file.name}: not readable ({error.strerror})")
        return {}
    if value is None:
        notes.append(f"{file.name}: torn or not a JSON object, ignored")
    return value or {}


def _object(text: bytes) -> dict[str, Any] | None:
    """The JSON object of a text, None for any other text. The page can show what `json_text` refuses."""
    try:
        value = json_text.decode(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _continuous(records: Iterable[dict]) -> list[dict]:
    """Records in order with a step axis that never goes back: a stage that counts from 1 again follows the last one."""
    offset, last, stage, continuous = 0, 0, None, []
    for record in records:
        if not is_number(record.get("step")):
            continue
        if stage is not None and record.get("stage") != stage and record["step"] + offset <= last:
            offset = last
        stage, last = record.get("stage"), record["step"] + offset
        continuous.append(record | {"step": last})
    return continuous


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# --- evaluations ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the before/after table; `scale` turns the stored value into what is shown, `better` is +1, -1 or 0."""

    name: str
    key: str
    scale: float = 1.0
    better: int = 1
    unit: str = ""


TABLE = (
    Row("precision", "precision", 100),
    Row("recall", "recall", 100),
    Row("linguistic", "linguistic", 100),
    Row("b-CapScore", "b_capscore"),
    Row("b-CapScore, corpus", "corpus_b_capscore"),
    Row("mean words", "words", better=0),
    Row("in band", "in_band", 100, unit="%"),
    Row("truncated", "truncated", 100, better=-1, unit="%"),
)
# What an evaluation holds beside the means of rewards.
_OTHERS = frozenset({*(row.key for row in TABLE), "tokens", "n", "images", "invalid"})
PLAIN_TABLE = ("precision", "recall", "linguistic", "b_capscore", "words", "in_band")


def scale_of(reward: str) -> float:
    """What turns a reward into what is shown: points, but for counts."""
    return 1.0 if reward.endswith("count") else 100.0


def rows_of(evaluations: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    """TABLE, and before it a row for each other reward that was evaluated."""
    names = (name for evaluation in evaluations for name, value in evaluation.items() if isinstance(value, dict))
    others = [name for name in dict.fromkeys(names) if name not in _OTHERS]
    return (*(Row(name.replace("_", " "), name, scale_of(name)) for name in others), *TABLE)


@dataclasses.dataclass(frozen=True)
class Cell:
    mean: float | None
    std: float | None = None


def cell_of(evaluation: Mapping[str, Any], row: Row) -> Cell:
    """A stored value is a number or {"mean", "std"} over the evaluated captions."""
    value = evaluation.get(row.key)
    parts = value if isinstance(value, dict) else {"mean": value}
    return Cell(*(row.scale * parts[key] if is_number(parts.get(key)) else None for key in ("mean", "std")))
