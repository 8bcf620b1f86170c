"""The run of one evaluation: it judges items, writes each judgement as a line at once, and adds the lines up.

    DIR/items.jsonl     one line an item: id, category, words, the judgement, and its `parts`, or an "error"
    DIR/results.json    the figures
    DIR/settings.json   what was evaluated with what; keeps other captions and judges out of the same folder

A metric gives each item a vector of `parts` that add up over items, and a function of the sums: a mean is (points, 1)
and the quotient. So the same few lines give figures of categories, confidence intervals by bootstrap and paired
comparisons for every metric. Only these vectors stay in memory.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import balcap_jax
from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, read_json_object, read_jsonl, write_text
from balcap_jax.cli.json_text import is_number
from balcap_jax.cli.progress import ProgressLine
from balcap_jax.data.words import count_words
from balcap_jax.judges.budget import Spending
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.types import Ask
from balcap_jax.judges.schema import Failure

RESAMPLES, SEED, COVERAGE = 1000, 0, 0.95  # of the bootstrap
NO_CAPTION = "no caption"
UNPARSED = "unparsed"
_REMEDY = "delete the folder, or name another one with --out"
_REASONS = 20  # of invalid items that results.json names
_CHUNK = 1 << 22  # numbers of a block of resampled counts


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to judge. `caption` None: there is none, which is counted. `data` is the metric's own.

    group: what items share that stand or fall together, such as the picture whose caption answers many questions; "" =
    the item is alone. Intervals and tests are about groups. has_text: the caption's text is known, not only what was
    made of it.
    """

    id: str
    caption: str | None
    data: Any = None
    category: str = ""
    group: str = ""
    has_text: bool = True

    @property
    def words(self) -> int | None:
        return count_words(self.caption or "") if self.has_text else None


class Metric:
    """How captions, or answers, are scored.

    prompts: names and versions of a judge's questions; () = nobody is asked. sees: pictures are read for the judge.
    without_parts: the error of an item whose `parts` are None. max_tokens: longest answer of the judge.
    """

    name: str
    prompts: tuple[str, ...] = ()
    sees: bool = False
    without_parts: str = UNPARSED
    max_tokens: int = 2048

    def __init__(self, max_tokens: int | None = None):
        self.max_tokens = max_tokens or self.max_tokens

    def state(self) -> dict[str, Any]:
        """What `score` depends on beside the sums, JSON-able; `restore` takes it."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Makes `score` that of the metric whose `state` it was."""
        del state

    def judge(self, client: ChatClient | None, items: Sequence[Item]) -> "list[Mapping[str, Any] | Failure]":
        """A JSON-able judgement of each item, all of which have captions: what becomes of one question about each."""
        questions = [self.question(item) for item in items]
        answers = iter(client.ask([question for question in questions if not isinstance(question, Failure)]))
        judgements = []
        for item, question in zip(items, questions, strict=True):
            answer = question if isinstance(question, Failure) else next(answers)
            judgements.append(answer if isinstance(answer, Failure) else self.judgement(item, answer.value))
        return judgements

    def question(self, item: Item) -> Ask | Failure:
        """The one question about an item, or why there is none."""
        raise TypeError(f"{type(self).__name__} judges nothing")

    def judgement(self, item: Item, answer: Any) -> Mapping[str, Any]:
        """What an answer, of the question's schema, says of the item."""
        raise TypeError(f"{type(self).__name__} judges nothing")

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float] | None:
        """What adds up over items; None where the judgement cannot be used. Raises KeyError, TypeError, IndexError or
        ValueError for a judgement of another form."""
        raise TypeError(f"{type(self).__name__} has no parts")

    def score(self, sums: np.ndarray) -> np.ndarray:
        """The score of sums [..., P] of parts, [...]: the first over the last; NaN where nothing was added up."""
        return ratio(sums[..., 0], sums[..., -1])

    def of_item(self, parts: Sequence[float]) -> float:
        """The score of one item alone, for comparisons item by item."""
        return float(self.score(np.asarray(parts, float)))

    def of_category(self, sums: np.ndarray) -> float:
        """The score of the items of one category, whose sums these are."""
        return float(self.score(sums))

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        """Other figures of sums [P], beside the score."""
        del sums
        return {}


@dataclasses.dataclass(frozen=True)
class Row:
    """The part of an item's line that stays in memory: `parts` None = it is invalid, `error` says why."""

    id: str
    category: str
    words: int | None
    parts: tuple[float, ...] | None
    error: str = ""
    group: str = ""


