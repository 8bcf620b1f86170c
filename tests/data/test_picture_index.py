"""Pictures are opened once: a later start looks at sizes and times, and at what is new, changed or was unreadable."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from balcap_jax import data
from balcap_jax.data import images, photos, picture_index


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that were opened since it was last cleared; indices are kept of any number."""
    names, check = [], images.check
    monkeypatch.setattr(images, "check", lambda path: (names.append(Path(path).name), check(path))[1])
    monkeypatch.setattr(picture_index, "_FEW", 1)
    return names


@pytest.fixture
def paths(tmp_path):
    for i in range(60):
        path = tmp_path / "pictures" / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (i, 0, 0)).save(path)
    return {f"{i % 3}/{i}.png": str(tmp_path / "pictures" / f"{i % 3}" / f"{i}.png") for i in range(60)}


def test_only_what_changed_is_opened(tmp_path, paths, opened):
    index = tmp_path / "cache" / "index.json"
    paths |= {"gone.png": str(tmp_path / "gone.png"), "torn.png": str(tmp_path / "torn.png")}
    Path(paths["torn.png"]).write_bytes(b"no picture")
    found = picture_index.problems(paths, index)
    assert set(found) == {"gone.png", "torn.png"}
    assert found["gone.png"] == "no such file"
    assert sorted(opened) == sorted(Path(path).name for path in paths.values())
    assert len(json.loads(index.read_text())["files"]) == 60

    opened.clear()
    assert picture_index.problems(paths, index) == found
    assert sorted(opened) == ["gone.png", "torn.png"]

    # A changed size, a changed time, one that came, one that was mended, and one that went.
    Image.new("RGB", (50, 50), (7, 8, 9)).save(paths["1/1.png"])
    os.utime(paths["2/2.png"], ns=(1, 1))
    Image.new("RGB", (2, 2)).save(paths["gone.png"])
    Image.new("RGB", (2, 2)).save(paths["torn.png"])
    Path(paths["0/3.png"]).unlink()
    opened.clear()
    assert picture_index.problems(paths, index) == {"0/3.png": "no such file"}
    assert sorted(opened) == ["1.png", "2.png", "3.png", "gone.png", "torn.png"]
    opened.clear()
    picture_index.problems(paths, index)
    assert opened == ["3.png"]


def test_an_index_moves_with_its_pictures(tmp_path, paths, opened):
    index = tmp_path / "index.json"
    picture_index.problems(paths, index)
    shutil.move(tmp_path / "pictures", tmp_path / "moved")
    opened.clear()
    moved = {name: str(tmp_path / "moved" / name) for name in paths}
    assert picture_index.problems(moved, index) == {}
    assert opened == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"0/0.png": null}}', "\xff", None])
def test_a_torn_index_is_made_anew(tmp_path, paths, opened, content):
    index = tmp_path / "index.json"
    if content is not None:
        index.write_bytes(content.encode("latin-1"))
    assert picture_index.problems(paths, index) == {}
    assert len(opened) == 60
    opened.clear()
    picture_index.problems(paths, index)
    assert opened == []


def test_where_no_index_can_be_written_all_goes_on(tmp_path, paths, opened, capsys):
    (tmp_path / "file").write_text("")
    assert picture_index.problems(paths, tmp_path / "file" / "index.json") == {}
    assert "cannot be written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if "index" in path.name] == []


def test_captions_are_read_once_and_again_when_they_change(tmp_path, paths, opened, monkeypatch):
    for name, path in paths.items():
        Path(path).with_suffix(".txt").write_text(f"Caption of {name}, naïve \N{SNOWMAN}.")
    monkeypatch.setattr(picture_index, "CACHE", str(tmp_path / "cache"))
    config = {"name": "photos", "data_dir": str(tmp_path / "pictures"), "max_pixels": 0}
    config |= {"validation_share": 0.1, "test_share": 0.1}

    def captions() -> dict[str, str]:
        splits = data.load(config, 0, tokenizer=False)
        return {record.id: record.captions[0] for split in splits[:3] for record in split.records}

    assert captions() == {name: f"Caption of {name}, naïve \N{SNOWMAN}." for name in paths}
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2
    assert not list((tmp_path / "pictures").rglob("*.json"))
    read = []
    monkeypatch.setattr(photos, "read_bytes", lambda path, *limits: (read.append(Path(path).name), b"Another.")[1])
    Path(paths["1/4.png"]).with_suffix(".txt").write_text("One that is longer than it was.")
    opened.clear()
    assert captions()["1/4.png"] == "Another."
    assert (read, opened) == (["4.txt"], [])


def test_few_pictures_leave_no_index(tmp_path, paths):
    assert picture_index.problems(paths, tmp_path / "cache" / "index.json") == {}
    assert not (tmp_path / "cache").exists()


def test_sharegpt4v_takes_no_room_for_pictures_and_finds_those_that_come_later(tmp_path, paths, opened):
    """The set that was built when pictures were missing is that which is opened when they are there."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A caption."}]
    listed = [{"image": name, "conversations": turns} for name in paths]
    (tmp_path / "pictures" / "list.json").write_text(json.dumps(listed))
    for path in paths.values():  # Large ones, so that a copy would show.
        with open(path, "ab") as file:
            file.write(bytes(20_000))
    shutil.move(paths["0/0.png"], tmp_path / "away.png")
    config = {"name": "sharegpt4v", "data_dir": str(tmp_path / "built"), "manual_dir": str(tmp_path / "pictures")}
    config |= {"annotations": "list.json", "validation_share": 0.1, "test_share": 0.1, "max_pixels": 0}
    splits = data.load(config, 0, tokenizer=False)
    assert sum(map(len, splits[:3])) == 59
    assert splits.left_out == (("0/0.png", "no such file"),)
    size = sum(path.stat().st_size for path in (tmp_path / "built").rglob("*") if path.is_file())
    assert size < 0.2 * 60 * 20_000
    opened.clear()
    shutil.move(tmp_path / "away.png", paths["0/0.png"])
    splits = data.load(config, 0, tokenizer=False)
    assert sum(map(len, splits[:3])) == 60
    assert opened == ["0.png"]
