"""Programs compiled for TPUs that are not here: small ones whole, one of a published model, and what does not fit."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

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


def run(*arguments: str, expected: int = 0) -> subprocess.CompletedProcess:
    """The command in a process of its own: libtpu reads the environment once, when jax is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in aot.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-m", "balcap_jax.aot", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done


@needs_libtpu
def test_a_small_recipe_fits(tmp_path):
    found = tmp_path / "found.json"
    done = run("--config=configs/scenes.py", "--topology=v5e:4x4", "--config.mesh.data=4", "--config.mesh.fsdp=4",
               f"--json={found}")  # fmt: skip
    assert done.stdout.splitlines()[0] == "v5e:4x4: 16 x TPU v5 lite, mesh replica 1 x data 4 x fsdp 4 x tensor 1"
    assert done.stdout.splitlines()[-1] == "fits 15.75 GiB"
    programs = {program["program"]: program for program in json.loads(found.read_text())}
    assert list(programs) == ["layout for sampling", "rollout", "update"]
    assert programs["update"]["flops"] > 0
    assert programs["rollout"]["collectives"]
    assert not any(moved["of_invariant"] for moved in programs["rollout"]["collectives"])
    # Of so small a model each chip has all, and the samples of a chip are its own affair.
    assert "compiling rollout in 1 part, matrices over 1 of 16 devices; " in done.stdout
    _, params = of_last_stage(configuration.load("configs/scenes.py"))
    decoder = params["decoder"]
    kernels = [leaf for leaf in jax.tree.leaves(decoder["layers"]) if leaf.ndim > 2]
    (step,) = programs["rollout"]["decoding_step"]
    # Matmuls of float32 take bfloat16 operands on a TPU, and the compiler keeps copies of the weights in it.
    assert step["weights"] == 2 * (sum(leaf.size for leaf in kernels) + decoder["head"].size)
    assert step["cache"] > 0
    assert step["moved"] == 0


@needs_libtpu
def test_the_rollout_of_a_3b_model_moves_no_weights_in_its_decoding_loop(tmp_path):
    found = tmp_path / "found.json"
    run("--config=configs/qwen25vl_3b.py", "--topology=v5e:4x4", "--config.stages.rl.batch_size=16",
        "--config.stages.rl.micro_batches=1", "--program=rollout", f"--json={found}")  # fmt: skip
    (rollout,) = json.loads(found.read_text())
    assert rollout["fits"]
    assert rollout["total"] < 5 * 2**30
    inside = [moved for moved in rollout["collectives"] if moved["in_open_loop"]]
    assert inside
    assert not any(moved["of_invariant"] for moved in inside)
    # A layer's smallest kernel is 1 MiB in bfloat16; what travels per token is the tokens.
    assert max(moved["size"] for moved in inside if moved["loops"] > 1) < 2**20


@needs_libtpu
@pytest.mark.slow
def test_the_updates_of_a_3b_model_fit(tmp_path):
    found = tmp_path / "found.json"
    run("--config=configs/qwen25vl_3b.py", "--topology=v5e:4x4", "--config.stages.rl.batch_size=16",
        "--config.stages.rl.micro_batches=1", "--config.rollout.token_buckets=256", "--program=update",
        f"--json={found}")  # fmt: skip
    padded, packed = json.loads(found.read_text())
    assert [padded["program"], packed["program"]] == ["update padded 1024", "update packed 256"]
    for update in (padded, packed):
        assert update["fits"]
        assert 1 < 16 * update["flops"] / update["model_flops"] < 1.5
    assert packed["flops"] < 0.31 * padded["flops"]
    assert packed["temporaries"] < padded["temporaries"]


@needs_libtpu
def test_what_does_not_fit_is_named_with_its_largest_part():
    # Two tables of eight million words and their moments: much memory in few operations, which XLA refuses soon.
    done = run("--config=configs/scenes.py", "--topology=v5e:2x2", "--program=update",
               "--config.stages.rl.batch_size=8", "--config.model.layers=1",
               "--config.model.vocab=8000000", expected=1)  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("does not fit 15.75 GiB: update")
    assert "DOES NOT FIT" in done.stdout


IN_TURN = """
import sys
from balcap_jax.aot import __main__ as aot
for line in sys.stdin:
    try:
        aot.main(["--config=configs/scenes.py", *line.split()])
    except SystemExit as ended:
        print("status", ended.code, file=sys.stderr, flush=True)
"""
"""The command several times in one process, which takes seconds to start."""


@needs_libtpu
def test_bad_input_is_one_line():
    cases = {
        "--topology=h100": "error: --topology is 'h100'; name one as v5e:4x8",
        "--topology=v9z:2x2": "error: --topology=v9z:2x2: libtpu knows no such topology",
        "--topology=v5e:9999x9999": "error: --topology=v5e:9999x9999: 99,980,001 chips in all, at most 131,072",
        "--topology=v5e:2x4 --config.mesh.fsdp=3": "error: the mesh (replica 1 x data -1 x fsdp 3 x tensor 1)",
        "--topology=v5e:2x4 --json=nowhere/found.json": "error: cannot write --json=nowhere/found.json",
    }
    environment = {name: value for name, value in os.environ.items() if name not in aot.ENVIRONMENT}
    given = {"cwd": ROOT, "env": environment | {"PYTHONPATH": str(ROOT)}, "text": True, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", IN_TURN], input="\n".join(cases), timeout=900, check=True, **given)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "status "))]
    assert lines[1::2] == ["status 2"] * len(cases)
    for line, message in zip(lines[::2], cases.values(), strict=True):
        assert line.startswith(message)
    assert "Traceback" not in done.stderr


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
    assert memory.refusal(REFUSED).startswith("Used 20.03G of 15.75G hbm")
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
