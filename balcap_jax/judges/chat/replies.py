"""Reads the bytes of an HTTP answer: a model's text, or an error, whatever its status says."""

import dataclasses
import datetime
import email.utils
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from balcap_jax.judges.chat.keys import without_key

ERROR_BYTES = 20_000  # of an error's body that are read
_LONGEST_WAIT = 3600.0  # seconds; a server that asks for more is asked again after an hour
_CHARACTERS_PER_TOKEN = 4
_LAYERS = 4  # encodings of one body that are read
_PIECE = 4096  # bytes that are unpacked at a time
CUT_OFF = "answer cut off at max_tokens"
_SECONDS = re.compile(r"(\d{1,12}(?:\.\d*)?)\s*(?:s|secs?|seconds?)?\s*(?:,|\Z)", re.IGNORECASE)
# Of errors that come with a status of success, and name no number.
_NAMED = (
    (429, r"rate.?limit|too.?many.?requests|resource.?exhausted|quota"),
    (401, r"authenticat|unauthori[sz]ed|(invalid|incorrect|missing|wrong).{0,20}\bkey"),
    (403, r"permission|forbidden"),
    (404, r"model.{0,60}not.?(found|exist)|not_found"),
    (503, r"overload|unavailable|capacity"),
    (400, r"invalid.?request|bad.?request|invalid.?argument"),
)
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thoughts")
_TOOLS = ("tool_calls", "function_call")
_TEXTS = ("text", "output_text")  # types of a message's parts
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length")


@dataclasses.dataclass(eq=False)
class CallError(Exception):
    """A request that gave no answer. `reason` is short and names a kind of failure, `detail` is the server's text.

    kind: "busy" (asked to come back), "server" (may go better the next time), "answer" (no usable answer; the same),
    "question" (this question is refused), "endpoint" (any question is: its key, its model).
    retry_after: seconds that the server asks to wait. status: of HTTP, or of the error in the body; 0 = there is none.
    remedy: what to do about it, where only this kind of error knows.
    """

    url: str
    reason: str
    kind: str = "server"
    detail: str = ""
    retry_after: float = 0.0
    status: int = 0
    remedy: str = ""

    @property
    def asks_to_wait(self) -> bool:
        return self.kind == "busy" or self.retry_after > 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """The text of a model, and the tokens of question and answer (estimated where the server does not count them).

    `problem` says why the text is of no use, "" = it may be; its tokens were paid for all the same. `cut`: it ended at
    max_tokens. `remedy`: what to do where all answers are as empty as this one, "" = it is not empty.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    problem: str = ""
    detail: str = ""
    cut: bool = False
    remedy: str = ""


# ---- answers --------------------------------------------------------------------------------------------------------


def reply_of(url: str, headers: Mapping[str, str], content: bytes, estimate: int, key: str, status: int = 200) -> Reply:
    """The reply in the body of an answer; `estimate` is about the tokens of the question.

    Raises CallError for an error in its place, and for what is no chat completion.
    """
    if not is_success(status):
        raise error_of(url, status, headers, content)
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        encoding = headers.get("content-encoding", "").strip().lower()
        reason = f"answer in the encoding {encoding!r}, which is not read here"
        if encoding in ("", "identity", "gzip", "x-gzip", "deflate"):
            reason = "answer is no chat completion"
        raise CallError(url, reason, "answer") from error
    if (body_error := _error_in(tree)) is not None:
        raise _error(url, status, headers, body_error)
    try:
        choice = tree["choices"][0]
        message = choice["message"]
        parts = list(_parts_of(message.get("content")))
        refusal, finish = message.get("refusal"), choice.get("finish_reason")
        usage = tree.get("usage") or {}
    except (LookupError, TypeError, AttributeError) as error:
        raise CallError(url, "answer is no chat completion", "answer") from error
    text = without_key("".join(text for kind, text in parts if kind in _TEXTS), key)
    refusal = refusal or "".join(text for kind, text in parts if kind == "refusal")
    cut = isinstance(finish, str) and finish.lower() in _CUT
    problem = remedy = ""
    if refusal:
        problem = "model refuses to answer"
    elif finish == "content_filter":
        problem = "answer was filtered"
    elif not text.strip():
        problem, remedy = (CUT_OFF, "") if cut else _empty(message, parts)
    tokens_in = _count(usage, "prompt_tokens", estimate)
    tokens_out = _count(usage, "completion_tokens", tokens_of(len(text)))
    return Reply(text, tokens_in, tokens_out, problem, str(refusal or ""), cut, remedy)


def _parts_of(content: Any) -> Iterator[tuple[str, str]]:
    """(type, text) of the parts of a message's content: a text, or a list of parts."""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            yield "text", part
        elif isinstance(part, dict):
            kind = str(part.get("type", "text"))
            text = part.get("refusal" if kind == "refusal" else "text")
            text = text.get("value") if isinstance(text, dict) else text
            yield kind, text if isinstance(text, str) else ""


