"""Configurations of Hugging Face checkpoints: the parts that all families share, from there and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

INSTRUCTION_TOKENS = 128  # room for the instruction and the template's words in the default of prompt_tokens

# Our fields of the decoder and those of `text_config`.
_DECODER_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "vocab": "vocab_size",
}


def decoder_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the decoder in a complete config.json of any family. Raises ValueError or KeyError."""
    text = config["text_config"]
    require(text["rope_parameters"], rope_type="default")
    require_sizes(text, "hidden_size", "num_attention_heads")
    return {
        **{name: text[theirs] for name, theirs in _DECODER_FIELDS.items()},
        "head_size": text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        "rope_theta": float(text["rope_parameters"]["rope_theta"]),
        "tied_embeddings": bool(config["tie_word_embeddings"]),
    }


def require(config: Mapping[str, Any], **values: Any) -> None:
    """Raises ValueError that names the first entry with another value; a tuple lists several allowed ones."""
    for key, value in values.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if config.get(key) not in allowed:
            raise ValueError(f"{key} is {config.get(key)!r}, only {' or '.join(map(repr, allowed))} is built")


def require_sizes(config: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError that names the first entry that is no whole number above 0."""
    for name in names:
        if type(config.get(name)) is not int or config[name] < 1:
            raise ValueError(f"{name} is {config.get(name)!r}, it must be a whole number above 0")


def require_processor(processor: Mapping[str, Any], *, kind: str, mean: np.ndarray, std: np.ndarray) -> None:
    """Raises ValueError unless an image processor does what ours do; missing settings have the right defaults.

    The name of its class must begin with `kind`. `mean` and `std` [3] are those of the pixels.
    """
    name = processor.get("image_processor_type", kind)
    if not isinstance(name, str) or not name.startswith(kind):
        raise ValueError(f"image_processor_type is {name!r}, only {kind} is built")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        require(processor, **{step: (True, None)})
    require(processor, resample=(3, None), do_pad=(False, None))  # 3: bicubic
    for key, expected in (("rescale_factor", 1 / 255), ("image_mean", mean), ("image_std", std)):
        value = processor.get(key, expected)
        try:
            same = np.shape(value) == np.shape(expected) and np.allclose(value, expected, 1e-5, 0)
        except (TypeError, ValueError):  # no numbers
            same = False
        if not same:
            raise ValueError(f"{key} is {value!r}, only {', '.join(f'{x:.6g}' for x in np.ravel(expected))} is built")


def text_config(fields: Mapping[str, Any], ids: Mapping[str, int], **rope: Any) -> dict[str, Any]:
    """The part `text_config` that all families share; `rope` are further rotary parameters."""
    sizes = {**fields, "vocab": ids["vocab"]}
    # transformers 5 reads `rope_parameters`, 4 the older names: without them it takes a theta of 10000.
    older = {"rope_scaling": {"rope_type": "default", "type": "default", **rope}} if rope else {}
    return {
        "hidden_act": "silu",
        **{theirs: sizes[name] for name, theirs in _DECODER_FIELDS.items()},
        "rope_theta": fields["rope_theta"],
        **older,
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"], **rope},
        "tie_word_embeddings": fields["tied_embeddings"],
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }


def processor_settings(mean: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """The settings that `require_processor` requires, as in an image processor's file."""
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    pixels = {"image_mean": mean.tolist(), "image_std": std.tolist()}
    return {**steps, "resample": 3, "rescale_factor": 1 / 255, **pixels}
