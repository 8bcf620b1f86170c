"""Photographs and their captions from a folder or a JSONL file, as random-access splits.

A folder holds pictures with their captions beside them (`a/b.jpg`, `a/b.txt`), or a file `captions.jsonl`; a JSONL file
holds lines such as

    {"image": "a/b.jpg", "caption": "...", "prompt": "...", "reference_units": ["..."],
     "questions": [...], "rubrics": [...]}

of which `image` (relative to the file, or to `data.manual_dir`) and `caption`, or `captions`, are needed. The first
caption is the reference. `data.columns` says which name in lines of other forms is what (`data/columns.py`).
"""

import dataclasses
import hashlib
import itertools
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from balcap_jax.cli import json_text, storage
from balcap_jax.cli.bucket import is_url
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes, resolved
from balcap_jax.data import images, picture_index, same_pictures
from balcap_jax.data.addresses import SUFFIXES, is_parquet, refuse_tars
from balcap_jax.data.input import NO_CAPTION, Data, LeftOut
from balcap_jax.data.listing import PictureNames, RealPaths, files_below, lines_of, renamed, spelt
from balcap_jax.data.readable import Readable
from balcap_jax.data.records import EMPTY, REWARDED, Record, check_needs, join, read_record
from balcap_jax.data.same_pictures import Hash, hash_in
from balcap_jax.data.scenes.tokenizer import SPECIAL_TOKENS, UNK, fast_tokenizer

PROMPT = "Describe this image in detail."
_LONGEST_CAPTION = 1 << 20  # bytes
CAPTIONS = "captions.jsonl"
_NAMED = 5  # pictures that a message names
_VOCABULARY = 2048
_SPECIAL = (*SPECIAL_TOKENS, "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")


class Photos(Readable):
    """A split: `photos[i]` reads picture i, shrunk to at most `max_pixels` (0 = as it is), with its texts.

    Every example has the same number of `captions`: fewer are repeated, more are cut. `damaged` is as of `Readable`.
    """

    def __init__(self, records: Sequence[Record], captions: int, max_pixels: int, damaged: list[LeftOut] | None = None):
        super().__init__(damaged)
        self.records, self.captions, self.max_pixels = records, captions, max_pixels

    def __len__(self) -> int:
        return len(self.records)

    @property
    def prompts(self) -> list[str]:
        """Those of all pictures, none of which is opened."""
        return [record.prompt for record in self.records]

    def texts(self) -> Iterator[tuple[str, ...]]:
        """The prompt and the captions of each picture, none of which is opened."""
        return ((record.prompt, *record.captions) for record in self.records)

    def name(self, at: int) -> str:
        return self.records[at].id

    def read(self, at: int) -> dict[str, Any]:
        record = self.records[at]
        return {
            "id": record.id,
            "image": images.shrunk(images.read(record.path), self.max_pixels),
            "prompt": record.prompt,
            "reference": record.captions[0],
            "reference_units": list(record.reference_units),
            "captions": list(itertools.islice(itertools.cycle(record.captions), self.captions)),
            "questions": record.questions,
            "rubrics": record.rubrics,
        }


# ---- opening ---------------------------------------------------------------------------------------------------------


def load(config: Mapping[str, Any], needs: Sequence[str] = ()) -> Data:
    """The splits of the folder or JSONL file `data_dir`; `needs` as of `open_splits`.

    Raises:
      UserError: nothing there, a bad line, or no picture that can be read, or as `open_splits` does.
    """
    source = resolved(config["data_dir"])
    if storage.url_of(source) and source.suffix != ".jsonl":
        storage.refuse(source, "a folder of pictures (data.data_dir)")
    storage.fetch(source)
    folder = source if source.is_dir() else source.parent
    if source.suffix.lower() in SUFFIXES and source.is_file():
        raise UserError(f"{source} is a parquet file, and data.name is 'photos'; give --config.data.name=parquet")
    # Beside somebody's photographs nothing is written.
    name = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:16]
    index = resolved(picture_index.CACHE) / "pictures" / f"{name}.json"
    columns = config.get("columns", "")
    if source.is_dir() and not (source / CAPTIONS).is_file():
        if columns:
            raise UserError(
                f"config field 'data.columns' names fields of JSONL and columns of parquet files, and {source} has "
                f"pictures beside their captions; leave it empty, or give data.name=parquet where tables are meant"
            )
        records, left_out = _beside(source, index.with_suffix(".captions.json"), needs_caption=not config.get("units"))
        if not records and not left_out and is_parquet(source):
            raise UserError(f"{source} has parquet files and no picture; give --config.data.name=parquet")
        if not records and not left_out:
            refuse_tars(source, "photos")
    elif source.is_file() or source.is_dir():
        if source.is_file():
            refuse_tars(source, "photos")
        listed = source if source.is_file() else source / CAPTIONS
        folder = resolved(config["manual_dir"]) if config.get("manual_dir") else folder
        records, left_out = _listed(listed, folder, columns, needs_caption=not config.get("units")), []
    else:
        refuse_tars(source, "photos")
        raise UserError(
            f"config field 'data.data_dir': no such folder or file: {source}; name the folder of your photographs, or "
            "a JSONL file about them"
        )
    return open_splits("photos", records, left_out, config, needs, folder=folder, source=source, index=index)


