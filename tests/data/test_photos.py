"""Photographs from a folder, a JSONL file or ShareGPT4V: what is read, what is left out, which split it is in."""

import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from judges.misbehaving import JudgeServer, digest, well_behaved
from PIL import Image

from balcap_jax import data, judges, rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as configuration
from balcap_jax.data import listing, photos, sharegpt4v
from balcap_jax.data.input import as_columns, examples, make_dataset
from balcap_jax.training.job import to_samples

RECIPE = Path(__file__).parents[2] / "configs" / "photos.py"
SIZES = [(40, 30), (64, 20), (31, 77), (50, 50), (90, 45), (28, 28)]


def picture(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)


def settings(folder, **changes) -> dict:
    return {
        "name": "photos",
        "data_dir": str(folder),
        "validation_share": 0.2,
        "test_share": 0.2,
        "max_pixels": 0,
        **changes,
    }


def all_of(splits) -> dict[str, dict]:
    return {one["id"]: one for part in splits[:3] for one in examples(part)}


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate(SIZES):
        picture(tmp_path / f"{'deep/' if i % 2 else ''}{i}.png", size, i)
        (tmp_path / f"{'deep/' if i % 2 else ''}{i}.txt").write_text(f" Caption number {i}.\n")
    return tmp_path


def test_a_folder_of_pictures_and_captions(folder, capsys):
    picture(folder / "alone.jpg", (9, 9))
    picture(folder / "silent.jpg", (9, 9))
    (folder / "silent.txt").write_text(" \n")
    (folder / "torn.png").write_bytes(b"no picture")
    (folder / "torn.txt").write_text("A caption.")
    splits = data.load(settings(folder), 0)
    assert capsys.readouterr().out == (
        "photos: 6 pictures; 3 left out: alone.jpg (no caption), silent.jpg (empty caption), torn.png (no picture in a "
        "known format (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF, JPEG2000))\n"
    )
    found = all_of(splits)
    assert sorted(found) == ["0.png", "2.png", "4.png", "deep/1.png", "deep/3.png", "deep/5.png"]
    for i, (width, height) in enumerate(SIZES):
        one = found[f"{'deep/' if i % 2 else ''}{i}.png"]
        assert one["image"].shape == (height, width, 3)
        assert one["reference"] == f"Caption number {i}."
        assert one["captions"] == [one["reference"]]
        assert one["prompt"] == photos.PROMPT
    assert splits.fields == {"reference", "captions"}
    assert [one.image for one in splits.left_out] == ["alone.jpg", "silent.jpg", "torn.png"]


def test_batches_of_different_sizes_are_lists_and_the_iterator_goes_on(folder):
    train = data.load(settings(folder), 0).train
    whole = make_dataset(train, batch_size=2, seed=1, threads=0)
    first = [next(whole) for _ in range(3)]
    again = make_dataset(train, batch_size=2, seed=1, threads=0)
    next(again)
    state = json.loads(json.dumps(again.get_state()))
    resumed = make_dataset(train, batch_size=2, seed=1, threads=0)
    resumed.set_state(state)
    assert [next(resumed)["id"] for _ in range(2)] == [batch["id"] for batch in first[1:]]
    assert isinstance(first[0]["image"], list)


def test_a_picture_stays_in_its_split_whatever_is_added(tmp_path):
    names = [f"{i}.jpg" for i in range(2000)]
    parts = {name: photos.split_of(name, 0.1, 0.2) for name in names}
    counts = {part: list(parts.values()).count(part) for part in ("train", "validation", "test")}
    assert 160 < counts["validation"] < 240
    assert 350 < counts["test"] < 450
    # Tiny sets have one of each all the same.
    records = [photos.Record(name, tmp_path, "p", ("c",)) for name in names[:3]]
    sizes = [len(part) for part in photos.make_splits(records, (), settings(tmp_path, test_share=0.0))[:3]]
    assert sizes == [1, 1, 1]
    with pytest.raises(UserError, match=r"2 pictures are too few: .* one each; add pictures with captions"):
        photos.make_splits(records[:2], (), settings(tmp_path))


