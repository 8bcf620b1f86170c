"""transformers' Qwen2.5-VL and Qwen3-VL with random weights, and the same weights as parameters of our policy."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tiny_qwen import EOS, IMAGE, PAD

from balcap_jax.models.policy import Params, Policy
from balcap_jax.models.qwen2_5_vl.vision import FRAMES, QwenTower
from balcap_jax.models.qwen3_vl import Qwen3VL

VIDEO, VISION_START, VISION_END = 38, 39, 40


def make_reference(policy: Policy) -> transformers.PreTrainedModel:
    """The reference of the policy's sizes, every parameter random (norms and biases too), fp32, in inference mode."""
    tower, language = policy.vision, policy.decoder
    if isinstance(policy, Qwen3VL):
        name, rope, text = "Qwen3VL", {"mrope_interleaved": True}, {"head_dim": language.head_size}
        own = {
            "num_position_embeddings": tower.positions,
            "deepstack_visual_indexes": list(tower.deepstack_layers),
        }
    else:
        name, rope, text = "Qwen2_5_VL", {}, {}
        own = {
            "window_size": tower.window_size,
            "fullatt_block_indexes": list(tower.full_attention_layers),
        }
    config = getattr(transformers, f"{name}Config")(
        vision_config={
            "depth": tower.layers,
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp,
            "num_heads": tower.heads,
            "patch_size": tower.patch_size,
            **own,
            "out_hidden_size": language.width,
        },
        text_config={
            **text,
            "vocab_size": language.vocab,
            "hidden_size": language.width,
            "intermediate_size": language.mlp,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "rms_norm_eps": language.norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": language.rope_theta,
                "mrope_section": list(language.mrope_section),
                **rope,
            },
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "tie_word_embeddings": language.tied_embeddings,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=language.tied_embeddings,
    )
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    model = kind._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.rsplit(".", 2)[-2] or ".ln_q." in name
            parameter.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.2, generator=generator)
    return model.float().eval()


