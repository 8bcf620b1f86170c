"""Model directories, and the processor between images, texts and the policy's arrays."""

import dataclasses
import gc
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from balcap_jax import models
from balcap_jax.cli import process
from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import default_config
from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.models.llava.processing import VICUNA_TEMPLATE, LlavaProcessor, fit
from balcap_jax.models.prompting import fill

PROMPT = "Describe the scene."
# 16 image tokens, the prompt's four, and one at the front.
MODEL = default_config().model.to_dict() | {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 8,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_mlp": 12,
    "width": 12,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_size": 6,
    "mlp": 16,
    "prompt_tokens": 24,
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([PROMPT, "a red ball lies on the table, left of a cube.", "USER: ASSISTANT:"])


@pytest.fixture(scope="module")
def model(tokenizer):
    policy, processor = models.build(MODEL, tokenizer)
    rng, shapes = np.random.default_rng(1), jax.eval_shape(policy.init, jax.random.key(0))
    return policy, jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes), processor


@pytest.fixture
def saved(model, tmp_path):
    _, params, processor = model
    return models.save(tmp_path / "model", MODEL, params, processor)


def pictures(count: int, size: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8))


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- directories


def test_a_saved_model_comes_back_bit_for_bit(model, saved):
    policy, params, processor = model
    loaded_policy, loaded_params, loaded_processor = models.load(saved)
    assert loaded_policy == policy
    assert jax.tree.structure(loaded_params) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded_params), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)
    ours, theirs = (one(pictures(2), [PROMPT, "a red ball."]) for one in (processor, loaded_processor))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    text = ["a red ball, left of a cube."]
    tokens, _ = loaded_processor.encode_responses([text], 16)
    assert loaded_processor.decode(tokens) == text
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"]  # nothing of the writing is left


def test_the_template_is_saved_with_the_model(model, tokenizer, tmp_path):
    policy, params, _ = model
    chat = LlavaProcessor(tokenizer, 32, policy.image_tokens, prompt_tokens=80, template=VICUNA_TEMPLATE)
    path = models.save(tmp_path / "chat", MODEL | {"prompt_tokens": 80}, params, chat)
    assert models.load(path)[2].template == VICUNA_TEMPLATE


def test_overrides_change_what_has_no_parameters(model, saved):
    policy, params, processor = models.load(saved, dtype="bfloat16", prompt_tokens=40, logits_chunk=7)
    assert (policy.decoder.dtype, policy.vision.dtype, policy.logits_chunk) == ("bfloat16", "bfloat16", 7)
    assert processor([pictures(1)[0]], [PROMPT]).tokens.shape == (1, 40)
    np.testing.assert_array_equal(params["decoder"]["embed"], model[1]["decoder"]["embed"])  # still the fp32 weights
    assert models.load(saved)[0] == model[0]  # the directory is as it was


def test_an_existing_model_is_replaced(model, saved):
    _, params, processor = model
    other = jax.tree.map(lambda x: x + 1, params)
    models.save(saved, MODEL, other, processor)
    np.testing.assert_array_equal(models.load(saved)[1]["decoder"]["head"], other["decoder"]["head"])


def test_the_rest_of_an_interrupted_save_is_in_nobodys_way(model, saved):
    aside = saved.with_name("model.writing")
    (aside / "params").mkdir(parents=True)
    (aside / "model.json").write_text("{")
    assert models.load(saved)[0] == model[0]
    models.save(saved, MODEL, model[1], model[2])
    assert not aside.exists()


def test_a_directory_that_is_no_model(tmp_path):
    assert error_of(models.load, tmp_path / "none") == (
        f"no model at {tmp_path / 'none'}: model.json is missing; give a directory that training or convert wrote, "
        f"or a Hugging Face checkpoint"
    )


def test_a_torn_model_file_is_named(saved):
    (saved / "model.json").write_text((saved / "model.json").read_text()[:40])
    message = error_of(models.load, saved)
    assert message.startswith(f"{saved / 'model.json'} is not JSON (")
    assert message.endswith("); convert or save the model again")


def test_a_field_that_is_missing_is_named(saved):
    fields = json.loads((saved / "model.json").read_text())
    del fields["kv_heads"]
    (saved / "model.json").write_text(json.dumps(fields))
    message = error_of(models.load, saved)
    assert message == f"{saved / 'model.json'} lacks the field 'kv_heads'; convert or save the model again"


