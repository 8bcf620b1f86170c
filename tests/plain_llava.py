"""An independent, slow LLaVA: one full sequence per sample, no cache, no sharing, no Flax. The reference of the tests.

Every sample encodes its image and runs its whole prompt again. A sequence starts at position 0 and is filled up at its
end, where causal attention can't see it; so nothing here masks padding.
"""

import jax
import jax.numpy as jnp
import numpy as np

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


def encode(policy, params, image):
    """uint8 [S, S, 3] -> [I, D]."""
    c, w = policy.vision, params["vision"]
    pixels = (image / 255.0 - MEAN) / STD
    p, side = c.patch_size, c.image_size // c.patch_size
    patches = [pixels[r * p : (r + 1) * p, k * p : (k + 1) * p].reshape(-1) for r in range(side) for k in range(side)]
    x = jnp.stack(patches) @ w["patches"]["patch"]["kernel"]
    x = jnp.concatenate([w["patches"]["class_token"][None], x]) + w["patches"]["positions"]
    x = layer_norm(x, w["patches"]["norm"], c.norm_eps)

    def one_layer(x, layer):
        h = layer_norm(x, layer["attention_norm"], c.norm_eps)

        def head(n):
            q, k, v = (h @ layer[m]["kernel"][:, n] + layer[m]["bias"][n] for m in "qkv")
            return softmax(q @ k.T / jnp.sqrt(q.shape[-1])) @ v @ layer["o"]["kernel"][n]

        x = x + jax.vmap(head)(jnp.arange(c.heads)).sum(0) + layer["o"]["bias"]
        h = layer_norm(x, layer["mlp_norm"], c.norm_eps)
        h = h @ layer["up"]["kernel"] + layer["up"]["bias"]
        h = h / (1 + jnp.exp(-1.702 * h))
        return x + h @ layer["down"]["kernel"] + layer["down"]["bias"], None

    x, _ = jax.lax.scan(one_layer, x, w["layers"])
    first, second = params["projector"]["first"], params["projector"]["second"]
    x = jax.nn.gelu(x[1:] @ first["kernel"] + first["bias"], approximate=False)
    return x @ second["kernel"] + second["bias"]


def logits(policy, params, tokens, image):
    """Logits [S, V] after each position of one sequence of tokens [S], prompt and response in one."""
    c, w = policy.decoder, params["decoder"]
    length = tokens.shape[0]
    is_image = tokens == policy.image_token
    x = jnp.where(is_image[:, None], encode(policy, params, image)[jnp.cumsum(is_image) - 1], w["embed"][tokens])
    inverse = 1.0 / c.rope_theta ** (jnp.arange(0, c.head_size, 2) / c.head_size)
    angles = jnp.arange(length)[:, None] * jnp.concatenate([inverse, inverse])
    seen = jnp.arange(length)[None] <= jnp.arange(length)[:, None]

    def rotate(h):
        half = c.head_size // 2
        return h * jnp.cos(angles) + jnp.concatenate([-h[:, half:], h[:, :half]], -1) * jnp.sin(angles)

    def one_layer(x, layer):
        h = rms_norm(x, layer["attention_norm"]["scale"], c.norm_eps)

        def project(name, n):
            out = h @ layer[name]["kernel"][:, n]
            return out + layer[name]["bias"][n] if "bias" in layer[name] else out

        def head(n):
            m = n // (c.heads // c.kv_heads)
            q, k, v = rotate(project("q", n)), rotate(project("k", m)), project("v", m)
            scores = jnp.where(seen, q @ k.T / jnp.sqrt(c.head_size), -jnp.inf)
            return softmax(scores) @ v @ layer["o"]["kernel"][n]

        x = x + jax.vmap(head)(jnp.arange(c.heads)).sum(0)
        h = rms_norm(x, layer["mlp_norm"]["scale"], c.norm_eps)
        gate = h @ layer["gate"]["kernel"]
        return x + (gate / (1 + jnp.exp(-gate)) * (h @ layer["up"]["kernel"])) @ layer["down"]["kernel"], None

    x, _ = jax.lax.scan(one_layer, x, w["layers"])
    x = rms_norm(x, w["norm"]["scale"], c.norm_eps)
    out = x @ (w["embed"].T if c.tied_embeddings else w["head"])
    return out.at[:, list(policy.forbidden)].set(-jnp.inf)


def log_probs(policy, params, rows, images, responses, temperature=1.0):
    """Log-probabilities [B, G, R] of `responses` [B, G, R] after the un-padded prompts `rows` (lists of token ids)."""
    batch, _, length = responses.shape
    longest = max(map(len, rows)) + length

    def sequence(b, response):
        row = np.asarray(rows[b], np.int32)
        return jnp.concatenate([row, response, np.full(longest - len(row) - length, policy.pad_token, np.int32)])

    tokens = jnp.stack([jax.vmap(lambda response: sequence(b, response))(responses[b]) for b in range(batch)])  # noqa: B023
    starts = jnp.asarray([len(row) for row in rows])

    def one(tokens, image, start):
        # The logits after position start - 1 predict the first response token.
        scaled = jax.lax.dynamic_slice_in_dim(logits(policy, params, tokens, image), start - 1, length) / temperature
        chosen = jnp.take_along_axis(scaled, jax.lax.dynamic_slice_in_dim(tokens, start, length)[:, None], 1)[:, 0]
        top = scaled.max(-1)
        return chosen - top - jnp.log(jnp.exp(scaled - top[:, None]).sum(-1))

    return jax.vmap(jax.vmap(one, (0, None, None)))(tokens, images, starts)
