"""Writers: language models that write references, their units, and the criteria of RubiCap offline for pictures.

A writer takes items of a listing and gives, for each, the fields of an output line or the reason why there are none.
`prompts` are the names and versions of the prompts that it asks.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.data import images, photos
from balcap_jax.data.addresses import address
from balcap_jax.data.listing import Item
from balcap_jax.data.same_pictures import JUDGED_PIXELS, PICTURE, PIXELS, fields_of
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.types import Ask
from balcap_jax.judges.schema import PLAIN, Failure

UNITS = prompts.name_of("units")
# What pre-training studies compare as formats of captions: short, descriptive and dense ones, and those that fuse what
# the text from the web (alt_text) knows with what the picture shows (Lai et al. 2024, arXiv 2410.02740).
FORMATS = {
    "short": "describe_short.v1",
    "descriptive": "describe.v1",
    "dense": "describe_dense.v1",
    "fused": "describe_fused.v1",
}
ALT_TEXT = "alt_text"  # the field of a line that "fused" reads
RUBRIC_WRITER = "rubric_writer.v1"
# What a new reference replaces.
_REPLACED = ("caption", "captions", "reference", "reference_units", PICTURE, PIXELS)
Written = dict[str, Any] | str


# ---- questions ------------------------------------------------------------------------------------------------------


class Description(pydantic.BaseModel):
    """The answer to `describe_ask`."""

    caption: str


class ReferenceUnits(pydantic.BaseModel):
    """The answer to `units_ask`."""

    units: list[str]


class Criterion(pydantic.BaseModel):
    """`weight`: 3 (critical), 2 (important) or 1 (minor)."""

    criterion: str
    weight: Annotated[Literal[1, 2, 3], PLAIN]


class WrittenRubrics(pydantic.BaseModel):
    """The answer to `rubrics_ask`; its dump is the field "rubrics" of a data set."""

    rubrics: list[Criterion]


def describe_ask(
    image: np.ndarray, request: str, max_tokens: int = 2048, form: str = "descriptive", alt_text: str = ""
) -> Ask:
    """Asks for a description of a picture, uint8 [height, width, 3]; `request` is the sample's own prompt.

    `form` is one of FORMATS; "fused" takes `alt_text`, the text that came with the picture.
    """

    def check(answer: Description) -> str:
        return "" if answer.caption.strip() else "empty description"

    texts = {"request": request} | ({"alt_text": alt_text} if form == "fused" else {})
    return Ask(FORMATS[form], prompts.render(FORMATS[form], **texts), Description, max_tokens, image, check)


def units_ask(reference: str, max_tokens: int = 2048) -> Ask:
    """Asks for the facts that a reference states."""
    return Ask(UNITS, prompts.render("units", reference=reference), ReferenceUnits, max_tokens)


def rubrics_ask(caption: str, reference: str, max_tokens: int = 2048) -> Ask:
    """Asks what a student's first caption lacks beside the reference."""
    messages = prompts.render(RUBRIC_WRITER, caption=caption, reference=reference)
    return Ask(RUBRIC_WRITER, messages, WrittenRubrics, max_tokens)


def split_into_units(client: ChatClient, references: Sequence[str], max_tokens: int) -> list[Written]:
    """{"reference_units": [...]} of each reference; one that states nothing is a failure, as recall would have no
    denominator."""

    def written(answer: Any) -> Written:
        if isinstance(answer, Failure):
            return answer.reason
        units = list(dict.fromkeys(unit.strip() for unit in answer.value.units if unit.strip()))
        return {"reference_units": units} if units else "the judge finds no fact in the reference"

    return [written(answer) for answer in client.ask([units_ask(text, max_tokens) for text in references])]


def reference_of(item: Item) -> str:
    """The reference that an item's line has. Raises UserError where it has none."""
    if not item.entry:
        raise UserError(f"{item.image} has no reference: units and rubrics are written for lines of a JSONL file")
    return photos.read_record(item.entry, f"the line of {item.key!r}")["captions"][0]


def alt_text_of(item: Item) -> str:
    """The text from the web that an item's line has; "" where it has none."""
    text = item.entry.get(ALT_TEXT)
    return text.strip() if isinstance(text, str) else ""


# ---- writers --------------------------------------------------------------------------------------------------------


