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
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import tokenizers
import transformers
from PIL import Image

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes, resolved
from balcap_jax.data import captions_file, images
from balcap_jax.data.listing import files_below, picture_name, real_path, spelt

PROMPT = "Describe this image in detail."
_LONGEST_CAPTION = 1 << 20  # bytes
CAPTIONS = "captions.jsonl"
_NAMED = 5  # pictures that a message names
_VOCABULARY = 2048
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
_PAD, _BOS, _EOS, _UNK = _SPECIAL[:4]


class LeftOut(NamedTuple):
    """A picture that is not used, and why."""

    image: str
    reason: str


class Splits(NamedTuple):
    train: "Photos"
    validation: "Photos"
    test: "Photos"
    fields: frozenset[str]
    left_out: Sequence[LeftOut]


@dataclasses.dataclass(frozen=True)
class Record:
    """A picture with its texts; `questions` and `rubrics` are JSON text. `open` gives what `images.read` takes.

    `picture` names the picture of several records with ids of their own ("": it is the id).
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
        """What it is split by."""
        return self.picture or self.id


class Photos:
    """A split: `photos[i]` reads picture i, shrunk to at most `max_pixels` (0 = as it is), with its texts.

    In the place of a picture that turns out to be damaged stands the next one that can be read, and a line on stderr
    says so once for each. Every example has the same number of `captions`: fewer are repeated, more are cut.
    """

    def __init__(self, records: Sequence[Record], captions: int, max_pixels: int):
        self.records, self.captions, self.max_pixels = records, captions, max_pixels
        self._damaged: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} examples)"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Raises UserError when no picture of the split can be read."""
        start = index.__index__()
        for step in range(len(self.records)):
            at = (start + step) % len(self.records)
            if at in self._damaged:
                continue
            try:
                picture = shrunk(images.read(_source(self.records[at])), self.max_pixels)
            except images.ImageError as error:
                self._leave_out(at, str(error))
            else:
                return self._example(self.records[at], picture)
        raise UserError(f"none of the {len(self.records)} pictures of a split can be read; the lines above say why")

    def _leave_out(self, at: int, reason: str) -> None:
        with self._lock:
            if at not in self._damaged:
                self._damaged[at] = reason
                name = self.records[at].id
                print(f"left out: {name}: {reason}; another picture takes its place", file=sys.stderr, flush=True)

    def _example(self, record: Record, picture: np.ndarray) -> dict[str, Any]:
        return {
            "id": record.id,
            "image": picture,
            "prompt": record.prompt,
            "reference": record.captions[0],
            "reference_units": list(record.reference_units),
            "captions": list(itertools.islice(itertools.cycle(record.captions), self.captions)),
            "questions": record.questions,
            "rubrics": record.rubrics,
        }


def _source(record: Record) -> Any:
    return record.open if isinstance(record.open, Path) else record.open()


def shrunk(picture: np.ndarray, max_pixels: int) -> np.ndarray:
    """A picture [height, width, 3] with at most about `max_pixels` pixels and its own aspect; 0 = as it is."""
    height, width = picture.shape[:2]
    if not max_pixels or height * width <= max_pixels:
        return picture
    scale = (max_pixels / (height * width)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))


# ---- opening ---------------------------------------------------------------------------------------------------------


def load(config: Mapping[str, Any]) -> Splits:
    """The splits of the folder or JSONL file `data_dir`.

    Raises:
      UserError: nothing there, a bad line, or no picture that is whole.
    """
    source = resolved(config["data_dir"])
    if source.is_dir() and not (source / CAPTIONS).is_file():
        records, left_out = _beside(source)
    elif source.is_file() or source.is_dir():
        records, left_out = _listed(source if source.is_file() else source / CAPTIONS), []
    else:
        raise UserError(f"config field 'data.data_dir': no such folder or file: {source}")
    records, unreadable = _whole(records)
    left_out = [*left_out, *unreadable]
    announce("photos", records, left_out)
    if not records:
        raise UserError(f"no picture with a caption in {source}; a caption of a.jpg is a.txt, or a line of {CAPTIONS}")
    return make_splits(records, left_out, config)


