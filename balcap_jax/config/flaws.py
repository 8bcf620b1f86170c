"""What may be wrong on purpose with the oracle judge that a run trains on, as one text: `judge.flaws`."""

import re
from collections.abc import Iterator

from balcap_jax.cli.errors import shown

FLAWS = {
    "false_accept": (0.0, 1.0),
    "length": (0.0, 10.0),
    "praise": (0.0, 1.0),
    "coarse": (2.0, 100.0),
    "picture_noise": (0.0, 10.0),
    "noise": (0.0, 10.0),
    "failed": (0.0, 1.0),
}
"""What may be wrong with a judge on purpose, and the range of its amount."""


def parse_flaws(text: str) -> dict[str, float]:
    """ "false_accept:0.2, coarse:3" -> {"false_accept": 0.2, "coarse": 3.0}; "" -> {}.

    Raises:
      ValueError: it is no such list, or an amount is out of its range.
    """
    flaws: dict[str, float] = {}
    for part in text.split(",") if text.strip() else ():
        name, _, amount = part.strip().partition(":")
        if name not in FLAWS:
            raise ValueError(f"names {shown(name)}, which is none of {', '.join(FLAWS)}")
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}", amount):
            raise ValueError(f"must be a list such as false_accept:0.2,coarse:3, got {shown(text)}")
        if name in flaws:
            raise ValueError(f"names {name} twice")
        low, high = FLAWS[name]
        if not low <= float(amount) <= high:
            raise ValueError(f"gives {name} the amount {amount}; it is within {low:g} and {high:g}")
        if name == "coarse" and float(amount) % 1:
            raise ValueError(f"gives coarse {amount} levels; they are a whole number")
        flaws[name] = float(amount)
    return flaws


def problems(
    text: str, votes: int, judge: str, failure_rate: float, max_failure_rate: float
) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) of the fields `judge.flaws` and `judge.votes`, beside those of a `judge` of that name."""
    try:
        flaws = parse_flaws(text)
    except ValueError as error:
        yield "judge.flaws", str(error)
        return
    if flaws and judge != "oracle":
        yield "judge.flaws", f"is for the oracle judge only, and judge.name is {judge!r}"
    if flaws and failure_rate:
        yield "judge.failure_rate", "is that of an oracle without flaws; write failed:RATE into judge.flaws"
    if votes > 1 and not flaws:
        yield "judge.votes", f"is {votes}, and without judge.flaws all votes are the same"
    if votes % 2 == 0:
        yield "judge.votes", f"must be odd, so that there is a majority, got {votes}"
    lost = flaws.get("failed", 0.0) ** votes
    if lost > 0 and max_failure_rate <= lost and max_failure_rate < 1:
        why = f"of which judge.max_failure_rate ({max_failure_rate:g}) stops the run; raise that"
        yield "judge.flaws", f"lets {lost:.3g} of all questions fail, {why}"
