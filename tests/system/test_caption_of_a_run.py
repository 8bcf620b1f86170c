"""The README's caption command on the model of a run: nothing but the model says what it answers, and fits it."""

import json

from PIL import Image

from balcap_jax import caption, models
from balcap_jax.captioning.options import DEFAULT_DTYPE, DEFAULT_TOKENS, of_command


def test_a_run_leaves_a_model_that_captions_with_its_own_prompt(finished, tmp_path):
    model = finished.workdir / "model"
    fields = models.read_fields(model)
    config = json.loads((finished.workdir / "config.json").read_text())
    assert (fields["prompt"], fields["max_tokens"]) == ("Describe the picture.", config["rollout"]["max_tokens"])
    Image.new("RGB", (120, 90), "red").save(tmp_path / "a.png")
    caption.main([f"--model={model}", f"--images={tmp_path}", f"--out={tmp_path / 'out.jsonl'}", "--max_tokens=4"])
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["image"] == "a.png"
    assert 1 <= line["tokens"] <= 4
    # Token limit, compute type and the rest are as in training, where nothing else is given.
    arguments = caption.make_parser().parse_args([f"--model={model}", "--images=i", "--out=o"])
    settings = {"prompt": "Describe the picture.", "temperature": 0.0, "max_tokens": fields["max_tokens"]}
    assert of_command(arguments, fields).settings() == settings | {"dtype": config["model"]["dtype"]}
    assert (config["model"]["dtype"], fields["max_tokens"]) != (DEFAULT_DTYPE, DEFAULT_TOKENS)


def test_base_and_result_are_evaluated_under_one_protocol(finished):
    """Both answer the same prompts about the same pictures, and as many captions are drawn, as long ones at most."""
    config = json.loads((finished.workdir / "config.json").read_text())
    for kind, samples in (("greedy", 1), ("eval", config["log"]["eval_samples"])):
        before, after = (
            list(map(json.loads, (finished.workdir / "samples" / f"{kind}-{label}.jsonl").read_text().splitlines()))
            for label in ("sft", "rl")
        )
        for name in ("id", "prompt", "reference"):
            assert [record[name] for record in before] == [record[name] for record in after]
        for record in (*before, *after):
            assert len(record["captions"]) == samples
            assert all(one["tokens"] <= config["rollout"]["max_tokens"] for one in record["captions"])
