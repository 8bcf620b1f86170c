"""Memory and time of loading a checkpoint of Qwen2.5-VL-3B's shape, 7.5 GB of random bf16, onto 8 devices of a CPU.

    python benchmarks/load_memory.py FOLDER            7.5 GB of disk below FOLDER, deleted at the end; 10 GB of memory
    python benchmarks/load_memory.py FOLDER --small    the same with few layers, to see that it runs

Loading is a process of its own. Its figures are the seconds of `models.load` onto a mesh of 8 fake devices, and the
most memory that was resident at once (VmHWM, Linux) beyond what was resident before and the parameters themselves. The
largest tensor stands beside it. `--keep` leaves the checkpoint, and `--load=DIR` loads what is there already.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.models.formats import hf, loading, safetensors
from balcap_jax.models.formats.safetensors import NewTensor
from balcap_jax.models.qwen2_5_vl import hf as qwen

# config.json of Qwen2.5-VL-3B-Instruct, as `qwen.config_to_hf` wants it.
SIZES = {
    "vision_width": 1280,
    "vision_layers": 32,
    "vision_heads": 16,
    "vision_mlp": 3420,
    "patch_size": 14,
    "window_size": 112,
    "full_attention_layers": (7, 15, 23, 31),
    "width": 2048,
    "layers": 36,
    "heads": 16,
    "kv_heads": 2,
    "head_size": 128,
    "mlp": 11008,
    "rope_theta": 1000000.0,
    "mrope_section": (16, 24, 24),
    "norm_eps": 1e-6,
    "tied_embeddings": True,
    "vocab": 151936,
}
SMALL = {"vision_layers": 2, "full_attention_layers": (1,), "layers": 2}
SHARD_BYTES = 4 * 10**9  # the published checkpoint has two shards
CHILD = """
import json, sys, time
import jax
from balcap_jax import models
from balcap_jax.parallel import sharding

def resident(name):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[name].split()[0]) * 1024

mesh = sharding.make_mesh({"replica": 1, "data": 1, "fsdp": 8, "tensor": 1})
from transformers import AutoTokenizer, AutoConfig
jax.block_until_ready(jax.device_put(jax.numpy.ones(8)))
before, start = resident("VmRSS"), time.perf_counter()
_, params, _ = models.load(sys.argv[1], mesh=mesh, param_dtype=None)
jax.block_until_ready(params)
seconds = time.perf_counter() - start
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"seconds": seconds, "held": held, "beyond": resident("VmHWM") - before - held}))
"""


def make_checkpoint(directory: Path, sizes: dict) -> None:
    """Writes the random checkpoint."""
    directory.mkdir(parents=True)
    tokenizer = build_tokenizer(["a red ball"])
    tokenizer.save_pretrained(directory)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = {
        "vocab": sizes["vocab"],
        "image": image,
        "before_image": tokenizer.bos_token_id,
        "bos": None,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    (directory / hf.CONFIG).write_text(json.dumps(qwen.config_to_hf(sizes, ids) | {"dtype": "bfloat16"}))
    policy, _ = loading.build_saved(directory, loading.read_fields(directory))
    shapes = loading.flat_shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        """Sign and mantissa of all kinds, magnitudes from 0.5 to 1."""
        bits = rng.integers(0, 2**16, shape, np.uint16)
        return (bits & 0x807F | 0x3F00).view(ml_dtypes.bfloat16)

    pieces = hf.plan(qwen.TABLE, shapes)
    names = hf.exported_names(qwen, list(pieces), {})
    tensors = [
        NewTensor(names[name], np.dtype(ml_dtypes.bfloat16), parts[0].hf_shape, lambda s=parts[0].hf_shape: random(s))
        for name, parts in pieces.items()
    ]
    safetensors.write_directory(directory, tensors, shard_bytes=SHARD_BYTES)


def load(directory: Path) -> dict[str, float]:
    """{seconds, held, beyond} of a load in a process of its own; bytes."""
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", CHILD, directory], capture_output=True, text=True, env=flags)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written and deleted again")
    parser.add_argument("--small", action="store_true", help="few layers")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in FOLDER/load_memory")
    parser.add_argument("--load", type=Path, metavar="DIR", help="load this model, and make none")
    parser.add_argument("--repeat", type=int, default=2, help="loads, one after the other; the first may read the disk")
    arguments = parser.parse_args()
    folder = arguments.load or arguments.folder / "load_memory"
    if not arguments.load and folder.exists():
        sys.exit(f"{folder} exists; delete it first")
    try:
        if not arguments.load:
            make_checkpoint(folder, SIZES | (SMALL if arguments.small else {}))
        print(f"{platform.platform()}, jax {jax.__version__}, Python {platform.python_version()}", flush=True)
        files = folder.glob("*.safetensors")
        largest = max((tensor.size for file in files for tensor in safetensors.read_file(file)), default=0)
        for _ in range(arguments.repeat):
            found = load(folder)
            print(
                f"{found['held'] / 1e9:.2f} GB of parameters in {found['seconds']:.1f} s, "
                f"{found['beyond'] / 1e9:.2f} GB resident beyond them; the largest tensor is {largest / 1e9:.2f} GB",
                flush=True,
            )
    finally:
        if not (arguments.keep or arguments.load):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