def open_splits(
    name: str,
    records: Sequence[Record],
    left_out: Sequence[LeftOut],
    config: Mapping[str, Any],
    needs: Sequence[str],
    *,
    folder: Path,
    source: Path,
    index: Path,
) -> Data:
    """The splits of the records of the data set `name`, with what data.units says about their pictures.

    needs: fields that the reward reads; what is missing is said before any picture is opened. left_out: what is already
    known to be unusable. folder: where names of pictures start. source: the folder or file that was read. index: of
    `picture_index`.

    Raises:
      UserError: data.units does not fit, a needed field is nowhere, or no picture can be read.
    """
    if config.get("units"):
        records, without = join(records, storage.fetch(resolved(config["units"])), folder, name)
        left_out = [*left_out, *without]
    check_needs(records, needs, name, source)
    names = [os.path.relpath(record.path, folder) for record in records]  # A folder may be moved with its index.
    problems = picture_index.problems({each: record.path for each, record in zip(names, records, strict=True)}, index)
    reasons = [problems.get(each, "") for each in names]
    unreadable = [LeftOut(record.id, why) for record, why in zip(records, reasons, strict=True) if why]
    records = [record for record, why in zip(records, reasons, strict=True) if not why]
    left_out = [*left_out, *unreadable]
    announce(name, records, left_out)
    if not records:
        if unreadable:
            first = f"the first, {unreadable[0].image}: {unreadable[0].reason}"
            raise UserError(f"none of the pictures of {source} can be read in {folder}; {first}")
        raise UserError(f"no picture with a caption in {source}; a caption of a.jpg is a.txt, or a line of {CAPTIONS}")
    return make_splits(records, left_out, config)


def make_splits(records: Sequence[Record], left_out: Sequence[LeftOut], config: Mapping[str, Any]) -> Data:
    """Splits by a hash of each picture's name: a picture stays in its split, whatever others are added.

    All records of a picture are in one split. Examples have as many captions as the median record.

    Raises:
      UserError: fewer than three pictures.
    """
    parts = partition((record.key for record in records), config, len(left_out))
    home = {key: name for name, part in parts.items() for key in part}
    counts = [len(record.captions) for record in records]
    count = statistics.median_high(counts)
    if min(counts) < max(counts):
        text = f"captions of a picture: {min(counts)} to {max(counts)}; {count} of each are used"
        print(f"{text}, repeated where there are fewer", flush=True)
    damaged: list[LeftOut] = []
    splits = (
        Photos([record for record in records if home[record.key] == name], count, config["max_pixels"], damaged)
        for name in parts
    )
    fields = {name for name in REWARDED if any(getattr(record, name) not in EMPTY for record in records)}
    return Data(*splits, frozenset({"reference", "captions"} | fields), tuple(left_out), damaged=damaged)


def partition(keys: Iterable[str], config: Mapping[str, Any], left_out: int) -> dict[str, list[str]]:
    """{split: its pictures} by a hash of each picture's key; the largest split fills the empty ones of few pictures.

    `left_out` is the number of those that are not among them.

    Raises:
      UserError: fewer than three pictures.
    """
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for key in (pictures := dict.fromkeys(keys)):
        parts[split_of(key, config["validation_share"], config["test_share"])].append(key)
    if len(pictures) < 3:
        raise UserError(
            f"{len(pictures)} pictures are too few: training, validation and test need one each; "
            "add pictures with captions" + (f", or mend the {left_out} that are left out (above)" if left_out else "")
        )
    for part in parts.values():  # A split of few pictures may be empty: the next by hash of the largest fills it.
        if not part:
            largest = max(parts.values(), key=len)
            part.append(largest.pop(min(range(len(largest)), key=lambda i: _position(largest[i]))))
    return parts


