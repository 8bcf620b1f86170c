"""Data sets behind one form: examples with id, image, prompt, reference, reference_units and, for SFT, captions.

Beside these an example may have `scene`, `questions` and `rubrics`, as JSON text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from balcap_jax.data import photos, sharegpt4v
from balcap_jax.data.photos import LeftOut
from balcap_jax.data.scenes import builder as scenes
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer


class Data(NamedTuple):
    """Random-access sources of dict examples, and the tokenizer of a model trained from scratch on them.

    fields: those in which at least one example has something. left_out: pictures that are missing or damaged.
    """

    train: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    fields: frozenset[str]
    left_out: Sequence[LeftOut] = ()


def load(config: Mapping[str, Any], image_size: int, *, tokenizer: bool = True) -> Data:
    """Opens the data set of the config group `data`, making it first if it is made on this machine.

    `tokenizer` False leaves out that of photographs, which has to be made from their captions.

    Raises:
      UserError: the data cannot be made or read.
    """
    name = config.get("name", "scenes")
    if name == "photos":
        return _of_photos(photos.load(config), tokenizer)
    if name == "sharegpt4v":
        return _of_photos(sharegpt4v.load(config), tokenizer)
    built = scenes.prepare(
        config["data_dir"],
        train=config["train_size"],
        validation=config["validation_size"],
        test=config["test_size"],
        image_size=image_size,
        captions_per_image=config["captions_per_image"],
        seed=config["seed"],
    )
    splits = (built.as_data_source(split) for split in ("train", "validation", "test"))
    return Data(*splits, tokenizer=scenes_tokenizer(), fields=frozenset(built.info.features))


def _of_photos(splits: photos.Splits, tokenizer: bool) -> Data:
    made = photos.caption_tokenizer(splits.train) if tokenizer else None
    return Data(splits.train, splits.validation, splits.test, made, splits.fields, splits.left_out)
