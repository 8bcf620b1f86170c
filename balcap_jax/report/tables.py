"""The report's tables: evaluations before, after and at the ceiling, and habits; as text, and as rows of the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.data.scenes.habits import HABITS
from balcap_jax.report.changes import Change, change
from balcap_jax.report.run import (
    BALANCED,
    KINDS,
    LENGTHS,
    MINIATURE,
    TABLE,
    USUAL_ORDER,
    Cell,
    Row,
    Run,
    Share,
    before_and_after,
    ceiling_of,
    cell_of,
    closed_share,
    habits_in,
    is_number,
    label_text,
    mapping,
    rows_of,
    share_of,
)

CEILING_TITLE = "ceiling"
UNCHANGED = "no caption changed"
# Rows that the terminal leaves out.
_ONLY_ON_THE_PAGE = ("corpus_b_capscore", "truncated")
_OF_BALCAP = BALANCED[:4]  # its three objectives and b-CapScore
_NAMES, _NUMBERS = 24, 10  # characters: width of a row's name, of a column


# --- as text ----------------------------------------------------------------------------------------------------------


def result_text(summary: Mapping[str, Any], order: Sequence[str] = USUAL_ORDER) -> str:
    """What ends a training with the stages `order`: the tables of greedy and of sampled captions, and of habits."""
    parts = []
    for kind, title in KINDS.items():
        if evaluations := mapping(summary.get(kind)):
            images = mapping(next(reversed(evaluations.values()))).get("images", "?")
            parts.append(f"\n{images} held-out images, {title} captions\n{before_after_table(summary, order, kind)}")
    if table := habit_table(summary, order):
        parts.append(f"\n{table}")
    return "\n".join(parts)


def before_after_table(summary: Mapping[str, Any], order: Sequence[str] = USUAL_ORDER, kind: str = "greedy") -> str:
    """The first and the last of the `summary`'s evaluations of one of KINDS, their difference, and the ceiling."""
    evaluations = mapping(summary.get(kind))
    labels, ceiling = before_and_after(evaluations, order), ceiling_of(evaluations, order)
    if not labels:
        return "no evaluation yet"
    columns = [mapping(evaluations[label]) for label in (*labels, *([ceiling] if ceiling else []))]
    names = [label_text(label) for label in labels] + (["change"] if len(labels) > 1 else [])
    names += [CEILING_TITLE] if ceiling else []
    count = columns[len(labels) - 1].get("n")
    lines = [_line(f"{count} captions" if is_number(count) else "", names)]
    is_balanced = any(cell_of(column, row).mean is not None for column in columns for row in _OF_BALCAP)
    for row in rows_of(columns):
        cells = [cell_of(column, row) for column in columns]
        if row.key in _ONLY_ON_THE_PAGE or (row in _OF_BALCAP and not is_balanced):
            continue
        if row in TABLE and row not in _OF_BALCAP and all(cell.mean is None for cell in cells):
            continue
        values = ["-" if cell.mean is None else f"{cell.mean:.1f}{row.unit}" for cell in cells]
        if len(labels) > 1:
            delta = difference(*cells[:2])
            values.insert(2, "-" if delta is None else f"{delta:+.1f}")
        lines.append(_line(row.name, values))
    if is_unchanged(labels, evaluations):
        lines.append(f"{UNCHANGED}: all captions after are those before")
    if kind == "greedy" and (closed := closed_text(labels, ceiling, evaluations)):
        lines.append(closed)
    return "\n".join(lines)


def is_unchanged(labels: Sequence[str], evaluations: Mapping[str, Any]) -> bool:
    """Whether the evaluations of the two `labels` have the same captions, as far as they say so."""
    digests = [mapping(evaluations[label]).get("digest") for label in labels]
    return len(digests) > 1 and digests[0] is not None and digests[0] == digests[-1]


