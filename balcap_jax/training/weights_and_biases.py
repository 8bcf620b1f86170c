"""Weights & Biases: the numbers of a run, and tables of its captions. Nothing that happens there ends a run.

What is documented for users is in docs/trackers.md.
"""

import importlib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from balcap_jax.cli.errors import UserError, raised
from balcap_jax.cli.files import write_text

RUN_ID = "wandb_run.txt"
"""The file of a workdir with the id of its run there, so that a resumed run goes on in the same curves."""
_PROMPTS = 8  # of a table: with 8 captions each it stays readable, and small beside a step's 1,024 captions
_PIXELS = 256  # longer side of a table's picture
_COLUMNS = ("step", "id", "picture", "prompt", "reference", "caption", "words", "tokens", "in_band", "truncated")


def import_wandb() -> Any:
    """The module wandb. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError("log.wandb is set but wandb is not installed; run `pip install wandb` or unset it") from error


class WandbRun:
    """A run on Weights & Biases, made or gone on with. After the first failure it warns once and does nothing more.

    `project` is log.wandb; all else (entity, mode, the run's id) may be set by the WANDB_* variables of wandb itself.

    Raises:
      UserError: wandb is not installed, or a run that begins cannot be started there. One that is `resumed` goes on
        without it: a host that comes back at night must not wait for a login.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any], *, resumed: bool = False):
        self._module = import_wandb()
        self._run: Any = None
        settings = {"project": project, "dir": str(workdir), "config": dict(config), "name": config.get("name") or None}
        if "WANDB_RUN_ID" not in os.environ:
            settings |= {"id": _run_id(workdir), "resume": "allow"}
        try:
            self._run = self._module.init(**settings)
        except Exception as error:  # of many kinds: no network, no login, a name that it does not take
            if not resumed:
                raise UserError(
                    f"log.wandb: Weights & Biases cannot be started ({' '.join(str(error).split())}); mend that, set "
                    "WANDB_MODE=offline, or leave log.wandb empty"
                ) from error
            self._give_up(error)

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """The numbers of a step, each as STAGE/NAME."""
        self._send(step, lambda: {f"{stage}/{name}": value for name, value in values.items()})

    def log_completions(
        self, step: int, stage: str, records: Sequence[Mapping[str, Any]], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """STAGE/completions: a table of the captions of the first prompts of a step, one row each.

        Args:
          records: of `Judged.records`.
          pictures: {example's id: uint8 [height, width, 3]}; a prompt without one has an empty cell.
        """

        def table() -> dict[str, Any]:
            shown = records[:_PROMPTS]
            names = tuple(shown[0]["captions"][0]["rewards"])
            rows = [row for record in shown for row in self._rows(step, record, names, pictures)]
            columns = [*_COLUMNS, *names, "b_capscore", "failures"]
            return {f"{stage}/completions": self._module.Table(columns=columns, data=rows)}

        if records:
            self._send(step, table)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)
        self._run = None

    def _rows(
        self, step: int, record: Mapping[str, Any], names: Sequence[str], pictures: Mapping[str, np.ndarray]
    ) -> list[list[Any]]:
        picture = pictures.get(record["id"])
        picture = None if picture is None else self._module.Image(_small(picture))
        rows = []
        for caption in record["captions"]:
            failures = "; ".join(f"{name}: {reason}" for name, reason in caption.get("failures", {}).items())
            row = [step, record["id"], picture, record["prompt"], record["reference"]]
            row += [caption[name] for name in _COLUMNS[5:]]
            rows.append([*row, *(caption["rewards"][name] for name in names), caption["b_capscore"], failures])
        return rows

    def _send(self, step: int, make: Any) -> None:
        if self._run is None:
            return
        try:
            self._run.log(make(), step=int(step))
        except Exception as error:  # wandb's own, the network's, or a full disk's
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        line = f"log.wandb: {raised(error)}; the run goes on without Weights & Biases, metrics.jsonl has all numbers"
        print(line, file=sys.stderr, flush=True)


def _run_id(workdir: Path) -> str:
    path = workdir / RUN_ID
    if path.is_file() and (known := path.read_text(encoding="utf-8", errors="replace").strip()):
        return known
    made = secrets.token_hex(4)
    write_text(path, f"{made}\n")
    return made


def _small(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((_PIXELS, _PIXELS))
    return image
