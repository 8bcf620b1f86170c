"""ShareGPT4V as a TFDS builder: its JSON and image roots lie in a manual directory, as its authors lay them out.

The JSON is a list of {"id", "image": "coco/train2017/000000000009.jpg", "conversations": [{"from": "human", "value":
"prompt\\n<image>"}, {"from": "gpt", "value": "caption"}]}. Pictures that are missing, or do not begin as pictures, are
counted and named. Their files are stored as they are; each sample keeps its own prompt, and what an entry holds for
rewards in the form of `data.photos`: `reference_units`, `questions`, `rubrics`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from balcap_jax import json_text
from balcap_jax.data import fields, images, photos, prepared
from balcap_jax.data.photos import LeftOut, Record, Splits
from balcap_jax.errors import UserError

REWARDED = ("reference_units", "questions", "rubrics")  # stored as JSON text
_NAMED = 100  # pictures left out that are named in the data set's own metadata
_REMEDY = "give ShareGPT4V's own JSON (data.annotations)"


@dataclasses.dataclass(kw_only=True)
class ShareGPT4VConfig(tfds.core.BuilderConfig):
    """`annotations`: name of the JSON in the manual directory."""

    annotations: str = "sharegpt4v_instruct_gpt4-vision_cap100k.json"


class Sharegpt4v(tfds.core.GeneratorBasedBuilder):
    """Pictures with GPT-4V's captions, in one split: which part is for training is decided when it is read."""

    VERSION = tfds.core.Version("1.1.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The JSON of ShareGPT4V and the folders of images that it names."
    url_infos: ClassVar[dict] = {}  # no download, no checksums
    BUILDER_CONFIGS: ClassVar[list[ShareGPT4VConfig]] = [ShareGPT4VConfig(name="cap100k", description="100K captions")]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict(
            # A file as it is: readers of our own decode it, upright and in RGB, without TensorFlow.
            {"id": text, "image": tfds.features.Text(), "prompt": text, "reference": text}
            | dict.fromkeys(REWARDED, text)
        )
        return self.dataset_info_from_configs(
            features=features, disable_shuffling=True, supervised_keys=None, metadata=tfds.core.MetadataDict()
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"samples": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        left_out: list[LeftOut] = []
        seen: set[str] = set()
        for number, entry in enumerate(read_annotations(folder / self.builder_config.annotations), start=1):
            sample = read_sample(entry, f"{folder / self.builder_config.annotations}, entry {number}")
            if sample["id"] in seen:
                sample["id"] = f"{sample['id']}#{number}"
            seen.add(sample["id"])
            path = folder / sample["id"].partition("#")[0]
            try:
                images.check(path)
                content = path.read_bytes()
            except (images.ImageError, OSError) as error:
                left_out.append(LeftOut(sample["id"], getattr(error, "strerror", None) or str(error)))
                continue
            yield number, sample | {"image": content}
        self.info.metadata["left_out"] = len(left_out)
        self.info.metadata["first_left_out"] = [list(one) for one in left_out[:_NAMED]]


def read_annotations(path: Path) -> list[Any]:
    try:
        entries = json_text.read(path, _REMEDY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no {path.name} in {path.parent}; put ShareGPT4V's JSON there, or set data.manual_dir"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list of samples; {_REMEDY}")
    return entries


def read_sample(entry: Any, where: str) -> dict[str, str]:
    """{"id": the image's path, "prompt", "reference"} of an entry; its image tag may stand before or after the prompt.

    Beside these `reference_units`, `questions` and `rubrics`, as JSON text, "[]" where the entry has none.

    Raises:
      UserError: it is no sample of a picture, a question and an answer, or what is for rewards is of another form.
    """
    turns = entry.get("conversations") if isinstance(entry, Mapping) else None
    said = {}
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, Mapping) and isinstance(turn.get("value"), str):
            said.setdefault(turn.get("from"), turn["value"])
    image = entry.get("image") if isinstance(entry, Mapping) else None
    if not isinstance(image, str) or not image or not said.get("gpt", "").strip() or "human" not in said:
        raise UserError(f"{where} is no sample with an image, a question of human and an answer of gpt; {_REMEDY}")
    if Path(image).is_absolute() or ".." in Path(image).parts:
        raise UserError(f"{where} names an image outside the manual directory ({image!r}); {_REMEDY}")
    prompt = said["human"].replace("<image>", "").strip() or photos.PROMPT
    rewarded = {name: entry[name] for name in REWARDED if name in entry}
    record = fields.read_record({"image": image, "reference": said["gpt"], **rewarded}, where)
    units = json.dumps(record.pop("reference_units"))
    sample = {"id": image, "prompt": prompt, "reference": said["gpt"].strip(), "reference_units": units}
    return sample | {name: record[name] for name in ("questions", "rubrics")}


def load(config: Mapping[str, Any]) -> Splits:
    """The splits of the data set in `data_dir`, built from `manual_dir` first where it is not there.

    Raises:
      UserError: the JSON is missing or no such JSON, no picture is there, or the data set cannot be written or read.
    """
    builder = prepare(config["data_dir"], config["manual_dir"], config["annotations"])
    source = builder.as_data_source("samples")
    count = builder.info.metadata.get("left_out", 0)
    left_out = [LeftOut(*one) for one in builder.info.metadata.get("first_left_out", [])]
    photos.announce("sharegpt4v", len(source), left_out)
    if count > len(left_out):
        print(f"sharegpt4v: {count} pictures are left out in all", flush=True)
    if not len(source):
        raise UserError(f"none of the pictures of {config['annotations']} is in {config['manual_dir']}")
    # Texts are held, pictures are not: half a kilobyte a sample.
    texts = _texts(source)
    records = [
        Record(name, functools.partial(_content, source, i), prompt, (reference,), tuple(json.loads(units)), *rest)
        for i, (name, prompt, reference, units, *rest) in enumerate(texts)
    ]
    return photos.make_splits(records, left_out, config)


def _texts(source: Any) -> list[tuple[str, ...]]:
    return [tuple(_text(one[field]) for field in ("id", "prompt", "reference", *REWARDED)) for one in source]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _content(source: Any, index: int) -> bytes:
    return source[index]["image"]


def prepare(data_dir: str, manual_dir: str, annotations: str) -> Sharegpt4v:
    """The builder of the prepared data set. Another JSON gets a directory of its own.

    Raises UserError as `load` does.
    """
    folder = Path(manual_dir).expanduser().absolute()
    try:
        with (folder / annotations).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UserError(
            f"no {annotations} in {folder} ({error.strerror}); put ShareGPT4V's JSON there, or set data.manual_dir and "
            "data.annotations"
        ) from error
    config = ShareGPT4VConfig(name=digest, description=annotations, annotations=annotations)
    place = Path(data_dir).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        builder = prepared.open_builder(Sharegpt4v, place, config)
        if not builder.is_prepared():
            print(f"sharegpt4v: building from {folder} in {builder.data_dir}", flush=True)
            with contextlib.redirect_stdout(io.StringIO()):
                if not sys.stderr.isatty():
                    tfds.disable_progress_bar()
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False),
                    file_format=tfds.core.FileFormat.ARRAY_RECORD,
                )
        return builder
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot prepare the data set sharegpt4v in {place}: {' '.join(str(error).split())}") from error
