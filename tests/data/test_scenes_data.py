"""The scenes data set: pictures, questions, storage and tokenizer."""

import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import transformers

from balcap_jax import data
from balcap_jax.cli.errors import UserError
from balcap_jax.data import input as data_input
from balcap_jax.data.scenes import builder, captioner, language, questions, render, tokenizer, world

SETTINGS = {"train": 12, "validation": 3, "test": 5, "captions_per_image": 2}


def one_object(background: tuple[str, str] = ("grey", "smooth"), **fields) -> world.Scene:
    values = {"shape": "circle", "colour": "red", "size": "large", "texture": "plain", "cell": 4} | fields
    return world.Scene((world.SceneObject(**values),), *background)


def empty(background: tuple[str, str] = ("grey", "smooth")) -> world.Scene:
    return world.Scene((), *background)


def covered(scene: world.Scene, size: int = 96) -> np.ndarray:
    """Pixels that differ from the bare background, bool [size, size]."""
    bare = render.render(empty((scene.ground, scene.pattern)), size).astype(int)
    return np.abs(render.render(scene, size) - bare).max(axis=-1) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_render_same_bytes_in_another_process():
    scene = world.sample_scene(3)
    code = (
        "import hashlib; from balcap_jax.data.scenes import render, world;"
        "print(hashlib.sha256(render.render(world.sample_scene(3)).tobytes()).hexdigest())"
    )
    digests = {_python(code, PYTHONHASHSEED=seed).strip() for seed in "12"}
    assert len(digests) == 1
    picture = render.render(world.Scene.from_json(scene.to_json()))
    np.testing.assert_array_equal(picture, render.render(scene))
    assert picture.shape == (96, 96, 3)
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("size", [64, 96, 200])
def test_object_changes_only_its_cell(size):
    edges = [round(i * size / 3) for i in range(4)]
    for cell, background in zip(range(9), itertools.cycle(itertools.product(world.GROUNDS, world.PATTERNS))):
        inside = np.zeros((size, size), bool)
        row, column = divmod(cell, 3)
        inside[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = True
        thing = covered(one_object(background, cell=cell, dx=1.0, dy=-1.0, tilt=1.0, shape="star"), size)
        assert thing.any()
        assert not thing[~inside].any()


def test_object_is_never_cut_off_by_its_cell():
    for shape, size in itertools.product(world.SHAPES, world.SIZES):
        for dx, dy, tilt in itertools.product((-1.0, 1.0), (-1.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0)):
            thing = world.SceneObject(shape, "blue", size, "plain", 0, dx, dy, tilt)
            # The same object on a larger sheet, in units of the same 32-pixel cell: nothing lies outside the cell.
            cover = render._tile(thing, 48, 48, 1.0)[1][..., 0] > 0
            assert cover[8:40, 8:40].sum() == cover.sum() > 0, (shape, size, dx, dy, tilt)


def test_mean_colour_inside_an_object_is_nearest_to_its_own():
    names = list(render.COLOUR_RGB)
    palette = np.array([render.COLOUR_RGB[name] for name in names], float)
    for shape, colour, size, texture in itertools.product(world.SHAPES, world.COLOURS, world.SIZES, world.TEXTURES):
        scene = one_object(shape=shape, colour=colour, size=size, texture=texture)
        mean = render.render(scene)[covered(scene)].mean(axis=0)
        # By direction from grey: outline and texture darken or lighten, the hue stays.
        towards = palette - palette.mean(axis=1, keepdims=True)
        seen = mean - mean.mean()
        cosines = towards @ seen / np.linalg.norm(towards, axis=1) / np.linalg.norm(seen)
        assert names[int(np.argmax(cosines))] == colour, (shape, colour, size, texture)


def test_large_covers_at_least_twice_as_much_as_small():
    for shape in world.SHAPES:
        small, large = (covered(one_object(shape=shape, size=size)).sum() for size in world.SIZES)
        assert large > 2 * small > 80, shape


def test_shapes_textures_and_backgrounds_are_told_apart_by_their_pixels():
    for size in world.SIZES:
        masks = {shape: covered(one_object(shape=shape, size=size)) for shape in world.SHAPES}
        for first, second in itertools.combinations(world.SHAPES, 2):
            union, both = masks[first] | masks[second], masks[first] & masks[second]
            assert both.sum() < 0.92 * union.sum(), (size, first, second)
        for shape, colour in itertools.product(world.SHAPES, world.COLOURS):
            pictures = [
                render.render(one_object(shape=shape, colour=colour, size=size, texture=t)) for t in world.TEXTURES
            ]
            area = covered(one_object(shape=shape, size=size)).sum()
            for first, second in itertools.combinations(pictures, 2):
                strong = np.abs(first.astype(int) - second).max(axis=-1) > 40
                assert strong.sum() > 0.12 * area, (shape, colour, size)
    grounds = [render.render(empty((ground, "smooth"))).mean() for ground in world.GROUNDS]
    assert min(abs(a - b) for a, b in itertools.combinations(grounds, 2)) > 30
    for ground in world.GROUNDS:
        smooth, gridded, speckled = (
            render.render(empty((ground, pattern))).astype(float) for pattern in world.PATTERNS
        )
        assert np.abs(np.diff(smooth, axis=1)).max() <= 1
        columns = gridded.mean(axis=(0, 2))
        assert (np.abs(np.diff(columns)) > 20).sum() == 24  # twelve lines, two edges each
        assert np.abs(np.diff(speckled.mean(axis=(0, 2)))).max() < 12  # marks, but no lines
        assert (np.abs(np.diff(speckled, axis=1)).max(axis=-1) > 20).mean() > 0.04


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------


def true_answers(question: dict, scene: dict) -> list[str]:
    """Every choice that is true, found from the English of the question and the scene's JSON alone."""
    text = question["question"]
    words = text.rstrip("?").split()
    objects = scene["objects"]
    places = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
    places[4] = "centre"

    def named(colour, shape):
        (found,) = (one for one in objects if (one["colour"], one["shape"]) == (colour, shape))
        return found

    if text.startswith("How many"):
        if words[2] == "objects":
            number = len(objects)
        elif words[3] == "objects":
            number = sum(one["colour"] == words[2] for one in objects)
        else:
            number = sum(words[2].startswith(one["shape"]) for one in objects)
        return [choice for choice in question["choices"] if int(choice) == number]
    if text == "What colour is the background?":
        return [choice for choice in question["choices"] if choice == scene["ground"]]
    if text == "What pattern has the background?":
        return [choice for choice in question["choices"] if choice == scene["pattern"]]
    if " the object at the " in text:
        place = text.rstrip("?").split(" at the ")[1]
        (thing,) = (one for one in objects if places[one["cell"]] == place)
        field = {"What colour": "colour", "What shape": "shape", "How big": "size", "What texture": "texture"}
        return [choice for choice in question["choices"] if choice == thing[field[" ".join(words[:2])]]]
    if words[0] == "Where":
        return [choice for choice in question["choices"] if choice == places[named(words[3], words[4])["cell"]]]
    first, second = named(words[2], words[3])["cell"], named(words[-2], words[-1])["cell"]
    holds = {
        "above": first // 3 < second // 3,
        "below": first // 3 > second // 3,
        "left": first % 3 < second % 3,
        "right": first % 3 > second % 3,
    }
    return [choice for choice in question["choices"] if holds[choice]]


def test_questions_have_one_true_choice():
    seen, positions = set(), []
    for seed in range(150):
        scene = world.sample_scene(seed)
        drawn = questions.questions(scene, np.random.default_rng(seed), count=40)
        assert len({one["question"] for one in drawn}) == len(drawn) >= 12
        for one in drawn:
            assert true_answers(one, json.loads(scene.to_json())) == [one["answer"]], one
            assert 2 <= len(set(one["choices"])) == len(one["choices"]) <= 4
            seen.update(one["category"])
            if len(one["choices"]) == 4:
                positions.append(one["choices"].index(one["answer"]))
    assert seen == set(questions.CATEGORIES)
    # Always guessing one position is right a quarter of the time: 1000s of questions, 4 standard deviations.
    shares = np.bincount(positions, minlength=4) / len(positions)
    np.testing.assert_allclose(shares, 0.25, atol=4 * (0.25 * 0.75 / len(positions)) ** 0.5)


def test_questions_spread_over_categories_and_follow_the_generator():
    scene = world.sample_scene(5)
    drawn = questions.questions(scene, np.random.default_rng(0))
    assert len({one["category"][0] for one in drawn}) == len(drawn) == 5
    assert drawn == questions.questions(scene, np.random.default_rng(0))
    assert drawn != questions.questions(scene, np.random.default_rng(1))
    assert len(questions.questions(scene, np.random.default_rng(0), count=8)) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Storage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return builder.prepare(tmp_path_factory.mktemp("data"), **SETTINGS)


def test_stored_examples_are_the_generated_ones_in_order(prepared):
    for split in builder.FIRST_SEED:
        rows = data_input.examples(prepared.as_data_source(split))
        assert [row["id"] for row in rows] == [f"scenes-{split}-{i:06d}" for i in range(SETTINGS[split])]
        for i, row in enumerate(rows):
            scene = world.Scene.from_json(row["scene"])
            assert scene == world.sample_scene(builder.FIRST_SEED[split] + i)
            np.testing.assert_array_equal(row["image"], render.render(scene, 96))
            assert row["prompt"] == "Describe the picture."
            assert row["reference_units"] == language.reference_units(scene)
            made = builder.make_example(split, i, builder.ScenesSettings(**SETTINGS))
            assert {key: row[key] for key in ("reference", "captions")} == {
                key: made[key] for key in ("reference", "captions")
            }
            assert len(row["captions"]) == 2
            assert all(one["answer"] in one["choices"] for one in json.loads(row["questions"]))
            assert len(json.loads(row["questions"])) == 5


def test_splits_share_no_scene(prepared):
    scenes = {split: {row["scene"] for row in data_input.examples(prepared.as_data_source(split))} for split in SETTINGS
              if split in builder.FIRST_SEED}  # fmt: skip
    assert not scenes["train"] & scenes["test"]
    assert not scenes["train"] & scenes["validation"]
    assert not scenes["test"] & scenes["validation"]


def test_a_data_set_is_made_from_its_seed(tmp_path):
    config = {"data_dir": tmp_path, "train_size": 3, "validation_size": 1, "test_size": 2, "captions_per_image": 1}
    config["captioner"] = "habits"
    made = {seed: data.load(config | {"seed": seed}, 24) for seed in (0, 1, 2**31 - 1)}
    scenes = [row["scene"] for one in made.values() for split in one[:3] for row in data_input.examples(split)]
    assert len(set(scenes)) == len(scenes) == 3 * 6
    again = data.load(config | {"seed": 1, "data_dir": tmp_path / "again"}, 24)
    for one, other in zip(again[:3], made[1][:3], strict=True):
        for row, same in zip(data_input.examples(one), data_input.examples(other), strict=True):
            assert row.pop("image").tobytes() == same.pop("image").tobytes()
            assert row == same


def test_the_data_set_of_the_default_seed_is_what_it_has_always_been():
    digest, captions = hashlib.sha256(), hashlib.sha256()
    for split in builder.FIRST_SEED:
        for index in range(4):
            made = builder.make_example(split, index, builder.ScenesSettings())
            made.pop("image")  # It follows from the scene, as do rubrics.
            made.pop("rubrics")
            captions.update(json.dumps(made.pop("captions")).encode())
            digest.update(json.dumps(made).encode())
    assert digest.hexdigest()[:16] == "e8991145d080446f"
    assert captions.hexdigest()[:16] == "a138cd648af0f706"  # since the base captioner has habits


def test_second_preparation_reads_what_the_first_wrote(tmp_path, tmp_path_factory, monkeypatch, capsys):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    first = builder.prepare(tmp_path, **SETTINGS)
    assert "generating 20 examples" in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in pathlib.Path(first.data_dir).rglob("*")}
    second = builder.prepare(tmp_path, **SETTINGS)
    assert capsys.readouterr() == ("", "")
    assert second.data_dir == first.data_dir
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(first.data_dir).rglob("*")} == stamps

    other = builder.prepare(tmp_path, **SETTINGS | {"test": 6})
    assert other.data_dir != first.data_dir
    assert len(other.as_data_source("test")) == 6
    assert list(temporary.iterdir()) == []


