"""Programs compiled for TPUs that are not here: small ones whole, one of a published model, and what does not fit."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from balcap_jax.aot import __main__ as aot
from balcap_jax.aot import hlo, memory
from balcap_jax.config import recipes as configuration
from balcap_jax.training.programs import of_last_stage

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'balcap-jax[aot]'"
)


IN_TURN = """
import json, sys
from balcap_jax.aot import __main__ as aot
for line in sys.stdin:
    status = 0
    try:
        aot.main(json.loads(line))
    except SystemExit as ended:
        status = ended.code
    for stream in (sys.stdout, sys.stderr):
        print("status", status, file=stream, flush=True)
"""
"""The command several times in one process, which takes seconds to start. libtpu reads the environment once."""


class Done(NamedTuple):
    status: int
    output: list[str]
    errors: list[str]


def run(*commands: Sequence[str]) -> list[Done]:
    environment = {name: value for name, value in os.environ.items() if name not in aot.ENVIRONMENT}
    given = {"cwd": ROOT, "env": environment | {"PYTHONPATH": str(ROOT)}, "text": True, "capture_output": True}
    lines = "".join(json.dumps(command) + "\n" for command in commands)
    done = subprocess.run([sys.executable, "-c", IN_TURN], input=lines, timeout=900, check=False, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    # Between two lines with a status is what one command wrote.
    output, errors = (re.split(r"^status (\d+)\n", text, flags=re.MULTILINE) for text in (done.stdout, done.stderr))
    assert output[1::2] == errors[1::2]
    return [
        Done(int(status), *(text.splitlines() for text in texts))
        for status, *texts in zip(output[1::2], output[:-1:2], errors[:-1:2], strict=True)
    ]


SMALL = ["--config=configs/scenes.py", "--topology=v5e:4x4", "--config.mesh.data=4", "--config.mesh.fsdp=4"]
# Matrices lie over four chips in a decoding step too.
SPLIT = [*SMALL, "--config.mesh.sampling=4", "--program=rollout"]
# Two tables of 16 million words, whole on each chip: much memory in two operations, which XLA refuses at once.
TOO_LARGE = ["--config=configs/scenes.py", "--topology=v5e:2x2", "--program=layout", "--config.stages.rl.batch_size=8",
             "--config.model.vocab=16000000", "--config.model.width=256", "--config.mesh.fsdp=4",
             "--config.mesh.sampling=1"]  # fmt: skip
REFUSED_IN_A_LINE = {
    "--topology=h100": "error: --topology is 'h100'; name one as v5e:4x8",
    "--topology=v5litepod-32": "error: --topology is 'v5litepod-32'; 32 of its chips are v5e:4x8",
    "--topology=v6e-3": "error: --topology is 'v6e-3'; name one as v5e:4x8",
    "--topology=v9z:2x2": "error: --topology=v9z:2x2: libtpu knows no such topology",
    "--topology=v5e:9999x9999": "error: --topology=v5e:9999x9999: 99,980,001 chips in all, at most 131,072",
    "--topology=v5e:2x4 --config.mesh.fsdp=3": "error: the mesh (replica 1 x data -1 x fsdp 3 x tensor 1)",
    "--topology=v5e:2x4 --json=nowhere/found.json": "error: cannot write --json=nowhere/found.json",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, tuple[Done, Path]]:
    """What each of the commands above wrote, and its file of figures."""
    folder = tmp_path_factory.mktemp("aot")
    commands = {"small": SMALL, "split": SPLIT, "too large": TOO_LARGE}
    given = [[*command, f"--json={folder / name}.json"] for name, command in commands.items()]
    refused = [["--config=configs/scenes.py", *line.split()] for line in REFUSED_IN_A_LINE]
    done = run(*refused, *given)
    found = dict(zip([*REFUSED_IN_A_LINE, *commands], done, strict=True))
    return {name: (one, folder / f"{name}.json") for name, one in found.items()}


@needs_libtpu
def test_a_small_recipe_fits(compiled):
    done, found = compiled["small"]
    assert done.status == 0, done.errors
    assert done.output[0] == "v5e:4x4: 16 x TPU v5 lite, mesh replica 1 x data 4 x fsdp 4 x tensor 1"
    assert done.output[-1] == "fits 15.75 GiB"
    programs = {program["program"]: program for program in json.loads(found.read_text())}
    assert list(programs) == ["layout for sampling", "rollout", "update"]
    assert programs["update"]["flops"] > 0
    assert programs["rollout"]["collectives"]
    assert not any(moved["of_invariant"] for moved in programs["rollout"]["collectives"])
    # Of so small a model each chip has all, and the samples of a chip are its own affair.
    assert any(line.startswith("compiling rollout in 1 part, matrices over 1 of 16 devices; ") for line in done.output)
    _, params = of_last_stage(configuration.load("configs/scenes.py"))
    decoder = params["decoder"]
    kernels = [leaf for leaf in jax.tree.leaves(decoder["layers"]) if leaf.ndim > 2]
    (step,) = programs["rollout"]["decoding_step"]
    # Matmuls of float32 take bfloat16 operands on a TPU, and the compiler keeps copies of the weights in it.
    assert step["weights"] == 2 * (sum(leaf.size for leaf in kernels) + decoder["head"].size)
    assert step["cache"] > 0
    assert step["moved"] == 0


def assert_moves_no_weights(rollout: dict, smallest_kernel: int) -> None:
    """What travels per token is the tokens."""
    inside = [moved for moved in rollout["collectives"] if moved["in_open_loop"]]
    assert inside
    assert not any(moved["of_invariant"] for moved in inside)
    assert max(moved["size"] for moved in inside if moved["loops"] > 1) < smallest_kernel


@needs_libtpu
def test_split_matrices_stay_where_they_are_in_the_decoding_loop(compiled):
    done, found = compiled["split"]
    assert done.status == 0, done.errors
    assert any("matrices over 4 of 16 devices; " in line for line in done.output)
    (rollout,) = json.loads(found.read_text())
    _, params = of_last_stage(configuration.load("configs/scenes.py"))
    kernels = [leaf for leaf in jax.tree.leaves(params["decoder"]["layers"]) if leaf.ndim > 2]
    assert_moves_no_weights(rollout, 2 * min(math.prod(leaf.shape[1:]) for leaf in kernels))
    (step,) = rollout["decoding_step"]
    assert step["moved"] > 0


# A minute of compilation. The test above has the same of a small model.
@needs_libtpu
@pytest.mark.slow
def test_the_rollout_of_a_3b_model_moves_no_weights_in_its_decoding_loop(tmp_path):
    found = tmp_path / "found.json"
    (done,) = run(["--config=configs/qwen25vl_3b.py", "--topology=v5e:4x4", "--config.stages.rl.batch_size=16",
                   "--config.stages.rl.micro_batches=1", "--program=rollout", f"--json={found}"])  # fmt: skip
    assert done.status == 0, done.errors
    (rollout,) = json.loads(found.read_text())
    assert rollout["fits"]
    assert rollout["total"] < 5 * 2**30
    assert_moves_no_weights(rollout, 2**20)  # A layer's smallest kernel is 1 MiB in bfloat16.


@needs_libtpu
@pytest.mark.slow
def test_the_updates_of_a_3b_model_fit(tmp_path):
    found = tmp_path / "found.json"
    (done,) = run(["--config=configs/qwen25vl_3b.py", "--topology=v5e:4x4", "--config.stages.rl.batch_size=16",
                   "--config.stages.rl.micro_batches=1", "--config.rollout.token_buckets=256", "--program=update",
                   f"--json={found}"])  # fmt: skip
    assert done.status == 0, done.errors
    padded, packed = json.loads(found.read_text())
    assert [padded["program"], packed["program"]] == ["update padded 1024", "update packed 256"]
    for update in (padded, packed):
        assert update["fits"]
        assert 1 < 16 * update["flops"] / update["model_flops"] < 1.5
    assert packed["flops"] < 0.35 * padded["flops"]
    assert packed["temporaries"] < padded["temporaries"]


@needs_libtpu
def test_what_does_not_fit_is_named_with_its_largest_part(compiled):
    done, found = compiled["too large"]
    assert done.status == 1
    assert done.errors[-1].startswith("does not fit 15.75 GiB: layout for sampling")
    assert any("DOES NOT FIT, XLA refuses it: Used " in line for line in done.output)
    (layout,) = json.loads(found.read_text())
    assert (layout["fits"], layout["hbm"]) == (False, 15.75 * 2**30)


@needs_libtpu
@pytest.mark.parametrize("given", REFUSED_IN_A_LINE)
def test_bad_input_is_one_line(compiled, given):
    done, _ = compiled[given]
    assert done.status == 2
    (line,) = [line for line in done.errors if line.startswith("error: ")]
    assert line.startswith(REFUSED_IN_A_LINE[given])
    assert "Traceback" not in "".join(done.errors)


def test_without_libtpu_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--config=configs/scenes.py", "--topology=v5e:2x2"])
    assert stopped.value.code == 2
    assert "libtpu is not installed; run `pip install 'balcap-jax[aot]'`" in capsys.readouterr().err


REFUSED = """RESOURCE_EXHAUSTED: TPU backend error (ResourceExhausted).: XLA:TPU compile permanent error. Ran out of
memory in memory space hbm. Used 20.03G of 15.75G hbm. Exceeded hbm capacity by 4.28G.

Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(step)/dot_general" source_file="x.py"
     Shape: f32[8,16384,16384]{2,1,0:T(8,128)}
