"""Data sets behind one form: examples with id, image, prompt, reference, reference_units and, for SFT, captions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from balcap_jax.data.scenes import builder as scenes
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer


class Data(NamedTuple):
    """Random-access sources of dict examples, and the tokenizer of a model trained from scratch on them."""

    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]
    tokenizer: PreTrainedTokenizerBase


def load(config: Mapping[str, Any], image_size: int) -> Data:
    """Opens the data set of the config group `data`, making it first if it is made on this machine.

    Raises:
      UserError: the data cannot be made or read.
    """
    built = scenes.prepare(
        config["data_dir"],
        train=config["train_size"],
        validation=config["validation_size"],
        test=config["test_size"],
        image_size=image_size,
        captions_per_image=config["captions_per_image"],
    )
    splits = (built.as_data_source(split) for split in ("train", "validation", "test"))
    return Data(*splits, tokenizer=scenes_tokenizer())