def test_default_settings_are_the_default_config(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "make_example", _refuse)
    monkeypatch.setattr(builder.spread, "processors", lambda: 1)
    with pytest.raises(AssertionError, match="scenes: train 0 of 4096"):
        builder.prepare(tmp_path)
    assert builder.Scenes(data_dir=tmp_path).builder_config.settings == builder.ScenesSettings()


def _refuse(split, index, settings):
    raise AssertionError(f"scenes: {split} {index} of {settings.train}")


def test_changed_code_gets_its_own_directory(monkeypatch):
    before = builder.ScenesSettings().name
    monkeypatch.setattr(builder, "code_digest", lambda: "00000000")
    assert builder.ScenesSettings().name != before


def test_killed_preparation_is_never_picked_up(tmp_path):
    code = f"""
import os
from balcap_jax.data.scenes import builder
made = builder.make_example
def make_example(split, index, settings):
    if (split, index) == ("test", 3):
        os._exit(9)
    return made(split, index, settings)
builder.make_example = make_example
builder.prepare({str(tmp_path)!r}, **{SETTINGS!r})
"""
    result = _run(code)
    assert result.returncode == 9, result.stderr
    assert any(tmp_path.rglob("*train*"))  # it had come that far
    again = builder.prepare(tmp_path, **SETTINGS)
    assert [len(again.as_data_source(split)) for split in ("train", "validation", "test")] == [12, 3, 5]
    rows = data_input.examples(again.as_data_source("test"))
    assert rows[4]["id"] == "scenes-test-000004"


