"""Notebooks in a kernel of this interpreter, with what a test asks of their variables afterwards."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("advantages", "quickstart", "reward_anatomy", "your_model_and_images")


def load_execute():
    """The module notebooks/execute.py."""
    spec = importlib.util.spec_from_file_location("execute", NOTEBOOKS / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executed(
    name: str, folder: Path, probe: str, changes: dict[str, str] | None = None, optimised: bool = True
) -> tuple[nbformat.NotebookNode, Any]:
    """(the notebook with its outputs, the value of the expression `probe` after its last cell, by way of JSON).

    changes: {line of a code cell: what a reader writes in its place}. optimised: better code than conftest.py asks for,
    which pays for its compilation where hundreds of steps follow.
    """
    execute = load_execute()
    notebook = execute.read(name)
    for old, new in (changes or {}).items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source.splitlines())
        cell.source = "\n".join(new if line == old else line for line in cell.source.splitlines())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint('PROBE' + json.dumps({probe}))"))
    flags = os.environ["XLA_FLAGS"]
    flags = flags.replace("optimization_level=0", "optimization_level=1") if optimised else flags
    execute.run(notebook, folder, PYTHONPATH=str(ROOT), XLA_FLAGS=flags)
    execute.keep(notebook, folder)
    (output,) = (output.text for output in notebook.cells.pop().outputs if output.output_type == "stream")
    return notebook, json.loads(output.removeprefix("PROBE"))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """What cells show in the form of a MIME type."""
    return [
        output["data"][kind]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """The printed text of each code cell but the first, which names versions and devices."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in code_cells(notebook)[1:]
    ]
