"""Model directories into others, and what training saves: small random checkpoints that transformers wrote."""

import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from flax.traverse_util import flatten_dict

from balcap_jax import convert, models
from balcap_jax.cli.errors import UserError
from balcap_jax.models import lora
from balcap_jax.models.formats import hf, loading, saving
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


def saved_again(path, out):
    """The model at `path`, loaded in fp32 and saved as training saves what came from it."""
    _, params, processor = models.load(path)
    return models.save(out, models.read_fields(path), params, processor, source=path)


@pytest.mark.parametrize(
    ("family", "dtype", "names", "shard_gb"),
    [
        ("llava", "bfloat16", "hub", 2e-5),
        ("llava", "float16", "modules", 5.0),
        ("qwen2_5_vl", "float32", "modules", 5.0),
        ("qwen2_5_vl", "bfloat16", "saved", 2e-5),  # what transformers writes is what the hub holds
        ("qwen3_vl", "bfloat16", "saved", 2e-5),
    ],
)
def test_a_checkpoint_comes_back_bit_for_bit_under_its_own_names(source, tmp_path, family, dtype, names, shard_gb):
    """By `convert`, and as a model that was loaded in fp32 and saved untrained: in the source's type, name by name."""
    reference, path = source(family, dtype, names)
    back = convert.convert(path, tmp_path / "back", shard_gb=shard_gb)
    trained = saved_again(path, tmp_path / "trained")

    before, largest = tiny.tensors(path), max(tensor.nbytes for tensor in tiny.tensors(path).values())
    for directory in (back, trained):
        after = tiny.tensors(directory)
        assert set(after) == set(before)
        for name, tensor in before.items():
            assert equal_bits(after[name], tensor), name
    files = sorted(back.glob("*.safetensors"))
    assert (len(files) > 1) == (back / "model.safetensors.index.json").exists() == (shard_gb < 1)
    for file in files:
        size = sum(tensor.nbytes for tensor in tiny.load_file(file).values())
        assert size <= max(shard_gb * 1e9, largest)

    loaded = load_in_transformers(family, trained)
    assert loaded.dtype == TYPES[dtype]
    for name, tensor in reference.state_dict().items():
        assert equal_bits(loaded.state_dict()[name], tensor), name
    for file in path.iterdir():
        if not file.name.startswith("model"):  # weights and their index
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
            if file.name != "preprocessor_config.json":  # which says how large training's pictures were
                assert (trained / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (back / "balcap_jax.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "trained"]


def test_a_tied_head_may_be_saved_if_it_equals_the_embedding(tmp_path):
    reference = tiny.make("qwen2_5_vl", tie_word_embeddings=True)
    path = tiny.save(reference, tmp_path / "tied", "modules")
    assert "head" not in models.load(path)[1]["decoder"]
    back = tiny.tensors(saved_again(path, tmp_path / "back"))
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(back) == set(tiny.tensors(path))
    assert equal_bits(back["lm_head.weight"], reference.lm_head.weight.detach())
    load_in_transformers("qwen2_5_vl", tmp_path / "back")

    def change(state):
        state["lm_head.weight"][0, 0] += 1

    rewrite(path, change)
    message = error_of(models.load, path)
    assert f"{path}/model.safetensors: lm_head.weight differs from" in message
    assert "set tie_word_embeddings to false" in message


def test_parameters_keep_the_type_of_the_checkpoint(source):
    path = source("qwen2_5_vl", "bfloat16")[1]
    types = {leaf.dtype for leaf in jax.tree.leaves(models.load(path, param_dtype=None)[1])}
    assert types == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(models.load(path)[1])} == {np.dtype(np.float32)}


def test_another_type_is_one_cast(source, tmp_path):
    path = shutil.copytree(source("llava", "bfloat16", "hub")[1], tmp_path / "source")
    change_config(path, text_config__dtype="bfloat16")  # as some versions of transformers write it
    wide = convert.convert(path, tmp_path / "wide", dtype="float32")
    narrow = convert.convert(wide, tmp_path / "narrow", dtype="bfloat16")
    before = tiny.tensors(path)
    for name, tensor in tiny.tensors(wide).items():
        assert equal_bits(tensor, before[name].float())
        assert equal_bits(tiny.tensors(narrow)[name], before[name])
    config = json.loads((wide / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"
    assert json.loads((narrow / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    assert load_in_transformers("llava", wide).dtype == torch.float32


def test_a_type_that_numbers_do_not_fit_is_refused(source, tmp_path):
    path = shutil.copytree(source("llava")[1], tmp_path / "large")

    def change(state):
        state["language_model.model.norm.weight"][3] = 1e6

    rewrite(path, change, "language_model.model.norm.weight")
    message = error_of(convert.convert, path, tmp_path / "out", dtype="float16")
    assert "tensor language_model.model.norm.weight would hold NaN or infinity as float16" in message
    assert not (tmp_path / "out").exists()


def test_a_trained_model_has_the_files_and_names_that_it_came_with(source, family, tmp_path):
    path = source(family)[1]
    _, params, processor = models.load(path)
    params = lora.add(params, 2, "^decoder/layers/(q|o|down)$", jax.random.key(0))
    rng = np.random.default_rng(5)
    layers = params["decoder"]["layers"]
    for name in ("q", "o", "down"):
        layers[name]["lora_b"] = rng.standard_normal(layers[name]["lora_b"].shape).astype(np.float32)
    merged = lora.merge(params, 0.5)
    back = models.save(tmp_path / "model", models.read_fields(path), merged, processor, source=path)
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


def test_the_size_of_pictures_is_that_of_training_unless_the_sources_is_kept(source, tmp_path):
    path = source("qwen2_5_vl")[1]
    _, params, processor = models.load(path, max_image_tokens=100, prompt_tokens=200)
    fields = models.read_fields(path) | {"max_image_tokens": 100, "prompt_tokens": 200}
    trained = models.save(tmp_path / "trained", fields, params, processor, source=path)
    written, original = (json.loads((d / "preprocessor_config.json").read_text()) for d in (trained, path))
    token = (2 * 4) ** 2
    assert written == original | {
        "min_pixels": 4 * token,
        "max_pixels": 100 * token,
        "size": {"shortest_edge": 4 * token, "longest_edge": 100 * token},
    }
    sizes = transformers.AutoImageProcessor.from_pretrained(trained).size
    assert (sizes["shortest_edge"], sizes["longest_edge"]) == (4 * token, 100 * token)
    assert models.read_fields(trained)["max_image_tokens"] == 100

    # Trained once more, and what came before any training is what is kept.
    again = models.save(tmp_path / "again", fields | {"max_image_tokens": 50}, params, processor, source=trained)
    assert json.loads((again / "preprocessor_config.json").read_text())["max_pixels"] == 50 * token
    kept = convert.convert(again, tmp_path / "kept", keep_processor=True)
    assert json.loads((kept / "preprocessor_config.json").read_text()) == original
    assert models.read_fields(kept) == models.read_fields(again)


def test_another_template_is_in_the_chat_template_too(source, tmp_path):
    path = shutil.copytree(source("llava")[1], tmp_path / "source")
    change_json(path / "tokenizer_config.json", chat_template="{{ 1 }}")
    _, params, processor = models.load(path, template="{image} says: {prompt}")
    trained = models.save(tmp_path / "trained", models.read_fields(path), params, processor, source=path)
    words = transformers.AutoTokenizer.from_pretrained(trained)
    assert words.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<bos><image> says: x"
    assert models.load(trained)[2].template == "{image} says: {prompt}"


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
            "qkv_bias": False,
        },
        {
            "family": "qwen3_vl",
            "tied_embeddings": True,
            "head_size": 8,
            "mrope_section": (1, 2, 1),
            "vision_positions": 9,
            "deepstack_layers": (0, 1),
            "vision_layers": 3,
        },
    ],
    ids=["llava", "qwen2_5_vl", "qwen3_vl"],
)
def test_a_model_that_came_from_no_checkpoint_is_one(fields, tmp_path):
    sizes = {"image_size": 16, "patch_size": 4, "vision_width": 16, "vision_heads": 2, "vision_mlp": 20, "width": 24}
    sizes |= {"layers": 2, "heads": 4, "kv_heads": 2, "head_size": 6, "mlp": 32, "max_image_tokens": 16}
    fields = loading.DEFAULTS | sizes | fields
    policy, processor = models.build(fields, tiny.tokenizer())
    rng = np.random.default_rng(0)
    like = jax.eval_shape(policy.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0.5, 0.3, leaf.shape).astype(np.float32), like)
    model = models.save(tmp_path / "model", fields, params, processor)
    reference = load_in_transformers(fields["family"], model).eval()
    assert tiny.logits_error(fields["family"], reference, policy, params, processor) <= TOLERANCE
    assert (reference.generation_config.eos_token_id,) == policy.end_tokens
    _, again, _ = models.load(model)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


# ------------------------------------------------------------------------------------------------- what load gives


def test_a_loaded_checkpoint_gives_the_logits_of_transformers(source, family):
    reference, path = source(family)
    policy, params, processor = models.load(path)
    assert tiny.logits_error(family, reference, policy, params, processor) <= TOLERANCE


def test_parameters_go_straight_onto_a_mesh(source, family):
    mesh = sharding.make_mesh({"replica": 1, "data": 2, "fsdp": 4, "tensor": 1})
    path = source(family)[1]
    plain, placed = models.load(path)[1], models.load(path, mesh=mesh)[1]
    jax.tree_util.tree_map_with_path(
        lambda path, leaf, there: np.testing.assert_array_equal(leaf, there, jax.tree_util.keystr(path)), plain, placed
    )
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


def plain_and_called_quantised(path):
    change_config(path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return f"{path / 'config.json'} has a quantization_config ({{'quant_method': 'bitsandbytes'", "or delete that entry"


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
    return "config.json is missing", "give a directory of a Hugging Face checkpoint"


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
    return "config.json is of the architecture {}", "only llava, qwen2_5_vl, qwen3_vl can be read"


def another_architecture(path):
    change_config(path, model_type="mistral3")
    return "config.json is of the architecture 'mistral3'", "only llava, qwen2_5_vl, qwen3_vl can be read"


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
        *(
            no_safetensors,
            quantised,
            plain_and_called_quantised,
            too_many,
            too_few,
            another_shape,
            more_layers,
            same_weight_twice,
        ),
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
        convert.main([f"--from={path}", f"--out={tmp_path / 'model'}"])
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
        ("qwen3_vl", {"vision_config__hidden_act": "gelu"}, "hidden_act is 'gelu', only 'gelu_pytorch_tanh'"),
        ("qwen3_vl", {"text_config__attention_bias": True}, "attention_bias is True, only False"),
        ("qwen3_vl", {"vision_config__deepstack_visual_indexes": [0, 5]}, "deepstack_visual_indexes is [0, 5]"),
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
    message = error_of(convert.convert, path, tmp_path / "model")
    assert message.startswith(f"{path / 'config.json'} describes no ")
    assert named in message
    assert message.endswith(("; give another checkpoint", "; download it again"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vision_config__num_position_embeddings": 8}, "vision_positions is 8: it must be a square number from 4 on"),
        ({"vision_config__num_heads": 8}, "vision_width is 16: it must be a multiple of 4 * vision_heads"),
        ({"text_config__num_hidden_layers": 1}, "deepstack_layers names 2 layers: more than the decoder has, 1"),
    ],
)
def test_sizes_that_do_not_fit_together_name_the_directory(source, tmp_path, changes, problem):
    path = shutil.copytree(source("qwen3_vl")[1], tmp_path / "bad")
    change_config(path, **changes)
    message = error_of(models.load, path)
    assert message.startswith(f"{path} can't be built: config field model.{problem}")
    assert message.endswith("give another model")


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
        ("qwen3_vl", {"size": {"height": 224, "width": 224}}, "size is {'height': 224, 'width': 224}, only numbers"),
        ("qwen3_vl", {"image_std": None}, "image_std is [0.26862"),  # the class's own
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
def test_load_and_check_refuse_what_convert_refuses(source, tmp_path, damage):
    path = shutil.copytree(source("llava")[1], tmp_path / "bad")
    named, remedy = damage(path)
    for call in (models.load, convert.check):
        message = error_of(call, path)
        assert named in message
        assert remedy in message


def test_layers_of_two_types_have_no_type_in_common(source, tmp_path):
    path, name = shutil.copytree(source("llava")[1], tmp_path / "bad"), "layers.2.self_attn.q_proj.weight"

    def change(state):
        (full,) = (key for key in state if key.endswith(name) and "language_model" in key)
        state[full] = state[full].half()

    rewrite(path, change, f"language_model.model.{name}")
    assert f"{name} is float16, but" in error_of(models.load, path, param_dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(models.load(path)[1])} == {np.dtype(np.float32)}
    kept = tiny.tensors(convert.convert(path, tmp_path / "kept"))
    assert [key for key, tensor in kept.items() if tensor.dtype == torch.float16] == [f"language_model.model.{name}"]


def test_check_reads_every_number_and_says_what_it_is(source, tmp_path, capsys):
    path = shutil.copytree(source("qwen2_5_vl", "bfloat16")[1], tmp_path / "model")
    count = sum(tensor.numel() for tensor in tiny.tensors(path).values())
    capsys.readouterr()
    convert.main([f"--from={path}", "--check"])
    files = len(shards(path))
    told = f"{path}: qwen2_5_vl, {count:,} parameters, bfloat16, 0.00 GB in {files} files\n"
    assert capsys.readouterr().out.endswith(told)

    def change(state):
        next(iter(state.values())).view(-1)[0] = float("nan")

    assert f"{rewrite(path, change)}: tensor " in (message := error_of(convert.check, path))
    assert message.endswith("holds NaN or infinity; download it again, or take an earlier one")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give --from, and either --out or --check"),
        (["--from={checkpoint}"], "give --from, and either"),
        (["--from={checkpoint}", "--out={here}/x", "--check"], "give --from, and either"),
        (["--from={checkpoint}", "--check", "--dtype=float16"], "--check writes nothing; leave out"),
        (["--from_hf={checkpoint}", "--out={here}/x"], "--from_hf and --to_hf are gone: every command reads"),
        (["--to_hf={here}/x", "--from={checkpoint}"], "--from=DIR --out=NEW changes one"),
        (["--from={here}/none", "--out={here}/x"], "no model at {here}/none: config.json is missing"),
        (["--from={checkpoint}", "--out={model}"], "{model} exists; delete it"),
        (["--from={here}", "--out={here}/x"], "no model at {here}: config.json is missing"),
        (["--from={checkpoint}", "--out={here}/x", "--shard_gb=0"], "--shard_gb must be more than 0"),
        (["--from={checkpoint}", "--out={here}/x", "--shard_gb=nan"], "0 and finite, got nan"),
        (["--from=", "--out={here}/x"], "argument --from: it names no file or directory"),
        (["--from={checkpoint}", "--out="], "argument --out: it names no file or directory"),
        (["--from={checkpoint}", "--out={file}/x"], "cannot write the model to {file}/x: not a directory; name"),
        (["--from=~/none", "--out={here}/x"], "no model at {home}/none"),
        (["--from={checkpoint}", "--out={here}/x", "--dtype=int8"], "invalid choice: 'int8'"),
        (["--from={checkpoint}", "--out={here}/x", "--adapter={model}"], "{model} holds no adapter_config.json"),
    ],
)
def test_a_bad_command_line_ends_in_one_line(source, tmp_path, capsys, arguments, complaint):
    names = {"checkpoint": source("llava")[1], "model": tmp_path / "model", "here": tmp_path, "file": tmp_path / "file"}
    names |= {"home": Path.home()}
    names["model"].mkdir()
    names["file"].write_text("")
    capsys.readouterr()  # transformers tells on stderr that it writes
    with pytest.raises(SystemExit) as ended:
        convert.main([argument.format(**names) for argument in arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert complaint.format(**names) in printed


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------- earlier versions


@pytest.fixture
def earlier(source, family, tmp_path):
    """A model of the checkpoint as earlier versions kept it: an array per parameter, and the names of the tensors."""
    path, old = source(family, "bfloat16")[1], tmp_path / "old"
    _, params, _ = models.load(path, param_dtype=None)
    old.mkdir()
    for name, leaf in flatten_dict(params, sep="/").items():
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(old / "params" / name.replace("/", "."))}}
        metadata = {"shape": leaf.shape, "dtype": "bfloat16", "chunks": [1, *leaf.shape[1:]], "compressor": None}
        store = tensorstore.open(spec | {"metadata": metadata}, create=True).result()
        store.write(np.asarray(leaf)).result()
    saving.carry_files(path, old)
    names = {name: tensor.name for name, tensor in loading.open_checkpoint(path).tensors.items()}
    (old / "hf_names.json").write_text(json.dumps(names))
    (old / "model.json").write_text(json.dumps(models.read_fields(path) | {"prompt": "look"}))
    return old


