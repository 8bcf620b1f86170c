"""Writes with a judge model what training and rewards read beside pictures: references with their units, or criteria.

    python -m balcap_jax.recaption --images=photos --out=photos/captions.jsonl --judge.endpoints=http://localhost:8000/v1
    python -m balcap_jax.recaption --images=sharegpt4v.json --root=DIR --out=recaptioned.jsonl --judge.model=MODEL
    python -m balcap_jax.recaption --write=units --images=captions.jsonl --out=with_units.jsonl
    python -m balcap_jax.recaption --write=rubrics --images=captions.jsonl --students=F.jsonl --out=with_rubrics.jsonl
    python -m balcap_jax.recaption --format=dense --images='data/train-*.parquet' --columns=docci --out=dense.jsonl

`--images` is a folder, a JSONL file as `caption` and `data.photos` read it, the JSON of ShareGPT4V, or parquet files
(one, their folder, a glob). `--columns` names columns, and the fields of a JSONL file, as `data.columns` does.
`--write` says what is written:

    references  the judge, which sees the picture, describes it under the sample's own prompt, and then splits its
                description into units; it sees the same pixels once, copies go to F.duplicates.jsonl
    units       of the references that the lines have
    rubrics     RubiCap's criteria: what a student's caption (`--students`, a file of `caption`) lacks beside the
                reference

`--format` is that of references: short (one sentence), descriptive, dense (all that can be seen), or fused, which keeps
what the `alt_text` of a line knows and the picture confirms. So the style of references is an experiment of one flag.

`--out` is what `data.units` joins to ShareGPT4V, parquet files or any other photographs, and what `data.name=photos`
reads by itself as `data.data_dir`; other fields of a line stay. Pictures that cannot be read
or have no answer go to F.errors.jsonl as {"image", "error"}; `--retry_errors` asks again. The same command goes on
where an earlier one was stopped or killed; F.judge.json holds the cost so far. `--judge.FIELD=VALUE` sets the fields of
the config group `judge`: endpoints, model, api_key_env, limits, cache_dir, prices, max_cost.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from balcap_jax.captioning import provenance
from balcap_jax.captioning.provenance import beside
from balcap_jax.cli import storage
from balcap_jax.cli.arguments import CommandParser, called, disk_place, place
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, read_jsonl, resolved
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.cli.progress import ProgressLine
from balcap_jax.config.recipes import take_judge
from balcap_jax.data import addresses, photos, sharegpt4v
from balcap_jax.data.input import NO_CAPTION
from balcap_jax.data.items import items_of
from balcap_jax.data.listing import Item, picture_name, spelt
from balcap_jax.data.same_pictures import JUDGED_PIXELS
from balcap_jax.judges import budget, prompts
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat_judge import make_client
from balcap_jax.judges.writers import ALT_TEXT, FORMATS, References, Rubrics, Units, alt_text_of, reference_of

KINDS = {"references": References, "units": Units, "rubrics": Rubrics}
_THREADS = 8  # that read pictures
_BEFORE = {"format": "descriptive"}  # of files of earlier versions, which do not say it
# Estimates for --estimate: tokens of a question beside its prompt, and of its answer.
_TOKENS = {"describe.v1": (1400, 300), "units.v1": (300, 350), "rubric_writer.v1": (450, 250)}
_TOKENS |= {"describe_short.v1": (1400, 40), "describe_dense.v1": (1400, 550), "describe_fused.v1": (1450, 300)}
_CHARACTERS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class Sources:
    """The pictures, and what is written about them.

    kind: one of KINDS. prompt: of pictures without their own. root: where the pictures of a JSON or JSONL file lie
    (None: beside it). students: a file of `caption`, for "rubrics". form: one of FORMATS, for "references". columns: as
    `data.columns`, of JSONL and parquet files.
    """

    images: str
    kind: str = "references"
    prompt: str = photos.PROMPT
    root: str | None = None
    students: str | None = None
    form: str = "descriptive"
    columns: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names and versions of the prompts that are asked."""
        return References.prompts_of(self.form) if self.kind == "references" else KINDS[self.kind].prompts

    @property
    def folder(self) -> Path:
        """The folder that the paths of pictures start from."""
        source = Path(self.images)
        is_list = not source.is_dir() and not addresses.is_parquet(source)
        return Path(self.root) if self.root and is_list else addresses.folder_of(source)

    def items(self) -> list[Item]:
        """Raises UserError where nothing is there, a line is bad, or a reference is needed and missing."""
        source = Path(self.images)
        if source.suffix.lower() == ".json" and storage.fetch(source).is_file():
            folder, items, texts = self.folder, [], 0
            for number, entry in enumerate(sharegpt4v.read_annotations(source), start=1):
                if sharegpt4v.is_text_alone(entry):
                    texts += 1
                    continue
                sample = sharegpt4v.read_sample(entry, f"{source}, entry {number}", folder)
                line = {"image": sample["id"], "prompt": sample["prompt"], "caption": sample["reference"]}
                line |= {name: entry[name] for name in sharegpt4v.REWARDED if name in entry}
                items.append(Item(sample["id"], sample["id"], folder / sample["id"], sample["prompt"], entry=line))
            if texts:
                print(f"{source}: {texts} entries of text alone are left out", flush=True)
        else:
            texts = self.kind != "references" or self.form == "fused"
            items = items_of(source, self.prompt, columns=self.columns, texts=texts, root=self.root)
        if self.form == "fused" and not any(map(alt_text_of, items)):
            raise UserError(
                f"--format=fused needs the text that came with each picture, and no line of {source} has {ALT_TEXT!r}; "
                f"add it to the lines, or name the column of parquet files with --columns={ALT_TEXT}=COLUMN"
            )
        return items if self.kind == "references" else self._with_references(items)

    def _with_references(self, items: Sequence[Item]) -> list[Item]:
        """The items, of which rows of parquet files without a caption have that as their error.

        Raises UserError where another has none: a line can be mended.
        """
        is_table = addresses.is_parquet(self.images)
        checked = []
        for item in items:
            try:
                if not item.error:
                    reference_of(item)
            except UserError:
                if not is_table or not addresses.address(item.path):
                    raise
                item = dataclasses.replace(item, error=NO_CAPTION[0])
            checked.append(item)
        if checked and all(item.error for item in checked):
            raise UserError(
                f"no row of {self.images} has a caption, such as {checked[0].image} ({checked[0].error}); name its "
                "column with --columns=caption=COLUMN, or have references written first (--write=references)"
            )
        return checked

    def drafts(self) -> dict[str, str]:
        """The students' captions by the id, or the path, of their pictures."""
        drafts = {}
        remedy = "--students takes a file that `caption` wrote"
        for where, entry in read_jsonl(storage.fetch(Path(self.students or "")), remedy):
            if not isinstance(_key(entry), str) or not isinstance(entry.get("caption"), str):
                raise UserError(f"{where} has no picture and caption; {remedy}")
            drafts[entry["id"] if "id" in entry else picture_name(self.folder, entry["image"])] = entry["caption"]
        return drafts


