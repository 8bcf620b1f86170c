"""Which column is what: by name, by the name of a data set, and in one line where it cannot be known."""

import json

import numpy as np
import pyarrow as pa
import pytest
from data.parquet_tables import all_of, pictures, pixels, png, settings, write

from balcap_jax import data
from balcap_jax.cli.errors import UserError
from balcap_jax.data import columns, photos

COUNT = 6
KEYS = [f"key_{i}" for i in range(COUNT)]
TEXTS = [f"Caption {i}." for i in range(COUNT)]
TURNS = [[{"from": "human", "value": f"<image>\nAsk {i}"}, {"from": "gpt", "value": TEXTS[i]}] for i in range(COUNT)]
# The columns of the cards, with the pictures where copies of the data set hold them.
CARDS = {
    "sharegpt4v": {"id": KEYS, "image": pictures(range(COUNT)), "conversations": TURNS},
    "pixmo_cap": {
        "image": pictures(range(COUNT)),
        "image_url": [f"https://host/{i}.jpg" for i in range(COUNT)],
        "caption": TEXTS,
        "transcripts": [["spoken", "words"]] * COUNT,
    },
    "docci": {"image": pictures(range(COUNT)), "example_id": KEYS, "description": TEXTS},
    "imageinwords": {
        "image": pictures(range(COUNT)),
        "image/key": KEYS,
        "image/url": [f"https://host/{i}.jpg" for i in range(COUNT)],
        "IIW": TEXTS,
        "IIW-P5B": ["Of a machine."] * COUNT,
    },
    "densefusion": {
        "image": pictures(range(COUNT)),
        "image_id": KEYS,
        "image_path": KEYS,
        "url": KEYS,
        "caption": TEXTS,
    },
}


def found(tmp_path, table, **changes) -> list[dict]:
    """The examples in the order of their rows."""
    source = write(tmp_path / "a.parquet", table)
    examples = all_of(data.load(settings(source, **changes), 0, tokenizer=False))
    return [examples[f"a.parquet#{i}"] for i in range(len(examples))]


@pytest.mark.parametrize("name", CARDS)
def test_data_sets_by_the_columns_of_their_cards(tmp_path, name):
    assert set(CARDS) == set(columns.PRESETS)
    for row, one in enumerate(found(tmp_path, CARDS[name], columns=name)):
        np.testing.assert_array_equal(one["image"], pixels(row))
        assert one["captions"] == [one["reference"]] == [TEXTS[row]]
        assert one["prompt"] == (f"Ask {row}" if name == "sharegpt4v" else photos.PROMPT)


