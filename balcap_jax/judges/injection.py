"""Finds by rule what in a caption speaks to its judge instead of describing a picture; a caption's detail shows it.

A flag changes no score. It shows where to look: judges are told that captions are data, and some obey them all the
same.
"""

import re
import unicodedata

_ASIDE = re.IGNORECASE | re.DOTALL
_FLAGS = {
    "instruction": (
        re.compile(
            r"\b(ignore|disregard|forget|override|skip)\b.{0,40}\b(instruction|prompt|rule|above|previous|earlier)",
            _ASIDE,
        ),
        re.compile(
            r"\byou (are|act as|must|should|have to|will) (now )?(an? |the )?"
            r"(judge|grader|evaluator|assistant|ai|model|answer|respond|output|return|give|rate|score|mark)\b",
            _ASIDE,
        ),
        re.compile(r"\b(dear|note to|attention,?) (an? |the )?(judge|grader|evaluator|assistant|ai|model)\b", _ASIDE),
        re.compile(r"^\s*(judge|grader|evaluator)\s*[:,]", re.IGNORECASE | re.MULTILINE),
        re.compile(r"\b(whatever|whichever) you are asked\b|\ball (flags|criteria|claims)\b", _ASIDE),
        re.compile(r"\bsystem (prompt|message|note|override)\b|\bnew instructions?\b", _ASIDE),
    ),
    "asks for a score": (
        re.compile(
            r"\b(give|award|assign|rate|score|mark|grade|answer|output|return|respond|reply)\b.{0,60}"
            r"\b((full|highest|maximum|perfect|top|best) (score|mark|rating|grade)s?|[0-9]+ ?(/|out of) ?[0-9]+"
            r"|clarity|fluency|coherency|scores? of)\b",
            _ASIDE,
        ),
        re.compile(
            r"\bas (verified|pointable|covered)\b|\b(verified|pointable|covered|passed) ?[:=] ?(true|1)\b", _ASIDE
        ),
        re.compile(
            r"\b(clarity|fluency|coherency)\s*[:=]\s*[0-9]|\bthe (right |correct )?answer is \(?[A-I]\b", _ASIDE
        ),
    ),
    "ready-made answer": (
        re.compile(
            r"[{,]\s*[\"'“]?(assertions|units?|why|verified|pointable|covered|clarity|fluency|coherency|scores?|pass(ed)?"
            r"|criteri(a|on)|answer|choice)"
            r"[\"'”]?\s*:",
            _ASIDE,
        ),
    ),
    "delimiter": (
        re.compile(r"</?\s*(data|caption|fact|description|reference|text|user|system|assistant)\b[^<>]{0,80}>", _ASIDE),
        re.compile(r"\bdata-[0-9a-f]{8,}|===+ ?(user|system|end)\b|\[/?INST\]|<\|[^|<>\n]{1,40}\|>", _ASIDE),
        re.compile(r"^\s*(system|assistant|user)\s*:", re.IGNORECASE | re.MULTILINE),
        re.compile(r"<(start|end)_of_turn>|\bend of (the )?(data|caption|description)\b", _ASIDE),
    ),
}


def suspicious(caption: str) -> list[str]:
    """The names of the flags in `_FLAGS` that a caption raises."""
    # Letters of another width and invisible ones between letters read the same to a model.
    plain = "".join(c for c in unicodedata.normalize("NFKC", caption) if unicodedata.category(c) != "Cf")
    return [name for name, patterns in _FLAGS.items() if any(pattern.search(plain) for pattern in patterns)]
