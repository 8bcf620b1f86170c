"""The notebook, executed from its first cell to its last as a stranger's kernel would."""

import json
import math
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
TIMEOUT = 600  # seconds for one cell; the training takes most of a minute on two idle cores

# Run after the notebook, in its kernel: what a reader would see in the figures, as numbers.
PROBE = """
print("PROBE" + json.dumps({
    "summary": summary,
    "steps": [line["step"] for line in lines],
    "stages": list(dict.fromkeys(line["stage"] for line in lines)),
    "loss": [line["loss"] for line in stages["align"]],
    "rewards": scores.rewards[0].tolist(),
    "c_gdpo": estimates["c_gdpo"].per_objective[0].tolist(),
    "caption": caption,
    "fast": FAST,
}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(the notebook with its outputs, what the probe printed, the directory that it ran in)"""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    # This interpreter, not the one of whatever kernel is registered as "python3" here.
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # Hundreds of steps: better code than conftest.py asks for pays for its compilation.
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1"),
    }
    client = NotebookClient(notebook, km=kernel, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    (probe,) = (output["text"] for output in notebook.cells[-1].outputs if output.output_type == "stream")
    return notebook, json.loads(probe.removeprefix("PROBE")), folder


def outputs(notebook, kind: str) -> list[str]:
    return [
        output["data"][kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


def test_the_notebook_is_stored_without_outputs_and_in_its_fast_setting():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert any(cell.source.startswith("FAST = True\n") for cell in code)
    assert '"google.colab" in sys.modules' in code[0].source  # the first cell installs there


def test_the_training_in_it_ran_to_its_end(executed):
    _, probe, folder = executed
    assert probe["fast"] is True
    assert probe["stages"] == ["vision", "align", "sft", "rl"]
    assert probe["steps"] == list(range(1, 60 + 2 * 80 + 24 + 1))
    for kind, count in (("greedy", 8), ("evaluations", 48)):
        assert list(probe["summary"][kind]) == ["align", "sft", "rl"]
        for evaluation in probe["summary"][kind].values():
            assert (evaluation["images"], evaluation["n"], evaluation["invalid"]) == (8, count, 0)
            assert 0 <= evaluation["b_capscore"]["mean"] <= 100
    first, last = sum(probe["loss"][:5]) / 5, sum(probe["loss"][-5:]) / 5
    assert last < 0.8 * first  # the decoder learns even here
    assert (folder / "runs/notebook-fast/report.html").exists()


def test_its_figures_show_what_the_text_says(executed):
    notebook, probe, _ = executed
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