@pytest.mark.parametrize("name", ["docci", "imageinwords", "densefusion"])
def test_a_key_of_the_card_keeps_rows_of_a_picture_together(tmp_path, name, capsys):
    table = {column: [values[i // 2] for i in range(COUNT)] for column, values in CARDS[name].items()}
    found(tmp_path, table, columns=name)
    assert "parquet: 3 pictures in 6 rows;" in capsys.readouterr().out
    del table["example_id" if name == "docci" else "image/key" if name == "imageinwords" else "image_id"]
    found(tmp_path, table, columns=name)  # Copies may lack it.
    assert "parquet: 6 pictures;" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", ["pixmo_cap", "image=image_url,caption=caption", "caption=caption", ""])
def test_urls_are_refused_with_what_downloads_them(tmp_path, chosen):
    table = {name: values for name, values in CARDS["pixmo_cap"].items() if name != "image"}
    with pytest.raises(UserError, match=r"the column 'image_url' of .*a\.parquet holds URLs, not pictures") as caught:
        found(tmp_path, table, columns=chosen)
    (line,) = str(caught.value).splitlines()
    source = tmp_path / "a.parquet"
    given = f"--url_list={source} --input_format=parquet --url_col=image_url --caption_col=caption"
    assert f"`img2dataset {given} --resize_mode=no --output_format=files --output_folder=DIR`" in line
    assert "data.name=photos and data.data_dir=DIR" in line


@pytest.mark.parametrize("name", ["url", "photo", "image_path"])
def test_a_column_of_texts_that_is_not_named(tmp_path, name):
    """URLs are refused as such; where there are none, what may be meant is proposed, and nothing for a mere URL."""
    table = {name: ["https://host/a.jpg"] * COUNT, "text": TEXTS}
    with pytest.raises(UserError, match=rf"the column '{name}' of .*a\.parquet holds URLs, .* --caption_col=text "):
        found(tmp_path, table)
    with pytest.raises(UserError, match=r"nothing says where the pictures are in .*; its columns are "):
        found(tmp_path, table | {name: ["a.jpg"] * COUNT})
    with pytest.raises(UserError, match=r"has no column 'nope'"):
        found(tmp_path, table, columns="image=nope,caption=text")


@pytest.mark.parametrize(
    ("table", "chosen", "named"),
    [
        (
            {"jpg": "bytes", "long_caption": "text", "n": "number"},
            "",
            r"nothing says where the pictures are in .*; its columns are jpg \(bytes\), long_caption \(text\), "
            r"n \(numbers\); give --config\.data\.columns=image=jpg,caption=long_caption if these are meant \(recap",
        ),
        (
            {"image": "bytes", "dense_caption": "text"},
            "",
            r"nothing says where the captions are .*columns=image=image,caption=dense_caption if these are meant",
        ),
        ({"image": "bytes", "a": "text", "b": "text"}, "", r"give --config\.data\.columns=image=COLUMN,caption=COLUMN"),
        (
            {"image": "bytes", "caption": "text"},
            "caption=text",
            r"a\.parquet has no column 'text'; its columns are",
        ),
        ({"image": "bytes", "caption": "text"}, "docci", r"a\.parquet has no column 'description'; its columns are"),
        (
            {"image": "number", "caption": "text"},
            "",
            r"the column 'image' of .*a\.parquet holds numbers, and image takes a picture, bytes, a list of pictures",
        ),
        (
            {"image": "bytes", "caption": "text"},
            "image=caption,caption=image",
            r"the column 'image' of .* holds bytes, and caption takes text, a list of texts, a conversation",
        ),
        (
            {"image": "bytes"},
            "picture=image",
            r"'data\.columns': 'picture=image' is not FIELD=COLUMN .* image, cap",
        ),
        ({"image": "bytes"}, "coco", r"'coco' is not FIELD=COLUMN .*, or one of sharegpt4v, pixmo_cap, docci, imagein"),
        ({"image": "bytes"}, "image=image,image=image", r"'image=image' is not FIELD=COLUMN with another field of"),
    ],
)
def test_columns_that_are_not_clear_are_one_line(tmp_path, table, chosen, named):
    values = {"bytes": [png(i) for i in range(3)], "text": ["A."] * 3, "number": [1, 2, 3]}
    with pytest.raises(UserError, match=named) as caught:
        found(tmp_path, {name: values[kind] for name, kind in table.items()}, columns=chosen)
    assert "\n" not in str(caught.value)


def test_lists_of_captions(tmp_path):
    lists = [["One.", "Two.", "Three."], [" ", "Only."], ["A.", "B."], ["A.", "A."], None, []]
    table = {"jpg": [png(i) for i in range(6)], "texts": pa.array(lists, pa.list_(pa.large_string()))}
    source = write(tmp_path / "a.parquet", {**table, "question": ["Ask."] * 6})
    first = all_of(data.load(settings(source, columns="image=jpg,caption=texts,question=question"), 0))
    assert [first[f"a.parquet#{i}"]["captions"] for i in range(4)] == [["One."], ["Only."], ["A."], ["A."]]
    assert {one["prompt"] for one in first.values()} == {"Ask."}
    every = all_of(data.load(settings(source, columns="image=jpg,captions=texts"), 0))
    # As many as the median row has; fewer are repeated, more are cut.
    expected = [["One.", "Two."], ["Only.", "Only."], ["A.", "B."], ["A.", "A."]]
    assert [every[f"a.parquet#{i}"]["captions"] for i in range(4)] == expected
    assert every["a.parquet#0"]["reference"] == "One."
    assert set(first) == set(every) == {f"a.parquet#{i}" for i in range(4)}


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "system", "value": "No."}, {"from": "human", "value": "Q <image>"}, {"from": "gpt", "value": "A."}],
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A."}, {"role": "user", "content": "No."}],
        [{"user": "Q", "assistant": "A."}, {"user": "No.", "assistant": "No."}],
    ],
)
def test_conversations(tmp_path, turns):
    table = {"images": [[one] for one in pictures(range(4))], "texts": [turns] * 4}
    for one in found(tmp_path, table, columns="image=images,caption=texts,prompt=texts"):
        assert (one["prompt"], one["reference"]) == ("Q", "A.")


