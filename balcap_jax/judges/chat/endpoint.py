"""One OpenAI-compatible endpoint: what goes to it and comes back, how often it may be asked, and whether it is up.

Servers differ in how they take a JSON schema (or not at all), and which settings they know: `judges.probe` finds out.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx2
import pydantic

from balcap_jax.judges.chat import probe
from balcap_jax.judges.chat.forms import Form, response_format, wire_messages
from balcap_jax.judges.chat.limits import Breaker, Pace
from balcap_jax.judges.chat.replies import (
    ERROR_BYTES,
    CallError,
    Reply,
    error_of,
    inflated,
    is_success,
    reply_of,
    tokens_of,
)
from balcap_jax.judges.chat.types import picture_tokens

if TYPE_CHECKING:
    from balcap_jax.judges.chat.types import Ask, ChatSettings

_CONNECT_SECONDS = 10.0


def make_http(settings: "ChatSettings", key: str) -> httpx2.AsyncClient:
    """Redirects are not followed: the key would go where nobody meant it to."""
    headers = {"Accept-Encoding": "identity"}  # A bound on the bytes read is a bound on the answer then.
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connections = settings.concurrency + len(settings.endpoints)
    # A cluster's proxy does not know this machine's own servers.
    own = {f"all://{name}": None for name in ("localhost", "127.0.0.1", "[::1]")}
    return httpx2.AsyncClient(
        headers=headers,
        mounts=own,
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),  # Each request has a time limit as a whole.
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
    )


class Endpoint:
    """`url` is the base URL, up to and with /v1; of several, one gets requests in proportion to its `weight`."""

    def __init__(self, url: str, weight: float, http: httpx2.AsyncClient, settings: "ChatSettings", key: str):
        self.url, self.weight = url.rstrip("/"), weight
        self.settings, self.key = settings, key
        self.under_way = 0  # questions that have chosen it and are not done; the client counts
        self.breaker = Breaker()
        self.forms: dict[bool, Form] = {}  # of questions without a picture and with one, as far as found out
        self.unfit: dict[bool, CallError] = {}  # what is wrong with it for such questions, where that stays
        self.unknown: set[str] = set()  # settings that this server does not take
        self.tokens_field = "max_tokens"
        self._finding_out = asyncio.Lock()
        self._http = http
        self._requests, self._tokens = Pace(settings.rpm), Pace(settings.tpm)
        self._answer_tokens = 256.0  # what answers take, on average so far

    async def ready(self, model: str, sees: bool, *, patient: bool = False) -> None:
        """Finds out how it takes questions, with a picture if it `sees`; does nothing the second time.

        patient: waits where it asks to. Raises CallError where it takes none.
        """
        if sees not in self.forms:
            async with self._finding_out:
                if sees in self.unfit:
                    raise self.unfit[sees]
                if sees not in self.forms:
                    try:
                        self.forms[sees] = await probe.detect(self, model, sees, patient)
                    except CallError as error:
                        if error.remedy:
                            self.unfit[sees] = error
                        raise

    async def admit(self, ask: "Ask") -> None:
        """Waits for the turn that the limits on requests and tokens a minute give."""
        now = asyncio.get_running_loop().time()
        wait = self._requests.reserve(1, now)
        if self.settings.tpm:
            wait = max(wait, self._tokens.reserve(self._estimate(ask), now))
        if wait > 0:
            await asyncio.sleep(wait)

    async def complete(self, model: str, ask: "Ask", picture: str) -> Reply:
        """One request; `picture` is that of the question as a data URL, "" = none. Raises CallError."""
        try:
            form, asked = self.forms[ask.image is not None], self._question_tokens(ask)
            reply = await self.post(model, ask.messages, picture, form, ask.schema, ask.max_tokens, asked, ask.draw)
        except CallError as error:
            self.note(error)
            raise
        self.breaker.succeeded()
        if self.settings.tpm:
            self._tokens.correct(reply.tokens_in + reply.tokens_out - self._estimate(ask))
            self._answer_tokens += 0.1 * (reply.tokens_out - self._answer_tokens)
        return reply

    def note(self, error: CallError) -> None:
        """Tells the breaker how a request ended."""
        if error.kind in ("answer", "question"):
            self.breaker.succeeded()
        else:
            self.breaker.failed(asyncio.get_running_loop().time(), error.reason, error.retry_after, error.detail)

    def _estimate(self, ask: "Ask") -> float:
        return self._question_tokens(ask) + self._answer_tokens

    def _question_tokens(self, ask: "Ask") -> int:
        return tokens_of(sum(len(message["content"]) for message in ask.messages)) + picture_tokens(ask.image)

    # ---- over the wire ----------------------------------------------------------------------------------------------

    async def post(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        picture: str,
        form: Form,
        schema: type[pydantic.BaseModel],
        max_tokens: int,
        asked: int,
        draw: int = 0,
    ) -> Reply:
        """`asked`: about the tokens of the messages, where the server does not count them. Raises CallError."""
        settings = self.settings
        body: dict[str, Any] = {"model": model, "messages": wire_messages(messages, picture, form)}
        body |= {self.tokens_field: max_tokens, "temperature": settings.temperature}
        if settings.temperature:
            body["seed"] = (settings.seed + draw) % 2**31
        body = {name: value for name, value in body.items() if name not in self.unknown}
        body |= response_format(form, schema)
        status, headers, content = await self.request("POST", "/chat/completions", json.dumps(body).encode())
        if not is_success(status):
            raise error_of(self.url, status, headers, content)
        return reply_of(self.url, headers, content, asked, self.key, status)

    async def request(
        self, method: str, path: str, content: bytes | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """-> (status, headers, body); of a longer answer than is allowed no more is read. Raises CallError."""
        limit = self.settings.answer_bytes
        headers = {"Content-Type": "application/json"} if content is not None else {}
        body = bytearray()
        try:
            async with self._http.stream(method, self.url + path, content=content, headers=headers) as response:
                read = limit if is_success(response.status_code) else ERROR_BYTES
                async for chunk in response.aiter_raw(65536):
                    body += chunk
                    if len(body) > read:
                        break
                # Read as it came: what is packed may be far longer than its bytes, and has the same bound.
                found = inflated(bytes(body), response.headers.get("content-encoding", ""), read)
                if is_success(response.status_code) and len(found) > limit:
                    raise CallError(self.url, f"answer longer than {limit} bytes", "answer")
                return response.status_code, response.headers, found
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise CallError(self.url, f"no usable address: {error}", "endpoint") from error
        except httpx2.ConnectError as error:
            raise CallError(self.url, _connect_reason(error)) from error
        except httpx2.ConnectTimeout as error:
            raise CallError(self.url, f"no connection within {_CONNECT_SECONDS:g} s") from error
        except (httpx2.HTTPError, OSError) as error:
            raise CallError(self.url, f"connection broke ({type(error).__name__})") from error


def _connect_reason(error: BaseException) -> str:
    said = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError) or "refused" in str(cause).lower():
            return "connection refused"
        said, cause = str(cause) or said, cause.__cause__ or cause.__context__
    return f"no connection: {said}" if "All connection attempts failed" not in said else "connection refused"
