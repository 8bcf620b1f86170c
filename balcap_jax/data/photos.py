"""Photographs and their captions from a folder or a JSONL file, as random-access splits.

A folder holds pictures with their captions beside them (`a/b.jpg`, `a/b.txt`), or a file `captions.jsonl`; a JSONL file
holds lines such as

    {"image": "a/b.jpg", "caption": "...", "prompt": "...", "reference_units": ["..."],
     "questions": [...], "rubrics": [...]}

of which `image` (relative to the file) and `caption`, or `captions`, are needed. The first caption is the reference.
"""

import dataclasses
import hashlib
import itertools
import statistics
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
import transformers
from PIL import Image

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes, resolved
from balcap_jax.data import images
from balcap_jax.data.choices import MAX_OPTIONS, lettered
from balcap_jax.data.input import Data, LeftOut
from balcap_jax.data.listing import files_below, lines_of, picture_name, real_path, spelt
from balcap_jax.data.scenes.tokenizer import SPECIAL_TOKENS, UNK, fast_tokenizer

PROMPT = "Describe this image in detail."
_LONGEST_CAPTION = 1 << 20  # bytes
CAPTIONS = "captions.jsonl"
_NAMED = 5  # pictures that a message names
_VOCABULARY = 2048
_LARGEST_WEIGHT = 1000.0  # of a criterion
_SPECIAL = (*SPECIAL_TOKENS, "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
_EMPTY = ("", (), "[]")  # what a field holds that a picture does not have


@dataclasses.dataclass(frozen=True)
class Record:
    """A picture with its texts; `questions` and `rubrics` are JSON text. `open` returns what `images.read` takes.

    `picture` names the picture of several records, each with an id of its own; "" where the id is the name.
    """

    id: str
    open: Callable[[], Any] | Path
    prompt: str
    captions: tuple[str, ...]
    reference_units: tuple[str, ...] = ()
    questions: str = "[]"
    rubrics: str = "[]"
    picture: str = ""

    @property
    def key(self) -> str:
        """The name that decides its split."""
        return self.picture or self.id


class Photos:
    """A split: `photos[i]` reads picture i, shrunk to at most `max_pixels` (0 = as it is), with its texts.

    The next picture that can be read takes the place of a damaged one, and a line on stderr names each damaged one
    once. Every example has the same number of `captions`: fewer are repeated, more are cut.
    """

    def __init__(self, records: Sequence[Record], captions: int, max_pixels: int):
        self.records, self.captions, self.max_pixels = records, captions, max_pixels
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Raises UserError when no picture of the split can be read."""
        start = index.__index__()
        for step in range(len(self.records)):
            at = (start + step) % len(self.records)
            if at in self._damaged:
                continue
            try:
                return self._example(self.records[at])
            except images.ImageError as error:
                self._leave_out(at, str(error))
        raise UserError(f"none of the {len(self.records)} pictures of a split can be read; the lines above say why")

    def _leave_out(self, at: int, reason: str) -> None:
        with self._lock:
            if at not in self._damaged:
                self._damaged.add(at)
                name = self.records[at].id
                print(f"left out: {name}: {reason}; another picture takes its place", file=sys.stderr, flush=True)

    def _example(self, record: Record) -> dict[str, Any]:
        picture = record.open if isinstance(record.open, Path) else record.open()
        return {
            "id": record.id,
            "image": shrunk(images.read(picture), self.max_pixels),
            "prompt": record.prompt,
            "reference": record.captions[0],
            "reference_units": list(record.reference_units),
            "captions": list(itertools.islice(itertools.cycle(record.captions), self.captions)),
            "questions": record.questions,
            "rubrics": record.rubrics,
        }


def shrunk(picture: np.ndarray, max_pixels: int) -> np.ndarray:
    """A picture [height, width, 3] with at most about `max_pixels` pixels and its own aspect; 0 = as it is."""
    height, width = picture.shape[:2]
    if not max_pixels or height * width <= max_pixels:
        return picture
    scale = (max_pixels / (height * width)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))


# ---- opening ---------------------------------------------------------------------------------------------------------


def load(config: Mapping[str, Any]) -> Data:
    """The splits of the folder or JSONL file `data_dir`.

    Raises:
      UserError: nothing there, a bad line, or no picture that can be read.
    """
    source = resolved(config["data_dir"])
    if source.is_dir() and not (source / CAPTIONS).is_file():
        records, left_out = _beside(source)
    elif source.is_file() or source.is_dir():
        records, left_out = _listed(source if source.is_file() else source / CAPTIONS), []
    else:
        raise UserError(f"config field 'data.data_dir': no such folder or file: {source}")
    records, unreadable = _readable(records)
    left_out = [*left_out, *unreadable]
    announce("photos", records, left_out)
    if not records:
        raise UserError(f"no picture with a caption in {source}; a caption of a.jpg is a.txt, or a line of {CAPTIONS}")
    return make_splits(records, left_out, config)


def make_splits(records: Sequence[Record], left_out: Sequence[LeftOut], config: Mapping[str, Any]) -> Data:
    """Splits by a hash of each picture's name: a picture stays in its split, whatever others are added.

    All records of a picture are in one split. Examples have as many captions as the median record.

    Raises:
      UserError: fewer than three pictures.
    """
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for key in (pictures := dict.fromkeys(record.key for record in records)):
        parts[split_of(key, config["validation_share"], config["test_share"])].append(key)
    if len(pictures) < 3:
        raise UserError(f"{len(pictures)} pictures are too few: training, validation and test need one each")
    for part in parts.values():  # A split of few pictures may be empty: the next by hash of the largest fills it.
        if not part:
            largest = max(parts.values(), key=len)
            part.append(largest.pop(min(range(len(largest)), key=lambda i: _position(largest[i]))))
    home = {key: name for name, part in parts.items() for key in part}
    counts = [len(record.captions) for record in records]
    count = statistics.median_high(counts)
    if min(counts) < max(counts):
        text = f"captions of a picture: {min(counts)} to {max(counts)}; {count} of each are used"
        print(f"{text}, repeated where there are fewer", flush=True)
    splits = (
        Photos([record for record in records if home[record.key] == name], count, config["max_pixels"])
        for name in parts
    )
    rewarded = ("reference_units", "questions", "rubrics")
    fields = {name for name in rewarded if any(getattr(record, name) not in _EMPTY for record in records)}
    return Data(*splits, frozenset({"reference", "captions"} | fields), tuple(left_out))


def split_of(name: str, validation: float, test: float) -> str:
    """The split of a picture's name, given the shares of validation and test."""
    position = _position(name)
    return "test" if position < test else "validation" if position < test + validation else "train"


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def announce(name: str, records: Sequence[Record], left_out: Sequence[LeftOut], count: int = 0) -> None:
    """Prints how many pictures there are, and which are left out: `count` of them if not all are in `left_out`."""
    pictures, count = len({record.key for record in records}), count or len(left_out)
    text = f"{name}: {pictures} pictures"
    if pictures < len(records):
        text += f" in {len(records)} entries"
    if count:
        named = ", ".join(f"{image} ({reason})" for image, reason in left_out[:_NAMED])
        more = f" and {count - _NAMED} more" if count > _NAMED else ""
        text += f"; {count} left out: {named}{more}"
    print(text, flush=True)


def _beside(folder: Path) -> tuple[list[Record], list[LeftOut]]:
    """Pictures below a folder, each with a caption in a .txt of the same stem."""
    records, left_out = [], []
    pictures: dict[str, str] = {}
    for name, problem in files_below(folder, "config field 'data.data_dir'"):
        path, caption = folder / name, ""
        try:
            if not problem:
                text = read_bytes(path.with_suffix(".txt"), _LONGEST_CAPTION)
                caption = text.decode("utf-8-sig").strip()
                name.encode()
                problem = "" if caption else "empty caption"
        except FileNotFoundError:
            problem = "no caption"
        except OSError as error:
            problem = f"its caption cannot be read: {error.strerror}"
        except UnicodeError:
            problem = "name or caption is not UTF-8"
        if problem:
            left_out.append(LeftOut(spelt(name), problem))
        else:
            picture = pictures.setdefault(real_path(path), name)
            records.append(Record(name, path, PROMPT, (caption,), picture=picture))
    return records, left_out


def _listed(source: Path) -> list[Record]:
    """The pictures of a JSONL file. Lines of one picture are joined: its captions, and the last of each other field."""
    records: dict[str, Record] = {}
    for number, line in lines_of(source):
        where = f"{source}, line {number}"
        fields = read_record(json_text.parse_object(line, where, "mend or remove that line"), where)
        path, captions = source.parent / fields["image"], fields.pop("captions")
        record = records.get(real := real_path(path))
        record = record or Record(picture_name(source.parent, fields["image"]), path, PROMPT, ())
        captions = tuple(dict.fromkeys(record.captions + captions))
        fields = {name: value for name, value in fields.items() if name != "image" and value not in _EMPTY}
        records[real] = dataclasses.replace(record, open=path, captions=captions, **fields)
    return list(records.values())


def _readable(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """The records whose files begin as a picture does; the rest of a file is checked when it is read."""

    def problem(record: Record) -> str:
        try:
            images.check(record.open)
        except images.ImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        checked = list(zip(records, pool.map(problem, records), strict=True))
    readable = [record for record, reason in checked if not reason]
    return readable, [LeftOut(record.id, reason) for record, reason in checked if reason]


# ---- lines of a file -------------------------------------------------------------------------------------------------


def read_record(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{"image", "captions", "prompt", "reference_units", "questions", "rubrics"} of a line.

    Captions are a tuple with `reference` first, where there is one. Questions and rubrics are JSON text, "[]" where
    there are none. An absent prompt is "".

    Raises:
      UserError: it lacks what is needed, or a field is of another form; `where` names the line.
    """
    if not isinstance(entry.get("image"), str) or not entry["image"]:
        raise UserError(f'{where}: a line is an object with "image", the path of a picture, and "caption"')
    captions = [entry[name] for name in ("reference", "caption") if entry.get(name) is not None]
    more = [] if entry.get("captions") is None else entry["captions"]
    captions += more if isinstance(more, list) else [more]
    if not all(isinstance(text, str) for text in captions):
        raise UserError(f'{where}: "reference", "caption" and the entries of "captions" must be text')
    captions = [text.strip() for text in captions if text.strip()]
    if not captions:
        raise UserError(f'{where}: {entry["image"]!r} has no caption; give "caption", or a list "captions"')
    prompt, units, questions, rubrics = (
        empty if entry.get(name) is None else entry[name]
        for name, empty in (("prompt", ""), ("reference_units", []), ("questions", []), ("rubrics", []))
    )
    if not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" must be text, got {prompt!r}')
    if not isinstance(units, list) or not all(isinstance(unit, str) and unit.strip() for unit in units):
        raise UserError(f'{where}: "reference_units" must be a list of texts')
    if not isinstance(questions, list) or not all(map(_is_question, questions)):
        raise UserError(
            f'{where}: "questions" must be a list of {{"question": text, "choices": [2 to {MAX_OPTIONS} texts], '
            '"answer": a letter, or one of the choices}'
        )
    if not isinstance(rubrics, list) or not all(map(_is_criterion, rubrics)):
        raise UserError(f'{where}: "rubrics" must be a list of {{"criterion": text, "weight": a number above 0}}')
    return {
        "image": entry["image"],
        "captions": tuple(dict.fromkeys(captions)),
        "prompt": prompt,
        "reference_units": tuple(units),
        "questions": json_text.dumps(questions),
        "rubrics": json_text.dumps(rubrics),
    }


def _is_question(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("question", "answer")):
        return False
    choices = entry.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_OPTIONS:
        return False
    return all(isinstance(text, str) and text.strip() for text in choices) and bool(lettered(entry)[1])


def _is_criterion(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("criterion"), str) or not entry["criterion"].strip():
        return False
    weight = entry.get("weight")
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight <= _LARGEST_WEIGHT


# ---- words -----------------------------------------------------------------------------------------------------------


def caption_tokenizer(train: Photos) -> transformers.PreTrainedTokenizerBase:
    """A byte-level BPE of at most 2048 tokens over the captions and prompts of the training split.

    The same captions give the same tokenizer, and every text has tokens.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNK))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for record in train.records for text in (record.prompt, *record.captions)]
    backend.train_from_iterator(texts, trainer)
    return fast_tokenizer(backend, list(_SPECIAL[4:]))
