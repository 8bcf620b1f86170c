"""The prompts of judges: versioned files, rendered with the judged texts as delimited data.

A file is `<name>.v<version>.j2`: the system message, a line of `=== user ===`, the user message. A published version is
never edited, since cached answers and records name it: a better text is a new version.

Captions and references come from models and from the internet. `block(kind, text, code)` puts a text between two marks
that hold the code, a digest of texts of the prompt: a text cannot hold a digest of itself, so that none can end its own
block. No text of a prompt holds any of its codes.

Servers keep what they computed of a prompt's beginning. From version 2 on, questions about one picture therefore begin
alike: a constant system message; the picture, or what all its captions are compared with; then the caption and its
code. A first version holds one code of all texts (`tag`), which its system message names.
"""

import functools
import hashlib
import importlib.resources
import unicodedata
from typing import Any

import jinja2

CURRENT = {"precision": 2, "recall": 2, "linguistic": 2, "units": 1, "choice": 2, "rubric": 2, "preference": 1}
CURRENT |= {"verified": 1, "pointable": 1, "covered": 1, "passed": 1, "mark": 1, "letter": 1, "better": 1}
"""The current version of each prompt: first those answered in JSON, then those answered with one word."""

_USER = "=== user ===\n"


def name_of(prompt: str) -> str:
    """Name and version, such as "precision.v1"."""
    return f"{prompt}.v{CURRENT[prompt]}"


def render(prompt: str, **texts: Any) -> tuple[dict[str, str], ...]:
    """System and user message of a prompt.

    Args:
      prompt: a key of `CURRENT`, or name and version of a file.
      texts: what the file's variables are, strings or (nested) lists of strings; it shows them through `block`.
    """
    name = name_of(prompt) if prompt in CURRENT else prompt
    texts = {key: _printable(value) for key, value in texts.items()}
    everything = repr((name, sorted(texts.items())))
    tag = _digest(everything, everything)

    def code(*values: Any) -> str:
        return _digest(repr((name, *values)), everything)

    def block(kind: str, text: str, code: str = tag) -> str:
        return f"<data-{code} kind={kind}>\n{text}\n</data-{code}>"

    rendered = _template(name).render(**texts, block=block, code=code, tag=tag)
    system, _, user = rendered.partition(_USER)
    return {"role": "system", "content": system.strip()}, {"role": "user", "content": user.strip()}


@functools.cache
def _template(name: str) -> jinja2.Template:
    source = importlib.resources.files(__package__).joinpath(f"{name}.j2").read_text(encoding="utf-8")
    # Not escaped: a model reads this, and what ends a block is the tag.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _digest(content: str, everything: str) -> str:
    """Sixteen digits that `content` gives, and that are not in the text `everything`."""
    for salt in range(100):
        code = hashlib.sha256(f"{salt}{content}".encode()).hexdigest()[:16]
        if code not in everything:
            return code
    raise AssertionError("sixty-four bits that are in a text a hundred times over")


_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # parts of words in Persian and Hindi, and of emoji


def _printable(value: Any) -> Any:
    """Halves of surrogate pairs and control characters cannot be sent, or would end what servers read; other invisible
    characters, which could hide text from a reader, are left out."""
    if isinstance(value, str):
        return "".join(map(_shown, value.encode("utf-8", errors="replace").decode()))
    return [_printable(item) for item in value]


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t" or character in _JOINERS:
        return character
    if unicodedata.category(character) == "Cf":
        return ""
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