def recaption(
    sources: Sources, out: str | os.PathLike, judge: ConfigDict, *, retry_errors: bool = False, max_pixels=JUDGED_PIXELS
) -> dict[str, int]:
    """Writes the lines that `out` still lacks; returns the numbers of "lines", "errors", "duplicates", and "new" lines.

    `judge` is the config group of that name.

    Raises:
      UserError: bad input, a judge that is down or fails too often, judge.max_cost is reached, a file that cannot be
        written.
    """
    out = resolved(out).absolute()
    # The key stays; the name is that which a file beside `out` gives the picture. From a bucket no path leads here.
    beside_out = (lambda path: path) if storage.url_of(out) else functools.partial(picture_name, out.parent)
    items = [dataclasses.replace(item, image=spelt(beside_out(str(item.path.absolute())))) for item in sources.items()]
    client = make_client(judge, seed=0)
    try:
        writer = _writer(sources, client, judge, max_pixels)
        with (
            storage.kept(out, provenance.files_of(out)),
            AppendedLines(out) as lines,
            AppendedLines(beside(out, ".errors.jsonl"), lazy=True) as errors,
            AppendedLines(beside(out, ".duplicates.jsonl"), lazy=True) as duplicates,
        ):
            spending = budget.Spending(client, judge, beside(out, ".judge.json"))
            client.connect(sees=sources.kind == "references")
            settings = {"write": sources.kind, "judge": client.model, "prompts": ", ".join(writer.prompts)}
            settings |= {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
            if sources.kind == "references":
                settings |= {"format": sources.form, "prompt": sources.prompt, "max_pixels": max_pixels}
            if sources.students:
                settings["students"] = shown(os.path.realpath(sources.students))
            if lines.had_content or errors.had_content or duplicates.had_content:
                provenance.check(out, settings, _BEFORE if sources.kind == "references" else {})
            provenance.write(out, settings)
            if retry_errors:
                wanted = {_key(item.names) for item in items}
                errors.keep(lambda entry: _key(entry) not in wanted)
            if isinstance(writer, References):
                writer.know(lines.entries)
            done = {_key(entry) for file in (lines, errors, duplicates) for entry in file.entries}
            named = {_key(item.names): item for item in reversed(items)}  # ShareGPT4V names some pictures twice.
            pending = [item for key, item in reversed(named.items()) if key not in done]
            new = len(lines.entries)
            with ProgressLine(sources.kind, len(named), len(named) - len(pending)) as progress:
                for start in range(0, len(pending), judge.concurrency):
                    batch = pending[start : start + judge.concurrency]
                    results = writer(batch)
                    if reason := spending.exhausted():
                        raise UserError(f"{reason}; {out} has what was written before, the same command goes on")
                    added: dict[AppendedLines, list[dict[str, Any]]] = {}
                    for item, result in zip(batch, results, strict=True):
                        file = errors if isinstance(result, str) else duplicates if "same_as" in result else lines
                        fields = {"error": result} if isinstance(result, str) else result
                        added.setdefault(file, []).append({**fields, **item.names})
                    for file, entries in added.items():
                        file.append(entries)
                    progress.advance(len(batch))
                    spending.update()
                    if spending.spent and start + len(batch) < len(pending):
                        raise UserError(f"{spending.limit_text()}; {out} has what was written, raise it to go on")
            files = {"lines": lines, "errors": errors, "duplicates": duplicates}
            return {name: len(file.entries) for name, file in files.items()} | {"new": len(lines.entries) - new}
    finally:
        client.close()


def _writer(sources: Sources, client: ChatClient, judge: ConfigDict, max_pixels: int) -> References | Units | Rubrics:
    if sources.kind == "references":
        return References(client, judge.max_tokens, max_pixels, _THREADS, sources.form)
    if sources.kind == "units":
        return Units(client, judge.max_tokens)
    return Rubrics(client, judge.max_tokens, sources.drafts())


def _key(entry: Mapping[str, Any]) -> Any:
    return entry.get("id", entry.get("image"))


def estimate(sources: Sources, judge: ConfigDict) -> str:
    """A table of calls, tokens and cost without a cache."""
    count = len(sources.items())
    lines = [f"{count:,} pictures; about:", f"{'prompt':18}{'calls':>12}{'tokens in':>16}{'tokens out':>16}"]
    sums = [0, 0]
    for name in sources.prompts:
        texts = {"request": "", "alt_text": "", "caption": "", "reference": ""}
        messages = prompts.render(name, **texts)
        fixed = sum(len(message["content"]) for message in messages) // _CHARACTERS_PER_TOKEN
        row = [count * (fixed + _TOKENS[name][0]), count * min(_TOKENS[name][1], judge.max_tokens)]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        lines.append(f"{name:18}{count:12,}{row[0]:16,}{row[1]:16,}")
    cost_text = "set --judge.price_in and --judge.price_out (per million tokens)"
    if judge.price_in or judge.price_out:
        cost_text = f"{(sums[0] * judge.price_in + sums[1] * judge.price_out) / budget.MILLION:,.2f}"
    return "\n".join([*lines, f"cost: {cost_text}"])


# --- the command ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=called("recaption"),
        description="Writes references, units or criteria with a judge model; the same command goes on where it was "
        "stopped. --judge.FIELD=VALUE sets the fields judge.* that `python -m balcap_jax.config` lists.",
    )
    add = parser.add_argument
    images_help = "a folder, a JSONL file, ShareGPT4V's JSON, or parquet files (one, their folder, a glob)"
    add("--images", metavar="DIR_OR_FILE", type=place, required=True, help=images_help)
    add("--out", metavar="F.jsonl", type=place, help="one line each; beside it F.errors.jsonl, F.judge.json, ...")
    add("--write", choices=tuple(KINDS), default="references", help="what is written (default: %(default)s)")
    add("--format", choices=tuple(FORMATS), default="descriptive", help="of references (default: %(default)s)")
    add("--columns", metavar="FIELD=COLUMN,...", default="", help="of parquet and JSONL files, as data.columns")
    add("--students", metavar="F.jsonl", type=place, help="for rubrics: captions that `caption` wrote")
    add(
        "--root",
        metavar="DIR",
        type=disk_place,
        help="where the pictures of a JSON or JSONL file lie (default: beside)",
    )
    add("--prompt", default=photos.PROMPT, help="for pictures without their own (default: %(default)r)")
    add("--max_pixels", type=int, default=JUDGED_PIXELS, help="of what the judge is shown (default: %(default)s)")
    add("--retry_errors", action="store_true", help="ask about the pictures of F.errors.jsonl again")
    add("--estimate", action="store_true", help="print about how many calls, tokens and money, and stop")
    return parser