def to_params(policy: Policy, state: dict[str, torch.Tensor]) -> Params:
    """The reference's state dict (or gradients under its names) in the layout of our parameters.

    A reshape and a transposition of every tensor, written without the conversion tables of the package.
    """
    tower, language, is_3 = policy.vision, policy.decoder, isinstance(policy, Qwen3VL)

    def array(name: str) -> np.ndarray:
        return state[name].detach().float().numpy()

    def stack(prefix: str, count: int, read) -> jax.Array:
        return jnp.asarray(np.stack([read(f"{prefix}{i}.") for i in range(count)]))

    def dense(prefix: str, count: int, name: str, *inputs: int) -> dict[str, jax.Array]:
        """kernel [L, in, out], `in` split into `inputs` where they are given, and the bias where there is one."""

        def kernel(at: str) -> np.ndarray:
            matrix = array(f"{at}{name}.weight").T
            return matrix.reshape(*(inputs or matrix.shape[:1]), -1)

        made = {"kernel": stack(prefix, count, kernel)}
        if f"{prefix}0.{name}.bias" in state:
            made["bias"] = stack(prefix, count, lambda at: array(f"{at}{name}.bias"))
        return made

    def heads(prefix: str, count: int, name: str, width: int, of: int, size: int) -> dict[str, jax.Array]:
        made = {"kernel": stack(prefix, count, lambda at: array(f"{at}{name}.weight").T.reshape(width, of, size))}
        if f"{prefix}0.{name}.bias" in state:
            made["bias"] = stack(prefix, count, lambda at: array(f"{at}{name}.bias").reshape(of, size))
        return made

    def norms(prefix: str, count: int, name: str) -> dict[str, jax.Array]:
        made = {"scale": stack(prefix, count, lambda at: array(f"{at}{name}.weight"))}
        if f"{prefix}0.{name}.bias" in state:
            made["bias"] = stack(prefix, count, lambda at: array(f"{at}{name}.bias"))
        return made

    def one(made: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What was made of a stack of one, unstacked."""
        return {name: leaf[0] for name, leaf in made.items()}

    mlp = {name: f"{name}_proj" for name in ("gate", "up", "down")}
    if is_3:
        mlp = {"up": "linear_fc1", "down": "linear_fc2"}
    blocks, size = "model.visual.blocks.", tower.width // tower.heads
    fused = heads(blocks, tower.layers, "attn.qkv", tower.width, 3 * tower.heads, size)
    vision_layers = {
        name: {leaf: value[..., i * tower.heads : (i + 1) * tower.heads, :] for leaf, value in fused.items()}
        for i, name in enumerate("qkv")
    }
    vision_layers |= {
        "attention_norm": norms(blocks, tower.layers, "norm1"),
        "mlp_norm": norms(blocks, tower.layers, "norm2"),
        "o": dense(blocks, tower.layers, "attn.proj", tower.heads, size),
        **{name: dense(blocks, tower.layers, f"mlp.{theirs}") for name, theirs in mlp.items()},
    }

    layers = "model.language_model.layers."
    counts = {"q": language.heads, "k": language.kv_heads, "v": language.kv_heads}
    decoder_layers = {
        name: heads(layers, language.layers, f"self_attn.{name}_proj", language.width, count, language.head_size)
        for name, count in counts.items()
    }
    if is_3:
        decoder_layers |= {f"{x}_norm": norms(layers, language.layers, f"self_attn.{x}_norm") for x in "qk"}
    decoder_layers |= {
        "attention_norm": norms(layers, language.layers, "input_layernorm"),
        "mlp_norm": norms(layers, language.layers, "post_attention_layernorm"),
        "o": dense(layers, language.layers, "self_attn.o_proj", language.heads, language.head_size),
        **{name: dense(layers, language.layers, f"mlp.{name}_proj") for name in ("gate", "up", "down")},
    }

    patch = array("model.visual.patch_embed.proj.weight")  # [width, channel, frame, row, column]
    decoder = {
        "embed": jnp.asarray(array("model.language_model.embed_tokens.weight")),
        "layers": decoder_layers,
        "norm": {"scale": jnp.asarray(array("model.language_model.norm.weight"))},
    }
    if not language.tied_embeddings:
        decoder["head"] = jnp.asarray(array("lm_head.weight").T)
    kernel = jnp.asarray(np.einsum("wcfij->fcijw", patch).reshape(FRAMES, -1, tower.width))
    params = {"vision": {"patch": {"kernel": kernel}, "layers": vision_layers}, "decoder": decoder}

    def mergers(prefix: str, count: int, norm: str, first: str, second: str) -> dict[str, dict[str, jax.Array]]:
        made = {"first": dense(prefix, count, first), "second": dense(prefix, count, second)}
        return made | {"norm": norms(prefix, count, norm)}

    names = ("norm", "linear_fc1", "linear_fc2") if is_3 else ("ln_q", "mlp.0", "mlp.2")
    state = {name.replace(".merger.", ".merger.0."): tensor for name, tensor in state.items()}
    params["merger"] = {name: one(made) for name, made in mergers("model.visual.merger.", 1, *names).items()}
    if is_3:
        params["vision"]["patch"]["bias"] = jnp.asarray(array("model.visual.patch_embed.proj.bias"))
        params["vision"]["positions"] = jnp.asarray(array("model.visual.pos_embed.weight"))
        count = len(tower.deepstack_layers)
        params["deepstack"] = {"layers": mergers("model.visual.deepstack_merger_list.", count, *names)}
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(policy.init, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    return params


def pixels(tower: QwenTower, patches: np.ndarray) -> torch.Tensor:
    """uint8 patches [n, 3 * patch * patch] as the reference's image processor hands them over, two equal frames."""
    values = patches.reshape(len(patches), 3, 1, -1) / 255.0
    values = (values - tower.PIXEL_MEAN[:, None, None]) / tower.PIXEL_STD[:, None, None]
    return torch.tensor(values.repeat(FRAMES, axis=2).reshape(len(patches), -1), dtype=torch.float32)


def grid_thw(grids: list[tuple[int, int]]) -> torch.Tensor:
    """Rows and columns of merged tokens -> (frames, rows, columns) in patches."""
    return torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids])


def relative_error(ours, reference) -> float:
    """Largest difference over the largest entry of the reference."""
    reference = reference.detach().float().numpy() if isinstance(reference, torch.Tensor) else np.asarray(reference)
    return float(np.max(np.abs(np.asarray(ours, np.float32) - reference)) / np.max(np.abs(reference)))
