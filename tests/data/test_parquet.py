"""Parquet files: every row comes out as it went in, from a part of its row group; what cannot be read is named."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.parquet_tables import all_of, pictures, pixels, png, settings, write

from balcap_jax import data
from balcap_jax.cli.errors import UserError
from balcap_jax.data import images, parquet, parquet_files, photos
from balcap_jax.data.in_place import CaptionedPictures
from balcap_jax.data.input import examples, make_dataset, prompts_of

MANY = 20_000


def check(found: dict[str, dict], row: int, name: str = "a.parquet", seed: int | None = None) -> None:
    one = found[f"{name}#{row}"]
    np.testing.assert_array_equal(one["image"], pixels(row if seed is None else seed))
    assert one["captions"] == [one["reference"]]


def test_every_row_comes_out_as_it_went_in(tmp_path, capsys):
    splits = data.load(settings(write(tmp_path / "a.parquet")), 0)
    found = all_of(splits)
    assert len(found) == 20 == sum(map(len, splits[:3]))
    for row in range(20):
        check(found, row)
        assert found[f"a.parquet#{row}"]["reference"] == f"Caption {row}."
    assert {one["prompt"] for one in found.values()} == {photos.PROMPT}
    assert splits.fields == {"reference", "captions"}
    assert capsys.readouterr().out == "parquet: 20 pictures; 1 files, 3 row groups\n"
    assert splits.tokenizer.decode(splits.tokenizer.encode("Caption 3.")) == "Caption 3."


def test_it_is_a_tfds_builder(tmp_path, monkeypatch):
    monkeypatch.setattr("balcap_jax.data.picture_index.CACHE", str(tmp_path / "cache"))
    builder = CaptionedPictures(settings(write(tmp_path / "a.parquet")))
    sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
    sources = builder.as_data_source()
    assert sizes == {name: len(source) for name, source in sources.items()}
    assert sum(sizes.values()) == 20
    one = builder.as_data_source("test")[0]
    assert set(builder.info.features) == set(one)
    builder.download_and_prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]  # Nothing is written.
    with pytest.raises(UserError, match="as_data_source"):
        builder.as_dataset("test")


@pytest.mark.parametrize(
    ("kind", "settings_of_write"),
    [
        (pa.binary(), {}),
        (pa.large_binary(), {}),
        (pa.binary(), {"use_dictionary": False, "compression": "zstd"}),
        (pa.dictionary(pa.int32(), pa.binary()), {}),
        (pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})), {}),
        (pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()}), {"data_page_version": "2.0"}),
    ],
)
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_types_of_columns(tmp_path, kind, settings_of_write, text):
    values = [png(i) for i in range(9)]
    if pa.types.is_list(kind):
        values = [[one] for one in pictures(range(9))]
    elif pa.types.is_struct(kind):
        values = pictures(range(9))
    column = pa.array(values, kind.value_type).dictionary_encode() if pa.types.is_dictionary(kind) else None
    captions = [f"Bild {i % 4}: naïve \N{SNOWMAN} 漢字" for i in range(9)]
    caption = pa.array(captions).dictionary_encode() if pa.types.is_dictionary(text) else pa.array(captions, text)
    table = {"image": pa.array(values, kind) if column is None else column, "caption": caption}
    found = all_of(data.load(settings(write(tmp_path / "a.parquet", table, group=4, **settings_of_write)), 0))
    for row in range(9):
        check(found, row)
        assert found[f"a.parquet#{row}"]["reference"] == captions[row]


def test_pictures_may_be_paths(tmp_path):
    for i in range(4):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    listed = {"image": [f"{i}.png" for i in range(4)], "caption": ["A."] * 4}
    source = write(tmp_path / "tables" / "a.parquet", listed)
    found = all_of(data.load(settings(source, manual_dir=str(tmp_path / "pictures")), 0))
    for row in range(4):
        check(found, row)
    beside = [{"bytes": None, "path": f"../pictures/{i}.png"} for i in range(4)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    write(source, {"image": pa.array(beside, kind), "caption": ["A."] * 4})
    found = all_of(data.load(settings(source), 0))
    for row in range(4):
        check(found, row)


# ---- many files ------------------------------------------------------------------------------------------------------


def test_shards_of_a_folder_and_of_a_glob(tmp_path):
    for shard in range(3):
        seeds = range(10 * shard, 10 * shard + 10)
        rows = {"image": pictures(seeds), "caption": [f"Caption {i}." for i in seeds]}
        write(tmp_path / "set" / "data" / f"train-0000{shard}-of-00003.parquet", rows)
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", 5)
    write(tmp_path / "set" / ".cache" / "half.parquet", 5)
    found = all_of(data.load(settings(tmp_path / "set"), 0))
    assert len(found) == 35
    for shard in range(3):
        for row in range(10):
            check(found, row, f"data/train-0000{shard}-of-00003.parquet", 10 * shard + row)
    found = all_of(data.load(settings(tmp_path / "set" / "*" / "train-*"), 0))
    assert len(found) == 30
    check(found, 9, "data/train-00002-of-00003.parquet", 29)


def test_a_row_stays_in_its_split_whatever_files_come(tmp_path):
    write(tmp_path / "b.parquet", 40)

    def homes() -> dict[str, int]:
        splits = data.load(settings(tmp_path), 0)
        return {name: i for i, part in enumerate(splits[:3]) for name in all_of((part, (), ()))}

    before = homes()
    assert set(before.values()) == {0, 1, 2}
    write(tmp_path / "a.parquet", 40)
    after = homes()
    assert len(after) == 80
    assert {name: home for name, home in after.items() if name in before} == before
    # The same rule as for photographs, by the same names.
    assert all(photos.split_of(name, 0.2, 0.2) == ("train", "validation", "test")[home] for name, home in after.items())


@pytest.mark.parametrize("chosen", ["", "id=key"])
def test_rows_of_one_picture_are_in_one_split(tmp_path, chosen, capsys):
    rows = {
        "image": pictures([i // 3 for i in range(60)], None if chosen else [f"{i // 3}.png" for i in range(60)]),
        "caption": [f"Caption {i}." for i in range(60)],
        "key": [i // 3 for i in range(60)],
    }
    splits = data.load(settings(write(tmp_path / "a.parquet", rows), columns=chosen), 0)
    assert "parquet: 20 pictures in 60 rows;" in capsys.readouterr().out
    homes = [{int(name.partition("#")[2]) // 3 for name in all_of((part, (), ()))} for part in splits[:3]]
    assert sorted(set.union(*homes)) == list(range(20))
    assert sum(map(len, homes)) == 20  # None is in two.
    alone = data.load(settings(tmp_path / "a.parquet", columns="id="), 0)
    assert "parquet: 60 pictures;" in capsys.readouterr().out
    assert sum(map(len, alone[:3])) == 60


def test_names_that_tell_no_pictures_apart_are_one_line(tmp_path):
    source = write(tmp_path / "a.parquet", {"image": pictures(range(9), ["image.png"] * 9), "caption": ["A."] * 9})
    with pytest.raises(
        UserError, match=r"1 pictures in 9 rows are too few, as the column 'image\.path' names them; .*id="
    ):
        data.load(settings(source), 0)
    assert len(all_of(data.load(settings(source, columns="id="), 0))) == 9


def test_empty_files_and_row_groups_take_no_part(tmp_path):
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    with pq.ParquetWriter(tmp_path / "b.parquet", schema) as writer:
        for count in (0, 2, 0, 3, 0):
            rows = {"image": pictures(range(count)), "caption": [f"{i}" for i in range(count)]}
            writer.write_table(pa.table(rows, schema))
    write(tmp_path / "a.parquet", {"image": pa.array([], schema.field(0).type), "caption": pa.array([], pa.string())})
    found = all_of(data.load(settings(tmp_path), 0))
    assert sorted(found) == [f"b.parquet#{i}" for i in range(5)]
    for row, seed in enumerate([0, 1, 0, 1, 2]):
        check(found, row, "b.parquet", seed)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(UserError, match=r"no row in .*: 1 parquet files without rows"):
        data.load(settings(tmp_path), 0)


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path.write_bytes(b""), r"b\.parquet is empty; download it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"b\.parquet is no whole parquet file .*download it"),
        (lambda path: path.write_text("version https://git-lfs"), r"b\.parquet is no whole parquet file"),
        (lambda path: write(path, {"image": pictures([0])}), r"b\.parquet has the columns image, and .*a\.parquet has"),
        (
            lambda path: write(path, {"image": pictures([0]), "caption": [3]}),
            r"b\.parquet holds numbers in the column 'caption', and .*a\.parquet holds text; give files of one form",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_one_line(tmp_path, spoil, named):
    write(tmp_path / "a.parquet")
    spoil(write(tmp_path / "b.parquet"))
    with pytest.raises(UserError, match=named) as caught:
        data.load(settings(tmp_path), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nothing.parquet", "none-*.parquet", "."])
def test_no_files_are_one_line(tmp_path, source):
    with pytest.raises(UserError, match=r"config field 'data\.data_dir': no parquet file at .*a folder or a glob"):
        data.load(settings(tmp_path / source), 0)


def test_rows_that_cannot_be_read_are_left_out_and_named(tmp_path, capsys):
    rows = {
        "image": pictures(range(40)),
        "caption": ["Fine."] * 40,
        "reference_units": [["unit"]] * 40,
        "questions": ["[]"] * 40,
    }
    rows["image"][1] = None
    rows["image"][2] = {"bytes": b"no picture", "path": None}
    rows["image"][3] = {"bytes": png(3)[:60], "path": None}
    rows["caption"][4] = None
    rows["caption"][5] = " \n"
    rows["reference_units"][6] = ["", "x"]
    rows["questions"][7] = "[{"
    rows["image"][8] = {"bytes": None, "path": "https://host/8.png"}
    splits = data.load(settings(write(tmp_path / "a.parquet", rows)), 0)
    assert splits.left_out == ()
    assert list(splits.damaged) == []  # Nothing was read so far.
    assert set(all_of(splits)) == {f"a.parquet#{i}" for i in (0, *range(9, 40))}
    reasons = {int(entry.image.removeprefix("a.parquet#")): entry.reason for entry in splits.damaged}
    assert reasons[1] == "no picture"
    assert reasons[2].startswith("no picture in a known format")
    assert reasons[3].startswith("damaged: ")
    assert reasons[4] == reasons[5] == "no caption"
    assert reasons[6].startswith('"reference_units" must be a list of texts that are not empty')
    assert reasons[7].startswith("a field that should be JSON is none")
    assert reasons[8] == "a URL and no picture"
    assert sorted(reasons) == list(range(1, 9))
    assert capsys.readouterr().err.count("left out: a.parquet#") == 8


def test_rows_of_a_damaged_row_group_are_left_out_and_named(tmp_path):
    plain = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write(tmp_path / "a.parquet", 30, group=10, **plain)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)
    splits = data.load(settings(path), 0)
    assert {int(name.partition("#")[2]) for name in all_of(splits)} == {*range(10), *range(20, 30)}
    assert sorted(entry.image for entry in splits.damaged) == [f"a.parquet#{i}" for i in range(10, 20)]
    assert {entry.reason.partition(":")[0] for entry in splits.damaged} == {"its row group 1 is damaged"}


def test_stand_ins_depend_on_the_data_alone(tmp_path):
    rows = {"image": [None if i % 5 == 2 else one for i, one in enumerate(pictures(range(40)))], "caption": ["A."] * 40}
    source = settings(write(tmp_path / "a.parquet", rows))
    forwards, backwards = data.load(source, 0).train, data.load(source, 0).train
    one = [forwards[i]["id"] for i in range(len(forwards))]
    assert one == [backwards[i]["id"] for i in reversed(range(len(forwards)))][::-1]
    assert len(set(one)) < len(one)


# ---- size and position -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """20,000 rows of 5 KB, of which each is told by its caption; written 100 at a time."""
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    rest = np.random.default_rng(0).bytes(5000)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, MANY, 100):
            rows = range(start, start + 100)
            column = [{"bytes": png(i % 50) + rest, "path": f"{i}.png"} for i in rows]
            writer.write_table(pa.table({"image": column, "caption": [f"Number {i}." for i in rows]}, schema))
    assert path.stat().st_size > 100e6
    return path


def resident(name: str) -> float:
    """MB of this process: VmRSS, or VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def test_20000_rows_open_in_seconds_and_are_never_in_memory_at_once(many):
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts from here.
    before, start = resident("VmRSS"), time.process_time()
    splits = data.load(settings(many, validation_share=0.05, test_share=0.05), 0, tokenizer=False)
    assert time.process_time() - start < 5
    assert sum(map(len, splits[:3])) == MANY
    batches = make_dataset(splits.train, batch_size=8, seed=0, threads=2)
    for _ in range(25):
        batch = next(batches)
        for name, image, caption in zip(batch["id"], batch["image"], batch["reference"], strict=True):
            row = int(name.partition("#")[2])
            np.testing.assert_array_equal(image, pixels(row % 50))
            assert caption == f"Number {row}."
    in_order = examples(splits.validation)
    assert len(in_order) == len(splits.validation) > 900
    assert resident("VmHWM") - before < 60  # of a file of 107 MB


