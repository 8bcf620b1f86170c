"""Saves a step beside a growing log in a bucket, and reads what is there: python saved_in_bucket.py URL STEP"""

import sys

import jax.numpy as jnp

from balcap_jax.cli import storage
from balcap_jax.cli.files import resolved
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.training.workdir import UNKEPT

workdir, step = resolved(sys.argv[1]), int(sys.argv[2])
with storage.kept(workdir, but=UNKEPT), Checkpointer(workdir / "checkpoints", keep=1) as checkpointer:
    assert (checkpointer.latest_step() or 0) in (step, step - 1)
    if checkpointer.latest_step() != step:
        workdir.mkdir(parents=True, exist_ok=True)
        lines = [f'{{"step": {number}}}\n' for number in range(1, step + 1)]
        (workdir / "metrics.jsonl").write_text("".join(lines))
        checkpointer.save(step, {"w": jnp.full((32, 32), step), "b": jnp.full(5, -step)}, {"step": step})