@exit_on_user_error(resumes=True)
def main(argv: Sequence[str] | None = None) -> None:
    rest, judge = take_judge(argv)
    parser = make_parser()
    arguments = parser.parse_args(rest)
    if (arguments.write == "rubrics") != bool(arguments.students):
        parser.error("--write=rubrics needs --students=F.jsonl, and nothing else takes it")
    if arguments.max_pixels < 1:
        parser.error(f"--max_pixels={arguments.max_pixels} is out of range: it must be at least 1")
    if arguments.write != "references" and arguments.format != "descriptive":
        parser.error(f"--format={arguments.format} is of --write=references, and --write={arguments.write} keeps them")
    sources = Sources(
        arguments.images,
        arguments.write,
        arguments.prompt,
        arguments.root,
        arguments.students,
        arguments.format,
        arguments.columns,
    )
    if arguments.estimate:
        print(estimate(sources, judge), flush=True)
        return
    if not arguments.out:
        parser.error("the following arguments are required: --out")
    if os.path.realpath(arguments.out) == os.path.realpath(arguments.images):
        parser.error("--out must be another file than --images")
    options = {"retry_errors": arguments.retry_errors, "max_pixels": arguments.max_pixels}
    counts = recaption(sources, arguments.out, judge, **options)
    errors = beside(Path(arguments.out), ".errors.jsonl")
    if not counts["lines"]:
        raise UserError(f"nothing was written for any of the {counts['errors']} pictures; {errors} says why")
    more = f"; {counts['duplicates']} copies left out" if counts["duplicates"] else ""
    more += f"; {counts['errors']} failed: {errors}" if counts["errors"] else ""
    print(shown(f"{counts['lines']} lines ({counts['new']} new): {arguments.out}{more}"))


if __name__ == "__main__":
    main()
