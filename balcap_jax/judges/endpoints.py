"""One OpenAI-compatible endpoint: how it takes questions, how often it may be asked, and whether it is up.

Servers differ in how they take a JSON schema (or not at all), and in which settings they know. An endpoint finds that
out by itself with small questions before the first real one; see `Endpoint.detect`.
"""

import asyncio
import dataclasses
import email.utils
import functools
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import httpx2
import pydantic

from balcap_jax.errors import UserError
from balcap_jax.judges.limits import Breaker, Pace
from balcap_jax.judges.parsing import UnusableAnswer, parse_answer
from balcap_jax.judges.pictures import picture_tokens

if TYPE_CHECKING:
    from balcap_jax.judges.client import Ask, ChatSettings

_CONNECT_SECONDS = 10.0
_PROBES = 3  # requests per form that may fail by chance (a busy server, a cut connection)
_PROBE_WAIT = 0.5  # seconds before such a request is sent again
_PROBE_TOKENS = 256  # models that think before they answer need more than the answer's own few
_ERROR_BYTES = 20_000  # of an error's body that are read
_DETAIL = 160  # characters of what a server says that an error shows
_CHARACTERS_PER_TOKEN = 4
_REFUSED = (400, 422)  # HTTP statuses of a question that holds what the server does not take
_LENGTHS = ("minItems", "maxItems")

logging.getLogger("httpx2").setLevel(logging.WARNING)  # Else one line per request, where logging is on.


class CallError(Exception):
    """A request that gave no answer. `reason` is short and counts failures of a kind, `detail` is what the server said.

    kind: "busy" (asked to come back), "server" (may go better the next time), "answer" (no usable answer; the same),
    "question" (this question is refused), "endpoint" (any question is: its key, its model).
    """

    def __init__(self, url: str, reason: str, kind: str = "server", *, detail: str = "", retry_after: float = 0.0):
        super().__init__(reason)
        self.url, self.reason, self.kind, self.detail, self.retry_after = url, reason, kind, detail, retry_after
        self.status = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said, and the tokens of question and answer (estimated where the server does not count them).

    `problem` says why the text is of no use, "" = it may be; its tokens were paid for all the same.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    problem: str = ""
    detail: str = ""


# ---- keys and the HTTP client ---------------------------------------------------------------------------------------


def read_key(name: str) -> str:
    """The key in the environment variable `name`, "" where no name is given. Raises UserError where it is not set."""
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"the environment variable {name} (judge.api_key_env) is not set; put the judge's key there")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the environment variable {name} (judge.api_key_env) holds no key: odd characters are in it")
    return key


