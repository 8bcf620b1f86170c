"""The command `caption`: every picture ends in one line or one named error, whatever stops it on the way."""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import output_keys
import pytest
from PIL import Image
from system.command_runs import start as start_forked

from balcap_jax import caption as command
from balcap_jax import models
from balcap_jax.caption import Options, caption
from balcap_jax.captioning import captioner
from balcap_jax.captioning.options import mesh_sizes, of_command
from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import default_config
from balcap_jax.data import images
from balcap_jax.data.listing import list_items
from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.parallel import sharding

ROOT = Path(__file__).parents[2]
PROMPT = "describe the picture."
SIZES = {
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_mlp": 24,
    "width": 24,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_size": 12,
    "mlp": 32,
    "prompt_tokens": 28,
}
FAMILIES = {
    "llava": {"image_size": 32, "patch_size": 8},
    "qwen2_5_vl": {
        "patch_size": 4,
        "window_size": 16,
        "full_attention_layers": (1,),
        "mrope_section": (2, 2, 2),
        "qkv_bias": True,
        "max_image_tokens": 16,
    },
    "qwen3_vl": {
        "patch_size": 4,
        "vision_positions": 9,
        "deepstack_layers": (0,),
        "mrope_section": (2, 2, 2),
        "max_image_tokens": 16,
    },
}
OPTIONS = Options(prompt=PROMPT, batch_size=4, max_tokens=12, dtype="float32")
SAMPLED = dataclasses.replace(OPTIONS, temperature=1.0, samples=3, seed=7)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """family -> directory of a random small model, made on first use."""
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            fields = default_config().model.to_dict() | SIZES | FAMILIES[family] | {"family": family}
            words = "a red blue green small large ball cube cone dog house tree stands lies on under near the of table."
            tokenizer = build_tokenizer([PROMPT, words])
            policy, processor = models.build(fields, tokenizer)
            rng, shapes = np.random.default_rng(1), jax.eval_shape(policy.init, jax.random.key(0))
            params = jax.tree.map(lambda x: (0.5 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)
            made[family] = models.save(tmp_path_factory.mktemp(family) / "model", fields, params, processor)
        return made[family]

    return make


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request, model_of):
    return model_of(request.param)


@pytest.fixture
def llava(model_of):
    return model_of("llava")


