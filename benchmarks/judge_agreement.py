"""How far a judge agrees with what is known: per question, its biases, its noise, its cost, with intervals of 95%.

    python benchmarks/judge_agreement.py --judge=remote --judge.endpoints=http://localhost:8000/v1 --out=agreement
    python benchmarks/judge_agreement.py --judge=oracle --judge.flaws=false_accept:0.2,length:0.3 --out=flawed

The set is of rendered scenes (`tests/judges/labelled.jsonl`); `--photos=FOLDER`, or BALCAP_PHOTOS, adds checklists of
photographs. `judge.*` fields are those of a run, such as judge.model and judge.concurrency; the cache is not used. The
last rows say what `docs/results.md` found that a judge must reach.
"""

import collections
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from judge_labels import ADDED, PADDED, PLAIN, Case, Labelled, cases, checklists, read
from ml_collections import ConfigDict

from balcap_jax import judges, rewards
from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import CommandParser, disk_place, place, split_overrides
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import try_out, write_text
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.config.recipes import check, default_config
from balcap_jax.judges.schema import Failure, Judge, Usage
from balcap_jax.rewards.base import Samples

ROOT = Path(__file__).parents[1]
SET = ROOT / "tests" / "judges" / "labelled.jsonl"
RESULTS = ROOT / "docs" / "results.md"
_BOUNDS = re.compile(r"<!-- judge-bounds\s*(\{.*?\})\s*-->", re.DOTALL)  # JSON: {name of a figure: bound}
_Z = 1.959964  # of a normal distribution, two-sided 95%
_DRAWS = 1000  # of the bootstrap, over scenes
_MOST_LEVELS = 20
OBJECTIVES = ("precision", "recall", "linguistic")


@dataclasses.dataclass(frozen=True)
class Figure:
    """An estimate with its interval of 95%, from `n` decisions, pairs or scores; None where there are none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")

    def holds(self, value: float) -> bool:
        """Whether the interval has `value` in it."""
        return self.low is not None and self.low - 1e-9 <= value <= self.high + 1e-9


@dataclasses.dataclass(frozen=True)
class Agreement:
    """rows: {question: {"accuracy", "kappa", "false accepts", "false rejects", "failed"}}.

    biases, scores: {name: Figure}. levels: {objective: number of levels that all scores lie on, 0 = of none}.
    cost: plain numbers.
    """

    rows: Mapping[str, Mapping[str, Figure]]
    biases: Mapping[str, Figure]
    scores: Mapping[str, Figure]
    levels: Mapping[str, int]
    cost: Mapping[str, float]


# ---- asking ----------------------------------------------------------------------------------------------------------


def measure(judge: Judge, config: ConfigDict, labelled: Sequence[Labelled], more: Sequence[Case] = ()) -> Agreement:
    """Asks the judge about the labelled scenes, and about `more`.

    config: of which the judge's flaws of scores, and the seed, count.
    """
    asked = [*cases(labelled), *more]
    asked = [case for case in asked if hasattr(judge, case.question.method)]
    before, start = judge.usage(), time.perf_counter()
    answers = judge.mixed([case.question for case in asked])
    given = _scores(judge, config, labelled)
    seconds, usage = time.perf_counter() - start, judge.usage() - before
    decided = [
        (case, None if isinstance(answer, Failure) else case.decide(answer))
        for case, answer in zip(asked, answers, strict=True)
    ]
    scores, levels = _of_scores(labelled, given)
    questions = len(asked) + len(OBJECTIVES) * given.rewards.shape[0] * given.rewards.shape[1]
    return Agreement(_rows(decided), _biases(decided), scores, levels, _cost(usage, questions, seconds))


def _scores(judge: Judge, config: ConfigDict, labelled: Sequence[Labelled]) -> rewards.Scores:
    """What the method's reward makes of the labelled captions, with the flaws of scores that the config names."""
    captions = [[caption["text"] for caption in each.captions] for each in labelled]
    samples = Samples(
        example_ids=[str(each.seed) for each in labelled],
        captions=captions,
        references=[each.reference for each in labelled],
        reference_units=[each.recall["units"] for each in labelled],
        images=[each.picture for each in labelled],
        metadata=[each.metadata for each in labelled],
    )
    reward = rewards.build(config.rewards, judge, config.seed)
    return rewards.in_training(reward, config.judge, config.seed)(samples)


# ---- agreement -------------------------------------------------------------------------------------------------------

Decided = Sequence[tuple[Case, Sequence[bool | None] | None]]


