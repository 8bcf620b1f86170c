"""Reads what a training run leaves in its directory; each file may be missing or torn, and a note says so.

The files: metrics.jsonl, config.json, summary.json, judge.json and samples/. There lie greedy-<label>.jsonl and
eval-<label>.jsonl, of greedy and of sampled captions, step-<step>.jsonl of training (one `JudgedImage` a line), and the
pictures that those name. Rewards and shares are fractions there, b-CapScore is in points, 0 to 100.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes, resolved
from balcap_jax.data.scenes.habits import HABITS
from balcap_jax.judges.schema import Assertion

STAGE_LABELS = {"base": "Base", "vision": "Vision", "align": "Alignment", "sft": "SFT", "rl": "RL"}
USUAL_ORDER = ("vision", "align", "sft", "rl")
CEILING, _TEACHES_FAULTS = "align", "sft"  # stages: see `ceiling_of`
# Kinds of evaluation in summary.json, in the order in which they are shown, and the files of their captions.
KINDS = {"greedy": "greedy", "evaluations": "sampled"}
_FILES = {"greedy": "greedy-", "evaluations": "eval-"}

_LONG = 20  # digits, of a step that no run has
_LARGEST = 1e300  # Sums, differences and percentages of what is shown are numbers too.


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be shown; a larger one counts as missing."""
    return json_text.is_number(value) and abs(value) <= _LARGEST


def label_text(label: str) -> str:
    stage, dash, step = label.partition("-")
    return f"{STAGE_LABELS.get(stage, stage)} at {step}" if dash else STAGE_LABELS.get(stage, stage)


def ceiling_of(labels: Iterable[str], order: Sequence[str] = USUAL_ORDER) -> str | None:
    """The evaluation of the policy that has seen faultless references alone, where a later stage teaches faults.

    It is what the world and the model's size allow, and no part of before and after.
    """
    stages = list(order)
    is_one = CEILING in stages and _TEACHES_FAULTS in stages[stages.index(CEILING) :]
    return CEILING if is_one and CEILING in set(labels) else None


def before_and_after(labels: Iterable[str], order: Sequence[str] = USUAL_ORDER) -> list[str]:
    """The first and the last evaluation of a run with the stages `order`, or the only one; the ceiling is neither.

    A label is a stage ("sft": at its end; "base": before the first stage) or a stage and a step ("rl-40": on the way);
    the latter count as first or last only while no two stages have ended.
    """
    stages, labels = ["base", *order], set(labels)
    labels -= {ceiling_of(labels, order)}

    def place(label: str) -> tuple:
        stage, _, step = label.partition("-")
        known = stages.index(stage) if stage in stages else len(stages)
        return known, stage, int(step) if step.isdecimal() and len(step) < _LONG else math.inf

    ordered = sorted(labels, key=place)
    ended = [label for label in ordered if label in STAGE_LABELS]
    ordered = ended if len(ended) > 1 else ordered
    return ordered if len(ordered) < 3 else [ordered[0], ordered[-1]]


def _flags(value: Any) -> dict[Any, bool]:
    return {name: flag for name, flag in mapping(value).items() if isinstance(flag, bool)}


def _numbers(value: Any) -> dict[Any, float]:
    return {name: number for name, number in mapping(value).items() if is_number(number)}


def _model_of(value: Any) -> str:
    model = mapping(value).get("model")
    return model if isinstance(model, str) else ""


Number = Annotated[float | None, pydantic.AfterValidator(lambda value: value if is_number(value) else None)]
# A user's own reward may use the name for something else.
Habits = Annotated[dict[str, bool], pydantic.BeforeValidator(_flags)]
Advantages = Annotated[dict[str, float], pydantic.BeforeValidator(_numbers)]
Model = Annotated[str, pydantic.BeforeValidator(_model_of)]
Lone = Annotated[Number, pydantic.BeforeValidator(lambda value: value if is_number(value) else None)]


class JudgedCaption(pydantic.BaseModel):
    """One caption with everything that its judges answered; without an answer entries are None or absent.

    Captions of training have their combined `advantage` and that of each objective, `advantages`.
    """

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
    habits: Habits = {}
    judge: Model = ""
    advantage: Lone = None
    advantages: Advantages = {}


