"""Reads the key of an endpoint, and keeps it out of all that is shown or written."""

import functools
import html
import os
import re

from balcap_jax.cli.errors import UserError

_SHOWN = 160  # characters of a server's text that an error shows
# Sequences that move a terminal's cursor or colour it, begun by ESC or by its one-byte forms.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,99}[ -/]{0,9}[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]{0,999}(?:\x07|\x1b\\|\x9c)|\x1b[ -/]?."
)


def read_key(name: str) -> str:
    """The key in the environment variable `name`, "" where no name is given. Raises UserError where it is not set."""
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"the environment variable {name} (judge.api_key_env) is not set; put the judge's key there")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the environment variable {name} (judge.api_key_env) holds no key: odd characters are in it")
    return key


def without_key(text: str, key: str) -> str:
    """The text with [key] wherever the key stands, also escaped as in JSON, URLs or HTML, whole or in part."""
    return _pattern(key).sub("[key]", text) if key else text


def cleaned(text: str, key: str) -> str:
    """One line of at most 160 printable characters of a server's text, without the key that it may repeat."""
    text = _ESCAPES.sub("", text)
    text = "".join(c for c in text if c.isspace() or (c.isprintable() and c != "\N{REPLACEMENT CHARACTER}"))
    text = without_key(" ".join(text.split()), key)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


@functools.lru_cache(maxsize=8)
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile("".join(map(_spellings, key)))


def _spellings(character: str) -> str:
    """All repeats are bounded, so that no answer makes the search slow."""
    code, own = ord(character), re.escape(character)
    escaped = rf"\\{{1,16}}(?:u00|x)(?i:{code:02x})|%(?:25){{0,3}}(?i:{code:02x})"
    entity = rf"&#(?:0{{0,5}}{code}|[xX]0{{0,5}}(?i:{code:x}));"
    named = "" if html.escape(character) == character else "|" + re.escape(html.escape(character))
    slashed = "" if character.isalnum() else rf"|\\{{1,16}}{own}"
    return f"(?:{own}{slashed}|{escaped}|{entity}{named})"