def make_splits(records: Sequence[Record], left_out: Sequence[LeftOut], config: Mapping[str, Any]) -> Splits:
    """Splits by a hash of each picture's name: what is in a split stays there, whatever else is added.

    All records of a picture are in one split. Examples have as many captions as the median record.

    Raises:
      UserError: fewer than three pictures.
    """
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for key in (pictures := dict.fromkeys(record.key for record in records)):
        parts[split_of(key, config["validation_share"], config["test_share"])].append(key)
    if len(pictures) < 3:
        raise UserError(f"{len(pictures)} pictures are too few: training, validation and test need one each")
    for part in parts.values():  # Of few pictures a split may have got none: the next by hash of the largest fills it.
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
    found = {"reference", "captions"} | {
        name
        for name in ("reference_units", "questions", "rubrics")
        if any(getattr(record, name) not in ((), "[]") for record in records)
    }
    return Splits(*splits, frozenset(found), tuple(left_out))


def split_of(name: str, validation: float, test: float) -> str:
    """The split of a picture's name, given the shares of validation and test."""
    position = _position(name)
    return "test" if position < test else "validation" if position < test + validation else "train"


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def announce(name: str, records: Sequence[Record], left_out: Sequence[LeftOut], count: int = 0) -> None:
    """One line: how many pictures there are, and which are left out; `count` of them if not all are in `left_out`."""
    pictures, count = len({record.key for record in records}), count or len(left_out)
    text = f"{name}: {pictures} pictures"
    if pictures < len(records):
        text += f" in {len(records)} entries"
    if count:
        named = ", ".join(f"{one.image} ({one.reason})" for one in left_out[:_NAMED])
        more = f" and {count - _NAMED} more" if count > _NAMED else ""
        text += f"; {count} left out: {named}{more}"
    print(text, flush=True)


def _beside(folder: Path) -> tuple[list[Record], list[LeftOut]]:
    """Pictures below a folder with a caption in a .txt of the same stem."""
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
    """The lines of a JSONL file. Lines of one picture are joined: its captions, and the last of what else they say."""
    pictures: dict[str, Record] = {}
    try:
        text = read_bytes(source).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{source} cannot be read ({reason}); give a folder or a JSONL file") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            entry = json_text.parse_object(line, where, "mend or remove that line")
            record = captions_file.read_record(entry, where)
            path = source.parent / record["image"]
            before = pictures.get(real := real_path(path))
            pictures[real] = Record(
                before.id if before else picture_name(source.parent, record["image"]),
                path,
                record["prompt"] or (before.prompt if before else PROMPT),
                tuple(dict.fromkeys((before.captions if before else ()) + record["captions"])),
                record["reference_units"] or (before.reference_units if before else ()),
                record["questions"] if record["questions"] != "[]" or not before else before.questions,
                record["rubrics"] if record["rubrics"] != "[]" or not before else before.rubrics,
            )
    return list(pictures.values())


def _whole(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """Those whose files begin as a picture does; the rest of a file is looked at when it is read."""

    def problem(record: Record) -> str:
        try:
            images.check(record.open)
        except images.ImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(problem, records))
    whole = [record for record, text in zip(records, problems, strict=True) if not text]
    return whole, [LeftOut(record.id, text) for record, text in zip(records, problems, strict=True) if text]


# ---- words -----------------------------------------------------------------------------------------------------------


def caption_tokenizer(train: Photos) -> transformers.PreTrainedTokenizerBase:
    """A byte-level BPE of at most 2048 tokens over the captions and prompts of the training split.

    The same captions give the same tokenizer, and every text has tokens.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNK))
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
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNK,
        extra_special_tokens=list(_SPECIAL[4:]),
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
