"""`python -m balcap_jax.report D [D2 ...]`: one self-contained HTML page about one or several runs.

The page makes no request: its style, charts (SVG) and pictures (data URLs) are inside it. It has no script, and its
Content-Security-Policy allows none. Captions, judge answers, ids and configs are untrusted: everything goes through
Jinja's autoescaping, and only the template's own style sheet is marked safe.

`balcap_jax.report.run` describes the files of a run directory. The page shows rewards and shares in points, 0 to 100.
"""

import base64
import functools
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import make_directory, replace_file, resolved
from balcap_jax.data.scenes.habits import HABITS
from balcap_jax.report import marks, rollouts
from balcap_jax.report.charts import FRAME, RUN_COLOURS, SUPERSCRIPT, chart_groups, short_number, time_chart, with_times
from balcap_jax.report.distributions import distributions
from balcap_jax.report.facts import aligned, all_facts, flat, heads
from balcap_jax.report.gallery import gallery, uncovered
from balcap_jax.report.run import KINDS, MINIATURE, Run, label_text, load_run
from balcap_jax.report.tables import CEILING_TITLE, between, habit_rows, headlines, tables

# Charts of a row by the least width of the page in rem, as the style sheet has room for.
COLUMNS = ((36, 2), (54, 3), (72, 4))
_MOST_CHARTS = 16  # of a group whose rows are evened out


# --- layout -----------------------------------------------------------------------------------------------------------


def row_starts(count: int, columns: int) -> tuple[int, list[int]]:
    """(columns, the charts from 1 that begin a row) for `count` charts: rows as even as they can be.

    A row of one chart beside fuller rows would leave most of the page's width empty; it is left only where two columns
    and an odd count allow no other.
    """
    rows = math.ceil(count / columns)
    size, more = divmod(count, rows)
    sizes = [size + (row < more) for row in range(rows)]
    return max(sizes), [1 + sum(sizes[:row]) for row in range(rows)]


def _chart_rules() -> list[dict[str, Any]]:
    """For each width of COLUMNS the grids of each count: {"rem", "below", "counts": [(count, columns, starts)]}."""
    counts, least = range(2, _MOST_CHARTS + 1), [rem for rem, _ in COLUMNS]
    below = [rem - 0.01 for rem in least[1:]] + [None]
    return [
        {"rem": rem, "below": end, "counts": [(count, *row_starts(count, columns)) for count in counts]}
        for (rem, columns), end in zip(COLUMNS, below, strict=True)
    ]


# --- the page ---------------------------------------------------------------------------------------------------------


def _signed(delta: float) -> str:
    """A change with its sign, and none on a zero."""
    text = f"{delta:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text


def _raised(number: int) -> str:
    """A number in superscript figures: an element for each would make a page of many captions slow to open."""
    return str(number).translate(SUPERSCRIPT)


def _printable(value: Any) -> Any:
    """Template output without control characters and bidirectional overrides, which could make a line lie."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in "\n\t" or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in value)


def _csp_hash(style: str) -> str:
    """The Content-Security-Policy source of one inline style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()


@functools.cache
def _environment() -> jinja2.Environment:
    """The templates, compiled once in a process."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"csp_hash": _csp_hash, "number": short_number, "signed": _signed}
    environment.filters["signed_number"] = rollouts.signed
    environment.globals |= {"label_text": label_text, "uncovered": uncovered, "meanings": HABITS}
    environment.globals |= {"pieces": marks.pieces, "kind_of": marks.kind_of, "raised": _raised}
    environment.globals["metrics"] = {row.key: row.name for row in MINIATURE}
    return environment


def render(runs: Sequence[Run]) -> str:
    """The page's HTML. All parts add their notes about missing things before the template renders the notes."""
    skipped: list[str] = []
    results = tables(runs)
    groups = chart_groups(runs, skipped)
    times = [chart for run in runs if (chart := time_chart(run)) is not None]
    shown = gallery(runs)
    groups_of_training = [{"run": run.name, "groups": found} for run in runs if (found := rollouts.groups(run))]
    if skipped and any(run.records for run in runs):
        runs[0].notes.append("metrics.jsonl: not logged, so not drawn: " + ", ".join(skipped))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            runs=runs,
            heads=aligned([heads(run) for run in runs]),
            headlines=headlines(results),
            between=between(runs),
            tables=results,
            habits=habit_rows(runs),
            kinds=list(KINDS.values()),
            ceiling_title=CEILING_TITLE,
            distributions=distributions(runs),
            groups=with_times(groups, times),
            times=times,
            rollouts=groups_of_training,
            gallery=shown["cards"],
            filters=shown["filters"],
            facts=aligned([all_facts(run) for run in runs]),
            config=aligned([flat(run.config) for run in runs]),
            colours=[index % RUN_COLOURS + 1 for index in range(len(runs))],
            frame=FRAME,
            chart_rules=_chart_rules(),
        )
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
