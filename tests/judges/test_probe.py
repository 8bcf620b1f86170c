"""What the start finds out of an endpoint: what it takes is asked, what it refuses is left out, and what is of no use
is one line."""

import dataclasses
import functools
import gzip
import itertools
import json
import time
import zlib

import numpy as np
import pydantic
import pytest
from misbehaving import JudgeServer, Reply, completion, is_probe, text_of

from balcap_jax.cli.errors import UserError
from balcap_jax.judges.chat import probe
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.forms import SCHEMA, of_length
from balcap_jax.judges.chat.replies import CallError, inflated, reply_of
from balcap_jax.judges.chat.types import Answer, Ask, ChatSettings
from balcap_jax.judges.schema import Failure

IMAGE = np.zeros((30, 40, 3), np.uint8)


class Mark(pydantic.BaseModel):
    marks: list[int]


class Verdict(pydantic.BaseModel):
    mark: int = pydantic.Field(ge=1, le=5)
    letter: str = pydantic.Field(json_schema_extra={"enum": ["A", "B"]})


ANSWER = '{"marks": [3], "mark": 3, "letter": "A"}'
MESSAGES = ({"role": "system", "content": "Mark it."}, {"role": "user", "content": "A dog."})
ASKS = [Ask("m.v1", MESSAGES, of_length(Mark, 3)), Ask("v.v1", MESSAGES, Verdict)]
SEES = Ask("s.v1", MESSAGES, Verdict, image=IMAGE)


def client_of(*servers: JudgeServer, **more) -> ChatClient:
    settings = {"model": "m", "deadline": 10.0, "retries": 0} | more
    return ChatClient(ChatSettings(tuple((server.url, 1.0) for server in servers), **settings))


def right(body: dict) -> Reply:
    return Reply("text", '{"ok": [true]}' if is_probe(body) else ANSWER)


def line_of(*servers: JudgeServer, sees: bool = False, **more) -> str:
    with client_of(*servers, **more) as client, pytest.raises(UserError) as caught:
        client.connect(sees)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def answer_to():
    """What becomes of one question, whatever is set as the server's reply to it."""
    with JudgeServer(right) as server, client_of(server) as client:
        numbers = itertools.count()

        def ask(reply: Reply) -> Answer | Failure:
            server.behave = lambda body: reply
            return client.ask([dataclasses.replace(ASKS[1], draw=next(numbers))])[0]

        yield ask


# ---- what is refused ------------------------------------------------------------------------------------------------


def long_lists(body: dict) -> bool:
    """Of Bedrock and others: a list may have at least one entry, and no other length."""
    return '"minItems": 0' not in json.dumps(body) and any(f'"minItems": {n}' in json.dumps(body) for n in (2, 3))


def in_body(*words: str):
    return lambda body: any(word in json.dumps(body) for word in words)


def sees(body: dict) -> bool:
    return not isinstance(body["messages"][-1]["content"], str)


