"""Random numbers that follow from texts: a question is answered alike in every run, whoever asks it when."""

import hashlib
import statistics

_RANGE = 2**64
_NORMAL = statistics.NormalDist()


def uniform(*content: str) -> float:
    """In [0, 1), from a hash of `content`: a seed and what it is drawn for."""
    return _number(content) / _RANGE


def normal(*content: str) -> float:
    """Of mean 0 and standard deviation 1, from the same hash."""
    return _NORMAL.inv_cdf((_number(content) + 0.5) / (_RANGE + 1))


def _number(content: tuple[str, ...]) -> int:
    digest = hashlib.blake2b("\x1f".join(content).encode(errors="replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")
