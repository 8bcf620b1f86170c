"""The JSON object in a model's answer, checked against its schema; models wrap it in fences, thoughts and talk.

No text takes long: each pattern looks at a character a bounded number of times, and so does the search for objects.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pydantic

_THOUGHT = r"(?:thinking|think|thoughts?)"
_ASIDE = (
    rf"(?:(?:{_THOUGHT}|reasoning|reason)(?:[_ -]?process)?"
    r"|reflection|analysis|scratchpad|inner_monologue|planning|deliberation|cot)"
)
_LEFT, _RIGHT, _SPACE = r"[<\[◁][|｜]?", r"[|｜]?[>\]▷]", r"[_▁ -]?"
_NAMESPACE = r"(?:\w{1,20}[:_-])?"
_REST = r"(?:\s[^<>]{0,80}(?<!/))?"  # attributes; a mark that closes itself holds no thoughts
_MARKS = re.compile(
    r"(?=[<\[◁][^<\[◁])(?:"  # all of them: the rest takes longer to find out
    # Ends: </think>, [/THINK], ◁/think▷, </seed:think>; <|end_of_thought|>, <|END_THINKING|>; <|think_end|>; the final
    # channel of gpt-oss, also where its marks were lost; <channel|> of Gemma; <unused95> of MedGemma; Apertus.
    rf"(?P<end>{_LEFT}\s{{0,3}}/\s{{0,3}}{_NAMESPACE}{_ASIDE}{_REST}{_RIGHT}"
    rf"|{_LEFT}end{_SPACE}(?:of{_SPACE})?{_ASIDE}{_RIGHT}|{_LEFT}{_ASIDE}{_SPACE}end{_RIGHT}"
    r"|<\|channel\|>\s{0,9}final[^<]{0,40}(?:<\|constrain\|>[^<]{0,40})?<\|message\|>"
    r"|<channel\|>|<unused95>|<\|inner_suffix\|>)"
    # Beginnings, of the same models in the same order.
    rf"|(?P<begin>[<◁][|｜]?\s{{0,3}}{_NAMESPACE}{_ASIDE}{_REST}{_RIGHT}"
    rf"|\[[|｜]?{_NAMESPACE}{_THOUGHT}\s{{0,3}}{_RIGHT}"  # [Analysis] is a heading
    rf"|{_LEFT}(?:begin|start){_SPACE}(?:of{_SPACE})?{_ASIDE}{_RIGHT}|{_LEFT}{_ASIDE}{_SPACE}(?:begin|start){_RIGHT}"
    r"|<\|channel\|>\s{0,9}(?:analysis|commentary)|<\|channel>\s{0,9}thought|<unused94>|<\|inner_prefix\|>))",
    re.IGNORECASE,
)
# Models that say in words where thoughts begin and end: gpt-oss without its marks, and Granite.
_WORDS = (
    (re.compile(r"\s*analysis"), re.compile(r"assistantfinal")),
    (
        re.compile(r"\s*here(?: i|')s my thought process", re.IGNORECASE),
        re.compile(r"here(?: i|')s my response:?", re.IGNORECASE),
    ),
)
_BEGINNING = re.compile(r'\{(?=\s*["}])')  # of a JSON object
_FENCE = re.compile(r"\s*(?:```\w*\s*)?")  # all that may stand around an answer that was cut off
# The search ends when it has read the text so many times, and some more: such texts are no answers.
_PASSES, _PASSES_MORE = 4, 1 << 16
# In characters read: what each object costs beside, and a start that fails, to which Python counts the lines.
_PER_OBJECT, _PER_START, _PER_POSITION = 64, 16, 1 / 128
_ERRORS = 1000  # of one object, of which the first is named: pydantic makes a list of all
_TWO_VALUES = object()  # of a name that an object has twice: no field takes it


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        fields[name] = value if name not in fields or repr(fields[name]) == repr(value) else _TWO_VALUES
    return fields


# Models break lines inside strings, where JSON wants \n.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_object_of)


class UnusableAnswer(ValueError):
    """The text is no answer of the schema; the message gives the reason in a few words that do not quote the text."""


def parse_answer(
    text: str, schema: type[pydantic.BaseModel], check: Callable[[Any], str] | None = None, *, cut: bool = False
) -> Any:
    """The one object of `schema` that a text holds behind its thoughts, where `check` returns "".

    A text that is JSON is the object itself; another text may hold it. Two different objects are refused, and so are
    two values of one field, and an object beside anything that begins as one, whole or not: either might be quoted from
    the text that is judged.

    `cut`: the text was cut off. Its object counts where it begins the answer or ends it: it may be a draft elsewhere.

    A schema may have a method `of_text`, which reads the whole text, thoughts included, where it holds no such object.

    Raises:
      UnusableAnswer: no object, not of the schema, more than one, or refused by `check`.
    """
    try:
        objects = list(_objects(text))
        begin, end = _behind_thoughts(text, objects)
        if not text[begin:end].strip():
            raise UnusableAnswer("empty answer")
        inside = [(value, first - begin, last - begin) for value, first, last in objects if begin <= first < end]
        value = _only(text[begin:end], inside, schema, cut)
    except UnusableAnswer:
        if cut or not hasattr(schema, "of_text"):
            raise
        value = schema.of_text(text)
    try:
        value.model_dump_json()
    except ValueError as error:
        raise UnusableAnswer("answer holds half of a surrogate pair") from error
    if check is not None and (problem := check(value)):
        raise UnusableAnswer(problem)
    return value


def _behind_thoughts(text: str, objects: list[tuple[dict, int, int]]) -> tuple[int, int]:
    """Begin and end of the text without its thoughts: behind the last end of thoughts, and before thoughts that do not
    end. Marks inside JSON objects are quoted, and do not count."""
    spans = iter([*((first, last) for _, first, last in objects), (len(text), len(text))])
    first, last = next(spans)
    begin, end = 0, len(text)
    for mark in _MARKS.finditer(text):
        while last <= mark.start():
            first, last = next(spans)
        if mark.start() >= first:
            continue
        if mark["end"]:
            begin, end = mark.end(), len(text)
        elif end == len(text):
            end = mark.start()
    for opening, closing in _WORDS:
        if begin == 0 and opening.match(text) and (mark := closing.search(text)):
            begin = mark.end()
    return begin, max(begin, end)


def _only(text: str, objects: list[tuple[dict, int, int]], schema: type[pydantic.BaseModel], cut: bool) -> Any:
    values, places, problem, rest, at = [], [], None, "", 0
    for candidate, start, end in objects:
        try:
            value = _validate(candidate, schema)
        except UnusableAnswer as error:
            problem = problem or error
            continue
        rest, at = rest + text[at:start], end
        places += [start, end]
        if value not in values:
            values.append(value)
        if len(values) > 1:
            break
    rest += text[at:]
    names = "|".join(re.escape(field.alias or name) for name, field in schema.model_fields.items())
    if len(values) > 1 or (values and re.search(rf"{{[^{{}}]*?\b({names})\b\W?\s*:", rest)):
        raise UnusableAnswer("answer holds several JSON objects of the schema")
    if not values:
        raise problem or UnusableAnswer("answer holds no JSON object")
    if cut and not (_FENCE.fullmatch(text[: places[0]]) or _FENCE.fullmatch(text[places[-1] :])):
        raise UnusableAnswer("answer is cut off")
    return values[0]


def _validate(value: Any, schema: type[pydantic.BaseModel]) -> Any:
    try:
        return schema.model_validate(value)
    except pydantic.ValidationError as error:
        if error.error_count() > _ERRORS:
            raise UnusableAnswer("answer does not fit the schema in many places") from None
        first = error.errors(include_input=False, include_url=False)[0]
        # Numbers of list entries differ from answer to answer; without them reasons can be counted.
        where = ".".join("*" if isinstance(part, int) else str(part) for part in first["loc"])
        raise UnusableAnswer(f"answer does not fit the schema ({where}: {first['type']})") from error


def _objects(text: str) -> Iterator[tuple[dict, int, int]]:
    """JSON objects in a text with their begin and end, from left to right, none inside another.

    Raises UnusableAnswer where so much begins as an object that the search would take long.
    """
    at, left = 0, _PASSES * len(text) + _PASSES_MORE
    while beginning := _BEGINNING.search(text, at):
        start = beginning.start()
        try:
            value, at = _DECODER.raw_decode(text, start)
            left -= at - start + _PER_OBJECT
        except (ValueError, RecursionError) as error:
            value, at = None, start + 1
            # For strings without an end, long numbers and deep nesting the error's place is not how far it was read.
            known = isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated")
            left -= (error.pos if known else len(text)) - start + _PER_START + start * _PER_POSITION
        if left < 0:
            raise UnusableAnswer("answer holds no JSON object that can be told from what begins as one")
        if value is not None:
            yield value, start, at