def _empty(message: Mapping[str, Any], parts: list[tuple[str, str]]) -> tuple[str, str]:
    """(what is wrong with a message without text, what to do where all are like that)"""
    for names, remedy in (
        (_REASONING, "start it without a reasoning parser, or turn the model's thinking off"),
        (_TOOLS, "start it without a parser of tool calls, or name another judge.model"),
    ):
        if name := next((name for name in names if message.get(name)), ""):
            return f"empty answer beside {name}", remedy
    if others := sorted({kind for kind, _ in parts} - {*_TEXTS}):
        return f"empty answer beside parts of type {others[0][:40]}", "turn the model's thinking off"
    return "empty answer", "look at its chat template, or name another judge.model"


def is_success(status: int) -> bool:
    """Of HTTP: gateways answer 201 and others too."""
    return 200 <= status < 300


def tokens_of(characters: int) -> int:
    return -(-characters // _CHARACTERS_PER_TOKEN)


def _count(usage: Any, name: str, estimate: int) -> int:
    number = usage.get(name) if isinstance(usage, dict) else None
    known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31
    return number if known else estimate


def inflated(body: bytes, encodings: str, limit: int) -> bytes:
    """The body without gzip or deflate, at most `limit` + 1 bytes of it.

    The first bytes show gzip that no header names; a body that is not packed in spite of its header stays as it is.
    Other encodings stay, and so does what is packed more than `_LAYERS` times.
    """
    for encoding in [*encodings.lower().split(",")[: -_LAYERS - 1 : -1], ""]:
        if body[:2] == b"\x1f\x8b":
            packed, body = body, _unpacked(body, 31, limit)
            if body in (b"", packed):  # The next pass would find the same.
                return packed
        elif encoding.strip() == "deflate":  # The standard has a head, some servers leave it out.
            body = _unpacked(body, 15, limit) or _unpacked(body, -15, limit) or body
    return body


def _unpacked(body: bytes, bits: int, limit: int) -> bytes:
    """As much of it as can be read, b"" = nothing."""
    unpacked, at, member_start = bytearray(), 0, 0
    decoder = zlib.decompressobj(bits)
    while at < len(body) and len(unpacked) <= limit:
        piece = body[at : at + _PIECE]  # Each member's end copies what follows it: of the whole body that takes long.
        try:
            unpacked += decoder.decompress(piece, limit + 1 - len(unpacked))
        except zlib.error:
            del unpacked[member_start:]
            break
        at += len(piece) - len(decoder.unused_data)
        if decoder.eof:
            decoder, member_start = zlib.decompressobj(bits), len(unpacked)
    return bytes(unpacked)


# ---- errors ---------------------------------------------------------------------------------------------------------


def error_of(url: str, status: int, headers: Mapping[str, str], content: bytes) -> CallError:
    """The error of an answer with an error's status, or with an error in its body."""
    text = content[:ERROR_BYTES].decode(errors="replace")
    try:
        body_error = _error_in(json.loads(text))
    except (ValueError, RecursionError):
        body_error = None
    return _error(url, status, headers, {"message": text} if body_error is None else body_error)


def _error_in(tree: Any) -> dict[str, Any] | None:
    """The error that a body holds in place of a completion, in OpenAI's form; None = it holds none."""
    tree = tree[0] if isinstance(tree, list) and tree else tree
    if not isinstance(tree, dict):
        return None
    choices = tree.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = tree.get("error") or tree.get("errors") or first.get("error")
    if not error and choices:
        return {"message": "the answer ended with an error"} if first.get("finish_reason") == "error" else None
    if not error and not ("choices" in tree or {"message", "detail"} & tree.keys()):
        return None
    error = error or tree.get("message") or tree.get("detail") or "no choices in the answer"
    error = error[0] if isinstance(error, list) else error
    for _ in range(4):  # Proxies wrap the errors of other servers.
        if isinstance(error, dict) and isinstance(error.get("error"), dict | str) and error["error"]:
            inner = error["error"] if isinstance(error["error"], dict) else {"message": error["error"]}
            error = {name: value for name, value in error.items() if name != "error"} | inner
    around = {name: tree[name] for name in ("code", "status", "status_code", "type") if name in tree}
    return around | (error if isinstance(error, dict) else {"message": str(error)})


def _error(url: str, status: int, headers: Mapping[str, str], body: Mapping[str, Any]) -> CallError:
    """`body` is the error in OpenAI's form."""
    reason = f"HTTP {status}"
    if is_success(status):
        status = _status_in(body)
        reason += f" with error {status}" if status else " with an error"
    if status in (401, 402, 403, 404, 405) or 300 <= status < 400:
        kind = "endpoint"
    elif status == 429:  # No waiting brings money.
        kind = "endpoint" if "insufficient_quota" in str(body) else "busy"
    elif status >= 500 or status in (0, 408, 409, 425):
        kind = "server"
    else:
        kind = "question"
    texts = (body.get(name) for name in ("message", "detail"))
    detail = next((text for text in texts if isinstance(text, str)), None)
    detail = json.dumps(body) if detail is None else detail
    code = body.get("code")
    detail += f" {code}" if isinstance(code, str) else ""
    metadata = body.get("metadata")
    inner = metadata.get("headers") if isinstance(metadata, dict) else None
    more = {"retry-after": body.get("retry_after")} | (inner if isinstance(inner, dict) else {})
    more = {str(name).lower(): str(value) for name, value in more.items() if isinstance(value, str | int | float)}
    wait = retry_after(headers) or retry_after(more)
    return CallError(url, reason, kind, detail=detail, retry_after=wait, status=status)


def _status_in(body: Mapping[str, Any]) -> int:
    """The status of HTTP that an error in a body stands for; 0 where it names none."""
    values = [body.get(name) for name in ("code", "status", "status_code", "http_code", "type")]
    for value in values:
        if isinstance(value, int | str) and re.fullmatch(r"[45]\d\d", str(value).strip()):
            return int(value)
    names = " ".join(value for value in values if isinstance(value, str))
    for text in (names, str(body.get("message", ""))[:1000]):
        for status, pattern in _NAMED:
            if re.search(pattern, text, re.IGNORECASE):
                return status
    return 0


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, by the header's number or date; 0 where it names none.

    A date is read against the answer's own Date: a server's clock may be off.
    """
    value = headers.get("retry-after", "").strip()
    for text, unit in ((headers.get("retry-after-ms", "").strip(), 1e-3), (value, 1.0)):
        if number := _SECONDS.match(text):
            return min(float(number[1]) * unit, _LONGEST_WAIT)
    until = _date(value)
    if until is None:
        return 0.0
    now = _date(headers.get("date", "")) or datetime.datetime.now(datetime.UTC)
    return min(max((until - now).total_seconds(), 0.0), _LONGEST_WAIT)


def _date(text: str) -> datetime.datetime | None:
    try:
        date = email.utils.parsedate_to_datetime(text)
        return date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