def habit_table(summary: Mapping[str, Any], order: Sequence[str] = USUAL_ORDER) -> str:
    """Percentages of captions that have each habit, where it could occur; empty where no habit was counted."""
    columns, titles = [], []
    for kind, title in KINDS.items():
        evaluations = mapping(summary.get(kind))
        labels = before_and_after(evaluations, order)
        columns += [mapping(evaluations[label]) for label in labels]
        titles += [(title if label == labels[0] else "", label_text(label)) for label in labels]
    names = habits_in(columns)
    if not names:
        return ""
    lines = [_line("", [kind for kind, _ in titles]).rstrip(), _line("habits, % of captions", [t for _, t in titles])]
    for name in names:
        shares = [share_of(column, name).percent for column in columns]
        lines.append(_line(name, ["-" if share is None else f"{share:.1f}" for share in shares]))
    return "\n".join(lines)


def _line(name: str, values: Sequence[str]) -> str:
    return f"{name:<{_NAMES}}" + "".join(f"{value:>{_NUMBERS}}" for value in values)


def difference(before: Cell, after: Cell) -> float | None:
    return None if before.mean is None or after.mean is None else after.mean - before.mean


def closed_text(labels: Sequence[str], ceiling: str | None, evaluations: Mapping[str, Any]) -> str:
    """One sentence of `closed_share`; empty where there is none."""
    share = closed_share(labels, ceiling, evaluations)
    if share is None:
        return ""
    before, after = (label_text(label) for label in labels)
    return f"{after} closes {100 * share:.0f}% of the distance from {before} to the ceiling in b-CapScore"


# --- as rows of the page ----------------------------------------------------------------------------------------------


def tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One table for each kind of evaluation that any of the runs has."""
    found = []
    for kind, title in KINDS.items():
        if rows := _rows(runs, kind):
            table = {"kind": title, "title": f"{title.capitalize()} captions", "rows": rows}
            table["counts"] = _counts(runs, kind)
            found.append(table | {"closed": [_closed_of(run) for run in runs] if kind == "greedy" else []})
    return found


def _rows(runs: Sequence[Run], kind: str) -> list[dict[str, Any]]:
    """Each run has its cells in the order of its labels, the change, and the ceiling (None: the run has none)."""
    shown = {run.path: [*run.labels, *([run.ceiling] if run.ceiling else [])] for run in runs}
    rows = []
    for row in rows_of([run.evaluation(label, kind) for run in runs for label in shown[run.path]]):
        per_run = []
        for run in runs:
            cells = [cell_of(run.evaluation(label, kind), row) for label in run.labels]
            ceiling = cell_of(run.evaluation(run.ceiling, kind), row) if run.ceiling else None
            delta = difference(*cells) if len(cells) > 1 else None
            span = _span(run, kind, row, delta)
            signed = 0.0 if delta is None else round(delta, 1) * row.better
            verdict = "up" if signed > 0 else "down" if signed < 0 else ""
            per_run.append({"cells": cells, "delta": delta, "span": span, "verdict": verdict} | {"ceiling": ceiling})
        if any(cell.mean is not None for entry in per_run for cell in (*entry["cells"], entry["ceiling"]) if cell):
            rows.append({"name": row.name, "key": row.key, "unit": row.unit, "runs": per_run})
    return rows


def _span(run: Run, kind: str, row: Row, delta: float | None) -> Change | None:
    """The change between the captions of a run's two labels with its interval, where it is the `delta` of the means."""
    if delta is None:
        return None
    return change(*(run.judged[kind].get(label, {}) for label in run.labels), row, delta)


