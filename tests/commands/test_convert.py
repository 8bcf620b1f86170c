"""Hugging Face checkpoints to models of ours and back: small random checkpoints that transformers wrote."""

import gc
import json
import resource
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balcap_jax import convert, models
from balcap_jax.cli import process
from balcap_jax.cli.errors import UserError
from balcap_jax.models import lora
from balcap_jax.models.formats import hf, loading
from balcap_jax.models.llava.vision import PIXEL_MEAN, PIXEL_STD
from balcap_jax.models.qwen2_5_vl.windows import patches_of
from balcap_jax.parallel import sharding

torch = pytest.importorskip("torch", reason="the checkpoints are written by transformers, which needs torch")
transformers = pytest.importorskip("transformers")
import tiny_checkpoints as tiny  # noqa: E402

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = tuple(tiny.FAMILIES)
# Largest error over the largest logit; two correct fp32 implementations agree to about 1e-6 at these sizes.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Gives (reference, its checkpoint directory), which are made once."""
    made = {}

    def get(family: str, dtype: str = "float32", names: str = "saved"):
        key = (family, dtype, names)
        if key not in made:
            model = tiny.make(family, TYPES[dtype])
            made[key] = model, tiny.save(model, tmp_path_factory.mktemp("-".join(key)), names)
        return made[key]

    return get


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def converted(source, family, tmp_path_factory):
    """The model directory of the fp32 checkpoint."""
    return convert.from_hf(source(family)[1], tmp_path_factory.mktemp("converted") / family)


def load_in_transformers(family: str, path):
    """The model that transformers loads, which must find every tensor and know every tensor."""
    model, found = tiny.FAMILIES[family].from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    return model


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("family", "dtype", "names", "shard_gb"),
    [
        ("llava", "float32", "saved", 5.0),
        ("llava", "bfloat16", "hub", 2e-5),
        ("llava", "float16", "modules", 5.0),
        ("qwen2_5_vl", "float32", "modules", 5.0),
        ("qwen2_5_vl", "bfloat16", "saved", 2e-5),  # what transformers writes is what the hub holds
        ("qwen2_5_vl", "float16", "saved", 5.0),
    ],
)
def test_a_checkpoint_comes_back_bit_for_bit_under_its_own_names(source, tmp_path, family, dtype, names, shard_gb):
    reference, path = source(family, dtype, names)
    model = convert.from_hf(path, tmp_path / "model")
    back = convert.to_hf(model, tmp_path / "back", shard_gb=shard_gb)

    before, after = tiny.tensors(path), tiny.tensors(back)
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert equal_bits(after[name], tensor), name
    largest = max(tensor.nbytes for tensor in before.values())
    files = sorted(back.glob("*.safetensors"))
    assert (len(files) > 1) == (back / "model.safetensors.index.json").exists() == (shard_gb < 1)
    for file in files:
        size = sum(tensor.nbytes for tensor in tiny.load_file(file).values())
        assert size <= max(shard_gb * 1e9, largest)

    loaded = load_in_transformers(family, back)
    assert loaded.dtype == TYPES[dtype]
    for name, tensor in reference.state_dict().items():
        assert equal_bits(loaded.state_dict()[name], tensor), name
    for file in path.iterdir():
        if not file.name.startswith("model"):  # weights and their index
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "model"]


def test_a_tied_head_may_be_saved_if_it_equals_the_embedding(tmp_path):
    reference = tiny.make("qwen2_5_vl", tie_word_embeddings=True)
    path = tiny.save(reference, tmp_path / "tied", "modules")
    assert "head" not in models.load(path)[1]["decoder"]
    back = tiny.tensors(convert.to_hf(convert.from_hf(path, tmp_path / "model"), tmp_path / "back"))
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(back) == set(tiny.tensors(path))
    assert equal_bits(back["lm_head.weight"], reference.lm_head.weight.detach())
    load_in_transformers("qwen2_5_vl", tmp_path / "back")

    def change(state):
        state["lm_head.weight"][0, 0] += 1

    rewrite(path, change)
    message = error_of(models.load, path)
    assert f"{path}/model.safetensors: lm_head.weight differs from" in message
    assert "set tie_word_embeddings to false" in message