def _rows(decided: Decided) -> dict[str, dict[str, Figure]]:
    rows: dict[str, dict[str, Figure]] = {}
    failed: collections.Counter[str] = collections.Counter()
    asked: collections.Counter[str] = collections.Counter()
    of_row: dict[str, list[tuple[int, bool, bool]]] = collections.defaultdict(list)
    for case, decisions in decided:
        asked[case.row] += 1
        failed[case.row] += decisions is None
        if case.variant == PLAIN:
            pairs = zip(case.labels, decisions or (), strict=False)
            of_row[case.row] += [(case.scene, label, flag) for label, flag in pairs if flag is not None]
    for row in asked:
        table = np.array(of_row[row], dtype=int).reshape(-1, 3)
        labels, found = table[:, 1] == 1, table[:, 2] == 1
        cells = np.stack([labels & found, ~labels & found, labels & ~found, ~labels & ~found], -1)
        rows[row] = {
            "accuracy": wilson(int((labels == found).sum()), len(table)),
            "kappa": bootstrap(per_scene(table[:, 0], cells), kappa, len(table)),
            "false accepts": wilson(int((found & ~labels).sum()), int((~labels).sum())),
            "false rejects": wilson(int((~found & labels).sum()), int(labels.sum())),
            "failed": wilson(failed[row], asked[row]),
        }
    rows["all"] = {"failed": wilson(sum(failed.values()), sum(asked.values()))}
    return rows


def kappa(cells: np.ndarray) -> np.ndarray:
    """Cohen's kappa (1960): agreement beyond what the shares of yes alone would give, 1 where those are equal and sure.

    cells: [..., scenes, 4], counts of (yes yes, no yes, yes no, no no) by (label, judge).
    """
    both, accepted, refused, neither = np.moveaxis(cells.sum(-2), -1, 0)
    total = both + accepted + refused + neither
    observed = (both + neither) / total
    yes, said = (both + refused) / total, (both + accepted) / total
    expected = yes * said + (1 - yes) * (1 - said)
    return np.where(expected < 1, (observed - expected) / np.where(expected < 1, 1 - expected, 1.0), 1.0)


