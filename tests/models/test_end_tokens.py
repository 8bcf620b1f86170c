"""The ids of a checkpoint's `eos_token_id`: which they are, that each ends a caption, and what is left of the text."""

import json

import jax
import numpy as np
import pytest

from balcap_jax import convert, models
from balcap_jax.cli.errors import UserError
from balcap_jax.config.recipes import default_config
from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.models.formats import loading
from balcap_jax.rollout import Sampling, example_keys, make_rollout

PROMPT = "what is on the table?"
SIZES = {
    **dict.fromkeys(("image_size", "vision_width", "mlp", "vision_mlp"), 16),
    **dict.fromkeys(("vision_heads", "layers", "heads", "kv_heads", "vision_layers"), 2),
    "patch_size": 8,
    "width": 12,
    "head_size": 6,
    "prompt_tokens": 24,
}
PAD, EOS = 0, 2
TOKENS = 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of ours whose likeliest captions are long; its V is 5 more than its words."""
    words = build_tokenizer([PROMPT, "a red ball lies on the table, left of a cube."])
    fields = default_config().model.to_dict() | SIZES | {"vocab": len(words) + 5}
    policy, processor = models.build(fields, words)
    like = jax.eval_shape(policy.init, jax.random.key(0))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.5, leaf.shape).astype(np.float32), like)
    return models.save(tmp_path_factory.mktemp("ends") / "model", fields, params, processor)


@pytest.fixture
def words_of(saved):
    """Puts {file: entries} into files of the model's directory for one test, in the place of what they say of ends."""
    before = {name: (saved / name).read_text() for name in (GENERATION, CONFIG)}

    def write(files):
        for name in before if files else ():
            content, entries = json.loads(before[name]), files.get(name, {})
            content.pop("eos_token_id", None)
            text = content.get("text_config", {})
            text.pop("eos_token_id", None)
            if isinstance(group := entries.get("text_config"), dict):
                entries = entries | {"text_config": text | group}
            (saved / name).write_text(json.dumps(content | entries))

    yield write
    for name, content in before.items():
        (saved / name).write_text(content)


GENERATION, CONFIG = "generation_config.json", "config.json"


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (EOS,)),
        ({GENERATION: {"eos_token_id": 9}}, (EOS, 9)),
        ({GENERATION: {"eos_token_id": [EOS, PAD]}}, (EOS, PAD)),
        ({GENERATION: {"eos_token_id": [11, 9, EOS, 9]}}, (EOS, 11, 9)),
        ({GENERATION: {"eos_token_id": [8]}, CONFIG: {"eos_token_id": 9}}, (EOS, 8)),
        ({GENERATION: {"bos_token_id": 1}, CONFIG: {"eos_token_id": 9}}, (EOS, 9)),
        ({GENERATION: {"eos_token_id": None}, CONFIG: {"text_config": {"eos_token_id": [9, 10]}}}, (EOS, 9, 10)),
        ({CONFIG: {"eos_token_id": None, "text_config": {"eos_token_id": 9}}}, (EOS, 9)),
        ({CONFIG: {"eos_token_id": 10, "text_config": {"eos_token_id": 9}}}, (EOS, 10)),
    ],
)
def test_generation_config_comes_before_config_and_the_tokenizers_is_always_one(saved, words_of, files, ends):
    words_of(files)
    policy, processor = loading.build_saved(saved, loading.read_fields(saved))
    assert policy.end_tokens == processor.end_tokens == ends
    assert not set(ends) & set(policy.forbidden)


@pytest.mark.parametrize(
    "ids", [[], "2", 2.0, True, [2, "2"], [2, None], [[2]], {"a": 2}, -1, [2, 10**6], 10**30, [2, 3.5], False]
)
@pytest.mark.parametrize("name", [GENERATION, CONFIG])
def test_what_are_no_ids_are_one_line(saved, words_of, ids, name):
    words_of({name: {"eos_token_id": ids}})
    with pytest.raises(UserError) as caught:
        loading.build_saved(saved, loading.read_fields(saved))
    assert str(caught.value).startswith(f"{saved / name}: eos_token_id is ")
    assert "\n" not in str(caught.value)


def captions(path):
    """(tokens, truncated, text) of the likeliest caption."""
    policy, params, processor = models.load(path)
    prompt = processor([np.full((16, 16, 3), 120, np.uint8)], [PROMPT], ["x"])
    zero, sampling = np.uint32(0), Sampling(1, TOKENS, greedy=True)
    drawn = make_rollout(policy, sampling)(params, prompt, example_keys(["x"]), zero, zero)
    drawn = jax.tree.map(np.asarray, drawn)
    assert drawn.lengths == drawn.mask.sum()
    return drawn.tokens[drawn.mask].tolist(), bool(drawn.truncated[0, 0]), processor.decode(drawn.tokens)[0]


