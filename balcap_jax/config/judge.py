"""The config group `judge` of a judge that is a model: what its strings mean, and what may be wrong with them."""

import itertools
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

# Deliberately narrow: a key that was given in place of a variable's name must not look like one.
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_WEIGHT = re.compile(r"(.*)\*([0-9.]+)", re.DOTALL)


def parse_endpoints(text: str) -> tuple[tuple[str, float], ...]:
    """ "http://a:8000/v1*2, http://b:8000/v1" -> (("http://a:8000/v1", 2.0), ("http://b:8000/v1", 1.0)).

    Raises:
      ValueError: it is no such list; the message says why and never repeats a password.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        weighted = _WEIGHT.fullmatch(part.strip())
        url, weight = (weighted[1], weighted[2]) if weighted else (part.strip(), "1")
        url = url.rstrip("/")
        try:
            parsed, _ = urllib.parse.urlsplit(url), urllib.parse.urlsplit(url).port
        except ValueError as error:
            raise ValueError(f"holds an address that is none ({error})") from error
        if parsed.username is not None or parsed.query or parsed.fragment:
            raise ValueError("must hold no key, password or query; name the key's variable in judge.api_key_env")
        if "*" in url:
            raise ValueError(f"gives a weight that is no number; write URL*2, got {url!r}")
        if parsed.scheme not in ("http", "https") or not parsed.hostname or any(c.isspace() for c in url):
            raise ValueError(f"must hold URLs such as http://localhost:8000/v1, got {url!r}")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0.001 <= value <= 1000:
            raise ValueError(f"gives {url} the weight {weight}; weights are within 0.001 and 1000")
        if url in found:
            raise ValueError(f"names {url} twice")
        found[url] = value
    return tuple(found.items())


def problems(judge: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the group, one line each."""
    try:
        parse_endpoints(judge["endpoints"])
    except ValueError as error:
        yield f"config field 'judge.endpoints' {error}"
    if judge["api_key_env"] and not _VARIABLE.fullmatch(judge["api_key_env"]):
        yield (
            "config field 'judge.api_key_env' must be the name of an environment variable in capitals, such as "
            "OPENAI_API_KEY; it is not shown here, in case it is a key, which belongs into that variable"
        )
    if judge["model"] != judge["model"].strip():
        yield f"config field 'judge.model' has blanks around it, got {judge['model']!r}"
    if judge["timeout"] > judge["deadline"]:
        yield (
            f"config field 'judge.timeout' ({judge['timeout']:g} s of one request) is more than judge.deadline "
            f"({judge['deadline']:g} s, all retries included)"
        )
    if judge["max_cost"] and not (judge["price_in"] or judge["price_out"]):
        yield "config field 'judge.max_cost' needs prices: set judge.price_in and judge.price_out"


def policy_problems(judge: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the group of a judge on the mesh, one line each."""
    if not judge["path"]:
        yield "config field 'judge.path' is empty: the judge 'policy' needs the directory of its model"
    if any(a >= b for a, b in itertools.pairwise(judge["prompt_buckets"])):
        yield f"config field 'judge.prompt_buckets' must be ascending, got {judge['prompt_buckets']}"