def test_a_model_of_an_earlier_version_becomes_a_checkpoint(source, family, earlier, tmp_path):
    assert error_of(models.load, earlier) == (
        f"{earlier} holds a model of an earlier version (model.json); turn it into one that is read with `python -m "
        f"balcap_jax.convert --from={earlier} --out=NEW_DIRECTORY`"
    )
    new = convert.convert(earlier, tmp_path / "new")
    before, after = tiny.tensors(source(family, "bfloat16")[1]), tiny.tensors(new)
    assert set(after) == set(before)
    assert all(equal_bits(after[name], tensor) for name, tensor in before.items())
    assert models.read_fields(new)["prompt"] == "look"
    load_in_transformers(family, new)

    chunk = sorted((earlier / "params" / "decoder.layers.q.kernel").glob("1.*"))[0]
    content = chunk.read_bytes()
    for damage in (chunk.unlink, lambda: chunk.write_bytes(content[:5])):
        damage()
        message = error_of(convert.convert, earlier, tmp_path / "damaged")
        assert message.startswith(f"{earlier / 'params'}: decoder/layers/q/kernel cannot be read: ")
        assert message.endswith("; copy the model again")
        assert not (tmp_path / "damaged").exists()
    change_json(earlier / "model.json", layers=4)
    (earlier / "config.json").unlink()
    assert "decoder/layers/attention_norm/scale is (3, 24), by model.json it is (4, 24)" in error_of(
        convert.convert, earlier, tmp_path / "damaged"
    )


# ------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def room():
    """`room(size)`: from then on no file of this process may grow beyond `size` bytes; what a full disk is to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(source, family, tmp_path, room, size):
    path = source(family)[1]
    _, params, processor = models.load(path)
    fields = models.read_fields(path)
    for call in (
        lambda out: convert.convert(path, out),
        lambda out: models.save(out, fields, params, processor, source=path),
    ):
        room(size)
        message = error_of(call, tmp_path / "out")
        room(resource.RLIM_INFINITY)
        assert message.startswith(f"cannot write the model to {tmp_path / 'out'}: ")
        assert message.endswith("; name another place")
        assert list(tmp_path.iterdir()) == []


def test_the_command_says_how_far_it_is_and_where_the_result_is(source, tmp_path, capsys):
    path = source("llava")[1]
    capsys.readouterr()
    convert.main([f"--from={path}", f"--out={tmp_path / 'model'}"])
    progress, needed, written = capsys.readouterr().out.splitlines()  # It took less than the time between two lines.
    assert progress.startswith("0.1 of 0.1 MB")
    assert needed.startswith("needs transformers 5")
    assert written == str(tmp_path / "model")


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
