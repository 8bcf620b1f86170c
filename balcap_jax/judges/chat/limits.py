"""How often an endpoint may be asked, and whether it is up."""

import math
import random

_OPENS_AFTER = 8  # failures in a row that open the breaker
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds that it stays open, doubled each time
SHORT_WAIT = 1.0  # seconds; only the question itself waits for less: a shut endpoint would leave all slots idle


class Pace:
    """At most `per_minute` units a minute, evenly spaced, so that no window of a minute sees more; 0 = no limit."""

    def __init__(self, per_minute: int):
        self._seconds = 60.0 / per_minute if per_minute else 0.0
        self._free_at = -math.inf

    def reserve(self, units: float, now: float) -> float:
        """Takes the next turn. -> seconds to wait for it"""
        start = max(self._free_at, now)
        self._free_at = start + units * self._seconds
        return start - now

    def waits(self, now: float) -> float:
        """Seconds until the next turn is free."""
        return max(self._free_at - now, 0.0)

    def correct(self, units: float) -> None:
        """Adds what a turn took beyond what was reserved; negative gives back."""
        self._free_at += units * self._seconds


class Breaker:
    """Shuts an endpoint for a while after failures in a row, then lets one request through to see whether it is up.

    It is shut as well until the time that the endpoint asks to wait for, if that is SHORT_WAIT or more: `asked_until`.
    """

    def __init__(self) -> None:
        self.reason = self.detail = ""  # of the last failure, and the server's text about it
        self.asked_until = -math.inf
        self._failures = self._pauses = 0
        self._open_until = -math.inf
        self._down_since = math.inf
        self._probing = False

    def may_call(self, now: float) -> bool:
        may_probe = now >= self._open_until and not self._probing
        return now >= self.asked_until and (self._failures < _OPENS_AFTER or may_probe)

    def begin(self, now: float) -> None:
        self._probing = self._failures >= _OPENS_AFTER

    def abandoned(self) -> None:
        self._probing = False

    def succeeded(self) -> None:
        self._failures = self._pauses = 0
        self._down_since = math.inf
        self._probing = False

    def failed(self, now: float, reason: str, retry_after: float = 0.0, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        if retry_after >= SHORT_WAIT:
            self.asked_until = max(self.asked_until, now + retry_after)
        self._down_since = min(self._down_since, now)
        self._failures += 1
        if self._failures >= _OPENS_AFTER and now >= self._open_until:  # Others that were under way add no pause.
            pause = min(_FIRST_PAUSE * 2**self._pauses, _LONGEST_PAUSE) * random.uniform(0.75, 1.0)
            self._open_until = now + pause
            self._pauses += 1
        self._probing = False

    def down_for(self, now: float) -> float:
        """Seconds since the first of the failures in a row; below 0 while there is none."""
        return now - self._down_since if self._failures >= _OPENS_AFTER else -math.inf
