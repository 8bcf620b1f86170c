"""The whole journey of docs/reproduce.md, rehearsed: its own lines, and launch/reproduce.sh, which has the same.

Random models with the files that the published ones have, ShareGPT4V's JSON over pictures, and a fake judge that is
slow and fails at times. The recipe files are shrunk by overrides alone; only the hub's client is stood in for.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from command_runs import ROOT, read_metrics
from PIL import Image, ImageOps

from balcap_jax import caption, models
from balcap_jax.data.scenes import render, world

torch = pytest.importorskip("torch", reason="transformers needs torch to write and run a model")
import tiny_checkpoints as tiny  # noqa: E402
from hub_directories import hub_directory  # noqa: E402
from read_in_transformers import read  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
from misbehaving import JudgeServer, Reply, digest, kind_of, text_of, well_behaved  # noqa: E402

PAGE = ROOT / "docs" / "reproduce.md"
PHOTOS = Path(os.environ.get("BALCAP_PHOTOS", ROOT.parent / "shared" / "data" / "photos"))
SETTINGS = ("MODEL", "DATA", "BENCH", "JUDGE")
ANNOTATIONS = "sharegpt4v_instruct_gpt4-vision_cap100k.json"
ASKED = ("What do you see happening in this image?", "Describe this image in detail.")
STEPS, TOKENS = 4, 16
TRAIN = {
    "stages.rl.steps": STEPS,
    "stages.rl.micro_batches": 1,
    "stages.rl.warmup_steps": 1,
    "stages.rl.eval_every": 2,
    "stages.rl.learning_rate": 1e-2,  # A random model is to say something else afterwards.
    "checkpoint.every": 1,
    "rollout.group_size": 4,
    "rollout.max_tokens": TOKENS,
    "rollout.buckets": TOKENS,
    "rollout.token_buckets": "",  # Captions of half a unit leave nothing to pack.
    "model.prompt_tokens": 224,
    "log.eval_images": 2,
    "log.eval_samples": 4,  # As many as training draws: one program for both.
    "data.validation_share": 0.2,
    "data.test_share": 0.2,
}
# Stands in for the interpreter, so that a command of the page gets what shrinks it; it notes the command's process.
PYTHON = """#!/usr/bin/env bash
echo "$$ $2" > {folder}/process
more=()
case "$2" in
  balcap_jax.train) more=({train}) ;;
esac
exec {python} "$@" "${{more[@]}}"
"""
# Stands in for the installed command, whose processes run the modules of the same names.
BALCAP = """#!/usr/bin/env bash
exec {folder}/bin/python -m "balcap_jax.$1" "${{@:2}}"
"""
# Stands in for the hub, whose only repository is a folder.
HUB = """#!/usr/bin/env bash
set -e
case "$1" in
  download) [[ "$2" == Qwen/Qwen2.5-VL-3B-Instruct && "$3" == --local-dir ]]; mkdir -p "$4"; cp -r {source}/. "$4" ;;
  upload) mkdir -p {folder}/hub; rm -rf "{folder}/hub/${{2//\\//_}}"; cp -r "$3" "{folder}/hub/${{2//\\//_}}" ;;
  *) exit 9 ;;
