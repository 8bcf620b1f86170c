"""Model directories, and the processor between images, texts and the policy's arrays."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from balcap_jax import models
from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import default_config
from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.models.formats import safetensors, slices
from balcap_jax.models.llava.processing import VICUNA_TEMPLATE, LlavaProcessor, fit
from balcap_jax.models.prompting import fill
from balcap_jax.parallel import sharding

PROMPT = "Describe the scene."
OWN = "balcap_jax.json"
# 16 image tokens, the prompt's four, and one at the front.
MODEL = default_config().model.to_dict() | {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 8,
    "vision_layers": 2,
    "feature_layer": -1,
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


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    aside.mkdir()
    (aside / "config.json").write_text("{")
    assert models.load(saved)[0] == model[0]
    models.save(saved, MODEL, model[1], model[2])
    assert not aside.exists()


def test_a_directory_that_is_no_model(tmp_path):
    assert error_of(models.load, tmp_path / "none") == (
        f"no model at {tmp_path / 'none'}: config.json is missing; give a directory of a Hugging Face checkpoint, of "
        f"an adapter, or one that training wrote"
    )


def test_the_name_of_a_model_on_the_hub_is_answered_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", tmp_path / "Qwen" / "Qwen2.5-VL-3B-Instruct"):
        message = error_of(models.load, name)
        assert "`hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIRECTORY`" in message
    (tmp_path / "Qwen").mkdir()
    assert "hf download" not in error_of(models.load, "Qwen/Qwen2.5-VL-3B-Instruct")  # a folder that was misspelt


def test_a_torn_file_of_ours_is_named(saved):
    (saved / OWN).write_text((saved / OWN).read_text()[:40])
    message = error_of(models.load, saved)
    assert message.startswith(f"{saved / OWN} is not JSON (")
    assert message.endswith("); mend or delete that file")


def test_an_entry_that_is_none_is_named(saved):
    change_json(saved / OWN, promt="Describe.")
    assert error_of(models.load, saved).startswith(f"{saved / OWN} has an entry 'promt', which is none of dtype, ")


def test_without_our_file_a_model_is_a_checkpoint_like_any_other(model, saved):
    (saved / OWN).unlink()
    policy, params, processor = models.load(saved)
    assert processor.template == VICUNA_TEMPLATE
    assert policy.vision.keep_unused
    np.testing.assert_array_equal(params["vision"]["unused"]["norm"]["scale"], 1.0)
    np.testing.assert_array_equal(params["decoder"]["head"], model[1]["decoder"]["head"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_tokens": "128"}, "'model.prompt_tokens' must be an integer, got '128'"),
        ({"prompt_tokens": 0}, "'model.prompt_tokens' must be "),
        ({"dtype": "float8"}, "'model.dtype' must be one of float32, bfloat16, got 'float8'"),
        ({"template": ["a"]}, "'model.template' must be a string, got ['a']"),
        ({"template": {}}, "the field 'template' is an object, not one value"),
        ({"max_aspect": float("inf")}, "'model.max_aspect' must be a number, got inf"),
        ({"prompt": 3}, "the field 'prompt' must be a string, got 3"),
        ({"max_tokens": True}, "the field 'max_tokens' must be an integer in [1, 65536], got True"),
        ({"max_tokens": 0}, "the field 'max_tokens' must be an integer in [1, "),
        ({"max_tokens": 9.5}, "the field 'max_tokens' must be an integer in [1, "),
        ({"source_processor": {"x.json": {}}}, "source_processor must hold the files preprocessor_config.json and"),
    ],
)
def test_odd_fields_are_named(saved, change, named):
    change_json(saved / OWN, **change)
    message = error_of(models.load, saved)
    assert message.startswith(f"{saved / OWN}: ")
    assert named in message
    assert message.endswith("; mend or delete that file")


def test_what_a_model_was_trained_for_is_saved_with_it(model, tmp_path):
    path = models.save(tmp_path / "model", MODEL | {"prompt": PROMPT, "max_tokens": 77}, model[1], model[2])
    fields = models.read_fields(path)
    assert (fields["prompt"], fields["max_tokens"]) == (PROMPT, 77)
    assert "prompt" not in models.read_fields(models.save(path, MODEL, model[1], model[2]))


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
        ({"layers": 3}, "lacks model.language_model.layers.2.input_layernorm.weight"),
        ({"mlp": 20}, "mlp.gate_proj.weight is [16, 12], by config.json it is [20, 12]"),
        ({"tied_embeddings": True}, "lm_head.weight differs from "),
    ],
)
def test_an_override_that_changes_the_parameters_is_refused(saved, change, named):
    message = error_of(models.load, saved, **change)
    assert message.startswith(str(saved))
    assert named in message


def test_a_missing_tokenizer_is_named(saved):
    for path in saved.glob("token*"):
        path.unlink()
    assert error_of(models.load, saved).startswith(f"the tokenizer at {saved} cannot be read")


def test_a_vector_that_transformers_needs_must_hold_what_the_model_does_without(tmp_path):
    """A Qwen2.5-VL without biases has them as zeros in its files; other numbers there are of another model."""
    words = build_tokenizer([PROMPT])
    fields = MODEL | {"family": "qwen2_5_vl", "mrope_section": (1, 1, 1), "window_size": 16, "max_image_tokens": 4}
    policy, processor = models.build(fields, words)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(policy.init, jax.random.key(0)))
    saved = models.save(tmp_path / "model", fields, params, processor)
    name = "model.layers.1.self_attn.k_proj.bias"
    tensor = safetensors.read_directory(saved)[name]
    np.testing.assert_array_equal(tensor.read(), np.zeros(6))
    assert jax.tree.structure(models.load(saved)[1]) == jax.tree.structure(params)
    change_json(saved / OWN, qkv_bias=True)
    np.testing.assert_array_equal(models.load(saved)[1]["decoder"]["layers"]["k"]["bias"], np.zeros((2, 1, 6)))
    change_json(saved / OWN, qkv_bias=False)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        file.write(np.float32(2.0).tobytes())
    assert f"holds {name}, for which the model of config.json has no place" in error_of(models.load, saved)


# ------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("shape", "axes", "part"),
    [
        ((7, 5), (1, 0), (slice(None), slice(None))),
        ((300, 700), (1, 0), (slice(3, 699), slice(10, 290))),
        ((600, 301), (1, 0), (slice(None), slice(256, 600))),
        ((4, 6, 9), (2, 0, 1), (slice(1, 8), slice(None), slice(2, 5))),
        ((9, 4, 6), (1, 2, 0), (slice(1, 3), slice(None), slice(2, 7))),
        ((9, 4, 6), (2, 1, 0), (slice(None),) * 3),
        ((5,), (0,), (slice(1, 4),)),
    ],
)
def test_a_transposed_copy_is_that_of_numpy(shape, axes, part, dtype):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype).transpose(axes)[part]
    out = np.empty(array.shape, dtype)
    slices.copy(out, array)
    np.testing.assert_array_equal(out, array)


def test_a_device_reads_what_it_holds(saved, model, monkeypatch):
    """Of a matrix that is split, the bytes that the devices copy add up to the matrix, and not to eight of it."""
    copied = []
    copy = slices.copy
    monkeypatch.setattr(slices, "copy", lambda out, array: (copied.append(array.nbytes), copy(out, array)))
    mesh = sharding.make_mesh({"replica": 1, "data": 2, "fsdp": 4, "tensor": 1})
    _, params, _ = models.load(saved, mesh=mesh)
    once = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(copied) == once
    jax.tree.map(np.testing.assert_array_equal, params, model[1])


def test_a_number_that_is_none_is_refused_where_it_is_read(saved):
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    tensor = safetensors.read_directory(saved)[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start + 20)
        file.write(np.float32(np.nan).tobytes())
    assert f"tensor {name} holds NaN or infinity" in error_of(models.load, saved)


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