def evaluate(
    metric: Metric,
    items: Sequence[Item],
    out: Path,
    identity: Mapping[str, Any],
    *,
    client: ChatClient | None = None,
    judge: Mapping[str, Any] | None = None,
    judgements: Mapping[str, Mapping[str, Any]] | None = None,
    retry_errors: bool = False,
    unused: Sequence[str] = (),
    captions: Mapping[str, Any] | None = None,
    truncated: float | None = None,
) -> dict[str, Any]:
    """Judges what `out` still lacks, writes the results and returns them.

    Args:
      identity: what else the judgements depend on, such as a digest of the captions.
      client, judge: the judge, and its config group; None for metrics that ask nobody.
      judgements: judgements by id, made elsewhere, in place of a client.
      unused: ids of captions and judgements that no item has; they are counted.
      captions: how the captions were made (`protocol.made`); truncated: the percentage of them that was cut.

    Raises:
      UserError: two items of one id, the folder holds another evaluation, the judge fails too often, judge.max_cost is
        reached, or it cannot be written.
    """
    counts = collections.Counter(item.id for item in items)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{metric.name} has {len(twice)} items twice, such as {twice[0]!r}; keep one of each")
    settings = {"metric": metric.name, "judge": client.model if client else "", **identity}
    settings["prompts"] = ", ".join(metric.prompts) if client else ""
    settings["captions"] = dict(captions or {})
    if judge and client:
        settings["temperature"] = judge["temperature"]
    claim(out, settings)
    spending = Spending(client, judge, out / "judge.json") if client else None
    # Pictures of a batch are held at once.
    batch = (1 if metric.sees else 4) * judge["concurrency"] if client else 1024
    with AppendedLines(out / "items.jsonl", remember=read_row) as lines:
        if retry_errors:
            _forget_errors(lines)
        judged_ids = {row.id for row in lines.entries}
        pending = [item for item in items if item.id not in judged_ids]
        if pending:  # A stop must not leave figures beside judgements that are none of theirs.
            (out / "results.json").unlink(missing_ok=True)
        with ProgressLine("judgements", len(items), len(items) - len(pending), "items") as progress:
            for start in range(0, len(pending), batch):
                part = pending[start : start + batch]
                judged = _lines(metric, part, client, judgements)
                if spending and (reason := spending.exhausted()):
                    raise UserError(f"{reason}; {out} has what was judged before, the same command goes on")
                lines.append(judged)
                progress.advance(len(part))
                if spending:
                    spending.update()
                    if spending.spent and start + len(part) < len(pending):
                        raise UserError(f"{spending.limit_text()}; {out} has what was judged, raise it to go on")
        rows = {row.id: row for row in lines.entries}
    try:
        results = settings | summarise(metric, [rows[item.id] for item in items])
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{out}/items.jsonl has lines of unlike parts, which this command never writes; remove those that were "
            "edited, and they are judged again"
        ) from error
    results["empty"] = sum(item.has_text and item.caption is not None and not item.caption.strip() for item in items)
    results["truncated"] = truncated
    results["state"] = metric.state()
    results |= {"unused": len(unused), "unused_ids": list(unused)[:_REASONS]}
    results["version"] = balcap_jax.__version__
    write_text(out / "results.json", json_text.dumps(results, indent=2) + "\n")
    return results


def _lines(metric: Metric, items: Sequence[Item], client: ChatClient | None, known: Mapping | None) -> list[dict]:
    judged = [item for item in items if item.caption is not None and (known is None or item.id in known)]
    answers = [known[item.id] for item in judged] if known is not None else metric.judge(client, judged)
    judgements = dict(zip((item.id for item in judged), answers, strict=True))
    lines = []
    for item in items:
        line: dict[str, Any] = {"id": item.id, "category": item.category, "words": item.words}
        if item.group:
            line["group"] = item.group
        judgement = judgements.get(item.id)
        if item.caption is None:
            line["error"] = NO_CAPTION
        elif judgement is None:
            line["error"] = "no judgement of it is given"
        elif isinstance(judgement, Failure):
            line["error"] = judgement.reason
        else:
            line["judgement"] = judgement
            try:
                parts = metric.parts(item, judgement)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
                parts, line["error"] = None, f"a judgement of another form ({type(error).__name__}: {error})"
            if parts is not None and not all(map(is_number, map(float, parts))):
                parts, line["error"] = None, "a judgement of another form (numbers that are none)"
            if parts is not None:
                line["parts"] = [float(part) for part in parts]
                line["score"] = finite(metric.of_item(parts))
            else:
                line.setdefault("error", metric.without_parts)
        lines.append(line)
    return lines


def read_row(line: Mapping[str, Any]) -> Row:
    """The row of a line of items.jsonl. Raises UserError for a line that this command never writes."""
    parts, words = line.get("parts"), line.get("words", 0)
    has_numbers = parts is None or (isinstance(parts, list) and all(map(is_number, parts)))
    has_count = words is None or (isinstance(words, int) and is_number(words))
    if not isinstance(line.get("id"), str) or not has_numbers or not has_count:
        raise UserError("its id, parts or words are none that this command wrote")
    values = None if parts is None else tuple(map(float, parts))
    error, group = str(line.get("error", "")), str(line.get("group", line["id"]))
    return Row(line["id"], str(line.get("category", "")), words, values, error, group)


