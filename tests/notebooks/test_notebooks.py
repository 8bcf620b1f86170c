"""All notebooks as they are stored: length, install cell, outputs, and that whatever they name exists."""

import ast
import importlib
import importlib.util
import re
import shutil
import sys

import nbformat
import pytest
from notebooks.kernels import NAMES, NOTEBOOKS, ROOT, code_cells, load_execute, outputs

from balcap_jax.config import recipes
from balcap_jax.config.schema import FIELDS

execute = load_execute()
LARGEST = 400_000  # bytes of a notebook
# Paths of a machine, and times of a run.
PRIVATE = re.compile(r"/(?:tmp|root|home|work|usr)/|\b\d+(?:\.\d+)? s\b")
GROUPS = {name.partition(".")[0] for name in FIELDS if "." in name}


@pytest.fixture(params=NAMES)
def notebook(request):
    return nbformat.read(NOTEBOOKS / f"{request.param}.ipynb", as_version=4)


def test_there_is_a_test_for_each_notebook():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(NAMES)


def test_it_is_short_and_begins_with_the_badge_and_the_install_cell(notebook):
    nbformat.validate(notebook)
    assert len(notebook.cells) < 25
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]")
    assert notebook.cells[1].cell_type == "code"
    assert notebook.cells[1].source == (NOTEBOOKS / "install.py").read_text().strip()


def test_its_outputs_are_those_of_one_whole_run_small_and_of_no_machine(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in shown} <= {"stream", "display_data", "execute_result"}
    assert outputs(notebook, "image/png")
    texts = [output.text for output in shown if output.output_type == "stream"]
    texts += [text for kind in ("text/plain", "text/html") for text in outputs(notebook, kind)]
    assert [found for text in texts for found in PRIVATE.findall(text)] == []
    assert len(nbformat.writes(notebook).encode()) < LARGEST


def test_what_it_imports_and_the_fields_that_it_sets_exist(notebook):
    names, fields = [], []
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("balcap_jax"):
                names += [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                fields += re.findall(r"^(?:[a-z_]+\.)+[a-z_0-9]+$", node.value)
    for module, name in names:
        found = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
        assert found, f"{module} has no {name}"
    assert [name for name in fields if name.partition(".")[0] in GROUPS and name not in FIELDS] == []


def test_what_its_text_names_exists(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for module in re.findall(r"python -m (balcap_jax\.\w+)", text):
        assert importlib.util.find_spec(module), module
    for recipe in re.findall(r"--config=([\w:/.]+)", text):
        assert recipes.load(recipe)
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"(?:balcap_jax|docs|configs|launch)/[\w/.]+", quoted):
            assert (ROOT / quoted).exists(), quoted
        elif quoted.endswith(".ipynb"):
            assert (NOTEBOOKS / quoted).exists(), quoted
        elif re.fullmatch(r"[a-z]+\.[a-z_.]+", quoted) and quoted.partition(".")[0] in GROUPS:
            assert quoted in FIELDS, quoted
        elif overrides := re.match(r"--config\.([\w.]+)=", quoted):
            assert overrides[1] in FIELDS, quoted


def test_an_address_is_set_in_all_of_them_at_once(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(execute, "FOLDER", folder)
    monkeypatch.setattr(execute, "FIRST_CELL", folder / "install.py")
    for address in ("git+https://github.com/someone/a_fork.git@main", "https://host.example/balcap_jax-1-none-any.whl"):
        monkeypatch.setattr(sys, "argv", ["execute.py", f"--package={address}"])
        execute.main()
        for name in NAMES:
            before = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
            after = nbformat.read(folder / f"{name}.ipynb", as_version=4)
            assert f'\nPACKAGE = "{address}"\n' in after.cells[1].source
            assert "/github/someone/a_fork/blob/main/notebooks/" in after.cells[0].source
            assert [cell.source for cell in after.cells[2:]] == [cell.source for cell in before.cells[2:]]
            assert outputs(after, "image/png") == outputs(before, "image/png")
        assert (folder / "README.md").read_text().count("/github/someone/a_fork/blob/main/notebooks/") == len(NAMES)


def test_what_is_kept_of_an_output_has_no_path_and_no_seconds(tmp_path):
    text = f"wrote {tmp_path}/runs/a in 12.5 s, {tmp_path}, 3 steps\n"
    assert execute.anonymous(text, tmp_path) == "wrote runs/a in … s, ., 3 steps\n"
    progress = (
        "sft 104/260  eta 4:30  1.73 s/step (update 91%)  1.54k tok/s  use 82/79%  loss 5.2446\n"
        "vision 100/100  done  0.287 s/step (update 60%)  2.16k tok/s  use 98/98%  loss 1.7409\n"
        "captions 16/120  3.20 pictures/s  33 s left\n"
    )
    assert execute.anonymous(progress, tmp_path) == "vision 100/100  done  loss 1.7409\n"
    cell = nbformat.v4.new_code_cell("1", metadata={"execution": {"iopub.execute_input": "2026"}}, execution_count=7)
    stream = [nbformat.v4.new_output("stream", name=name, text=f"{name}\n") for name in ("stdout", "stderr", "stdout")]
    cell.outputs = stream
    notebook = nbformat.v4.new_notebook(cells=[cell])
    execute.keep(notebook, tmp_path)
    assert (cell.execution_count, cell.metadata) == (1, {})
    assert [(output.name, output.text) for output in cell.outputs] == [("stdout", "stdout\nstdout\n")]