def test_an_unknown_family_is_named(saved):
    fields = json.loads((saved / "model.json").read_text()) | {"family": "llama"}
    (saved / "model.json").write_text(json.dumps(fields))
    assert error_of(models.load, saved) == (
        f"{saved / 'model.json'}: config field 'model.family' must be one of llava, qwen2_5_vl, got 'llama'; did you "
        f"mean 'llava'?; convert or save the model again"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": "128"}, "'model.width' must be an integer, got '128'"),
        ({"layers": 0}, "'model.layers' must be "),
        ({"layers": 10**9}, "'model.layers' must be "),
        ({"vocab": 10**15}, "'model.vocab' must be "),
        ({"heads": -2}, "'model.heads' must be "),
        ({"heads": 3, "kv_heads": 2}, "'model.heads' (3) must be divisible by model.kv_heads (2)"),
        ({"norm_eps": None}, "'model.norm_eps' must be a number, got None"),
        ({"rope_theta": float("inf")}, "'model.rope_theta' must be a number, got inf"),
        ({"dtype": "float8"}, "'model.dtype' must be one of float32, bfloat16, got 'float8'"),
        ({"family": {}}, "the field 'family' is an object, not one value"),
        ({"template": ["a"]}, "'model.template' must be a string, got ['a']"),
        ({"full_attention_layers": 3}, "'model.full_attention_layers' must be a tuple of integers, got 3"),
        ({"full_attention_layers": {"a": 1}}, "the field 'full_attention_layers' is an object, not one value"),
        ({"vision_norm_eps": "small"}, "the field 'vision_norm_eps' must be a number > 0, got 'small'"),
        ({"prompt": 3}, "the field 'prompt' must be a string, got 3"),
    ],
)
def test_odd_fields_are_named(saved, change, named):
    fields = json.loads((saved / "model.json").read_text()) | change
    (saved / "model.json").write_text(json.dumps(fields))
    message = error_of(models.load, saved)
    assert message.startswith(f"{saved / 'model.json'}: ")
    assert named in message
    assert message.endswith("; convert or save the model again")


@pytest.mark.parametrize("name", ["dtype", "template", "prompt_tokens", "family"])
def test_fields_that_are_no_sizes_are_missed_too(saved, name):
    fields = json.loads((saved / "model.json").read_text())
    del fields[name]
    (saved / "model.json").write_text(json.dumps(fields))
    assert f"lacks the field '{name}'" in error_of(models.read_fields, saved)


@pytest.mark.parametrize("change", [{"prompt_tokens": -1}, {"prompt_tokens": 10}, {"dtype": "int8"}])
def test_an_override_out_of_range_is_refused(saved, change):
    message = error_of(models.load, saved, **change)
    assert message.startswith(f"the model at {saved} cannot be changed so: config field 'model.{next(iter(change))}' ")


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps", "max_aspect"])
@pytest.mark.parametrize("value", [10**400, -(10**309)])
def test_an_integer_that_no_float_holds_is_refused(saved, name, value):
    assert f"the field {name!r} is an integer that no float holds" in error_of(models.load, saved, **{name: value})


def test_an_unknown_override_is_named(saved):
    message = error_of(models.load, saved, prompt_token=3)
    assert message.startswith("unknown model field 'prompt_token'")
    assert "prompt_tokens" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": 3}, "decoder/layers/attention_norm/scale is (2, 12), (3, 12) is needed"),
        ({"mlp": 20}, "decoder/layers/down/kernel is (2, 16, 12), (2, 20, 12) is needed"),
    ],
)
def test_an_override_that_changes_a_shape_is_refused(saved, change, named):
    message = error_of(models.load, saved, **change)
    assert message.startswith(f"the parameters at {saved}/params do not fit its fields: {named}")


def test_an_override_that_takes_a_parameter_away_is_refused(saved):
    message = error_of(models.load, saved, tied_embeddings=True)
    assert message.startswith(f"the parameters at {saved}/params do not fit its fields: decoder/head is not among them")


def test_numbers_that_are_no_parameters_are_refused(saved):
    metadata = saved / "params" / "decoder.embed" / ".zarray"
    metadata.write_text(metadata.read_text().replace("<f4", "<i4"))
    assert "do not fit its fields: decoder/embed holds int32" in error_of(models.load, saved)


def test_a_missing_tokenizer_is_named(saved):
    for path in saved.glob("token*"):
        path.unlink()
    assert error_of(models.load, saved).startswith(f"the tokenizer at {saved} cannot be read")