def lines_of(folder, *entries):
    (folder / "captions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))


def test_a_jsonl_file_carries_all_that_rewards_need(folder):
    question = {"question": "Which?", "choices": ["a", "b"], "answer": "b"}
    rubric = {"criterion": "names it", "weight": 3}
    lines_of(
        folder,
        {"image": "0.png", "caption": "One.", "prompt": "Say it.", "reference_units": ["u"], "questions": [question]},
        {"image": "2.png", "captions": ["Two.", "Zwei."], "rubrics": [rubric]},
        {"image": "4.png", "caption": "Four.", "reference": "A better four."},
        {"image": "0.png", "caption": "Uno."},
        {"image": "gone.png", "caption": "Gone."},
    )
    for source in (folder, folder / "captions.jsonl"):
        splits = data.load(settings(source), 0)
        found = all_of(splits)
        assert sorted(found) == ["0.png", "2.png", "4.png"]
        assert [found[name]["captions"] for name in sorted(found)] == [
            ["One.", "Uno."], ["Two.", "Zwei."], ["A better four.", "Four."],
        ]  # fmt: skip
        assert found["0.png"]["prompt"] == "Say it."
        assert found["0.png"]["reference_units"] == ["u"]
        assert json.loads(found["0.png"]["questions"]) == [question]
        assert json.loads(found["2.png"]["rubrics"]) == [rubric]
        assert found["4.png"]["reference"] == "A better four."
        assert splits.fields == {"reference", "captions", "reference_units", "questions", "rubrics"}
        assert splits.left_out == (("gone.png", "no such file"),)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"caption": "x"}, '"image"'),
        ({"image": "0.png"}, "has no caption"),
        ({"image": "0.png", "caption": 3}, "must be text"),
        ({"image": "0.png", "caption": "x", "reference_units": "u"}, "list of texts"),
        (
            {"image": "0.png", "caption": "x", "questions": [{"question": "?", "choices": ["a"], "answer": "a"}]},
            "choices",
        ),
        (
            {"image": "0.png", "caption": "x", "questions": [{"question": "?", "choices": ["a", "b"], "answer": "c"}]},
            "answer",
        ),
        ({"image": "0.png", "caption": "x", "rubrics": [{"criterion": "c", "weight": 0}]}, "above 0"),
    ],
)
def test_a_bad_line_is_named(folder, entry, reason):
    lines_of(folder, {"image": "2.png", "caption": "Two."}, entry)
    with pytest.raises(UserError, match=r"captions\.jsonl, line 2: ") as caught:
        data.load(settings(folder), 0)
    assert reason in str(caught.value)


def test_a_picture_that_breaks_off_is_replaced_and_named_once(folder, capsys):
    picture(folder / "cut.png", (200, 200))
    content = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "cut.txt").write_text("Cut.")
    found = data.load(settings(folder), 0)
    part = next(part for part in found[:3] if any(record.id == "cut.png" for record in part.records))
    assert [one["id"] for one in examples(part)] == [record.id for record in part.records if record.id != "cut.png"]
    ids = [part[i]["id"] for i in range(len(part))] + [part[i]["id"] for i in range(len(part))]
    assert "cut.png" not in ids
    errors = capsys.readouterr().err
    assert errors.count("left out: cut.png: damaged") == 1


def test_large_pictures_are_shrunk_in_their_own_aspect(folder):
    found = all_of(data.load(settings(folder, max_pixels=600), 0))
    for one in found.values():
        assert np.prod(one["image"].shape[:2]) <= 600
    assert found["0.png"]["image"].shape == (21, 28, 3)