def _forget_errors(lines: AppendedLines) -> None:
    """Drops the lines that have an error, so that the judge sees their items anew."""
    if any(row.error for row in lines.entries):
        lines.replace([line for _, line in read_jsonl(lines.path, _REMEDY) if "error" not in line])


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError where the folder holds another evaluation than that of `settings`."""
    path = out / "settings.json"
    try:
        before = read_json_object(path, _REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        if (out / "items.jsonl").exists():
            raise UserError(
                f"{out} has items.jsonl without settings.json, which says what they are; {_REMEDY}"
            ) from None
        write_text(path, json_text.dumps(settings, indent=2) + "\n")
        return
    for name in {**before, **settings}:
        # `inputs` tells other captions apart, and folders of earlier versions do not say how theirs were made.
        if name != "captions" and before.get(name) != settings.get(name):
            raise UserError(
                f"{out} holds an evaluation with {name} {before.get(name)!r}, not {settings.get(name)!r}; {_REMEDY}"
            )


# --- adding up --------------------------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")
def summarise(metric: Metric, rows: Sequence[Row]) -> dict[str, Any]:
    """{"score", "confidence", "n", "invalid", "errors", "words", "categories", ...} of rows, in the items' order."""
    valid = [row for row in rows if row.parts is not None]
    errors = collections.Counter(row.error[:120] for row in rows if row.parts is None).most_common()
    if len(errors) > _REASONS:
        errors[_REASONS:] = [("other reasons", sum(count for _, count in errors[_REASONS:]))]
    result: dict[str, Any] = {"score": None, "confidence": None}
    categories: dict[str, Any] = {}
    if valid:
        matrix = np.array([row.parts for row in valid], np.float64)
        sums = matrix.sum(0)
        result["score"] = finite(metric.score(sums))
        grouped = sums_of_groups(matrix, [row.group for row in valid])
        result["confidence"] = interval(metric.score(resampled_sums(grouped))) if len(grouped) > 1 else None
        result["groups"] = len(grouped)
        result |= {name: finite(value) for name, value in metric.figures(sums).items()}
        names = np.array([row.category for row in valid])
        for name in sorted(set(names.tolist()) - {""}):
            inside = names == name
            categories[name] = {"score": finite(metric.of_category(matrix[inside].sum(0))), "n": int(inside.sum())}
    # A caption that several items are about counts once.
    words = list({row.group: row.words for row in rows if row.error != NO_CAPTION and row.words is not None}.values())
    return result | {
        "n": len(valid),
        "invalid": len(rows) - len(valid),
        "errors": dict(errors),
        "words": float(np.mean(words)) if words else None,
        "categories": categories,
    }


def sums_of_groups(matrix: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """[number of groups, P]: sums of the rows of `matrix` [n, P] of each group, in the order of their first rows."""
    rows = {name: k for k, name in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(rows), matrix.shape[1]))
    np.add.at(sums, [rows[name] for name in groups], matrix)
    return sums


def resampled_sums(matrix: np.ndarray, count: int = RESAMPLES) -> np.ndarray:
    """Sums [count, P] of `count` samples, with replacement, of the n rows of `matrix` [n, P]; always the same ones.

    Two matrices of as many rows are resampled alike: that is what makes a comparison of them paired.
    """
    rng, n = np.random.default_rng(SEED), len(matrix)
    block = max(1, _CHUNK // max(n, 1))
    sums = []
    for start in range(0, count, block):
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(block, count - start))
        sums.append(times @ matrix)
    return np.concatenate(sums)


def interval(values: np.ndarray) -> list[float] | None:
    """The central COVERAGE of resampled values; None where one of them is not a number."""
    if not np.isfinite(values).all():
        return None
    tail = (1 - COVERAGE) / 2
    return [float(value) for value in np.quantile(values, [tail, 1 - tail])]


def ratio(above: np.ndarray, below: np.ndarray, scale: float = 100.0) -> np.ndarray:
    """scale * above / below; NaN where below is 0."""
    return scale * np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) != 0)


def pairs(names: Sequence[str], name: str, points: float) -> list[float]:
    """Parts of a mean for each of `names`: (points, 1) at the place of `name`, (0, 0) at all others."""
    return [value for other in names for value in ((float(points), 1.0) if other == name else (0.0, 0.0))]


def means_of_pairs(names: Sequence[str], sums: np.ndarray) -> dict[str, np.ndarray]:
    """The means by name of sums [..., 2 * len(names)] of such `pairs`, in percent."""
    return {name: ratio(sums[..., 2 * k], sums[..., 2 * k + 1]) for k, name in enumerate(names)}


def mean_of_known(values: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the first axis of what is not NaN; NaN where all is."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    return ratio(np.where(known, stacked, 0.0).sum(0), known.sum(0), 1.0)


def finite(value: Any) -> float | None:
    """The value as a float; None where it is infinite or not a number."""
    return float(value) if np.isfinite(value) else None
