"""The order in which the questions of a batch are begun, so that servers find beginnings of prompts in their caches.

Of questions that begin alike (`Ask.prefix`) one goes first. The others are sent when it is answered: only then has its
server surely kept what they share. Other questions are sent meanwhile.
"""

import asyncio
import collections
from collections.abc import Mapping

from balcap_jax.judges.chat.types import Ask


class Turns:
    """Whose turn it is, of `asks` {key: question}. One event loop alone calls it."""

    def __init__(self, asks: Mapping[str, Ask]):
        self._ready: collections.deque[str] = collections.deque()
        self._followers: dict[str, collections.deque[str]] = {}  # by prefix
        self._leads: dict[str, str] = {}  # the prefixes of questions that others wait for, by key
        self._left = len(asks)
        self._changed = asyncio.Event()
        for key, ask in asks.items():
            if ask.prefix in self._followers:
                self._followers[ask.prefix].append(key)
                continue
            self._ready.append(key)
            if ask.prefix:
                self._followers[ask.prefix] = collections.deque()
                self._leads[key] = ask.prefix

    async def next(self) -> str | None:
        """The key of the next question, once there is one to begin; None when all have begun."""
        if not self._left:
            return None
        while not self._ready:
            self._changed.clear()
            await self._changed.wait()
        self._left -= 1
        return self._ready.popleft()

    def ended(self, key: str, *, asked: bool) -> None:
        """A question has its answer, or failed. One that was not `asked`, but known, leaves its lead to the next."""
        if asked:
            self.release(key)
        elif (prefix := self._leads.pop(key, "")) and self._followers[prefix]:
            following = self._followers[prefix].popleft()
            self._leads[following] = prefix
            self._begin([following])

    def release(self, key: str) -> None:
        """Lets those that wait for a question begin, before all others: it is answered, or keeps them too long."""
        if prefix := self._leads.pop(key, ""):
            followers = self._followers[prefix]
            self._begin(list(followers))
            followers.clear()

    def _begin(self, keys: list[str]) -> None:
        self._ready.extendleft(reversed(keys))
        self._changed.set()
