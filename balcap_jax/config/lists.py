"""Fields that hold a list as one text, as it is written on a command line."""

import re
import urllib.parse

from balcap_jax.cli.errors import shown


def parse_endpoints(text: str) -> tuple[tuple[str, float], ...]:
    """ "http://a:8000/v1*2, http://b:8000/v1" -> (("http://a:8000/v1", 2.0), ("http://b:8000/v1", 1.0)).

    Raises:
      ValueError: it is no such list; the message says why and never repeats a password.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        weighted = re.fullmatch(r"(.*)\*([0-9.]+)", part.strip(), re.DOTALL)
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
        if not (re.fullmatch(r"[0-9]*\.?[0-9]*", weight) and 0.001 <= float(f"0{weight}") <= 1000):
            raise ValueError(f"gives {url} the weight {weight}; weights are within 0.001 and 1000")
        if url in weights:
            raise ValueError(f"names {url} twice")
        weights[url] = float(weight)
    return tuple(weights.items())


def parse_shares(text: str) -> dict[str, float]:
    """ "precision:0.5, recall:1" -> {"precision": 0.5, "recall": 1.0}; "" -> {}.

    Raises:
      ValueError: it is no such list, or a share is not within 0 and 1.
    """
    shares: dict[str, float] = {}
    for part in text.split(",") if text.strip() else ():
        name, _, share = part.strip().partition(":")
        if not (re.fullmatch(r"[a-z_]+", name) and re.fullmatch(r"[0-9]*\.?[0-9]+", share)):
            raise ValueError(f"must be a list such as precision:0.5,recall:1, got {shown(text)}")
        if name in shares:
            raise ValueError(f"names {name} twice")
        if not 0 < float(share) <= 1:
            raise ValueError(f"gives {name} the share {share}; shares are above 0 and at most 1")
        shares[name] = float(share)
    return shares
