"""Several evaluations side by side: scores with their intervals and lengths, and paired tests against the first.

    python -m balcap_jax.compare eval/base eval/rl --out=comparison
    python -m balcap_jax.compare eval/base/dcscore eval/rl/dcscore eval/rl/captionqa

Each folder is one that `evaluate` wrote, or holds such folders, as that of a suite. The first folder of each metric is
the base of the others, over the items that both have valid. The command gives the difference of the scores of these
items, its interval by a paired bootstrap, and the two-sided sign test. Interval and test are over groups of items where
some stand or fall together, as the questions about one caption.

Where another judge, other questions or another way to write the captions (prompt, token limit, temperature, image cap,
compute type) decides as well, the table says so and gives no test, unless --allow_different asks for it. A metric
without a score stops no other. DIR/comparison.md and DIR/comparison.html, a self-contained page, hold the same.
"""

import dataclasses
import functools
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.arguments import CommandParser, called, place
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_object, read_jsonl, write_text
from balcap_jax.cli.json_text import is_number
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.evals import protocol
from balcap_jax.evals.engine import Metric, finite, interval, resampled_sums, sums_of_groups
from balcap_jax.evals.metrics import metric_of
from balcap_jax.report.charts import bars
from balcap_jax.report.run import is_number as is_shown

# What comparable results have in common, beside how their captions were made, with the words for it.
_ALIKE = {
    "judge": "judge",
    "prompts": "prompts of the judge",
    "temperature": "temperature of the judge",
    "benchmark": "benchmark",
    "split": "split",
}
_ROUNDING = 1e-6  # points that are no difference
_NO_FIGURES = ("score", "n", "invalid", "words", "groups", "temperature", "empty", "unused", "captions")
_REMEDY = "give folders that `evaluate` wrote"
_TOO_FEW = "fewer than two items in common"
_FIGURES = ("evaluation", "score", "95% interval", "words", "n", "invalid")
_TEST = ("difference", "95% interval", "better / worse", "p")
_HEAD = (*_FIGURES, *_TEST)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
)


class NoScore(UserError):
    """A finished evaluation none of whose items was valid."""


@dataclasses.dataclass(frozen=True, eq=False)  # The cache of `paired` goes by identity.
class Evaluation:
    """results.json, and by id of each valid item its score, its parts and its group."""

    name: str
    results: Mapping[str, Any]
    metric: Metric
    scores: Mapping[str, float]
    parts: Mapping[str, Sequence[float]]
    groups: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Paired:
    """Differences to another evaluation over `items` common items of `groups` groups; p is that of the sign test.

    A difference is None where a score is no number, such as that of parts that are all 0.
    """

    items: int
    groups: int
    difference: float | None
    confidence: list[float] | None
    better: int
    worse: int
    p: float


