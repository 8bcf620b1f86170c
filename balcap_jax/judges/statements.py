"""A caption cut into its statements by rule, for a judge that does not split it itself.

A statement is a sentence. One ends
- at a line's end,
- at a semicolon that white space follows,
- at . ! ? or their like, closing quotes and brackets after them included, where white space follows; but not at the
  full stop of an abbreviation (`_ABBREVIATIONS`, or a single letter: "e.g.", "J. Smith").
What begins a list item ("- ", "* ", "3. ", "3) ") is left out, and so is a part without a letter or digit. What a
caption says twice counts once, whatever its case and its full stop.

So a statement is coarser than the assertions that a language model writes: a sentence with one wrong detail is wrong.
"""

import re

_END = re.compile(r"(?<=[.!?…。！？])([\"'”’»)\]]*)(\s+|\Z)|;\s+|(?<=[。！？])")
_ITEM = re.compile(r"^\s*(?:[-*•–]|\d{1,3}[.)])\s+")
_SHORT = "mr mrs ms dr prof st vs approx fig inc jr sr ft cm mm km lb oz"
_ABBREVIATIONS = frozenset(_SHORT.split())
_LAST_WORD = re.compile(r"([^\W\d_]+)\.$")


def statements_of(caption: str) -> list[str]:
    """The statements of a caption, in its order; see the module."""
    found: dict[str, str] = {}
    for line in caption.splitlines():
        for sentence in _sentences(_ITEM.sub("", line)):
            if any(character.isalnum() for character in sentence):
                found.setdefault(" ".join(sentence.casefold().split()).rstrip(".!"), sentence)
    return list(found.values())


def _sentences(line: str) -> list[str]:
    parts, start = [], 0
    for end in _END.finditer(line):
        word = _LAST_WORD.search(line, start, end.start())
        if word and (len(word[1]) == 1 or word[1].casefold() in _ABBREVIATIONS) and end.end() < len(line):
            continue
        parts.append(line[start : end.end()].strip().removesuffix(";"))
        start = end.end()
    return [*parts, line[start:].strip()]