def test_the_tokenizer_is_the_same_each_time_and_loses_nothing(folder):
    first, second = (data.load(settings(folder), 0) for _ in range(2))
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    text = "Caption number 3, naïve façade \N{SNOWMAN}!"
    ids = first.tokenizer.encode(text, add_special_tokens=False)
    assert first.tokenizer.decode(ids) == text
    assert first.tokenizer.unk_token_id not in ids
    assert data.load(settings(folder), 0, tokenizer=False).tokenizer is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data.name": "photos", "data.data_dir": "x", "stages.order": "vision,rl"}, "scene graphs"),
        ({"data.name": "photos", "data.data_dir": "x", "rewards.name": "balcap"}, "knows the scenes only"),
        ({"rewards.name": "lexical"}, "needs 1 numbers for lexical"),
        ({"rewards.length": "ramp"}, "needs 4 numbers"),
        ({"rewards.length_start": "9", "rewards.length_end": "9"}, "must be less than"),
        ({"rewards.name": "caprel"}, "did you mean 'caprl'"),
    ],
)
def test_settings_that_do_not_fit(changes, problem):
    lexical = {"rewards.name": "lexical", "rewards.weights": "1"} if "data.name" in changes else {}
    if changes.get("rewards.name") == "balcap":
        lexical = {}
    with pytest.raises(UserError, match=problem):
        rewards.check_settings(configuration.load("configs/forkme.py", lexical | changes))


def test_lines_of_one_picture_are_joined_however_they_spell_it(folder):
    (folder / "other").symlink_to("deep")
    spellings = ["deep/1.png", "./deep/1.png", "deep/../deep/1.png", str(folder / "deep/1.png"), "other/1.png"]
    others = [{"image": f"./{i}.png", "caption": f"{i}."} for i in (0, 2, 4)]
    for first in range(len(spellings)):
        given = spellings[first:] + spellings[:first]
        lines_of(folder, *others, *({"image": text, "caption": f"as {text}"} for text in given))
        found = all_of(data.load(settings(folder), 0))
        name = "other/1.png" if given[0].startswith("other") else "deep/1.png"
        assert sorted(found) == sorted(["0.png", "2.png", "4.png", name])
        assert found[name]["reference"] == f"as {given[0]}"
        assert len(all_of(data.load(settings(folder), 0))) == 4


def test_names_of_pictures(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "list").symlink_to("real")
    (tmp_path / "real" / "link").symlink_to(tmp_path)
    for image in (
        "a.jpg",
        "./a.jpg",
        "gone/../a.jpg",
        "deep/..//a.jpg",
        tmp_path / "list/a.jpg",
        tmp_path / "real/a.jpg",
    ):
        assert listing.picture_name(tmp_path / "list", str(image)) == "a.jpg"
    for image in ("../b.jpg", "deep/../../b.jpg", tmp_path / "b.jpg"):
        assert listing.picture_name(tmp_path / "list", str(image)) == "../b.jpg"
    assert listing.picture_name(tmp_path / "list", "link/b.jpg") == "link/b.jpg", "links keep their names"
    beyond = listing.picture_name(tmp_path / "list", "link/../b.jpg")
    assert (tmp_path / "list" / beyond).resolve() == tmp_path.parent / "b.jpg"


def test_one_picture_with_one_caption_leaves_the_others_theirs(folder, capsys):
    lines = [{"image": f"{i}.png", "captions": [f"{i}{letter}" for letter in "abc"]} for i in (0, 2, 4)]
    lines_of(
        folder, *lines, {"image": "deep/1.png", "caption": "1a"}, {"image": "deep/3.png", "captions": list("vwxyz")}
    )
    found = all_of(data.load(settings(folder), 0))
    assert found["0.png"]["captions"] == ["0a", "0b", "0c"]
    assert found["deep/1.png"]["captions"] == ["1a"] * 3
    assert found["deep/3.png"]["captions"] == ["v", "w", "x"]
    assert (
        "captions of a picture: 1 to 5; 3 of each are used, repeated where there are fewer\n" in capsys.readouterr().out
    )
    as_columns(list(found.values()))


