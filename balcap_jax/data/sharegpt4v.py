"""ShareGPT4V as a TFDS builder: its JSON and image roots lie in a manual directory, as its authors lay them out.

The JSON is a list of {"id", "image": "coco/train2017/000000000009.jpg", "conversations": [{"from": "human", "value":
"prompt\\n<image>"}, {"from": "gpt", "value": "caption"}]}; "images" with a list of one may stand for "image". Pictures
that are missing, or do not begin as pictures, are counted and named, and so are entries of text alone. Files are stored
as they are. Each sample keeps its own prompt, and `reference_units`, `questions` and `rubrics` in the form of
`data.photos`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import make_directory, open_regular, read_json, resolved
from balcap_jax.data import images, input, photos
from balcap_jax.data.input import Data, LeftOut
from balcap_jax.data.listing import picture_name, real_path
from balcap_jax.data.photos import Record

REWARDED = ("reference_units", "questions", "rubrics")  # stored as JSON text
_NAMED = 100  # pictures left out that are named in the data set's own metadata
_REMEDY = "give ShareGPT4V's own JSON (data.annotations)"


@dataclasses.dataclass(kw_only=True)
class ShareGPT4VConfig(tfds.core.BuilderConfig):
    """`annotations`: name of the JSON in the manual directory."""

    annotations: str = "sharegpt4v_instruct_gpt4-vision_cap100k.json"


class Sharegpt4v(tfds.core.GeneratorBasedBuilder):
    """Pictures with GPT-4V's captions, in one split; the reader decides which part is for training."""

    VERSION = tfds.core.Version("2.0.0")  # Samples name their picture since 2.0.0.
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The JSON of ShareGPT4V and the folders of images that it names."
    url_infos: ClassVar[dict] = {}  # no download, no checksums
    BUILDER_CONFIGS: ClassVar[list[ShareGPT4VConfig]] = [ShareGPT4VConfig(name="cap100k", description="100K captions")]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict(
            # `image` is a file as it is: our own reader decodes it, upright and in RGB, without TensorFlow.
            {"id": text, "picture": text, "image": tfds.features.Text(), "prompt": text, "reference": text}
            | dict.fromkeys(REWARDED, text)
        )
        return self.dataset_info_from_configs(
            features=features, disable_shuffling=True, supervised_keys=None, metadata=tfds.core.MetadataDict()
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"samples": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        missing: list[LeftOut] = []
        texts: list[LeftOut] = []
        ids: set[str] = set()
        pictures: dict[str, str] = {}
        annotations = folder / self.builder_config.annotations
        for number, entry in enumerate(read_annotations(annotations), start=1):
            if is_text_alone(entry):
                texts.append(LeftOut(f"entry {number}", "text alone"))
                continue
            sample = read_sample(entry, f"{annotations}, entry {number}", folder)
            path = folder / sample["id"]
            sample["picture"] = pictures.setdefault(real_path(path), sample["id"])
            while sample["id"] in ids:
                sample["id"] += f"#{number}"
            ids.add(sample["id"])
            try:
                images.check(path)
                content = path.read_bytes()
            except (images.ImageError, OSError) as error:
                missing.append(LeftOut(sample["id"], getattr(error, "strerror", None) or str(error)))
                continue
            yield number, sample | {"image": content}
        if len(missing) == len(ids):
            why = f"; the first, {missing[0].image}: {missing[0].reason}" if missing else ": all entries are text alone"
            raise UserError(f"none of the pictures of {annotations} is in {folder}{why}; set data.manual_dir")
        metadata = {"left_out": len(missing) + len(texts), "texts": len(texts)}
        metadata["first_left_out"] = [list(left_out) for left_out in [*missing, *texts][:_NAMED]]
        self.info.metadata.update(metadata)


def read_annotations(path: Path) -> list[Any]:
    try:
        entries = read_json(path, _REMEDY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no {path.name} in {path.parent}; put ShareGPT4V's JSON there, or set data.manual_dir"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list of samples; {_REMEDY}")
    return entries


def is_text_alone(entry: Any) -> bool:
    """Whether an entry is a conversation about no picture, as many of the LLaVA instructions are."""
    is_sample = isinstance(entry, Mapping) and isinstance(entry.get("conversations"), list)
    return is_sample and _picture(entry) in (None, "", [])


def _picture(entry: Mapping[str, Any]) -> Any:
    """The field "image" of an entry; other writers of this form list one picture in "images"."""
    if (image := entry.get("image")) not in (None, ""):
        return image
    images = entry.get("images")
    return images[0] if isinstance(images, list) and len(images) == 1 else images


def read_sample(entry: Any, where: str, folder: Path = Path()) -> dict[str, str]:
    """{"id": the image's path, "prompt", "reference"} of an entry; its image tag may be before or behind the prompt.

    The sample also has `reference_units`, `questions` and `rubrics`, as JSON text, "[]" where the entry has none. Paths
    are relative to `folder`.

    Raises:
      UserError: it is no sample of a picture, a question and an answer, or one of its fields is of another form.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("conversations"), list):
        raise UserError(f'{where} is no sample: an object with "image" and a list "conversations"; {_REMEDY}')
    turns: dict[str, str] = {}  # the first of each speaker
    for turn in entry["conversations"]:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(name), str) for name in ("from", "value")):
            raise UserError(f'{where}: "conversations" must be a list of {{"from": text, "value": text}}; {_REMEDY}')
        turns.setdefault(turn["from"], turn["value"])
    image = _picture(entry)
    if not isinstance(image, str):
        raise UserError(f'{where}: "image" must be text, the path of one picture; {_REMEDY}')
    if not image or not turns.get("gpt", "").strip() or "human" not in turns:
        raise UserError(f"{where} is no sample with an image, a question of human and an answer of gpt; {_REMEDY}")
    name = picture_name(folder, image)
    if Path(name).parts[:1] == ("..",):
        raise UserError(f"{where} names an image outside the manual directory ({image!r}); {_REMEDY}")
    prompt = turns["human"].replace("<image>", "").strip() or photos.PROMPT
    rewarded = {name: entry[name] for name in REWARDED if name in entry}
    record = photos.read_record({"image": image, "reference": turns["gpt"], **rewarded}, where)
    units = json_text.dumps(record.pop("reference_units"))
    sample = {"id": name, "prompt": prompt, "reference": turns["gpt"].strip(), "reference_units": units}
    return sample | {name: record[name] for name in ("questions", "rubrics")}


def load(config: Mapping[str, Any]) -> Data:
    """The splits of the data set in `data_dir`, built from `manual_dir` first where it is not there.

    Raises:
      UserError: the JSON is missing or no such JSON, no picture is there, or the data set cannot be written or read.
    """
    builder = prepare(config["data_dir"], config["manual_dir"], config["annotations"])
    source = builder.as_data_source("samples")
    metadata = builder.info.metadata
    left_out = [LeftOut(*named) for named in metadata.get("first_left_out", [])]
    # Texts stay in memory, pictures do not: half a kilobyte a sample.
    records = []
    for index, sample in enumerate(source):
        texts = input.decode([sample[name] for name in ("id", "prompt", "reference", *REWARDED, "picture")])
        name, prompt, reference, units, *others = texts
        content = functools.partial(lambda index: source[index]["image"], index)
        records.append(Record(name, content, prompt, (reference,), tuple(json.loads(units)), *others))
    photos.announce("sharegpt4v", records, left_out, metadata.get("left_out", 0))
    if metadata.get("texts"):
        print(f"sharegpt4v: {metadata['texts']} entries of text alone are left out", flush=True)
    return photos.make_splits(records, left_out, config)


def prepare(data_dir: str, manual_dir: str, annotations: str) -> Sharegpt4v:
    """The builder of the prepared data set. Another JSON gets a directory of its own.

    Raises UserError as `load` does.
    """
    folder = resolved(manual_dir).absolute()
    try:
        with open_regular(folder / annotations) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except (OSError, ValueError) as error:  # ValueError: a name with a character 0
        raise UserError(
            f"no {annotations} in {folder} ({getattr(error, 'strerror', error)}); put ShareGPT4V's JSON there, or set "
            "data.manual_dir and data.annotations"
        ) from error
    config = ShareGPT4VConfig(name=digest, description=annotations, annotations=annotations)
    place = resolved(data_dir)
    try:
        make_directory(place)
        builder = input.open_builder(Sharegpt4v, place, config)
        if not builder.is_prepared():
            print(f"sharegpt4v: building from {folder} in {builder.data_dir}", flush=True)
            input.prepare(builder, manual_dir=folder)
        return builder
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot prepare the data set sharegpt4v in {place}: {' '.join(str(error).split())}") from error
