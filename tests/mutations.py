"""Damaged and odd copies of files for `test_fuzz`: changed bytes, changed words, changed structure of JSON."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

# JSON texts that stand where another value stood.
ODD = (
    *("null", "true", "false", "0", "-0", "-1", "1.5", "1e-320", "1e400", "-1e400", "NaN", "-Infinity"),
    *("9" * 19, "1" + "0" * 25, "-" + "7" * 299, "1" + "0" * 308, "3" * 400, "8" * 5000, "2147483648", "4294967297"),
    *('""', '" "', '"a\\nb"', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u2028\\u0085"', '"\\u202e\\u200b"'),
    *('"../../etc"', '"/"', '"~root"', '"-"', '"#"', '"%s{}{image}"', '"<image><image>"', '"1"', '"nan"', '"\\u0661"'),
    *('"\U0001f600"', '"e\u0301"', '"\ufeff"', '"' + "x" * 70_000 + '"', '"' + "\\n" * 3000 + '"'),
    *("[]", "{}", "[[]]", "[null]", "[1, 2]", "[true]", '{"": {}}', '{"a": [1]}', '[{"id": []}]', "[1e308, 1e308]"),
    *("[" * 90 + "]" * 90, "[" * 300 + "]" * 300, '{"a":' * 2000 + "1" + "}" * 2000, "[" * 100_000),
)
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|.', re.DOTALL)
_PLACE = "\ue000"  # holds the place of an odd text while the rest is written
_LARGEST = 200_000  # bytes of a damaged file


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A damaged copy: one to three changes of one level each."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = rng.choice((_bytes, _words, _structure, _structure))(content, rng)[:_LARGEST]
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 1, 4, 64, 4096)))
    new = rng.choice(
        (
            lambda: b"",
            lambda: rng.randbytes(end - at),
            lambda: bytes([rng.randrange(256)]),
            lambda: content[at:end] * 2,
            lambda: rng.choice(
                (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n\n", b"\x85", b"\x1b[2J")
            ),
        )
    )()
    return content[:at] if rng.random() < 0.15 else content[:at] + new + content[end:]


def _words(content: bytes, rng: random.Random) -> bytes:
    words = _TOKENS.findall(content.decode("utf-8", "surrogateescape")) or [""]
    at, other = rng.randrange(len(words)), rng.choice(words)
    words[at] = rng.choice((lambda: "", lambda: words[at] * 2, lambda: other, lambda: rng.choice(ODD)))()
    return "".join(words).encode("utf-8", "surrogateescape")


def _structure(content: bytes, rng: random.Random) -> bytes:
    """A change in a JSON text, or in a line of JSONL; of what is neither, a change of words."""
    try:
        return _changed(json.loads(content), rng)
    except (ValueError, RecursionError):
        lines = content.split(b"\n")
        at = rng.randrange(len(lines))
        try:
            lines[at] = _changed(json.loads(lines[at]), rng)
        except (ValueError, RecursionError):
            return _words(content, rng)
        if rng.random() < 0.2:
            lines.insert(at, lines[at])
        return b"\n".join(lines)


def _changed(tree: Any, rng: random.Random) -> bytes:
    root = [tree]
    places: list[tuple[Any, Any]] = []  # (object or list, key or index) of each value
    level: list[Any] = [root]
    while level:
        inside = [(one, key) for one in level for key in (list(one) if isinstance(one, dict) else range(len(one)))]
        places += inside
        level = [one[key] for one, key in inside if isinstance(one[key], dict | list)]
    holder, key = rng.choice(places)
    other_holder, other = rng.choice(places)
    odd = rng.choice(ODD)
    change = rng.choice(("odd", "odd", "odd", "delete", "swap", "wrap", "rename", "text", "twice"))
    if change == "delete" and holder is not root:
        del holder[key]
    elif change == "swap":
        holder[key] = json.loads(json.dumps(other_holder[other]))
    elif change == "wrap":
        holder[key] = rng.choice(([holder[key]], {"a": holder[key]}))
    elif change == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key} ", key.upper(), "", "a.b", "\ud800", "__metadata__", "x" * 5000))] = holder.pop(key)
    elif change == "text":
        holder[key] = json.dumps(holder[key])
    elif change == "twice" and isinstance(holder, dict):
        holder[_PLACE] = None
        written = json.dumps(root[0])
        return written.replace(json.dumps(_PLACE), json.dumps(key)).encode("utf-8", "surrogatepass")
    else:
        holder[key] = _PLACE
    return json.dumps(root[0]).replace(json.dumps(_PLACE), odd).encode("utf-8", "surrogatepass")


def in_header(content: bytes, change: Callable[[bytes], bytes], rng: random.Random) -> bytes:
    """A safetensors file whose header, which is JSON behind its length, is changed; now and then its length is not."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:end])
    length = content[:8] if rng.random() < 0.2 else len(header).to_bytes(8, "little")
    return length + header + content[end:]
