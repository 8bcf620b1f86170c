"""Checks before a pod is rented: everything about a run that can be known without its chips, in under a minute.

    python -m balcap_jax.doctor --config=configs/qwen25vl_3b.py --workdir=runs/a [--config.data.manual_dir=... ...]

It takes the arguments of `train`. Exit status 1 says that something is to be mended; the last line on stderr is the
first of it. Nothing is trained, and no weight is read; the judge is asked about a hundred questions. `--topology`
compiles the programs as well (`aot`), which takes minutes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from balcap_jax import rewards
from balcap_jax.cli import bucket, json_text
from balcap_jax.cli.arguments import OVERRIDE, CommandParser, called, place, positive, seconds, split_overrides
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.config import recipes as configuration
from balcap_jax.data.input import Data
from balcap_jax.doctor import checkpoint, devices, findings, judge, outlay, pictures, places
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding
from balcap_jax.parallel.topology import check_topology
from balcap_jax.training import announce, required
from balcap_jax.training.programs import model_fields

SETTINGS = "settings"
BUCKET_SECONDS = 6.0  # in which a request to a bucket may fail and be repeated
UNPLACED = "for the place of the run: without --workdir neither that nor the room on its disk was looked at"
UNMESHED = "for the devices: without --topology neither their number nor their memory was held against the mesh"


def examine(
    config: ConfigDict,
    workdir: str = "",
    *,
    aot: Sequence[str] = (),
    topology: str = "",
    slices: int = 1,
    limits: outlay.Limits = outlay.Limits(),  # noqa: B008 - it cannot be changed
) -> tuple[list[Finding], str]:
    """All findings, in the order in which faults are to be mended, and the block that training begins with.

    The block is "" where the data or the model are not known. aot: arguments that name the configuration.
    """
    found = [_settings(config)]
    is_random = not (config.model.path or config.model.decoder_path)
    of_data, seen = pictures.look(config, _image_size(config), tokenizer=is_random)
    of_model, built = checkpoint.look(config, seen.splits.tokenizer if seen else None)
    found += [*of_model, *(finding for finding in of_data if finding.check == pictures.DATA)]
    found.append(pictures.prompts(config, seen, built and built.processor))
    found += [finding for finding in of_data if finding.check != pictures.DATA]
    of_judge, heard = judge.look(config, seen)
    found += of_judge
    weights = built.file_bytes if built and config.model.path else 0
    found.append(places.workdir(config, workdir))
    found.append(_disk(config, workdir, [*of_model, found[-1]], seen and seen.to_make, weights))
    of_devices, planned = devices.mesh(config, built and built.params), None
    if topology and of_devices.verdict != FAULT:
        of_devices, planned = devices.look(aot, topology, slices)
    found += [*outlay.look(config, heard, planned, limits), of_devices]
    block = ""
    if seen and built and (heard.about or config.judge.name != "remote"):
        splits = _to_be_made(config, seen.splits) if seen.to_make else seen.splits
        block = announce.block(config, built.family, built.params, splits, seen.shown, judge.Named(heard.about))
    return found, block


def _disk(
    config: ConfigDict, workdir: str, first: Sequence[Finding], to_make: tuple[Path, int] | None, weights: int
) -> Finding:
    """Sizes and places are known where those of `first`, of checkpoint and workdir, have no fault."""
    faulty = [finding.check for finding in first if finding.verdict == FAULT]
    if faulty and workdir:
        return Finding(places.DISK, UNCHECKED, f"the {faulty[0]} comes first")
    return places.disk(config, workdir, to_make, weights)


def _to_be_made(config: ConfigDict, few: Data) -> Data:
    """The splits by their sizes, of which `few` examples were made."""
    sizes = {name: range(config.data[f"{name}_size"]) for name in ("train", "validation", "test")}
    return few._replace(**sizes)


def _settings(config: ConfigDict) -> Finding:
    try:
        required.check(config)
    except UserError as error:
        return Finding(SETTINGS, FAULT, str(error), "give these")
    return Finding(SETTINGS, OK, f"the recipe {config.name!r} has all that it leaves to you")


def _image_size(config: ConfigDict) -> int:
    """That of pictures which are made for the model; the recipe's own where the model cannot be read."""
    try:
        return model_fields(config)[0].get("image_size", config.model.image_size)
    except UserError:
        return config.model.image_size


def amount(text: str) -> float:
    """A positive number, such as a price."""
    return positive(text, 1e12, "a number above 0")


def workdir(text: str) -> str:
    """As `place`; what is wrong with a place in a bucket is left to the check of the workdir."""
    return text if bucket.is_url(text) else place(text)


def prices(text: str) -> tuple[float, float]:
    """ "0.25,2": of a million tokens of questions, and of answers."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"it takes two prices, IN,OUT, got {text!r}")
    return amount(parts[0]), amount(parts[1])


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog=called("doctor"),
        description="Checks a run before it begins: checkpoint, data, references, judge, disks, time and money.",
    )
    configuration.add_arguments(parser)
    parser.add_argument("--workdir", type=workdir, metavar="DIR", help="where the run will be written")
    parser.add_argument("--topology", default="", metavar="NAME", help="compile for this slice too, such as v5e:4x4")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices, joined by mesh.replica")
    parser.add_argument("--judge_price", type=prices, metavar="IN,OUT", help="of a million tokens in, and out")
    parser.add_argument("--chip_hour_price", type=amount, default=0.0, metavar="PRICE", help="of one chip for an hour")
    parser.add_argument(
        "--step_seconds",
        type=seconds,
        default=0.0,
        metavar="S",
        help="of a step's rollout and update on these chips, as metrics.jsonl of another run has them",
    )
    parser.add_argument("--max_hours", type=amount, default=0.0, metavar="H", help="a fault where the run takes longer")
    parser.add_argument("--budget", type=amount, default=0.0, metavar="MONEY", help="a fault where it costs more")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    config, args = configuration.parse_command_line(arguments, make_parser())
    rewards.check_settings(config)
    if args.judge_price:
        with config.unlocked():
            config.judge.price_in, config.judge.price_out = args.judge_price
    if args.topology:
        check_topology(args.topology, args.slices)
    elif args.slices != 1:
        raise UserError(f"--slices is {args.slices}: it is the number of slices of --topology, at least 1; name both")
    jax.config.update("jax_platforms", "cpu")  # No chip of this machine is taken: shapes are all that is computed.
    given = [f"--config={args.config}", *(f"{OVERRIDE}{n}={v}" for n, v in split_overrides(arguments)[1].items())]
    limits = outlay.Limits(args.chip_hour_price, args.step_seconds, args.max_hours, args.budget)
    with bucket.patience(BUCKET_SECONDS):  # A bucket that is down is a finding, and not to be waited for.
        found, block = examine(
            config, args.workdir or "", aot=given, topology=args.topology, slices=args.slices, limits=limits
        )
    if args.json:
        print(json_text.dumps(findings.as_json(found), indent=2), flush=True)
    else:
        print("\n".join(filter(None, [block, findings.table(found)])), flush=True)
    if (first := findings.first_fault(found)) is not None:
        print(f"not ready: {first}", file=sys.stderr, flush=True)
        raise SystemExit(1)
    if not args.json:
        unseen = [UNPLACED] * (not args.workdir) + [UNMESHED] * (devices.is_given(config) and not args.topology)
        print(f"ready, but {'; '.join(unseen)}" if unseen else "ready", flush=True)


if __name__ == "__main__":
    main()
