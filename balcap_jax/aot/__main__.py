"""Compiles the programs of a recipe for TPUs on a machine without one, and says whether they fit.

    python -m balcap_jax.aot --config=configs/qwen25vl_7b.py --topology=v5e:4x8 --config.mesh.fsdp=32

Nothing is allocated: parameters are shapes. It needs the `libtpu` of the installed jax, `pip install balcap-jax[aot]`.
Exit status 1 says that a program does not fit, and names its largest part.
"""

import argparse
import importlib.util
import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import CommandParser, called, disk_place
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.parallel.topology import check_topology, sides

# What libtpu reads when jax is imported; it takes these for the machine's own facts.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # The compiler alone is wanted; looking for chips would take a minute and fail.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Nothing here holds a chip that another process could want.
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def prepare_environment() -> None:
    """Sets what libtpu needs. Must run before jax is imported. Raises UserError where there is no libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed; run `pip install 'balcap-jax[aot]'`")
    os.environ.update(ENVIRONMENT)
    import libtpu

    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())


def devices_of(topology: str, slices: int) -> list[Any]:
    """The devices of a topology such as "v5e:4x4". Raises UserError where libtpu knows none of that name."""
    from jax.experimental import topologies

    check_topology(topology, slices)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(sides(topology)) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # Or libtpu wants a multiple of a host with all of its chips.
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # Of several types, by version.
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--topology={topology}: libtpu knows no such topology ({reason}); name one as v5e:4x8 or v5p:2x2x2"
        ) from error


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def text_of(report: Any, chip: Any, devices: int) -> str:
    """The lines that the command prints about one program."""
    parts = ", ".join(f"{name} {gib(size)}" for name, size in report.parts().items() if size)
    planned, verdict = report.planned, "fits" if report.fits(chip.hbm) else "DOES NOT FIT"
    lines = [
        f"{planned.name}: {verdict}, {gib(report.total)} of {gib(chip.hbm)} GiB per chip ({parts}); "
        f"compiled in {report.seconds:.0f} s",
        f"    flops per chip {report.flops / 1e12:.2f} T, {report.flops / chip.flops:.2f} s at the chip's peak",
    ]
    if planned.model_flops:
        compiled = report.flops * devices
        lines.append(
            f"    flops of all chips {compiled / 1e12:.0f} T: {compiled / planned.model_flops:.2f} of the model's "
            f"({planned.model_flops / 1e12:.0f} T), {compiled / planned.repeated_flops:.2f} of what it would need with "
            f"prompts repeated per sample"
        )
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for moved in report.collectives:
        where = "decoding loop" if moved.in_open_loop else "other loops" if moved.loops else "outside loops"
        row = rows[moved.kind, where]
        row[0] += moved.times
        row[1] += moved.times * moved.size
        row[2] = max(row[2], moved.size)
    for (kind, where), (count, total, largest) in sorted(rows.items()):
        lines.append(
            f"    {kind:18} {where:14} {int(count):>8} times, {gib(total):>8} GiB in all, "
            f"largest {largest / 2**20:.2f} MiB"
        )
    # A packed update has loops with an open end too.
    for turn in report.turns if planned.name == "rollout" else ():
        lines.append(
            f"    a decoding step reads {gib(turn.weights)} GiB of weights, {gib(turn.cache)} GiB of cache and prefix; "
            f"{turn.collectives:.0f} collectives move {turn.moved / 2**20:.2f} MiB"
        )
    # Those that move in every turn of the decoding loop what does not change in it.
    if weights := [moved for moved in report.collectives if moved.of_invariant]:
        lines.append(f"    {len(weights)} collectives of the decoding loop move weights, first: {weights[0].op_name}")
    return "\n".join(lines)


def as_json(report: Any, chip: Any) -> dict[str, Any]:
    names = ("arguments", "outputs", "aliased", "temporaries", "code", "resident", "total")
    names += ("flops", "model_flops", "repeated_flops", "seconds")
    figures = vars(report.planned) | vars(report) | {"total": report.total}
    return {
        "program": report.planned.name,
        "fits": report.fits(chip.hbm),
        "hbm": chip.hbm,
        "peak_seconds": report.flops / chip.flops,
        **{name: figures[name] for name in names},
        "collectives": [vars(moved) for moved in report.collectives],
        "decoding_step": [vars(turn) for turn in report.turns],
    }


def compiled(planned: Any, chip: Any, devices: int) -> tuple[Any, str]:
    """Compiles a program and prints what is to be said of it. -> (report or None, why the compiler refused it)"""
    import jax

    from balcap_jax.aot import memory

    print(f"compiling {planned.name}{planned.note and f' {planned.note}'} ...", flush=True)
    try:
        report = memory.compile_and_read(planned)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = memory.refusal(str(error))
        print(f"{planned.name}: DOES NOT FIT, XLA refuses it: {refusal}", flush=True)
        if buffers := memory.largest_buffers(str(error)):
            print(buffers, flush=True)
        return None, refusal
    print(text_of(report, chip, devices), flush=True)
    return report, ""


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not {"-h", "--help"} & set(arguments):
        prepare_environment()
    from balcap_jax import rewards
    from balcap_jax.aot import memory, print_sharding
    from balcap_jax.config import recipes as configuration
    from balcap_jax.parallel import sharding

    parser = CommandParser(
        prog=called("aot"),
        description="Compiles a recipe's programs for TPUs that are not here, and says whether they fit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    configuration.add_arguments(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:4x4, v5p:2x2x2, or v6e:1x1 for one chip"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices, joined by mesh.replica")
    parser.add_argument(
        "--program", choices=("all", "layout", "rollout", "update"), default="all", help="compile this one alone"
    )
    parser.add_argument("--print_sharding", action="store_true", help="print where each parameter lies, and stop")
    parser.add_argument("--json", type=disk_place, metavar="FILE", help="write the figures there as well")
    config, args = configuration.parse_command_line(arguments, parser)
    rewards.check_settings(config)

    if args.json and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):  # Before all compilation.
        raise UserError(f"cannot write --json={args.json}: name a file in a directory that exists")
    devices = devices_of(args.topology, args.slices)
    kind = devices[0].device_kind
    if kind not in memory.CHIPS:
        raise UserError(f"the memory of {kind} is not known; add it to balcap_jax.aot.memory.CHIPS")
    chip, mesh = memory.CHIPS[kind], sharding.make_mesh(config.mesh, devices)
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{args.topology}: {len(devices)} x {kind}, mesh {shape}", flush=True)

    if args.print_sharding:
        print(print_sharding.describe(config, mesh, chip.hbm))
        return

    programs = memory.plan(config, mesh, chip.hbm)
    if args.program != "all":  # Those after it are not even traced.
        wanted = (planned for planned in programs if args.program in planned.name.split())
        programs = itertools.islice(wanted, None if args.program == "update" else 1)
    results, too_large = [], []
    for planned in programs:
        report, refused = compiled(planned, chip, len(devices))
        while planned.otherwise and (report is None or not report.fits(chip.hbm)):
            planned = planned.otherwise()
            report, refused = compiled(planned, chip, len(devices))
        if report is None:
            too_large.append(f"{planned.name}: {refused}")
            results.append({"program": planned.name, "fits": False, "hbm": chip.hbm, "refused": refused})
            continue
        results.append(as_json(report, chip))
        if not report.fits(chip.hbm):
            name, size = next(iter(report.parts().items()))
            too_large.append(f"{planned.name} needs {gib(report.total)} GiB, of it {gib(size)} {name}")
    if not results and not too_large:
        raise UserError(
            f"--program={args.program}: the recipe has no such program in its last stage, "
            f"{configuration.stage_order(config)[-1]}, on this mesh"
        )
    if args.json:
        try:
            Path(args.json).write_text(json_text.dumps(results, indent=2))
        except OSError as error:
            raise UserError(f"cannot write --json={args.json}: {error.strerror}") from error
    if too_large:
        print(f"does not fit {gib(chip.hbm)} GiB: {'; '.join(too_large)}", file=sys.stderr)
        raise SystemExit(1)
    print(f"fits {gib(chip.hbm)} GiB")


if __name__ == "__main__":
    main()