def photograph(seed: int, height: int, width: int) -> Image.Image:
    """Smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Nine photographs, pictures of odd kinds, files that are no pictures, and things to be left out."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep" / "er").mkdir(parents=True)
    for i in range(9):
        photograph(i, 40 + 9 * i, 90 - 7 * i).save(folder / ("deep/er" if i % 3 else "") / f"photo {i}.jpg")
    Image.new("RGB", (1, 1), "red").save(folder / "one_pixel.png")
    Image.new("RGB", (600, 3), "red").save(folder / "strip.png")
    photograph(20, 30, 40).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)).save(folder / "deep.png")
    frames = [photograph(30 + i, 20, 30) for i in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    whole = (folder / "photo 0.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("left out")
    (folder / ".hidden.jpg").write_bytes(whole)
    return folder


GOOD = {
    *(f"photo {i}.jpg" for i in (0, 3, 6)),
    *(f"deep/er/photo {i}.jpg" for i in (1, 2, 4, 5, 7, 8)),
    *("one_pixel.png", "strip.png", "cmyk.jpg", "deep.png", "animated.gif"),
}
BAD = {"text.jpg": "no picture", "empty.png": "no picture", "truncated.jpg": "damaged: image file is truncated"}


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(mesh_sizes(""), jax.devices()[:1])


def lines_of(path: Path) -> list[dict]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def by_image(path: Path) -> dict[str, dict]:
    """Lines by image; none may be there twice."""
    lines = lines_of(path)
    found = {line["image"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_picture_gets_one_line_or_one_error(model, folder, tmp_path):
    out = tmp_path / "made" / "captions.jsonl"
    counts = caption(model, folder, out, OPTIONS)
    captions, errors = by_image(out), by_image(out.with_name("captions.errors.jsonl"))
    wide = int("qwen" in str(model))  # the strip, which is letter-boxed
    assert counts == {"captions": 14, "errors": 3, "new": 14, "wide": wide}
    assert list(captions) == sorted(GOOD)
    assert errors.keys() == BAD.keys()
    assert all(errors[name]["error"].startswith(reason) for name, reason in BAD.items())
    _, _, processor = models.load(model)
    for line in captions.values():
        assert list(line) == ["image", "caption", "tokens", "truncated"]
        assert 1 <= line["tokens"] <= 12
        assert not line["truncated"] or line["tokens"] == 12
        assert line["caption"] == line["caption"].strip()
        assert not set(processor.tokenizer.all_special_tokens) & set(line["caption"].split())
    assert len({line["caption"] for line in captions.values()}) > 3  # the model looks at the picture
    # Done is done: nothing is read, loaded or written again.
    before = out.read_bytes()
    assert caption(model, folder, out, OPTIONS) == {"captions": 14, "errors": 3, "new": 0, "wide": 0}
    assert out.read_bytes() == before


@pytest.mark.parametrize("model", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)], indirect=True)
def test_samples_depend_on_seed_and_picture_and_not_on_the_batch(model, folder, tmp_path):
    whole, alone, other = (tmp_path / f"{name}.jsonl" for name in ("whole", "alone", "other"))
    caption(model, folder, whole, SAMPLED)
    listed = tmp_path / "list.jsonl"
    names = ["animated.gif", "photo 3.jpg", "deep/er/photo 8.jpg"]
    listed.write_text("".join(json.dumps({"image": str(folder / name), "id": name}) + "\n" for name in reversed(names)))
    caption(model, listed, alone, SAMPLED)
    expected = by_image(whole)
    assert [line["id"] for line in lines_of(alone)] == names[::-1]
    for line in lines_of(alone):
        assert line | {"image": line["id"]} == expected[line["id"]] | {"id": line["id"]}
    caption(model, listed, other, Options(**vars(SAMPLED) | {"seed": 8}))
    assert any(a["caption"] != b["caption"] for a, b in zip(lines_of(alone), lines_of(other), strict=True))


def test_best_of_n_is_the_sample_of_the_highest_mean_log_probability(llava, folder, tmp_path):
    best, every = tmp_path / "best.jsonl", tmp_path / "all.jsonl"
    caption(llava, folder, best, SAMPLED)
    caption(llava, folder, every, Options(**vars(SAMPLED) | {"keep": "all"}))
    chosen, first = by_image(best), 0
    for line in lines_of(every):
        samples = line.pop("samples")
        assert len(samples) == 3
        highest = max(range(3), key=lambda g: samples[g]["log_prob"])
        assert all(sample["log_prob"] < 0 for sample in samples)
        assert {name: samples[highest][name] for name in ("caption", "tokens", "truncated")} | {
            "image": line["image"]
        } == line
        assert chosen[line["image"]] == line
        first += highest == 0
    assert 0 < first < len(GOOD)  # not simply the first
    for out in (best, every):
        assert [problem for line in lines_of(out) for problem in output_keys.problems("F.jsonl", line)] == []
        (settings,) = output_keys.records(out.with_suffix(".settings.json"))
        assert output_keys.problems("F.settings.json", settings) == []


def test_the_score_is_the_models_own(llava, folder, tmp_path, monkeypatch):
    """`log_prob` of a sample against the update's path over the same tokens."""
    one, drawn = tmp_path / "list.jsonl", []
    one.write_text(json.dumps({"image": str(folder / "photo 3.jpg")}))
    best = captioner.Captioner._best
    # The texts need not encode to the tokens that were drawn.
    monkeypatch.setattr(captioner.Captioner, "_best", lambda self, out, row: drawn.append(out) or best(self, out, row))
    caption(llava, one, tmp_path / "out.jsonl", Options(**vars(SAMPLED) | {"keep": "all"}))
    samples = lines_of(tmp_path / "out.jsonl")[0]["samples"]
    policy, params, processor = models.load(llava)
    prompt = processor([images.read(folder / "photo 3.jpg")], [PROMPT])
    responses, lengths = drawn[0].tokens[:1], drawn[0].lengths[0]
    scored = jax.jit(lambda params: policy.log_probs(params, prompt, policy.encode(params, prompt.images), responses))(
        params
    )
    means = np.where(np.arange(12) < lengths[:, None], scored[0], 0).sum(-1) / lengths
    assert [sample["log_prob"] for sample in samples] == pytest.approx(means.tolist(), abs=1e-4)


