"""configs/photos.py on generated pictures of many sizes: the lexical reward, one trace, a report with the pictures."""

import base64
import io
import json
import re

import numpy as np
import pytest
from command_runs import ROOT, finish, read_metrics, read_summary, start_script
from PIL import Image

SIZES = [(40, 90), (120, 60), (33, 33), (300, 200), (64, 128), (700, 90)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"A picture of noise, number {i} of a few.")
    (folder / "torn.jpg").write_bytes(b"nothing")
    (folder / "torn.txt").write_text("Nothing.")
    workdir = tmp_path_factory.mktemp("runs") / "run"
    overrides = {
        "data.data_dir": folder,
        "rollout.max_tokens": 16,
        "rollout.buckets": 16,
        "stages.sft.steps": 4,
        "stages.sft.batch_size": 2,
        "stages.rl.steps": 4,
        "stages.rl.batch_size": 2,
    }
    given = [f"--config.{name}={value}" for name, value in overrides.items()]
    done = finish(start_script("counted.py", f"--config={ROOT / 'configs/photos.py'}", f"--workdir={workdir}", *given))
    return workdir, json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_every_size_of_picture_is_one_trace(run):
    for stage in ("SFTStage", "RLStage"):
        counts = [counts for name, _, _, counts in run[1] if name == stage]
        assert len(counts) == 4
        assert counts[1:] == counts[:1] * 3


def test_the_reward_is_logged_and_evaluated(run):
    logged = [line for line in read_metrics(run[0]) if line["stage"] == "rl"]
    assert all(0 <= line["reward/rouge_l"] <= 1 for line in logged)
    assert "rouge_l" in read_summary(run[0])["evaluations"]["rl"]
    assert "rouge l" in run[2]


def test_the_start_says_what_is_trained_and_on_what(run):
    assert "\nreward  lexical: rouge_l 1; advantages by c_gdpo\n" in run[2]
    assert "\nrl      4 steps of 2 prompts x 4 captions of up to 16 tokens, learning rate 0.0005\n" in run[2]
    assert "\njudging the reward asks no judge\n" in run[2]


def test_what_was_left_out_is_named(run):
    assert "photos: 6 pictures; 1 left out: torn.jpg" in run[2]
    left_out = json.loads((run[0] / "left_out.jsonl").read_text())
    assert left_out["image"] == "torn.jpg"


def test_the_report_shows_the_photographs(run):
    page = (run[0] / "report.html").read_text()
    shown = {base64.b64decode(text) for text in re.findall(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)", page)}
    kept = [Image.open(path) for path in (run[0] / "samples" / "images").iterdir()]
    assert max(max(picture.size) for picture in kept) <= 512
    ratios = {round(picture.width / picture.height, 1) for picture in kept}
    assert {round(one.width / one.height, 1) for one in (Image.open(io.BytesIO(data)) for data in shown)} == ratios