def cleaned(text: str, key: str) -> str:
    """One line of at most some 160 characters of what a server said, without the key that it may repeat."""
    text = " ".join((text.replace(key, "[key]") if key else text).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _DETAIL else f"{text[: _DETAIL - 1]}…"


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


# ---- forms of a structured answer -----------------------------------------------------------------------------------


@functools.cache
def wire_schema(schema: type[pydantic.BaseModel], lengths: bool = True) -> dict[str, Any]:
    """The JSON schema in a narrow form: nothing by reference, every property required.

    `lengths`: with the least and the most entries of lists, which not every server takes.
    """
    tree = schema.model_json_schema()
    definitions = tree.pop("$defs", {})
    left_out = ("title", "description", "default", *(() if lengths else _LENGTHS))

    def narrow(node: Any) -> Any:
        if isinstance(node, list):
            return [narrow(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return narrow(definitions[node["$ref"].rpartition("/")[2]])
        kept = {name: narrow(value) for name, value in node.items() if name not in left_out}
        if "properties" in node:
            kept["properties"] = {name: narrow(value) for name, value in node["properties"].items()}
            kept |= {"required": list(node["properties"]), "additionalProperties": False}
        return kept

    return narrow(tree)


def _response_format(form: str, schema: dict[str, Any]) -> dict[str, Any]:
    if form == "json_schema":  # OpenAI, vLLM, SGLang
        return {"response_format": {"type": form, form: {"name": "answer", "strict": True, "schema": schema}}}
    if form == "json_object":  # the server of llama-cpp-python
        return {"response_format": {"type": form, "schema": schema}}
    return {}


FORMS = ("json_schema", "json_object", "plain")


@functools.cache
def of_length(schema: type[pydantic.BaseModel], count: int) -> type[pydantic.BaseModel]:
    """`schema`, an object of one list, with `count` entries as the server is asked for it.

    A server that keeps to schemas then gives that many. Of others any number is read: what is wrong with it, the
    question's own check says better.
    """
    ((name, field),) = schema.model_fields.items()
    asked = pydantic.Field(json_schema_extra=dict.fromkeys(_LENGTHS, count))
    return pydantic.create_model(schema.__name__, __base__=schema, **{name: (Annotated[field.annotation, asked], ...)})


class _Yes(pydantic.BaseModel):
    ok: list[bool]


_Probe = of_length(_Yes, 1)  # Has all that questions' schemas have: a server that refuses lengths says so here.
_PROBE_MESSAGES = [{"role": "user", "content": 'Answer with this JSON object and nothing else: {"ok": [true]}'}]


# ---- an endpoint ----------------------------------------------------------------------------------------------------


class Endpoint:
    """`url` is the base URL, up to and with /v1; of several, one gets requests in proportion to its `weight`."""

    def __init__(self, url: str, weight: float, http: httpx2.AsyncClient, settings: "ChatSettings", key: str):
        self.url, self.weight = url.rstrip("/"), weight
        self.under_way = 0  # questions that have chosen it and are not done; the client counts
        self.breaker = Breaker()
        self.form, self.lengths = FORMS[0], True
        self._http, self._settings, self._key = http, settings, key
        self._requests, self._tokens = Pace(settings.rpm), Pace(settings.tpm)
        self._answer_tokens = 256.0  # what answers take, on average so far
        self._tokens_field = "max_tokens"
        self._unknown: set[str] = set()  # settings that this server does not take

    async def admit(self, ask: "Ask") -> None:
        """Waits for the turn that the limits on requests and tokens a minute give."""
        now = asyncio.get_running_loop().time()
        wait = self._requests.reserve(1, now)
        if self._settings.tpm:
            wait = max(wait, self._tokens.reserve(self._estimate(ask), now))
        if wait > 0:
            await asyncio.sleep(wait)

    async def complete(self, model: str, messages: Sequence[Mapping[str, Any]], ask: "Ask") -> Reply:
        """One request. Raises CallError."""
        loop = asyncio.get_running_loop()
        try:
            asked, schema = self._question_tokens(ask), wire_schema(ask.schema, self.lengths)
            reply = await self._post(model, messages, ask.max_tokens, schema, asked, ask.draw)
        except CallError as error:
            if error.kind in ("answer", "question"):
                self.breaker.succeeded()
            else:
                self.breaker.failed(loop.time(), error.reason, error.retry_after)
            raise
        self.breaker.succeeded()
        if self._settings.tpm:
            self._tokens.correct(reply.tokens_in + reply.tokens_out - self._estimate(ask))
            self._answer_tokens += 0.1 * (reply.tokens_out - self._answer_tokens)
        return reply

    def _estimate(self, ask: "Ask") -> float:
        return self._question_tokens(ask) + self._answer_tokens

    def _question_tokens(self, ask: "Ask") -> int:
        return _tokens_of(sum(len(message["content"]) for message in ask.messages)) + picture_tokens(ask.image)

    # ---- at the start -----------------------------------------------------------------------------------------------

    async def only_model(self) -> str:
        """The name of the first model that the server lists. Raises UserError."""
        try:
            status, _, body = await self._request("GET", "/models", None)
            if status != 200:
                raise self._error_of(status, {}, body)
            listed = json.loads(body)["data"]
            return str(listed[0]["id"])
        except CallError as error:
            raise self._refusal(error) from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"judge endpoint {self.url} lists no models; name one in judge.model") from error

    async def detect(self, model: str) -> None:
        """Finds the form in which this server takes a schema, and the settings it takes, by small questions.

        Raises:
          UserError: it is down, refuses the key, or does not know the model.
        """
        unfit = ""
        for self.form, self.lengths in itertools.product(FORMS, (True, False)):
            if self.form == unfit:
                continue
            try:
                reply = await self._probe(model)
                if self.form != "plain":
                    parse_answer(reply.text, _Probe)
                return
            except UnusableAnswer:
                unfit = self.form  # It takes the form and does not keep to it.
            except CallError as error:
                if self.form == "plain" or error.kind == "endpoint":
                    raise self._refusal(error) from error
                if error.status not in _REFUSED:  # No word against what the schema says.
                    unfit = self.form

    async def _probe(self, model: str) -> Reply:
        tries = 0
        while True:
            known = len(self._unknown), self._tokens_field
            try:
                async with asyncio.timeout(self._settings.attempt_timeout):
                    asked = _tokens_of(len(_PROBE_MESSAGES[0]["content"]))
                    schema = wire_schema(_Probe, self.lengths)
                    return await self._post(model, _PROBE_MESSAGES, _PROBE_TOKENS, schema, asked)
            except TimeoutError as error:
                seconds = self._settings.attempt_timeout
                raise CallError(self.url, f"no answer within {seconds:g} s", "endpoint") from error
            except CallError as error:
                if error.status in _REFUSED:
                    self._learn(error.detail)
                if (len(self._unknown), self._tokens_field) != known:
                    continue  # It said which setting it does not take.
                tries += 1
                if error.kind in ("endpoint", "question", "answer") or tries == _PROBES:
                    raise
                await asyncio.sleep(max(_PROBE_WAIT, min(error.retry_after, self._settings.deadline)))

    def _refusal(self, error: CallError) -> UserError:
        said = cleaned(error.detail, self._key)
        detail = f": {said}" if said else ""
        where, name = f"judge endpoint {self.url}", self._settings.api_key_env
        if error.status in (401, 403):
            if name:
                return UserError(f"{where} refuses the key in {name} ({error.reason}{detail}); put a valid one there")
            return UserError(
                f"{where} asks for a key ({error.reason}{detail}); put it into an environment variable and name that "
                "in judge.api_key_env"
            )
        if error.status:
            return UserError(f"{where} does not answer ({error.reason}{detail}); mend judge.endpoints or judge.model")
        if error.kind == "answer":
            return UserError(
                f"{where} does not answer as a chat endpoint does ({error.reason}); judge.endpoints holds base URLs, "
                "up to and with /v1"
            )
        return UserError(
            f"{where} is down ({error.reason}); start it (launch/judge_server.sh starts one) or mend judge.endpoints"
        )

    # ---- over the wire ----------------------------------------------------------------------------------------------

    async def _post(
        self,
        model: str,
        messages: Sequence[Mapping],
        max_tokens: int,
        schema: dict[str, Any],
        asked: int,
        draw: int = 0,
    ) -> Reply:
        """`asked`: about the tokens of the messages, where the server does not count them."""
        settings = self._settings
        body = {"model": model, "messages": list(messages), self._tokens_field: max_tokens}
        body |= {"temperature": settings.temperature}
        if settings.temperature:
            body["seed"] = (settings.seed + draw) % 2**31
        body = {name: value for name, value in body.items() if name not in self._unknown}
        body |= _response_format(self.form, schema)
        status, headers, content = await self._request("POST", "/chat/completions", json.dumps(body).encode())
        if status != 200:
            raise self._error_of(status, headers, content)
        return self._reply_of(content, asked)

    async def _request(self, method: str, path: str, content: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """-> (status, headers, body); of a longer answer than is allowed no more is read. Raises CallError."""
        limit = self._settings.answer_bytes
        headers = {"Content-Type": "application/json"} if content is not None else {}
        body = bytearray()
        try:
            async with self._http.stream(method, self.url + path, content=content, headers=headers) as response:
                read = limit if response.status_code == 200 else _ERROR_BYTES
                async for chunk in response.aiter_raw(65536):
                    body += chunk
                    if len(body) > read:
                        if response.status_code == 200:
                            raise CallError(self.url, f"answer longer than {limit} bytes", "answer")
                        break
                return response.status_code, response.headers, bytes(body)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise CallError(self.url, f"no usable address: {error}", "endpoint") from error
        except httpx2.ConnectError as error:
            raise CallError(self.url, _connect_reason(error)) from error
        except httpx2.ConnectTimeout as error:
            raise CallError(self.url, f"no connection within {_CONNECT_SECONDS:g} s") from error
        except (httpx2.HTTPError, OSError) as error:
            raise CallError(self.url, f"connection broke ({type(error).__name__})") from error

    def _error_of(self, status: int, headers: Mapping[str, str], content: bytes) -> CallError:
        if status in (401, 403, 404, 405) or 300 <= status < 400:
            kind = "endpoint"
        elif status == 429:
            kind = "busy"
        elif status >= 500 or status in (408, 409, 425):
            kind = "server"
        else:
            kind = "question"
        detail = _message_of(content)
        if kind == "busy" and "insufficient_quota" in detail:  # No waiting brings money.
            kind = "endpoint"
        error = CallError(self.url, f"HTTP {status}", kind, detail=detail, retry_after=retry_after(headers))
        error.status = status
        return error

    def _learn(self, said: str) -> None:
        """Newer hosted models refuse settings by name: the old field for the longest answer, a temperature, a seed.

        Only from what is said of a probe: what is said of a question may quote it.
        """
        if "max_completion_tokens" in said and self._tokens_field == "max_tokens":
            self._tokens_field = "max_completion_tokens"
            return
        for name in ("temperature", "seed"):
            if re.search(rf"\b{name}\b", said):
                self._unknown.add(name)

    def _reply_of(self, content: bytes, asked: int) -> Reply:
        try:
            tree = json.loads(content)
            choice = tree["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
            finish = choice.get("finish_reason")
            usage = tree.get("usage") or {}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CallError(self.url, "answer is no chat completion", "answer") from error
        text = text if isinstance(text, str) else ""
        problem = ""
        if refusal:
            problem = "model refuses to answer"
        elif finish == "content_filter":
            problem = "answer was filtered"
        elif finish == "length":
            problem = "answer cut off at max_tokens"
        if self._key:
            text = text.replace(self._key, "[key]")
        tokens_in = _count(usage, "prompt_tokens", asked)
        tokens_out = _count(usage, "completion_tokens", _tokens_of(len(text)))
        return Reply(text, tokens_in, tokens_out, problem, str(refusal or ""))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, by the header's number or date; 0 where it does not say."""
    said = headers.get("retry-after", "").strip()
    if not said:
        return 0.0
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _message_of(content: bytes) -> str:
    """What an error's body says: the message in OpenAI's form, else the beginning of the text."""
    text = content.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return f"{error['message']} {error.get('code') or ''}" if isinstance(error, dict) else str(error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return text[:_ERROR_BYTES]


def _connect_reason(error: BaseException) -> str:
    said = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError) or "refused" in str(cause).lower():
            return "connection refused"
        said, cause = str(cause) or said, cause.__cause__ or cause.__context__
    return f"no connection: {said}" if "All connection attempts failed" not in said else "connection refused"


def _tokens_of(characters: int) -> int:
    return -(-characters // _CHARACTERS_PER_TOKEN)


def _count(usage: Any, name: str, estimate: int) -> int:
    number = usage.get(name) if isinstance(usage, dict) else None
    known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31
    return number if known else estimate