Q = "decoder.layers.q.kernel"
METADATA = "its _METADATA is not what this version writes"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("all gone", "/params/_METADATA: No such file or directory"),
        ("all empty", "/params/_METADATA: No such file or directory"),
        ("all torn", "/params/_METADATA is not JSON"),
        (("remove", f"{Q}/1.0.0.0"), f'/params/{Q}/1.0.0.0" is missing'),
        (("remove", f"{Q}/.zarray"), f'/params/{Q}/.zarray" does not exist'),
        ((b"short", f"{Q}/1.0.0.0"), f"/params/{Q}/1.0.0.0: expected at least"),
        ((b"{", f"{Q}/.zarray"), f"/params/{Q}/.zarray: Invalid JSON"),
        ((b"{}", f"{Q}/.zarray"), f"/params/{Q}/.zarray: "),
        ((b"[]", "_METADATA"), "/params/_METADATA is no JSON object"),
        ((b"{}", "_METADATA"), METADATA),
        ((b'{"tree_metadata": [1]}', "_METADATA"), METADATA),
        ((b'{"tree_metadata": {"a": {"key_metadata": 3}}}', "_METADATA"), METADATA),
        (('"value_type": "np.ndarray"', '"value_type": 3'), METADATA),
        (('"skip_deserialize": false', '"skip_deserialize": true'), METADATA),
        ((b"[" * 100_000, "_METADATA"), "nested too deeply"),
    ],
)
def test_damaged_parameters_are_named(saved, damage, reason, monkeypatch, capfd):
    params = saved / "params"
    if damage == "all torn":
        for path in params.rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])
    elif isinstance(damage, str):
        shutil.rmtree(params)
        if damage == "all empty":
            params.mkdir()
    elif damage[0][:1] == '"':
        (params / "_METADATA").write_text((params / "_METADATA").read_text().replace(*damage, 1))
    elif damage[0] == "remove":
        (params / damage[1]).unlink()
    else:
        (params / damage[1]).write_bytes(damage[0])
    beside = []
    monkeypatch.setattr(sys, "unraisablehook", beside.append)
    process.quieten_libraries()
    message = error_of(models.load, saved)
    gc.collect()
    assert reason in message
    assert str(params) in message
    assert message.endswith("; copy the model again, or convert or save it anew")
    assert "tensorstore_spec" not in message
    assert (beside, capfd.readouterr().err) == ([], "")


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(models.save, tmp_path / "file" / "model", MODEL, model[1], model[2])
    assert message == f"cannot write the model to {tmp_path / 'file' / 'model'}: not a directory; name another place"


# ------------------------------------------------------------------------------------------------- the processor


def test_prompts_are_padded_on_the_right_and_hold_one_token_per_patch(model, tokenizer):
    policy, _, processor = model
    prompt = processor(pictures(2), [PROMPT, "a red ball."])
    assert prompt.tokens.shape == prompt.mask.shape == prompt.positions.shape == (2, 24)
    assert prompt.images.dtype == np.uint8
    for row, text in enumerate((PROMPT, "a red ball.")):
        expected = [tokenizer.bos_token_id, *[policy.image_token] * 16, *tokenizer.encode(f" {text}")]
        assert prompt.tokens[row].tolist() == expected + [tokenizer.pad_token_id] * (24 - len(expected))
        assert prompt.mask[row].tolist() == [True] * len(expected) + [False] * (24 - len(expected))
        assert prompt.positions[row].tolist() == list(range(24))


def test_a_prompt_that_is_too_long_is_refused_by_name(model):
    processor = model[2]
    longest = " ".join(["red"] * 7)
    assert processor(pictures(1), [longest]).mask.all()
    message = error_of(processor, pictures(2), [PROMPT, f"{longest} ball"], ["first", "picture 17"])
    assert message.startswith("the prompt of picture 17 needs 25 tokens (16 of them the image's)")
    assert "model.prompt_tokens is 24" in message
    assert error_of(processor, pictures(2), [PROMPT, f"{longest} ball"]).startswith("the prompt of sample 1 needs 25")


@pytest.mark.parametrize("template", ["{prompt}", "{image}{image} {prompt}"])
def test_image_tokens_are_counted_against_the_tower(tokenizer, template):
    processor = LlavaProcessor(tokenizer, 32, 16, prompt_tokens=64, template=template)
    message = error_of(processor, pictures(1), [PROMPT], ["picture 3"])
    placed = 16 * template.count("{image}")
    assert message.startswith(f"the prompt of picture 3 holds {placed} image tokens but the vision tower gives 16")


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{image.x} {prompt}", "{image.x} in it stands for nothing"),
        ("{image[0]} {prompt}", "{image[0]} in it stands for nothing"),
        ("{image!r} {prompt}", "{image} in it stands for nothing"),
        ("{image:>9} {prompt}", "{image} in it stands for nothing"),
        ("{image} {} {prompt}", "{} in it stands for nothing"),
        ("{image} {words} {prompt}", "{words} in it stands for nothing"),
        ("{image} {prompt", "expected '}' before end of string"),
    ],
)
def test_a_template_takes_image_and_prompt_alone(tokenizer, template, named):
    processor = LlavaProcessor(tokenizer, 32, 16, prompt_tokens=64, template=template)
    message = error_of(processor, pictures(1), [PROMPT])
    assert (
        message == f"model.template is no template ({named}); it takes {{image}} and {{prompt}}, other braces doubled"
    )


