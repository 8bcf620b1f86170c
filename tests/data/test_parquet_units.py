"""What `recaption` wrote about rows of parquet files is joined to them, or read by itself, by their addresses."""

import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from data.parquet_tables import all_of, pictures, pixels, png, settings, write

from balcap_jax import data
from balcap_jax.cli.errors import UserError
from balcap_jax.data import images, same_pictures
from balcap_jax.data.input import LeftOut
from balcap_jax.data.items import items_of
from balcap_jax.data.same_pictures import fields_of

NAMES = [f"data/{shard}.parquet#{row}" for shard in "ab" for row in range(5)]


@pytest.fixture
def folder(tmp_path):
    for shard in range(2):
        table = {
            "image": pictures(range(5 * shard, 5 * shard + 5)),
            "caption": [f"Old {i}." for i in range(5)],
            "prompt": [f"Ask {i}" for i in range(5)],
        }
        write(tmp_path / "set" / "data" / f"{'ab'[shard]}.parquet", table, group=2)
    return tmp_path / "set"


def lines(file, names, start="../set/"):
    file.parent.mkdir(exist_ok=True)
    entries = [{"image": f"{start}{name}", "caption": f"New {name}.", "reference_units": [name]} for name in names]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(file)


def check(examples: dict[str, dict], names) -> None:
    assert sorted(examples) == sorted(names)
    for name, one in examples.items():
        place = NAMES.index(name)
        np.testing.assert_array_equal(one["image"], pixels(place))
        assert (one["reference"], one["captions"]) == (f"New {name}.", [f"New {name}."])
        assert one["reference_units"] == [name]
        assert one["prompt"] == f"Ask {place % 5}"  # A row keeps its own.


def test_lines_are_joined_by_address(tmp_path, folder, capsys):
    units = lines(tmp_path / "out" / "units.jsonl", NAMES[:8])
    with open(units, "a") as file:
        for stranger in ("../set/data/c.parquet#0", "../set/data/a.parquet#5", "../set/data/a.jpg"):
            file.write(json.dumps({"image": stranger, "caption": "x"}) + "\n")
    splits = data.load(settings(folder, units=units), 0, needs=["reference_units"])
    check(all_of(splits), NAMES[:8])
    assert splits.left_out == tuple(LeftOut(name, "no line in units.jsonl") for name in NAMES[8:])
    assert splits.fields == {"reference", "captions", "reference_units"}
    text = (
        "units.jsonl: lines about 8 of 10 pictures; the other 2 are left out; 3 lines are about no picture of parquet"
    )
    assert text in capsys.readouterr().out


def test_lines_about_another_picture_of_the_row_are_not_joined(tmp_path):
    table = {"jpg": pictures(range(5)), "png": pictures(range(5, 10)), "caption": ["Old."] * 5}
    write(tmp_path / "set" / "a.parquet", table)
    units = {}
    for column in ("jpg", "png"):
        found = items_of(tmp_path / "set", "Ask.", columns=f"image={column}")
        units[column] = lines(tmp_path / f"{column}.jsonl", [item.image for item in found], "set/")
        given = settings(tmp_path / "set", units=units[column], columns=f"image={column}")
        assert len(all_of(data.load(given, 0))) == 5
    for column, other in (("jpg", "png"), ("png", "jpg")):
        with pytest.raises(UserError, match=rf"{other}\.jsonl"):
            data.load(settings(tmp_path / "set", units=units[other], columns=f"image={column}"), 0)


def test_files_and_lines_may_be_moved_apart(tmp_path, folder):
    units = lines(tmp_path / "out" / "units.jsonl", NAMES)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder, tmp_path / "elsewhere" / "moved")
    check(all_of(data.load(settings(tmp_path / "elsewhere" / "moved", units=units), 0)), NAMES)


