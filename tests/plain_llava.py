"""An independent, slow LLaVA: one full sequence per sample, no cache, no sharing, no Flax. The reference of the tests."""

import jax
import jax.numpy as jnp

MEAN = jnp.array([0.48145466, 0.4578275, 0.40821073])
STD = jnp.array([0.26862954, 0.26130258, 0.27577711])


def layer_norm(x, w, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + eps) * w["scale"] + w["bias"]


def rms_norm(x, scale, eps):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def softmax(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def encode_one(policy, params, image):
    """uint8 [S, S, 3] -> [I, D]."""
    c, w = policy.vision, params["vision"]
    pixels = (image / 255.0 - MEAN) / STD
    p, side = c.patch_size, c.image_size // c.patch_size
    patches = [pixels[r * p : (r + 1) * p, k * p : (k + 1) * p].reshape(-1) for r in range(side) for k in range(side)]
    x = jnp.stack(patches) @ w["patches"]["patch"]["kernel"]
    x = jnp.concatenate([w["patches"]["class_token"][None], x]) + w["patches"]["positions"]
    x = layer_norm(x, w["patches"]["norm"], c.norm_eps)
    for i in range(c.used_layers):
        layer = jax.tree.map(lambda a: a[i], w["layers"])  # noqa: B023
        h = layer_norm(x, layer["attention_norm"], c.norm_eps)
        heads = []
        for n in range(c.heads):
            q, k, v = (h @ layer[m]["kernel"][:, n] + layer[m]["bias"][n] for m in "qkv")
            heads.append(softmax(q @ k.T / jnp.sqrt(q.shape[-1])) @ v @ layer["o"]["kernel"][n])
        x = x + sum(heads) + layer["o"]["bias"]
        h = layer_norm(x, layer["mlp_norm"], c.norm_eps)
        h = h @ layer["up"]["kernel"] + layer["up"]["bias"]
        h = h / (1 + jnp.exp(-1.702 * h))
        x = x + h @ layer["down"]["kernel"] + layer["down"]["bias"]
    x = x[1:]
    first, second = params["projector"]["first"], params["projector"]["second"]
    return jax.nn.gelu(x @ first["kernel"] + first["bias"], approximate=False) @ second["kernel"] + second["bias"]


def decoder_states(policy, params, x):
    """Full causal pass over one sequence [S, D] of real tokens at positions 0..S-1 -> normed states [S, D]."""
    c, w = policy.decoder, params["decoder"]
    length = x.shape[0]
    inverse = 1.0 / c.rope_theta ** (jnp.arange(0, c.head_size, 2) / c.head_size)
    angles = jnp.arange(length)[:, None] * jnp.concatenate([inverse, inverse])
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rotate(h):
        half = c.head_size // 2
        return h * cos + jnp.concatenate([-h[:, half:], h[:, :half]], -1) * sin

    seen = jnp.arange(length)[None] <= jnp.arange(length)[:, None]
    for i in range(c.layers):
        layer = jax.tree.map(lambda a: a[i], w["layers"])  # noqa: B023
        h = rms_norm(x, layer["attention_norm"]["scale"], c.norm_eps)
        read = 0
        for n in range(c.heads):
            m = n // (c.heads // c.kv_heads)
            bias = {
                k: layer[k]["bias"] if "bias" in layer[k] else jnp.zeros(layer[k]["kernel"].shape[1:]) for k in "qkv"
            }
            q = rotate(h @ layer["q"]["kernel"][:, n] + bias["q"][n])
            k = rotate(h @ layer["k"]["kernel"][:, m] + bias["k"][m])
            v = h @ layer["v"]["kernel"][:, m] + bias["v"][m]
            scores = jnp.where(seen, q @ k.T / jnp.sqrt(c.head_size), -jnp.inf)
            read = read + softmax(scores) @ v @ layer["o"]["kernel"][n]
        x = x + read
        h = rms_norm(x, layer["mlp_norm"]["scale"], c.norm_eps)
        gate = h @ layer["gate"]["kernel"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (h @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    return rms_norm(x, w["norm"]["scale"], c.norm_eps)


def log_probs_one(policy, params, tokens, image, response, temperature=1.0):
    """Log-probabilities [R] of one response after one un-padded prompt [P']; every sample pays for the whole prompt."""
    w = params["decoder"]
    image_rows = iter(encode_one(policy, params, image))
    x = [next(image_rows) if t == policy.image_token else w["embed"][t] for t in tokens]
    x = jnp.concatenate([jnp.stack(x), w["embed"][response]])
    states = decoder_states(policy, params, x)[len(tokens) - 1 : -1]
    kernel = w["embed"].T if policy.decoder.tied_embeddings else w["head"]
    logits = states @ kernel
    logits = logits.at[:, list(policy.forbidden)].set(-jnp.inf) / temperature
    chosen = logits[jnp.arange(len(response)), response]
    top = logits.max(-1)
    return chosen - top - jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