def test_every_id_ends_a_caption_and_is_cut_off_its_text(saved, words_of):
    """An ordinary word among them too; where there is one id more, the caption is what it was up to there."""
    whole, truncated, text = captions(saved)
    assert truncated
    assert len(whole) == TOKENS
    end = next(i for i, token in enumerate(whole) if i and token not in whole[:i])  # a word that comes new
    words_of({GENERATION: {"eos_token_id": [EOS, PAD, whole[end]]}})
    tokens, truncated, cut = captions(saved)
    assert (tokens, truncated) == (whole[: end + 1], False)
    words = loading.read_tokenizer(saved)
    assert cut == words.decode(whole[:end], skip_special_tokens=True) != text


def test_decode_stops_at_the_first_end_and_targets_keep_their_one_end(saved, words_of):
    word = loading.read_tokenizer(saved).convert_tokens_to_ids
    words_of({GENERATION: {"eos_token_id": [word("\u2581red"), PAD]}})
    _, processor = loading.build_saved(saved, loading.read_fields(saved))
    a, red, ball = (word(f"\u2581{text}") for text in ("a", "red", "ball"))
    rows = [[[a, ball, red, ball], [red, a, a, a]], [[a, PAD, ball, a], [a, EOS, red, PAD]]]
    assert processor.decode(np.array(rows)) == ["a ball", "", "a", "a"]
    tokens, mask = processor.encode_responses([["a ball"]], 5)
    assert tokens[mask].tolist() == [a, ball, EOS]


def test_they_go_with_a_model_wherever_it_goes(saved, words_of, tmp_path):
    """Conversion, and a training run's saving of what it was given."""
    words_of({GENERATION: {"eos_token_id": [9, EOS]}})
    converted = convert.convert(saved, tmp_path / "converted")
    _, params, processor = models.load(converted)
    trained = models.save(tmp_path / "trained", models.read_fields(saved), params, processor, source=converted)
    for path in (converted, trained):
        policy, processor = loading.build_saved(path, loading.read_fields(path))
        assert policy.end_tokens == processor.end_tokens == (EOS, 9)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_captions_end_where_those_of_transformers_end(family, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers needs torch to run a model")
    import tiny_checkpoints as tiny

    path = tiny.save(tiny.make(family), tmp_path / "checkpoint")
    policy, params, processor = models.load(path)
    picture = np.full((12, 12, 3), 120, np.uint8)
    prompt = processor([picture], [tiny.PROMPT], ["x"])
    ids = torch.tensor(prompt.tokens[prompt.mask])[None].long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family != "llava":
        import transformers
        from PIL import Image

        sides = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        sides |= {name: tiny.PROCESSORS[family][name] for name in ("image_mean", "image_std")}
        pixels = {"min_pixels": processor.min_image_tokens * 64, "max_pixels": processor.image_tokens * 64}
        made = transformers.Qwen2VLImageProcessor(**sides, **pixels)([Image.fromarray(picture)], return_tensors="pt")
        inputs |= {**made, "mm_token_type_ids": (ids == policy.image_token).int()}
    else:
        values = (prompt.images / 255 - tiny.CLIP["image_mean"]) / tiny.CLIP["image_std"]
        inputs["pixel_values"] = torch.tensor(np.moveaxis(values, -1, 1), dtype=torch.float32)
    theirs = tiny.FAMILIES[family].from_pretrained(path, attn_implementation="eager").eval()

    def drawn(ends):
        (path / GENERATION).write_text(json.dumps({"eos_token_id": ends, "pad_token_id": PAD}))
        policy, _, _ = models.load(path)
        theirs.generation_config = type(theirs.generation_config).from_pretrained(path)
        suppressed = list(policy.forbidden)  # transformers would draw those too
        reference = theirs.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, suppress_tokens=suppressed)
        zero, sampling = np.uint32(0), Sampling(1, TOKENS, greedy=True)
        found = make_rollout(policy, sampling)(params, prompt, example_keys(["x"]), zero, zero)
        found = np.asarray(found.tokens[found.mask]).tolist()
        assert found == reference[0, ids.shape[1] :].tolist()
        return found

    whole = drawn(EOS)
    assert drawn([EOS, PAD, whole[0]]) == whole[:1]
    if family == "llava":
        assert drawn([whole[2], EOS]) == whole[: whole.index(whole[2]) + 1]
