"""What `doctor` says of folders, JSONL and parquet files that cannot be trained on as they are."""

import errno
import json
import os
import tarfile

import pytest
from data.parquet_tables import pictures, png, write
from doctor.set_up import assert_fault
from ml_collections import ConfigDict

from balcap_jax import data
from balcap_jax.cli.errors import UserError
from balcap_jax.data import images, sharegpt4v
from balcap_jax.data.same_pictures import fields_of
from balcap_jax.doctor import pictures as check
from balcap_jax.doctor.findings import OK, UNCHECKED, Finding

ROWS = 60


def of_data(sound, name: str, source, **more: object) -> dict[str, Finding]:
    fields = {"data__name": name, "data__data_dir": source, "data__manual_dir": "", "data__units": ""} | more
    lexical = {"rewards__name": "lexical", "rewards__weights": "1", "checkpoint__best_metric": "rouge_l"}
    config: ConfigDict = sound.config(**lexical, **fields)
    return {finding.check: finding for finding in check.look(config, 96, tokenizer=False)[0]}


def table(path, without=(), pictureless=()):
    """Rows of which some have no caption, or no picture."""
    rows = {"image": pictures(range(ROWS)), "caption": [f"Caption {i}." for i in range(ROWS)]}
    for row in without:
        rows["caption"][row] = None
    for row in pictureless:
        rows["image"][row] = None
    return write(path, rows)


def test_a_split_of_which_nothing_can_be_read_says_why(sound, tmp_path):
    finding = of_data(sound, "parquet", table(tmp_path / "a.parquet", range(ROWS - 1)))["data"]
    assert_fault(
        finding, "data", "pictures of a split can be read, such as a.parquet#", "mend these, or give other data"
    )
    assert finding.found.endswith("(no caption)")


@pytest.mark.parametrize(
    ("lacking", "remedy"),
    [("without", "write these captions, or have `recaption` write"), ("pictureless", "take these rows out")],
)
def test_rows_that_lack_something_are_no_damage(sound, tmp_path, lacking, remedy):
    finding = of_data(sound, "parquet", table(tmp_path / "a.parquet", **{lacking: range(0, ROWS, 30)}))["data"]
    assert finding.verdict == OK, "a tenth may be left out"
    assert " of them left out: a.parquet#" in finding.found
    finding = of_data(sound, "parquet", table(tmp_path / "b.parquet", **{lacking: range(0, ROWS, 3)}))["data"]
    assert_fault(finding, "data", " samples that were opened are left out: b.parquet#", remedy)
    assert "damaged" not in finding.found


def test_captions_that_are_empty_are_to_be_written(sound, tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.txt").write_text("A thing." if number % 2 else " \n")
    finding = of_data(sound, "photos", tmp_path)["data"]
    assert_fault(
        finding, "data", "15 of 30 pictures are left out: 0.png (empty caption)", "write these captions, or have"
    )
    for number in range(0, 30, 2):
        (tmp_path / f"{number}.txt").write_text("A thing.")
        (tmp_path / f"{number}.png").write_bytes(b"")
    remedy = "fetch these pictures again, or take them out of the folder"
    assert_fault(of_data(sound, "photos", tmp_path)["data"], "data", "15 of 30 pictures are left out: 0.png", remedy)


def test_lines_that_could_not_be_written_are_not_asked_for_again(sound, tmp_path):
    source = table(tmp_path / "a.parquet")
    lines = [{"image": f"a.parquet#{i}", "caption": "A.", "reference_units": ["a"]} for i in range(40)]
    units, errors = tmp_path / "fused.jsonl", tmp_path / "fused.errors.jsonl"
    units.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finding = of_data(sound, "parquet", source, data__units=units)["references"]
    assert_fault(
        finding, "references", "fused.jsonl has no line about 20 of 60 samples", "run the same `recaption` again"
    )
    failed = [{"image": f"a.parquet#{i}", "error": "no alt_text to fuse"} for i in range(40, 60)]
    errors.write_text("".join(json.dumps(line) + "\n" for line in failed))
    finding = of_data(sound, "parquet", source, data__units=units)["references"]
    found = "fused.errors.jsonl names 20, such as a.parquet#40 (no alt_text to fuse)"
    assert_fault(
        finding, "references", found, "run the same `recaption` with --retry_errors, or take these samples out"
    )


def test_lines_about_rows_that_moved(sound, tmp_path):
    source, units = table(tmp_path / "a.parquet"), tmp_path / "units.jsonl"
    lines = [
        {
            "image": f"a.parquet#{i}",
            "caption": "A.",
            "reference_units": ["a"],
            **fields_of(images.read(f"{source}#{i}")),
        }
        for i in range(ROWS)
    ]
    units.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert of_data(sound, "parquet", source, data__units=units)["references"].verdict == OK
    write(source, {"image": pictures(range(ROWS - 1, -1, -1)), "caption": ["A."] * ROWS})
    found = of_data(sound, "parquet", source, data__units=units)
    assert_fault(found["references"], "references", "is another picture than the one that", "have `recaption` write")
    assert found["data"].verdict == OK


def test_units_that_are_not_there_are_a_file(sound, tmp_path):
    found = of_data(sound, "parquet", table(tmp_path / "a.parquet"), data__units=tmp_path / "none.jsonl")
    assert_fault(found["references"], "references", "none.jsonl cannot be read", "give the JSONL file that `recaption`")


def test_the_wrong_form_names_the_right_one(sound, tmp_path):
    table(tmp_path / "set" / "a.parquet")
    finding = of_data(sound, "photos", tmp_path / "set")["data"]
    assert_fault(finding, "data", "has parquet files and no picture", "give --config.data.name=parquet")
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "caption": "A."}\n')
    finding = of_data(sound, "parquet", tmp_path / "list.jsonl")["data"]
    assert_fault(finding, "data", "list.jsonl is no whole parquet file", "data.name=photos for a JSONL file")
    (tmp_path / "set" / "a.png").write_bytes(png(0))
    (tmp_path / "set" / "a.txt").write_text("A.")
    finding = of_data(sound, "photos", tmp_path / "set", data__columns="docci")["data"]
    assert_fault(finding, "data", "has pictures beside their captions", "leave it empty, or give data.name=parquet")
    finding = of_data(sound, "photos", tmp_path / "none")["data"]
    assert_fault(finding, "data", "no such folder or file", "name the folder of your photographs")