REFUSALS = {
    "ranges": (in_body('"minimum"'), {"ranges"}),
    "lengths": (in_body("Items"), {"lengths"}),
    "lengths above one": (long_lists, {"lengths"}),
    "ranges and lengths": (in_body("Items", '"maximum"'), {"lengths", "ranges"}),
    "enumerations": (in_body('"enum"'), {"enums"}),
    "no other properties": (in_body("additionalProperties"), {"extras"}),
    "system": (in_body('"system"'), {"system"}),
    "system and ranges": (in_body('"system"', '"minimum"'), {"system", "ranges"}),
    "all": (in_body('"system"', '"minimum"', "Items", "enum", "additional"), {"system", *SCHEMA}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_an_endpoint_refuses_is_left_out_of_questions_and_the_rest_is_not(name):
    refused, left_out = REFUSALS[name]
    with JudgeServer(right, refuses=lambda body: "no" if refused(body) else "") as server, client_of(server) as client:
        client.connect(sees=True)
        answers = client.ask([*ASKS, SEES])
        forms = client._endpoints[0].forms
    assert all(isinstance(answer, Answer) for answer in answers), answers
    assert forms[False] == forms[True] == ("json_schema", left_out)
    for body in server.seen:
        shown = json.dumps(body)
        assert ('"role": "system"' in shown) == ("system" not in left_out)
        assert text_of(body) == ("Mark it.\n\nA dog." if "system" in left_out else "A dog.")
        assert ("additionalProperties" in shown) == ("extras" not in left_out)
    schemas = json.dumps([body["response_format"] for body in server.seen])
    for part, word in {"ranges": '"maximum": 5', "lengths": '"maxItems": 3', "enums": '"enum"'}.items():
        assert (word in schemas) == (part not in left_out)


def test_what_is_refused_beside_a_picture_alone_is_left_out_there_alone():
    def refuses(body):
        system = any(message["role"] == "system" for message in body["messages"])
        return "Prompting with images is incompatible with system messages." if sees(body) and system else ""

    with JudgeServer(right, refuses=refuses) as server, client_of(server) as client:
        answers = client.ask([ASKS[1], SEES])
    assert all(isinstance(answer, Answer) for answer in answers), answers
    assert sorted((sees(body), text_of(body)) for body in server.seen) == [
        (False, "A dog."),
        (True, "Mark it.\n\nA dog."),
    ]


def test_a_server_that_breaks_on_the_system_role_is_asked_without():
    """llama.cpp answers 500 where a chat template raises."""

    def behave(body):
        system = any(message["role"] == "system" for message in body["messages"])
        return Reply("status", "System role not supported", status=500) if system else right(body)

    with JudgeServer(behave, probes_too=True) as server, client_of(server) as client:
        assert isinstance(client.ask([ASKS[1]])[0], Answer)
        assert client._endpoints[0].forms[False] == ("json_schema", frozenset({"system"}))


def test_each_endpoint_keeps_its_own_findings():
    one = JudgeServer(right, refuses=lambda body: "no" if '"minimum"' in json.dumps(body) else "")
    other = JudgeServer(right, forms=())
    asks = [Ask("v.v1", (MESSAGES[0], {"role": "user", "content": str(i)}), Verdict) for i in range(40)]
    with one, other, client_of(one, other) as client:
        assert all(isinstance(answer, Answer) for answer in client.ask(asks))
        assert [e.forms[False].name for e in client._endpoints] == ["json_schema", "plain"]
        assert [set(e.forms[False].left_out) for e in client._endpoints] == [{"ranges"}, set()]
    assert one.requests
    assert other.requests


def test_an_endpoint_that_takes_no_pictures_is_one_line_where_they_are_asked_about():
    def refuses(body):
        return "This model does not support image input" if sees(body) else ""

    with JudgeServer(right, refuses=refuses) as server:
        line = line_of(server, sees=True)
        assert line.startswith(f"judge endpoint {server.url} is of no use (takes no pictures: HTTP 400 This model does")
        assert "rewards.name=text" in line
        with client_of(server) as client:
            assert isinstance(client.ask(ASKS)[0], Answer)
            with pytest.raises(UserError, match="takes no pictures"):
                client.ask([SEES])


# ---- answers at the start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [600, 5000])
def test_an_answer_that_was_cut_off_says_nothing_about_the_form(needed):
    def behave(body):
        if body["max_tokens"] < needed:
            return Reply("text", "", finish="length")
        return right(body)

    with JudgeServer(behave, probes_too=True) as server, client_of(server, max_tokens=2048) as client:
        client.connect()
        assert client._endpoints[0].forms == {False: ("json_schema", frozenset())}
        assert [body["max_tokens"] for body in server.probes] == [2048]


def test_a_server_with_little_room_is_asked_for_a_shorter_answer():
    def refuses(body):
        long = body.get("max_tokens", 0) > 1000
        return "'max_tokens' is too large: 2048. The maximum context length is 1024 tokens." if long else ""

    with JudgeServer(right, refuses=refuses) as server, client_of(server) as client:
        assert isinstance(client.ask(ASKS[1:])[0], Failure), "its question has room for 1,024 tokens too"
        assert client._endpoints[0].forms == {False: ("json_schema", frozenset())}


def message_of(**message) -> Reply:
    choice = {"message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return Reply("raw", json.dumps({"choices": [choice]}).encode())


TOOL = [{"id": "x", "type": "function", "function": {"name": "answer", "arguments": ANSWER}}]
USELESS = {
    "reasoning_content": (message_of(content=None, reasoning_content=ANSWER), "without a reasoning parser"),
    "reasoning": (message_of(content="", reasoning=ANSWER), "without a reasoning parser"),
    "reasoning_details": (
        message_of(content="", reasoning_details=[{"text": ANSWER}]),
        "without a reasoning parser",
    ),
    "tool_calls": (message_of(content=None, tool_calls=TOOL), "without a parser of tool calls"),
    "function_call": (message_of(function_call=TOOL[0]["function"]), "without a parser of tool calls"),
    "empty answer": (message_of(content=""), "chat template"),
    "empty answer)": (message_of(content=[]), "chat template"),
    "parts of type thinking": (message_of(content=[{"type": "thinking", "thinking": [ANSWER]}]), "thinking off"),
}


@pytest.mark.parametrize("name", USELESS)
def test_an_endpoint_whose_answers_are_empty_is_one_line_that_says_what_to_do(name):
    reply, remedy = USELESS[name]
    with JudgeServer(lambda body: reply, probes_too=True) as server:
        line = line_of(server)
        assert len(server.probes) == 2, "each form that is taken is asked once"
    assert line.startswith(f"judge endpoint {server.url} is of no use (")
    assert name in line
    assert remedy in line


def test_a_form_with_which_answers_are_empty_is_not_taken():
    def behave(body):
        return right(body) if "response_format" not in body else message_of(content=None, reasoning_content="{}")

    with JudgeServer(behave, probes_too=True) as server, client_of(server) as client:
        assert isinstance(client.ask(ASKS[1:])[0], Answer)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": ANSWER}],
        [{"type": "output_text", "text": ANSWER[:9]}, {"type": "output_text", "text": ANSWER[9:]}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": '{"mark": 1}'}]}, {"type": "text", "text": ANSWER}],
        [{"type": "reasoning", "text": '{"mark": 1, "letter": "B"}'}, ANSWER],
        [{"text": {"value": ANSWER}, "type": "text"}, {"type": "image_url", "image_url": {"url": "x"}}, None, 5],
        {"type": "text", "text": ANSWER},
    ],
)
def test_answers_as_lists_of_parts_are_joined(answer_to, content):
    assert answer_to(message_of(content=content)).value == Verdict(mark=3, letter="A")


# ---- errors with status 200 -----------------------------------------------------------------------------------------

LIMIT = "Rate limit exceeded: 20 requests per minute"
ERRORS = {
    "busy": {"error": {"message": LIMIT, "code": 429}},
    "busy, a text": {"error": {"message": LIMIT, "code": "429"}},
    "busy, a name": {"error": {"message": LIMIT, "code": "rate_limit_exceeded"}, "choices": None},
    "busy, a line": {"error": LIMIT},
    "busy, a list": [{"error": {"message": LIMIT, "status": "RESOURCE_EXHAUSTED", "code": 429}}],
    "busy, nested": {"error": {"error": {"message": LIMIT, "type": "rate_limit_error"}}},
    "busy, around": {"object": "error", "message": LIMIT, "type": "RateLimitError", "code": 429},
    "busy, in the choice": {"choices": [{"error": {"code": 429, "message": LIMIT}, "finish_reason": "error"}]},
    "busy, beside a text": {**json.loads(completion(ANSWER)), "error": {"code": 429, "message": LIMIT}},
    "busy, errors": {"success": False, "errors": [{"code": 429, "message": LIMIT}]},
}


def error_in(body: object) -> CallError:
    with pytest.raises(CallError) as caught:
        reply_of("http://a/v1", {}, json.dumps(body).encode(), 0, "")
    return caught.value


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_body_with_status_200_is_that_error(name):
    error = error_in(ERRORS[name])
    assert (error.kind, error.status, error.reason) == ("busy", 429, "HTTP 200 with error 429")
    assert LIMIT in error.detail


@pytest.mark.parametrize("status", [201, 202, 203, 206, 299])
def test_a_completion_with_another_status_of_success_is_an_answer(answer_to, status):
    answer = answer_to(Reply("status", completion(ANSWER + " " * 30_000).decode(), status=status))
    assert answer.value == Verdict(mark=3, letter="A")
    assert "answer is no chat completion" in answer_to(Reply("status", "", status=status)).reason
    said = answer_to(Reply("status", json.dumps({"error": {"code": 502, "message": "x"}}), status=status)).reason
    assert f"HTTP {status} with error 502, x" in said
    assert "answer longer than 1048576 bytes" in answer_to(Reply("status", " " * 1_100_000, status=status)).reason


def test_an_error_429_with_status_200_waits_and_uses_up_no_retry():
    body = ERRORS["busy"]["error"] | {"metadata": {"headers": {"Retry-After": "0.5"}}}
    replies = [Reply("raw", json.dumps({"error": body}).encode()), Reply("text", ANSWER)]
    with JudgeServer(lambda _: replies[min(server.requests, 2) - 1]) as server, client_of(server) as client:
        begun = time.monotonic()
        assert isinstance(client.ask(ASKS[1:])[0], Answer)
        assert time.monotonic() - begun >= 0.5
        assert server.requests == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"choices": None}, "HTTP 200 with an error: no choices in the answer"),
        ({"choices": []}, "HTTP 200 with an error: no choices in the answer"),
        ({"error": {"code": 502, "message": "Upstream broke"}}, "HTTP 200 with error 502: Upstream broke"),
        ({"choices": [{"message": {"content": ANSWER}, "finish_reason": "error"}]}, "the answer ended with an error"),
        ({"error": {"type": "overloaded_error", "message": "Overloaded"}, "type": "error"}, "error 503: Overloaded"),
        ({"error": {"code": 400, "message": "too long"}}, "HTTP 200 with error 400: too long"),
        ({"error": {"odd": [1]}}, 'HTTP 200 with an error: {"odd": [1]}'),
        ({"error": [None]}, "HTTP 200 with an error: None"),
        ({"detail": "it broke"}, "HTTP 200 with an error: it broke"),
        ({"id": 1}, "answer is no chat completion"),
        ({"choices": [5]}, "answer is no chat completion"),
        ([], "answer is no chat completion"),
    ],
)
def test_other_errors_with_status_200(body, reason):
    error = error_in(body)
    assert reason in f"{error.reason}: {error.detail}"


