"""Scores captions, or answers, as the published metrics do; `docs/evaluation.md` says what each takes and asks.

    python -m balcap_jax.evaluate --suite=captions --model=DIR --data=BENCH --out=D
    python -m balcap_jax.evaluate --metric=dcscore --captions=F.jsonl --references=oracle.jsonl --images=DIR --out=D
    python -m balcap_jax.evaluate --metric=captionqa --captions=F.json --questions=questions.json --out=D
    python -m balcap_jax.evaluate --metric=caparena --captions=F.json --opponents=auto_600.json --images=DIR --out=D
    python -m balcap_jax.evaluate --metric=bcapscore --captions=F.jsonl --references=captions.jsonl --out=D
    python -m balcap_jax.evaluate --metric=checklist --captions=F.jsonl --checklists=checklists.jsonl --out=D
    python -m balcap_jax.evaluate --metric=capture --graphs=graphs.jsonl --out=D
    python -m balcap_jax.evaluate --metric=chartqa --questions=test.json --predictions=F.jsonl --out=D
    python -m balcap_jax.evaluate --metric=mmbench --questions=MMBench.tsv --model=DIR --out=D
    python -m balcap_jax.evaluate --metric=side_by_side --votes=DOCCI_Test.jsonl --out=D

A suite captions the pictures of a folder once and runs the benchmarks that the folder has (`evals/suite.py`), each in
D/METRIC; one that fails stops none of the others, and `compare` takes D as a whole.

D/items.jsonl has a line for each judgement, D/results.json the figures. The same command goes on where it was stopped
or killed; `--retry_errors` judges again what failed. Metrics that need a judge take `--judge.FIELD=VALUE` or
`--judgements=F.jsonl`. The first sets fields of the config group `judge`: endpoints, model, api_key_env, limits,
cache_dir, prices, max_cost. The second holds judgements that were made before, one line {"id", "judgement"} each, such
as another folder's items.jsonl.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.captioning import provenance
from balcap_jax.captioning.options import Options, add_arguments, mesh_sizes, of_command
from balcap_jax.cli import bucket, json_text, storage
from balcap_jax.cli.arguments import CommandParser, called, disk_place, place
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_or_jsonl, read_jsonl, write_text
from balcap_jax.cli.process import exit_on_user_error, memory_problem
from balcap_jax.config.recipes import default_config, take_judge
from balcap_jax.evals import caparena, captionqa, protocol, side_by_side, vqa
from balcap_jax.evals.engine import NO_CAPTION, Item, Metric, claim, evaluate
from balcap_jax.evals.inputs import Texts, digest_of, digest_of_texts, read_captions
from balcap_jax.evals.metrics import metric_of
from balcap_jax.evals.suite import PICTURES, Benchmark, benchmarks_in
from balcap_jax.evals.vqa_data import read_questions
from balcap_jax.judges.chat_judge import make_client

# In the order of the arguments of each metric's `items`.
NEEDS = {
    "dcscore": ("captions", "references", "images"),
    "captionqa": ("captions", "questions"),
    "caparena": ("captions", "opponents", "images"),
    "bcapscore": ("captions", "references"),
    "checklist": ("captions", "checklists"),
    "capture": ("graphs",),
    "side_by_side": ("votes",),
    **dict.fromkeys(vqa.BENCHMARKS, ("questions",)),
}
ALSO = {"bcapscore": ("images",), "capture": ("captions",)}  # Taken where they are given.
SCORED = ("captions", "predictions", "judgements", "graphs")
FILES = {
    "captions": "captions: {id: caption}, or the lines that `caption` writes",
    "references": "dcscore: lines with oracle_facts; bcapscore: lines with reference_units",
    "questions": "of captionqa, or of a general benchmark, in its own form",
    "opponents": "caparena: caparena_auto_600.json",
    "checklists": "checklist: lines {id, items}",
    "graphs": "capture: lines {id, candidate, references}",
    "predictions": "general benchmarks: lines {question_id, prediction}",
    "votes": "side_by_side: lines of ImageInWords",
    "judgements": "judgements made before, in place of a judge",
}


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=called("evaluate"),
        description="Scores captions, or answers; the same command goes on where it was stopped. --judge.FIELD=VALUE "
        "sets the fields judge.* that `python -m balcap_jax.config` lists.",
    )
    add = parser.add_argument
    add("--metric", choices=tuple(NEEDS), metavar="NAME", help=", ".join(NEEDS))
    add("--suite", choices=("captions",), help="all caption benchmarks of --data, in place of a metric")
    add("--data", metavar="DIR", type=disk_place, help="the folder of a suite's benchmarks and their pictures")
    add("--out", required=True, metavar="DIR", type=place, help="where results.json and items.jsonl are written")
    for name, about in FILES.items():
        add(f"--{name}", metavar="FILE", type=place, help=about)
    add("--images", metavar="DIR", type=disk_place, help="the folder that paths of pictures are below")
    add(
        "--model",
        metavar="DIR",
        type=place,
        help="the model that answers a benchmark's questions, or writes a suite's captions",
    )
    name_help = "the evaluated model's own name; caparena skips the pictures where it is the opponent"
    add("--name", default="", help=name_help)
    add("--split", default="", help="general benchmarks: only questions of this split")
    add("--retry_errors", action="store_true", help="judge again what failed")
    add_arguments(parser)
    return parser


def build(args: argparse.Namespace, judge: ConfigDict) -> tuple[Metric, list[Item], Texts]:
    """The metric, its items, and what is scored. Raises UserError for bad input."""
    if args.metric in vqa.BENCHMARKS:
        metric, texts = metric_of(args.metric), read_captions(args.predictions, "predictions")
        return metric, metric.items(read_questions(args.questions, args.split), texts), texts
    # Each metric has its own longest answer, which a length on the command line replaces.
    is_default = judge.max_tokens == default_config().judge.max_tokens
    options = {} if is_default else {"max_tokens": judge.max_tokens}
    if args.metric == "caparena":
        options["model"] = args.name
    texts = read_captions(args.captions) if args.captions else Texts({})
    if args.below:
        texts = texts.below(args.below) or texts
    values = vars(args) | {"captions": texts, "images": Path(args.images) if args.images else None}
    metric, names = metric_of(args.metric, **options), (*NEEDS[args.metric], *ALSO.get(args.metric, ()))
    return metric, metric.items(*(values[name] for name in names)), texts


# ---- a model ---------------------------------------------------------------------------------------------------------


def write_captions(args: argparse.Namespace, source: Path, out: Path, **fixed: Any) -> bool:
    """Has `args.model` caption `source`, going on where it was stopped, on all devices of all processes.

    `fixed` are options that the evaluation decides. Returns whether this process is to go on: of several the first.
    """
    # JAX's models only where one is run.
    from balcap_jax import models
    from balcap_jax.captioning import captioner
    from balcap_jax.parallel import distributed, sharding
    from balcap_jax.training.machine import use_compilation_cache

    if problem := memory_problem("caption"):
        raise UserError(problem)
    with distributed.session():
        use_compilation_cache()
        provenance.existing(args.model)
        options = of_command(argparse.Namespace(**{**vars(args), **fixed}), models.read_fields(args.model))
        mesh = sharding.make_mesh(mesh_sizes(args.mesh))
        captioner.caption(args.model, source, out, options, retry_errors=args.retry_errors, mesh=mesh)
        return distributed.is_first()


def answer(args: argparse.Namespace) -> str | None:
    """Has `args.model` answer the questions; returns the file of its predictions, None in all processes but one."""
    out, listing = Path(args.out), []
    # What names files of this machine is of no use in a bucket.
    place = Path(tempfile.mkdtemp(dir=bucket.root().parent)) if storage.url_of(out) else out
    benchmark = vqa.BENCHMARKS[args.metric]
    folder = Path(args.images).absolute() if args.images else Path(args.questions).absolute().parent
    for question in read_questions(args.questions, args.split):
        if isinstance(question.picture, bytes):
            path = place / "images" / f"{len(listing)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(question.picture)
        elif question.picture:
            path = folder / question.picture
        else:
            raise UserError(f"the question {question.id!r} of {args.questions} has no picture for a model to look at")
        prompt = vqa.prompt_of(benchmark, question)
        listing.append({"id": question.id, "image": str(path.absolute()), "prompt": prompt})
    write_text(place / "questions.jsonl", json_text.lines(listing))
    predictions = out / "predictions.jsonl"
    fixed = {"max_tokens": benchmark.tokens, "prompt": ""}
    return str(predictions) if write_captions(args, place / "questions.jsonl", predictions, **fixed) else None


# ---- one metric, and all of a folder ---------------------------------------------------------------------------------


def read_judgements(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """Judgements by id. Raises UserError for a line without one."""
    judgements = {}
    remedy = '--judgements takes lines {"id", "judgement"}'
    if args.metric == "caparena" and "img" in next(iter(read_json_or_jsonl(path, remedy)), ("", {}))[1]:
        return caparena.read_results(path, args.name)
    for where, line in read_json_or_jsonl(path, remedy):
        if not isinstance(line.get("id"), str) or not isinstance(line.get("judgement", {}), dict):
            raise UserError(f"{where} is no judgement; {remedy}")
        if line["id"] in judgements:
            raise UserError(f"{where}: {line['id']!r} has a judgement already; keep one of them")
        if "judgement" in line:
            judgements[line["id"]] = line["judgement"]
    return judgements


def how_made(path: str | None, texts: Texts) -> dict[str, Any]:
    """How captions or predictions were made, as far as `caption` has left its settings beside them."""
    if not path or not storage.fetch(provenance.beside(Path(path), ".settings.json")).is_file():
        return {}
    return protocol.made(provenance.read(Path(path)), texts)


def score(args: argparse.Namespace, judge: ConfigDict) -> str:
    """Runs one metric; returns the result in a line or two. Raises UserError where there is none."""
    out = Path(args.out)
    metric, items, texts = build(args, judge)
    if not items:
        listing = next(name for name in reversed(NEEDS[args.metric]) if name != "images")
        raise UserError(f"there is nothing to evaluate in {getattr(args, listing)}")
    files = {name: getattr(args, name) for name in FILES}
    identity = {"inputs": digest_of(*files.values()), "name": args.name, "split": args.split}
    if args.suite:  # Captions of other benchmarks' pictures may join the file.
        own = json_text.dumps([[item.id, item.caption] for item in items])
        identity["inputs"] = digest_of_texts(own, digest_of(*(files[name] for name in FILES if name != "captions")))
    # What scores must share to be compared: everything but the captions, or predictions, themselves.
    identity["benchmark"] = digest_of(*(files[name] for name in FILES if name not in SCORED))
    client = make_client(judge, seed=0) if metric.prompts and not args.judgements else None
    try:
        if client:
            client.connect(metric.sees)
        known = read_judgements(args.judgements, args) if args.judgements else None
        unused = [*texts.unused, *sorted({*(known or {})} - {item.id for item in items})]
        options = {"client": client, "judge": judge, "judgements": known, "retry_errors": args.retry_errors}
        options["captions"] = how_made(args.captions or args.predictions, texts)
        options["truncated"] = texts.truncated
        results = evaluate(metric, items, out, identity, unused=[] if args.suite else unused, **options)
    finally:
        if client:
            client.close()
    return summary_text(results, out)


def run_suite(args: argparse.Namespace, judge: ConfigDict) -> None:
    """Runs the benchmarks of the folder `args.data`. Raises UserError where none of them has a score."""
    data, out = Path(args.data), Path(args.out)
    benchmarks, absent = benchmarks_in(data)
    if args.model and not args.captions:
        args.captions = str(out / "captions.jsonl")
        if not write_captions(args, data / PICTURES, Path(args.captions)):
            return
    for metric, reason in absent.items():
        print(f"{metric}: left out: {reason}", flush=True)
    read_captions(args.captions)  # What is wrong with them is so for all.
    scored, reasons = 0, {}
    with storage.kept(out):
        for benchmark in benchmarks:
            try:
                print(shown(score(of_benchmark(args, benchmark), judge)), flush=True)
                scored += 1
            except UserError as error:
                first = reasons.setdefault(str(error), benchmark.metric)
                told = shown(error) if first == benchmark.metric else f"for the reason of {first}"
                print(f"{benchmark.metric}: no score: {told}", flush=True)
    if not scored:
        raise UserError(f"none of the {len(benchmarks)} benchmarks of {data} has a score; the lines above say why")


def of_benchmark(args: argparse.Namespace, benchmark: Benchmark) -> argparse.Namespace:
    """The arguments of one benchmark of a suite."""
    files = {name: getattr(args, name) if name == "captions" else None for name in FILES}
    files |= {benchmark.argument: str(benchmark.file), "images": benchmark.folder and str(benchmark.folder)}
    own = {"metric": benchmark.metric, "out": str(Path(args.out) / benchmark.metric), "below": benchmark.own}
    return argparse.Namespace(**{**vars(args), **files, **own})


@exit_on_user_error(resumes=True)
def main(argv: Sequence[str] | None = None) -> None:
    rest, judge = take_judge(argv)
    parser = make_parser()
    args = parser.parse_args(rest)
    args.below = ""
    check_arguments(parser, args)
    for name in FILES:
        if getattr(args, name):
            storage.fetch(Path(getattr(args, name)))
    if args.suite:
        run_suite(args, judge)
        return
    if args.model and args.metric in vqa.BENCHMARKS and not args.predictions:
        args.predictions = answer(args)
        if args.predictions is None:
            return
    with storage.kept(args.out):
        is_count = args.metric == "side_by_side"
        print(shown(count_votes(args.votes, Path(args.out)) if is_count else score(args, judge)), flush=True)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises UserError for arguments that are missing or do not go together."""
    if bool(args.metric) == bool(args.suite):
        parser.error("give either --metric or --suite")
    given = [field.name for field in dataclasses.fields(Options) if hasattr(args, field.name)]
    given += [name for name in ("like", "mesh") if getattr(args, name)]
    if given and not args.model:
        parser.error(f"--{given[0]} is for captions that --model writes")
    if args.suite:
        if not args.data:
            parser.error(f"--suite={args.suite} needs --data=DIR")
        if bool(args.model) == bool(args.captions):
            parser.error(f"--suite={args.suite} needs either --model=DIR or --captions=F.jsonl")
        if args.judgements:
            parser.error(f"--judgements are of one metric; --suite={args.suite} takes none")
        return
    own = ("dtype", "prompt_tokens", "max_image_tokens", "batch_size", "threads", "mesh")
    if other := [name for name in given if name not in own]:
        parser.error(f"--{other[0]} is for --suite=captions: general benchmarks have their own prompts and lengths")
    if args.metric in vqa.BENCHMARKS and not args.predictions and not args.model:
        parser.error(f"--metric={args.metric} needs --predictions=F.jsonl, or --model=DIR")
    for name in NEEDS[args.metric]:
        if not getattr(args, name):
            parser.error(f"--metric={args.metric} needs --{name}")