# ---- stopping and going on


class Stopped(Exception):
    pass


@pytest.mark.parametrize("torn", [b"", b'{"image": "photo 3.jpg", "capt', b'{"image": {}'])
def test_going_on_after_a_stop(llava, folder, tmp_path, monkeypatch, torn):
    """Stopped after the second batch, in the middle of a line of either file."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    caption(llava, folder, whole, OPTIONS)
    run, batches = captioner.Captioner.__call__, []

    def stop(self, items, prompts):
        if len(batches) == 2:
            raise Stopped
        batches.append([item.key for item in items.values()])
        return run(self, items, prompts)

    with monkeypatch.context() as patched:
        patched.setattr(captioner.Captioner, "__call__", stop)
        with pytest.raises(Stopped):
            caption(llava, folder, out, dataclasses.replace(OPTIONS, batch_size=5), mesh=one_device())
    done = [key for batch in batches for key in batch]
    assert done == [name for name in sorted(GOOD | BAD.keys())[:10] if name in GOOD]
    for file in (out, tmp_path / "out.errors.jsonl"):
        with file.open("ab") as end:
            end.write(torn)
    counts = caption(llava, folder, out, OPTIONS)
    assert counts == {"captions": 14, "errors": 3, "new": 14 - len(done), "wide": 0}
    assert lines_of(out) == lines_of(whole)
    assert by_image(tmp_path / "out.errors.jsonl") == by_image(tmp_path / "whole.errors.jsonl")


def start(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    given = [sys.executable, "-m", "balcap_jax.caption", *arguments]
    return subprocess.Popen(given, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_command_goes_on(llava, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out.jsonl"
    folder.mkdir()
    for i in range(300):
        photograph(i, 30, 40).save(folder / f"{i}.png")
    arguments = [f"--model={llava}", f"--images={folder}", f"--out={out}", f"--prompt={PROMPT}"]
    arguments += ["--batch_size=1", "--max_tokens=12"]
    process = start(*arguments)
    try:
        until = time.monotonic() + 300  # the imports alone may take minutes on a busy machine
        while not (out.exists() and out.read_bytes().count(b"\n") >= 20):
            assert time.monotonic() < until
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        # While it runs, nobody else writes there.
        with pytest.raises(UserError, match="being written by another process"):
            caption(llava, folder, out, OPTIONS)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    written = out.read_bytes()
    assert 20 <= written.count(b"\n") < 300
    counts = caption(llava, folder, out, Options(prompt=PROMPT, batch_size=1, max_tokens=12))
    assert (counts["captions"], counts["errors"]) == (300, 0)
    assert counts["new"] < 285  # not all over again
    assert out.read_bytes().startswith(written[: written.rfind(b"\n") + 1])
    assert by_image(out).keys() == {f"{i}.png" for i in range(300)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.settings.json", "photos"]


def test_errors_are_tried_again_only_when_asked(llava, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out.jsonl"
    folder.mkdir()
    photograph(0, 30, 40).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    (folder / "c.png").write_bytes(b"")
    assert caption(llava, folder, out, OPTIONS)["errors"] == 2
    photograph(1, 30, 40).save(folder / "b.png")
    assert caption(llava, folder, out, OPTIONS) == {"captions": 1, "errors": 2, "new": 0, "wide": 0}
    assert caption(llava, folder, out, OPTIONS, retry_errors=True) == {"captions": 2, "errors": 1, "new": 1, "wide": 0}
    assert list(by_image(out)) == ["a.png", "b.png"]
    assert list(by_image(tmp_path / "out.errors.jsonl")) == ["c.png"]
    photograph(2, 30, 40).save(folder / "d.png")  # a new picture joins
    assert caption(llava, folder, out, OPTIONS) == {"captions": 3, "errors": 1, "new": 1, "wide": 0}


def test_a_picture_is_captioned_once_however_its_path_is_spelt(llava, tmp_path):
    folder, out, listed = tmp_path / "photos", tmp_path / "out.jsonl", tmp_path / "list.jsonl"
    folder.mkdir()
    photograph(0, 30, 40).save(folder / "a#1.png")
    (folder / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    for image in ("photos/a#1.png", "./photos/a#1.png", "photos/../photos/a#1.png", folder / "a#1.png"):
        rows = [{"image": str(image)}, {"image": str(image).replace("a#1.png", "b.HEIC")}]
        listed.write_text("\n".join(map(json.dumps, rows)))
        counts = caption(llava, listed, out, OPTIONS)
        assert (counts["captions"], counts["errors"]) == (1, 1)
    assert list(by_image(out)) == ["photos/a#1.png"]
    assert list(by_image(tmp_path / "out.errors.jsonl")) == ["photos/b.HEIC"]


def test_settings_are_not_mixed_in_one_file(llava, folder, tmp_path):
    listed, out = tmp_path / "list.jsonl", tmp_path / "out.jsonl"
    listed.write_text(json.dumps({"image": str(folder / "photo 0.jpg")}))
    caption(llava, listed, out, OPTIONS)
    before = out.read_bytes()
    for change, named in [
        ({"prompt": "a red ball."}, "prompt 'describe the picture.', not 'a red ball.'"),
        ({"temperature": 0.5}, "temperature 0.0, not 0.5"),
        ({"max_tokens": 13}, "max_tokens 12, not 13"),
    ]:
        message = error_of(caption, llava, folder, out, Options(**vars(OPTIONS) | change))
        assert message == f"{out} has lines made with {named}; name another file with --out"
    # What greedy captions don't depend on may differ; and a model that was moved is the same model.
    moved = shutil.copytree(llava, tmp_path / "moved")
    assert caption(moved, listed, out, Options(**vars(OPTIONS) | {"batch_size": 2, "seed": 5}))["captions"] == 1
    fields = json.loads((moved / "config.json").read_text())
    fields["text_config"]["rms_norm_eps"] = 1e-4
    (moved / "config.json").write_text(json.dumps(fields))
    message = error_of(caption, moved, folder, out, OPTIONS)
    assert message.startswith(f"{out} has captions of another model (then {llava}, now {moved})")
    # Other weights in files of the same names and sizes.
    trained = shutil.copytree(llava, tmp_path / "trained")
    largest = max(trained.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2 :: 1000] = bytes(len(content[len(content) // 2 :: 1000]))
    largest.write_bytes(content)
    assert "captions of another model" in error_of(caption, trained, folder, out, OPTIONS)
    (tmp_path / "out.settings.json").unlink()
    assert "out.settings.json beside it" in error_of(caption, llava, folder, out, OPTIONS)
    assert out.read_bytes() == before


# ---- lists and bad input


def test_a_list_has_its_own_prompts_ids_and_place(llava, folder, tmp_path):
    place = tmp_path / "lists"
    place.mkdir()
    shutil.copy(folder / "photo 3.jpg", place / "a.jpg")
    entries = [
        {"image": "a.jpg"},
        {"image": "a.jpg", "id": "second", "prompt": "a red ball."},
        {"image": "gone.jpg", "id": "third"},
    ]
    (place / "list.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, entries)))
    out = tmp_path / "out.jsonl"
    assert caption(llava, place / "list.jsonl", out, OPTIONS)["captions"] == 2
    first, second = lines_of(out)
    assert (first["image"], "id" in first, second["image"], second["id"]) == ("a.jpg", False, "a.jpg", "second")
    assert first["caption"] != second["caption"]
    errors = lines_of(tmp_path / "out.errors.jsonl")
    assert errors == [{"image": "gone.jpg", "id": "third", "error": "no such file"}]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"image": "a.jpg"}\n{"image": ', "line 2 is not JSON (Expecting value"),
        ("[" * 100_000, "line 1 is not JSON that can be read (nested too deeply)"),
        ('{"image": "a.jpg", "id": "\\ud800"}', "line 1 is not JSON (half of a surrogate pair"),
        ('{"image": "a.jpg", "prompt": "\\udfff"}', "line 1 is not JSON (half of a surrogate pair"),
        ('{"image": "a.jpg", "id": ["a"]}', """line 1: "id" must be text, got ['a']"""),
        ('["a.jpg"]', 'line 1: a line is an object with "image"'),
        ('{"picture": "a.jpg"}', 'line 1: a line is an object with "image"'),
        ('{"image": "a.jpg", "prompt": 3}', 'line 1: "prompt" must be text, got 3'),
        ('{"image": "a.jpg"}\n\n{"image": "a.jpg"}', "line 3: 'a.jpg' is line 1 already"),
        ('{"image": "b/../a.jpg"}\n{"image": "./a.jpg"}', "line 2: 'a.jpg' is line 1 already"),
        ("\n", "is empty"),
    ],
)
def test_bad_lists_are_named(llava, tmp_path, content, named):
    (tmp_path / "list.jsonl").write_text(content)
    message = error_of(caption, llava, tmp_path / "list.jsonl", tmp_path / "out.jsonl", OPTIONS)
    assert str(tmp_path / "list.jsonl") in message
    assert named in message
    assert not (tmp_path / "out.jsonl").exists()


def test_other_bad_input_is_one_line_and_leaves_nothing(llava, folder, tmp_path, capsys):
    def run(*arguments: str) -> str:
        given = {"--model": llava, "--images": folder, "--out": tmp_path / "out.jsonl", "--prompt": PROMPT}
        given |= dict(argument.split("=", 1) for argument in arguments)
        with pytest.raises(SystemExit) as ended:
            command.main([f"{name}={value}" for name, value in given.items()])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out.jsonl").exists()
        return line

    (tmp_path / "nothing").mkdir()
    assert run(f"--images={tmp_path / 'nothing'}").startswith(f"error: no pictures in {tmp_path / 'nothing'}")
    assert run("--images=none") == "error: --images=none: no such folder or file"
    assert run(f"--images={folder / 'photo 0.jpg'}").endswith("(not a text file); give a folder or a JSONL file")
    assert run("--model=none").startswith(f"error: no model at {Path.cwd()}/none: config.json is missing; give ")
    assert run(f"--model={tmp_path / 'nothing'}").startswith(f"error: no model at {tmp_path / 'nothing'}")
    assert run("--samples=4").startswith("error: --samples=4 needs --temperature above 0")
    assert run("--top_p=0").startswith("error: --top_p=0.0 is out of range")
    for option in ("prompt_tokens", "max_tokens", "samples", "batch_size", "threads"):
        for value in (-3, 0, 10**9):
            line = run(f"--{option}={value}", "--temperature=1")
            assert line.startswith(f"error: --{option}={value} is out of range: it must be in [1, ")
    assert run("--prompt_tokens=16").startswith(f"error: the model at {llava} cannot be changed so: ")
    for option in ("model", "images", "out"):
        assert run(f"--{option}=").startswith(f"error: argument --{option}: it names no file or directory")
        assert run(f"--{option}={'a' * 300}").startswith(
            f"error: argument --{option}: it cannot be a file (File name too long), got 'aaa"
        )
    assert run("--images=~/none") == f"error: --images={Path.home()}/none: no such folder or file"
    assert run("--model=~/none").startswith(f"error: no model at {Path.home()}/none: config.json is missing; give ")
    assert "`hf download some/model --local-dir DIRECTORY`" in run("--model=some/model")
    assert "is no Unicode text" in run("--prompt=a\udcffb")
    assert "invalid int value: 'x'" in run("--seed=x")
    assert run(f"--prompt={'red ' * 27}") == (
        "error: the prompt of animated.gif needs 45 tokens (16 of them the image's), the model has room for 28; give "
        "--prompt_tokens=45, or a shorter prompt"
    )
    assert run("--out=/dev/null").startswith("error: /dev/null is no regular file")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run(f"--out={tmp_path / 'file' / 'out.jsonl'}")


def test_the_prompt_is_the_models_own(llava, folder, tmp_path, capsys):
    """A model says what it was trained to answer; the longer prompt for all other models would not fit this one."""
    arguments = [f"--images={folder}", f"--out={tmp_path / 'out.jsonl'}", "--max_tokens=4"]
    with pytest.raises(SystemExit):
        command.main([f"--model={llava}", *arguments, f"--prompt={'red ' * 27}"])
    assert "give --prompt_tokens=45, or a shorter prompt" in capsys.readouterr().err
    model = shutil.copytree(llava, tmp_path / "model")
    fields = json.loads((model / "balcap_jax.json").read_text()) | {"prompt": "a red ball."}
    (model / "balcap_jax.json").write_text(json.dumps(fields))
    command.main([f"--model={model}", *arguments])
    assert json.loads((tmp_path / "out.settings.json").read_text())["prompt"] == "a red ball."
    first = by_image(tmp_path / "out.jsonl")
    given = Options(prompt="a red ball.", max_tokens=4)
    assert caption(model, folder, tmp_path / "out.jsonl", given)["new"] == 0  # the same settings
    other = Options(prompt=PROMPT, max_tokens=4)
    caption(model, folder, tmp_path / "other.jsonl", other)
    assert by_image(tmp_path / "other.jsonl") != first


def given(*arguments: str) -> argparse.Namespace:
    return command.make_parser().parse_args(["--model=m", "--images=i", "--out=o", *arguments])


def test_a_trained_model_says_how_it_is_asked_and_others_are_computed_in_bfloat16(llava, folder, tmp_path):
    fields, out, other = models.read_fields(llava), tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    greedy = {"prompt": "Describe this image in detail.", "temperature": 0.0, "max_tokens": 256, "dtype": "bfloat16"}
    assert (fields["dtype"], of_command(given(), fields).settings()) == ("float32", greedy)
    trained = {"prompt": "a red ball.", "max_tokens": 5, "dtype": "float32"}
    assert of_command(given(), fields | trained).settings() == trained | {"temperature": 0.0}
    more = ["--max_tokens=3", "--dtype=bfloat16", "--temperature=0.5", "--samples=2"]
    sampled = {"top_p": 1.0, "top_k": 0, "samples": 2, "keep": "best", "seed": 0, "temperature": 0.5}
    assert of_command(given(*more), fields | trained).settings() == (
        {"prompt": "a red ball.", "max_tokens": 3, "dtype": "bfloat16"} | sampled
    )

    model = shutil.copytree(llava, tmp_path / "model")
    own = model / "balcap_jax.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | trained))
    one = tmp_path / "list.jsonl"
    one.write_text(json.dumps({"image": str(folder / "photo 0.jpg")}))
    command.main([f"--model={model}", f"--images={one}", f"--out={other}", "--temperature=0.5", "--seed=3"])
    like = {**trained, **sampled, "samples": 1, "seed": 3}
    found = json.loads((tmp_path / "other.settings.json").read_text())
    assert len(found.pop("model_digest")) == 64
    assert found == {"model": str(model)} | like
    # The base under the protocol of the trained one, and what is given besides.
    command.main([f"--model={llava}", f"--images={one}", f"--out={out}", f"--like={other}"])
    assert json.loads((tmp_path / "out.settings.json").read_text()).items() >= like.items()
    assert lines_of(out)[0]["tokens"] <= 5
    assert of_command(given(f"--like={other}", "--max_tokens=4"), fields).settings() == like | {"max_tokens": 4}
    odd_ones = {"max_tokens": ("x", 1.5), "prompt": (3,), "temperature": (None, -1), "keep": (7,), "dtype": ("int8",)}
    for name, value in ((name, value) for name, values in odd_ones.items() for value in values):
        (tmp_path / "odd.settings.json").write_text(json.dumps({name: value}))
        odd = error_of(of_command, given(f"--like={tmp_path / 'odd.jsonl'}"), fields)
        assert odd.startswith(f"{tmp_path / 'odd.settings.json'}: {name} is {value!r}, which no caption is made with; ")
    none = error_of(of_command, given(f"--like={tmp_path / 'none.jsonl'}"), fields)
    assert none.startswith(f"{tmp_path / 'none.settings.json'}, which says how none.jsonl was made, is missing; ")


def test_the_cap_of_pictures_is_recorded_and_taken_from_other_captions(model_of, folder, tmp_path):
    qwen, listed, out = model_of("qwen2_5_vl"), tmp_path / "list.jsonl", tmp_path / "out.jsonl"
    listed.write_text(json.dumps({"image": str(folder / "deep/er/photo 8.jpg")}))
    caption(qwen, listed, out, dataclasses.replace(OPTIONS, max_image_tokens=6))
    assert json.loads((tmp_path / "out.settings.json").read_text())["max_image_tokens"] == 6
    fields = models.read_fields(qwen)
    _, _, processor = models.load(qwen, max_image_tokens=6)
    assert processor.image_tokens == 6
    assert Options().of_model(fields).max_image_tokens == 16
    larger = Options(max_image_tokens=20).of_model(fields)
    assert (larger.max_image_tokens, larger.prompt_tokens) == (20, 28 + 4)  # 4 more tokens of room
    liked = of_command(given(f"--like={out}"), fields)
    assert (liked.max_image_tokens, liked.dtype, liked.max_tokens) == (6, "float32", 12)
    one_size = models.read_fields(model_of("llava"))
    assert "max_image_tokens" not in of_command(given(f"--like={out}"), one_size).settings()
    message = error_of(Options(max_image_tokens=6).of_model, one_size)
    assert message.startswith("--max_image_tokens=6: pictures of a llava model have one size")


# ---- devices and processes


@pytest.mark.parametrize("model", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)], indirect=True)
def test_captions_do_not_depend_on_the_number_of_devices(model, folder, tmp_path):
    """One device, eight for pictures of their own, and parameters split over four of them."""
    split = sharding.make_mesh(mesh_sizes("fsdp:4"))
    for name, mesh in [("one", one_device()), ("eight", None), ("split", split)]:
        counts = caption(model, folder, tmp_path / f"{name}.jsonl", OPTIONS, mesh=mesh)
        assert (counts["captions"], counts["errors"]) == (14, 3)
    one = lines_of(tmp_path / "one.jsonl")
    assert [line["image"] for line in one] == sorted(GOOD)
    for name in ("eight", "split"):
        assert lines_of(tmp_path / f"{name}.jsonl") == one


@pytest.mark.parametrize("mesh", ["", pytest.param("fsdp:2", marks=pytest.mark.slow)])
def test_two_processes_share_the_pictures_and_the_first_writes(llava, folder, tmp_path, mesh):
    """With parameters split over both, too; and what one process left is gone on with."""
    caption(llava, folder, tmp_path / "one.jsonl", OPTIONS, mesh=one_device())
    out = tmp_path / "two.jsonl"
    given = [f"--model={llava}", f"--images={folder}", f"--out={out}", f"--prompt={PROMPT}", "--dtype=float32"]
    given += ["--max_tokens=12", "--batch_size=2", f"--mesh={mesh}"]
    first = lines_of(tmp_path / "one.jsonl")[:5]
    shutil.copy(tmp_path / "one.settings.json", tmp_path / "two.settings.json")
    out.write_text("".join(json.dumps(line) + "\n" for line in first))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    common = {"BALCAP_COORDINATOR": address, "BALCAP_PROCESS_COUNT": "2"}
    processes = [
        start_forked("balcap_jax.caption", *given, **common, BALCAP_PROCESS_ID=str(index)) for index in range(2)
    ]
    ended = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert f"14 captions (9 new): {out}; 3 unreadable" in ended[0][0]
    assert "captions" not in ended[1][0]
    assert by_image(out) == by_image(tmp_path / "one.jsonl")
    assert by_image(tmp_path / "two.errors.jsonl") == by_image(tmp_path / "one.errors.jsonl")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", {"data": -1}),
        ("fsdp:4", {"fsdp": 4, "data": -1}),
        ("fsdp:-1", {"fsdp": -1}),
        ("data:2, tensor:4", {"data": 2, "tensor": 4}),
    ],
)
def test_sizes_of_a_mesh(text, sizes):
    assert mesh_sizes(text) == dict.fromkeys(("replica", "data", "fsdp", "tensor"), 1) | sizes


@pytest.mark.parametrize(
    "text", ["4", "fsdp", "fsdp:0", "fsdp:-2", "model:2", "data:two", "fsdp:1,fsdp:1", "fsdp:9999999"]
)
def test_a_mesh_that_is_none_is_named(llava, folder, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        command.main([f"--model={llava}", f"--images={folder}", f"--out={tmp_path / 'o.jsonl'}", f"--mesh={text}"])
    assert capsys.readouterr().err.startswith(f"error: --mesh={text}: ")


def test_names_that_are_no_text_and_names_that_are_too_long_are_errors_of_their_pictures(llava, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out.jsonl"
    photos.mkdir()
    photograph(0, 30, 40).save(photos / "a.png")
    try:
        shutil.copy(photos / "a.png", os.fsencode(photos) + b"/b\xff\xfe.png")
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    for new in (1, 0):  # and their lines can be read again
        assert caption(llava, photos, out, OPTIONS) == {"captions": 1, "errors": 1, "new": new, "wide": 0}
    (line,) = lines_of(tmp_path / "out.errors.jsonl")
    assert line == {"image": "b\\xff\\xfe.png", "error": "the name of the file is not UTF-8; rename it"}
    assert caption(llava, photos, out, OPTIONS, retry_errors=True)["errors"] == 1

    entries = [{"image": "photos/a.png"}, {"image": "b" * 5000}, {"image": "a\0b", "id": "null"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    counts = caption(llava, tmp_path / "list.jsonl", tmp_path / "listed.jsonl", OPTIONS)
    assert (counts["captions"], counts["errors"]) == (1, 2)
    errors = [line["error"] for line in lines_of(tmp_path / "listed.errors.jsonl")]
    assert errors == ["cannot be looked at: File name too long", "no such file"]


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("out.jsonl", '{"image": "a", "id": 3}', 'line 2 names no picture: "id" or "image" must be text'),
        ("out.jsonl", '{"image": "a", "id": ["a"]}', "line 2 names no picture"),
        ("out.jsonl", "{}", "line 2 names no picture"),
        ("out.jsonl", "[]", "line 2 is no JSON object; mend or remove that line"),
        ("out.jsonl", "[" * 100_000, "line 2 is not JSON that can be read (nested too deeply); mend or remove"),
        ("out.jsonl", '{"image": "\\ud800"}', "line 2 is not JSON (half of a surrogate pair"),
        ("out.errors.jsonl", '{"image": 4}', "line 4 names no picture"),
        ("out.settings.json", None, "out.settings.json is no JSON object; name another file with --out"),
    ],
)
def test_odd_files_of_an_earlier_command_are_named(llava, folder, tmp_path, file, content, named):
    listed = tmp_path / "list.jsonl"
    names = ["photo 0.jpg", *BAD]
    listed.write_text("\n".join(json.dumps({"image": str(folder / name)}) for name in names))
    caption(llava, listed, tmp_path / "out.jsonl", OPTIONS)
    if content is None:
        (tmp_path / file).write_text("[]")
    else:
        with (tmp_path / file).open("a") as end:
            end.write(content + "\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = error_of(caption, llava, listed, tmp_path / "out.jsonl", OPTIONS)
    assert message.startswith(str(tmp_path / file))
    assert named in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_nothing(llava, folder, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    models.load(llava)  # what is compiled on the way may write to the cache
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        message = error_of(caption, llava, folder, tmp_path / "out.jsonl", OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"{tmp_path / 'out.settings.json'} cannot be written (File too large)")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_one_line(llava, folder, tmp_path, monkeypatch):
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n"), MemoryError()):

        def fail(self, items, prompts, error=error):
            raise error

        monkeypatch.setattr(captioner.Captioner, "__call__", fail)
        message = error_of(caption, llava, folder, tmp_path / "out.jsonl", OPTIONS)
        assert message.startswith("captioning needs more memory than there is; lower --batch_size, ")


def test_a_folder_without_a_readable_picture_ends_in_an_error(llava, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("no")
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit):
        command.main([f"--model={llava}", f"--images={tmp_path / 'photos'}", f"--out={out}", f"--prompt={PROMPT}"])
    assert capsys.readouterr().err.startswith("error: none of the 1 pictures can be read;")
    assert not out.exists()


# ---- real photographs


@pytest.mark.slow
def test_a_folder_of_photographs(model, tmp_path):
    """Every picture of the folder BALCAP_PHOTOS gets a line, also when it is stopped half-way."""
    photos = os.environ.get("BALCAP_PHOTOS")
    if not photos:
        pytest.skip("the environment variable BALCAP_PHOTOS names no folder of photographs")
    names = [item.image for item in list_items(photos, PROMPT)]
    out, arguments = tmp_path / "out.jsonl", [f"--model={model}", f"--images={photos}", f"--prompt={PROMPT}"]
    process = start(*arguments, f"--out={out}", "--max_tokens=12")
    try:
        while not (out.exists() and out.read_bytes().count(b"\n") >= len(names) // 2):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert len(lines_of(out)) < len(names)
    again = start(*arguments, f"--out={out}", "--max_tokens=12")
    output, errors = again.communicate()
    assert (again.returncode, errors) == (0, ""), output
    assert list(by_image(out)) == names
    assert not (tmp_path / "out.errors.jsonl").exists()
    print(output)