def test_a_key_that_is_refused_with_status_200_is_one_line_at_the_start():
    body = {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}
    with JudgeServer(lambda _: Reply("raw", json.dumps(body).encode()), probes_too=True) as server:
        line = line_of(server)
        assert "asks for a key (HTTP 200 with error 401: Incorrect API key provided invalid_api_key)" in line
        server.models = json.dumps(body).encode()
        assert "asks for a key (HTTP 200 with error 401" in line_of(server, model="")


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "found"),
    [
        ({"data": [{"id": "a"}]}, "a"),
        ({"data": [{"id": "a"}, {"id": "a"}]}, "a"),
        ([{"id": "a", "object": "model"}], "a"),
        ({"models": [{"name": "a"}]}, "a"),
        ({"data": [{"id": "embed"}, {"id": "judge"}]}, "lists several models (embed, judge); name one"),
        ({"data": [{"id": str(i)} for i in range(20)]}, "(0, 1, 2, 3, 4, 5, 6, 7 and 12 more); name one"),
        ({"data": []}, "lists no models"),
        ({"data": None}, "lists no models"),
        ({"data": [{"id": 5}]}, "lists no models"),
        ({"data": [{"id": "a\nb"}]}, "lists no models"),
        ("a", "a"),
    ],
)
def test_the_one_model_that_is_listed_is_asked(models, found):
    with JudgeServer(right, models=json.dumps(models).encode()) as server:
        if len(found) > 1:
            assert found in line_of(server, model="")
        else:
            with client_of(server, model="") as client:
                client.connect()
                assert client.model == "a"


