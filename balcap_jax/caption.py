"""Captions pictures with a model directory, one JSON line each.

    python -m balcap_jax.caption --model=runs/scenes/model --images=photos --out=captions.jsonl
    python -m balcap_jax.caption --model=D --images=list.jsonl --out=captions.jsonl --temperature=0.7 --samples=8
    python -m balcap_jax.caption --model=BASE --images=photos --out=base.jsonl --like=captions.jsonl

`--images` is a folder (with its subfolders, in sorted order), a JSONL file whose lines are {"image": path from that
file's folder, and optionally "id", "prompt"}, or parquet files with the pictures inside (one, their folder, a glob).
Each picture gives one line {"image", "caption", "tokens", "truncated"}, with its "id" and its own "prompt" if it has
them: tokens is the length with the end token, truncated says that `--max_tokens` cut it. Unreadable pictures go to
F.errors.jsonl as {"image", "error"}.

Prompt, token limit, image cap and compute type are those that the model was trained with, where it says so. All of it
is in F.settings.json, which `evaluate` hands on to `compare`; `--like` takes it from other captions instead. The same
command goes on where an earlier one was stopped or killed; the settings keep captions of other models, prompts or
sampling out of the same file. A sample depends on (seed, id or path, number of the sample) only, not on its batch.

All devices take pictures of their own; `--mesh=fsdp:-1` splits a model that is too large for one of them. Several
processes (docs/pods.md) share the pictures, and process 0 writes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from balcap_jax import models
from balcap_jax.captioning import provenance
from balcap_jax.captioning.captioner import caption
from balcap_jax.captioning.options import Options, add_arguments, mesh_sizes, of_command
from balcap_jax.captioning.provenance import beside
from balcap_jax.cli.arguments import CommandParser, called, place
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.parallel import distributed, sharding
from balcap_jax.training.machine import use_compilation_cache

__all__ = ["Options", "caption", "main"]


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=called("caption"),
        description="Captions pictures, one JSON line each; the same command goes on where it was stopped.",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", type=place, required=True, help="model directory, of Hugging Face or of training")
    images_help = 'a folder, lines {"image", "id", "prompt"}, or parquet files'
    add("--images", metavar="DIR_OR_JSONL", type=place, required=True, help=images_help)
    add("--out", metavar="F.jsonl", type=place, required=True, help="one line each; unreadable ones: F.errors.jsonl")
    add("--retry_errors", action="store_true", help="try the pictures of F.errors.jsonl again")
    add_arguments(parser)
    return parser


@exit_on_user_error(resumes=True)
def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    sizes = mesh_sizes(arguments.mesh)
    with distributed.session():
        use_compilation_cache()
        provenance.existing(arguments.model)
        options = of_command(arguments, models.read_fields(arguments.model))
        retry, mesh = arguments.retry_errors, sharding.make_mesh(sizes)
        counts = caption(arguments.model, arguments.images, arguments.out, options, retry_errors=retry, mesh=mesh)
        leads = distributed.is_first()
    errors = beside(Path(arguments.out), ".errors.jsonl")
    if not counts["captions"]:
        raise UserError(f"none of the {counts['errors']} pictures can be read; {errors} says why")
    unreadable = f"; {counts['errors']} unreadable: {errors}" if counts["errors"] else ""
    wide = f"; {counts['wide']} beyond the model's aspect ratio" if counts["wide"] else ""
    if leads:
        print(shown(f"{counts['captions']} captions ({counts['new']} new): {arguments.out}{unreadable}{wide}"))


if __name__ == "__main__":
    main()
