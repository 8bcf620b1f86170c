"""Trains variants of the method over several seeds, compares them, and writes what that says.

    python -m balcap_jax.ablate --study=list                         the studies of the embedded world, and their sizes
    python -m balcap_jax.ablate --study=spread --out=runs/studies    runs what has no result yet in docs/results
    python -m balcap_jax.ablate --study=spread --out=D --pilot       on the pilot's seeds: how many seeds it takes
    python -m balcap_jax.ablate --report                             tables and figures of docs, from results alone
    python -m balcap_jax.ablate --config=configs/scenes.py --out=runs/ablation --variants=full,grpo --seeds=0,1

A study (`ablate/studies.py`) leaves one small JSON file for each run (`ablate/results.py`), by which no run is made
twice: its directory is deleted then (not with --keep). With a recipe or fields of your own, results go to D/results.

Without --study the recipe's own variants are compared, as in `configs/scenes.py:no_gate`; "full" is the recipe as it
is. D then holds table.md, table.json, plot.svg of all runs that are finished, and runs/VARIANT-seedN/, ordinary
workdirs.

For each seed the stages before rl are trained once; every variant goes on from a copy of that run's last checkpoint,
exactly as one run of the whole recipe would. D also holds logs/ and study.jsonl: what each run printed, and when it
ran. The same command goes on with a study that was stopped or killed: finished runs stay, others resume. After a run
that fails the others still run; the command names it at the end, and the exit status is 1.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from balcap_jax import rewards
from balcap_jax.ablate import plans, report
from balcap_jax.ablate.claims import piloted
from balcap_jax.ablate.leave_one_out import plan, write_tables
from balcap_jax.ablate.plans import Plan
from balcap_jax.ablate.running import Scheduler, is_finished
from balcap_jax.ablate.studies import PILOT_SEEDS, RECIPE, STUDIES, Study
from balcap_jax.ablate.table import BASE
from balcap_jax.ablate.variants import LEAVE_ONE_OUTS
from balcap_jax.cli.arguments import CommandParser, called, disk_place, split_overrides
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, try_out, write_text
from balcap_jax.cli.process import INTERRUPTED, PreemptionFlag, exit_on_user_error
from balcap_jax.config import recipes as configuration

PAGES = (Path("docs/results.md"), Path("docs/studies.md"))


def _seeds(text: str) -> list[int]:
    seeds = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds takes different whole numbers, comma-separated; got {text!r}")
    return seeds


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(set(names)) < len(names) or BASE in names:
        raise UserError(f"--variants takes different names of variants, comma-separated; got {text!r}")
    return names


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError for an option that the others leave without effect."""
    if args.report:
        without = {"--seeds": args.seeds, "--pilot": args.pilot, "--variants": args.variants, "--keep": args.keep}
        mode = "--report"
    elif args.study is not None:
        without, mode = {"--variants": args.variants}, "--study"
    else:
        without, mode = {"--pilot": args.pilot, "--results": args.results, "--keep": args.keep}, "a recipe of one's own"
    for name, value in without.items():
        if value not in (None, False):
            raise UserError(f"{name} says nothing beside {mode}; leave it out")
    if args.pilot and args.seeds is not None:
        raise UserError("--pilot has seeds of its own; leave --seeds out")


def _is_of_studies(recipe: str) -> bool:
    """Whether a recipe is RECIPE, by its name or by its path."""
    (path, variant), (own, _) = configuration.split_recipe(recipe), configuration.split_recipe(RECIPE)
    return variant is None and Path(path).resolve() == Path(own).resolve()


def _studies(text: str | None) -> list[Study]:
    names = list(STUDIES) if text is None else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in STUDIES:
            raise UserError(f"--study knows no {name!r}; there are {', '.join(STUDIES)}, and list")
    return [STUDIES[name] for name in dict.fromkeys(names)]


def list_studies() -> str:
    """A paragraph for each study: its question, its runs and its arms."""
    lines = []
    for study in STUDIES.values():
        runs = f"{len(study.arms)} variants x {len(study.seeds)} seeds"
        lines += [f"{study.name} ({runs}): {study.question}"]
        lines += [f"    {name:32} {arm.about}" for name, arm in study.arms.items()]
    return "\n".join(lines)


def compare_variants(
    recipe: str, overrides: Mapping[str, str], variants: Sequence[str], seeds: Sequence[int], out: Path, jobs: int,
    command: str,
) -> None:  # fmt: skip
    """The study of a recipe's own variants."""
    bases, runs = plan(recipe, overrides, variants, seeds, out)
    for run in (*bases.values(), *runs):
        rewards.check_settings(run.config)
    with PreemptionFlag() as stop, AppendedLines(out / "study.jsonl") as log:
        scheduler = Scheduler([*bases.values(), *runs], jobs, log)
        scheduler.run(stop)
        finished = [run for run in runs if is_finished(run)]
        if finished:
            print(f"table: {write_tables(out, runs, command, log.entries, jobs)}", flush=True)
        if stop.requested:
            print(f"{stop.signal_name}: {len(finished)} of {len(runs)} runs are finished; the same command goes on")
            sys.exit(INTERRUPTED)
    _fail(scheduler.failed, out)