class Lists(JudgeServer):
    """Answers `/models` with a status of its own, or never."""

    listing = Reply("hang")

    async def _answer(self, path, headers, raw, reader, writer):
        if path.endswith("/models"):
            return await self._behave(self.listing, reader, writer)
        return await super()._answer(path, headers, raw, reader, writer)


def test_a_list_of_models_that_never_comes_is_one_line():
    with Lists(right) as server:
        line = line_of(server, model="", attempt_timeout=0.2)
    assert line.startswith(f"judge endpoint {server.url} is down (no answer within 0.2 s)")


@pytest.mark.parametrize("status", [302, 404, 429, 500, 503, 0])
def test_the_model_is_taken_from_the_endpoints_that_tell_it(status):
    with Lists(right) as one, JudgeServer(right) as other, JudgeServer(right) as third:
        one.listing = Reply("status", "no", status=status, headers="Retry-After: 60\r\n") if status else one.listing
        with client_of(one, other, third, model="", attempt_timeout=0.2) as client:
            client.connect()
            assert client.model == "the-model"
        assert one.probes
        third.models = b'{"data": [{"id": "another"}]}'
        line = line_of(one, other, third, model="", attempt_timeout=0.2)
        assert f"different models ('the-model' at {other.url}, 'another' at {third.url})" in line
        assert f"judge endpoint {one.url} " in line_of(one, model="", attempt_timeout=0.2)


