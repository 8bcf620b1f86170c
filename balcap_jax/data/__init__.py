"""Data sets behind one form: examples with id, image, prompt, reference, reference_units and, for SFT, captions.

Beside these an example may have `scene`, `questions` and `rubrics`, as JSON text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from balcap_jax.data import photos
from balcap_jax.data.in_place import CaptionedPictures
from balcap_jax.data.input import Data, Kept, fetch
from balcap_jax.data.scenes import builder as scenes
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer

# A training split whose pictures fill no more bytes stays in memory as it is read.
# To decode a picture again takes half as long as to learn from it.
KEPT_BYTES = 1 << 29


def load(config: Mapping[str, Any], image_size: int, *, tokenizer: bool = True, needs: Sequence[str] = ()) -> Data:
    """Opens the data set of the config group `data`, and makes it first if it is made on this machine.

    `tokenizer` False leaves out that of photographs, which has to be made from their captions. `needs` are fields that
    the reward reads: that photographs lack one is said before any of them is opened.

    Raises:
      UserError: the data cannot be made or read.
    """
    name = config.get("name", "scenes")
    if name != "scenes":
        builder = CaptionedPictures(config, needs)
        data = builder.data._replace(**builder.as_data_source())
        return data._replace(tokenizer=photos.caption_tokenizer(data.train)) if tokenizer else data
    built = scenes.prepare(config["data_dir"], **_settings(config, image_size))
    train, *held_out = (built.as_data_source(split) for split in ("train", "validation", "test"))
    if len(train) * 3 * image_size**2 <= KEPT_BYTES:
        train = Kept(train)
    return Data(train, *held_out, fields=frozenset(built.info.features), tokenizer=scenes_tokenizer())


def to_be_made(config: Mapping[str, Any], image_size: int) -> Path | None:
    """Where `load` will make the data set of the group `data`; None where it is there, or is none that is made.

    From a bucket it is fetched. Raises UserError where that refuses.
    """
    if config["name"] != "scenes":
        return None
    folder = scenes.folder_of(config["data_dir"], **_settings(config, image_size))
    fetch(folder.parent)
    return None if folder.exists() else folder


def _settings(config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Those of the scenes' builder."""
    names = {"train": "train_size", "validation": "validation_size", "test": "test_size"}
    named = {name: config[field] for name, field in names.items()}
    same = {name: config[name] for name in ("captions_per_image", "seed", "captioner")}
    return named | same | {"image_size": image_size}