def test_what_is_not_read_is_named_and_links_are_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "cat.png", (20, 20), 9)
    for name in ("cat.txt", "IMG.txt", "raw.txt", "gone.txt"):
        (elsewhere if name == "cat.txt" else folder).joinpath(name).write_text("A caption.")
    (folder / "IMG.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "raw.dng").write_bytes(b"II*\0")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder / "deep")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "lost").symlink_to("nowhere")
    (folder / "twin.png").symlink_to("0.png")
    (folder / "twin.txt").write_text("The same picture.")
    splits = data.load(settings(folder), 0)
    found = all_of(splits)
    assert sorted(found) == [
        "0.png",
        "2.png",
        "4.png",
        "deep/1.png",
        "deep/3.png",
        "deep/5.png",
        "linked/cat.png",
        "twin.png",
    ]
    assert any({"0.png", "twin.png"} <= set(part) for part in home_of(splits).values())
    left_out = dict(splits.left_out)
    assert sorted(left_out) == ["IMG.HEIC", "gone.png", "lost", "raw.dng"]
    assert left_out["lost"] == left_out["gone.png"] == "a broken link"
    assert left_out["IMG.HEIC"].startswith("no picture in a known format")
    listed = {item.key: item.error for item in listing.list_items(folder, "")}
    assert sorted(listed) == sorted([*found, *left_out])
    assert listed["lost"] == "a broken link"


def test_a_subfolder_that_cannot_be_looked_into_is_named(folder, monkeypatch):
    scan = os.scandir

    def refusing(path):  # as for others than root
        if str(path).endswith(("deep", "shut")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    splits = data.load(settings(folder), 0)
    assert sorted(all_of(splits)) == ["0.png", "2.png", "4.png"]
    assert splits.left_out == (("deep", "a folder that cannot be looked into: Permission denied"),)
    (folder / "shut").mkdir()
    with pytest.raises(UserError, match=r"'data\.data_dir': .*shut cannot be read"):
        data.load(settings(folder / "shut"), 0)


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        data.load(settings(tmp_path / "gone"), 0)
    with pytest.raises(UserError, match="no picture with a caption"):
        data.load(settings(tmp_path), 0)


# ---- ShareGPT4V ------------------------------------------------------------------------------------------------------


def sample(image: str, prompt: str, caption: str) -> dict:
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption}]
    return {"id": "x", "image": image, "conversations": turns}


@pytest.fixture
def manual(tmp_path):
    folder = tmp_path / "manual"
    for i, size in enumerate(SIZES):
        picture(folder / f"coco/train2017/{i}.jpg", size, i)
    samples = [sample(f"coco/train2017/{i}.jpg", f"What is in {i}?\n<image>", f"It is {i}.") for i in range(len(SIZES))]
    samples[3] = sample("coco/train2017/3.jpg", "<image>\nDescribe 3.", "First.\n\nSecond.")
    samples.insert(2, sample("sam/images/gone.jpg", "<image>", "Gone."))
    (folder / "list.json").write_text(json.dumps(samples))
    return folder


def test_sharegpt4v_keeps_prompts_and_counts_what_is_missing(tmp_path, manual, capsys):
    chosen = settings(
        tmp_path / "built", name="sharegpt4v", manual_dir=str(manual), annotations="list.json", max_pixels=500
    )
    for built_before in (False, True):
        splits = data.load(chosen, 0)
        out = capsys.readouterr().out
        assert ("indexing" in out) is not built_before
        assert "sharegpt4v: 6 pictures; 1 left out: sam/images/gone.jpg (no such file)" in out
        found = all_of(splits)
        assert sorted(found) == [f"coco/train2017/{i}.jpg" for i in range(6)]
        one = found["coco/train2017/3.jpg"]
        assert (one["prompt"], one["reference"]) == ("Describe 3.", "First.\n\nSecond.")
        assert found["coco/train2017/1.jpg"]["prompt"] == "What is in 1?"
        assert all(np.prod(one["image"].shape[:2]) <= 500 for one in found.values())