def test_doubled_braces_of_a_template_are_braces():
    assert fill("{{a}} {image}{prompt}", image="<i>", prompt="{b}") == "{a} <i>{b}"


@pytest.mark.parametrize("instruction", ["\ud800", "a \udcff ball"])
def test_an_instruction_that_is_no_text_is_refused(model, instruction):
    message = error_of(model[2], pictures(1), [instruction], ["picture 3"])
    assert message.startswith("the prompt of picture 3 is no Unicode text")


@pytest.mark.parametrize(
    "instruction",
    ["<image> a red ball.", "<image><image>", "a <ima<image>ge> ball", "<pad> a <eos> red <bos> ball {image}"],
)
def test_an_instruction_cannot_bring_special_tokens_along(model, tokenizer, instruction):
    policy, _, processor = model
    prompt = dataclasses.replace(processor, prompt_tokens=40)(pictures(1), [instruction])
    tokens = prompt.tokens[0][prompt.mask[0]].tolist()
    assert tokens.count(policy.image_token) == 16
    assert tokens[1:17] == [policy.image_token] * 16
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special & set(tokens[17:])


def test_responses_end_in_the_end_token_and_longer_ones_are_cut(model, tokenizer):
    processor = model[2]
    tokens, mask = processor.encode_responses([["a red ball", "a cube"], ["", "a red ball lies on the table"]], 5)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    word = tokenizer.convert_tokens_to_ids
    red_ball, rest = [word("\u2581" + w) for w in ("a", "red", "ball")], [word("\u2581" + w) for w in ("lies", "on")]
    assert tokens[0, 0].tolist() == [*red_ball, eos, pad]
    assert tokens[0, 1].tolist() == [word("\u2581a"), word("\u2581cube"), eos, pad, pad]
    assert tokens[1, 0].tolist() == [eos, pad, pad, pad, pad]
    assert tokens[1, 1].tolist() == [
        *red_ball,
        *rest,
    ]  # cut: no end token, so that the model is not taught to stop here
    np.testing.assert_array_equal(mask.sum(-1), [[4, 3], [1, 5]])
    np.testing.assert_array_equal(mask, np.arange(5) < mask.sum(-1)[..., None])
    assert processor.decode(tokens) == ["a red ball", "a cube", "", "a red ball lies on"]


@pytest.mark.parametrize("text", ["a <eos> ball", "<image> ball", "<pad>"])
def test_a_target_text_cannot_bring_special_tokens_along(model, tokenizer, text):
    tokens, mask = model[2].encode_responses([[text]], 12)
    said = tokens[mask].tolist()
    assert said[-1] == tokenizer.eos_token_id
    assert not (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}) & set(said[:-1])


# ------------------------------------------------------------------------------------------------- geometry


def test_fit_leaves_an_image_of_the_right_size_alone():
    image = pictures(1)[0]
    assert fit(image, 32) is image


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 64), (90, 50), (50, 90), (7, 31), (33, 32), (640, 427)])
def test_fit_scales_the_shorter_edge_and_takes_the_centre(height, width):
    """A linear ramp stays linear: its values say which part of the image was taken, to within a pixel."""
    size, short = 32, min(height, width)
    rows = np.linspace(0, 255, height)[:, None] * np.ones((1, width))
    columns = np.ones((height, 1)) * np.linspace(0, 255, width)[None]
    image = np.stack([rows, columns, np.zeros_like(rows)], -1).round().astype(np.uint8)
    fitted = fit(image, size).astype(float)
    assert fitted.shape == (size, size, 3)
    middle = slice(2, -2)  # the filter bends a ramp at the image's edge
    for axis, length in ((0, height), (1, width)):
        centre = (np.arange(size) + 0.5 - size / 2) * short / size + length / 2  # in pixels of the image
        expected = (centre - 0.5) / (length - 1) * 255
        got = fitted[..., axis].mean(1 - axis)
        pixel = 255 / (length - 1) * max(1.0, short / size)
        np.testing.assert_allclose(got[middle], expected[middle], atol=pixel + 1)


def test_fit_equals_the_clip_image_processor():
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        do_rescale=False,
        do_normalize=False,
        do_convert_rgb=False,
    )
    for height, width in ((64, 48), (45, 91), (33, 70)):
        image = np.asarray(Image.fromarray(pictures(1, 8)[0]).resize((width, height), Image.Resampling.BICUBIC))
        theirs = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        np.testing.assert_array_equal(fit(image, 32), np.moveaxis(theirs, 0, -1))
