"""Seconds until a data set of many pictures is open, at the first start and at later ones, and the disk that it takes.

    python benchmarks/start_of_data.py --pictures=20000 --folder=/tmp/pictures

Makes that many small JPEGs with captions in the forms of `photos` (a folder with .txt files, a JSONL file) and of
ShareGPT4V, and opens each form in two processes, one after the other. Nothing is trained.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PER_FOLDER = 1000
CAPTION = "A picture of noise in front of nothing in particular. " * 16  # ShareGPT4V's have 940 characters
OPEN = """
import json, resource, sys, time
from balcap_jax import data
start, cpu = time.perf_counter(), time.process_time()
splits = data.load(json.loads(sys.argv[1]), 0, tokenizer=False)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "pictures": sum(map(len, splits[:3])),
                  "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def make(folder: Path, count: int) -> None:
    """Pictures in folders of 1000, a caption beside each, captions.jsonl beside the folders, and ShareGPT4V's JSON."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    (folder / "list").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / "one.jpg")
    content, lines, entries = (folder / "one.jpg").read_bytes(), [], []
    (folder / "one.jpg").unlink()
    for i in range(count):
        name = f"coco/{i // PER_FOLDER:04d}/{i:012d}.jpg"
        path, caption = folder / "pictures" / name, f"Number {i}. {CAPTION}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(caption)
        lines.append(json.dumps({"image": f"../pictures/{name}", "caption": caption, "reference_units": ["noise"]}))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": caption}]
        entries.append({"id": str(i), "image": name, "conversations": turns})
    (folder / "list" / "captions.jsonl").write_text("\n".join(lines))
    (folder / "pictures" / "list.json").write_text(json.dumps(entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, required=True, help="made, and kept for the next time")
    args = parser.parse_args()
    if not args.folder.exists():
        make(args.folder, args.pictures)
    built = args.folder / "built"
    shared = {"validation_share": 0.05, "test_share": 0.05, "max_pixels": 0, "units": ""}
    pictures = str(args.folder / "pictures")
    forms = {
        "photos, a folder": {"name": "photos", "data_dir": pictures},
        "photos, JSONL": {"name": "photos", "data_dir": str(args.folder / "list" / "captions.jsonl")},
        "sharegpt4v": {
            "name": "sharegpt4v", "data_dir": str(built), "manual_dir": pictures, "annotations": "list.json",
        },
    }  # fmt: skip
    for form, config in forms.items():
        for start in ("first", "second"):
            command = [sys.executable, "-c", OPEN, json.dumps(shared | config)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
            figures = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{form}, {start} start: {figures['pictures']} pictures in {figures['seconds']:.2f} s "
                f"({figures['cpu']:.2f} s of the processor), {figures['mb']:.0f} MB resident",
                flush=True,
            )
    size = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    originals = sum(path.stat().st_size for path in (args.folder / "pictures").rglob("*.jpg"))
    print(f"sharegpt4v takes {size / 2**20:.1f} MiB beside {originals / 2**20:.1f} MiB of pictures")


if __name__ == "__main__":
    main()
