"""What `recaption` wrote about pictures is joined to any data set, by path or by name; what is left over is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balcap_jax import data
from balcap_jax.cli.errors import UserError
from balcap_jax.data.input import examples

COUNT = 8
NAMES = [f"coco/train2017/{i}.jpg" for i in range(COUNT)]


@pytest.fixture
def manual(tmp_path):
    """ShareGPT4V with two entries about picture 0, and the same pictures with a .txt each."""
    folder = tmp_path / "sg4v"
    (folder / "coco/train2017").mkdir(parents=True)
    entries = []
    for i, name in enumerate([*NAMES, NAMES[0]]):
        pixels = np.random.default_rng(i % COUNT).integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"Text {i}.")
        turns = [{"from": "human", "value": f"<image>\nPrompt {i}"}, {"from": "gpt", "value": f"Old {i}."}]
        entries.append({"id": str(i), "image": name, "conversations": turns})
    (folder / "list.json").write_text(json.dumps(entries))
    return folder


def settings(tmp_path, manual, form, **changes) -> dict:
    shared = {"validation_share": 0.3, "test_share": 0.3, "max_pixels": 0, "name": form, "data_dir": str(manual)}
    if form == "sharegpt4v":
        shared |= {"data_dir": str(tmp_path / "built"), "manual_dir": str(manual), "annotations": "list.json"}
    return shared | changes


def write(file: Path, names, *, start: str = "") -> str:
    file.parent.mkdir(exist_ok=True)
    lines = (
        {"image": f"{start}{name}", "prompt": "Theirs", "caption": f"New {name}.", "reference_units": [name, "u"]}
        for name in names
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def all_of(splits) -> list[dict]:
    return sorted((one for part in splits[:3] for one in examples(part)), key=lambda one: one["id"])


@pytest.mark.parametrize("form", ["photos", "sharegpt4v"])
def test_references_and_units_are_joined_by_path(tmp_path, manual, form, capsys):
    units = write(tmp_path / "out" / "units.jsonl", NAMES[:6], start="../sg4v/")
    with Path(units).open("a") as file:
        file.write(json.dumps({"image": "../elsewhere/9.jpg", "caption": "Another.", "reference_units": ["x"]}))
    splits = data.load(settings(tmp_path, manual, form, units=units), 0, needs=["reference_units"])
    found = all_of(splits)
    assert len(found) == (7 if form == "sharegpt4v" else 6)
    for one in found:
        name = one["id"].partition("#")[0]
        assert (one["reference"], one["captions"]) == (f"New {name}.", [f"New {name}."])
        assert one["reference_units"] == [name, "u"]
    prompts = {one["prompt"] for one in found}
    # A sample keeps its own prompt.
    assert prompts == ({f"Prompt {i}" for i in (*range(6), 8)} if form == "sharegpt4v" else {data.photos.PROMPT})
    out = capsys.readouterr().out
    assert "units.jsonl: lines about 6 of 8 pictures; the other 2 are left out; 1 lines are about no picture" in out
    assert [tuple(one) for one in splits.left_out] == [(name, "no line in units.jsonl") for name in NAMES[6:]]


def test_pictures_and_lines_may_be_moved_apart(tmp_path, manual):
    """The index of ShareGPT4V too is of names, and finds the pictures in their new folder."""
    units = write(tmp_path / "out" / "units.jsonl", NAMES, start="../sg4v/")
    before = all_of(data.load(settings(tmp_path, manual, "sharegpt4v", units=units), 0))
    shutil.move(manual, tmp_path / "moved")
    (tmp_path / "far").mkdir()
    units = shutil.move(units, tmp_path / "far" / "units.jsonl")
    after = all_of(data.load(settings(tmp_path, tmp_path / "moved", "sharegpt4v", units=str(units)), 0))
    assert len(after) == COUNT + 1
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old.pop("image"), new.pop("image"))
        assert old == new


def test_lines_about_pictures_belong_to_copies_of_them(tmp_path, manual, capsys):
    """The first ones are still there. One of the same name and size that shows something else is another picture."""
    units = write(tmp_path / "out" / "units.jsonl", NAMES, start="../first/")
    shutil.copytree(manual, tmp_path / "first")
    for i, other in ((1, b"\0"), (2, b"\0\0")):
        content = (manual / NAMES[i]).read_bytes()
        (tmp_path / "first" / NAMES[i]).write_bytes(content[:99] + other + content[100:])
    splits = data.load(settings(tmp_path, manual, "photos", units=units), 0, needs=["reference_units"])
    found = {one["id"]: one["reference_units"] for one in all_of(splits)}
    assert found == {name: [name, "u"] for name in (NAMES[0], *NAMES[3:])}
    assert "lines about 6 of 8 pictures; the other 2 are left out; 2 lines are about no pic" in capsys.readouterr().out


@pytest.mark.parametrize("listed", [False, True])
def test_captions_may_come_from_the_lines_alone(tmp_path, manual, listed):
    for name in NAMES:
        (manual / name).with_suffix(".txt").unlink()
    if listed:
        (manual / "captions.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in NAMES))
    units = Path(write(tmp_path / "units.jsonl", NAMES[1:], start="sg4v/"))
    with units.open("a") as file:
        file.write(json.dumps({"image": f"sg4v/{NAMES[0]}", "reference_units": ["alone"]}))
    splits = data.load(settings(tmp_path, manual, "photos", units=str(units)), 0)
    assert [one["reference"] for one in all_of(splits)] == [f"New {name}." for name in NAMES[1:]]
    assert [tuple(one) for one in splits.left_out] == [(NAMES[0], "no caption")]


def test_a_link_to_a_picture_is_that_picture(tmp_path, manual):
    (tmp_path / "links").mkdir()
    for name in NAMES:
        (tmp_path / "links" / Path(name).name).symlink_to(manual / name)
    units = write(tmp_path / "links" / "units.jsonl", [Path(name).name for name in NAMES])
    found = all_of(data.load(settings(tmp_path, manual, "photos", units=units), 0))
    assert [one["reference_units"] for one in found] == [[Path(name).name, "u"] for name in NAMES]


def test_later_lines_add_to_earlier_ones(tmp_path, manual):
    units = Path(write(tmp_path / "sg4v" / "units.jsonl", NAMES))
    question = {"question": "Which?", "choices": ["a", "b"], "answer": "b"}
    with units.open("a") as file:
        file.writelines(json.dumps({"image": name, "questions": [question]}) + "\n" for name in NAMES)
    splits = data.load(settings(tmp_path, manual, "photos", units=str(units)), 0, needs=["questions"])
    one = all_of(splits)[0]
    assert (one["reference"], json.loads(one["questions"])) == (f"New {NAMES[0]}.", [question])
    assert splits.fields == {"reference", "captions", "reference_units", "questions"}


@pytest.mark.parametrize("form", ["photos", "sharegpt4v"])
@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("reference_units", r"`python -m balcap_jax\.recaption --images={} --out=units\.jsonl --judge\.endpoints=URL`"),
        ("rubrics", r"--images={} .* --write=rubrics --students=CAPTIONS\.jsonl`"),
        ("questions", r'write lines {{"image": "a\.jpg", "questions": \['),
    ],
)
def test_what_the_reward_lacks_is_said_before_a_picture_is_opened(tmp_path, manual, form, field, named, monkeypatch):
    monkeypatch.setattr("balcap_jax.data.images.check", lambda path: pytest.fail(f"{path} was opened"))
    source = manual / "list.json" if form == "sharegpt4v" else manual
    with pytest.raises(UserError, match=named.format(source)) as caught:
        data.load(settings(tmp_path, manual, form), 0, needs=["reference", field])
    assert f"needs {field!r} beside a picture, and the data set {form!r} has none" in str(caught.value)
    assert "give --config.data.units=units.jsonl" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["sg4v"]  # Nothing is built for it.


def test_pictures_that_lack_what_others_have_are_counted(tmp_path, manual, capsys):
    entries = json.loads((manual / "list.json").read_text())
    entries[1]["reference_units"] = ["one"]
    (manual / "list.json").write_text(json.dumps(entries))
    data.load(settings(tmp_path, manual, "sharegpt4v"), 0, needs=["reference_units"])
    assert "sharegpt4v: 7 of 8 pictures have no reference_units to be scored by\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no line of .*units.jsonl .* is about a picture of photos: it has none"),
        ('{"image": "other/9.jpg", "caption": "x"}', r"such as 'other/9.jpg', and the pictures are such as 'coco/"),
        (
            '{"image": "a.jpg", "reference_units": 3}',
            r"line 1: \"reference_units\" must be a list .*, got 3; mend that line, or have",
        ),
        ('{"caption": "x"}', r"units\.jsonl, line 1: a line is an object with \"image\""),
        ("{", r"units\.jsonl, line 1 .*mend or remove that line"),
        (None, r"config field 'data\.units': .*units\.jsonl cannot be read"),
    ],
)
def test_bad_units_are_one_line(tmp_path, manual, content, named):
    if content is not None:
        (tmp_path / "units.jsonl").write_text(content)
    with pytest.raises(UserError, match=named) as caught:
        data.load(settings(tmp_path, manual, "photos", units=str(tmp_path / "units.jsonl")), 0)
    assert "\n" not in str(caught.value)
