"""Which column of a data set is what: the picture, its captions, the prompt, and what rewards read.

`data.columns` says it, as `image=jpg,caption=dense_caption,prompt=question`, or names one of PRESETS. Columns that are
called as the other fields here need not be named. What a column holds decides how it is read:

    image     the picture itself, as the library `datasets` writes it ({bytes, path}) or as plain bytes, alone or in a
              list of one; or text, the path of a file
    caption   text; of a list of texts the first; of a conversation the first answer
    captions  text, or a list of texts, of which all are used
    prompt    text; of a conversation the first request
    id        text or a number that names the picture: rows with the same are in one split. It has to be named; else it
              is the path beside the picture
    alt_text  text that came with the picture from the web, for `recaption --format=fused`
    reference_units, questions, rubrics    as in the lines of a JSONL file, or as JSON text

A conversation is a list of turns, {from, value} or {role, content}, or of pairs, {user, assistant}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.data.input import NO_PICTURE
from balcap_jax.data.parquet_files import field_of

FIELDS = ("image", "caption", "captions", "prompt", "id", "alt_text", "reference_units", "questions", "rubrics")
_ALIASES = {"question": "prompt"}
# The first of these columns that is there. Names as on the cards of the data sets, see docs/data.md.
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "sharegpt4v": {"image": ("image",), "caption": ("conversations",), "prompt": ("conversations",)},
    "pixmo_cap": {"image": ("image", "image_url"), "caption": ("caption",)},
    "docci": {"image": ("image", "image_file"), "caption": ("description",), "id": ("example_id",)},
    "imageinwords": {
        "image": ("image", "image/url", "image/key"), "caption": ("IIW", "IIW-P5B"), "id": ("image/key", "ex_id"),
    },
    "densefusion": {"image": ("image", "image_path", "url"), "caption": ("caption",), "id": ("image_id",)},
}  # fmt: skip
_OPTIONAL = ("id",)  # of a preset: copies of a data set may lack it

TEXT, BYTES, PICTURE, TEXTS, PICTURES, TURNS, NUMBER = (
    "text", "bytes", "a picture", "a list of texts", "a list of pictures", "a conversation", "numbers",
)  # fmt: skip
_TAKES = {
    "image": (PICTURE, BYTES, PICTURES, TEXT),
    "caption": (TEXT, TEXTS, TURNS),
    "captions": (TEXTS, TEXT),
    "prompt": (TEXT, TURNS),
    "id": (TEXT, NUMBER),
    "alt_text": (TEXT,),
    "reference_units": (TEXTS, TEXT),
}
_TURNS = (("from", "value"), ("role", "content"))
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant", "model")
# Parts of names that pictures and captions often have, the likeliest first.
_LIKELY = {
    "image": ("image", "jpg", "png", "picture", "img", "photo"),
    "caption": ("caption", "description", "conversations", "text", "iiw", "answer", "response"),
}
Columns = dict[str, str]
"""{field: column}."""


def kind_of(column: pa.DataType) -> str:
    """What a type holds, one of the kinds above, or its own name."""
    types = pa.types
    if types.is_dictionary(column):
        return kind_of(column.value_type)
    if types.is_string(column) or types.is_large_string(column) or types.is_string_view(column):
        return TEXT
    if any(test(column) for test in (types.is_binary, types.is_large_binary, types.is_binary_view)):
        return BYTES
    if types.is_integer(column):
        return NUMBER
    if types.is_struct(column):
        parts = {part.name: kind_of(part.type) for part in column}
        return PICTURE if parts.get("bytes") == BYTES else str(column)
    if types.is_list(column) or types.is_large_list(column) or types.is_fixed_size_list(column):
        inner = column.value_type
        if types.is_struct(inner) and kind_of(inner) != PICTURE:
            names = {part.name for part in inner}
            is_turn = any(names.issuperset(pair) for pair in (*_TURNS, ("user", "assistant")))
            return TURNS if is_turn else str(column)
        return {TEXT: TEXTS, PICTURE: PICTURES, BYTES: PICTURES}.get(kind_of(inner), str(column))
    return str(column)


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """{field: columns of which the first that is there is meant} of `data.columns`; "" = none are named.

    Raises:
      UserError: it names no preset and no fields.
    """
    text = text.strip()
    if text in PRESETS:
        return PRESETS[text]
    chosen: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        field = _ALIASES.get(field, field)
        if not equals or field not in FIELDS or field in chosen:
            raise UserError(
                f"config field 'data.columns': {part!r} is not FIELD=COLUMN with another field of {', '.join(FIELDS)}; "
                f"give such as image=jpg,caption=text, or one of {', '.join(PRESETS)}"
            )
        chosen[field] = (column,) if column else ()
    return chosen


def choose(text: str, schema: pa.Schema, where: str, *, needs_caption: bool = True) -> Columns:
    """The column of each field that a file has. An `id` of its own is the path beside a picture, where there is one.

    `text` is `data.columns`, and `where` names the file.

    Raises:
      UserError: a column is not there or holds something else, or nothing says which the picture or the caption is.
    """
    named = parse(text)
    chosen = {}
    for field in FIELDS:
        # A column called id tells samples apart more often than pictures.
        candidates = named.get(field, () if field == "id" else (field,))
        column = next((name for name in candidates if field_of(schema, name) is not None), None)
        if column is None:
            if field in named and candidates and not (text.strip() in PRESETS and field in _OPTIONAL):
                raise UserError(f"{where} has no column {' or '.join(map(repr, candidates))}; {_remedy(schema)}")
            continue
        kind = kind_of(field_of(schema, column).type)
        if field in _TAKES and kind not in _TAKES[field]:
            if field in named or field in ("image", "caption"):
                part = field_of(schema, f"{column}.path") if field == "image" else None
                inside = f" ({column}.path holds paths: image={column}.path)" if part is not None else ""
                raise UserError(
                    f"the column {column!r} of {where} holds {kind}, and {field} takes {', '.join(_TAKES[field])}"
                    f"{inside}; {_remedy(schema)}"
                )
            continue  # It only happens to be called so.
        chosen[field] = column
    if "image" not in chosen or (needs_caption and not {"caption", "captions"} & chosen.keys()):
        what = "captions are" if "image" in chosen else "pictures are"
        raise UserError(f"nothing says where the {what} in {where}; {_remedy(schema)}")
    beside = f"{chosen['image']}.path"
    if "id" not in chosen and "id" not in named and field_of(schema, beside) is not None:
        chosen["id"] = beside
    return chosen


def _remedy(schema: pa.Schema) -> str:
    """The columns with what they hold, and those that are likely meant."""
    kinds = {name: kind_of(schema.field(name).type) for name in schema.names}
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    likely = [f"{field}={name}" for field in _LIKELY if (name := _likeliest(field, kinds))]
    text = ",".join(likely) if len(likely) == len(_LIKELY) else "image=COLUMN,caption=COLUMN"
    meant = " if these are meant" if len(likely) == len(_LIKELY) else ""
    return f"its columns are {listed}; give --config.data.columns={text}{meant} (recaption: --columns)"


def likeliest(field: str, schema: pa.Schema) -> str:
    """The column that is likely meant by a field; "" where none is."""
    return _likeliest(field, {name: kind_of(schema.field(name).type) for name in schema.names})


def addresses(schema: pa.Schema) -> list[str]:
    """The column that may say where the pictures are, of paths or URLs, in a list; none where there are pictures."""
    if picture_column(schema):
        return []
    texts = [name for name in schema.names if kind_of(schema.field(name).type) == TEXT]
    likely = likeliest("image", schema)
    return [likely] if likely else [name for name in texts if "url" in name.lower()][:1]


def _likeliest(field: str, kinds: Mapping[str, str]) -> str:
    """The column that is likely meant by a field; "" where none is."""
    fitting = {name: kind for name, kind in kinds.items() if kind in _TAKES[field]}
    is_clear = field != "image" or any(kind != TEXT for kind in fitting.values())  # Text may be anything.
    if field == "image" and is_clear:
        fitting = {name: kind for name, kind in fitting.items() if kind != TEXT}

    def rank(name: str) -> int:
        words = (place for place, word in enumerate(_LIKELY[field]) if word in name.lower())
        return next(words, len(_LIKELY[field]))

    best = min(fitting, key=rank, default="")
    certain = bool(best) and (rank(best) < len(_LIKELY[field]) or (is_clear and len(fitting) == 1))
    return best if certain else ""


def picture_column(schema: pa.Schema) -> str:
    """The one column of pictures, or the likeliest of them; "" where there is none."""
    kinds = {name: kind_of(schema.field(name).type) for name in schema.names}
    return _likeliest("image", {name: kind for name, kind in kinds.items() if kind != TEXT})


# ---- values of a row -------------------------------------------------------------------------------------------------


def entry_of(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The fields of a row as those of a line of a JSONL file: `records.read_record` takes it.

    Raises:
      ValueError: a field that should be JSON is none.
    """
    entry: dict[str, Any] = {}
    for field, column in columns.items():
        if field in ("image", "id") or (value := values[column]) is None:
            continue
        if field == "caption" and isinstance(value, list):
            value = _answer(value)
        elif field == "prompt" and isinstance(value, list):
            value = _request(value)
        elif field in ("reference_units", "questions", "rubrics") and isinstance(value, str):
            value = json_text.decode(value)
        entry[field] = value
    return entry