class References:
    """Describes pictures under their own prompts, and splits the descriptions into units; each picture once.

    The result is {"same_as": its name} for a picture whose pixels have a line already, or get one in the same call.
    `form` is one of FORMATS.
    """

    @staticmethod
    def prompts_of(form: str) -> tuple[str, ...]:
        return FORMATS[form], UNITS

    def __init__(self, client: ChatClient, max_tokens: int, max_pixels: int, threads: int, form: str = "descriptive"):
        self._client, self._max_tokens, self._max_pixels = client, max_tokens, max_pixels
        self._form, self.prompts = form, self.prompts_of(form)
        self._names: dict[str, str] = {}  # image of the line, by the hash of its picture
        self._pool = ThreadPoolExecutor(threads)

    def know(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Notes the pictures of lines that are written already."""
        self._names |= {line[PICTURE]: line["image"] for line in lines if isinstance(line.get(PICTURE), str)}

    def __call__(self, items: Sequence[Item]) -> list[Written]:
        results: list[Written] = []
        pictures: dict[int, np.ndarray] = {}
        first: dict[str, str] = {}
        for i, picture in enumerate(self._pool.map(self._read, items)):
            if isinstance(picture, str):
                results.append(picture)
                continue
            fields = fields_of(picture, self._max_pixels)
            digest = fields[PICTURE]
            same = self._names.get(digest) or first.setdefault(digest, items[i].image)
            if same != items[i].image:
                results.append({"same_as": same})
            else:
                results.append(fields)
                pictures[i] = picture
        asks = [
            describe_ask(picture, items[i].prompt, self._max_tokens, self._form, alt_text_of(items[i]))
            for i, picture in pictures.items()
        ]
        captions: dict[int, str] = {}
        for i, answer in zip(pictures, self._client.ask(asks), strict=True):
            if isinstance(answer, Failure):
                results[i] = answer.reason
            else:
                captions[i] = answer.value.caption.strip()
        units = split_into_units(self._client, list(captions.values()), self._max_tokens)
        for (i, caption), fields in zip(captions.items(), units, strict=True):
            if isinstance(fields, str):
                results[i] = fields
                continue
            rest = {name: value for name, value in items[i].entry.items() if name not in _REPLACED}
            self._names[results[i][PICTURE]] = items[i].image
            results[i] = {**rest, "prompt": items[i].prompt, "caption": caption, **fields, **results[i]}
        failed = {items[i].image: results[i] for i in pictures if isinstance(results[i], str)}
        return [failed.get(fields.get("same_as"), fields) if isinstance(fields, dict) else fields for fields in results]

    def _read(self, item: Item) -> np.ndarray | str:
        if item.error:
            return item.error
        if self._form == "fused" and not alt_text_of(item):
            return f"no {ALT_TEXT} to fuse with the picture"
        try:
            return images.shrunk(images.read(item.path), self._max_pixels)
        except images.ImageError as error:
            return str(error)


def _of_row(item: Item) -> dict[str, Any]:
    """What tells the picture of a row of a parquet file from others; {} where its line does, or it cannot be read."""
    if not address(item.path) or PICTURE in item.entry:
        return {}
    try:
        return fields_of(images.shrunk(images.read(item.path), JUDGED_PIXELS))
    except images.ImageError:
        return {}


class Units:
    """Splits the references that lines have."""

    prompts: tuple[str, ...] = (UNITS,)

    def __init__(self, client: ChatClient, max_tokens: int):
        self._client, self._max_tokens = client, max_tokens

    def __call__(self, items: Sequence[Item]) -> list[Written]:
        sound = [item for item in items if not item.error]
        units = iter(split_into_units(self._client, [reference_of(item) for item in sound], self._max_tokens))

        def written(item: Item) -> Written:
            fields = item.error or next(units)
            return fields if isinstance(fields, str) else {**item.entry, **_of_row(item), **fields}

        return [written(item) for item in items]


class Rubrics:
    """Writes criteria about what a student's caption lacks beside the reference; `students` are captions by key."""

    prompts: tuple[str, ...] = (RUBRIC_WRITER,)

    def __init__(self, client: ChatClient, max_tokens: int, students: Mapping[str, str]):
        self._client, self._max_tokens, self._students = client, max_tokens, students

    def __call__(self, items: Sequence[Item]) -> list[Written]:
        known = [item for item in items if not item.error and item.key in self._students]
        asks = [rubrics_ask(self._students[item.key], reference_of(item), self._max_tokens) for item in known]
        answers = {item.key: answer for item, answer in zip(known, self._client.ask(asks), strict=True)}

        def written(item: Item) -> Written:
            answer = answers.get(item.key)
            if item.error or answer is None:
                return item.error or "the student's file has no caption of it"
            if isinstance(answer, Failure):
                return answer.reason
            return {**item.entry, **_of_row(item), **answer.value.model_dump()}

        return [written(item) for item in items]
