"""Peak resident memory of a rollout in 1, 2, 4 and 8 parts, each number of parts in a process of its own.

    python benchmarks/rollout_memory.py            4 GB of memory, 2.1 GB of it the cache of one part
    python benchmarks/rollout_memory.py --small    a cache of 34 MB, to see that it runs

A process compiles the rollout, has Linux forget the peak of the compilation, notes what is resident (VmRSS), samples,
and reads the peak (VmHWM). The difference is what sampling took beyond the program, the weights and the prompts. Every
other token ends a response: responses are short, but the cache is made for the limit. All numbers of parts must sample
the same tokens.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from step_time import machine

from balcap_jax import rollout as sampling
from balcap_jax.cli.arguments import CommandParser
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import Prompt, TextPolicy

PARTS = (1, 2, 4, 8)
CONFIG = DecoderConfig(vocab=512, width=256, layers=4, heads=8, kv_heads=8, head_size=64, mlp=512, tied_embeddings=True)
BATCH, GROUP, PROMPT, RESPONSE = 16, 8, 64, 1024


def sizes(small: bool) -> tuple[DecoderConfig, int]:
    """The decoder, and the most tokens of a response."""
    return (dataclasses.replace(CONFIG, kv_heads=1, layers=2), RESPONSE // 4) if small else (CONFIG, RESPONSE)


def cache_bytes(small: bool, parts: int) -> int:
    """Bytes of keys and values of the responses of a part."""
    config, length = sizes(small)
    positions = config.layers * BATCH * GROUP // parts * length
    return 2 * positions * config.kv_heads * config.head_size * np.dtype(config.dtype).itemsize


def measure(small: bool, parts: int) -> dict[str, float]:
    """Samples once in this process: {before, peak, temporaries} in bytes, {tokens} in all, {checksum} of them."""
    config, length = sizes(small)
    policy = TextPolicy(config, pad_token=0, end_tokens=tuple(range(1, config.vocab, 2)), forbidden=(0,))
    params = jax.jit(policy.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, config.vocab, (BATCH, PROMPT), np.int32)
    positions = np.tile(np.arange(PROMPT, dtype=np.int32), (BATCH, 1))
    prompt = Prompt(tokens, np.ones(tokens.shape, bool), positions, policy.no_images(BATCH))
    inputs = jax.device_put((prompt, np.arange(BATCH, dtype=np.uint32), np.uint32(0), np.uint32(0)))
    settings = sampling.Sampling(GROUP, length, parts=parts)
    program = sampling.compile_rollout(policy, settings, config.dtype, params, *inputs)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew; compiling takes more than a small cache
    before = resident_bytes("VmRSS")
    out = jax.block_until_ready(program(params, *inputs))
    return {
        "before": before,
        "peak": resident_bytes("VmHWM"),
        "temporaries": program.program.memory_analysis().temp_size_in_bytes,
        "tokens": int(out.lengths.sum()),
        "checksum": zlib.crc32(np.asarray(out.tokens).tobytes()),
    }


def resident_bytes(name: str) -> int:
    """`name`, VmRSS or VmHWM, of this process; Linux counts both in kB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def measure_apart(small: bool, parts: int) -> dict[str, float]:
    """`measure` in a process of its own.

    Raises:
      UserError: it failed; with its last line.
    """
    command = [sys.executable, __file__, f"--alone={parts}", *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        last = (done.stderr.strip() or "it was killed, perhaps for want of memory").splitlines()[-1]
        raise UserError(f"the rollout in {parts} parts ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python benchmarks/rollout_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="toy sizes: to see that it runs, not to quote")
    parser.add_argument("--alone", type=int, choices=PARTS, metavar="N", help="only N parts, in this process, as JSON")
    args = parser.parse_args(argv)
    if args.alone:
        print(json.dumps(measure(args.small, args.alone)))
        return
    print(f"{machine()}; Python {sys.version.split()[0]}, jax {jax.__version__}", flush=True)
    print(
        "| parts | cache, GB | compiled temporaries, GB | resident beyond the program and the weights, GB | peak, GB |"
    )
    print("|---|---|---|---|---|", flush=True)
    sampled = set()
    for parts in PARTS:
        found = measure_apart(args.small, parts)
        sampled.add((found["tokens"], found["checksum"]))
        columns = (cache_bytes(args.small, parts), found["temporaries"], found["peak"] - found["before"], found["peak"])
        print(f"| {parts} | " + " | ".join(f"{value / 1e9:.3f}" for value in columns) + " |", flush=True)
    if len(sampled) > 1:
        raise UserError("the numbers of parts did not sample the same tokens, so the table compares different things")
    print(f"the same {sampled.pop()[0]} tokens in every number of parts")


if __name__ == "__main__":
    main()
