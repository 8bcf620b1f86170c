"""Saved models in transformers: the files beside the weights, and the numbers that come of them all.

With TRANSFORMERS_4=PATH, the Python of an environment with transformers 4.57 and torch, slow tests read them there too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from balcap_jax import convert, models
from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.models.formats import hf, loading, saving
from balcap_jax.models.llava.processing import LlavaProcessor
from balcap_jax.models.llava.vision import PIXEL_MEAN, PIXEL_STD
from balcap_jax.rollout import Sampling, example_keys, make_rollout

ARCHITECTURES = {name: family.ARCHITECTURE for name, family in loading.CHECKPOINTS.items()}
PROMPT = "what is on the table?"
READER = Path(__file__).parents[1] / "read_in_transformers.py"
SIZES = {
    **dict.fromkeys(("vision_width", "image_size", "window_size", "max_image_tokens"), 16),
    **dict.fromkeys(("patch_size", "heads", "min_image_tokens"), 4),
    **dict.fromkeys(("vision_heads", "layers", "kv_heads"), 2),
    "vision_layers": 3,
    "vision_mlp": 20,
    "width": 24,
    "head_size": 6,
    "mlp": 32,
    "rope_theta": 50.0,
    "mrope_section": (1, 1, 1),
    "full_attention_layers": (1,),
    "qkv_bias": True,
    "vision_positions": 9,
    "deepstack_layers": (0, 2),
}
IMAGE = np.random.default_rng(3).integers(0, 256, (37, 52, 3)).astype(np.uint8)


def exported(path: Path, family: str, seed: int = 0) -> Path:
    """A model that came from no checkpoint, at `path`."""
    fields = loading.DEFAULTS | SIZES | {"family": family}
    policy, processor = models.build(fields, build_tokenizer([PROMPT, "a red ball lies left of a cube."]))
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(policy.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0.2, 0.4, leaf.shape).astype(np.float32), like)
    return models.save(path, fields, params, processor)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def export(family, tmp_path_factory):
    return exported(tmp_path_factory.mktemp(family) / "model", family)


def ours(model: Path, tokens: int) -> tuple[dict, dict[str, np.ndarray]]:
    """(what `read_in_transformers.read` is given, what it gives) of a model of ours."""
    policy, params, processor = models.load(model)
    prompt = processor([IMAGE], [PROMPT], ["x"])
    behind = jax.jit(lambda params: policy.prefill(params, prompt, policy.encode(params, prompt.images))[1])
    logits = np.asarray(behind(params))[0]
    found = {"ids": prompt.tokens[prompt.mask], "logits": logits, "tokens": logits.argmax()[None]}
    if tokens > 1:
        zero, sampling = np.uint32(0), Sampling(1, tokens, greedy=True)
        drawn = make_rollout(policy, sampling)(params, prompt, example_keys(["x"]), zero, zero)
        found["tokens"] = np.asarray(drawn.tokens[drawn.mask])
    if isinstance(prompt.images, np.ndarray):
        found["pixels"] = np.moveaxis((prompt.images / 255.0 - PIXEL_MEAN) / PIXEL_STD, -1, 1)
    asked = {
        "directory": str(model),
        "architecture": ARCHITECTURES[models.read_fields(model)["family"]],
    }
    forbidden = list(policy.forbidden)  # transformers would draw those too
    return asked | {"image": IMAGE.tolist(), "text": PROMPT, "tokens": tokens, "forbidden": forbidden}, found


def agree(theirs: dict[str, np.ndarray], own: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(theirs["ids"], own["ids"])
    np.testing.assert_array_equal(theirs["tokens"], own["tokens"])
    allowed = own["logits"] > -1e9
    error = np.abs(theirs["logits"] - own["logits"])[allowed].max() / np.abs(own["logits"][allowed]).max()
    assert error < 1e-5
    if "pixels" in own:
        np.testing.assert_allclose(theirs["pixels"], own["pixels"], atol=1e-6)


def test_a_model_from_no_checkpoint_is_whole_in_transformers(export):
    """Its own files give the prompt, the pixels, the logits and the likeliest word that ours gives."""
    pytest.importorskip("torch", reason="transformers needs torch to run a model")
    from read_in_transformers import read

    asked, own = ours(export, 1)
    agree(read(**asked), own)


def test_the_older_fields_are_written_too(export, family):
    """Those that transformers 4.57 reads, beside those of 5."""
    config = json.loads((export / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 50.0
    assert text.get("rope_scaling", {}).get("mrope_section") == text["rope_parameters"].get("mrope_section")
    assert config["dtype"] == config["torch_dtype"] == "float32"
    words = json.loads((export / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["additional_special_tokens"] == ["<image>"]
    assert words["extra_special_tokens"] == {"image_token": "<image>"}
    if family != "llava":  # There an image is what follows this token.
        assert config["vision_start_token_id"] == text["bos_token_id"]


def test_the_processors_file_says_what_ours_does(export, family):
    fields = hf.read_fields(export, tuple(loading.CHECKPOINTS.values()))[1]
    assert json.loads((export / "preprocessor_config.json").read_text())["processor_class"]
    names = ("image_size",) if family == "llava" else ("min_image_tokens", "max_image_tokens")
    assert {name: fields[name] for name in names} == {name: SIZES[name] for name in names}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{image} {prompt}", '<bos><image> a "b" {c}'),
        ('say {{"x"}}: {prompt}\n{image}', '<bos>say {"x"}: a "b" {c}\n<image>'),
        ("USER: {image}\n{prompt} ASSISTANT:", '<bos>USER: <image>\na "b" {c} ASSISTANT:'),
    ],
)
def test_the_chat_template_is_the_prompt_that_the_model_was_trained_with(template, expected):
    words = build_tokenizer([PROMPT])
    words.chat_template = saving.chat_template(LlavaProcessor(words, 16, 16, prompt_tokens=64, template=template))
    for content in ('a "b" {c}', [{"type": "image"}, {"type": "text", "text": 'a "b" {c}'}]):
        assert words.apply_chat_template([{"role": "user", "content": content}], tokenize=False) == expected


@pytest.mark.parametrize(
    ("family", "file", "carried"),
    [
        ("llava", "preprocessor_config.json", lambda settings: settings),
        ("llava", "", None),
        ("qwen2_5_vl", "processor_config.json", lambda settings: {"image_processor": settings}),
    ],
    ids=["carried", "none", "that of 5"],
)
def test_a_checkpoint_of_transformers_5_says_so_and_gets_the_processors_file(tmp_path, capsys, family, file, carried):
    pytest.importorskip("torch", reason="the checkpoints are written by transformers, which needs torch")
    import tiny_checkpoints as tiny

    source = tiny.save(tiny.make(family), tmp_path / "source")
    settings = tiny.PROCESSORS[family]
    (source / "preprocessor_config.json").unlink()
    if file:
        (source / file).write_text(json.dumps(carried(settings)))
    convert.main([f"--from={source}", f"--out={tmp_path / 'hf'}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["needs transformers 5, as the checkpoint that the model came from does", str(tmp_path / "hf")]
    _, params, processor = models.load(source)
    trained = models.save(tmp_path / "trained", models.read_fields(source), params, processor, source=source)
    written = json.loads((trained / "preprocessor_config.json").read_text())
    for name, value in settings.items():
        if name != "max_pixels":  # that of training
            assert written[name] == pytest.approx(value), name


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["scratch", "trained"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_transformers_4_reads_it_alike(family, tmp_path, origin, seed):
    """`trained`: the model is read and saved again as one that came from it, so that all its files are carried."""
    if not (python := os.environ.get("TRANSFORMERS_4")):
        pytest.skip("TRANSFORMERS_4 names no Python with transformers 4.57 and torch")
    path = exported(tmp_path / "model", family, seed)
    asked, own = ours(path, 8)
    if origin == "trained":
        _, params, processor = models.load(path)
        again = models.save(tmp_path / "again", models.read_fields(path), params, processor, source=path)
        assert not convert._needs_5(again)
        asked["directory"] = str(again)
    (tmp_path / "case.json").write_text(json.dumps(asked))
    for interpreter in (python, sys.executable):
        command = [interpreter, READER, tmp_path / "case.json", tmp_path / "out.npz"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ""})
        agree(dict(np.load(tmp_path / "out.npz")), own)