def headlines(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of `tables` that a reader looks for first: of each row {"name", "kinds"}, greedy beside sampled.

    An entry of a kind is {"kind", "runs"}, and of a run that has both values {"before", "after", "delta", "span",
    "verdict"}, else None. Rows are BalCap's, or of a run without those its own rewards.
    """
    rows: dict[str, dict[str, Any]] = {}
    for table in found:
        for row in table["rows"]:
            entries = [_headline(entry) for entry in row["runs"]]
            if row["key"] not in _LATER and any(entries):
                named = rows.setdefault(row["key"], {"name": row["name"], "kinds": []})
                named["kinds"].append({"kind": table["kind"], "runs": entries})
    first = [rows[key] for key in ("b_capscore", "precision", "recall", "linguistic") if key in rows]
    return first or list(rows.values())[:4]


_LATER = frozenset(row.key for row in (*MINIATURE, *LENGTHS)) | {"corpus_b_capscore"}


def _headline(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    if entry["delta"] is None:
        return None
    before, after = (cell.mean for cell in entry["cells"])
    return {"before": before, "after": after} | {name: entry[name] for name in ("delta", "span", "verdict")}


def between(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the last captions of each further run are beside those of the first, over the pictures that both have.

    One entry per run and kind that shares pictures: {"run", "base", "kind", "images", "rows"}; a row is a name, a
    Change and a verdict.
    """
    found = []
    for run in runs[1:]:
        for kind, title in KINDS.items():
            captions = [one.judged[kind].get(one.labels[-1], {}) if one.labels else {} for one in (runs[0], run)]
            names = dict.fromkeys(name for image in captions[-1].values() for c in image.captions for name in c.rewards)
            rows = []
            for row in rows_of([{name: {} for name in names}]):
                span = change(*captions, row)
                if span is not None:
                    verdict = "up" if span.low * row.better > 0 or span.high * row.better > 0 else "down"
                    rows.append((row.name, span, verdict if row.better and span.low * span.high > 0 else ""))
            if rows:
                images = max(span.images for _, span, _ in rows)
                named = {"run": run.name, "base": runs[0].name, "kind": title, "images": images}
                found.append(named | {"rows": rows})
    return found


def _closed_of(run: Run) -> dict[str, Any]:
    """The share of `closed_share` in percent, and the sentence about it."""
    evaluations = mapping(run.summary.get("greedy"))
    share = closed_share(run.labels, run.ceiling, evaluations)
    text = closed_text(run.labels, run.ceiling, evaluations)
    return {"run": run.name, "percent": None if share is None else 100 * share, "text": text}


def _counts(runs: Sequence[Run], kind: str) -> list[str]:
    """What the tables' means are over, such as "48 images, 192 captions"; one entry where all runs agree."""
    texts = []
    for run in runs:
        for label in run.labels[-1:]:
            evaluation = run.evaluation(label, kind)
            counts = {"images": evaluation.get("images"), "captions": evaluation.get("n")}
            text = ", ".join(f"{count:g} {name}" for name, count in counts.items() if is_number(count))
            unchanged = is_unchanged(run.labels, {label: run.evaluation(label, kind) for label in run.labels})
            texts.append(f"{text}; {UNCHANGED}" if text and unchanged else text)
    return [text for text in dict.fromkeys(texts) if text]


def habit_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each habit: its meaning, and by run the shares of each kind, the ceiling's, and captions by kind.

    The ceiling's share is that of its greedy captions.
    """
    evaluations = [run.evaluation(label, kind) for run in runs for kind in KINDS for label in run.labels]
    rows = []
    for name in habits_in(evaluations):
        per_run = []
        for run in runs:
            shares = {kind: [share_of(run.evaluation(label, kind), name) for label in run.labels] for kind in KINDS}
            ceiling = share_of(run.evaluation(run.ceiling, "greedy"), name).percent if run.ceiling else None
            counts = [found[-1].n for found in shares.values() if found]
            per_run.append(
                {
                    "percents": [[share.percent for share in found] for found in shares.values()],
                    "ceiling": ceiling,
                    "bar": _bar(shares["greedy"]) or _bar(shares["evaluations"]),
                    "counts": " / ".join("–" if n is None else f"{n:g}" for n in counts),
                }
            )
        rows.append({"name": name, "meaning": HABITS.get(name, ""), "runs": per_run})
    return rows


def _bar(shares: Sequence[Share]) -> tuple[float, float] | None:
    """Shares before and after in percent, where both are known."""
    percents = [share.percent for share in shares]
    return None if len(percents) != 2 or None in percents else (percents[0], percents[1])
