"""The decoder alone against the implementations of Hugging Face transformers: tiny, random, fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llava import BOS, EOS, PAD, V, make_policy

from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava import Llava
from balcap_jax.models.policy import Prompt

torch = pytest.importorskip("torch", reason="the reference implementations need torch, of the [dev] extra")
transformers = pytest.importorskip("transformers")

# Largest error over the largest logit; two correct fp32 implementations agree to about 1e-6 at these sizes.
TOLERANCE = 1e-5
B, G, P, R = 2, 3, 8, 5
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def randomised(model):
    """The model with every parameter random, norms and biases included, in inference mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model.eval()


def decoder_params(state: dict, prefix: str, head: str, config: DecoderConfig) -> dict:
    """The decoder's parameters out of a transformers state dict."""

    def stacked(name, *shape):
        weights = [state[f"{prefix}layers.{i}.{name}"].numpy() for i in range(config.layers)]
        return jnp.asarray(np.stack([w.T.reshape(*shape) if shape else w.T for w in weights]))

    params = {
        "embed": jnp.asarray(state[f"{prefix}embed_tokens.weight"].numpy()),
        "norm": {"scale": jnp.asarray(state[f"{prefix}norm.weight"].numpy())},
        "layers": {
            "attention_norm": {"scale": stacked("input_layernorm.weight")},
            "mlp_norm": {"scale": stacked("post_attention_layernorm.weight")},
            "o": {"kernel": stacked("self_attn.o_proj.weight", config.heads, config.head_size, config.width)},
            **{name: {"kernel": stacked(f"mlp.{name}_proj.weight")} for name in ("gate", "up", "down")},
        },
    }
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        params["layers"][name] = {
            "kernel": stacked(f"self_attn.{name}_proj.weight", config.width, heads, config.head_size)
        }
        if config.qkv_bias:
            params["layers"][name]["bias"] = stacked(f"self_attn.{name}_proj.bias", heads, config.head_size)
    if not config.tied_embeddings:
        params["head"] = jnp.asarray(state[head].numpy().T)
    return params


def response_logits(policy: Llava, params, prompt: Prompt, image_embeds, responses) -> jax.Array:
    """[B, G, R, V]: what predicts each response token, by the update's path."""
    x = policy._prompt_embeddings(params, prompt, image_embeds)
    y = decoder.embed(policy.decoder, params["decoder"], responses)
    hidden = decoder.forward(policy.decoder, params["decoder"], x, prompt.mask, prompt.positions, y)
    return decoder.logits(policy.decoder, params["decoder"], hidden)


def relative_error(ours, reference) -> float:
    reference = reference.detach().numpy()
    return float(np.max(np.abs(np.asarray(ours) - reference)) / np.max(np.abs(reference)))


def padded_prompt(rows: list[list[int]], length: int, images) -> Prompt:
    tokens = np.array([row + [PAD] * (length - len(row)) for row in rows], np.int32)
    mask = np.arange(length) < np.array([[len(row)] for row in rows])
    return Prompt(tokens, mask, np.tile(np.arange(length, dtype=np.int32), (len(rows), 1)), images)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Llama", {}), ("Qwen2", {"qkv_bias": True}), ("Llama", {"tied_embeddings": True})],
    ids=["Llama", "Qwen2 (biases)", "Llama, tied"],
)
def test_the_decoder_equals_transformers(family, changes):
    config = getattr(transformers, f"{family}Config")(
        **SIZES, tie_word_embeddings=changes.get("tied_embeddings", False)
    )
    reference = randomised(getattr(transformers, f"{family}ForCausalLM")(config))
    policy = make_policy(**changes)
    state = reference.state_dict()
    params = {"decoder": decoder_params(state, "model.", "lm_head.weight", policy.decoder)}

    rng = np.random.default_rng(0)
    rows = [[BOS, *rng.integers(4, V, length - 1).tolist()] for length in (P, P - 3)]
    responses = rng.integers(4, V, (B, G, R))
    prompt = padded_prompt(rows, P, None)
    nothing = jnp.zeros((B, 1, policy.decoder.width))
    ours = jax.jit(lambda params: response_logits(policy, params, prompt, nothing, responses))(params)
    for b, row in enumerate(rows):
        sequences = torch.tensor(np.concatenate([np.tile(row, (G, 1)), responses[b]], axis=1))
        theirs = reference(sequences).logits[:, len(row) - 1 : -1]
        assert relative_error(ours[b], theirs) <= TOLERANCE
