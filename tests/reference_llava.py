"""transformers' LLaVA with random weights, and the same weights as parameters of our policy."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax.traverse_util import unflatten_dict
from tiny_llava import BOS, EOS, IMAGE, PAD

from balcap_jax.models.formats import hf
from balcap_jax.models.formats.loading import flat_shapes
from balcap_jax.models.llava import Llava
from balcap_jax.models.llava.hf import TABLE
from balcap_jax.models.llava.vision import PIXEL_MEAN, PIXEL_STD
from balcap_jax.models.policy import Params


def make_reference(policy: Llava) -> transformers.LlavaForConditionalGeneration:
    """The reference of the policy's sizes, every parameter random (norms and biases too), fp32, in inference mode."""
    tower, language = policy.vision, policy.decoder
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            hidden_size=tower.width,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            intermediate_size=tower.mlp,
            layer_norm_eps=tower.norm_eps,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=language.vocab,
            hidden_size=language.width,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            head_dim=language.head_size,
            intermediate_size=language.mlp,
            rms_norm_eps=language.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=tower.feature_layer,
        tie_word_embeddings=False,
    )
    # What the published checkpoint's config.json leaves to the defaults.
    assert (config.vision_feature_select_strategy, config.projector_hidden_act) == ("default", "gelu")
    assert config.vision_config.hidden_act == "quick_gelu"
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.2, generator=generator)
    return model.float().eval()


def to_params(policy: Llava, tensors: dict[str, torch.Tensor]) -> Params:
    """The reference's parameters (or gradients under their names) as ours, by the conversion table of the family."""
    shapes = flat_shapes(jax.eval_shape(policy.init, jax.random.key(0)))
    layers: dict[str, dict] = {path: {} for path in shapes}
    table = hf.plan(TABLE, shapes)
    assert table.keys() == tensors.keys()
    for name, pieces in table.items():
        (piece,) = pieces  # nothing is fused in this family
        array = tensors[name].detach().float().numpy()
        layers[piece.path][piece.layer] = piece.row.form.to_ours(array, piece.shape)
    flat = {
        path: found[None] if None in found else np.stack([found[i] for i in range(len(found))])
        for path, found in layers.items()
    }
    assert {path: array.shape for path, array in flat.items()} == shapes
    return jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, S, S, 3] as transformers' image processor would hand them over."""
    return torch.tensor(np.moveaxis((images / 255.0 - PIXEL_MEAN) / PIXEL_STD, -1, 1), dtype=torch.float32)


def relative_error(ours, reference: torch.Tensor) -> float:
    """Largest error over the largest entry."""
    reference = reference.detach().float().numpy()
    return float(np.max(np.abs(np.asarray(ours, np.float32) - reference)) / np.max(np.abs(reference)))
