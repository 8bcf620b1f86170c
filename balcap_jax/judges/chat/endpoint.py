"""One OpenAI-compatible endpoint: its requests and replies, how often it may be asked, and whether it is up.

Servers differ in how they take a JSON schema (or not at all), and in the settings that they know:
`judges.chat.probe` finds out.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from balcap_jax.judges.chat.forms import Form, response_format, wire_messages
from balcap_jax.judges.chat.limits import Breaker, Pace
from balcap_jax.judges.chat.replies import ERROR_BYTES, CallError, Reply, inflated, is_success, reply_of, tokens_of
from balcap_jax.judges.chat.types import Ask, ChatSettings, picture_tokens

ANSWER_BYTES = 1 << 20  # of the longest answer that is read
_CONNECT_SECONDS = 10.0


def make_http(settings: ChatSettings, key: str) -> httpx2.AsyncClient:
    """The HTTP client of all endpoints. It follows no redirects: the key would go where nobody meant it to."""
    headers = {"Accept-Encoding": "identity"}  # A bound on the bytes read is a bound on the answer then.
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connections = settings.concurrency + len(settings.endpoints)
    # A cluster's proxy does not know this machine's own servers.
    local = {f"all://{name}": None for name in ("localhost", "127.0.0.1", "[::1]")}
    return httpx2.AsyncClient(
        headers=headers,
        mounts=local,
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),  # Each request has a time limit as a whole.
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
    )


@contextlib.asynccontextmanager
async def time_limit(url: str, seconds: float, kind: str = "server") -> AsyncIterator[None]:
    """Ends one request after `seconds` with a CallError of the `kind`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise CallError(url, f"no answer within {float(f'{seconds:.3g}'):g} s", kind) from error


class Endpoint:
    """`url` is the base URL, up to and with /v1; several endpoints get requests in proportion to their `weight`."""

    def __init__(self, url: str, weight: float, http: httpx2.AsyncClient, settings: ChatSettings, key: str):
        self.url, self.weight = url.rstrip("/"), weight
        self.settings, self.key = settings, key
        self.under_way = 0  # questions that have chosen it and are not done; the client counts them
        self.breaker = Breaker()
        # What `probe.ready` finds out, by whether a question has a picture: the form, or the error that stays.
        self.forms: dict[bool, Form] = {}
        self.unfit: dict[bool, CallError] = {}
        self.unknown: set[str] = set()  # settings that this server does not take
        self.tokens_field = "max_tokens"
        self.probing = asyncio.Lock()
        self._http = http
        self._requests, self._tokens = Pace(settings.rpm), Pace(settings.tpm)
        self._answer_tokens = 256.0  # of an answer, on average so far

    def turn_in(self, now: float) -> float:
        """Seconds that the limits a minute would have a question wait."""
        return max(self._requests.waits(now), self._tokens.waits(now))

    async def admit(self, ask: Ask) -> None:
        """Waits for the turn that the limits on requests and tokens a minute give."""
        now = asyncio.get_running_loop().time()
        wait = self._requests.reserve(1, now)
        if self.settings.tpm:
            wait = max(wait, self._tokens.reserve(self._estimate(ask), now))
        if wait > 0:
            await asyncio.sleep(wait)

    async def complete(self, model: str, ask: Ask, picture: str, seconds: float) -> Reply:
        """Sends one request, and tells the breaker how it ended.

        `picture` is the question's picture as a data URL, "" = none. Raises CallError.
        """
        try:
            async with time_limit(self.url, seconds):
                reply = await self.post(model, ask, picture, self.forms[ask.image is not None])
        except CallError as error:
            self.note(error)
            raise
        self.breaker.succeeded()
        if self.settings.tpm:
            self._tokens.correct(reply.tokens_in + reply.tokens_out - self._estimate(ask))
            self._answer_tokens += 0.1 * (reply.tokens_out - self._answer_tokens)
        return reply

    def note(self, error: CallError) -> None:
        """Tells the breaker of a request that failed."""
        if error.kind in ("answer", "question"):
            self.breaker.succeeded()
        else:
            self.breaker.failed(asyncio.get_running_loop().time(), error.reason, error.retry_after, error.detail)

    def _estimate(self, ask: Ask) -> float:
        return _question_tokens(ask) + self._answer_tokens

    # ---- over the wire ----------------------------------------------------------------------------------------------

    async def post(self, model: str, ask: Ask, picture: str, form: Form) -> Reply:
        """Sends a question in the given form. Raises CallError."""
        settings = self.settings
        body: dict[str, Any] = {"model": model, "messages": wire_messages(ask.messages, picture, form)}
        body |= {self.tokens_field: ask.max_tokens, "temperature": settings.temperature}
        if settings.temperature:
            body["seed"] = (settings.seed + ask.draw) % 2**31
        body = {name: value for name, value in body.items() if name not in self.unknown}
        body |= response_format(form, ask.schema)
        status, headers, content = await self.request("POST", "/chat/completions", json.dumps(body).encode())
        return reply_of(self.url, headers, content, _question_tokens(ask), self.key, status)

    async def request(
        self, method: str, path: str, content: bytes | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """-> (status, headers, body); reads no more of an answer than is allowed. Raises CallError."""
        headers = {"Content-Type": "application/json"} if content is not None else {}
        packed = bytearray()
        try:
            async with self._http.stream(method, self.url + path, content=content, headers=headers) as response:
                limit = ANSWER_BYTES if is_success(response.status_code) else ERROR_BYTES
                async for chunk in response.aiter_raw(65536):
                    packed += chunk
                    if len(packed) > limit:
                        break
                # Packed bytes may stand for far more: what is unpacked has the same bound.
                body = inflated(bytes(packed), response.headers.get("content-encoding", ""), limit)
                if is_success(response.status_code) and len(body) > limit:
                    raise CallError(self.url, f"answer longer than {limit} bytes", "answer")
                return response.status_code, response.headers, body
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise CallError(self.url, f"no usable address: {error}", "endpoint") from error
        except httpx2.ConnectError as error:
            raise CallError(self.url, _connect_reason(error)) from error
        except httpx2.ConnectTimeout as error:
            raise CallError(self.url, f"no connection within {_CONNECT_SECONDS:g} s") from error
        except (httpx2.HTTPError, OSError) as error:
            raise CallError(self.url, f"connection broke ({type(error).__name__})") from error


def _question_tokens(ask: Ask) -> int:
    """About the tokens of a question, for limits and where the server does not count them."""
    return tokens_of(sum(len(message["content"]) for message in ask.messages)) + picture_tokens(ask.image)


def _connect_reason(error: BaseException) -> str:
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError) or "refused" in str(cause).lower():
            return "connection refused"
        text, cause = str(cause) or text, cause.__cause__ or cause.__context__
    return f"no connection: {text}" if "All connection attempts failed" not in text else "connection refused"
