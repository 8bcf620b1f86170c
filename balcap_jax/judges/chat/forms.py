"""The form of a question on the wire: how a server takes its schema, and what is left out for that server."""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import pydantic

FORMS = ("json_schema", "json_object", "plain")
_LENGTHS = ("minItems", "maxItems")
_KEYWORDS = {
    "ranges": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "lengths": _LENGTHS,
    "enums": ("enum", "const"),
    "extras": ("additionalProperties",),
}
SYSTEM, SCHEMA = frozenset({"system"}), frozenset(_KEYWORDS)
"""Parts that a server may refuse: the role of the system message, and kinds of keywords in schemas."""


class Form(NamedTuple):
    """`name` is one of FORMS; `left_out` are those of SYSTEM and SCHEMA that the server does not take."""

    name: str = FORMS[0]
    left_out: frozenset[str] = frozenset()


@functools.cache
def wire_schema(schema: type[pydantic.BaseModel], left_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The JSON schema in a narrow form: nothing by reference, every property required."""
    tree = schema.model_json_schema()
    definitions = tree.pop("$defs", {})
    dropped = {"title", "description", "default"}.union(*(_KEYWORDS.get(part, ()) for part in left_out))

    def narrow(node: Any) -> Any:
        if isinstance(node, list):
            return [narrow(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return narrow(definitions[node["$ref"].rpartition("/")[2]])
        narrowed = {name: narrow(value) for name, value in node.items() if name not in dropped}
        if "properties" in node:
            narrowed["properties"] = {name: narrow(value) for name, value in node["properties"].items()}
            narrowed["required"] = list(node["properties"])
            if "additionalProperties" not in dropped:
                narrowed["additionalProperties"] = False
        return narrowed

    return narrow(tree)


@functools.cache
def of_length(schema: type[pydantic.BaseModel], count: int) -> type[pydantic.BaseModel]:
    """`schema`, an object of one list, with `count` entries as the server is asked for it.

    A server that keeps to schemas then gives that many. Other servers may give any number: the question's own check
    explains better what is wrong with it.
    """
    ((name, field),) = schema.model_fields.items()
    lengths = pydantic.Field(json_schema_extra=dict.fromkeys(_LENGTHS, count))
    entries = Annotated[field.annotation, lengths]
    return pydantic.create_model(schema.__name__, __base__=schema, **{name: (entries, ...)})


def response_format(form: Form, schema: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The part of a request's body that asks for an answer of the schema."""
    if form.name == "plain":
        return {}
    tree = wire_schema(schema, form.left_out)
    if form.name == "json_schema":  # OpenAI, vLLM, SGLang
        return {"response_format": {"type": form.name, form.name: {"name": "answer", "strict": True, "schema": tree}}}
    return {"response_format": {"type": form.name, "schema": tree}}  # the server of llama-cpp-python


def wire_messages(messages: Sequence[Mapping[str, str]], picture: str, form: Form) -> list[dict[str, Any]]:
    """The messages as they go out, with the picture (a data URL, "" = none) in the last one.

    Where the system role is refused, its text stands before that of the first other message.
    """
    wire: list[dict[str, Any]] = [dict(message) for message in messages]
    if "system" in form.left_out:
        system = [message["content"] for message in messages if message["role"] == "system"]
        wire = [message for message in wire if message["role"] != "system"]
        wire[0]["content"] = "\n\n".join((*system, wire[0]["content"]))
    if picture:
        image = {"type": "image_url", "image_url": {"url": picture}}
        wire[-1]["content"] = [image, {"type": "text", "text": wire[-1]["content"]}]
    return wire
