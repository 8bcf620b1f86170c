"""Adapters as files of PEFT: written here and read by peft, made by peft and read here, and those that are refused."""

import json
import shlex
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from balcap_jax import convert, models
from balcap_jax.cli.errors import UserError
from balcap_jax.models import lora
from balcap_jax.models.formats import loading, peft, safetensors
from balcap_jax.parallel import sharding

torch = pytest.importorskip("torch", reason="the checkpoints are written by transformers, which needs torch")
import tiny_checkpoints as tiny  # noqa: E402

TOLERANCE = 1e-5  # of the largest logit, fp32
RANK, ALPHA = 3, 5.0
# Of a Qwen tower queries and values: there they are parts of one matrix.
TARGETS = {
    "llava": "^(decoder|vision)/layers/(q|o|up)$|^projector/first$",
    "qwen2_5_vl": "^decoder/layers/(k|o|down)$|^vision/layers/(q|v|o)$|^merger/second$",
    "qwen3_vl": "^decoder/layers/(k|o|down)$|^vision/layers/(q|v|o)$|^deepstack/layers/second$",
}


@pytest.fixture(scope="module", params=TARGETS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    return tiny.save(tiny.make(family), tmp_path_factory.mktemp("base") / family)


def random_adapters(params, targets, seed=0):
    """`params` with adapters of random numbers, which change every logit."""
    params = flatten_dict(lora.add(params, RANK, targets, jax.random.key(seed)), sep="/")
    rng = np.random.default_rng(seed)
    for path, leaf in params.items():
        if path.endswith("lora_b"):
            params[path] = rng.normal(0.0, 0.3, leaf.shape).astype(np.float32)
    return unflatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def trained(family, base, tmp_path_factory):
    """(the policy with adapters, its parameters with them, the model directory) as training leaves them."""
    policy, params, processor = models.load(base)
    params = random_adapters(params, TARGETS[family])
    scale = ALPHA / RANK
    path = models.save(
        tmp_path_factory.mktemp("trained") / "model",
        models.read_fields(base) | {"prompt": tiny.PROMPT},
        lora.merge(params, scale, keep_adapters=True),
        processor,
        source=base,
        adapter=peft.Origin(str(base), ALPHA, RANK),
    )
    return lora.Adapted(policy, scale), params, path


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_close(ours, theirs, limit=1e-6):
    """To `limit` of the largest number of each parameter."""
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, atol=limit * float(np.abs(leaf).max()), err_msg=path)


def reference(family, base, adapter):
    """The model of transformers with an adapter that peft has loaded."""
    library = pytest.importorskip("peft", reason="peft is not installed (pip install -e '.[dev]', Python 3.11)")
    model = tiny.FAMILIES[family].from_pretrained(base, attn_implementation="eager")
    return library.PeftModel.from_pretrained(model, adapter).eval()


def test_adapters_that_were_written_here_give_peft_the_same_logits(family, base, trained):
    policy, params, path = trained
    theirs = reference(family, base, path / "adapter")
    _, _, processor = models.load(base)
    assert tiny.logits_error(family, theirs, policy, params, processor) <= TOLERANCE
    plain, merged, _ = models.load(path)
    assert tiny.logits_error(family, theirs, plain, merged, processor) <= TOLERANCE
    with theirs.disable_adapter():
        assert tiny.logits_error(family, theirs, policy, params, processor) > 0.05, "the adapters change nothing"