def test_parameters_keep_the_type_of_the_checkpoint(source, tmp_path):
    path = source("qwen2_5_vl", "bfloat16")[1]
    model = convert.from_hf(path, tmp_path / "model")
    for where in (path, model):
        types = {leaf.dtype for leaf in jax.tree.leaves(models.load(where, param_dtype=None)[1])}
        assert types == {np.dtype(jnp.bfloat16)}
        assert {leaf.dtype for leaf in jax.tree.leaves(models.load(where)[1])} == {np.dtype(np.float32)}


def test_another_type_is_one_cast(source, tmp_path):
    path = source("llava", "bfloat16", "hub")[1]
    model = convert.from_hf(path, tmp_path / "model", dtype="float32")
    wide, narrow = convert.to_hf(model, tmp_path / "wide"), convert.to_hf(model, tmp_path / "narrow", dtype="bfloat16")
    before = tiny.tensors(path)
    for name, tensor in tiny.tensors(wide).items():
        assert equal_bits(tensor, before[name].float())
        assert equal_bits(tiny.tensors(narrow)[name], before[name])
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"
    assert (narrow / "config.json").read_bytes() == (path / "config.json").read_bytes()
    assert load_in_transformers("llava", wide).dtype == torch.float32


def test_a_trained_model_goes_back_with_the_files_and_names_that_it_came_with(source, family, tmp_path):
    path = source(family)[1]
    _, params, processor = models.load(path)
    params = lora.add(params, 2, "^decoder/layers/(q|o|down)$", jax.random.key(0))
    rng = np.random.default_rng(5)
    layers = params["decoder"]["layers"]
    for name in ("q", "o", "down"):
        layers[name]["lora_b"] = rng.standard_normal(layers[name]["lora_b"].shape).astype(np.float32)
    model = models.save(tmp_path / "model", models.read_fields(path), lora.merge(params, 0.5), processor, source=path)
    back = convert.to_hf(model, tmp_path / "back")
    before, after = tiny.tensors(path), tiny.tensors(back)
    assert set(after) == set(before)
    assert (back / "config.json").read_bytes() == (path / "config.json").read_bytes()
    changed = {name for name in before if not equal_bits(before[name], after[name])}
    assert len(changed) == 9
    for ours, theirs in (("q", "self_attn.q_proj"), ("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        for layer in range(3):
            (name,) = (name for name in changed if f"model.layers.{layer}.{theirs}.weight" in name)
            a, b = (np.asarray(layers[ours][part][layer]) for part in ("lora_a", "lora_b"))
            np.testing.assert_allclose(after[name].numpy(), before[name].numpy() + 0.5 * (a @ b).T, atol=1e-5)
    load_in_transformers(family, back)


@pytest.mark.parametrize(
    "fields",
    [
        {"family": "llava", "feature_layer": -2, "vision_layers": 3},
        {
            "family": "qwen2_5_vl",
            "tied_embeddings": True,
            "mrope_section": (1, 1, 1),
            "window_size": 16,
            "full_attention_layers": (1,),
            "vision_layers": 2,
            "qkv_bias": True,
        },
    ],
    ids=["llava", "qwen2_5_vl"],
)
def test_a_model_that_came_from_no_checkpoint_becomes_one(fields, tmp_path):
    sizes = {"image_size": 16, "patch_size": 4, "vision_width": 16, "vision_heads": 2, "vision_mlp": 20, "width": 24}
    sizes |= {"layers": 2, "heads": 4, "kv_heads": 2, "head_size": 6, "mlp": 32, "max_image_tokens": 16}
    fields = loading.DEFAULTS | sizes | fields
    policy, processor = models.build(fields, tiny.tokenizer())
    rng = np.random.default_rng(0)
    like = jax.eval_shape(policy.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0.5, 0.3, leaf.shape).astype(np.float32), like)
    model = models.save(tmp_path / "model", fields, params, processor)
    back = convert.to_hf(model, tmp_path / "back")
    reference = load_in_transformers(fields["family"], back).eval()
    assert logits_error(fields["family"], reference, policy, params, processor) <= TOLERANCE
    assert (reference.generation_config.eos_token_id,) == policy.end_tokens
    jax.tree.map(np.testing.assert_array_equal, models.load(back)[1]["decoder"], params["decoder"])


# ------------------------------------------------------------------------------------------------- what load gives


def logits_error(family, reference, policy, params, processor) -> float:
    """Relative error of the logits behind a prompt with an image, against the reference."""
    side = policy.vision.image_size if family == "llava" else 16
    image = np.random.default_rng(3).integers(0, 256, (side, side, 3)).astype(np.uint8)
    prompt = processor([image], [tiny.PROMPT])
    ours = jax.jit(lambda params: policy.prefill(params, prompt, policy.encode(params, prompt.images))[1])(params)

    tokens = torch.tensor(prompt.tokens[prompt.mask])[None].long()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family == "llava":
        pixels = np.moveaxis((image / 255.0 - PIXEL_MEAN) / PIXEL_STD, -1, 0)[None]
    else:
        patch = policy.vision.patch_size
        values = patches_of(image, patch).reshape(-1, 3, 1, patch * patch) / 255.0
        values = (values - PIXEL_MEAN[:, None, None]) / PIXEL_STD[:, None, None]
        pixels = values.repeat(2, axis=2).reshape(len(values), -1)
        inputs["image_grid_thw"] = torch.tensor([[1, side // patch, side // patch]])
        inputs["mm_token_type_ids"] = (tokens == policy.image_token).int()
    with torch.no_grad():
        theirs = reference(**inputs, pixel_values=torch.tensor(pixels, dtype=torch.float32)).logits[0, -1].numpy()
    allowed = [v for v in range(policy.vocab) if v not in policy.forbidden]
    return float(np.abs(np.asarray(ours)[0, allowed] - theirs[allowed]).max() / np.abs(theirs[allowed]).max())


def test_a_loaded_checkpoint_gives_the_logits_of_transformers(source, family, converted):
    reference, path = source(family)
    policy, params, processor = models.load(path)
    assert logits_error(family, reference, policy, params, processor) <= TOLERANCE
    again, same, _ = models.load(converted)
    assert again == policy
    assert jax.tree.structure(same) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_parameters_go_straight_onto_a_mesh(source, family, converted):
    mesh = sharding.make_mesh({"replica": 1, "data": 2, "fsdp": 4, "tensor": 1})
    plain = models.load(converted)[1]
    for where in (converted, source(family)[1]):
        placed = models.load(where, mesh=mesh)[1]
        for (path, leaf), there in zip(
            jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(placed), strict=True
        ):
            np.testing.assert_array_equal(leaf, there, jax.tree_util.keystr(path))
        assert placed["decoder"]["layers"]["q"]["kernel"].sharding.shard_shape((3, 24, 4, 6)) == (3, 6, 4, 6)


# ------------------------------------------------------------------------------------------------- bad directories


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        group, _, leaf = key.rpartition("__")
        (config[group] if group else config)[leaf] = value
    (path / "config.json").write_text(json.dumps(config))


def shards(path):
    return sorted(path.glob("*.safetensors"))


def missing_shard(path):
    shards(path)[1].unlink()
    return shards(path)[0].name.replace("00001-", "00002-", 1), "download this shard too"


def missing_index(path):
    (path / "model.safetensors.index.json").unlink()
    return "model.safetensors.index.json is missing", "download the index too"


def torn_index(path):
    (path / "model.safetensors.index.json").write_text('{"weight_map": ')
    return "model.safetensors.index.json is not JSON (", "download or copy it again"


def index_without_a_map(path):
    (path / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json is no index of shards", "download or copy it again"


def index_that_leaves_the_directory(path):
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../model.safetensors"}}')
    return "model.safetensors.index.json is no index of shards", "must name files beside it"


def truncated(path):
    shard = shards(path)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return f"{shard.name} is cut short", "download or copy it again"


def truncated_header(path):
    shard = shards(path)[0]
    shard.write_bytes(shard.read_bytes()[:50])
    return f"{shard.name} is cut short", "download or copy it again"


def no_safetensors(path):
    shards(path)[0].write_bytes((40).to_bytes(8, "little") + b"<html> not found </html>" * 10)
    return f"{shards(path)[0].name} is no safetensors file", "download or copy it again"


def rewrite(path, change, holding=""):
    """Applies `change` to the state of the first shard with a tensor called like `holding`; -> that shard's name."""
    for shard in shards(path):
        state = tiny.load_file(shard)
        if any(name.endswith(holding) for name in state):
            change(state)
            tiny.save_file(state, shard, metadata={"format": "pt"})
            return shard.name
    raise LookupError(holding)


def rewrite_header(path, change):
    """Applies `change` to the header of the first shard, whose bytes stay; -> that shard's name."""
    shard = shards(path)[0]
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    return shard.name


def two_tensors(header):
    """The first two tensors of a header by where they lie."""
    return sorted((entry for entry in header.values() if "dtype" in entry), key=lambda e: e["data_offsets"])[:2]


def overlapping(path):
    def change(header):
        first, second = two_tensors(header)
        size = second["data_offsets"][1] - second["data_offsets"][0]
        second["data_offsets"] = [first["data_offsets"][0] + 4, first["data_offsets"][0] + 4 + size]

    return f"{rewrite_header(path, change)} is damaged: tensor", " overlaps ", "download or copy it again"


def gap(path):
    def change(header):
        for name in [name for name, entry in header.items() if entry in two_tensors(header)[:1]]:
            del header[name]

    return f"{rewrite_header(path, change)} is damaged: tensor", "leaves a gap behind the header", "download or copy"


def bytes_behind(path):
    shard = shards(path)[1]
    shard.write_bytes(shard.read_bytes() + b"abc")
    return f"{shard.name} is damaged", "3 more than its header says", "download or copy it again"


def offsets_of_another_shape(path):
    def change(header):
        two_tensors(header)[0]["shape"][0] += 1

    return f"{rewrite_header(path, change)} is no safetensors file", "download or copy it again"


def fractional_shape(path):
    def change(header):
        entry = two_tensors(header)[0]
        entry["shape"] = [float(length) for length in entry["shape"]]

    return f"{rewrite_header(path, change)} is no safetensors file", "download or copy it again"


def torn_processor(path):
    (path / "preprocessor_config.json").write_text('{"image_mean": [')
    return "preprocessor_config.json is not JSON (", "download it again"


def torn_generation(path):
    (path / "generation_config.json").write_text('{"eos_token_id": ')
    return "generation_config.json is not JSON (", "download it again, or delete it"


def torn_words(path):
    (path / "special_tokens_map.json").write_text("{")
    return "special_tokens_map.json is not JSON (", "download it again"


def quantised(path):
    def change(state):
        name = next(iter(state))
        state[name] = state[name].to(torch.int8)

    return rewrite(path, change), "is of type I8", "that is not quantised"


def two_types(path):
    name = "language_model.model.layers.2.self_attn.q_proj.weight"

    def change(state):
        state[name] = state[name].half()

    return rewrite(path, change, name), f"{name} is float16, but", "--dtype"


def too_many(path):
    def change(state):
        state["language_model.model.layers.3.mlp.up_proj.weight"] = torch.zeros(32, 24)

    name = rewrite(path, change)
    return name, "language_model.model.layers.3.mlp.up_proj.weight, for which", "give the checkpoint that belongs"


def too_few(path):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(name for name in content["weight_map"] if name.endswith("linear_1.bias"))
    shard = path / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    state = tiny.load_file(shard)
    del state[name]
    tiny.save_file(state, shard, metadata={"format": "pt"})
    return "lacks model.multi_modal_projector.linear_1.bias", "download it again"


def another_shape(path):
    change_config(path, text_config__intermediate_size=40)
    return "mlp.gate_proj.weight is [32, 24], by config.json it is [40, 24]", "give the checkpoint that belongs"


def more_layers(path):
    change_config(path, text_config__num_hidden_layers=4)
    return "lacks model.language_model.layers.3.", "and 6 more", "config.json"


def same_weight_twice(path):
    def change(state):
        state["model.language_model.norm.weight"] = torch.zeros(24)

    return rewrite(path, change, "model.norm.weight"), "is the same weight as", "leave one of them out"


def no_config(path):
    (path / "config.json").unlink()
    return "config.json is missing", "give the directory of a Hugging Face checkpoint"


def torn_config(path):
    (path / "config.json").write_text('{"model_type"')
    return "config.json is not JSON (", "download it again"


def config_that_is_a_list(path):
    (path / "config.json").write_text("[]")
    return "config.json is no JSON object", "download it again"


def deep_config(path):
    (path / "config.json").write_text('{"a": ' * 100_000)
    return "/config.json is not JSON that can be read (nested too deeply)", "download it again"


def odd_architecture(path):
    change_config(path, model_type={})
    return "config.json is of the architecture {}", "only llava, qwen2_5_vl can be read"


def another_architecture(path):
    change_config(path, model_type="mistral3")
    return "config.json is of the architecture 'mistral3'", "only llava, qwen2_5_vl can be read"


def another_decoder(path):
    change_config(path, text_config__hidden_act="gelu")
    return "config.json describes no LlavaForConditionalGeneration", "hidden_act is 'gelu'", "give another checkpoint"


def no_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()
    return "tokenizer.json is missing", "copy the tokenizer's files there"


def torn_tokenizer(path):
    (path / "tokenizer.json").write_text("{")
    return f"{path / 'tokenizer.json'} is not JSON (", "download it again"


def another_tokenizer(path):
    change_config(path, image_token_index=0)
    return "config.json calls token 0 the image's", "put the tokenizer there that belongs to it"


def no_end_token(path):
    change_json(path / "tokenizer_config.json", eos_token=None)
    return f"the tokenizer at {path} names no end token", "copy its files there again"


def endless_words(path):
    change_json(path / "tokenizer_config.json", unk_token="")
    return f"the tokenizer at {path} cannot be read", "copy its files there again"


def too_many_words(path):
    loading.read_tokenizer(path)
    words = tiny.tokenizer()
    words.add_tokens([f"word{i}" for i in range(6)])
    words.save_pretrained(path)
    return f"the tokenizer at {path} has", "put the tokenizer there that belongs to it"


def pickles(path):
    for file in [*shards(path), path / "model.safetensors.index.json"]:
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    return "pytorch_model.bin is a pickle", "take the checkpoint's safetensors files"


def no_weights(path):
    for file in [*shards(path), path / "model.safetensors.index.json"]:
        file.unlink()
    return "model.safetensors is missing", "give the directory of a whole checkpoint"


@pytest.mark.parametrize(
    "damage",
    [
        *(overlapping, gap, bytes_behind, offsets_of_another_shape, fractional_shape, index_without_a_map),
        *(torn_processor, torn_generation, torn_words, config_that_is_a_list, deep_config, odd_architecture),
        *(missing_shard, missing_index, torn_index, index_that_leaves_the_directory, truncated, truncated_header),
        *(no_safetensors, quantised, two_types, too_many, too_few, another_shape, more_layers, same_weight_twice),
        *(no_config, torn_config, another_architecture, another_decoder, no_tokenizer, torn_tokenizer),
        *(another_tokenizer, no_end_token, endless_words, too_many_words, pickles, no_weights),
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_bad_checkpoint_ends_in_one_line_that_names_file_and_remedy(source, tmp_path, capsys, damage):
    path = shutil.copytree(source("llava")[1], tmp_path / "bad")
    expected = damage(path)
    capsys.readouterr()  # transformers tells on stderr that it writes
    with pytest.raises(SystemExit) as ended:
        convert.main([f"--from_hf={path}", f"--out={tmp_path / 'model'}"])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for text in expected:
        assert text in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]  # nothing half-written


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llava", {"text_config__hidden_size": "abc"}, "hidden_size"),
        ("llava", {"text_config__hidden_size": None}, "hidden_size"),
        ("llava", {"text_config__hidden_size": -24}, "hidden_size is -24, it must be a whole number above 0"),
        ("llava", {"text_config__num_hidden_layers": -1}, "num_hidden_layers is -1, it must be in [1, "),
        (
            "qwen2_5_vl",
            {"text_config__num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, it must be in [1, ",
        ),
        ("qwen2_5_vl", {"vision_config__depth": 10**9}, "depth is 1000000000, it must be in [1, "),
        ("llava", {"text_config__num_attention_heads": 0, "text_config__head_dim": None}, ""),
        ("llava", {"text_config__num_key_value_heads": 3}, ""),
        ("llava", {"vision_config__patch_size": -4}, "patch_size is -4, it must be a whole number above 0"),
        ("llava", {"vision_config__patch_size": 0}, "patch_size is 0, it must be a whole number above 0"),
        ("llava", {"vision_config__patch_size": None}, "patch_size is None, it must be a whole number above 0"),
        ("llava", {"text_config": []}, ""),
        ("llava", {"text_config__vocab_size": 10**15}, "'model.vocab' must be "),
        ("llava", {"text_config__rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_odd_values_of_a_config_are_one_line(source, tmp_path, family, changes, named):
    path = shutil.copytree(source(family)[1], tmp_path / "bad")
    change_config(path, **changes)
    message = error_of(convert.from_hf, path, tmp_path / "model")
    assert message.startswith(f"{path / 'config.json'} describes no ")
    assert named in message
    assert message.endswith(("; give another checkpoint", "; download it again"))


# ------------------------------------------------------------------------------------------------- image processors


def change_processor(path, file="preprocessor_config.json", **changes):
    content = json.loads((path / "preprocessor_config.json").read_text()) | changes
    if file == "processor_config.json":  # where transformers 5 puts it
        (path / "preprocessor_config.json").unlink()
        content = {"processor_class": "LlavaProcessor", "image_processor": content}
    (path / file).write_text(json.dumps(content))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llava", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is [0.5, 0.5, 0.5], only 0.481455, 0.457828, 0.408211"),
        ("llava", {"image_std": [0.5]}, "image_std is [0.5], only 0.26863, 0.261303, 0.275777"),
        ("llava", {"image_std": "abc"}, "image_std is 'abc'"),
        ("llava", {"size": {"shortest_edge": 24}}, "size is {'shortest_edge': 24}, only {'shortest_edge': 12}"),
        ("llava", {"size": {"height": 12, "width": 12}}, "size is {'height': 12, 'width': 12}"),
        ("llava", {"crop_size": {"height": 12, "width": 24}}, "crop_size is {'height': 12, 'width': 24}"),
        ("llava", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("llava", {"do_normalize": False}, "do_normalize is False"),
        ("llava", {"do_center_crop": False}, "do_center_crop is False"),
        ("llava", {"resample": 2}, "resample is 2, only 3"),
        ("llava", {"size": None}, "size is {'shortest_edge': 224}, only {'shortest_edge': 12}"),  # the class's own
        ("llava", {"patch_size": 7}, "patch_size is 7, only 4"),
        ("llava", {"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor'"),
        ("llava", {"image_processor_type": []}, "image_processor_type is []"),
        ("qwen2_5_vl", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is [0.5, 0.5, 0.5]"),
        ("qwen2_5_vl", {"patch_size": 14}, "patch_size is 14, only 4"),
        ("qwen2_5_vl", {"patch_size": None}, "patch_size is 14, only 4"),
        ("qwen2_5_vl", {"min_pixels": 0}, "min_pixels is 0"),
        ("qwen2_5_vl", {"max_pixels": ""}, "max_pixels is ''"),
        ("qwen2_5_vl", {"merge_size": 1}, "merge_size is 1, only 2"),
        ("qwen2_5_vl", {"min_pixels": -5}, "min_pixels is -5"),
        ("qwen2_5_vl", {"max_pixels": "many"}, "max_pixels is 'many'"),
        (
            "qwen2_5_vl",
            {"min_pixels": 128, "max_pixels": 127},
            "max_pixels, 127, is less than the 2 tokens of 64 pixels",
        ),
        ("qwen2_5_vl", {"size": 224}, "size is 224"),
    ],
)
def test_an_image_processor_that_is_not_ours_is_refused(source, tmp_path, family, changes, named, file):
    path = shutil.copytree(source(family)[1], tmp_path / "bad")
    change_processor(path, file, **changes)
    message = error_of(models.read_fields, path)
    assert message.startswith(f"{path / file} describes an image processor that is not built: {named}")
    assert message.endswith("; give another checkpoint")


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, (4, 384)),  # the published maximum is beyond what prompts are padded to
        ({"min_pixels": 10 * 64, "max_pixels": 100 * 64}, (10, 100)),
        ({"min_pixels": 500 * 64}, (500, 500)),
        ({"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 65, "longest_edge": 6400}}, (2, 100)),
        ({"min_pixels": None, "max_pixels": None}, (4, 384)),
        ({"image_processor_type": "Qwen2VLImageProcessorFast"}, (4, 384)),
    ],
)
def test_the_bounds_of_image_tokens_are_the_checkpoints(source, tmp_path, changes, tokens):
    path = shutil.copytree(source("qwen2_5_vl")[1], tmp_path / "model")
    change_processor(path, **changes)
    fields = models.read_fields(path)
    assert (fields["min_image_tokens"], fields["max_image_tokens"]) == tokens
    assert fields["prompt_tokens"] > tokens[1]


def test_the_words_of_a_processor_are_no_image_processor(source, tmp_path):
    """As the published checkpoints of LLaVA have it beside the other file."""
    path = shutil.copytree(source("llava")[1], tmp_path / "model")
    (path / "processor_config.json").write_text('{"image_token": "<image>", "patch_size": 4}')
    assert models.read_fields(path) == models.read_fields(source("llava")[1])
    (path / "processor_config.json").write_text('{"image_processor": []}')
    assert "processor_config.json has no settings of an image processor" in error_of(models.read_fields, path)


def test_a_checkpoint_without_an_image_processor_is_taken_as_published(source, tmp_path):
    for family in FAMILIES:
        path = shutil.copytree(source(family)[1], tmp_path / family)
        (path / "preprocessor_config.json").unlink()
        assert models.read_fields(path) == models.read_fields(source(family)[1])


@pytest.mark.parametrize("damage", [truncated, another_tokenizer], ids=lambda damage: damage.__name__)
def test_load_refuses_what_convert_refuses(source, tmp_path, damage):
    path = shutil.copytree(source("llava")[1], tmp_path / "bad")
    named, remedy = damage(path)
    message = error_of(models.load, path)
    assert named in message
    assert remedy in message


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give either --from_hf and --out, or --to_hf and --from"),
        (["--from_hf={checkpoint}"], "give either"),
        (["--from_hf={checkpoint}", "--out={model}", "--to_hf=x"], "give either"),
        (["--from_hf={here}/none", "--out={here}/x"], "there is no directory {here}/none"),
        (["--from_hf={checkpoint}", "--out={model}"], "{model} exists; delete it"),
        (["--from={checkpoint}", "--to_hf={here}/x"], "{checkpoint} is a Hugging Face checkpoint already"),
        (["--from={here}", "--to_hf={here}/x"], "no model at {here}: model.json is missing"),
        (["--from={model}", "--to_hf={here}/x", "--shard_gb=0"], "--shard_gb must be more than 0"),
        (
            ["--from={model}", "--to_hf={here}/x", "--shard_gb=-1"],
            "finite, got -1.0",
        ),
        (
            ["--from={model}", "--to_hf={here}/x", "--shard_gb=inf"],
            "0 and finite, got inf",
        ),
        (
            ["--from={model}", "--to_hf={here}/x", "--shard_gb=nan"],
            "0 and finite, got nan",
        ),
        (["--from_hf=", "--out={here}/x"], "argument --from_hf: it names no file or directory"),
        (["--from_hf={checkpoint}", "--out="], "argument --out: it names no file or directory"),
        (
            ["--from_hf={checkpoint}", "--out={file}/x"],
            "cannot write the model to {file}/x: not a directory; name",
        ),
        (["--from_hf=~/none", "--out={here}/x"], "there is no directory {home}/none"),
        (["--from_hf={ours}", "--out={here}/x"], "{ours} is a model directory of ours already"),
        (["--from={model}", "--to_hf={here}/x", "--dtype=int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_bad_command_line_ends_in_one_line(source, tmp_path, capsys, arguments, complaint):
    names = {"checkpoint": source("llava")[1], "model": tmp_path / "model", "here": tmp_path, "file": tmp_path / "file"}
    names |= {"ours": tmp_path / "ours", "home": Path.home()}
    for directory in ("model", "ours"):
        names[directory].mkdir()
    for file in (names["file"], names["ours"] / "model.json"):
        file.write_text("")
    capsys.readouterr()  # transformers tells on stderr that it writes
    with pytest.raises(SystemExit) as ended:
        convert.main([argument.format(**names) for argument in arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert complaint.format(**names) in printed


def no_array(model):
    shutil.rmtree(model / "params" / "decoder.embed")
    return f"the parameters at {model / 'params'} cannot be read: ", "copy the model again"


def no_chunk(model):
    next((model / "params" / "decoder.layers.q.kernel").glob("1.*")).unlink()
    return f"the parameters at {model / 'params'} cannot be read: chunk ", "is missing; copy the model again"


def short_chunk(model):
    next((model / "params" / "decoder.layers.q.kernel").glob("1.*")).write_bytes(b"short")
    return f"the parameters at {model / 'params'} cannot be read: ", "copy the model again"


def other_sizes(model):
    (model / "config.json").unlink()
    change_json(model / "model.json", layers=4)
    return f"the parameters at {model / 'params'} do not fit its fields: decoder/layers/", "(4, "


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def names_that_are_a_list(model):
    (model / "hf_names.json").write_text("[]")
    return f"{model / 'hf_names.json'} is no JSON object; convert the checkpoint again", ""


def names_that_are_numbers(model):
    change_json(model / "hf_names.json", **{"lm_head.weight": 3})
    return f"{model / 'hf_names.json'} does not name tensors; convert", ""


def one_name_twice(model):
    change_json(model / "hf_names.json", **{"lm_head.weight": "a", "model.language_model.norm.weight": "a"})
    return f"{model / 'hf_names.json'} gives the name a to two tensors; convert", ""


def one_name_too_few(model):
    names = json.loads((model / "hf_names.json").read_text())
    del names["model.language_model.norm.weight"]
    (model / "hf_names.json").write_text(json.dumps(names))
    return "the names of the model's tensors lack model.language_model.norm.weight; convert", ""


def one_name_too_many(model):
    change_json(model / "hf_names.json", **{"model.extra.weight": "extra"})
    return "the names of the model's tensors have model.extra.weight, for which the model has no place; convert", ""


def name_of_another_tensor(model):
    change_json(model / "hf_names.json", **{"lm_head.weight": "abc"})
    return "the names of the model's tensors have abc, which are of other tensors; convert", ""


def list_for_a_config(model):
    (model / "config.json").write_text("[]")
    return f"{model / 'config.json'} is no JSON object", ""


def config_of_another_model(model):
    change_config(model, text_config__intermediate_size=40)
    return f"{model / 'config.json'} says that mlp is 40, model.json beside it 32; put the file there", ""


@pytest.mark.parametrize(
    "damage",
    [
        *(no_array, no_chunk, short_chunk, other_sizes, names_that_are_a_list, names_that_are_numbers, one_name_twice),
        *(one_name_too_few, one_name_too_many, name_of_another_tensor, list_for_a_config, config_of_another_model),
        *(torn_generation, torn_tokenizer),
    ],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_damaged_model_is_named_on_the_way_back(converted, tmp_path, damage):
    model = shutil.copytree(converted, tmp_path / "model")
    begin, end = damage(model)
    message = error_of(convert.to_hf, model, tmp_path / "back")
    assert begin in message
    assert end in message
    assert "tensorstore_spec" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def room():
    """`room(size)`: from then on no file of this process may grow beyond `size` bytes; what a full disk is to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(
    source, converted, family, tmp_path, capfd, monkeypatch, room, size
):
    """The placeholders of Orbax are the first that do not fit, or the arrays behind them."""
    path, beside = source(family)[1], []
    monkeypatch.setattr(sys, "unraisablehook", beside.append)
    process.quieten_libraries()
    capfd.readouterr()
    for call, given, what in ((convert.from_hf, path, "model"), (convert.to_hf, converted, "checkpoint")):
        room(size)
        message = error_of(call, given, tmp_path / "out")
        room(resource.RLIM_INFINITY)
        assert message.startswith(f"cannot write the {what} to {tmp_path / 'out'}: ")
        assert message.endswith("; name another place")
        gc.collect()
        assert (beside, capfd.readouterr().err) == ([], "")
        assert list(tmp_path.iterdir()) == []


def test_the_command_says_how_far_it_is_and_where_the_result_is(source, tmp_path, capsys):
    path = source("llava")[1]
    capsys.readouterr()
    convert.main([f"--from_hf={path}", f"--out={tmp_path / 'model'}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "model")
    assert lines[-2].startswith("0.1 of 0.1 MB")
    assert len(lines) == 2  # it took less than the time between two lines


# ------------------------------------------------------------------------------------------------- the table


def test_a_table_that_forgets_a_parameter_or_sets_it_twice_is_refused():
    rows = (hf.Row("a.weight", "a/kernel", hf.linear()), hf.Row("b", "b", hf.VECTOR))
    shapes = {"a/kernel": (2, 3), "b": (4,)}
    assert {name: pieces[0].hf_shape for name, pieces in hf.plan(rows, shapes).items()} == {
        "a.weight": (3, 2),
        "b": (4,),
    }
    assert "set the parameter c" in error_of(hf.plan, rows, shapes | {"c": (1,)})
    assert error_of(hf.plan, (*rows, hf.Row("d", "b", hf.VECTOR)), shapes).startswith("2 rows")
    assert "tensor b exactly once" in error_of(hf.plan, (*rows, hf.Row("b", "c", hf.VECTOR)), shapes | {"c": (4,)})


def test_only_a_part_of_a_tensor_is_not_the_tensor():
    rows = tuple(hf.Row("qkv", name, hf.VECTOR, part=(i, 3)) for i, name in enumerate("qkv"))
    pieces = hf.plan(rows, {"q": (2,), "k": (2,), "v": (2,)})
    assert [piece.hf_shape for piece in pieces["qkv"]] == [(6,)] * 3
    assert "qkv exactly once" in error_of(hf.plan, rows[:2], {"q": (2,), "k": (2,)})