class JudgedImage(pydantic.BaseModel):
    """One line of a file of captions; `image` is a PNG's path relative to samples/."""

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
    judged: dict[str, dict[str, dict[str, JudgedImage]]]  # kind -> label -> image id -> image
    notes: list[str]
    spent: dict[str, Any] = dataclasses.field(default_factory=dict)  # judge.json
    steps: list[int] = dataclasses.field(default_factory=list)  # of training, whose captions were kept

    @property
    def _evaluated(self) -> set[str]:
        known = (labels for kind in KINDS for labels in (self.judged[kind], mapping(self.summary.get(kind))))
        return {label for labels in known for label in labels}

    @property
    def labels(self) -> list[str]:
        """The first and the last evaluated stage: what "before" and "after" mean for this run."""
        return before_and_after(self._evaluated, self.order)

    @property
    def ceiling(self) -> str | None:
        """The label of `ceiling_of` this run."""
        return ceiling_of(self._evaluated, self.order)

    @property
    def order(self) -> Sequence[str]:
        """The stages in the order in which they ran, as far as the config says so."""
        order = mapping(self.config.get("stages")).get("order")
        return [part.strip() for part in order.split(",")] if isinstance(order, str) else USUAL_ORDER

    @property
    def image_ids(self) -> list[str]:
        """The images of the evaluations `labels`."""
        parts = (self.judged[kind].get(label, {}) for kind in KINDS for label in self.labels)
        return list(dict.fromkeys(image_id for images in parts for image_id in images))

    def images(self, image_id: str, kind: str) -> dict[str, JudgedImage | None]:
        """One image in each of the evaluations `labels`; None where it was not evaluated."""
        return {label: self.judged[kind].get(label, {}).get(image_id) for label in self.labels}

    def rollouts(self, step: int) -> list[JudgedImage]:
        """The captions of one of `steps`, by picture."""
        return list(_read_images(_step_file(self.path, step), self.notes).values())

    def evaluation(self, label: str, kind: str) -> Mapping[str, Any]:
        """What summary.json says about one evaluation; empty where it says nothing."""
        return mapping(mapping(self.summary.get(kind)).get(label))


def load_run(directory: str | os.PathLike) -> Run:
    """Reads a run directory; missing or torn files become notes. Raises UserError if it holds no run at all."""
    path = resolved(directory)
    for name in (
        ("metrics.jsonl", "config.json", "summary.json", "judge.json", "samples") if storage.url_of(path) else ()
    ):
        storage.fetch(path / name)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; name the --workdir of a training run")
    notes: list[str] = []
    records = [record for _, record in _read_lines(path / "metrics.jsonl", notes)]
    config = _read_object(path / "config.json", notes)
    summary = _read_object(path / "summary.json", notes)
    judged = {
        kind: {
            file.stem.removeprefix(prefix): _read_images(file, notes)
            for file in sorted((path / "samples").glob(f"{prefix}*.jsonl"))
        }
        for kind, prefix in _FILES.items()
    }
    has_captions = any(images for labels in judged.values() for images in labels.values())
    if not (records or config or summary or has_captions):
        raise UserError(
            f"{path}: not a run (nothing readable in metrics.jsonl, config.json, summary.json or samples/); name a "
            "run's --workdir"
        )
    if not has_captions:
        notes.append("samples/: no captions to show (no greedy-*.jsonl or eval-*.jsonl with a readable line)")
    spent = _read_object(path / "judge.json", notes) if (path / "judge.json").exists() else {}
    numbers = (file.stem.removeprefix("step-") for file in (path / "samples").glob("step-*.jsonl"))
    steps = sorted(int(number) for number in numbers if number.isdecimal() and len(number) < _LONG)
    steps = [step for step in steps if _step_file(path, step).exists()]
    name = path.resolve().name
    return Run(path, name, _continuous(records), config, summary, judged, notes, spent, steps)


def _step_file(path: Path, step: int) -> Path:
    return path / "samples" / f"step-{step:06d}.jsonl"