def test_captions_may_come_from_the_lines_alone(tmp_path):
    write(tmp_path / "set" / "a.parquet", {"image": pictures(range(5)), "other": [1] * 5})
    units = lines(tmp_path / "units.jsonl", [f"a.parquet#{i}" for i in range(4)], "set/")
    with open(units, "a") as file:
        file.write(json.dumps({"image": "set/a.parquet#4", "reference_units": ["alone"]}) + "\n")
    splits = data.load(settings(tmp_path / "set", units=units), 0)
    assert {one["reference"] for one in all_of(splits).values()} == {f"New a.parquet#{i}." for i in range(4)}
    assert splits.left_out == (LeftOut("a.parquet#4", "no caption"),)


def test_lines_are_a_data_set_of_their_own(tmp_path, folder, monkeypatch):
    """With data.name=photos: pictures inside parquet files are read like any others, and no row before it is asked."""
    units = lines(tmp_path / "out" / "units.jsonl", [*NAMES, "data/a.parquet#9", "data/c.parquet#0"])
    splits = data.load(settings(units, name="photos"), 0, needs=["reference_units"])
    reasons = {entry.image: entry.reason for entry in splits.left_out}
    assert reasons == {
        "../set/data/a.parquet#9": "the file has 5 rows only",
        "../set/data/c.parquet#0": "no such file",
    }
    examples = all_of(splits)
    assert sorted(examples) == [f"../set/{name}" for name in NAMES]
    for place, name in enumerate(NAMES):
        np.testing.assert_array_equal(examples[f"../set/{name}"]["image"], pixels(place))
        assert examples[f"../set/{name}"]["reference"] == f"New {name}."


def test_what_the_reward_lacks_names_the_command(folder):
    with pytest.raises(
        UserError, match=rf"`python -m balcap_jax\.recaption --images={folder} --out=units\.jsonl"
    ) as told:
        data.load(settings(folder), 0, needs=["reference_units"])
    assert "the data set 'parquet' has none" in str(told.value)


@pytest.mark.parametrize("content", ["", '{"image": "other/a.jpg", "caption": "x"}'])
def test_lines_about_others_are_one_line(tmp_path, folder, content):
    (tmp_path / "units.jsonl").write_text(content)
    with pytest.raises(
        UserError, match=r"no line of .* is about a picture of parquet: .*such as 'data/a\.parquet#0' in"
    ):
        data.load(settings(folder, units=str(tmp_path / "units.jsonl")), 0)


def test_rows_are_listed_as_pictures(tmp_path, folder):
    items = items_of(folder, "Say.")
    assert [item.key for item in items] == NAMES
    assert [item.prompt for item in items] == [f"Ask {i % 5}" for i in range(10)]
    assert items[7].path == folder / "data" / "b.parquet#2"
    assert items[7].entry == {}
    with_texts = items_of(folder / "data" / "b.parquet", "Say.", texts=True)
    assert with_texts[2].entry == {"image": "b.parquet#2", "caption": "Old 2.", "prompt": "Ask 2"}
    table = {"first": [png(i) for i in range(2)], "jpg": [png(i + 5) for i in range(2)], "alt": ["Alt.", None]}
    other = write(tmp_path / "two.parquet", table)
    assert [item.key for item in items_of(other, "Say.")] == ["two.parquet#0", "two.parquet#1"]
    chosen = items_of(other, "Say.", columns="image=first,alt_text=alt", texts=True)
    assert [item.key for item in chosen] == ["two.parquet#0#first", "two.parquet#1#first"]
    assert [item.entry.get("alt_text") for item in chosen] == ["Alt.", None]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(1))
    with pytest.raises(UserError, match=r"--columns names fields of .*pictures is a folder"):
        items_of(tmp_path / "pictures", "Say.", columns="image=first")


# ---- rows that hold other pictures than they did ---------------------------------------------------------------------


def told(file, table, column="image"):
    """Lines about the rows of `table` as `recaption` writes them, with the hashes of their pictures."""
    entries = []
    for row, path in enumerate(f"{table}#{row}#{column}" for row in range(pq.read_metadata(table).num_rows)):
        entry = {"image": path, "caption": f"New {row}.", "reference_units": [f"unit {row}"]}
        entries.append(entry | fields_of(images.read(path)))
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(file)


