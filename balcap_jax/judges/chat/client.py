"""Questions to language models over OpenAI-compatible chat endpoints: many at once, each with an Answer or a Failure.

This is the transport alone: the caller decides what is asked and what an answer means (`judges.chat_judge` for the
rewards' judge).

    client = ChatClient(ChatSettings(endpoints=(("http://localhost:8000/v1", 1.0),), model="judge"))
    answers = client.ask([Ask(prompt="units.v1", messages=messages, schema=Units), ...])

Requests run on an event loop in a thread of their own, so that `ask` is an ordinary call; Ctrl-C ends it.
"""

import asyncio
import collections
import contextlib
import hashlib
import json
import logging
import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2
import numpy as np

from balcap_jax.cli.errors import UserError
from balcap_jax.data.images import picture_hash
from balcap_jax.judges.chat import probe
from balcap_jax.judges.chat.cache import AnswerFile
from balcap_jax.judges.chat.endpoint import Endpoint, make_http
from balcap_jax.judges.chat.forms import Form, wire_schema
from balcap_jax.judges.chat.keys import cleaned, read_key
from balcap_jax.judges.chat.limits import SHORT_WAIT
from balcap_jax.judges.chat.parsing import UnusableAnswer, parse_answer
from balcap_jax.judges.chat.replies import CUT_OFF, CallError
from balcap_jax.judges.chat.turns import Turns
from balcap_jax.judges.chat.types import Answer, Ask, ChatSettings, data_url
from balcap_jax.judges.schema import Failure, Usage

_BEGUN_PER_SLOT = 4  # calls under way per slot: those that wait before a retry leave their slots to others
_LONGEST_BACK_OFF = 30.0  # seconds
_CLOSING = 5.0  # seconds that requests under way are given to be cancelled
_PATIENCE = 4.0  # times the usual seconds of an answer that questions wait for one which begins as they do,
_LEAST_PATIENCE = 2.0  # and these seconds at least
# An endpoint is overfull with so many times another's questions, and with its share of the slots and so many more.
_CROWDED, _SURPLUS = 3.0, 16

_log = logging.getLogger(__name__)