def _read_images(file: Path, notes: list[str]) -> dict[str, JudgedImage]:
    """By id; a line that holds none becomes a note."""
    images = {}
    for number, line in _read_lines(file, notes):
        try:
            image = JudgedImage.model_validate(line)
        except pydantic.ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            notes.append(f"samples/{file.name} line {number}: skipped, bad field {where}")
            continue
        images[image.id] = image
    return images


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


BALANCED = (
    Row("precision", "precision", 100),
    Row("recall", "recall", 100),
    Row("linguistic", "linguistic", 100),
    Row("b-CapScore", "b_capscore"),
    Row("b-CapScore, corpus", "corpus_b_capscore"),
)
# Metrics of the miniature after published ones, whose scores they are not to be taken for.
MINIATURE = (
    Row("DCScore (mini)", "dcscore", 100),
    Row("CaptionQA (mini)", "captionqa", 100),
    Row("arena (mini)", "arena", 100),
)
LENGTHS = (
    Row("mean words", "words", better=0),
    Row("in band", "in_band", 100, unit="%"),
    Row("truncated", "truncated", 100, better=-1, unit="%"),
)
TABLE = (*BALANCED, *MINIATURE, *LENGTHS)
# What an evaluation holds beside the means of a run's own rewards.
_OTHERS = frozenset({*(row.key for row in TABLE), "tokens", "n", "images", "invalid", "habits"})


def scale_of(reward: str) -> float:
    """What turns a reward into what is shown: points, but for counts."""
    return 1.0 if reward.endswith("count") else 100.0


def rows_of(evaluations: Iterable[Mapping[str, Any]]) -> tuple[Row, ...]:
    """TABLE, with a row for each other reward that was evaluated behind those of BalCap."""
    names = (name for evaluation in evaluations for name, value in evaluation.items() if isinstance(value, dict))
    others = [name for name in dict.fromkeys(names) if name not in _OTHERS]
    own = (Row(name.replace("_", " "), name, scale_of(name)) for name in others)
    return (*BALANCED, *own, *MINIATURE, *LENGTHS)


@dataclasses.dataclass(frozen=True)
class Cell:
    mean: float | None
    std: float | None = None


def cell_of(evaluation: Mapping[str, Any], row: Row) -> Cell:
    """A stored value is a number or {"mean", "std"} over the evaluated captions."""
    value = evaluation.get(row.key)
    parts = value if isinstance(value, dict) else {"mean": value}
    return Cell(*(row.scale * parts[key] if is_number(parts.get(key)) else None for key in ("mean", "std")))


_LEAST_DISTANCE = 1.0  # points of b-CapScore; a share of less is noise


def closed_share(labels: Sequence[str], ceiling: str | None, evaluations: Mapping[str, Any]) -> float | None:
    """The share of the distance in b-CapScore from the first of the two `labels` to the ceiling that the last closed.

    None where one of the three has no score, or the first is not below the ceiling.
    """
    if ceiling is None or len(labels) < 2:
        return None
    row = next(row for row in BALANCED if row.key == "b_capscore")
    before, after, most = (cell_of(mapping(evaluations.get(label)), row).mean for label in (*labels, ceiling))
    if None in (before, after, most) or most - before < _LEAST_DISTANCE:
        return None
    return (after - before) / (most - before)


@dataclasses.dataclass(frozen=True)
class Share:
    """Percentage of the `n` captions in which a habit could occur that have it."""

    percent: float | None
    n: float | None


def habits_in(evaluations: Iterable[Mapping[str, Any]]) -> list[str]:
    """The habits that were counted, in the order of HABITS; unknown names last."""
    counted = dict.fromkeys(name for evaluation in evaluations for name in mapping(evaluation.get("habits")))
    return [*(name for name in HABITS if name in counted), *(name for name in counted if name not in HABITS)]


def share_of(evaluation: Mapping[str, Any], habit: str) -> Share:
    value = mapping(mapping(evaluation.get("habits")).get(habit))
    share, n = (value.get(key) if is_number(value.get(key)) else None for key in ("share", "n"))
    is_share = share is not None and 0 <= share <= 1 and n is not None and n >= 0
    return Share(100 * share, n) if is_share else Share(None, None)