def test_sharegpt4v_carries_what_rewards_need(tmp_path, tmp_path_factory, monkeypatch, manual):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    question = {"question": "Which?", "choices": ["a", "b"], "answer": "b"}
    rubric = {"criterion": "names it", "weight": 3}
    entries = json.loads((manual / "list.json").read_text())
    entries[0] |= {"questions": [question], "reference_units": ["one", "two"]}
    entries[1] |= {"rubrics": [rubric]}
    (manual / "list.json").write_text(json.dumps(entries))
    chosen = settings(tmp_path / "built", name="sharegpt4v", manual_dir=str(manual), annotations="list.json")
    splits = data.load(chosen, 0)
    assert splits.fields == {"reference", "captions", "reference_units", "questions", "rubrics"}
    found = all_of(splits)
    first, second, third = (found[f"coco/train2017/{i}.jpg"] for i in range(3))
    assert (first["reference_units"], json.loads(first["questions"])) == (["one", "two"], [question])
    assert (json.loads(second["rubrics"]), second["reference_units"]) == ([rubric], [])
    assert (third["reference_units"], third["questions"], third["rubrics"]) == ([], "[]", "[]")
    assert list(temporary.iterdir()) == []

    entries[1] |= {"rubrics": [{"criterion": "names it", "weight": 0}]}
    (manual / "list.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r'list\.json, entry 2: "rubrics" must be a list'):
        data.load(chosen, 0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[]", "no list of samples"), ("{", "is not JSON"), ('[{"image": "a.jpg"}]', "entry 1 is no sample")],
)
def test_another_json_is_refused(tmp_path, manual, content, problem):
    (manual / "list.json").write_text(content)
    chosen = settings(tmp_path / "built", name="sharegpt4v", manual_dir=str(manual), annotations="list.json")
    with pytest.raises(UserError, match=problem):
        data.load(chosen, 0)
    with pytest.raises(UserError, match=r"no other\.json in"):
        sharegpt4v.prepare(str(tmp_path), str(manual), "other.json")


def test_a_damaged_sharegpt4v_is_one_line(tmp_path, manual):
    chosen = settings(tmp_path / "made", name="sharegpt4v", manual_dir=str(manual), annotations="list.json")
    data.load(chosen, 0)
    (info,) = (tmp_path / "made").rglob("dataset_info.json")
    for damage, reason in ((lambda: info.write_text("{"), "Failed to"), (info.unlink, "dataset_info.json is missing")):
        damage()
        with pytest.raises(UserError) as caught:
            data.load(chosen, 0)
        assert f"cannot be read ({reason}" in str(caught.value)
        assert str(caught.value).endswith("; delete this directory to have it made anew")


def test_images_stay_inside_the_manual_directory():
    with pytest.raises(UserError, match="outside the manual directory"):
        sharegpt4v.read_sample(sample("../secret.jpg", "<image>", "x"), "here")


def home_of(splits) -> dict[str, list[str]]:
    """The ids in each split."""
    return {name: [record.id for record in getattr(splits, name).records] for name in ("train", "validation", "test")}


def test_entries_of_one_picture_are_in_one_split(tmp_path, manual):
    """However their paths are spelt; and pictures that were alone before stay where they were."""
    (manual / "linked").symlink_to("coco/train2017")
    spellings = ["coco/train2017/{}.jpg", "./coco/train2017/{}.jpg", "sam/../coco//train2017/{}.jpg", "linked/{}.jpg"]
    spellings.append(str(manual / "coco/train2017/{}.jpg"))
    chosen = settings(tmp_path / "built", name="sharegpt4v", manual_dir=str(manual), annotations="list.json")
    alone = home_of(data.load(chosen, 0))
    entries = [sample(text.format(i), f"{k}?", f"{i} {k}") for k, text in enumerate(spellings) for i in range(6)]
    (manual / "list.json").write_text(json.dumps(entries))
    splits = data.load(chosen, 0)
    for name in alone:
        found = sorted(one["reference"] for one in examples(getattr(splits, name)))
        assert found == sorted(f"{Path(one).stem} {k}" for one in alone[name] for k in range(5))
    ids = [one for part in home_of(splits).values() for one in part]
    assert len(set(ids)) == 30
    with pytest.raises(UserError, match=r"2 pictures are too few: .* one each; add pictures with captions"):
        photos.make_splits([record for record in splits.train.records if record.key in alone["train"][:2]], (), chosen)


def test_any_character_may_stand_in_a_name(tmp_path, capsys):
    names = [
        "a#2.jpg",
        "#.jpg",
        "a?b.jpg",
        "a%20b.jpg",
        "a b.jpg",
        "ä\N{SNOWMAN}.jpg",
        "a&b=c;'\".jpg",
        "a[0:1].jpg",
        "a",
    ]
    for i, name in enumerate(names):
        picture(tmp_path / "web" / (name if "." in name else f"{name}.jpg"), (9, 8 + i), i)
    (tmp_path / "web" / "a.jpg").rename(tmp_path / "web" / "a")
    lines = [{"image": f"web/{name}", "caption": name} for name in names]
    lines_of(tmp_path, *lines)
    (tmp_path / "list.json").write_text(json.dumps([sample(one["image"], "?", one["caption"]) for one in lines]))
    chosen = settings(tmp_path / "b#[1]?", name="sharegpt4v", manual_dir=str(tmp_path), annotations="list.json")
    for found in (data.load(settings(tmp_path), 0), data.load(chosen, 0)):
        assert {one["id"]: one["reference"] for one in all_of(found).values()} == {
            f"web/{name}": name for name in names
        }
    assert "left out" not in capsys.readouterr().out


def test_entries_of_text_alone_are_left_out_and_counted(tmp_path, manual, capsys):
    turns = sample("", "Hello", "Hi.")["conversations"]
    entries = json.loads((manual / "list.json").read_text())
    entries += [{"id": "t", "model": "", "conversations": turns}, {"image": None, "conversations": turns}]
    entries += [{"image": "", "conversations": []}]
    (manual / "list.json").write_text(json.dumps(entries))
    chosen = settings(tmp_path / "built", name="sharegpt4v", manual_dir=str(manual), annotations="list.json")
    splits = data.load(chosen, 0)
    assert len(all_of(splits)) == 6
    assert splits.left_out[1:] == tuple((f"entry {number}", "text alone") for number in (8, 9, 10))
    out = capsys.readouterr().out
    assert "6 pictures; 1 left out: sam/images/gone.jpg (no such file)\n" in out
    assert "sharegpt4v: 3 entries of text alone are left out\n" in out
    for kept, reason in ((entries[-3:], "all entries are text alone"), (entries[2:3], r"gone\.jpg: no such file")):
        (manual / "list.json").write_text(json.dumps(kept))
        with pytest.raises(UserError, match=f"none of the pictures of .*{reason}"):
            data.load(chosen, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, '"conversations" must be a list of'),
        ({"conversations": [{"from": "human", "value": None}]}, '"conversations" must be a list of'),
        ({"conversations": ["x"]}, '"conversations" must be a list of'),
        ({"conversations": "x"}, "is no sample"),
        ({"image": ["a.jpg", "b.jpg"]}, '"image" must be text'),
        ({"image": None, "images": ["a.jpg", "b.jpg"]}, '"image" must be text'),
        ({"image": "", "images": [None]}, '"image" must be text'),
        ({"image": None, "images": {"a.jpg": 1}}, '"image" must be text'),
        ({"image": 0}, '"image" must be text'),
        ({"image": "a.jpg", "questions": 0}, '"questions" must be a list'),
        ({"image": "a.jpg", "reference_units": {}}, '"reference_units" must be a list'),
        ({"image": "a.jpg", "rubrics": False}, '"rubrics" must be a list'),
        ({"image": "/etc/a.jpg"}, "outside the manual directory"),
        ({"image": "a/../../b.jpg"}, "outside the manual directory"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, changes, named):
    entry = sample("a.jpg", "<image>", "x") | changes
    with pytest.raises(UserError, match=r"^here") as caught:
        sharegpt4v.read_sample(entry, "here", tmp_path)
    assert named in str(caught.value)


def test_a_list_of_one_picture_is_that_picture(tmp_path):
    turns = sample("", "Hello", "Hi.")["conversations"]
    for entry in (
        {"images": ["a.jpg"]},
        {"image": "", "images": "a.jpg"},
        {"image": "a.jpg", "images": ["b.jpg", "c"]},
    ):
        assert not sharegpt4v.is_text_alone(entry | {"conversations": turns})
        assert sharegpt4v.read_sample(entry | {"conversations": turns}, "here", tmp_path)["id"] == "a.jpg"
    for entry in ({"images": []}, {"image": None, "images": None}, {"images": [""]}):
        assert sharegpt4v.is_text_alone(entry | {"conversations": turns})
    assert not sharegpt4v.is_text_alone({"images": ["a.jpg", "b.jpg"], "conversations": turns})


@pytest.mark.parametrize("annotations", ["pipe", "zero", "a\0b", "folder", "gone"])
def test_annotations_that_are_no_file_are_named(tmp_path, annotations):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"^no .* in .*; put ShareGPT4V's JSON there") as caught:
        sharegpt4v.prepare(str(tmp_path / "built"), str(tmp_path), annotations)
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("entry", [None, 3, "x", [], {}, {"image": "a.jpg"}])
def test_what_is_no_entry_is_named(entry):
    assert not sharegpt4v.is_text_alone(entry)
    with pytest.raises(UserError, match=r"^here is no sample"):
        sharegpt4v.read_sample(entry, "here")


# ---- rewards of a judge ---------------------------------------------------------------------------------------------

UNITS = ["A dog is there.", "The dog is red.", "It rains."]
QUESTIONS = [{"question": "What is there?", "choices": ["a dog", "a cat"], "answer": "a dog"}]
RUBRICS = [{"criterion": "names the dog", "weight": 3}, {"criterion": "says that it rains", "weight": 1}]


def expected_scores(variant: str, caption: str) -> list[float]:
    """The objectives of one caption, from what the server thinks of each part of it, computed by hand."""
    parts = [part for part in caption.split(".") if part.strip()]
    verified = [digest(part) % 3 > 0 for part in parts]
    held = [seen and digest(part) % 5 > 0 for part, seen in zip(parts, verified, strict=True)]
    recall = sum(digest(unit + caption) % 2 == 0 for unit in UNITS) / 3
    marks = sum(1 + digest(name + caption) % 5 for name in ("clarity", "fluency", "coherency")) / 15
    weights = [one["weight"] * (digest(one["criterion"] + caption) % 2 == 0) for one in RUBRICS]
    return {
        "balcap": [sum(held) / len(parts), recall, marks],
        "text": [recall, marks],
        "rubicap": [sum(weights) / 4],
        "feedquill": [sum(verified) / len(parts), sum(verified)],
    }[variant]


@pytest.mark.parametrize("variant", ["balcap", "text", "rubicap", "feedquill", "caprl"])
def test_each_variant_of_the_recipe_scores_photographs(folder, variant):
    lines = [
        {
            "image": name,
            "caption": f"Picture {i}.",
            "reference_units": UNITS,
            "questions": QUESTIONS,
            "rubrics": RUBRICS,
        }
        for i, name in enumerate(sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")))
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    captions = ["A dog. It sits on a mat. It is bored.", "A hat. Nothing else."]
    with JudgeServer(well_behaved) as server:
        given = {"data.data_dir": str(folder), "judge.endpoints": server.url, "judge.model": "m", "judge.cache_dir": ""}
        config = configuration.load(f"{RECIPE}:{variant}", given)
        splits = data.load(config.data, config.model.image_size, tokenizer=False)
        judge = judges.build(config.judge, config.seed)
        rewards.check(config.rewards, judge, splits.fields, "photos")
        reward = rewards.build(config.rewards, judge, config.seed)
        columns = as_columns(list(examples(splits.train))[:2])
        scores = reward(to_samples(columns, [captions, captions[::-1]]))
        judge.close()
    assert scores.valid.all()
    if variant == "caprl":  # Of 8 shuffled draws some are right, whoever guesses A, B or C.
        assert set(np.round(scores.rewards.ravel() * 8) / 8) == set(scores.rewards.ravel())
        assert 0 < scores.rewards.mean() < 1
        assert {one["answer"] for one in scores.detail[0][0]["answers"]} <= set("ABC")
    else:
        one, other = (expected_scores(variant, caption) for caption in captions)
        assert scores.rewards == pytest.approx(np.array([[one, other], [other, one]]))


def test_a_variant_without_its_fields_is_one_line(folder):
    (folder / "captions.jsonl").write_text('{"image": "0.png", "caption": "A."}\n' * 3)
    with pytest.raises(UserError, match="needs 'rubrics' beside a picture"):
        rewards.check({"name": "rubicap"}, None, frozenset({"captions"}), "photos")
    with pytest.raises(UserError, match="unknown variant 'rubric'"):
        configuration.load(f"{RECIPE}:rubric")
