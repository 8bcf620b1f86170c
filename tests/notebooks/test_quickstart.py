"""quickstart, executed from its first cell to its last as a stranger's kernel would."""

import math

import pytest
from notebooks.kernels import executed, outputs

# Fewer steps than a reader has: that the stored outputs are those of a whole run is test_notebooks.py's to say.
STEPS = {"vision": 20, "align": 40, "rl": 8}
CHANGES = {
    '        "stages.vision.steps": "60",': f'        "stages.vision.steps": "{STEPS["vision"]}",',
    '            f"stages.{stage}.steps": "80",': f'            f"stages.{{stage}}.steps": "{STEPS["align"]}",',
    '        "stages.rl.steps": "24",': f'        "stages.rl.steps": "{STEPS["rl"]}",',
}
# What a reader would see in the figures, as numbers.
PROBE = """{
    "summary": summary,
    "steps": [line["step"] for line in lines],
    "stages": list(dict.fromkeys(line["stage"] for line in lines)),
    "loss": [line["loss"] for line in stages["align"]],
    "kl": series("rl", "kl")[1].tolist(),
    "rewards": scores.rewards[0].tolist(),
    "c_gdpo": estimates["c_gdpo"].per_objective[0].tolist(),
    "caption": caption,
    "fast": FAST,
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the notebook with its outputs, what the probe gave, the directory that it ran in)"""
    folder = tmp_path_factory.mktemp("quickstart")
    return *executed("quickstart", folder, PROBE, CHANGES, optimised=False), folder


def test_the_training_in_it_ran_to_its_end(run):
    _, probe, folder = run
    assert probe["fast"] is True
    assert probe["stages"] == ["vision", "align", "sft", "rl"]
    assert probe["steps"] == list(range(1, STEPS["vision"] + 2 * STEPS["align"] + STEPS["rl"] + 1))
    for kind, count in (("greedy", 8), ("evaluations", 48)):
        assert list(probe["summary"][kind]) == ["align", "sft", "rl"]
        for evaluation in probe["summary"][kind].values():
            assert (evaluation["images"], evaluation["n"], evaluation["invalid"]) == (8, count, 0)
            assert 0 <= evaluation["b_capscore"]["mean"] <= 100
    first, last = sum(probe["loss"][:5]) / 5, sum(probe["loss"][-5:]) / 5
    assert last < 0.8 * first  # the decoder learns even here
    assert len(probe["kl"]) == STEPS["rl"]
    assert probe["kl"][-1] > probe["kl"][0] >= 0
    assert (folder / "runs/notebook-fast/report.html").exists()


def test_its_figures_show_what_the_text_says(run):
    notebook, probe, _ = run
    assert len(outputs(notebook, "image/png")) == 6  # a scene, advantages, curves, two pictures before/after, one more
    pages = outputs(notebook, "text/html")
    assert len(pages) == 6  # two judged captions, and two pictures before and after
    assert any("(not verified)" in page for page in pages)
    assert any("(verified)" in page for page in pages[:2])
    # The shown captions differ in every reward, or the plot of advantages would show nothing.
    columns = list(zip(*probe["rewards"], strict=True))
    assert all(len(set(column)) > 2 for column in columns)
    for column in zip(*probe["c_gdpo"], strict=True):
        assert math.isclose(sum(column), 0, abs_tol=1e-5)
        assert max(column) > 0.5
    assert probe["caption"].strip()
