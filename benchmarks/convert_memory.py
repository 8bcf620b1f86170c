"""Memory and time of converting a checkpoint of Qwen2.5-VL-3B's shape, 7.5 GB of random bf16, there and back.

    python benchmarks/convert_memory.py FOLDER            23 GB of disk below FOLDER, deleted at the end
    python benchmarks/convert_memory.py FOLDER --small    the same with few layers, to see that it runs

Each conversion is a process of its own; its figure is the most memory that was resident at once (VmHWM, Linux), Python
and jax included. The tensors that come back are compared with those that went in, bit for bit.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
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
}
VOCAB = 151936
SMALL = {"vision_layers": 2, "full_attention_layers": (1,), "layers": 2}
SHARD_BYTES = 4 * 10**9  # the published checkpoint has two shards
CHILD = """
import sys
from balcap_jax import convert
convert.main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", status["VmHWM"].split()[0])
"""


def make_checkpoint(directory: Path, sizes: dict) -> int:
    """Writes the random checkpoint; -> its number of parameters."""
    directory.mkdir(parents=True)
    tokenizer = build_tokenizer(["a red ball"])
    tokenizer.save_pretrained(directory)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = {"vocab": VOCAB, "image": image, "bos": None, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
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
    return sum(int(np.prod(shape)) for shape in shapes.values())


def convert(*arguments: str) -> tuple[float, float]:
    """Runs the command in a process of its own; -> (seconds, peak resident GB)."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - started, int(done.stdout.split()[-1]) * 1024 / 1e9


def compare(first: Path, second: Path) -> None:
    """Ends the benchmark unless both checkpoints hold the same tensors, bit for bit."""
    ours, theirs = (safetensors.read_directory(path) for path in (first, second))
    if list(ours) != list(theirs):
        sys.exit("the tensors that came back have other names")
    for name, tensor in ours.items():
        if not np.array_equal(tensor.read().view(np.uint16), theirs[name].read().view(np.uint16)):
            sys.exit(f"{name} came back changed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoints are written and deleted again")
    parser.add_argument("--small", action="store_true", help="few layers")
    arguments = parser.parse_args()
    folder = arguments.folder / "convert_memory"
    if folder.exists():
        sys.exit(f"{folder} exists; delete it first")
    source, model, back = folder / "source", folder / "model", folder / "back"
    try:
        count = make_checkpoint(source, SIZES | (SMALL if arguments.small else {}))
        sizes = [path.stat().st_size / 1e9 for path in sorted(source.glob("*.safetensors"))]
        print(f"{count:,} parameters, bf16, shards of {', '.join(f'{size:.2f}' for size in sizes)} GB")
        print(f"{platform.platform()}, jax {jax.__version__}, Python {platform.python_version()}", flush=True)
        there = (f"--from_hf={source}", f"--out={model}")
        again = (f"--to_hf={back}", f"--from={model}", f"--shard_gb={SHARD_BYTES / 1e9}")
        for title, command in (("from_hf", there), ("to_hf", again)):
            seconds, peak = convert(*command)
            print(f"{title:8} {seconds:6.1f} s   peak resident {peak:.2f} GB", flush=True)
        compare(source, back)
        print("all tensors came back bit for bit")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
