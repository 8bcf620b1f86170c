"""The fields of a model (config group `model`) as a file gives them, checked against the schema of configurations."""

import math
from collections.abc import Mapping
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.config.schema import FIELDS, RUN_FIELDS, Model, validated

DEFAULTS = Model().model_dump(exclude={"path", "decoder_path"})

LATER = ("attention",)
"""Fields that models of earlier versions do not name; they were what the default is."""

OWN = (*RUN_FIELDS, "keep_unused", "qkv_bias", "prompt", "max_tokens")
"""What a directory says of a model beside the files of transformers, which have no place for it."""

# Models of one family do without these of the other; a family that needs one says that it is missing.
_MAY_LACK = {
    *(*LATER, "vocab", "keep_unused", "qkv_bias", "mrope_section", "window_size", "full_attention_layers"),
    *("vision_positions", "deepstack_layers"),
    *("min_image_tokens", "max_image_tokens", "max_aspect", "wide_images"),
}


def check(fields: Mapping[str, Any], what: str, remedy: str) -> None:
    """Checks names, types, ranges and what the fields demand of each other.

    Three fields may stand beside those of the config group: "vision_norm_eps", where the tower has another epsilon than
    the decoder, "prompt", what the model was trained to answer, and "max_tokens", the longest answer that it learned.

    Raises:
      UserError: one line that begins with `what`, names the field and ends in `remedy`.
    """
    missing = [name for name in DEFAULTS if name not in fields and name not in _MAY_LACK]
    if missing:
        raise UserError(f"{what} lacks the field {missing[0]!r}; {remedy}")
    if groups := [name for name, value in fields.items() if isinstance(value, Mapping)]:
        raise UserError(f"{what}: the field {groups[0]!r} is an object, not one value; {remedy}")
    if huge := [name for name, value in fields.items() if type(value) is int and not json_text.is_number(value)]:
        raise UserError(f"{what}: the field {huge[0]!r} is an integer that no float holds; {remedy}")
    try:
        validated(Model, {name: fields.get(name, default) for name, default in DEFAULTS.items()}, "model.")
    except UserError as error:
        raise UserError(f"{what}: {error}; {remedy}") from error
    epsilon = fields.get("vision_norm_eps", 1.0)
    if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
        raise UserError(f"{what}: the field 'vision_norm_eps' must be a number > 0, got {epsilon!r}; {remedy}")
    if not isinstance(fields.get("prompt", ""), str):
        raise UserError(f"{what}: the field 'prompt' must be a string, got {fields['prompt']!r}; {remedy}")
    longest = FIELDS["rollout.max_tokens"]
    if "max_tokens" in fields and not (type(fields["max_tokens"]) is int and longest.holds(fields["max_tokens"])):
        raise UserError(
            f"{what}: the field 'max_tokens' must be an integer in {longest.range_text}, got {fields['max_tokens']!r}; "
            f"{remedy}"
        )