def split_of(name: str, validation: float, test: float) -> str:
    """The split of a picture's name, given the shares of validation and test."""
    position = _position(name)
    return "test" if position < test else "validation" if position < test + validation else "train"


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def announce(name: str, records: Sequence[Record], left_out: Sequence[LeftOut]) -> None:
    """Prints how many pictures there are, and which are left out."""
    pictures, count = len({record.key for record in records}), len(left_out)
    text = f"{name}: {pictures} pictures"
    if pictures < len(records):
        text += f" in {len(records)} entries"
    if count:
        named = ", ".join(f"{image} ({reason})" for image, reason in left_out[:_NAMED])
        more = f" and {count - _NAMED} more" if count > _NAMED else ""
        text += f"; {count} left out: {named}{more}"
    print(text, flush=True)


def _beside(folder: Path, index: Path, *, needs_caption: bool) -> tuple[list[Record], list[LeftOut]]:
    """Pictures below a folder, each with a caption in a .txt of the same stem; `index` remembers the captions.

    If not `needs_caption`, a record may have none: data.units is to bring it.
    """
    names = dict(files_below(folder, "config field 'data.data_dir'"))
    texts = {name: str((folder / name).with_suffix(".txt")) for name, problem in names.items() if not problem}
    captions, problems = picture_index.seen_in(texts, index, _caption)
    records, left_out = [], []
    pictures, real = {}, RealPaths()
    for name, problem in names.items():
        problem = problem or problems.get(name, "")
        if problem in NO_CAPTION and not needs_caption:
            problem = ""
        if not problem and spelt(name) != name:
            problem = "name or caption is not UTF-8"
        if problem:
            left_out.append(LeftOut(spelt(name), problem))
        else:
            path = str(folder / name)
            texts = (captions[name],) if name in captions else ()
            records.append(Record(name, path, PROMPT, texts, picture=pictures.setdefault(real(path), name)))
    return records, left_out


def _caption(path: str) -> str:
    """The text of a file. Raises ImageError with the reason why there is none."""
    try:
        text = read_bytes(path, _LONGEST_CAPTION).decode("utf-8-sig").strip()
    except FileNotFoundError as error:
        raise images.ImageError(NO_CAPTION[0]) from error
    except OSError as error:
        raise images.ImageError(f"its caption cannot be read: {error.strerror}") from error
    except UnicodeError as error:
        raise images.ImageError("name or caption is not UTF-8") from error
    if not text:
        raise images.ImageError(NO_CAPTION[1])
    return text


def _listed(source: Path, folder: Path, columns: str, *, needs_caption: bool) -> list[Record]:
    """The pictures of a JSONL file. Lines of one picture are joined: its captions, and the last of each other field.

    Paths start from `folder`. `columns` is `data.columns`: "" = a line has our own names of fields.
    """
    records: dict[str, Record] = {}
    hashes: dict[str, Hash] = {}
    names, real_path, in_bucket = PictureNames(folder), RealPaths(), storage.url_of(source)
    for number, line in lines_of(source):
        where = f"{source}, line {number}"
        entry = json_text.parse_object(line, where, "mend or remove that line")
        if columns:
            entry = renamed(entry, columns, folder, where)
        fields = read_record(entry, where, needs_caption=needs_caption)
        path, captions = os.path.join(folder, fields["image"]), fields.pop("captions")
        if in_bucket or is_url(fields["image"]):
            storage.refuse(fields["image"] if is_url(fields["image"]) else path, "a picture")
        record = records.get(real := real_path(path))
        record = record or Record(names(fields["image"]), path, PROMPT, ())
        captions = tuple(dict.fromkeys(record.captions + captions))
        fields = {name: value for name, value in fields.items() if name != "image" and value not in EMPTY}
        records[real] = dataclasses.replace(record, path=path, captions=captions, **fields)
        if found := hash_in(entry):
            hashes[path] = found
    same_pictures.check(hashes, source)
    return list(records.values())


# ---- words -----------------------------------------------------------------------------------------------------------


def caption_tokenizer(train: Readable) -> transformers.PreTrainedTokenizerBase:
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
    backend.train_from_iterator(itertools.chain.from_iterable(train.texts()), trainer)
    return fast_tokenizer(backend, list(_SPECIAL[4:]))
