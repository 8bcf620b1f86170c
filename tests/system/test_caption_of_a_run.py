"""The README's caption command on the model of a run: nothing but the model says what it answers, and fits it."""

import json

from PIL import Image

from balcap_jax import caption


def test_a_run_leaves_a_model_that_captions_with_its_own_prompt(finished, tmp_path):
    model = finished.workdir / "model"
    assert json.loads((model / "model.json").read_text())["prompt"] == "Describe the picture."
    Image.new("RGB", (120, 90), "red").save(tmp_path / "a.png")
    caption.main([f"--model={model}", f"--images={tmp_path}", f"--out={tmp_path / 'out.jsonl'}", "--max_tokens=4"])
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["image"] == "a.png"
    assert 1 <= line["tokens"] <= 4
