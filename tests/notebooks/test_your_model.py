"""your_model_and_images, executed: as it is stored, and with a model as the hub has them."""

import json

import pytest
from notebooks.kernels import executed, outputs

PROBE = """{"before": {k: float(v) for k, v in before.items()}, "after": {k: float(v) for k, v in after.items()},
            "held_out": len(pairs[0]), "counts": counts, "family": fields["family"], "size": size}"""


def test_adapters_take_the_style_of_the_pictures_captions(tmp_path):
    # Fewer steps than a reader has; the supervised ones of the adapters are enough to drop the praise.
    changes = {
        '        "stages.sft.steps": "120",': '        "stages.sft.steps": "60",',
        '    "stages.sft.steps": "50" if not MODEL else "20",': '    "stages.sft.steps": "30",',
        '    "stages.rl.steps": "8",': '    "stages.rl.steps": "3",',
    }
    notebook, probe = executed("your_model_and_images", tmp_path, PROBE, changes)
    assert probe["counts"] == {"captions": 64, "errors": 0, "new": 64, "wide": 0}
    assert 5 <= probe["held_out"] <= 25
    assert probe["after"]["rouge_l"] > probe["before"]["rouge_l"] + 0.03
    adapter = json.loads((tmp_path / "runs/your-model/lora/model/adapter/adapter_config.json").read_text())
    assert adapter["r"] == 8
    assert 0 < probe["size"] < 1e6
    assert len(outputs(notebook, "image/png")) == 2


def test_a_model_as_the_hub_has_them_takes_its_place(tmp_path):
    pytest.importorskip("torch", reason="the directory is written by transformers")
    from hub_directories import hub_directory

    model = hub_directory("qwen3_vl", tmp_path / "hub" / "Tiny-VL")
    changes = {
        'MODEL = ""': f'MODEL = "{model}"',
        "    for seed in range(1000, 1064):": "    for seed in range(1000, 1016):",
        "longest = 80 if not MODEL else 160": "longest = 16",
        '    "stages.sft.steps": "50" if not MODEL else "20",': '    "stages.sft.steps": "2",',
        '    "stages.rl.steps": "8",': '    "stages.rl.steps": "2",',
    }
    _, probe = executed("your_model_and_images", tmp_path, PROBE, changes, optimised=False)
    assert probe["family"] == "qwen3_vl"
    assert probe["counts"] == {"captions": 16, "errors": 0, "new": 16, "wide": 0}
    assert not (tmp_path / "runs/your-model/base").exists()
    lines = [json.loads(line) for line in (tmp_path / "runs/your-model/after.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    adapter = json.loads((tmp_path / "runs/your-model/lora/model/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(model)
