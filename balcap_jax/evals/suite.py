"""The caption benchmarks of one folder, which `evaluate --suite=captions` runs one after the other.

BENCH/dcscore.jsonl            DeCapBench: lines with image_name, oracle_caption, oracle_facts
BENCH/captionqa.json[l]        CaptionQA: {picture: questions}, or lines with id and questions
BENCH/caparena.json            CapArena-Auto: caparena_auto_600.json
BENCH/bcapscore.jsonl          lines with reference_units, as `recaption --write=units` gives them
BENCH/checklist.jsonl          CAPEval: lines with id and questions
BENCH/images/                  the pictures of all, or of one benchmark each: images/dcscore/ ...
"""

from pathlib import Path
from typing import NamedTuple

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl

PICTURES = "images"
# Metric -> its argument, and names of the file that the argument takes.
SUITE = {
    "dcscore": ("references", ("dcscore.jsonl",)),
    "captionqa": ("questions", ("captionqa.json", "captionqa.jsonl")),
    "caparena": ("opponents", ("caparena.json",)),
    "bcapscore": ("references", ("bcapscore.jsonl",)),
    "checklist": ("checklists", ("checklist.jsonl",)),
}


class Benchmark(NamedTuple):
    """One benchmark of a folder: its metric, the argument of `evaluate` that takes its `file`, and its pictures.

    folder: below which its pictures lie; None = below the file's own. own: the folder's name within PICTURES, "" where
    the benchmarks share it.
    """

    metric: str
    argument: str
    file: Path
    folder: Path | None
    own: str


def benchmarks_in(data: Path) -> tuple[list[Benchmark], dict[str, str]]:
    """(the benchmarks of a folder, {metric: why it is left out}).

    Raises:
      UserError: the folder has none.
    """
    found, absent = [], {}
    for metric, (argument, names) in SUITE.items():
        file = next((data / name for name in names if (data / name).is_file()), None)
        if file is None:
            absent[metric] = f"there is no {' or '.join(names)} in {data}"
            continue
        own = metric if (data / PICTURES / metric).is_dir() else ""
        folder = None if metric == "bcapscore" and _names_pictures(file) else data / PICTURES / own
        found.append(Benchmark(metric, argument, file, folder, own))
    if not found:
        names = ", ".join(name for _, names in SUITE.values() for name in names)
        raise UserError(f"--data={data} holds no benchmark; it takes {names}, and pictures in {PICTURES}/")
    return found, absent


def _names_pictures(file: Path) -> bool:
    """Whether the paths of the first line of a JSONL file start at the file."""
    try:
        _, line = next(iter(read_jsonl(file, "mend that line")))
        return (file.parent / line["image"]).is_file()
    except (UserError, StopIteration, KeyError, TypeError, OSError):
        return False  # The metric itself says what is wrong with it.
