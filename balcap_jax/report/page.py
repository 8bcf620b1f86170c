"""`python -m balcap_jax.report D [D2 ...]`: one self-contained HTML page about one or several runs.

The page makes no request: its style, charts (SVG) and pictures (data URLs) are inside it. It has no script, and its
Content-Security-Policy allows none. Captions, judge answers, ids and configs are untrusted: everything goes through
Jinja's autoescaping, and only the template's own style sheet is marked safe.

`balcap_jax.report.run` describes the files of a run directory. The page shows rewards and shares in points, 0 to 100.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import make_directory, read_bytes, replace_file, resolved
from balcap_jax.data.scenes.habits import HABITS
from balcap_jax.report.charts import FRAME, RUN_COLOURS, chart_groups, short_number, time_chart
from balcap_jax.report.run import (
    KINDS,
    MINIATURE,
    JudgedCaption,
    JudgedImage,
    Run,
    is_number,
    label_text,
    load_run,
    mapping,
)
from balcap_jax.report.tables import CEILING_TITLE, habit_rows, tables

GALLERY_IMAGES = 8
MAX_IMAGE_BYTES = 4 << 20  # a picture beyond this is named, not embedded: the page should open on a phone
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


# --- gallery ----------------------------------------------------------------------------------------------------------


def _changes(run: Run, kind: str) -> dict[str, float]:
    """By image: change in b-CapScore from the first to the last label; with one label, the b-CapScore itself."""
    changes = {}
    for image_id in run.image_ids:
        scores = [image.b_capscore if image else None for image in run.images(image_id, kind).values()]
        if scores and None not in scores:
            changes[image_id] = scores[-1] - scores[0] if len(scores) > 1 else scores[0]
    return changes


def choose_images(run: Run, count: int = GALLERY_IMAGES) -> list[tuple[str, str]]:
    """(image id, why it was chosen): evenly spread over the ranking by change in b-CapScore, best and worst included.

    The change is that of greedy captions, and of sampled ones where those have none. Images without a score in both
    evaluations can't be ranked; they are shown only where no image can be.
    """
    kind, changes = next(((kind, found) for kind in KINDS if (found := _changes(run, kind))), ("", {}))
    if not changes:
        return [(image_id, "not ranked: no b-CapScore") for image_id in run.image_ids[:count]]
    ranked = sorted(changes, key=lambda image_id: -changes[image_id])
    median, last = (len(ranked) - 1) // 2, len(ranked) - 1
    upper, lower = max(count // 2 - 1, 1), max(count - count // 2, 1)
    places = {round(median * k / upper) for k in range(upper + 1)}
    places |= {median + round((last - median) * k / lower) for k in range(lower + 1)}
    what = f"{'change in ' if len(run.labels) > 1 else ''}b-CapScore of {KINDS[kind]} captions"
    named = {median: f"median {what}", last: f"lowest {what}", 0: f"highest {what}"}
    return [(ranked[p], named.get(p, f"rank {p + 1} of {len(ranked)} by {what}")) for p in sorted(places)]


def _gallery(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Cards; a run that shares images with an earlier run's choice is shown on the same cards."""
    cards: dict[str, dict[str, Any]] = {}
    for run in runs:
        if cards.keys().isdisjoint(run.image_ids):
            for image_id, why in choose_images(run):
                cards[image_id] = {"id": image_id, "why": why, "chosen_in": run.name, "columns": [], "picture": None}
        for image_id, card in cards.items():
            images = {kind: run.images(image_id, kind) for kind in KINDS}
            for label in run.labels:
                parts = [(KINDS[kind], images[kind][label]) for kind in KINDS if images[kind][label]]
                if not parts:
                    continue
                (kind, first), folded = parts[0], parts[1:]
                if card["picture"] is None:
                    card |= {"picture": _picture(run, first), "image": first}
                column = {"run": run.name, "label": label_text(label), "kind": kind, "image": first}
                card["columns"].append(column | {"folded": folded})
    return list(cards.values())


def uncovered(caption: JudgedCaption, image: JudgedImage) -> list[str] | None:
    """Reference units that the caption misses; None when the judge's marks don't fit the units."""
    if caption.covered is None or len(caption.covered) != len(image.reference_units):
        return None
    return [unit for unit, covered in zip(image.reference_units, caption.covered, strict=True) if not covered]


def _picture(run: Run, image: JudgedImage) -> str:
    """A data URL of the image's PNG, or "" with a note. Paths that leave samples/ are refused: ids are untrusted."""
    if not image.image:
        return ""
    samples = (run.path / "samples").resolve()
    try:
        file = (samples / image.image).resolve()
        if not file.is_relative_to(samples):
            run.notes.append(f"picture {image.image}: outside samples/, not shown")
        elif file.stat().st_size > MAX_IMAGE_BYTES:
            run.notes.append(f"picture {image.image}: more than {MAX_IMAGE_BYTES >> 20} MiB, not shown")
        elif not (data := read_bytes(file)).startswith(PNG_SIGNATURE):
            run.notes.append(f"picture {image.image}: not a PNG, not shown")
        else:
            return "data:image/png;base64," + base64.b64encode(data).decode()
    except (OSError, ValueError) as error:
        run.notes.append(f"picture {image.image}: not readable ({getattr(error, 'strerror', None) or error})")
    return ""