def test_rows_of_several_pictures_are_left_out(tmp_path):
    table = {"images": [[one] for one in pictures(range(30))], "caption": ["A."] * 30}
    table["images"][3], table["images"][4] = pictures([1, 2]), []
    splits = data.load(settings(write(tmp_path / "a.parquet", table), columns="image=images"), 0)
    assert len(all_of(splits)) == 28
    reasons = {entry.image: entry.reason for entry in splits.damaged}
    assert reasons == {"a.parquet#3": "2 pictures in one row", "a.parquet#4": "0 pictures in one row"}


def test_what_rewards_read_and_parts_of_columns(tmp_path):
    question = {"question": "Which?", "choices": ["a", "b"], "answer": "b"}
    table = {
        "image": [png(i) for i in range(4)],
        "about": [{"text": TEXTS[i], "units": ["one", "two"]} for i in range(4)],
        "rubrics": [[{"criterion": "names it", "weight": 2}]] * 4,
        "questions": [json.dumps([question])] * 4,
    }
    splits = data.load(
        settings(write(tmp_path / "a.parquet", table), columns="caption=about.text,reference_units=about.units"),
        0,
        needs=["reference_units", "rubrics", "questions"],
    )
    assert splits.fields == {"reference", "captions", "reference_units", "rubrics", "questions"}
    for name, one in all_of(splits).items():
        assert one["reference"] == TEXTS[int(name.partition("#")[2])]
        assert one["reference_units"] == ["one", "two"]
        assert json.loads(one["questions"]) == [question]
        assert json.loads(one["rubrics"]) == [{"criterion": "names it", "weight": 2}]


# ---- lines of JSONL files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("imageinwords", {"image/key": "{}", "IIW": "Caption {}.", "IIW-P5B": "No.", "objects": []}),
        ("imageinwords", {"image": "{}.png", "ex_id": "x", "IIW": "Caption {}.", "metrics/Specificity": "Neutral"}),
        ("densefusion", {"image_id": "x", "image_path": "{}.png", "caption": "Caption {}.", "url": "https://host/{}"}),
        ("docci", {"example_id": "x", "image_file": "{}.png", "description": "Caption {}.", "split": "train"}),
        ("image=file,caption=text,prompt=ask", {"file": "{}.png", "text": "Caption {}.", "ask": "Ask."}),
    ],
)
def test_lines_in_the_form_of_a_data_set(tmp_path, name, line):
    for i in range(4):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))
    lines = [json.dumps({key: text.format(i) if text else [] for key, text in line.items()}) for i in range(4)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    config = settings(tmp_path / "list.jsonl", name="photos", columns=name, manual_dir=str(tmp_path / "pictures"))
    examples = all_of(data.load(config, 0))
    assert sorted(examples) == [f"{i}.png" for i in range(4)]
    for i in range(4):
        np.testing.assert_array_equal(examples[f"{i}.png"]["image"], pixels(i))
        assert examples[f"{i}.png"]["reference"] == f"Caption {i}."
        assert examples[f"{i}.png"]["prompt"] == ("Ask." if "ask" in line else photos.PROMPT)


def test_a_parquet_file_among_photographs_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a\.parquet is a parquet file, .* give --config\.data\.name=parquet"):
        data.load(settings(write(tmp_path / "a.parquet", 3), name="photos"), 0)


def test_paths_without_bytes_name_the_way_out(tmp_path):
    """What pyarrow infers from {"bytes": None, "path": ...} in all rows."""
    rows = {"image": [{"bytes": None, "path": f"{i}.png"} for i in range(5)], "caption": ["A."] * 5}
    source = write(tmp_path / "a.parquet", rows)
    with pytest.raises(UserError, match=r"holds struct<.*\(image\.path holds paths: image=image\.path\); its columns"):
        data.load(settings(source), 0)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    assert len(all_of(data.load(settings(source, columns="image=image.path"), 0))) == 5
