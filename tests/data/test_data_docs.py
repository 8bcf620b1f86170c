"""The commands of docs/data.md, on data sets of a few pictures that lie where it says, in the forms that it names."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data.parquet_tables import all_of, pictures, png, write
from judges.misbehaving import JudgeServer, well_behaved

from balcap_jax import data, recaption
from balcap_jax.config import recipes
from balcap_jax.data.columns import FIELDS, PRESETS
from balcap_jax.judges.writers import FORMATS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text()
COUNT = 8


def commands() -> list[list[str]]:
    """The arguments of each command in the blocks that are marked as bash."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What stands for / in the commands, with the data sets below data/."""
    root = tmp_path_factory.mktemp("root")
    keys = [f"key_{i:05d}" for i in range(COUNT)]
    for i in range(2):
        half = slice(4 * i, 4 * i + 4)
        table = {"image": pictures(range(COUNT)[half]), "example_id": keys[half], "description": ["A wall."] * 4}
        write(root / "data" / "docci" / "data" / f"train-0000{i}-of-00002.parquet", table)
    web = {"jpg": [png(i) for i in range(COUNT)], "alt": [f"Alt {i}" for i in range(COUNT)]}
    write(root / "data" / "web" / "part.parquet", web)
    write(root / "all.parquet", 250, group=250)
    forms = {
        "iiw/IIW-400.jsonl": ("docci/images_aar", ".jpg", {"image/key": "{}", "IIW": "A wall."}),
        "docci/docci_descriptions.jsonlines": (
            "docci/images", ".jpg", {"example_id": "{}", "image_file": "{}.jpg", "description": "A wall."},
        ),
        "densefusion/DenseFusion-4V-100k.jsonl": (
            "densefusion/images", ".jpg", {"image_id": "{}", "image_path": "0/{}.jpg", "caption": "A wall."},
        ),
        "": ("pixmo_pictures/00000", ".jpg", {}),
    }  # fmt: skip
    for name, (folder, end, line) in forms.items():
        lines = []
        for i, key in enumerate(keys):
            place = root / "data" / folder / f"{'0/' if 'image_path' in line else ''}{key}{end}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(i))
            place.with_suffix(".txt").write_text("A wall.")
            lines.append(json.dumps({field: value.format(key) for field, value in line.items()}))
        if name:
            (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "data" / name).write_text("\n".join(lines))
    return root


def test_every_command_does_what_it_says(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    ran = []
    with JudgeServer(well_behaved) as server:
        for program, *rest in commands():
            rest = [re.sub(r"(=|^)/data/", rf"\g<1>{root}/data/", text).replace("$JUDGE", server.url) for text in rest]
            if program == "hf":
                continue
            if program == "python":
                assert rest[0] == "-c"
                subprocess.run([sys.executable, *rest], check=True, cwd=root)
                groups = pq.read_metadata(root / "groups.parquet")
                assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [100, 100, 50]
                continue
            assert program == "balcap"
            command, *rest = rest
            ran.append(command)
            if command == "recaption":
                recaption.main([*rest, f"--judge.cache_dir={tmp_path / 'cache'}"])
                out = next(Path(text.partition("=")[2]) for text in rest if text.startswith("--out="))
                assert len(out.read_text().splitlines()) == COUNT
                continue
            given = dict(text.removeprefix("--").partition("=")[::2] for text in rest)
            overrides = {name.removeprefix("config."): value for name, value in given.items() if "config." in name}
            config = recipes.load(given["config"], overrides)
            needs = ["reference_units"] if "data.units" in overrides else []
            found = all_of(data.load(config.data, 0, tokenizer=False, needs=needs))
            assert len(found) == COUNT
            expected = "There is a thing" if needs else "A wall."
            assert all(one["reference"].startswith(expected) for one in found.values())
    assert ran.count("train") == 6
    assert ran.count("recaption") == 4


def test_every_name_is_documented():
    rows = set(re.findall(r"^\| `([a-z0-9_]+)`", TEXT, re.MULTILINE))
    assert set(PRESETS) | set(FORMATS) <= rows
    assert set(FIELDS) <= set(re.findall(r"`([a-z_]+)`", TEXT))
    for form, prompt in FORMATS.items():
        assert re.search(rf"^\| `{form}`.*`{re.escape(prompt)}` \|$", TEXT, re.MULTILINE)