def test_folders_of_another_form_say_what_they_are(sound, tmp_path):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "00000.tar", "w"):
        pass
    for name in ("photos", "parquet"):
        for source in (tmp_path / "set", tmp_path / "set" / "00000.tar"):
            finding = of_data(sound, name, source)["data"]
            found = f"00000.tar is a .tar file, and data.name={name} reads none"
            assert_fault(finding, "data", found, "unpack the .tar files (`tar -xf`), and give the folder")
    (tmp_path / "set" / "a.png").write_bytes(png(0))
    (tmp_path / "set" / "a.txt").write_text("A.")
    finding = of_data(sound, "photos", tmp_path / "set")["data"]
    assert ".tar" not in finding.found + finding.remedy, "a picture is there, and so the tar is something else"
    (tmp_path / "set" / "00000.tar").unlink()
    finding = of_data(sound, "parquet", tmp_path / "set")["data"]
    assert_fault(finding, "data", "has pictures and no parquet file", "give --config.data.name=photos")


@pytest.mark.parametrize("place", ["*.tar", "0000?.tar", "0000*", "{00000..00001}.tar"])
@pytest.mark.parametrize("name", ["photos", "parquet"])
def test_patterns_of_tar_files_say_what_they_are(sound, tmp_path, name, place):
    """As webdataset names its parts; training says the same line."""
    for number in range(2):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w"):
            pass
    finding = of_data(sound, name, tmp_path / place)["data"]
    assert_fault(finding, "data", f".tar is a .tar file, and data.name={name} reads none", "unpack the .tar files")
    config = sound.config(data__name=name, data__manual_dir="", data__data_dir=tmp_path / place)
    with pytest.raises(UserError) as raised:
        data.load(config.data, 96, tokenizer=False)
    assert str(raised.value) == f"{finding.found}; {finding.remedy}"


def test_a_parquet_file_beside_a_tar_file_is_read(sound, tmp_path):
    table(tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    for place in (tmp_path, tmp_path / "*.parquet"):
        assert of_data(sound, "parquet", place)["data"].verdict == OK


def test_a_pointer_in_place_of_a_parquet_file(sound, tmp_path):
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 496721\n")
    finding = of_data(sound, "parquet", tmp_path)["data"]
    assert_fault(finding, "data", "a.parquet is a pointer of Git LFS", "run `git lfs pull` there, or fetch the file")


def test_an_index_that_cannot_be_written(sound, tmp_path, monkeypatch):
    def refused(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(sharegpt4v, "make_directory", refused)
    config = sound.config(data__data_dir=tmp_path / "new")
    finding = check.look(config, 96, tokenizer=False)[0][0]
    found = f"cannot prepare the data set sharegpt4v in {tmp_path / 'new'}: [Errno 30] Read-only file system"
    assert_fault(finding, "data", found, "set data.data_dir to a disk that can be written to")


def test_a_place_that_nobody_named_is_not_looked_at(sound):
    for name in ("photos", "parquet"):
        found = of_data(sound, name, check.DATA_DIR)
        assert {finding.verdict for finding in found.values()} == {UNCHECKED}
        assert all("data.data_dir" in finding.found for finding in found.values())
