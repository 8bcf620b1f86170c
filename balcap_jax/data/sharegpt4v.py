"""ShareGPT4V as a TFDS builder: its JSON and image roots lie in a manual directory, as its authors lay them out.

The JSON is a list of {"id", "image": "coco/train2017/000000000009.jpg", "conversations": [{"from": "human", "value":
"prompt\\n<image>"}, {"from": "gpt", "value": "caption"}]}; "images" with a list of one may stand for "image". Pictures
that are missing, or do not begin as pictures, are counted and named, and so are entries of text alone. What is built is
an index: the texts, and where pictures lie in the manual directory, which may be moved as a whole. Each sample keeps
its own prompt, and `reference_units`, `questions` and `rubrics` in the form of `data.photos`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.core.example_parser import tf_example_pb2

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import make_directory, open_regular, read_json, resolved
from balcap_jax.data import input, photos
from balcap_jax.data.input import Data, LeftOut
from balcap_jax.data.listing import RealPaths, picture_name
from balcap_jax.data.records import REWARDED, Record, nowhere, read_record

_NAMED = 100  # entries left out that are named in the data set's own metadata
_BLOCK = 1000  # samples that are read at a time
_REMEDY = "give ShareGPT4V's own JSON (data.annotations)"


@dataclasses.dataclass(kw_only=True)
class ShareGPT4VConfig(tfds.core.BuilderConfig):
    """`annotations`: name of the JSON in the manual directory."""

    annotations: str = "sharegpt4v_instruct_gpt4-vision_cap100k.json"


class Sharegpt4v(tfds.core.GeneratorBasedBuilder):
    """Pictures with GPT-4V's captions, in one split; the reader decides which part is for training."""

    VERSION = tfds.core.Version("3.0.0")  # Pictures stay where they are since 3.0.0; before, their bytes were in it.
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The JSON of ShareGPT4V and the folders of images that it names."
    url_infos: ClassVar[dict] = {}  # no download, no checksums
    BUILDER_CONFIGS: ClassVar[list[ShareGPT4VConfig]] = [ShareGPT4VConfig(name="cap100k", description="100K captions")]

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("id", "picture", "image", "prompt", "reference", *REWARDED)  # the last as JSON text
        return input.BuiltHereInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict.fromkeys(names, tfds.features.Text())),
            disable_shuffling=True,
            supervised_keys=None,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"samples": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
        """`image` is where a picture lies, relative to the manual directory; nothing here looks at it."""
        texts: list[LeftOut] = []
        ids: set[str] = set()
        pictures: dict[str, str] = {}
        real_path = RealPaths()
        annotations = folder / self.builder_config.annotations
        for number, entry in enumerate(read_annotations(annotations), start=1):
            if is_text_alone(entry):
                texts.append(LeftOut(f"entry {number}", "text alone"))
                continue
            sample = read_sample(entry, f"{annotations}, entry {number}", folder)
            sample["image"] = sample["id"]
            sample["picture"] = pictures.setdefault(real_path(folder / sample["image"]), sample["id"])
            while sample["id"] in ids:
                sample["id"] += f"#{number}"
            ids.add(sample["id"])
            yield number, sample
        if not ids:
            raise UserError(f"none of the pictures of {annotations} is in {folder}: all entries are text alone")
        metadata = {"texts": len(texts), "first_texts": [list(text) for text in texts[:_NAMED]]}
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
    record = read_record({"image": image, "reference": turns["gpt"], **rewarded}, where)
    units = json_text.dumps(record.pop("reference_units"))
    sample = {"id": name, "prompt": prompt, "reference": turns["gpt"].strip(), "reference_units": units}
    return sample | {name: record[name] for name in ("questions", "rubrics")}


def load(config: Mapping[str, Any], needs: Sequence[str] = ()) -> Data:
    """The splits of the data set in `data_dir`, built from `manual_dir` first where it is not there.

    Raises:
      UserError: the JSON is missing or no such JSON, no picture is there, the data set cannot be written or read, or
        as `photos.open_splits` does.
    """
    folder = resolved(config["manual_dir"]).absolute()
    storage.refuse(folder, "the folder of the pictures (data.manual_dir)")
    needed = () if config.get("units") else needs
    builder = prepare(config["data_dir"], config["manual_dir"], config["annotations"], needed)
    metadata = builder.info.metadata
    try:
        records = [_record(sample, folder) for sample in _samples(builder)]
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, DecodeError) as error:
        raise input.damaged(Path(builder.data_dir), " ".join(str(error).split())) from error
    if metadata.get("texts"):
        print(f"sharegpt4v: {metadata['texts']} entries of text alone are left out", flush=True)
    texts = [LeftOut(*named) for named in metadata.get("first_texts", [])]
    source, index = folder / config["annotations"], resolved(config["data_dir"]) / "sharegpt4v" / "pictures.json"
    storage.fetch(index)
    data = photos.open_splits("sharegpt4v", records, [], config, needs, folder=folder, source=source, index=index)
    if index.is_file():
        storage.send(index)
    return data._replace(left_out=(*data.left_out, *texts))


def _samples(builder: Sharegpt4v) -> Iterator[dict[str, str]]:
    """The stored samples. TFDS's own decoding of features takes ten times as long."""
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source("samples", deserialize_method=raw)
    for start in range(0, len(source), _BLOCK):
        for content in source.__getitems__(list(range(start, min(start + _BLOCK, len(source))))):
            features = tf_example_pb2.Example.FromString(content).features.feature
            yield {name: feature.bytes_list.value[0].decode() for name, feature in features.items()}


def _record(sample: Mapping[str, str], folder: Path) -> Record:
    return Record(
        id=sample["id"],
        path=f"{folder}/{sample['image']}",
        prompt=sample["prompt"],
        captions=(sample["reference"],),
        reference_units=tuple(json.loads(sample["reference_units"])),
        questions=sample["questions"],
        rubrics=sample["rubrics"],
        picture=sample["picture"],
    )


def prepare(data_dir: str, manual_dir: str, annotations: str, needs: Sequence[str] = ()) -> Sharegpt4v:
    """The builder of the prepared data set. Another JSON gets a directory of its own.

    Raises UserError as `load` does; where the JSON has nothing of what a reward `needs`, before anything is written.
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
        input.fetch(place / Sharegpt4v.name / digest)
        builder = input.open_builder(Sharegpt4v, place, config)
        if not builder.is_prepared():
            for field in (field for field in needs if field in REWARDED):
                entries = read_annotations(folder / annotations)
                if not any(isinstance(entry, Mapping) and entry.get(field) for entry in entries):
                    raise nowhere(field, "sharegpt4v", folder / annotations)
            make_directory(place)
            print(shown(f"sharegpt4v: indexing {folder / annotations} in {builder.data_dir}"), flush=True)
            input.prepare(builder, manual_dir=folder)
        return builder
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        remedy = "; set data.data_dir to a disk that can be written to" if isinstance(error, OSError) else ""
        raise UserError(f"cannot prepare the data set sharegpt4v in {place}: {reason}{remedy}") from error