esac
"""


class Judge:
    """A chat server that takes its time, fails at times, and can kill the training that asks it."""

    def __init__(self, folder: Path):
        self.process = folder / "process"
        self.checkpoints = folder / "work" / "run" / "checkpoints"
        self.kills = True  # once, in the midst of a step behind the first checkpoint
        self.asked: dict[str, int] = {}
        self.described: list[str] = []

    def _has_checkpoint(self) -> bool:
        return any(path.parent.name.isdigit() for path in self.checkpoints.glob("*/sums.json"))

    def __call__(self, body: dict) -> Reply:
        kind, text = kind_of(body), text_of(body)
        self.asked[kind] = self.asked.get(kind, 0) + 1
        count = sum(self.asked.values())
        if kind == "describe":
            self.described.append(body["messages"][-1]["content"][0]["image_url"]["url"])
        if kind == "precision" and self.kills and self._has_checkpoint():
            self.kills = False
            number, module = self.process.read_text().split()
            assert module == "balcap_jax.train"
            os.kill(int(number), signal.SIGKILL)
        if count % 19 == 0:
            return Reply("status", "busy", status=429, headers="Retry-After: 0.05\r\n")
        if count % 31 == 0:
            return Reply("cut", "x" * 100)
        if count % 43 == 0:
            return Reply("text", "hm")
        return Reply("text", well_behaved(body).content, delay=0.005 + digest(text) % 20 / 1000)


class Journey:
    """Model, data, benchmarks and judge of one journey in `folder`, and the environment of its commands."""

    def __init__(self, folder: Path, family: str, pictures: Sequence[Path], devices: int, **more: object):
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir()
        self.published = hub_directory(family, folder / "published", torch.bfloat16)
        self.data, self.bench = folder / "data", folder / "bench"
        names = self._sharegpt4v(pictures)
        self._benchmarks(pictures[:3])
        self.names = names
        self.pictures = max(2, devices)
        overrides = TRAIN | {"stages.rl.batch_size": self.pictures} | more
        train = " ".join(shlex.quote(f"--config.{name}={value}") for name, value in overrides.items())
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("python", PYTHON), ("balcap", BALCAP), ("hf", HUB)):
            text = text.format(folder=folder, train=train, python=sys.executable, source=self.published)
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": str(programs / "python"),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            # After those of conftest.py, which take a third off the time of all these commands.
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "HOME": str(folder),
            "MODEL": str(self.published),
            "DATA": str(self.data),
            "BENCH": str(self.bench),
        }

    def _sharegpt4v(self, pictures: Sequence[Path]) -> list[str]:
        """Their JSON over links to the pictures, in folders as its authors have them."""
        entries = []
        for number, path in enumerate(pictures):
            name = f"coco/train2017/{number:012}{path.suffix}"
            (self.data / name).parent.mkdir(parents=True, exist_ok=True)
            (self.data / name).symlink_to(path)
            question = f"{ASKED[number % 3 > 0]}\n<image>"
            talk = [{"from": "human", "value": question}, {"from": "gpt", "value": "A picture. It has a thing."}]
            entries.append({"id": f"{number:012}", "image": name, "conversations": talk})
        entries.append(entries[0] | {"image": "sam/images/sa_1.jpg"})  # of a folder that was not fetched
        (self.data / ANNOTATIONS).write_text(json.dumps(entries))
        return [entry["image"] for entry in entries]

    def _benchmarks(self, pictures: Sequence[Path]) -> None:
        (self.bench / "images").mkdir(parents=True)
        lines, questions = [], {}
        for path in pictures:
            name = f"p{len(lines)}{path.suffix}"
            (self.bench / "images" / name).symlink_to(path)
            units = ["one thing is there", "another thing is there"]
            lines.append({"image": f"images/{name}", "caption": "A reference.", "reference_units": units})
            asked = {"question": "Which?", "choices": ["red", "blue"], "answer": "red", "category": ["c"]}
            questions[name] = [asked]
        (self.bench / "bcapscore.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (self.bench / "captionqa.json").write_text(json.dumps(questions))

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment | settings, text=True, capture_output=True, timeout=600, check=False
        )

    def check(self, output: str, judge: Judge, family: str, tmp_path: Path) -> None:
        """What the journey must have left behind, whatever way it was gone."""
        assert f"model   {self.environment['MODEL']}: {family}, " in output
        assert re.search(rf"going on after step [1-3] of {STEPS} \(rl\)", output)
        # The block counts the calls of this run.
        assert f"a step of rl asks {3 * self.pictures * TRAIN['rollout.group_size']} questions, " in output
        steps = [line["step"] for line in read_metrics(self.work / "run") if line["stage"] == "rl"]
        assert steps == list(range(1, STEPS + 1))
        lines = [json.loads(line) for line in (self.work / "references.jsonl").read_text().splitlines()]
        assert sorted(line["image"].split("data/")[-1] for line in lines) == sorted(self.names[:-1])
        assert all(line["reference_units"] for line in lines)
        assert len(judge.described) < 2 * len(set(judge.described))  # Nothing is paid twice but what failed.

        # Before and after were made alike, so that the comparison gives its verdict.
        results = {
            (side, metric): json.loads((self.work / "eval" / side / metric / "results.json").read_text())
            for side in ("base", "rl")
            for metric in ("bcapscore", "captionqa")
        }
        settings = {"prompt": ASKED[1], "max_tokens": TOKENS, "temperature": 0.0, "dtype": "bfloat16"}
        for found in results.values():
            assert {name: found["captions"][name] for name in settings} == settings
            assert (found["n"] + found["invalid"], "truncated" in found) == (3, True)
        assert results["base", "bcapscore"]["captions"]["model"] != results["rl", "bcapscore"]["captions"]["model"]
        assert "no verdict" not in output
        assert "## bcapscore" in output

        model = self.work / "run" / "model"
        config = json.loads((model / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert {tensor.dtype for tensor in tiny.tensors(model).values()} == {torch.bfloat16}
        before, after = tiny.tensors(self.published), tiny.tensors(model)
        assert before.keys() == after.keys()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed
        assert not [name for name in changed if "vision" in name or "visual" in name]
        self._captions_alike(model, family, tmp_path)

    def _captions_alike(self, model: Path, family: str, tmp_path: Path) -> None:
        """The result captions the same tokens in transformers, by its own files alone."""
        out = tmp_path / "captions.jsonl"
        given = [f"--model={model}", f"--images={self.bench / 'images'}", f"--out={out}", "--dtype=float32"]
        caption.main(given)
        policy, _, processor = models.load(model)
        for line in map(json.loads, out.read_text().splitlines()):
            picture = Image.open(self.bench / "images" / line["image"])
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
            architecture = tiny.FAMILIES[family].__name__
            theirs = read(str(model), architecture, pixels, ASKED[1], TOKENS, list(policy.forbidden))["tokens"]
            assert line["caption"] == processor.tokenizer.decode(theirs, skip_special_tokens=True).strip()
            assert line["tokens"] == len(theirs)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rendered")
    for number in range(12):
        Image.fromarray(render.render(world.sample_scene(number))).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def commands_of_the_page() -> list[str]:
    """The lines of the page's bash blocks that do something; the first block only sets what they use."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks[1:] for line in block.splitlines()]