# --- facts ------------------------------------------------------------------------------------------------------------


def _facts(run: Run) -> dict[str, str]:
    """One line per fact of a run, for the table of facts."""
    summary, facts = run.summary, {"directory": shown(run.path)}
    if isinstance(summary.get("command"), str):
        facts["command"] = summary["command"]
    if run.config:
        digest = hashlib.sha256(json.dumps(run.config, sort_keys=True).encode()).hexdigest()
        facts["config"] = f"sha256 {digest[:12]}"
    versions = {**mapping(summary.get("versions"))}
    device = summary.get("device") or versions.pop("device", None)
    if device:
        facts["device"] = str(device)
    if versions:
        facts["versions"] = " · ".join(f"{name} {version}" for name, version in versions.items())
    if run.records:
        spans: dict[str, list[float]] = {}
        for record in run.records:
            spans.setdefault(str(record.get("stage")), []).append(record["step"])
        facts["logged steps"] = ", ".join(f"{stage} {span[0]:g} to {span[-1]:g}" for stage, span in spans.items())
    seconds = {name: value for name, value in mapping(summary.get("seconds")).items() if is_number(value)}
    if seconds:
        wall = seconds.pop("wall", None) or seconds.pop("total", None) or sum(seconds.values())
        facts["total time"] = _duration(wall)
        longest_first = sorted(seconds.items(), key=lambda item: -item[1])
        facts["of which"] = ", ".join(f"{name} {_duration(value)}" for name, value in longest_first)
    return facts


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = json_text.dumps(value, ensure_ascii=False)
    return leaves


def _aligned(columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The union of the columns' rows; `same` says whether all columns agree."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name, "") for column in columns] for name in names}
    return [{"name": name, "values": values, "same": len(set(values)) == 1} for name, values in rows.items()]


# --- the page ---------------------------------------------------------------------------------------------------------


def _signed(delta: float) -> str:
    """A change with its sign, and none on a zero."""
    text = f"{delta:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text


def _printable(value: Any) -> Any:
    """Template output without control characters and bidirectional overrides, which could make a line lie."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in value)


def _csp_hash(style: str) -> str:
    """The Content-Security-Policy source of one inline style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()


def render(runs: Sequence[Run]) -> str:
    """The page's HTML. All parts add their notes about missing things before the template renders the notes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"csp_hash": _csp_hash, "number": short_number, "signed": _signed}
    environment.globals |= {"label_text": label_text, "uncovered": uncovered, "meanings": HABITS}
    environment.globals["metrics"] = {row.key: row.name for row in MINIATURE}
    skipped: list[str] = []
    groups = chart_groups(runs, skipped)
    times = [chart for run in runs if (chart := time_chart(run)) is not None]
    gallery = _gallery(runs)
    if skipped and any(run.records for run in runs):
        runs[0].notes.append("metrics.jsonl: not logged, so not drawn: " + ", ".join(skipped))
    return environment.get_template("report.html.j2").render(
        runs=runs,
        tables=tables(runs),
        habits=habit_rows(runs),
        kinds=list(KINDS.values()),
        ceiling_title=CEILING_TITLE,
        groups=groups,
        times=times,
        gallery=gallery,
        facts=_aligned([_facts(run) for run in runs]),
        config=_aligned([_flat(run.config) for run in runs]),
        colours=[index % RUN_COLOURS + 1 for index in range(len(runs))],
        frame=FRAME,
    )


def write_report(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> Path:
    """Writes the page about `workdirs`, aside and then renamed, and returns its path.

    `out` None is report.html in the run's directory, or in the current one for several runs. Raises UserError for a
    directory that is no run, and when the page can't be written.
    """
    path, _ = write_page(workdirs, out)
    return path


def write_page(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike | None) -> tuple[Path, list[Run]]:
    runs = [load_run(directory) for directory in workdirs]
    for index, run in enumerate(runs):  # two runs may have directories of the same name
        if any(run.name == other.name for other in runs[:index]):
            run.name = f"{run.name} ({index + 1})"
    path = resolved(out) if out is not None else (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if path.exists() and not path.is_file():  # a rename would put the page in the place of /dev/stdout
        raise UserError(f"{path}: cannot write the report (not a regular file); name another file with --out")
    # A lone surrogate, which JSON can smuggle in, has no UTF-8 form.
    page = render(runs).encode("utf-8", errors="replace")
    try:
        make_directory(path.parent)
        replace_file(path, page)
        storage.send(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the report ({error.strerror}); free space or name another file with --out"
        ) from error
    return path, runs