def test_adapters_that_peft_made_are_read(family, base, tmp_path):
    """With ranks and scales of their own, rsLoRA, and layers that have none."""
    library = pytest.importorskip("peft", reason="peft is not installed (pip install -e '.[dev]', Python 3.11)")
    model = tiny.FAMILIES[family].from_pretrained(base, attn_implementation="eager")
    config = library.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=r".*language_model\.layers\.\d\.(self_attn\.[qo]_proj|mlp\.gate_proj)|.*(proj|qkv|linear_1|mlp\.0)",
        exclude_modules=r".*patch_embed.*|.*layers\.1\.self_attn\.o_proj",
        rank_pattern={r"layers\.2\.mlp\.gate_proj": 2},
        alpha_pattern={r"layers\.0\..*o_proj": 11},
        use_rslora=True,
    )
    torch.manual_seed(0)
    theirs = library.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    policy, params, processor = models.load(tmp_path / "adapter")
    assert tiny.logits_error(family, theirs, policy, params, processor) <= TOLERANCE
    converted = convert.convert(base, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert_close(models.load(converted)[1], params)
    with theirs.disable_adapter():
        assert tiny.logits_error(family, theirs, policy, params, processor) > 0.05, "the adapters change nothing"


def test_an_adapter_is_read_as_the_model_that_training_saved(family, base, trained, tmp_path):
    """By load, on a mesh too, and by convert; it brings its prompt."""
    _, params, path = trained
    _, merged, _ = models.load(path)
    _, found, _ = models.load(path / "adapter")
    assert_close(found, merged)
    assert models.read_fields(path / "adapter") == models.read_fields(path)
    assert_close(found, lora.merge(params, ALPHA / RANK))
    for given in ({"source": path / "adapter"}, {"source": base, "adapter": path / "adapter"}):
        converted = convert.convert(out=tmp_path / "converted", **given)
        assert_close(models.load(converted)[1], merged)
        assert models.read_fields(converted)["prompt"] == tiny.PROMPT
        shutil.rmtree(converted)
    assert "with an adapter of " in convert.check(path / "adapter")


def test_adapters_merge_on_a_mesh(trained):
    path = trained[2] / "adapter"
    mesh = sharding.make_mesh({"replica": 1, "data": 2, "fsdp": 4, "tensor": 1})
    plain, placed = models.load(path)[1], models.load(path, mesh=mesh)[1]
    assert_close(placed, plain)
    where = sharding.tree_shardings(mesh, placed)
    pairs = zip(*map(jax.tree.leaves, (placed, where)), strict=True)
    assert all(leaf.sharding.is_equivalent_to(place, leaf.ndim) for leaf, place in pairs)


def test_the_files_are_those_of_peft(family, base, trained):
    path = trained[2] / "adapter"
    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert config["base_model_name_or_path"] == str(base)
    shapes = {tensor.name: tensor.shape for tensor in safetensors.read_file(path / "adapter_model.safetensors")}
    layer = "base_model.model.model.language_model.layers.2.self_attn.o_proj"
    assert shapes[f"{layer}.lora_A.weight"] == (RANK, 24)
    assert shapes[f"{layer}.lora_B.weight"] == (24, RANK)
    assert len(shapes) == 2 * len(config["target_modules"])
    if family != "llava":  # Queries and values side by side in one matrix, whose scale is still alpha / rank.
        qkv = "model.visual.blocks.1.attn.qkv"
        assert shapes[f"base_model.model.{qkv}.lora_B.weight"] == (48, 2 * RANK)
        assert (config["rank_pattern"][qkv], config["alpha_pattern"][qkv]) == (2 * RANK, 2 * ALPHA)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "is of the method 'IA3'"),
        ({"use_dora": True}, "use_dora is True, which is not built"),
        ({"bias": "all"}, "bias is 'all', only 'none' is built"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not built"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', whose base is not the published one"),
        ({"lora_alpha": "much"}, "must be numbers, got ['much'"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern holds no regular expression"),
        ({"alpha_pattern": [1]}, "lora_alpha and alpha_pattern must be numbers"),
        ({"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}, "`hf download Qwen/Qwen2.5-VL-3B-Instruct --loc"),
        ({"base_model_name_or_path": None}, "names no base"),
    ],
)
@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_what_is_no_plain_adapter_is_refused(trained, tmp_path, change, named):
    path = shutil.copytree(trained[2] / "adapter", tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    message = error_of(models.load, path)
    assert message.startswith(str(path / "adapter_config.json"))
    assert named in message


@pytest.mark.parametrize("family", ["llava"], indirect=True)
@pytest.mark.parametrize(
    "name", ["../no\nname", "a\0b", "/nowhere/at/all", "just-a-name", "x; rm y/z", "https://a.b/c"]
)
def test_a_base_that_is_no_directory_is_named_in_one_line(trained, tmp_path, name):
    path = shutil.copytree(trained[2] / "adapter", tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    message = error_of(models.load, path)
    assert message.startswith(f"{path / 'adapter_config.json'} is of {name!r}, and there is no such model directory")
    assert "hf download" not in message
    assert "--from=BASE" in message


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_an_adapter_of_an_adapter_says_which_to_merge_first(trained, tmp_path):
    first, second = (shutil.copytree(trained[2] / "adapter", tmp_path / name) for name in ("first", "second"))
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../first"}))
    message = error_of(models.load, second)
    assert "is of '../first', which is an adapter itself; merge that one first" in message
    (command,) = (part for part in message.split("`") if part.startswith("python -m balcap_jax.convert "))
    merged = convert.convert(shlex.split(command)[3].removeprefix("--from="), tmp_path / "merged")
    assert_close(models.load(merged)[1], models.load(first)[1])
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(merged)}))
    assert loading.find(second).checkpoint == merged


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_product_that_no_float_holds_is_refused(trained, base, tmp_path):
    """Each matrix is finite by itself."""
    path = shutil.copytree(trained[2] / "adapter", tmp_path / "adapter")
    weights = path / "adapter_model.safetensors"
    tiny.save_file({name: tensor * 1e25 for name, tensor in tiny.load_file(weights).items()}, weights)
    message = error_of(convert.check, path)
    assert message.startswith(f"{path}: what it adds to model.")
    assert message.endswith(" is not finite; save the adapter again")
    message = error_of(convert.convert, base, tmp_path / "out", adapter=path)
    assert "would hold NaN or infinity as float32; give a type with a larger range, or another model" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(trained, base, tmp_path):
    path = shutil.copytree(trained[2] / "adapter", tmp_path / "adapter")
    weights = path / "adapter_model.safetensors"
    state = tiny.load_file(weights)
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(**changes):
        changed = {key: tensor for key, tensor in (state | changes).items() if tensor is not None}
        tiny.save_file(changed, weights)
        return error_of(models.load, path)

    assert "q_proj by [3, 25] and [24, 3], its weight is [24, 24]" in refused(**{name: torch.zeros(3, 25)})
    assert "has one half of the adapter of model.language_model.layers.0.self_attn.q_proj" in refused(**{name: None})
    nothing = {name: torch.zeros(0, 24), name.replace("_A", "_B"): torch.zeros(24, 0)}
    assert "q_proj by [0, 24] and [24, 0], its weight is [24, 24]" in refused(**nothing)
    twice = {name.replace(".weight", ".default.weight"): state[name].clone()}
    assert "has two adapters of model.language_model.layers.0.self_attn.q_proj; save it again" in refused(**twice)
    assert "holds base.weight, which is no LoRA matrix" in refused(**{"base.weight": torch.zeros(1)})
    other = {name.replace("layers.0", "layers.7"): state[name].clone()}
    other |= {key.replace("_A", "_B"): torch.zeros(24, 3) for key in other}
    assert "adapts model.language_model.layers.7.self_attn.q_proj, which is no dense layer" in refused(**other)
    weights.unlink()
    (path / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.safetensors is missing (a pickle" in error_of(models.load, path)
    message = error_of(convert.convert, trained[2] / "adapter", tmp_path / "out", adapter=path)
    assert message.startswith(f"{trained[2] / 'adapter'} is an adapter; --from takes its base beside --adapter")
    assert loading.find(trained[2] / "adapter").checkpoint == base
