"""Seconds to open parquet files with their pictures, peak memory of reading batches from them, and milliseconds a row.

    python benchmarks/parquet.py --folder=/tmp/parquet

Makes files of 200 and of 20,000 rows with the same pictures (12 KB each), the larger one in row groups of 100, as
the library `datasets` writes them, and in one row group alone. Each is opened and read in a process of its own: batches
of 16 in shuffled order, as training reads them. Nothing is trained.
"""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAPTION = "A picture of noise in front of nothing in particular. " * 16
SCHEMA = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
DISTINCT = 200  # pictures
READ = """
import json, sys, time
from pathlib import Path
from balcap_jax import data
from balcap_jax.data.input import make_dataset

def peak():  # That of getrusage would be the parent's, where this is larger.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

config, batches = json.loads(sys.argv[1]), int(sys.argv[2])
imported, start, cpu = peak(), time.perf_counter(), time.process_time()
splits = data.load(config, 0, tokenizer=False)
opened, opened_cpu, open_mb = time.perf_counter() - start, time.process_time() - cpu, peak()
iterator = make_dataset(splits.train, batch_size=16, seed=0, threads=2)
start, cpu = time.perf_counter(), time.process_time()
for _ in range(batches):
    next(iterator)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"open": opened, "open_cpu": opened_cpu, "row_ms": seconds / batches / 16 * 1e3,
                  "row_cpu_ms": cpu / batches / 16 * 1e3, "imports_mb": imported, "open_mb": open_mb, "mb": peak()}))
"""


def make(path: Path, rows: int, group: int) -> None:
    """A file with `rows` rows in row groups of `group`."""
    contents = []
    for seed in range(DISTINCT):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (120, 160, 3), np.uint8)).save(file, "jpeg")
        contents.append(file.getvalue())
    aside = path.with_suffix(".part")
    with pq.ParquetWriter(aside, SCHEMA, use_dictionary=False) as writer:
        for start in range(0, rows, group):
            numbers = range(start, min(start + group, rows))
            column = [{"bytes": contents[i % DISTINCT], "path": f"{i:08d}.jpg"} for i in numbers]
            captions = [f"Number {i}. {CAPTION}" for i in numbers]
            writer.write_table(pa.table({"image": column, "caption": captions}, SCHEMA), row_group_size=group)
    aside.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--folder", type=Path, required=True, help="made, and kept for the next time")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    # The last takes seconds a row: each is read from the start of the one row group on.
    for rows, group, batches in ((200, 100, args.batches), (args.rows, 100, args.batches), (args.rows, args.rows, 2)):
        path = args.folder / f"{rows}-rows-in-groups-of-{group}.parquet"
        if not path.exists():
            make(path, rows, group)
        config = {"name": "parquet", "data_dir": str(path), "max_pixels": 0}
        config |= {"validation_share": 0.05, "test_share": 0.05}
        command = [sys.executable, "-c", READ, json.dumps(config), str(batches)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{rows} rows in row groups of {group} ({path.stat().st_size / 2**20:.0f} MiB): open in "
            f"{found['open']:.2f} s ({found['open_cpu']:.2f} s of the processor), {found['row_ms']:.1f} ms a row "
            f"({found['row_cpu_ms']:.1f} of the processor) over {batches} batches; peak memory {found['mb']:.0f} MB, "
            f"{found['open_mb']:.0f} when open, {found['imports_mb']:.0f} after the imports",
            flush=True,
        )


if __name__ == "__main__":
    main()
