"""Captions pictures with a model directory, one JSON line each.

    python -m balcap_jax.caption --model=runs/scenes/model --images=photos --out=captions.jsonl
    python -m balcap_jax.caption --model=D --images=list.jsonl --out=captions.jsonl --temperature=0.7 --samples=8

`--images` is a folder (with its subfolders, in sorted order) or a JSONL file whose lines are {"image": path from that
file's folder, and optionally "id", "prompt"}. Each picture gives one line {"image", "caption", "tokens", "truncated"},
with its "id" if it has one: tokens is the length with the end token, truncated says that `--max_tokens` cut it.
Pictures without a prompt of their own get the training prompt of the model. Unreadable pictures go to F.errors.jsonl as
{"image", "error"}.

The same command goes on where an earlier one was stopped or killed; F.settings.json keeps captions of other models,
prompts or sampling out of the same file. A sample depends on (seed, id or path, number of the sample) only, not on its
batch.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from balcap_jax.captioning.captioner import DEFAULT_PROMPT, Options, caption
from balcap_jax.captioning.provenance import beside
from balcap_jax.cli.arguments import CommandParser, place
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.training.machine import use_compilation_cache


def make_parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = CommandParser(
        prog="python -m balcap_jax.caption",
        description="Captions pictures, one JSON line each; the same command goes on where it was stopped.",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", type=place, required=True, help="a model directory of ours, or one of Hugging Face")
    images_help = 'a folder, or lines {"image", "id", "prompt"}'
    add("--images", metavar="DIR_OR_JSONL", type=place, required=True, help=images_help)
    add("--out", metavar="F.jsonl", type=place, required=True, help="one line each; unreadable ones: F.errors.jsonl")
    add("--prompt", help=f"for pictures without their own (default: the model's, or {DEFAULT_PROMPT!r})")
    add("--batch_size", type=int, default=defaults.batch_size, help="pictures at a time (default: %(default)s)")
    add("--temperature", type=float, default=defaults.temperature, help="0 = greedy (default: %(default)s)")
    add("--top_p", type=float, default=defaults.top_p, help="nucleus, in (0, 1] (default: %(default)s)")
    add("--top_k", type=int, default=defaults.top_k, help="likeliest tokens only; 0 = all (default: %(default)s)")
    add("--max_tokens", type=int, default=defaults.max_tokens, help="longest caption (default: %(default)s)")
    add("--samples", type=int, metavar="N", default=defaults.samples, help="captions drawn per picture (default: 1)")
    keep_help = 'of N samples: the one of the highest mean log-prob, or beside it all, as "samples" (default: best)'
    add("--keep", choices=("best", "all"), default=defaults.keep, help=keep_help)
    add("--seed", type=int, default=defaults.seed, help="of sampling (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="compute type (default: the model's)")
    add("--prompt_tokens", type=int, metavar="P", help="room for prompt and image tokens (default: the model's)")
    add("--threads", type=int, default=defaults.threads, help="that read pictures (default: %(default)s)")
    add("--retry_errors", action="store_true", help="try the pictures of F.errors.jsonl again")
    return parser


@exit_on_user_error(resumes=True)
def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    use_compilation_cache()
    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})
    counts = caption(arguments.model, arguments.images, arguments.out, options, retry_errors=arguments.retry_errors)
    errors = beside(Path(arguments.out), ".errors.jsonl")
    if not counts["captions"]:
        raise UserError(f"none of the {counts['errors']} pictures can be read; {errors} says why")
    unreadable = f"; {counts['errors']} unreadable: {errors}" if counts["errors"] else ""
    wide = f"; {counts['wide']} beyond the model's aspect ratio" if counts["wide"] else ""
    print(f"{counts['captions']} captions ({counts['new']} new): {arguments.out}{unreadable}{wide}")


if __name__ == "__main__":
    main()