def run_studies(
    made: Plan, studies: Sequence[Study], seeds: Sequence[int] | None, jobs: int, keep: bool, pilot: bool
) -> None:
    """Makes the runs of studies that have no result, and writes OUT/NAME.md and its figure for each."""
    made.missing(studies, seeds)  # What cannot be run leaves nothing behind.
    try_out(made.results)
    with PreemptionFlag() as stop, AppendedLines(made.out / "study.jsonl") as log:
        failed = plans.conduct(made, studies, seeds, jobs=jobs, keep=keep, log=log, stop=stop)
    left = plans.left(made, studies, seeds)
    if pilot:
        found = {study.name: report.values_of(report.load(made, study, pilot=True)) for study in studies}
        print(report.pilot(found), flush=True)
    else:
        for name, text in report.sections(made, studies, made.out / "figures").items():
            write_text(made.out / f"{name}.md", text)
            print(f"table: {made.out / f'{name}.md'}", flush=True)
    if stop.requested:
        print(f"{stop.signal_name}: {len(left)} runs are left; the same command goes on")
        sys.exit(INTERRUPTED)
    waiting = {name: "the run that it depends on has no result" for name in left if name not in failed}
    _fail(failed | waiting, made.out)


def _fail(failed: Mapping[str, str], out: Path) -> None:
    for name, reason in failed.items():
        print(f"error: {name}: {reason} (log: {out / 'logs' / name}.log)", file=sys.stderr)
    if failed:
        sys.exit(1)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog=called("ablate"),
        description="Trains variants of a recipe over several seeds and compares them; the same command goes on with "
        "a study that was stopped.",
    )
    configuration.add_arguments(parser, required=False)
    parser.add_argument("--study", metavar="A,B", help="studies of the embedded world by name; list prints them")
    parser.add_argument("--out", type=disk_place, metavar="DIR", help="where runs are made, and tables written")
    variants_help = f"without --study: comma-separated; default: {','.join(LEAVE_ONE_OUTS)}"
    parser.add_argument("--variants", metavar="A,B", help=variants_help)
    parser.add_argument("--seeds", metavar="N,N", help="default: those of the study; without --study 0,1,2")
    parser.add_argument(
        "--pilot", action="store_true", help="run what a primary claim compares on other seeds, and plan the study's"
    )
    results_help = f"where results of studies lie; default: {PAGES[0].parent}/results, with own fields OUT/results"
    parser.add_argument("--results", type=disk_place, metavar="DIR", help=results_help)
    parser.add_argument("--keep", action="store_true", help="keep the directories of a study's finished runs")
    parser.add_argument("--report", action="store_true", help="run nothing; write the pages' tables and figures")
    page_help = f"of --report, may be repeated: a table goes where its marks are; default: {PAGES[0]} and {PAGES[1]}"
    parser.add_argument("--page", type=disk_place, metavar="FILE", action="append", help=page_help)
    cores = len(os.sched_getaffinity(0))
    jobs_help = "runs at a time, which share the cores; default: one per core (%(default)s); 1 on an accelerator"
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help=jobs_help)
    arguments = sys.argv[1:] if argv is None else list(argv)
    rest, overrides = split_overrides(arguments)
    args = parser.parse_args(rest)
    if args.study == "list":
        print(list_studies())
        return
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    if args.out and Path(args.out).is_file():
        raise UserError(f"--out={args.out} is a file; name a directory")
    _check_options(args)
    for name in ("seed", "stages.order"):
        if name in overrides:
            raise UserError(f"--config.{name} is the study's own to set; use --seeds, or a recipe with that order")
    if not args.report and not args.out:
        parser.error("the following arguments are required: --out")
    out = Path(args.out or ".").absolute()
    if args.study is None and not args.report:
        if not args.config:
            parser.error("one of the arguments --config, --study, --report is required")
        seeds = _seeds("0,1,2" if args.seeds is None else args.seeds)
        command = shlex.join(["python", "-m", "balcap_jax.ablate", *arguments])
        variants = [*LEAVE_ONE_OUTS] if args.variants is None else _names(args.variants)
        compare_variants(args.config, overrides, variants, seeds, out, args.jobs, command)
        return
    is_own = bool(overrides) or not _is_of_studies(args.config or RECIPE)
    if args.report and is_own and not args.results:
        raise UserError("--report of runs with own fields needs --results=DIR, where they are")
    own = args.results or (out / "results" if is_own else PAGES[0].parent / "results")
    made, studies = Plan(args.config or RECIPE, overrides, out, Path(own).absolute()), _studies(args.study)
    if args.report:
        if not any(made.results.glob("*-seed*.json")):
            raise UserError(f"{made.results} holds no result of a study; name the folder with --results, or run one")
        pages = [page.absolute() for page in map(Path, args.page or PAGES)]
        contents = report.sections(made, studies, pages[0].parent / "figures", whole=args.study is None)
        report.rewrite(pages, contents)
        print(*(f"page: {page}" for page in pages), sep="\n")
        return
    seeds = PILOT_SEEDS if args.pilot else None if args.seeds is None else _seeds(args.seeds)
    studies = list(map(piloted, studies)) if args.pilot else studies
    run_studies(made, studies, seeds, args.jobs, args.keep, args.pilot)


if __name__ == "__main__":
    main()