ORDERS = {
    "reversed": [*range(39, -1, -1)],
    "cut in front": [*range(1, 40)],
    "cut in the middle": [*range(20), *range(21, 40)],
    "one more in front": [40, *range(40)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["parquet", "photos"])
def test_a_file_that_was_written_anew_is_refused(tmp_path, order, form):
    """Joined to its rows, and where the lines are the data set."""
    table = write(tmp_path / "set" / "train.parquet", 40)
    units = told(tmp_path / "units.jsonl", table)
    given = settings(table, units=units) if form == "parquet" else settings(units, name="photos")
    before = all_of(data.load(given, 0))
    assert {int(name.split("#")[1]): one["reference_units"] for name, one in before.items()} == {
        row: [f"unit {row}"] for row in range(40)
    }
    seeds = ORDERS[order]
    write(table, {"image": pictures(seeds), "caption": [f"Caption {seed}." for seed in seeds]})
    with pytest.raises(UserError) as error:
        data.load(given, 0)
    assert f"{table}#" in str(error.value)
    assert f"is another picture than the one that {units} is about" in str(error.value)
    assert "have `recaption` write these lines anew" in str(error.value)


def test_another_file_of_the_name_is_refused_where_the_first_is_gone(tmp_path):
    table = write(tmp_path / "set" / "train.parquet", 20)
    units = told(tmp_path / "units.jsonl", table)
    other = write(tmp_path / "other" / "train.parquet", {"image": pictures(range(40, 60)), "caption": ["A."] * 20})
    (tmp_path / "moved").mkdir()
    shutil.move(table, tmp_path / "moved" / "train.parquet")
    assert len(all_of(data.load(settings(tmp_path / "moved", units=units), 0))) == 20
    with pytest.raises(UserError, match="is another one of that name"):
        data.load(settings(other, units=units), 0)
    lines = [json.loads(line) for line in (tmp_path / "units.jsonl").read_text().splitlines()]
    for line in lines:
        del line["picture"]
    (tmp_path / "units.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(all_of(data.load(settings(other, units=units), 0))) == 20, "taken at their word"


def test_hashes_are_of_the_picture_as_the_judge_saw_it(tmp_path):
    table = write(tmp_path / "train.parquet", 3)
    picture = images.read(f"{table}#2")
    assert fields_of(picture) == {"picture": images.picture_hash(picture)}
    small = images.shrunk(picture, 12)
    assert small.shape != picture.shape
    line = {"image": "train.parquet#2", "caption": "A.", **fields_of(small, 12)}
    assert line["picture_pixels"] == 12
    hashes = {f"{table}#2": same_pictures.hash_in(line)}
    same_pictures.check(hashes, tmp_path / "units.jsonl")
    with pytest.raises(UserError):
        same_pictures.check({f"{table}#1": hashes[f"{table}#2"]}, tmp_path / "units.jsonl")
    assert same_pictures.hash_in({"picture": "a.jpg"}) is None


def test_few_pictures_are_compared_and_none_of_files(tmp_path, monkeypatch):
    table = write(tmp_path / "train.parquet", 100)
    read, asked = images.read, []
    monkeypatch.setattr(images, "read", lambda path: asked.append(path) or read(path))
    hashes = {f"{table}#{row}": same_pictures.Hash(images.picture_hash(pixels(row)), 1 << 20) for row in range(100)}
    same_pictures.check(hashes | {str(tmp_path / "a.png"): same_pictures.Hash("0" * 40, 1)}, tmp_path / "u.jsonl")
    rows = [int(path.rpartition("#")[2]) for path in asked]
    assert len(rows) == 16
    assert (rows[0], rows[-1]) == (0, 99)
    assert max(b - a for a, b in itertools.pairwise(rows)) <= 7
