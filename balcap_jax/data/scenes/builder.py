"""The embedded data set `scenes` as a TFDS builder, generated on this machine and read without TensorFlow."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import make_directory, resolved
from balcap_jax.data import input, spread
from balcap_jax.data.scenes import captioner, faults, habits, language, moods, questions, render, rubrics, world

PROMPT = "Describe the picture."
# The ranges of seeds from which the splits draw their scenes cannot meet: each is far longer than any split. The data
# set of another seed begins behind them all.
FIRST_SEED = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}
SEEDS_OF_A_DATA_SET = 3_000_000_000
# Streams of random numbers of one scene, apart from each other, so that one more question changes no caption.
_REFERENCE, _CAPTIONS, _QUESTIONS = 1, 2, 3
_WORTH_A_PROCESS = 1000  # examples: to start Python takes as long as to make half of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesSettings:
    """Everything that the examples depend on, apart from the code. `image_size` in pixels, splits in examples.

    `captioner`, one of `moods.CAPTIONERS`, writes the captions that are not references.

    Data sets of two values of `seed` have no scene in common, whichever the splits.
    """

    train: int = 4096
    validation: int = 256
    test: int = 256
    image_size: int = 96
    captions_per_image: int = 4
    questions_per_image: int = 5
    seed: int = 0
    captioner: str = "habits"

    def __post_init__(self):
        if self.captioner not in moods.CAPTIONERS:
            raise UserError(f"scenes: captioner must be one of {', '.join(moods.CAPTIONERS)}, not {self.captioner!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "captioner":
                continue
            least = {"image_size": 24, "captions_per_image": 0, "questions_per_image": 0, "seed": 0}.get(field.name, 1)
            if not isinstance(value, int) or value < least:
                raise UserError(f"scenes: {field.name} must be an integer of at least {least}, not {value!r}")
            if field.name in FIRST_SEED and value > 1_000_000_000:
                raise UserError(f"scenes: {field.name} can have at most 1000000000 examples, not {value}")

    @property
    def name(self) -> str:
        """The directory name: every setting, and a digest of the code that makes the examples."""
        return (
            f"{self.image_size}px-{self.train}-{self.validation}-{self.test}"
            f"-{self.captions_per_image}c-{self.questions_per_image}q-s{self.seed}-{self.captioner}-{code_digest()}"
        )


@functools.cache
def code_digest() -> str:
    """Eight hex digits over the source of the generating modules: changed code never meets data of the old."""
    digest = hashlib.sha256()
    for module in (
        world,
        language,
        faults,
        habits,
        moods,
        captioner,
        questions,
        rubrics,
        render,
        sys.modules[__name__],
    ):
        digest.update(pathlib.Path(module.__file__).read_bytes())
    return digest.hexdigest()[:8]


@dataclasses.dataclass(kw_only=True)
class ScenesConfig(tfds.core.BuilderConfig):
    settings: ScenesSettings = dataclasses.field(default_factory=ScenesSettings)


def make_config(**settings: int | str) -> ScenesConfig:
    """A builder config from fields of `ScenesSettings`; raises UserError on a value out of range."""
    chosen = ScenesSettings(**settings)
    return ScenesConfig(name=chosen.name, description="Rendered scenes of a few objects.", settings=chosen)


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Rendered scenes with reference captions, faulty captions, reference units, questions and rubrics."""

    VERSION = tfds.core.Version("1.0.0")
    # No download, no checksums; to look for some, TFDS would need importlib_resources, which it does not install.
    url_infos: ClassVar[dict] = {}
    BUILDER_CONFIGS: ClassVar[list[ScenesConfig]] = [make_config()]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.settings.image_size
        text, image = tfds.features.Text(), tfds.features.Image(shape=(size, size, 3), encoding_format="png")
        features = tfds.features.FeaturesDict(
            {"id": text, "image": image, "scene": text, "prompt": text, "reference": text}
            | dict.fromkeys(("reference_units", "captions"), tfds.features.Sequence(text))
            | {"questions": text, "rubrics": text}
        )
        # Stored in the order of generation, so that "the first n of the test split" means the same everywhere.
        return input.BuiltHereInfo(builder=self, features=features, disable_shuffling=True, supervised_keys=None)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        settings = self.builder_config.settings
        return {split: self._generate_examples(split, getattr(settings, split)) for split in FIRST_SEED}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        arguments = [(split, index, self.builder_config.settings) for index in range(count)]
        processes = min(spread.processors(), count // _WORTH_A_PROCESS)
        if processes > 1:
            yield from enumerate(spread.spread(make_example, arguments, processes))
        else:
            yield from enumerate(itertools.starmap(make_example, arguments))


def make_example(split: str, index: int, settings: ScenesSettings) -> dict:
    """Example `index` of `split`; the image is an encoded PNG in a file object, which TFDS stores as it is."""
    seed = settings.seed * SEEDS_OF_A_DATA_SET + FIRST_SEED[split] + index
    scene = world.sample_scene(seed)
    streams = {stream: np.random.default_rng([0xCA9710, stream, seed]) for stream in range(1, 4)}
    return {
        "id": f"scenes-{split}-{index:06d}",
        "image": _png(render.render(scene, settings.image_size)),
        "scene": scene.to_json(),
        "prompt": PROMPT,
        "reference": language.reference_caption(scene, streams[_REFERENCE]),
        "reference_units": list(language.reference_units(scene)),
        "captions": [
            captioner.base_caption(scene, streams[_CAPTIONS], settings.captioner)
            for _ in range(settings.captions_per_image)
        ],
        "questions": json.dumps(questions.questions(scene, streams[_QUESTIONS], settings.questions_per_image)),
        "rubrics": json.dumps(rubrics.rubrics(scene)),
    }


def _png(picture: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    # Level 3: two thirds of the default level's time for 7% more bytes.
    Image.fromarray(picture).save(file, format="PNG", compress_level=3)
    file.seek(0)
    return file


def folder_of(data_dir: str | os.PathLike, **settings: int | str) -> pathlib.Path:
    """Where `prepare` makes the data set; raises UserError on a value out of range."""
    return resolved(data_dir) / Scenes.name / make_config(**settings).name / str(Scenes.VERSION)


def prepare(data_dir: str | os.PathLike, **settings: int | str) -> Scenes:
    """Generates the data set under `data_dir` unless it is there, and returns its builder.

    `settings` are the fields of `ScenesSettings`; other settings, or other code, get a directory of their own. TFDS
    writes aside and renames, so nothing of a preparation that was killed is ever read. Read a split with
    `builder.as_data_source("train")`. From a bucket it is fetched, each file with its checksum, and what is made here
    is sent there.

    Raises:
      UserError: a setting is out of range, the disk cannot be written or is full, or the data set is damaged.
    """
    config = make_config(**settings)
    config = Scenes.builder_configs.get(config.name, config)  # TFDS wants its own object for the default settings
    data_dir = resolved(data_dir)
    with _preparing(data_dir):
        # TFDS reports a missing or read-only place in many lines, some of them after the work is done.
        make_directory(data_dir)
        input.fetch(data_dir / Scenes.name / config.name)
        builder = input.open_builder(Scenes, data_dir, config)
        if builder.is_prepared():
            return builder
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    total = sum(getattr(config.settings, split) for split in FIRST_SEED)
    print(shown(f"scenes: generating {total} examples in {builder.data_dir}"), flush=True)
    start = time.perf_counter()
    with _preparing(data_dir):
        try:
            input.prepare(builder)
        except OSError:
            # Another process may have finished the same directory in the meantime; its result is as good as ours.
            builder = Scenes(data_dir=data_dir, config=config)
            if not builder.is_prepared():
                raise
    print(f"scenes: {total} examples in {time.perf_counter() - start:.1f} s", flush=True)
    return builder


@contextlib.contextmanager
def _preparing(data_dir: pathlib.Path) -> Iterator[None]:
    """Raises UserError for what the disk of `data_dir` refuses."""
    try:
        yield
        return
    except OSError as error:
        reason = error.strerror or str(error)
    except RuntimeError as error:
        # ArrayRecord is C++: a full disk comes as "... write() failed: No space left on device; writing /path...".
        failure = re.search(r"(?:write|open)\(\) failed: ([^;]+)", str(error))
        if not failure:
            raise
        reason = failure[1]
    raise UserError(f"cannot prepare the data set scenes in {data_dir}: {reason}; choose another data dir")
