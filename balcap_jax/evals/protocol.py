"""How captions were made, as far as their scores hang on it: what `evaluate` records and `compare` holds against each
other.

A longer caption, another question or rounding of another type moves scores as training does. So two files of captions
are a comparison of their models only where all of this is alike.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.evals.inputs import Texts

_NAMES = ("model", "model_digest", "prompt", "max_tokens", "temperature", "dtype", "max_image_tokens")
_NAMES += ("top_p", "top_k", "samples", "keep", "seed")
# What decides, with the words for it.
DECIDING = {
    "prompt": "prompt",
    "own_prompts": "prompts of single pictures",
    "max_tokens": "token limit",
    "temperature": "temperature",
    "max_image_tokens": "image cap",
    "dtype": "compute type",
    "top_p": "top_p",
    "top_k": "top_k",
    "samples": "samples a picture",
}
# Greedy captions have no settings of sampling, and some families no image cap: that is no difference by itself.
_WHERE_BOTH = ("max_image_tokens", "top_p", "top_k")
_DEFAULTS = {"samples": 1}


def made(settings: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    """What F.settings.json says of the captions F (`texts`), and a digest of the prompts of single pictures."""
    found = {name: settings[name] for name in _NAMES if name in settings}
    if texts.prompts:
        content = json_text.dumps(sorted(texts.prompts.items()))
        found["own_prompts"] = f"{len(texts.prompts)}, digest {hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{words: values} of what decides and differs; nothing where either is unknown (empty)."""
    if not one or not other:
        return {}
    found = {}
    for name, words in DECIDING.items():
        values = tuple(made.get(name, _DEFAULTS.get(name)) for made in (one, other))
        if values[0] != values[1] and not (name in _WHERE_BOTH and None in values):
            found[words] = values
    return found