def renamed(entry: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A line of a JSONL file under the names of the fields; `text` is `data.columns`. Fields that it lacks stay out.

    Raises:
      UserError, ValueError: as `parse` and `entry_of` do.
    """
    named = parse(text)
    columns = {}
    for field in FIELDS:
        there = [name for name in named.get(field, (field,)) if entry.get(name) is not None]
        if there:  # Where a data set names a picture by its file and by its URL, it is the file that can be read.
            columns[field] = next((name for name in there if not is_url(entry[name])), there[0])
    image = {"image": entry[columns["image"]]} if "image" in columns else {}
    return image | entry_of(entry, columns)


def _answer(value: Sequence[Any]) -> str | None:
    """The first text of a list, or the first answer of a conversation."""
    if value and not isinstance(value[0], Mapping):
        return next((text for text in value if text is not None and text.strip()), None)
    return _spoken(value, _ANSWERS)


def _request(value: Sequence[Any]) -> str:
    return (_spoken(value, _ASKS) or "").replace("<image>", "").strip()


def _spoken(turns: Sequence[Mapping[str, Any]], speakers: Sequence[str]) -> str | None:
    """What one of `speakers` says first."""
    for turn in turns:
        for who, what in _TURNS:
            if turn.get(who) in speakers and what in turn:
                return turn[what]
        for speaker in speakers:
            if speaker in turn:
                return turn[speaker]
    return None


def is_url(value: Any) -> bool:
    """Whether a picture is named by where it lies on the web."""
    return isinstance(value, str) and value.startswith(("http://", "https://", "ftp://", "s3://", "gs://"))


def picture_of(value: Any) -> bytes | str:
    """The bytes of a picture in a row, or the path of its file.

    Raises:
      ValueError: there is none, or more than one.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{len(value)} pictures in one row")
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ValueError(NO_PICTURE)
    return value