def test_preparation_and_reading_need_no_tensorflow_torch_or_network(tmp_path):
    code = f"""
import socket, sys
def refused(*args, **kwargs):
    raise AssertionError(f"tried to reach {{args}}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
from balcap_jax.cli import process
from balcap_jax.data import input as data_input
from balcap_jax.data.scenes import builder
process.install()
made = builder.prepare({str(tmp_path)!r}, **{SETTINGS!r})
batch = next(data_input.make_dataset(made.as_data_source("train"), batch_size=4, seed=0))
assert batch["image"].shape == (4, 96, 96, 3), batch["image"].shape
assert not {{"tensorflow", "torch"}} & set(sys.modules), "imported"
"""
    result = _run(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 2


def test_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"scenes in .*file/data: Not a directory") as caught:
        builder.prepare(tmp_path / "file" / "data", **SETTINGS)
    assert "\n" not in str(caught.value)
    if pathlib.Path("/proc/1").exists():
        with pytest.raises(UserError, match="/proc"):
            builder.prepare("/proc/balcap-data", **SETTINGS)


def test_full_disk_is_one_clear_line_and_leaves_nothing_readable(tmp_path):
    code = f"""
import resource, signal
from balcap_jax.data.scenes import builder
from balcap_jax.cli.process import exit_on_user_error
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # as a full disk: writing fails after 30 kB
exit_on_user_error(builder.prepare)({str(tmp_path)!r}, **{SETTINGS!r})
"""
    result = _run(code)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot prepare the data set scenes in ")
    assert "File too large" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*array_record*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"train": 0}, "train must be"), ({"image_size": 8}, "image_size"), ({"captions_per_image": 1.5}, "captions_per")],
)
def test_settings_out_of_range(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        builder.prepare(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def captions(count: int) -> list[str]:
    texts = []
    for seed in range(count // 2):
        scene, rng = world.sample_scene(7_000_000 + seed), np.random.default_rng(seed)
        texts += [language.reference_caption(scene, rng), captioner.base_caption(scene, rng)]
    return texts


def test_tokenizer_round_trip_on_captions():
    made = tokenizer.scenes_tokenizer()
    for text in [builder.PROMPT, *captions(1000)]:
        ids = made(text)["input_ids"]
        assert made.unk_token_id not in ids, text
        assert made.decode(ids) == text
        assert (
            made.decode([made.bos_token_id, *ids, made.eos_token_id, made.pad_token_id], skip_special_tokens=True)
            == text
        )


def test_tokenizer_survives_saving(tmp_path):
    made = tokenizer.scenes_tokenizer()
    made.save_pretrained(tmp_path)
    texts = captions(20)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == made.get_vocab()
    assert loaded(texts)["input_ids"] == made(texts)["input_ids"]
    assert loaded.batch_decode(loaded(texts)["input_ids"]) == texts
    assert [loaded.pad_token, loaded.bos_token, loaded.eos_token, loaded.unk_token] == [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
    ]
    assert loaded("<bos><image><image> A red star.<eos>")["input_ids"][:3] == [1, 4, 4]


def test_tokenizer_is_deterministic_and_unicode_safe():
    text = "Une étoile — “rouge” 红色 🙂, isn't\n- 3 of  them!"
    first = tokenizer.build_tokenizer([text, "b a"])
    second = tokenizer.build_tokenizer(["a b", text])
    assert first.get_vocab() == second.get_vocab()
    assert first.convert_ids_to_tokens(range(5)) == ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    assert first.decode(first(text)["input_ids"]) == text
    assert first("etoile, 黒")["input_ids"] == [3, first.convert_tokens_to_ids(","), 3]
    # The first word of a text is the token that it is elsewhere.
    assert first("a b")["input_ids"] == first("b a")["input_ids"][::-1]


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    root = pathlib.Path(builder.__file__).parents[3]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        # As commands set it: where PyTorch is not installed, transformers says so on stderr.
        env=os.environ | environment | {"PYTHONPATH": path, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
        timeout=120,
    )


def _python(code: str, **environment: str) -> str:
    result = _run(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
