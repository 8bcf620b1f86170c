"""The TFDS builder of captioned pictures that are read where they lie, whatever they lie in.

    builder = CaptionedPictures({"name": "parquet", "data_dir": "data/train-*.parquet", ...})
    builder.info.splits["train"].num_examples
    builder.as_data_source("train")[0]["reference"]

Folders, JSONL files (those of `recaption` too), the JSON of ShareGPT4V and parquet files come in through it alone, and
are split by one rule (`photos.partition`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.data import photos, picture_index, sharegpt4v
from balcap_jax.data.input import BuiltHereInfo, Data

SPLITS = ("train", "validation", "test")


def _parquet(config: Mapping[str, Any], needs: Sequence[str]) -> Data:
    from balcap_jax.data import parquet  # pyarrow takes time to import, and few need it.

    return parquet.load(config, needs)


FORMS: dict[str, Callable[[Mapping[str, Any], Sequence[str]], Data]] = {
    "photos": photos.load,
    "sharegpt4v": sharegpt4v.load,
    "parquet": _parquet,
}


class CaptionedPictures(tfds.core.DatasetBuilder):
    """Pictures with captions, prompt and what rewards read; `data` has the fields and what was left out beside them.

    `config` is the config group `data`, and `needs` are fields that the reward reads.

    Raises:
      UserError: there are none, or they cannot be read.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict] = {}  # no download, no checksums
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name=name, description=f"captioned pictures in the form {name}") for name in FORMS
    ]

    def __init__(self, config: Mapping[str, Any], needs: Sequence[str] = ()):
        self.data = FORMS[config["name"]](config, needs)
        # TFDS asks for the place of a prepared copy. There is none: nothing is ever written there.
        super().__init__(data_dir=resolved(picture_index.CACHE) / "in_place", config=config["name"])
        lengths = [(name, len(getattr(self.data, name))) for name in SPLITS]
        infos = [tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0) for name, length in lengths]
        self.info.set_splits(tfds.core.SplitDict(infos))

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        features = {"id": text, "image": tfds.features.Image(), "prompt": text, "reference": text}
        features |= {"captions": texts, "reference_units": texts, "questions": text, "rubrics": text}
        return BuiltHereInfo(builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=None)

    def download_and_prepare(self, **_: Any) -> None:
        """Does nothing: the pictures stay where they are."""

    def as_data_source(self, split: str | None = None, **_: Any) -> Any:
        """The random-access source of a split, or of all by name; text is `str`, and pictures have their own sizes."""
        return {name: getattr(self.data, name) for name in SPLITS} if split is None else getattr(self.data, split)

    def as_dataset(self, *_: Any, **__: Any) -> None:
        """Raises UserError: a tf.data.Dataset needs TensorFlow."""
        raise UserError("captioned pictures are read with as_data_source, which needs no TensorFlow")

    _download_and_prepare, _as_dataset = download_and_prepare, as_dataset