def per_scene(scenes: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Sums [scenes, ...] of the rows of `values` that belong to each scene."""
    names, places = np.unique(np.asarray(scenes), return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, places, values)
    return sums


def wilson(count: int, n: int) -> Figure:
    """A share with the interval of Wilson (1927)."""
    if not n:
        return Figure(None)
    share, z = count / n, _Z
    middle, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return Figure(share, max(float(low), 0.0), min(float(high), 1.0), n)


def bootstrap(scenes: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n: int) -> Figure:
    """A statistic of what each scene has, [..., scenes, parts], with percentiles of draws of whole scenes.

    What is in one scene hangs together. n: of the figure.
    """
    if not len(scenes):
        return Figure(None)
    places = np.random.default_rng(0).integers(len(scenes), size=(_DRAWS, len(scenes)))
    low, high = np.nanpercentile(statistic(scenes[places]), [2.5, 97.5])
    return Figure(float(statistic(scenes)), float(low), float(high), n)


def mean(sums: np.ndarray) -> np.ndarray:
    """Of [..., scenes, (sum, count)]."""
    return sums[..., 0].sum(-1) / sums[..., 1].sum(-1)


def mean_of(pairs: Sequence[tuple[int, float]]) -> Figure:
    """The mean of (scene, value)."""
    table = np.array(pairs, float).reshape(-1, 2)
    return bootstrap(per_scene(table[:, 0], np.stack([table[:, 1], np.ones(len(table))], -1)), mean, len(table))


# ---- biases ----------------------------------------------------------------------------------------------------------


def _biases(decided: Decided) -> dict[str, Figure]:
    """How much more of what is false is accepted where nothing but the text around it differs; and of the order."""
    plain, found = _by_pair(decided), {}
    for variant, rows in ((PADDED, ("precision",)), *((name, ("precision", "recall")) for name in ADDED)):
        for row in rows:
            pairs = [
                (case.scene, float(with_it) - float(without))
                for case, decisions in decided
                if case.variant == variant and case.row == row and decisions is not None
                for with_it, without, label in zip(
                    decisions, plain.get((case.pair, row), ()), case.labels, strict=False
                )
                if not label and with_it is not None and without is not None
            ]
            found[f"{variant}, {row}"] = mean_of(pairs)
    orders = [
        (case.scene, 0.0 if first is None else 1.0 if first else -1.0)
        for case, decisions in decided
        if case.row == "preference" and decisions
        for first in decisions
    ]
    return found | ({"position": mean_of(orders)} if orders else {})


def _by_pair(decided: Decided) -> dict[tuple[str, str], Sequence[bool | None]]:
    return {
        (case.pair, case.row): decisions
        for case, decisions in decided
        if case.variant == PLAIN and decisions and case.pair
    }


# ---- scores ----------------------------------------------------------------------------------------------------------


def _of_scores(labelled: Sequence[Labelled], given: rewards.Scores) -> tuple[dict[str, Figure], dict[str, int]]:
    """Mean and spread of the errors of scores: of a picture as a whole, and within it; and levels of the scores."""
    figures, levels = {}, {}
    for k, name in enumerate(OBJECTIVES):
        deserved = np.array([[_deserved(caption, name) for caption in each.captions] for each in labelled])
        errors = np.where(given.valid[..., k], given.rewards[..., k] - deserved, np.nan)
        whole = errors[~np.isnan(errors).any(-1)]
        if not len(whole):
            figures |= dict.fromkeys(
                (f"{name}, mean error", f"{name}, noise in a picture", f"{name}, noise of a picture"), Figure(None)
            )
            continue
        pairs = [(scene, float(error)) for scene, row in enumerate(whole) for error in row]
        figures[f"{name}, mean error"] = mean_of(pairs)
        spread = np.stack([whole.mean(-1), whole.var(-1, ddof=1) / whole.shape[-1]], -1)
        count = whole.shape[-1]
        figures[f"{name}, noise in a picture"] = bootstrap(spread * [1, count], within, len(whole))
        figures[f"{name}, noise of a picture"] = bootstrap(spread, between, len(whole))
        levels[name] = levels_of(given.rewards[..., k][given.valid[..., k]])
    return figures, levels


def _deserved(caption: Mapping[str, Any], name: str) -> float:
    return sum(caption["marks"]) / 15 if name == "linguistic" else caption[name]


def within(spread: np.ndarray) -> np.ndarray:
    """Standard deviation within scenes, of [..., scenes, (mean, variance)]."""
    return np.sqrt(spread[..., 1].mean(-1))


def between(spread: np.ndarray) -> np.ndarray:
    """Standard deviation of what all captions of a scene share, of [..., scenes, (mean, its variance by those within)].

    The variance of the means less what the captions' own errors give them; 0 where that is negative.
    """
    return np.sqrt(np.maximum(spread[..., 0].var(-1, ddof=1) - spread[..., 1].mean(-1), 0.0))


def levels_of(scores: np.ndarray) -> int:
    """The least number of levels, 0 to 1 in equal steps, that all scores lie on; 0 = they lie on none of few."""
    for count in range(2, _MOST_LEVELS + 1):
        steps = scores.astype(float) * (count - 1)
        if np.abs(steps - steps.round()).max(initial=0.0) < 1e-4:
            return count
    return 0


def _cost(usage: Usage, questions: int, seconds: float) -> dict[str, float]:
    return {
        "questions": questions,
        "seconds": seconds,
        "seconds a question": seconds / max(questions, 1),
        "tokens in a question": usage.tokens_in / max(questions, 1),
        "tokens out a question": usage.tokens_out / max(questions, 1),
    }


# ---- what a judge must reach -----------------------------------------------------------------------------------------


def bounds(results: Path) -> dict[str, float] | None:
    """{name of a figure: the most it may be}, from the marked block of the results; None where there is none yet.

    Names are "false accepts", "length", "praise", "noise" and "failed".

    Raises:
      UserError: the block holds no such object.
    """
    block = _BOUNDS.search(results.read_text()) if results.is_file() else None
    if block is None:
        return None
    try:
        found = json.loads(block[1])
        return {str(name): float(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{results}: its block judge-bounds is no object of numbers ({error}); mend it") from error


def reached(agreement: Agreement) -> dict[str, Figure]:
    """The measured figures that `bounds` is about: the worst of the questions, by the value."""
    rows, scores = agreement.rows, agreement.scores
    named = {
        "false accepts": [rows[row]["false accepts"] for row in ("precision", "recall") if row in rows],
        "length": [agreement.biases.get("padded, precision", Figure(None))],
        "praise": [agreement.biases.get(f"praised, {row}", Figure(None)) for row in ("precision", "recall")],
        "noise": [figure for name, figure in scores.items() if name.endswith("noise in a picture")],
        "failed": [rows["all"]["failed"]],
    }
    known = {name: [each for each in figures if each.value is not None] for name, figures in named.items()}
    return {
        name: max(figures, key=lambda each: each.value) if figures else Figure(None) for name, figures in known.items()
    }


def verdicts(agreement: Agreement, most: Mapping[str, float] | None) -> list[tuple[str, str, str, str]]:
    """(figure, measured, bound, verdict) for each figure; the bound is met where the whole interval is below it."""
    lines = []
    for name, figure in reached(agreement).items():
        bound = None if most is None else most.get(name)
        if bound is None:
            lines.append((name, str(figure), "not measured yet", ""))
        elif figure.value is None:
            lines.append((name, "-", f"{bound:g}", "unknown"))
        else:
            verdict = "met" if figure.high <= bound else "missed" if figure.low > bound else "cannot be told"
            lines.append((name, str(figure), f"{bound:g}", verdict))
    return lines


# ---- the tables ------------------------------------------------------------------------------------------------------


def tables(agreement: Agreement, most: Mapping[str, float] | None) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each."""
    names = ("accuracy", "kappa", "false accepts", "false rejects", "failed")
    rows = [
        [row, str(figures["accuracy"].n), *(str(figures[name]) for name in names)]
        for row, figures in agreement.rows.items()
        if row != "all"
    ]
    scores = [[name, str(figure), str(figure.n)] for name, figure in agreement.scores.items()]
    scores += [[f"{name}, levels", str(count) if count else "many", ""] for name, count in agreement.levels.items()]
    return [
        ("agreement", ["question", "n", *names], rows),
        (
            "biases: what is false and accepted, more than without",
            ["around it, question", "difference", "n"],
            [[name, str(figure), str(figure.n)] for name, figure in agreement.biases.items()],
        ),
        ("errors of scores", ["objective", "estimate", "pictures"], scores),
        ("cost", ["", "amount"], [[name, f"{value:,.3f}"] for name, value in agreement.cost.items()]),
        (
            "what a judge must reach (docs/results.md)",
            ["figure", "measured", "at most", ""],
            list(map(list, verdicts(agreement, most))),
        ),
    ]


def as_markdown(title: str, found: Sequence[tuple[str, list[str], list[list[str]]]]) -> str:
    parts = [f"# {title}"]
    for name, columns, rows in found:
        lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
        parts.append(f"## {name}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def show(title: str, found: Sequence[tuple[str, list[str], list[list[str]]]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, force_terminal=sys.stdout.isatty())
    console.print(title, markup=False, highlight=False)
    for name, columns, rows in found:
        grid = Table(*columns, title=name, title_justify="left", box=SIMPLE_HEAD)
        for row in rows:
            grid.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(grid, highlight=False)


def config_of(name: str, overrides: Mapping[str, str]) -> ConfigDict:
    """The configuration of a judge of that name. Raises UserError for a field or value that there is not."""
    config = default_config()
    config.judge.name, config.judge.cache_dir = name, ""
    return check(config, {f"judge.{field}": value for field, value in overrides.items()})


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else list(argv), "--judge.")
    parser = CommandParser(prog="judge_agreement.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--judge", required=True, choices=("oracle", "remote", "policy"), help="as judge.name")
    parser.add_argument("--set", type=place, default=str(SET), metavar="FILE", help="the labelled scenes")
    parser.add_argument("--scenes", type=int, default=0, metavar="N", help="ask about the first N of them alone")
    parser.add_argument("--photos", type=place, metavar="FOLDER", help="captions.jsonl and checklists.jsonl")
    parser.add_argument("--out", type=disk_place, metavar="DIR", help="write agreement.json and agreement.md there")
    args = parser.parse_args(rest)
    if args.scenes < 0 or args.scenes == 1:
        raise UserError(f"--scenes={args.scenes}: intervals need at least 2 scenes (0 = all)")
    if args.out:
        try_out(Path(args.out))  # Before hundreds of questions are asked.
    config = config_of(args.judge, overrides)
    if args.photos and args.judge == "oracle":
        raise UserError("--photos: the oracle knows the scenes alone; leave it out, or name another --judge")
    photos = args.photos or ("" if args.judge == "oracle" else os.environ.get("BALCAP_PHOTOS", ""))
    more = checklists(Path(photos)) if photos else []
    labelled, most = read(Path(args.set), args.scenes), bounds(RESULTS)
    judge = judges.build(config.judge, config.seed, ("precision", "recall", "linguistic", "preference"))
    try:
        found = measure(judge, config, labelled, more)
        title = f"{judge.about.get('model', 'the oracle')} on {len(labelled)} scenes" + (
            f" and {len(more) // 2} photographs" if more else ""
        )
    finally:
        judge.close()
    listed = tables(found, most)
    show(title, listed)
    if args.out:
        told = {"judge": dict(judge.about), "scenes": len(labelled), "bounds": most} | dataclasses.asdict(found)
        write_text(Path(args.out) / "agreement.json", json_text.dumps(told, indent=2) + "\n")
        write_text(Path(args.out) / "agreement.md", as_markdown(title, listed))


if __name__ == "__main__":
    main()