def test_an_endpoint_that_is_down_is_one_line_without_a_model_too(monkeypatch):
    monkeypatch.setattr(probe, "WAIT", 0.01)
    dead = "http://127.0.0.1:9/v1"
    with JudgeServer(right) as server:
        settings = ChatSettings(((dead, 1.0), (server.url, 1.0)), "")
        with ChatClient(settings) as client, pytest.raises(UserError, match=f"judge endpoint {dead} is down"):
            client.connect()


# ---- bytes ----------------------------------------------------------------------------------------------------------


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", lambda body: gzip.compress(body[:20]) + gzip.compress(body[20:])),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("deflate, gzip", lambda body: gzip.compress(zlib.compress(body))),
        ("gzip", lambda body: body),
        ("", gzip.compress),
        ("identity", lambda body: body),
    ],
)
def test_packed_answers_are_read(answer_to, encoding, pack):
    headers = f"Content-Encoding: {encoding}\r\n" if encoding else ""
    assert isinstance(answer_to(Reply("raw", pack(completion(ANSWER)), headers=headers)), Answer)


LONG = completion(ANSWER + " " * 10_000)


def test_long_answers_in_members_are_read_beside_what_is_no_member():
    packed = b"".join(gzip.compress(LONG[i : i + 3000], 0) for i in range(0, len(LONG), 3000))
    assert inflated(packed + b"and more", "gzip", 1 << 20) == LONG
    assert inflated(gzip.compress(packed), "gzip, gzip", 1 << 20) == LONG
    assert inflated(raw_deflate(LONG), "deflate", 1 << 20) == LONG


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip, gzip", ",".join(["gzip", "deflate"] * 2000)])
def test_no_packed_answer_takes_long(encoding):
    body = gzip.compress(b"") * 52_000
    begun = time.process_time()
    assert inflated(body, encoding, 1 << 20) == body
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("encoding", "body", "reason"),
    [
        ("gzip", gzip.compress(bytes(50_000_000)), "answer longer than 1048576 bytes"),
        ("deflate", zlib.compress(bytes(50_000_000)), "answer longer than 1048576 bytes"),
        ("gzip, gzip", gzip.compress(gzip.compress(bytes(50_000_000))), "answer longer than 1048576 bytes"),
        ("gzip", b"".join([gzip.compress(bytes(9999))] * 300), "answer longer than 1048576 bytes"),
        ("gzip", gzip.compress(completion(ANSWER))[:-30], "answer is no chat completion"),
        ("gzip", gzip.compress(LONG, 0)[:-8] + bytes(8), "answer is no chat completion"),
        (
            ",".join(["gzip"] * 9),
            functools.reduce(lambda b, _: gzip.compress(b), range(9), LONG),
            "which is not read here",
        ),
        ("br", b"\x0b\x02\x80{}\x03", "answer in the encoding 'br', which is not read here"),
    ],
    ids=["gzip", "deflate", "twice", "members", "torn", "wrong sum", "in many layers", "brotli"],
)
def test_bombs_and_what_cannot_be_unpacked_are_no_answers(answer_to, encoding, body, reason):
    assert reason in answer_to(Reply("raw", body, headers=f"Content-Encoding: {encoding}\r\n")).reason
