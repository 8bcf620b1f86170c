"""Sets where notebooks install the package from, runs them, and keeps what they print and draw.

    python notebooks/execute.py                                                     all of them
    python notebooks/execute.py quickstart advantages                               some of them
    python notebooks/execute.py --package=git+https://github.com/NAME/balcap_jax    sets the address; runs none

Each notebook runs from its first cell to its last in an empty folder, in a kernel of `--python`. Outputs are stored
without what belongs to this machine and this hour: execution times, warnings, seconds and paths.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
FIRST_CELL = FOLDER / "install.py"
_PACKAGE = re.compile(r'^PACKAGE = "(.*)"$', re.MULTILINE)
_COLAB = re.compile(r"(https://colab\.research\.google\.com/github/)[^/]+/[^/]+(/blob/[^/]+/notebooks/)")
_GITHUB = re.compile(r"https://github\.com/([^/@]+/[^/@]+?)(?:\.git|/|@|$)")
_SECONDS = re.compile(r"\b\d+(?:\.\d+)? s\b")
# Of a progress line: which ones are printed depends on the time, but for the last, and so does what they say of speed.
_UNDER_WAY = re.compile(r"^\w+ \d+/\d+ .*\beta .*\n|^\w+ \d+/\d+  .*/s  \d+ s left\n", re.MULTILINE)
_SPEED = re.compile(r"  \S+ s/step(?: \([^)]*\))?|  \S+ tok/s|  use [\d/]+%")


def read(name: str) -> nbformat.NotebookNode:
    """The notebook of this name, without what an earlier execution left, its install cell as it is in FIRST_CELL."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = FIRST_CELL.read_text().strip()
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path, python: str = sys.executable, **environment: str) -> None:
    """Executes the cells in place, in `folder`. Raises nbclient's CellExecutionError where a cell fails."""
    kernel = AsyncKernelManager(kernel_name="python3")
    # This interpreter, not the one of whatever kernel is registered as "python3" here.
    kernel.kernel_spec.argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "IPYTHONDIR": str(folder / ".ipython")}
    client = NotebookClient(notebook, km=kernel, timeout=3600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | backend | environment)


def keep(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Takes out of the outputs what another run would not give again."""
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.metadata.pop("execution", None)
        cell.execution_count = number
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                output.text = anonymous(output.text, folder)
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            elif "text/plain" in output.get("data", {}):
                output.data["text/plain"] = anonymous(output.data["text/plain"], folder)
            kept.append(output)
        cell.outputs = kept
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def anonymous(text: str, folder: Path) -> str:
    """`text` with paths from `folder`, "~" for home, "… s" for seconds, and of progress lines only the last."""
    text = text.replace(f"{folder}/", "").replace(str(folder), ".").replace(str(Path.home()), "~")
    return _SECONDS.sub("… s", _SPEED.sub("", _UNDER_WAY.sub("", text)))


def set_package(package: str) -> None:
    """Writes the address into all install cells, and the repository of a GitHub address into badges."""
    text = FIRST_CELL.read_text()
    found = _PACKAGE.search(text)
    FIRST_CELL.write_text(text[: found.start(1)] + package + text[found.end(1) :])
    github = _GITHUB.search(package)
    for path in (*sorted(FOLDER.glob("*.ipynb")), FOLDER / "README.md"):
        if path.suffix == ".ipynb":
            notebook = nbformat.read(path, as_version=4)
            next(cell for cell in notebook.cells if cell.cell_type == "code").source = FIRST_CELL.read_text().strip()
            nbformat.write(notebook, path)
        if github:
            path.write_text(_COLAB.sub(rf"\g<1>{github[1]}\g<2>", path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks without .ipynb (default: all)")
    parser.add_argument("--package", help='a Git address, the address of a wheel, or "" for the package index')
    parser.add_argument("--python", default=sys.executable, help="interpreter of the kernel (default: this one)")
    parser.add_argument("--discard", action="store_true", help="run, and keep no outputs")
    arguments = parser.parse_args()
    names = arguments.names or [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    if arguments.package is not None:
        set_package(arguments.package)
        return
    for name in names:
        if not (FOLDER / f"{name}.ipynb").is_file():
            parser.error(f"there is no notebook {name!r} in {FOLDER}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            notebook = read(name)
            run(notebook, Path(folder), arguments.python)
            keep(notebook, Path(folder))
        if not arguments.discard:
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {len(notebook.cells)} cells ran", flush=True)


if __name__ == "__main__":
    main()