def read(folder: str | Path) -> Evaluation:
    """Raises UserError where the folder holds no finished evaluation, NoScore where it has none."""
    folder = Path(folder)
    try:
        results = read_json_object(folder / "results.json", _REMEDY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} has no results.json; {_REMEDY}") from error
    if not isinstance(results.get("metric"), str) or "score" not in results:
        raise UserError(f"{folder}/results.json has no metric and score; {_REMEDY}")
    if not is_number(results["score"]):
        raise NoScore(f"{results['metric']} of {folder} has no score: none of its items was valid")
    if not isinstance(results.get("captions"), dict):
        results["captions"] = {}
    span = results.get("confidence")
    if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)):
        results["confidence"] = None
    if not is_number(results.get("words")):
        results["words"] = None
    metric = metric_of(results["metric"])
    scores, parts, of_group = {}, {}, {}
    for where, line in read_jsonl(folder / "items.jsonl", _REMEDY):
        if not isinstance(line.get("id"), str):
            raise UserError(f"{where} has no id; {_REMEDY}")
        numbers = line.get("parts")
        if numbers is None:
            continue
        are_numbers = isinstance(numbers, list) and all(map(is_number, numbers))
        if not are_numbers or len(numbers) != len(parts.get(line["id"], numbers)):
            raise UserError(f"{where} has parts that are no numbers; {_REMEDY}")
        parts[line["id"]], of_group[line["id"]] = numbers, str(line.get("group", line["id"]))
        if is_shown(line.get("score")):
            scores[line["id"]] = float(line["score"])
    try:
        metric.restore(results.get("state", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/results.json has a state of another form; {_REMEDY}") from error
    return Evaluation(shown(folder), results, metric, scores, parts, of_group)


def in_common(base: Evaluation, other: Evaluation) -> list[str]:
    """The items that are valid in both; none where they are of fewer than two groups."""
    common = [name for name in base.parts if name in other.parts]
    return common if len({base.groups[name] for name in common}) > 1 else []


@functools.cache
@np.errstate(over="ignore", invalid="ignore")
def paired(base: Evaluation, other: Evaluation) -> Paired | None:
    """`other` against `base`; None where they have fewer than two groups of valid items in common.

    Raises UserError where their items are not of one kind.
    """
    common = in_common(base, other)
    if not common:
        return None
    groups = [base.groups[name] for name in common]
    scores, resampled = [], []
    try:
        for member in (base, other):
            sums = sums_of_groups(np.array([member.parts[name] for name in common], np.float64), groups)
            scores.append(float(member.metric.score(sums.sum(0))))
            resampled.append(member.metric.score(resampled_sums(sums)))
    except (ValueError, IndexError) as error:
        raise UserError(f"{base.name} and {other.name} have items of other forms; {_REMEDY}") from error
    votes: dict[str, list[float]] = {}
    for name, group in zip(common, groups, strict=True):
        if name in base.scores and name in other.scores:
            votes.setdefault(group, []).append(other.scores[name] - base.scores[name])
    totals = [math.fsum(differences) for differences in votes.values()]
    better, worse = sum(total > _ROUNDING for total in totals), sum(total < -_ROUNDING for total in totals)
    difference, confidence = finite(scores[1] - scores[0]), interval(resampled[1] - resampled[0])
    return Paired(len(common), len(set(groups)), difference, confidence, better, worse, sign_test(better, worse))


def sign_test(better: int, worse: int) -> float:
    """The two-sided probability of so uneven a split, or a more uneven one, of better + worse fair coins."""
    tosses, fewer = better + worse, min(better, worse)
    if tosses == 0:
        return 1.0
    # In logarithms: the coefficients of 100,000 tosses are no floats.
    logs = [
        math.lgamma(tosses + 1) - math.lgamma(k + 1) - math.lgamma(tosses - k + 1) - tosses * math.log(2)
        for k in range(fewer + 1)
    ]
    largest = max(logs)
    return min(1.0, 2 * math.exp(largest) * math.fsum(math.exp(log - largest) for log in logs))


def groups(evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    """By metric, in the order given."""
    by_metric: dict[str, list[Evaluation]] = {}
    for member in evaluations:
        by_metric.setdefault(member.results["metric"], []).append(member)
    return by_metric


def below(folder: str | Path) -> list[Path]:
    """The folder of an evaluation, or those of the evaluations in it. Raises UserError where there is none."""
    folder = Path(folder)
    if (folder / "results.json").exists() or not folder.is_dir():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/results.json")) or [folder]


def lacking(given: Sequence[str | Path], evaluations: Sequence[Evaluation]) -> list[str]:
    """A line for each folder of evaluations among `given` that lacks a metric which another has."""
    metrics = {
        folder: {member.results["metric"] for member in evaluations if Path(member.name).parent == Path(shown(folder))}
        for folder in map(Path, given)
        if not (folder / "results.json").exists()
    }
    return [
        f"{metric}: {folder} has none, so that nothing is compared with it; run `evaluate` again for it"
        for metric in sorted(set().union(*metrics.values()))
        for folder, own in metrics.items()
        if metric not in own and not (folder / metric / "results.json").exists()
    ]


def nothing_in_common(evaluations: Sequence[Evaluation]) -> str:
    """Why none of several evaluations can be held against another, "" where one can."""
    others = [(group[0], member) for group in groups(evaluations).values() for member in group[1:]]
    if len(evaluations) < 2 or any(in_common(*pair) for pair in others):
        return ""
    if not others:
        return f"nothing is compared: no two of the folders are of one metric; {_REMEDY} with the same --metric"
    base, member = others[0]
    return (
        f"nothing is compared: {base.name} and {member.name} have {_TOO_FEW}; evaluate captions of the same pictures, "
        "named alike"
    )


def rows(group: Sequence[Evaluation], allow_different: bool = False) -> list[tuple[str, ...]]:
    """The cells of a metric's table."""
    cells = []
    for member in group:
        of = member.results.get
        figures = (member.name, _shown(of("score")), _span(of("confidence")), _shown(of("words"), 1))
        counts, tests = (str(of("n", "")), str(of("invalid", ""))), ("",) * len(_TEST)
        if member is not group[0] and (differs := differing(group[0], member)) and not allow_different:
            tests = (f"no verdict: other {', '.join(differs)}", *[""] * (len(_TEST) - 1))
        elif member is not group[0] and (test := paired(group[0], member)) is None:
            tests = (f"no verdict: {_TOO_FEW}", *[""] * (len(_TEST) - 1))
        elif member is not group[0]:
            difference = "" if test.difference is None else f"{test.difference:+.2f}"
            votes = f"{test.better} / {test.worse} of {test.groups}"
            tests = (difference, _span(test.confidence), votes, f"{test.p:.2g}")
        cells.append((*figures, *counts, *tests))
    return cells


def against(evaluation: Evaluation, evaluations: Sequence[Evaluation], allow_different: bool = False) -> dict[str, Any]:
    """{"against": folder, "differs": what differs, "paired": ...} of one that is not the first of its metric."""
    base = groups(evaluations)[evaluation.results["metric"]][0]
    if evaluation is base:
        return {}
    differs = list(differing(base, evaluation))
    test = paired(base, evaluation) if allow_different or not differs else None
    return {"against": base.name, "differs": differs, "paired": dataclasses.asdict(test) if test else None}


def differing(base: Evaluation, other: Evaluation) -> dict[str, tuple[Any, Any]]:
    """{what decides scores beside the models: its values} where it differs."""
    found = {}
    for name, words in _ALIKE.items():
        values = tuple(member.results.get(name, "") for member in (base, other))
        if str(values[0]) != str(values[1]):
            found[words] = values
    return found | protocol.differences(base.results["captions"], other.results["captions"])


def notes(group: Sequence[Evaluation], allow_different: bool = False) -> list[str]:
    """What to know beside a metric's table: what differs from the first, what is not known, and what is the same."""
    base, texts = group[0], []
    verdict = "More than the model may explain the difference" if allow_different else "Scores cannot be compared"
    for member in group[1:]:
        for what, (then, now) in differing(base, member).items():
            values = f"{base.name}: {_value(then)}, {member.name}: {_value(now)}"
            texts.append(f"{verdict}: {what} differs ({values})")
        if bool(base.results["captions"]) != bool(member.results["captions"]):
            unknown = base if member.results["captions"] else member
            texts.append(f"How the captions of {unknown.name} were made is not known: none of it is compared")
        same = base.results.get("inputs") == member.results.get("inputs")
        if same and base.results.get("inputs") and base.results.get("name") == member.results.get("name"):
            texts.append(f"No caption differs between {base.name} and {member.name}")
    return texts


def _value(value: Any) -> str:
    return "none" if value in ("", None) else str(value)


def figures(group: Sequence[Evaluation]) -> dict[str, list[Any]]:
    """The terms of the scores, such as precision, recall and language: {name: one value for each evaluation}."""
    names = [name for name in group[0].results if name not in _NO_FIGURES]
    values = {name: [member.results.get(name) for member in group] for name in names}
    return {name: each for name, each in values.items() if all(map(is_number, each))}


def markdown(evaluations: Sequence[Evaluation], allow_different: bool = False) -> str:
    """One table for each metric."""
    texts = []
    for metric, group in groups(evaluations).items():
        lines = [f"## {' '.join(metric.split())}", "", "| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows(group, allow_different)]
        lines += [text for note in notes(group, allow_different) for text in ("", note)]
        if terms := figures(group):
            names = [_cell(member.name) for member in group]
            lines += ["", "| | " + " | ".join(names) + " |", "|" + "---|" * (len(group) + 1)]
            lines += [f"| {_cell(name)} | " + " | ".join(map(_shown, values)) + " |" for name, values in terms.items()]
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def page(evaluations: Sequence[Evaluation], allow_different: bool = False) -> str:
    """A self-contained page: for each metric its bars, with intervals and words, and its table."""
    parts = []
    for metric, group in groups(evaluations).items():
        picture = _bars(group, "score", "confidence")
        for name in figures(group):
            picture += f"<h3>{html.escape(name)}</h3>{_bars(group, name)}"
        table = "".join(_html_row(row, "td") for row in rows(group, allow_different))
        warnings = "".join(f"<p>{html.escape(note)}</p>" for note in notes(group, allow_different))
        title = html.escape(metric)
        parts.append(f"<h2>{title}</h2>{picture}<table>{_html_row(_HEAD, 'th')}{table}</table>{warnings}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Comparison</title><style>{_STYLE}</style>"
        f"<h1>Comparison</h1>{''.join(parts)}</html>\n"
    )


def _bars(group: Sequence[Evaluation], figure: str, span: str = "") -> str:
    results = ((member.name, member.results.get) for member in group)
    return bars([(name, of(figure), of(span), _shown(of("words"), 0)) for name, of in results])


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _shown(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def _span(pair: Any) -> str:
    return f"{pair[0]:.2f} to {pair[1]:.2f}" if isinstance(pair, list) and len(pair) == 2 else ""


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog=called("compare"),
        description="Evaluations side by side, each tested against the first of its metric on the items of both.",
    )
    folders_help = "folders that `evaluate` wrote, or that hold such folders"
    parser.add_argument("folders", nargs="+", metavar="DIR", type=place, help=folders_help)
    parser.add_argument("--out", metavar="DIR", type=place, help="where comparison.md and comparison.html are written")
    allow_help = "test also where more than the model differs; what differs is still named"
    parser.add_argument("--allow_different", action="store_true", help=allow_help)
    args = parser.parse_args(argv)
    folders = [folder for given in args.folders for folder in below(storage.fetch(Path(given)))]
    if len({folder.resolve() for folder in folders}) < len(folders):
        parser.error("a folder is named twice")
    evaluations, scoreless = [], []
    for folder in folders:
        try:
            evaluations.append(read(folder))
        except NoScore as error:
            scoreless.append(str(error))
    if not evaluations:
        raise UserError(f"{'; '.join(scoreless)}; {_REMEDY}")
    scoreless += lacking(args.folders, evaluations)
    allow = args.allow_different
    text = "\n".join([markdown(evaluations, allow), *(f"{shown(reason)}\n" for reason in scoreless)])
    if args.out:
        write_text(Path(args.out) / "comparison.md", text)
        write_text(Path(args.out) / "comparison.html", page(evaluations, allow))
        results = [
            {"folder": member.name, **member.results, **against(member, evaluations, allow)} for member in evaluations
        ]
        write_text(Path(args.out) / "comparison.json", json_text.dumps(results, indent=2) + "\n")
        for name in ("comparison.md", "comparison.html", "comparison.json"):
            storage.send(Path(args.out) / name)
    print(text, flush=True)
    if problem := nothing_in_common(evaluations):
        raise UserError(problem)


if __name__ == "__main__":
    main()