def test_the_position_inside_a_file_is_exact(many):
    """The batches after a stop are those that would have come, bit for bit; the state is small, and JSON."""
    source = settings(many)

    def batches():
        return make_dataset(data.load(source, 0, tokenizer=False).train, batch_size=4, seed=3, threads=2)

    whole = batches()
    [next(whole) for _ in range(5)]
    state = json.dumps(whole.get_state())
    assert len(state) < 500
    expected = [next(whole) for _ in range(5)]
    resumed = batches()
    resumed.set_state(json.loads(state))
    for batch in expected:
        again = next(resumed)
        assert again["id"] == batch["id"]
        assert again["reference"] == batch["reference"]
        for one, other in zip(again["image"], batch["image"], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_row_reads_a_part_of_its_row_group(tmp_path, monkeypatch):
    """Blocks are small however large the row group is, and a row behind the last one goes on from there."""
    monkeypatch.setattr(parquet_files, "_BLOCK", 1000)
    files = parquet_files.ParquetFiles([write(tmp_path / "a.parquet", 300, group=300)], tmp_path)
    started = []
    cursor = parquet_files._Cursor

    def counted(of: parquet_files.ParquetFiles, file: int, group: int, columns: list[str]) -> parquet_files._Cursor:
        if of is files:  # Threads that read ahead for an earlier test may be at work still.
            started.append(group)
        return cursor(of, file, group, columns)

    monkeypatch.setattr(parquet_files, "_Cursor", counted)
    rows = parquet_files.Rows(files, ["image", "caption"])
    assert rows[7]["caption"] == "Caption 7."
    assert all(len(batch) < 20 for batch in rows._kept.values())
    assert [rows[i]["caption"] for i in (200, 201, 299)] == [f"Caption {i}." for i in (200, 201, 299)]
    assert started == [0]
    assert rows[100]["image"]["bytes"] == png(100)
    assert started == [0, 0]


def test_the_place_of_a_row_comes_from_the_footers(tmp_path):
    write(tmp_path / "a.parquet", 10, group=4)
    write(tmp_path / "b.parquet", 5, group=3)
    files = parquet_files.ParquetFiles([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path)
    places = [files.place(row) for row in (0, 3, 4, 9, 10, 12, 13, 14)]
    assert places == [(0, 0, 0), (0, 0, 3), (0, 1, 0), (0, 2, 1), (1, 0, 0), (1, 0, 2), (1, 1, 0), (1, 1, 1)]
    assert [files.name(row) for row in (9, 10, 14)] == ["a.parquet#9", "b.parquet#0", "b.parquet#4"]
    assert [files.row_of(1, 4), files.row_of(1, 5), files.row_of(0, 9)] == [14, None, 9]


def test_prompts_are_known_without_pictures(tmp_path, monkeypatch):
    rows = {"image": pictures(range(9)), "caption": ["A."] * 9, "prompt": ["Say it."] * 6 + [None, "", "Sing."]}
    train = data.load(settings(write(tmp_path / "a.parquet", rows), validation_share=0.0, test_share=0.0), 0).train
    monkeypatch.setattr(images, "read", lambda path: pytest.fail("a picture was opened"))
    counted = prompts_of(train)
    assert next(iter(counted)) == "Say it."
    assert sum(counted.values()) == len(train)
    assert set(counted) <= {"Say it.", photos.PROMPT, "Sing."}


def test_an_address_stands_for_a_path(tmp_path):
    """A picture in a row is read, and said to be missing, wherever a path is."""
    path = write(tmp_path / "a.parquet", {"jpg": [png(i) for i in range(3)], "second": [png(9 - i) for i in range(3)]})
    np.testing.assert_array_equal(images.read(f"{path}#2"), pixels(2))
    np.testing.assert_array_equal(images.read(Path(f"{path}#2#second")), pixels(7))
    for wrong, reason in (
        (f"{path}#3", "the file has 3 rows only"),
        (f"{tmp_path}/b.parquet#0", "no such file"),
        (f"{tmp_path}#0", "no such file"),
        (f"{path}#0#third", "the file has no column 'third'"),
    ):
        for look in (images.read, images.check):
            with pytest.raises(images.ImageError, match=reason):
                look(wrong)
    images.check(f"{path}#2")
    os.utime(path, ns=(1, 1))
    write(path, {"jpg": [png(5)]})
    np.testing.assert_array_equal(images.read(f"{path}#0"), pixels(5))


def test_a_split_has_rows_and_no_records(many):
    train = data.load(settings(many), 0, tokenizer=False).train
    assert isinstance(train, parquet.TableSplit)
    assert train.rows.dtype == np.int64
    assert train.rows.nbytes == 8 * len(train)