def expanded(lines: Sequence[str], environment: Mapping[str, str]) -> list[list[str]]:
    """The arguments that bash would give each of these commands."""
    show = "show() { printf '%s\\0' \"$@\"; printf '\\n'; }\n"
    script = show + "\n".join(f"show {line}" for line in lines)
    done = subprocess.run(["bash", "-c", script], env=environment, text=True, capture_output=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def test_the_script_has_the_commands_of_the_page():
    environment = dict(os.environ) | {name: f"some {name}" for name in (*SETTINGS, "WORK")}
    script = ["bash", str(ROOT / "launch" / "reproduce.sh"), environment["WORK"], "--dry_run"]
    done = subprocess.run(script, env=environment, text=True, capture_output=True, check=True)
    shown = [line.replace(f"{ROOT}/", "") for line in done.stdout.splitlines()]
    theirs = [line for line in commands_of_the_page() if line.startswith("balcap ")]
    assert len(theirs) == 7
    assert [shlex.split(line) for line in shown] == expanded(theirs, environment)


def test_what_is_missing_is_named_before_anything_starts(tmp_path):
    script = ["bash", str(ROOT / "launch" / "reproduce.sh")]

    def told(*arguments: str, **settings: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
        done = subprocess.run([*script, *arguments], env=environment, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        return line

    given = {"MODEL": str(tmp_path), "DATA": str(tmp_path), "BENCH": str(tmp_path), "JUDGE": "http://a/v1"}
    work = str(tmp_path / "work")
    assert told() == "error: name a WORKDIR (see bash launch/reproduce.sh --help)"
    assert told(work, "other").startswith("error: one WORKDIR, got ")
    assert told(work, "--fast") == "error: unknown argument --fast (see --help)"
    for name in given:
        assert told(work, **given | {name: ""}).startswith(f"error: set {name} ")
    assert told(work, **given | {"BENCH": "/none"}) == "error: BENCH: there is no folder /none"
    assert told(work, **given, RECIPE="a:b") == "error: RECIPE=a:b: there is no configs/a.py"
    assert told(work, **given).startswith(f"error: BENCH: {tmp_path} holds no benchmark and its images; ")
    assert told(work, **given, RECIPE="qwen25vl_3b:lora,caprl").endswith("set REFERENCES to a file with what it asks")
    assert told(work, **given, RECIPE="qwen25vl_3b:scenes").startswith("error: RECIPE=qwen25vl_3b:scenes needs no data")
    (tmp_path / "images").mkdir()
    (tmp_path / "dcscore.jsonl").touch()
    assert told(work, **given, REFERENCES="/none") == "error: REFERENCES: there is no file /none"
    assert f"there is no {ANNOTATIONS} in " in told(work, **given)
    (tmp_path / ANNOTATIONS).touch()
    assert "unknown variant 'nope'" in told(work, **given, RECIPE="qwen25vl_3b:nope", PYTHON=sys.executable)
    assert not Path(work).exists()


def test_the_journey_line_by_line_killed_once(tmp_path, rendered):
    family = "qwen2_5_vl"
    journey = Journey(tmp_path, family, rendered, 1, **{"model.max_image_tokens": 16})
    judge = Judge(tmp_path)
    lines = [
        f"{line} --dry_run" if "launch/judge_server.sh" in line else line  # The server is started below.
        for line in commands_of_the_page()
    ]
    script = tmp_path / "page.sh"
    script.write_text("set -euo pipefail\n" + "\n".join(lines) + "\n")
    with JudgeServer(judge, keep_bodies=False) as server:
        settings = {"MODEL": str(tmp_path / "fetched"), "WORK": str(journey.work), "JUDGE": server.url}
        journey.environment |= settings | {"ENGINE": "vllm"}
        done = journey.run("bash", str(script))
        assert done.returncode == 128 + signal.SIGKILL, done.stdout + done.stderr
        done = journey.run("bash", str(script))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    journey.check(done.stdout, judge, family, tmp_path)
    side = 16 * 64  # pixels of 16 tokens of 8 x 8
    model = journey.work / "run" / "model"
    assert json.loads((model / "preprocessor_config.json").read_text())["max_pixels"] == side
    (uploaded,) = (tmp_path / "hub").iterdir()
    assert (uploaded / "model.safetensors").exists() or (uploaded / "model.safetensors.index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_script_on_photographs_killed_once(tmp_path, family, devices):
    photographs = sorted((PHOTOS / "images").glob("*.jp*g"))[:24] if PHOTOS.is_dir() else []
    if len(photographs) < 24:
        pytest.skip(f"no photographs in {PHOTOS / 'images'} (BALCAP_PHOTOS names their folder)")
    more = {} if family == "llava" else {"model.max_image_tokens": 16}
    if family == "qwen3_vl":  # Its recipes name the 64 tokens that the published processor enlarges small pictures to.
        more["model.min_image_tokens"] = 4
    journey = Journey(tmp_path, family, photographs, devices, **more)
    judge = Judge(tmp_path)
    recipe = {"llava": "llava15_7b", "qwen2_5_vl": "qwen25vl_3b", "qwen3_vl": "qwen3vl_2b"}[family]
    command = ["bash", str(ROOT / "launch" / "reproduce.sh"), str(journey.work)]
    with JudgeServer(judge, keep_bodies=False) as server:
        journey.environment |= {"JUDGE": server.url, "RECIPE": recipe}
        done = journey.run(*command)
        assert done.returncode == 128 + signal.SIGKILL, done.stdout + done.stderr
        done = journey.run(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    journey.check(done.stdout, judge, family, tmp_path)