def count_votes(votes: str, out: Path) -> str:
    """Writes the tables of a file of side-by-side votes and returns them."""
    comparisons = side_by_side.comparisons(read_jsonl(votes, "--votes takes lines of ImageInWords"))
    claim(out, {"metric": "side_by_side", "inputs": digest_of(votes)})
    text = "\n\n".join(f"{table.name or Path(votes).stem}\n\n{side_by_side.markdown(table)}" for table in comparisons)
    results = {"metric": "side_by_side", "comparisons": list(map(side_by_side.as_json, comparisons))}
    write_text(out / "table.md", text + "\n")
    write_text(out / "results.json", json_text.dumps(results))
    return text


def summary_text(results: dict[str, Any], out: Path) -> str:
    """The result in a line or two. Raises UserError where there is no score."""
    if results["score"] is None and results["n"]:
        raise UserError(
            f"{results['metric']} has no score: what it divides by is 0 over all {results['n']} judgements; "
            f"{out}/items.jsonl"
        )
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(results["errors"].items())[:3])
    # New captions would be another evaluation, and without a judge nothing would change.
    failed = results["judge"] and set(results["errors"]) - {NO_CAPTION}
    again = "; once mended, --retry_errors judges those again that failed" if failed else ""
    if results["score"] is None:
        none = f"none of the {results['invalid']} items has a valid judgement ({reasons})"
        raise UserError(f"{none}; {out}/items.jsonl has each{again}")
    span = "no interval" if results["confidence"] is None else "{:.2f}, {:.2f}".format(*results["confidence"])
    words = f", {results['words']:.1f} words" if results["words"] is not None else ""
    text = f"{results['metric']}: {results['score']:.2f} [{span}] over {results['n']} items{words}"
    if results["invalid"]:
        text += f"\n{results['invalid']} items are not in it ({reasons}){again}"
    if cut := results.get("truncated"):
        limit = results["captions"].get("max_tokens")
        text += f"\n{cut:.1f}% of the captions were cut" + (f" at {limit} tokens (--max_tokens)" if limit else "")
    if unparsable := results.get("unparsable"):
        text += f"\n{unparsable:.0f} answers name no option; they count as wrong"
        if unparsable > captionqa.UNPARSABLE * results["n"]:
            share = 100 * unparsable / results["n"]
            text += f"\nwarning: {share:.0f}% of the answers are none: this judge does not answer as it is asked to"
    if results["unused"]:
        named = ", ".join(results["unused_ids"][:3])
        text += f"\n{results['unused']} texts or judgements are of no item here ({named})"
    return f"{text}\n{out}/results.json"


if __name__ == "__main__":
    main()
