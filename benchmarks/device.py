"""What is worth knowing of an accelerator, in under ten minutes; device.sh starts it.

    benchmarks/device.sh --out=device.json                 on a GPU or a TPU host
    benchmarks/device.sh --small --out=device.json         four minutes of CPU time, to see that it runs

    parity   a small captioner in float32 and bfloat16 beside the same programs on this machine's CPU (device_parity.py)
    step     RL steps of Qwen2.5-VL-3B's shape with LoRA and random weights, by `train` itself: seconds by phase, the
             update's share of peak flops (MFU), the share of memory bandwidth while decoding
    uneven   update and rollout at uneven lengths, packed and staged beside padded (uneven.py)

Each part is a process of its own, so that one after the other holds the device. A part that fails or takes too long is
named in the table, the others go on, and the exit status is 1.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import chips
import jax
import lengths
import numpy as np
import uneven_report
from device_parity import differences
from peer import table

from balcap_jax.aot.memory import model_flops
from balcap_jax.cli.arguments import CommandParser, output_file
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.config import recipes
from balcap_jax.training.programs import of_last_stage

BENCHMARKS = Path(__file__).parent
RECIPE = f"{BENCHMARKS.parent / 'configs' / 'qwen25vl_3b.py'}:rl,lora,scenes"
PARTS = ("parity", "step", "uneven")
DAY = 24 * 60  # minutes
# float32 sums in another order; a sampled token may flip where two are all but equal; bfloat16 keeps 8 bits.
BARS = {"log_probs": 1e-3, "loss": 1e-3, "gradient": 1e-3, "tokens": 0.02, "log_probs_bfloat16": 0.2}
PROBE = """
import json, jax
one = jax.devices()[0]
stats = one.memory_stats() or {}
print(json.dumps({"platform": one.platform, "kind": one.device_kind, "count": jax.device_count(),
                  "processes": jax.process_count(), "memory": stats.get("bytes_limit")}))
"""
SMALL_MODEL = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 16, "mlp": 128, "vocab": 512}
SMALL_MODEL |= {"mrope_section": "2,3,3", "vision_width": 32, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 64}
SMALL_MODEL |= {"full_attention_layers": "1", "max_image_tokens": 16, "prompt_tokens": 64}


# ------------------------------------------------------------------------------------------------- processes


def probe() -> dict[str, Any]:
    """What jax sees, asked in a process that lets go of the device again.

    Raises:
      UserError: jax finds no device.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"jax finds no device: {last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> str:
    """stdout of a Python process.

    Raises:
      UserError: it failed, with its last line, or took longer than `seconds`.
    """
    try:
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"took longer than the {seconds:.0f} s that were left for it") from error
    if done.returncode:
        raise UserError(f"exit status {done.returncode}: {last_line(done.stderr)}")
    return done.stdout


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1]


# ------------------------------------------------------------------------------------------------- parity


def parity(folder: Path, seconds: float) -> dict[str, float]:
    """`differences` of the device to the CPU.

    Raises:
      UserError: a process failed.
    """
    start, files = time.monotonic(), {}
    # Where the device is a CPU too, the second process finds the first one's programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for name, env in (("cpu", cache | {"JAX_PLATFORMS": "cpu"}), ("device", cache)):
        path = folder / f"{name}.npz"
        run([str(BENCHMARKS / "device_parity.py"), str(path)], seconds - (time.monotonic() - start), env)
        files[name] = dict(np.load(path))
    return differences(files["device"], files["cpu"])


def parity_rows(found: Mapping[str, float]) -> Iterator[tuple[str, str, bool]]:
    """(what, value, whether it is within its bar)"""
    for name, value in found.items():
        bar = BARS[name.split("/")[0]]
        of = {"tokens": "share of sampled tokens that differ", "gradient": "relative to each array's largest entry"}
        what = f"parity, {name.replace('/', ', ')}: {of.get(name.split('/')[0], 'largest difference')}"
        yield f"{what}, at most {bar:g}", f"{value:.1e}", value <= bar


# ------------------------------------------------------------------------------------------------- step