class ChatClient(contextlib.AbstractContextManager):
    """Asks chat endpoints; see the module. Use one per process, from one thread at a time, and `close` it."""

    def __init__(self, settings: ChatSettings, cache: AnswerFile | None = None):
        if not settings.endpoints:
            raise ValueError("a ChatClient needs at least one endpoint")
        self.settings = settings
        self.cache = cache
        self.model = settings.model
        self._key = read_key(settings.api_key_env)
        self._usage = Usage()
        self._urls: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._endpoints: list[Endpoint] = []
        self._homes: dict[str, Endpoint] = {}  # where each prefix of a batch was asked about last
        self.seconds: dict[str, float] = {}  # of an answer to each prompt, on average so far
        self._timed: collections.Counter[str] = collections.Counter()
        self._known: set[bool] = set()  # whether of questions without a picture, and of those with one
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._http: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # ---- for callers ------------------------------------------------------------------------------------------------

    def connect(self, sees: bool = False) -> None:
        """Finds out how each endpoint takes questions, by a small question to it; does nothing the second time.

        sees: there will be questions about pictures; else that is found out before the first of them.

        Raises:
          UserError: an endpoint is down, refuses the key, does not know the model, or gives no answers of use.
        """
        kinds = {False, sees}
        if not kinds <= self._known:
            self._run(self._connect, sees)
            self._known |= kinds

    def listed(self) -> dict[str, list[str]]:
        """{URL: models that its server lists} of the endpoints that list any. Raises UserError as `connect` does."""
        self.connect()

        async def look() -> list[list[str] | UserError]:
            return await asyncio.gather(*map(probe.listed_models, self._endpoints))

        found = zip(self._endpoints, self._run(look), strict=True)
        return {each.url: names for each, names in found if isinstance(names, list)}

    def ask(self, asks: Sequence[Ask]) -> list[Answer | Failure]:
        """One Answer or Failure per question, in order. The same question asked twice at once is sent once."""
        self.connect(any(ask.image is not None for ask in asks))
        keys = [self.key(ask) for ask in asks]
        unique = dict(zip(keys, asks, strict=True))
        answers = self._run(self._answer_all, unique, len(keys) - len(unique))
        return [answers[key] for key in keys]

    def key(self, ask: Ask) -> str:
        """The cache's key: everything that decides what the model answers, and nothing else.

        Endpoints stand in for each other, so that it holds the set of them, and what is left out of questions to each.
        """
        forms = [(each.url, each.forms.get(ask.image is not None, Form()), each.unknown) for each in self._endpoints]
        parts = {
            "endpoints": sorted(url.rstrip("/") for url, _ in self.settings.endpoints),
            "forms": sorted([url, form.name, sorted(form.left_out), sorted(unknown)] for url, form, unknown in forms),
            "model": self.model,
            "prompt": ask.prompt,
            "messages": [dict(message) for message in ask.messages],
            "image": "" if ask.image is None else picture_hash(ask.image),
            "schema": wire_schema(ask.schema),
            "max_tokens": ask.max_tokens,
            "temperature": self.settings.temperature,
            "seed": self.settings.seed if self.settings.temperature else 0,
            "draw": ask.draw,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def usage(self) -> Usage:
        """Questions, tokens and failures since this client was made."""
        return self._usage

    def close(self) -> None:
        """Ends requests under way and the thread. The client can't be used again."""
        if self._loop is not None:
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            with contextlib.suppress(TimeoutError):  # The thread is a daemon's and dies with the process.
                closing.result(_CLOSING)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSING)
            if not self._thread.is_alive():
                self._loop.close()
            self._loop = None
        if self.cache is not None:
            self.cache.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a coroutine function on the client's loop; an interrupted caller cancels it."""
        if self._loop is None:
            self._start()
        future = asyncio.run_coroutine_threadsafe(function(*arguments), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _start(self) -> None:
        settings, key = self.settings, self._key
        try:
            self._http = make_http(settings, key)
        except (ImportError, ValueError) as error:  # of a proxy that the environment names
            raise UserError(f"no connection to judges can be made: {error}; mend HTTP_PROXY, ALL_PROXY, ...") from error
        self._endpoints = [Endpoint(url, weight, self._http, settings, key) for url, weight in settings.endpoints]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge-client", daemon=True)
        self._thread.start()

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    async def _connect(self, sees: bool) -> None:
        if not self.model:
            self.model = await self._served_model()
        for patient in (False, True):
            errors = await asyncio.gather(*(self._find_out(each, sees, patient) for each in self._endpoints))
            waiting = {each: error for each, error in zip(self._endpoints, errors, strict=True) if error}
            if len(waiting) < len(self._endpoints):
                break
        else:
            raise probe.refusal(*next(iter(waiting.items())))
        for endpoint, error in waiting.items():
            reason = cleaned(f"{error.reason} {error.detail}", self._key)
            _log.warning("judge endpoint %s asks to wait (%s); the others are asked meanwhile", endpoint.url, reason)

    async def _served_model(self) -> str:
        """The one model that the endpoints list.

        An endpoint that lists none may still be of use: its first question shows that.
        """
        names = await asyncio.gather(*(probe.listed_model(each) for each in self._endpoints))
        known = {each.url: name for each, name in zip(self._endpoints, names, strict=True) if isinstance(name, str)}
        if not known:
            raise names[0]
        if len(set(known.values())) > 1:
            listed = ", ".join(f"{name!r} at {url}" for url, name in known.items())
            raise UserError(f"judge.model is empty, and the endpoints serve different models ({listed}); name one")
        return next(iter(known.values()))

    async def _find_out(self, endpoint: Endpoint, sees: bool, patient: bool) -> CallError | None:
        """The error by which an endpoint asks to wait; None once it is ready. Raises UserError for other errors."""
        try:
            for pictures in (False, True)[: 1 + sees]:
                await probe.ready(endpoint, self.model, pictures, patient=patient)
        except CallError as error:
            if error.asks_to_wait:
                return error
            raise probe.refusal(endpoint, error) from error
        return None

    # ---- questions --------------------------------------------------------------------------------------------------

    async def _answer_all(self, asks: Mapping[str, Ask], repeated: int) -> dict[str, Answer | Failure]:
        self._count(calls=repeated, cached=repeated)
        answers: dict[str, Answer | Failure] = {}
        room = asyncio.Semaphore(_BEGUN_PER_SLOT * self.settings.concurrency)
        turns = Turns(asks)
        self._homes.clear()

        async def answer(key: str) -> None:
            try:
                answers[key] = await self._answer(key, asks[key], turns)
            except Exception as error:  # Whatever is wrong with one question leaves the others alone, and is counted.
                answers[key] = self._failure("client", f"{type(error).__name__}: {error}")
            finally:
                room.release()
            turns.ended(key, asked=not getattr(answers[key], "cached", False))

        async with asyncio.TaskGroup() as group:
            while True:
                await room.acquire()
                if (key := await turns.next()) is None:
                    break
                group.create_task(answer(key))
        return answers

    async def _answer(self, key: str, ask: Ask, turns: Turns) -> Answer | Failure:
        stored = self.cache.get(key) if self.cache is not None else None
        if stored is not None:
            with contextlib.suppress(UnusableAnswer):  # Of an older form, or damaged: ask again.
                value = parse_answer(stored, ask.schema, ask.check)
                self._count(calls=1, cached=1)
                return Answer(value, cached=True)
        answer = await self._call(ask, lambda: turns.release(key))
        if isinstance(answer, Answer):
            self._count(calls=1)
            if self.cache is not None:
                self.cache.put(key, answer.value.model_dump_json(by_alias=True))
        return answer

    async def _call(self, ask: Ask, release: Callable[[], None]) -> Answer | Failure:
        """Sends requests until one gives a usable answer, retries or time run out, or no endpoint can give one.

        `release` lets questions that begin alike go ahead: when a request fails but is not turned away, or takes long.
        """
        loop, settings = asyncio.get_running_loop(), self.settings
        ends: float | None = None  # Waiting for one's turn uses nothing of the deadline: limits may make it long.
        errors: list[CallError] = []
        hopeless: set[str] = set()  # endpoints that can't answer this question, however often they are asked
        tries = 0

        def failure(error: CallError, ended_by: str = "") -> Failure:
            requests = f"{len(errors)} request{'' if len(errors) == 1 else 's'}"
            return self._failure(error.url, error.reason, error.detail, f" ({requests}{ended_by})")

        while True:
            try:
                endpoint = await self._choose(ask.prefix, hopeless, {error.url for error in errors[-1:]}, ends)
            except CallError as error:
                return failure(error)
            endpoint.under_way += 1
            queued = loop.time()
            try:
                await endpoint.admit(ask)
                async with self._slots:
                    if loop.time() < endpoint.breaker.asked_until:  # It asked to wait after it was chosen.
                        endpoint.breaker.abandoned()
                        continue
                    now = loop.time()
                    ends = now + settings.deadline if ends is None else ends + now - queued
                    await probe.ready(endpoint, self.model, ask.image is not None)
                    now = loop.time()
                    late = loop.call_later(self._patience(ask), release)
                    try:
                        answer = await self._request(endpoint, ask, min(settings.attempt_timeout, ends - now))
                    finally:
                        late.cancel()
                    self._took(ask, loop.time() - now)
                    return answer
            except CallError as caught:
                error = caught
                if error.kind != "busy":  # What one turns away is asked elsewhere, still before the others.
                    release()
            except BaseException:
                endpoint.breaker.abandoned()
                raise
            finally:
                endpoint.under_way -= 1
            errors.append(error)
            tries += error.kind != "busy"
            if error.kind in ("endpoint", "question"):
                hopeless.add(endpoint.url)
            if tries > settings.retries or len(hopeless) == len(self._endpoints):
                return failure(error)
            # A server that answers, if not as it should, is not overloaded.
            wait = _back_off(sum(error.kind != "answer" for error in errors))
            if error.retry_after < SHORT_WAIT:
                wait = max(wait, error.retry_after)
            if max(loop.time() + wait, self._first_asked_until(hopeless)) >= ends:
                return failure(error, f", deadline of {settings.deadline:g} s")
            await asyncio.sleep(wait)

    def _first_asked_until(self, hopeless: set[str]) -> float:
        """When the first of the endpoints that are left may be asked again, by what they asked for."""
        return min(each.breaker.asked_until for each in self._endpoints if each.url not in hopeless)

    async def _request(self, endpoint: Endpoint, ask: Ask, seconds: float) -> Answer:
        """Sends one request and parses its reply. Raises CallError."""
        reply = await endpoint.complete(self.model, ask, self._picture(ask.image), seconds)
        self._count(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
        if reply.problem and not reply.remedy:
            raise CallError(endpoint.url, reply.problem, "answer", detail=reply.detail)
        try:
            value = parse_answer(reply.text, ask.schema, ask.check, cut=reply.cut)
        except UnusableAnswer as error:
            reason = CUT_OFF if reply.cut else reply.problem or str(error)
            raise CallError(endpoint.url, reason, "answer") from error
        return Answer(value, reply.tokens_in, reply.tokens_out)

    def _patience(self, ask: Ask) -> float:
        """Seconds after which an answer is late."""
        patience = max(_PATIENCE * self.seconds.get(ask.prompt, math.inf), _LEAST_PATIENCE)
        return min(patience, self.settings.attempt_timeout / 2)

    def _took(self, ask: Ask, seconds: float) -> None:
        self._timed[ask.prompt] += 1
        usual = self.seconds.get(ask.prompt, seconds)
        # The mean of few, then one that follows what a server has become.
        self.seconds[ask.prompt] = usual + max(1 / self._timed[ask.prompt], 0.02) * (seconds - usual)

    async def _choose(self, prefix: str, hopeless: set[str], last: set[str], ends: float | None) -> Endpoint:
        """The least loaded endpoint for its weight, rather not the one that failed last; waits while all are shut.

        The one that was asked about the same `prefix` is better, unless it has to wait, or has far more to do.

        Raises CallError when none opens before `ends`, or when all have been down for longer than a whole deadline.
        """
        loop = asyncio.get_running_loop()
        left = [endpoint for endpoint in self._endpoints if endpoint.url not in hopeless]
        ends = loop.time() + self.settings.deadline if ends is None else ends
        while True:
            now = loop.time()
            if open_ones := [endpoint for endpoint in left if endpoint.breaker.may_call(now)]:
                best = min(open_ones, key=lambda each: (each.url in last, (each.under_way + 1) / each.weight))
                home = self._homes.get(prefix)
                if home in open_ones and home.url not in last and home.turn_in(now) <= best.turn_in(now) + SHORT_WAIT:
                    if self._has_room(home, best):  # Else this question alone goes elsewhere.
                        best = home
                elif prefix:
                    self._homes[prefix] = best
                best.breaker.begin(now)
                return best
            if self._first_asked_until(hopeless) >= ends:
                first = min(left, key=lambda each: each.breaker.asked_until)
                reason = f"asks to wait longer than the deadline: {first.breaker.reason}"
                raise CallError(first.url, reason, "busy", detail=first.breaker.detail)
            down = min(left, key=lambda each: each.breaker.down_for(now))
            if now >= ends or down.breaker.down_for(now) > self.settings.deadline:
                raise CallError(down.url, f"is down: {down.breaker.reason}", "endpoint", detail=down.breaker.detail)
            await asyncio.sleep(min(0.05, max(ends - now, 0.001)))

    def _has_room(self, home: Endpoint, other: Endpoint) -> bool:
        """Whether `home` has not far more to do than the least loaded endpoint."""
        share = self.settings.concurrency / sum(each.weight for each in self._endpoints)
        load, least = home.under_way / home.weight, other.under_way / other.weight
        return load <= _CROWDED * least + share + _SURPLUS / home.weight

    def _picture(self, image: np.ndarray | None) -> str:
        """The data URL; a group's captions are of one picture, so that it is encoded once for all of them."""
        if image is None:
            return ""
        name = picture_hash(image)
        url = self._urls.pop(name, None) or data_url(image)
        self._urls[name] = url
        while len(self._urls) > 2 * self.settings.concurrency:
            self._urls.popitem(last=False)
        return url

    def _failure(self, url: str, reason: str, detail: str = "", after: str = "") -> Failure:
        """Counts a question that has no answer."""
        reason = f"{url}: {cleaned(reason, self._key)}"
        self._count(calls=1, failures=collections.Counter({reason: 1}))
        return Failure(f"{reason}{f', {cleaned(detail, self._key)}' if detail else ''}{after}")

    def _count(self, **more: Any) -> None:
        self._usage = self._usage + Usage(**more)


def _back_off(failures: int) -> float:
    """Seconds before the next request: doubled with each failure; scattered, so that calls do not meet again."""
    return min(0.25 * 2 ** min(failures, 10), _LONGEST_BACK_OFF) * random.uniform(0.5, 1.0)
