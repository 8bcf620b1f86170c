"""What a power cut leaves of a directory, at the worst: only what was synced, and only under names that were.

A file that was changed since it was last synced is empty. A name is there if its directory was synced since it was
made, and stays if it was not synced since the name was taken away or given to another file.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest


def build(folder: Path) -> Path:
    """The compiled power_cut.c; skips the test where there is no gcc."""
    if shutil.which("gcc") is None:
        pytest.skip("power cuts are simulated by a C library, and there is no gcc")
    library = folder / "power_cut.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-pthread"], check=True)
    return library


def cuts(command: Sequence[str], root: Path, folder: Path, every: int, **options) -> Iterator[Path]:
    """Runs a command and gives, before each `every`-th sync below `root`, what a power cut would leave of it there.

    The command stands still until the next one is asked for. All that is in `root` at the start counts as synced.
    """
    store = folder / "store"
    store.mkdir(parents=True)
    for path in [root, *root.rglob("*")] if root.exists() else ():
        content = _names(path) if path.is_dir() else path.read_bytes()
        (store / str(path.stat().st_ino)).write_bytes(content)
    environment = os.environ | {
        "LD_PRELOAD": str(build(folder)),
        "POWER_CUT_ROOT": str(root),
        "POWER_CUT_STORE": str(store),
        "POWER_CUT_EVERY": str(every),
    }
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, **options)
        try:
            number = 0
            while os.WIFSTOPPED(status := os.waitpid(process.pid, os.WUNTRACED)[1]):
                number += 1
                yield _left_after_a_cut(root, store, folder / f"cut-{number}")
                os.kill(process.pid, signal.SIGCONT)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            process.kill()
    assert process.returncode == 0, (folder / "output").read_text()


def _left_after_a_cut(root: Path, store: Path, target: Path) -> Path:
    live = {path.stat().st_ino: path for path in root.rglob("*") if path.is_file()}

    def restore(inode: int, kind: str, path: Path) -> None:
        synced = store / str(inode)
        if kind == "d":
            path.mkdir()
            for line in synced.read_text().splitlines() if synced.exists() else ():
                inner, kind_of_inner, name = line.split(" ", 2)
                restore(int(inner), kind_of_inner, path / name)
            return
        content = synced.read_bytes() if synced.exists() else b""
        if inode in live and live[inode].read_bytes() != content:
            content = b""
        path.write_bytes(content)

    restore(root.stat().st_ino, "d", target)
    return target


def _names(folder: Path) -> bytes:
    inner = [(path.stat().st_ino, "d" if path.is_dir() else "f", path.name) for path in folder.iterdir()]
    return "".join(f"{inode} {kind} {name}\n" for inode, kind, name in inner).encode()
