"""A set-up that `doctor` finds no fault with, and what its tests hold of a fault."""

import base64
import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from balcap_jax.config import recipes
from balcap_jax.data.scenes import render, world
from balcap_jax.doctor.findings import FAULT, Finding, table

torch = pytest.importorskip("torch", reason="transformers needs torch to write a model")
from hub_directories import hub_directory  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
from misbehaving import JudgeServer, Reply, blocks_of, kind_of, right_answer, well_behaved  # noqa: E402

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "qwen25vl_3b.py")
ANNOTATIONS = "sharegpt4v_instruct_gpt4-vision_cap100k.json"
PICTURES = 24
SMALL = {
    "stages.rl.steps": 4,
    "stages.rl.batch_size": 2,
    "stages.rl.micro_batches": 1,
    "stages.rl.warmup_steps": 1,
    "stages.rl.eval_every": 2,
    "rollout.group_size": 4,
    "rollout.max_tokens": 16,
    "rollout.buckets": 16,
    "rollout.token_buckets": "",
    "model.prompt_tokens": 224,
    "model.max_image_tokens": 16,
    "log.eval_images": 2,
    "data.validation_share": 0.2,
    "data.test_share": 0.2,
    "judge.concurrency": 16,
    "judge.cache_gb": 0.01,
}


def seeing(body: dict) -> Reply:
    """A judge that finds nothing true of a picture of one colour, and all that a caption states word for word."""
    if kind_of(body) == "recall":
        texts = [text for kind, text in blocks_of(body) if kind != "fact"]
        facts, answer = [text for kind, text in blocks_of(body) if kind == "fact"], right_answer(body)
        for fact, unit in zip(facts, answer["units"], strict=True):
            unit["covered"] |= any(fact in text for text in texts)
        return Reply("text", json.dumps(answer))
    if kind_of(body) != "precision":
        return well_behaved(body)
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    answer = right_answer(body)
    for assertion in answer["assertions"]:
        assertion["verified"] = bool(picture.std() > 0)
    return Reply("text", json.dumps(answer))


@dataclasses.dataclass(frozen=True)
class SetUp:
    """A checkpoint as the hub has it, ShareGPT4V's form over pictures, lines about them, and a judge."""

    folder: Path
    server: JudgeServer

    def given(self, **more: object) -> dict[str, str]:
        fields = SMALL | {
            "model.path": self.folder / "model",
            "data.manual_dir": self.folder / "data",
            "data.data_dir": self.folder / "prepared",
            "data.units": self.folder / "units.jsonl",
            "judge.endpoints": self.server.url,
            "judge.cache_dir": self.folder / "cache",
        }
        return {name: str(value) for name, value in (fields | more).items()}

    def config(self, **more: object) -> ConfigDict:
        return recipes.load(RECIPE, self.given(**{name.replace("__", "."): value for name, value in more.items()}))

    def command(self, workdir: Path, **more: object) -> list[str]:
        overrides = self.given(**more)
        return [f"--config={RECIPE}", f"--workdir={workdir}", *(f"--config.{n}={v}" for n, v in overrides.items())]


@contextlib.contextmanager
def sound_in(folder: Path) -> Iterator[SetUp]:
    """A set-up without a fault, with pictures of scenes."""
    hub_directory("qwen2_5_vl", folder / "model", torch.bfloat16)
    entries, lines = [], []
    (folder / "data" / "coco").mkdir(parents=True)
    for number in range(PICTURES):
        name = f"coco/{number:012}.png"
        Image.fromarray(render.render(world.sample_scene(number))).save(folder / "data" / name)
        talk = [
            {"from": "human", "value": "What is here?\n<image>"},
            {"from": "gpt", "value": "A picture. Of a thing."},
        ]
        entries.append({"id": f"{number:012}", "image": name, "conversations": talk})
        lines.append({"image": f"data/{name}", "reference_units": ["one thing is there", "another thing is there"]})
    (folder / "data" / ANNOTATIONS).write_text(json.dumps(entries))
    write_lines(folder / "units.jsonl", lines)
    with JudgeServer(seeing, keep_bodies=False) as server:
        yield SetUp(folder, server)


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def cut(path: Path) -> None:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def assert_fault(finding: Finding, check: str, found: str, remedy: str) -> None:
    assert (finding.verdict, finding.check) == (FAULT, check), finding
    assert found in finding.found
    assert remedy in finding.remedy
    (line,) = (line for line in table([finding]).splitlines() if line.startswith("  fault"))
    assert finding.found in line
    assert finding.remedy in line