"""


def test_what_xla_says_of_memory_is_told():
    assert memory.refusal(REFUSED) == "Used 20.03G of 15.75G hbm. Exceeded hbm capacity by 4.28G"
    buffers = memory.largest_buffers(REFUSED)
    assert buffers.split() == ["8.00G", "f32[8,16384,16384]{2,1,0:T(8,128)}", "jit(step)/dot_general"]
    other = "RESOURCE_EXHAUSTED: Ran out of memory on HBM.\n It needs temporaries (16.65G)"
    assert memory.refusal(other) == " ".join(other.split())
    assert memory.largest_buffers(other) == ""


PLANNED = memory.Planned("rollout", None, resident=2, model_flops=5.0, repeated_flops=20.0)
REPORT = memory.Report(PLANNED, 6, 6, 4, 5, 1, 10.0, (), 1.0)


def test_arguments_that_outputs_overwrite_count_once():
    assert REPORT.total == 6 + 2 + 5 + 1 + 2
    assert REPORT.fits(16)
    assert not REPORT.fits(15)
    assert list(REPORT.parts()) == ["arguments", "temporaries", "new outputs", "resident beside it", "code"]


def test_the_text_names_each_kind_of_traffic():
    moved = [
        hlo.Collective("all-gather", 2**20, 3, 1, False, False, "layers"),
        hlo.Collective("all-reduce", 2**10, 7, 2, True, True, "decode"),
    ]
    turns = (hlo.Turn("body", 3 * 2**30, 2**29, 5 * 2**19, 7.0),)
    report = dataclasses.replace(REPORT, collectives=tuple(moved), turns=turns)
    text = aot.text_of(report, memory.Chip(2**30, 1e12), 4)
    assert "all-gather         other loops           3 times" in text
    assert "all-reduce         decoding loop         7 times" in text
    assert "1 collectives of the decoding loop move weights, first: decode" in text
    step = "a decoding step reads 3.00 GiB of weights, 0.50 GiB of cache and prefix; 7 collectives move 2.50 MiB"
    assert step in text


def test_model_flops_of_the_recipe_by_hand():
    """Qwen2.5-VL-3B: 6 per weight and token, half the frozen side's; whole squares of attention."""
    config = configuration.load("configs/qwen25vl_3b.py")
    programs, params = of_last_stage(config)
    layer = 2048 * 128 * (16 + 2 + 2) + 2048 * 2048 + 3 * 2048 * 11008
    prompt, group, length = 512, 8, 1024
    tokens = prompt + group * length
    by_hand = 6 * 36 * layer * tokens + 6 * 151936 * 2048 * group * length
    by_hand += 12 * 36 * 16 * 128 * (prompt**2 + group * length * (prompt + length))
    assert memory.model_flops(programs, params, 1, group, length) == pytest.approx(by_hand, rel=1e-6)
    repeated = memory.model_flops(programs, params, 1, group, length, repeated=True)
    assert by_hand < repeated < 1.5 * by_hand

    # A reference runs forward beside it.
    programs, params = of_last_stage(configuration.load("configs/qwen25vl_3b.py", {"loss.kl_coef": "0.1"}))
    with_reference = by_hand + 2 * 36 * layer * tokens + 2 * 151936 * 2048 * group * length
    with_reference += 4 * 36 * 16 * 128 * (prompt**2 + group * length * (prompt + length))
    assert memory.model_flops(programs, params, 1, group, length) == pytest.approx(with_reference, rel=1e-6)

    # With adapters of rank 64 no weight of the base has a gradient of its own.
    programs, params = of_last_stage(configuration.load("configs/qwen25vl_3b.py:lora"))
    adapters = 64 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008))
    with_adapters = 4 * 36 * layer * tokens + 6 * 36 * adapters * tokens + 4 * 151936 * 2048 * group * length
    with_adapters += 12 * 36 * 16 * 128 * (prompt**2 + group * length * (prompt + length))
    assert memory.model_flops(programs, params, 1, group, length) == pytest.approx(with_adapters, rel=1e-6)
