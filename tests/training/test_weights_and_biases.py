"""What goes to Weights & Biases, which run there it is, and that nothing that fails there ends a run."""

import math
import sys
import types

import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.training.logging import MetricsWriter
from balcap_jax.training.weights_and_biases import RUN_ID, WandbRun


class Service:
    """A stand-in for the module wandb, without a network; `fails` names the calls that raise."""

    def __init__(self, *fails: str):
        self.fails, self.settings, self.logged, self.ended = fails, [], [], 0
        self.Table, self.Image = self._table, lambda picture: picture

    def _call(self, name: str) -> None:
        if name in self.fails:
            raise RuntimeError(f"{name}: api_key not configured\n(no-tty)")

    def _table(self, columns: list, data: list) -> tuple[list, list]:
        self._call("Table")
        return columns, data

    def init(self, **settings):
        self._call("init")
        self.settings.append(settings)
        return types.SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values: dict, step: int) -> None:
        self._call("log")
        self.logged.append((step, values))

    def _finish(self) -> None:
        self._call("finish")
        self.ended += 1


@pytest.fixture
def service(monkeypatch):
    def install(*fails: str) -> Service:
        made = Service(*fails)
        monkeypatch.setitem(sys.modules, "wandb", made)
        return made

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return install


def record(number: int, **changes) -> dict:
    caption = {"caption": "a cat", "words": 2, "tokens": 3, "in_band": True, "truncated": False, "b_capscore": None}
    caption |= {"rewards": {"precision": 0.5, "recall": None}, "failures": {"recall": "no answer"}} | changes
    return {"id": f"p{number}", "prompt": "Describe.", "reference": "a black cat", "captions": [caption] * 2}


def test_wandb_asked_for_and_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsWriter(tmp_path, wandb="balcap")


def test_a_run_that_begins_says_why_it_cannot_be_started(tmp_path, service):
    service("init")
    with pytest.raises(UserError, match=r"log.wandb: .*\(init: api_key not configured \(no-tty\)\); mend that"):
        MetricsWriter(tmp_path, tensorboard=False, wandb="balcap")


def test_a_run_that_goes_on_does_so_without_it(tmp_path, service, capsys):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "rl", {"loss": 1.0})
    service("init")
    with MetricsWriter(tmp_path, tensorboard=False, wandb="balcap") as writer:
        writer.write(2, "rl", {"loss": 0.5})
        writer.write_completions(2, "rl", [record(0)], {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("log.wandb: RuntimeError: init: api_key not configured (no-tty); the run goes on without ")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_finite_values_by_stage(tmp_path, service):
    seen = service()
    with MetricsWriter(tmp_path, tensorboard=False, wandb="balcap", config={"seed": 3, "name": ""}) as writer:
        writer.write(7, "rl", {"loss": 0.5, "kl": math.nan})
    (settings,) = seen.settings
    run_id = (tmp_path / RUN_ID).read_text().strip()
    assert len(run_id) == 8
    assert settings == {
        "project": "balcap", "dir": str(tmp_path), "config": {"seed": 3, "name": ""}, "name": None, "id": run_id,
        "resume": "allow",
    }  # fmt: skip
    assert (seen.logged, seen.ended) == ([(7, {"rl/loss": 0.5})], 1)


def test_the_run_is_the_same_after_a_restart_and_another_in_another_directory(tmp_path, service, monkeypatch):
    seen = service()
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        WandbRun("balcap", tmp_path / name, {}).close()
    first, again, other = (settings["id"] for settings in seen.settings)
    assert first == again != other
    monkeypatch.setenv("WANDB_RUN_ID", "mine")  # wandb reads it, and WANDB_RESUME, by itself.
    WandbRun("balcap", tmp_path / "a", {}).close()
    assert {"id", "resume"}.isdisjoint(seen.settings[-1])


def test_a_table_has_a_row_of_each_caption_of_the_first_prompts(tmp_path, service):
    seen = service()
    pictures = {f"p{i}": np.full((600, 300, 3), i, np.uint8) for i in range(1, 12)}
    WandbRun("balcap", tmp_path, {}).log_completions(20, "rl", [record(i) for i in range(12)], pictures)
    ((step, values),) = seen.logged
    columns, rows = values["rl/completions"]
    assert step == 20
    assert columns == [
        "step", "id", "picture", "prompt", "reference", "caption", "words", "tokens", "in_band", "truncated",
        "precision", "recall", "b_capscore", "failures",
    ]  # fmt: skip
    assert [row[1] for row in rows] == [f"p{i}" for i in range(8) for _ in range(2)]
    assert rows[0][2] is None  # no picture of that prompt at hand
    assert (rows[2][2].size, rows[2][2].getpixel((0, 0))) == ((128, 256), (1, 1, 1))
    assert rows[0][3:] == [
        "Describe.", "a black cat", "a cat", 2, 3, True, False, 0.5, None, None, "recall: no answer",
    ]  # fmt: skip


@pytest.mark.parametrize("call", ["log", "Table", "finish"])
def test_a_failure_is_said_once_and_ends_nothing(tmp_path, service, capsys, call):
    seen = service(call)
    with MetricsWriter(tmp_path, tensorboard=False, wandb="balcap") as writer:
        for step in (1, 2):
            writer.write(step, "rl", {"loss": 1.0})
            writer.write_completions(step, "rl", [record(step)], {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"log.wandb: RuntimeError: {call}: api_key not configured (no-tty); the run goes on without Weights & Biases, "
        "metrics.jsonl has all numbers"
    )
    assert len(seen.logged) == {"log": 0, "Table": 1, "finish": 4}[call]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