def overrides(args: argparse.Namespace, devices: int) -> dict[str, str]:
    """Of the recipe, for `train`: a batch for these devices, no judge, nothing saved or evaluated on the way."""
    tokens = 32 if args.small else args.max_tokens
    prompts = (2 if args.small else args.prompts) * devices
    result = {
        "model.path": "",
        "data.train_size": str(4 * prompts),
        "data.validation_size": "1",
        "data.test_size": "1",
        "stages.rl.steps": str(args.steps + 10),
        "stages.rl.batch_size": str(prompts),
        "stages.rl.micro_batches": str(prompts // devices),
        "stages.rl.eval_every": "0",
        "rollout.max_tokens": str(tokens),
        "rollout.buckets": str(tokens),
        "rollout.token_buckets": "",  # Captions of random weights all run to the end.
        "pipeline.depth": "0",
        "checkpoint.every": "0",
        "checkpoint.best_metric": "",
        "log.eval_images": "1",
        "log.samples_every": "0",
        "log.tensorboard": "false",
    }
    if args.small:
        result |= {f"model.{name}": str(value) for name, value in SMALL_MODEL.items()} | {"lora.rank": "4"}
    return result


def step(args: argparse.Namespace, devices: int, folder: Path, seconds: float) -> dict[str, Any]:
    """Medians of the steps after the first, which compiles: {"time/...", tokens, flops and bytes of a step}.

    Raises:
      UserError: `train` ended before it had done the steps, or there was no time for them.
    """
    fields, metrics = overrides(args, devices), folder / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "balcap_jax.train", f"--config={RECIPE}", f"--workdir={folder / 'run'}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    start, wanted = time.monotonic(), args.steps + 1
    with (folder / "train.log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            lines: list[dict[str, Any]] = []
            while len(lines) < wanted:
                if time.monotonic() - start > seconds:
                    raise UserError(f"{len(lines)} of {wanted} steps were done in the {seconds:.0f} s left for them")
                if process.poll() is not None:
                    log.seek(0)
                    raise UserError(f"train ended with status {process.returncode}: {last_line(log.read())}")
                time.sleep(0.5)
                lines = [line for line in whole_lines(metrics) if line.get("stage") == "rl"]
        finally:
            process.kill()  # Nothing of it is kept: what is measured is in the log.
    first, timed = lines[0], lines[1:wanted]
    names = [name for name in timed[0] if name.startswith("time/") and name != "time/judge_hidden"]
    result = {name: statistics.median(line[name] for line in timed) for name in names}
    for name in ("length/tokens_mean", "padding/rollout_useful", "padding/update_useful"):
        if timed[0].get(name) is not None:
            result[name] = statistics.median(line[name] for line in timed)
    config = recipes.load(RECIPE, fields)
    programs, params = of_last_stage(config)
    batch, group = programs.settings.batch_size, programs.group_size
    length = result["length/tokens_mean"]
    decoder = programs.policy.decoder
    weights = sum(math.prod(leaf.shape) * 2 for leaf in jax.tree.leaves(params["decoder"]))
    if not config.model.tied_embeddings:
        weights -= decoder.vocab * decoder.width * 2  # A lookup reads a few rows; the output projection all of it.
    # Keys and values in bfloat16: each prompt's once a step, and of each branch the half that is written on average.
    positions = batch * (config.model.prompt_tokens + group * length / 2)
    cache = positions * 2 * decoder.layers * decoder.kv_heads * decoder.head_size * 2
    return result | {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "prompts": batch,
        "group": group,
        "max_tokens": config.rollout.max_tokens,
        "update_flops": model_flops(programs, params, batch, group, length),
        # Of all devices, where each weight is read by one of them: with copies of the weights it is more.
        "decode_bytes": (config.rollout.max_tokens - 1) * (weights + cache),
        "first_step": sum(first[name] for name in names),
    }


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is being written, without the last one while it is not complete."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return []


def step_rows(found: Mapping[str, Any], peak: chips.Peak | None, devices: int) -> Iterator[tuple[str, str, bool]]:
    """(what, value, True)"""
    size = f"{found['parameters'] / 1e9:.3g}B parameters, {found['prompts']} prompts x {found['group']}"
    yield f"RL step with LoRA: {size}", f"{found['length/tokens_mean']:.0f} tokens", True
    for phase in ("rollout", "judge", "update", "other"):
        yield f"  {phase}", f"{found[f'time/{phase}']:.3f} s", True
    unknown = "not known here: give --peak_flops and --bandwidth"
    rate = found["update_flops"] / found["time/update"] / devices
    mfu = f"{100 * rate / peak.flops:.1f} %" if peak else unknown
    yield f"update: {rate / 1e12:.3g} Tflop/s a device (model flops of real tokens), share of peak (MFU)", mfu, True
    rate = found["decode_bytes"] / found["time/rollout"] / devices
    share = f"{100 * rate / peak.bandwidth:.1f} %" if peak else unknown
    yield f"decode: {rate / 1e9:.3g} GB/s a device (prefill's time included), share of bandwidth", share, True
    for name in ("rollout", "update"):
        if f"padding/{name}_useful" in found:
            yield f"  useful share of the {name}", f"{found[f'padding/{name}_useful']:.2f}", True


# ------------------------------------------------------------------------------------------------- uneven


def uneven(args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """What uneven.py writes of `now` beside `padded`.

    Raises:
      UserError: it failed.
    """
    out = folder / "uneven.json"
    means, rounds = ("0.215", 1) if args.small else ("0.215,0.4,equal", 2)
    size = ["--small"] if args.small else [f"--shape={args.shape}"]
    command = [str(BENCHMARKS / "uneven.py"), *size, "--sides=now,padded", f"--means={means}", f"--rounds={rounds}"]
    run([*command, f"--out={out}"], seconds)
    return json.loads(out.read_text())


def uneven_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(what, value, True)"""
    for work, of_kind in found["results"].items():
        for kind, sides in of_kind.items():
            times = [uneven_report.mean_of_draws(sides[name]["seconds"]) for name in ("now", "padded")]
            ratio = uneven_report.ratio(sides["padded"]["seconds"], sides["now"]["seconds"])
            what = f"{work} at uneven lengths, mean {kind} of the limit: {times[0]:.3f} s, padded {times[1]:.3f} s"
            yield (
                f"{what}, useful {sides['now']['useful']:.2f} and {sides['padded']['useful']:.2f}",
                f"{ratio:.2f}x",
                True,
            )


# ------------------------------------------------------------------------------------------------- the command


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="benchmarks/device.sh", description="What is worth knowing of an accelerator; see the head of device.py."
    )
    parser.add_argument("--small", action="store_true", help="toy sizes, on a CPU too: to see that it runs")
    parser.add_argument("--only", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="after which the parts left are dropped"
    )
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="of a step and device, 8 captions each")
    parser.add_argument("--max_tokens", type=int, default=512, metavar="N", help="of a caption, in part step")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed RL steps; the median counts")
    parser.add_argument("--shape", default="500m", choices=tuple(lengths.SHAPES), help="of part uneven")
    parser.add_argument(
        "--peak_flops", type=float, default=0.0, metavar="N", help="of one device, bfloat16, per second"
    )
    parser.add_argument("--bandwidth", type=float, default=0.0, metavar="N", help="of one device's memory, bytes/s")
    parser.add_argument(
        "--out", type=output_file, default="device.json", metavar="FILE.json", help="where the results go"
    )
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(arguments)
    parts = [part.strip() for part in args.only.split(",")]
    if not set(parts) <= set(PARTS):
        raise UserError(f"--only={args.only} is not of {', '.join(PARTS)}")
    for name in ("prompts", "max_tokens", "steps"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} must be above 0")
    if not 0 < args.minutes <= DAY:
        raise UserError(f"--minutes must be above 0 and at most {DAY}, got {args.minutes:g}")
    jax.config.update("jax_platforms", "cpu")  # of this process alone: the device belongs to the parts
    deadline = time.monotonic() + 60 * args.minutes
    device = probe()
    if device["platform"] == "cpu" and not args.small:
        raise UserError("jax sees no accelerator here, only a CPU; --small runs all parts on it at toy size")
    if device["processes"] > 1:
        raise UserError(f"jax runs as one of {device['processes']} processes here; run this on one host alone")
    peak = chips.peak_of(device["kind"], args.peak_flops, args.bandwidth)
    memory = f", {device['memory'] / 1e9:.1f} GB each" if device["memory"] else ""
    print(f"{device['count']} x {device['kind']}{memory}", flush=True)
    head = {"command": shlex.join(["benchmarks/device.sh", *arguments]), "device": device}
    head["peak"] = vars(peak) if peak else None

    results: dict[str, Any] = {}
    rows: list[tuple[str, str, bool]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = {
            "parity": (lambda seconds: parity(folder, seconds), parity_rows),
            "step": (
                lambda seconds: step(args, device["count"], folder, seconds),
                lambda found: step_rows(found, peak, device["count"]),
            ),
            "uneven": (lambda seconds: uneven(args, folder, seconds), uneven_rows),
        }
        for part in parts:
            measure, describe = work[part]
            start = time.monotonic()
            try:
                if start > deadline:
                    raise UserError(f"the {args.minutes:g} minutes were over before it began; --minutes gives more")
                results[part] = measure(deadline - start)
                rows += describe(results[part])
            except UserError as error:
                results[part] = {"error": str(error)}
                rows.append((f"{part} failed", str(error), False))
            results[part]["seconds"] = time.monotonic() - start
            print(f"{part}: {results[part]['seconds']:.0f} s", flush=True)
    cells = [(what, value, "" if good else "NO") for what, value, good in rows]
    print("\n" + table([("what", "value", ""), *cells]))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")
    print(f"\nwritten: {out}")
    return 0 if all(good for _, _, good in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
