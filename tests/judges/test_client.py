"""The chat client against an endpoint that misbehaves: nothing lost, nothing mixed up, each failure with its reason."""

import collections
import contextlib
import ctypes
import gc
import json
import random
import re
import threading
import time
import tracemalloc

import numpy as np
import psutil
import pydantic
import pytest
from misbehaving import HANG, JudgeServer, Reply, completion, digest, is_probe, text_of

from balcap_jax.cli.errors import UserError
from balcap_jax.judges.chat import probe
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.forms import of_length
from balcap_jax.judges.chat.limits import Breaker, Pace
from balcap_jax.judges.chat.replies import retry_after
from balcap_jax.judges.chat.types import Answer, Ask, ChatSettings
from balcap_jax.judges.schema import Failure


class Number(pydantic.BaseModel):
    number: int = pydantic.Field(ge=0, le=100_000)


class Numbers(pydantic.BaseModel):
    numbers: list[int]


def ask_for(number: int, **more) -> Ask:
    return Ask("number.v1", ({"role": "user", "content": str(number)},), Number, max_tokens=64, **more)


def client_of(*servers: JudgeServer, **more) -> ChatClient:
    settings = {"deadline": 20.0, "attempt_timeout": 5.0, "concurrency": 8} | more
    return ChatClient(ChatSettings(tuple((server.url, 1.0) for server in servers), "m", **settings))


def said(body: dict) -> str:
    return json.dumps({"number": int(text_of(body))})


def one_answer(behave, **more) -> tuple[Answer | Failure, JudgeServer]:
    with JudgeServer(behave) as server, client_of(server, **more) as client:
        return client.ask([ask_for(7)])[0], server


# ---- faults ---------------------------------------------------------------------------------------------------------

FAULTS = {
    "429": (lambda body: Reply("status", "busy", status=429), "HTTP 429"),
    "429 and when": (lambda body: Reply("status", "busy", status=429, headers="Retry-After: 0.2\r\n"), "HTTP 429"),
    "500": (lambda body: Reply("status", "<h1>oh</h1>", status=500), "HTTP 500"),
    "hang": (lambda body: Reply("hang"), "no answer within"),
    "cut": (lambda body: Reply("cut", said(body)), "connection broke (RemoteProtocolError)"),
    "drip": (lambda body: Reply("drip", said(body)), "no answer within"),
    "wrong JSON": (lambda body: Reply("text", '{"numbre": 7}'), "does not fit the schema (number: missing)"),
    "no JSON": (lambda body: Reply("text", "It is seven."), "answer holds no JSON object"),
    "empty": (lambda body: Reply("text", ""), "empty answer"),
    "null": (lambda body: Reply("text", None), "empty answer"),
    "refusal": (lambda body: Reply("text", None, refusal="I cannot help with that"), "model refuses to answer"),
    "filtered": (lambda body: Reply("text", said(body), finish="content_filter"), "answer was filtered"),
    "too long": (lambda body: Reply("text", said(body)[:-2], finish="length"), "answer cut off at max_tokens"),
    "HTML": (lambda body: Reply("raw", b"<html>502 Bad Gateway</html>"), "answer is no chat completion"),
    "5 MB": (lambda body: Reply("raw", completion("x" * 5_000_000)), "answer longer than 1048576 bytes"),
    "out of range": (lambda body: Reply("text", '{"number": 100001}'), "(number: less_than_equal)"),
    "deep": (lambda body: Reply("raw", b"[" * 100_000), "answer is no chat completion"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_a_failure_with_its_reason(fault):
    behave, reason = FAULTS[fault]
    # Short where the time is what runs out; elsewhere a busy machine must not look like a server that hangs.
    timeout, deadline = (0.3, 2.0) if fault in ("hang", "drip") else (10.0, 30.0)
    if fault.startswith("429"):  # No retry is used up by it: the deadline alone ends it.
        deadline = 4.0
    answer, server = one_answer(behave, retries=1, attempt_timeout=timeout, deadline=deadline)
    assert isinstance(answer, Failure)
    assert reason in answer.reason
    assert answer.reason.startswith(server.url)
    assert "\n" not in answer.reason
    assert len(answer.reason) < 400
    assert server.requests >= 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_asked_again(fault):
    behave, _ = FAULTS[fault]
    requests = []

    def once(body):
        requests.append(body)
        return behave(body) if len(requests) == 1 else Reply("text", said(body))

    answer, _ = one_answer(once, attempt_timeout=0.5 if fault in ("hang", "drip") else 10.0)
    assert answer == Answer(Number(number=7), 100, 10)
    assert len(requests) == 2


def test_a_refused_question_is_not_repeated_and_others_are_answered():
    def behave(body):
        return Reply("status", "bad picture", status=400) if text_of(body) == "3" else Reply("text", said(body))

    with JudgeServer(behave) as server, client_of(server) as client:
        answers = client.ask([ask_for(number) for number in range(8)])
        assert isinstance(answers[3], Failure)
        assert "HTTP 400, bad picture (1 request)" in answers[3].reason
        assert [answer.value.number for i, answer in enumerate(answers) if i != 3] == [0, 1, 2, 4, 5, 6, 7]
        assert client.usage().failures == {f"{server.url}: HTTP 400": 1}
        assert server.requests == 8


def test_a_check_of_the_caller_is_part_of_the_answer():
    counts = collections.Counter()

    def behave(body):
        counts[text_of(body)] += 1
        return Reply("text", json.dumps({"number": 1 if counts[text_of(body)] < 3 else 2}))

    def even(answer):
        return "" if answer.number % 2 == 0 else "an odd number"

    with JudgeServer(behave) as server, client_of(server) as client:
        assert client.ask([ask_for(5, check=even)])[0].value.number == 2
    with JudgeServer(behave) as server, client_of(server, retries=1) as client:
        assert "an odd number (2 requests)" in client.ask([ask_for(6, check=even)])[0].reason


# ---- many calls -----------------------------------------------------------------------------------------------------


def many(calls: int, concurrency: int, latency: float) -> tuple[float, int]:
    """`calls` questions of which 30% meet a fault first, each of 11 kinds as often as the others.

    -> their time as a multiple of the ideal: what the server took for all requests by how many are under way at once;
    and how many requests the server saw at once beyond `concurrency`
    """
    faults = [FAULTS[name][0] for name in FAULTS if name not in ("deep", "null", "no JSON", "filtered", "too long")]
    hopeless = {number for number in range(calls) if digest(f"hopeless {number}") % 100 == 0}
    lock, tries = threading.Lock(), collections.Counter()

    def behave(body) -> Reply:
        number = int(text_of(body))
        with lock:
            tries[number] += 1
            first = tries[number] == 1
        if number in hopeless:
            return Reply("text", '{"number": "many"}', delay=latency)
        if first and digest(f"faulty {number}") % 10 < 3:
            reply = faults[digest(f"kind {number}") % len(faults)](body)
            reply.delay = latency
            return reply
        return Reply("text", said(body), delay=latency)

    numbers = list(range(calls))
    random.Random(0).shuffle(numbers)
    timeout = 3 * latency
    with JudgeServer(behave, keep_bodies=False) as server:
        with client_of(server, concurrency=concurrency, attempt_timeout=timeout, retries=3, deadline=60.0) as client:
            client.connect()
            asks = [ask_for(number) for number in numbers]
            begun = time.monotonic()
            answers = client.ask(asks)
            seconds = time.monotonic() - begun
            for number, answer in zip(numbers, answers, strict=True):
                if number in hopeless:
                    assert isinstance(answer, Failure)
                    assert "(number: int_parsing) (4 requests)" in answer.reason
                else:
                    assert isinstance(answer, Answer), answer
                    assert answer.value.number == number
            usage = client.usage()
            assert usage.calls == calls
            assert sum(usage.failures.values()) == len(hopeless)
        assert server.most_under_way >= concurrency
        ideal = sum(server.held) / concurrency
        print(f"\n{calls} calls, {server.requests} requests: {seconds:.1f} s, {seconds / ideal:.2f} of the ideal")
        assert sum(tries.values()) == server.requests
        assert len(tries) == calls
    return seconds / ideal, server.most_under_way - concurrency


def is_prompt(ratio: float, beyond: int) -> bool:
    """A server sees a moment later that the client has given a request up, so that a few are beyond the bound."""
    return ratio < 1.3 and beyond <= 3


def test_500_calls_of_which_30_percent_are_faulty():
    """Where a try is disturbed by what else the machine does, another shows it."""
    tries = [many(500, concurrency=16, latency=0.2)]
    while not is_prompt(*tries[-1]) and len(tries) < 3:
        tries.append(many(500, concurrency=16, latency=0.2))
    assert is_prompt(*tries[-1]), tries


@pytest.mark.slow
def test_10000_calls_of_which_30_percent_are_faulty():
    """With flat memory: what grows is the answers, which the caller asked for."""

    def held() -> int:
        gc.collect()
        # What is free goes back to the system: the server of this test sends 5 MB answers from this process too.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        return psutil.Process().memory_info().rss

    assert is_prompt(*many(500, concurrency=16, latency=0.2))
    before = held()
    assert is_prompt(*many(10_000, concurrency=16, latency=0.2))
    grown = (held() - before) / 1e6
    print(f"resident memory grew by {grown:.0f} MB")
    assert grown < 30


def test_memory_is_flat_with_pictures():
    """Pictures are encoded when their turn comes, and only some at a time: 300 of 60 kB each would be 24 MB of text."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 140, 140, 3), np.uint8)
    with JudgeServer(lambda body: Reply("text", said(body)), keep_bodies=False) as server, client_of(server) as client:
        client.ask([ask_for(0, image=pixels[0])])
        tracemalloc.start()
        answers = client.ask([ask_for(number, image=pixels[number]) for number in range(1, 300)])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert [answer.value.number for answer in answers] == list(range(1, 300))
    assert most < 12e6


# ---- forms of an answer, settings, keys, models ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forms", "status", "expected"),
    [
        (("json_schema",), 400, "json_schema"),
        (("json_object",), 500, "json_object"),
        (("json_object",), 422, "json_object"),
        ((), 500, "plain"),
        ((), 400, "plain"),
    ],
)
def test_the_form_that_an_endpoint_takes_is_found(forms, status, expected):
    def behave(body):
        wrapped = f"Sure!\n```json\n{said(body)}\n```\nAnything else?" if expected == "plain" else said(body)
        return Reply("text", wrapped)

    with JudgeServer(behave, forms=forms, wrong_form=status) as server, client_of(server) as client:
        assert client.ask([ask_for(7)])[0].value.number == 7
        (body,) = server.seen
    schema = {
        "type": "object",
        "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 100_000}},
        "required": ["number"],
        "additionalProperties": False,
    }
    assert (
        body.get("response_format")
        == {
            "json_schema": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            },
            "json_object": {"type": "json_object", "schema": schema},
            "plain": None,
        }[expected]
    )


def refused_alone(form):
    """(form, whether with lengths) of the questions that find lengths to be all that is refused: all at once, nothing
    that may be refused, and then one thing after the other, of which lengths are the third."""
    return [(form, some) for some in (True, False, False, False, True, False)]


@pytest.mark.parametrize(
    ("forms", "lengths", "status", "expected"),
    [
        (("json_schema",), True, 400, [("json_schema", True)]),
        (("json_schema",), False, 400, [*refused_alone("json_schema")]),
        (
            ("json_object",),
            False,
            422,
            [*[("json_schema", some) for some in (True, False)] * 2, *refused_alone("json_object")],
        ),
        # What has no word against the question is asked once more without lengths by nobody.
        (("json_object",), True, 500, [("json_schema", True)] * 3 + [("json_object", True)]),
    ],
)
def test_lengths_of_lists_are_asked_for_where_a_server_takes_them(monkeypatch, forms, lengths, status, expected):
    monkeypatch.setattr(probe, "WAIT", 0.01)
    asked = []

    class Watching(JudgeServer):
        async def _answer(self, path, headers, raw, reader, writer):
            if is_probe(body := json.loads(raw)):
                asked.append((body["response_format"]["type"], b"minItems" in raw))
            return await super()._answer(path, headers, raw, reader, writer)

    question = Ask("numbers.v1", ask_for(7).messages, of_length(Numbers, 3))
    two = Reply("text", '{"numbers": [1, 2]}')
    server = Watching(lambda body: two, forms=forms, lengths=lengths, wrong_form=status)
    with server, client_of(server) as client:
        (answer,) = client.ask([question])
        (body,) = server.seen
    assert asked == expected
    assert answer.value.numbers == [1, 2], "what is wrong with a number of entries is for the question's check to say"
    form = body["response_format"]
    listed = {"type": "array", "items": {"type": "integer"}} | ({"minItems": 3, "maxItems": 3} if lengths else {})
    assert (form.get("json_schema") or form)["schema"]["properties"] == {"numbers": listed}


def test_settings_that_a_model_refuses_by_name_are_left_out():
    class Picky(JudgeServer):
        async def _answer(self, path, headers, raw, reader, writer):
            body = json.loads(raw)
            for name in ("max_tokens", "temperature"):
                if name in body:
                    more = "use 'max_completion_tokens' instead" if name == "max_tokens" else ""
                    message = {"error": {"message": f"Unsupported parameter: '{name}' {more}"}}
                    writer.write(b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n" % len(json.dumps(message)))
                    writer.write(json.dumps(message).encode())
                    return True
            return await super()._answer(path, headers, raw, reader, writer)

    with Picky(lambda body: Reply("text", said(body))) as server, client_of(server) as client:
        assert client.ask([ask_for(7)])[0].value.number == 7
        (body,) = server.seen
    assert body["max_completion_tokens"] == 64
    assert body["response_format"]["type"] == "json_schema"


def test_the_seed_goes_with_a_temperature():
    with JudgeServer(lambda body: Reply("text", said(body))) as server:
        with client_of(server, temperature=0.7, seed=40) as client:
            client.ask([ask_for(7), ask_for(7, draw=2)])
        with client_of(server) as client:
            client.ask([ask_for(7)])
    first, second, third = sorted(server.seen, key=lambda body: body.get("seed", 99))
    assert (first["seed"], second["seed"], first["temperature"]) == (40, 42, 0.7)
    assert "seed" not in third
    assert third["temperature"] == 0


def refused(*servers: JudgeServer, urls=(), **more) -> str:
    endpoints = tuple((url, 1.0) for url in (*[server.url for server in servers], *urls))
    with ChatClient(ChatSettings(endpoints, **({"model": "m"} | more))) as client, pytest.raises(UserError) as caught:
        client.connect()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_endpoint_that_is_down_or_refuses_the_key_is_one_line(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-right")
    monkeypatch.setenv("OTHER_KEY", "sk-wrong")
    with JudgeServer(lambda body: Reply("text", said(body)), key="sk-right") as server:
        line = refused(server)
        assert line.startswith(f"judge endpoint {server.url} asks for a key (HTTP 401: wrong key:)")
        line = refused(server, api_key_env="OTHER_KEY")
        assert line.startswith(f"judge endpoint {server.url} refuses the key in OTHER_KEY (HTTP 401: wrong key: [key])")
        with client_of(server, api_key_env="JUDGE_KEY") as client:
            assert client.ask([ask_for(7)])[0].value.number == 7
        dead = "http://127.0.0.1:9/v1"
        assert refused(server, urls=[dead], api_key_env="JUDGE_KEY").startswith(
            f"judge endpoint {dead} is down (connection refused); start it"
        )
    monkeypatch.delenv("OTHER_KEY")
    with pytest.raises(UserError, match=r"the environment variable OTHER_KEY .* is not set"):
        ChatClient(ChatSettings((("http://x/v1", 1.0),), "m", api_key_env="OTHER_KEY"))


def test_a_page_is_no_chat_endpoint():
    class Page(JudgeServer):
        async def _answer(self, path, headers, raw, reader, writer):
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 6\r\n\r\n<html>")
            return True

    with Page(lambda body: None) as server:
        assert "does not answer as a chat endpoint does (answer is no chat completion)" in refused(server)
        assert "lists no models; name one in judge.model" in refused(server, model="")


def test_the_model_is_the_one_that_is_served():
    with JudgeServer(lambda body: Reply("text", said(body))) as server:
        with client_of(server) as client:
            client.model = ""
            client.ask([ask_for(7)])
            assert client.model == "the-model"
        assert server.seen[0]["model"] == "the-model"


# ---- several endpoints, limits, time --------------------------------------------------------------------------------


def test_endpoints_share_by_weight_and_stand_in_for_each_other():
    def behave(body):
        return Reply("text", said(body), delay=0.02)

    with JudgeServer(behave) as one, JudgeServer(behave) as other:
        settings = ChatSettings(((one.url, 3.0), (other.url, 1.0)), "m", concurrency=8)
        with ChatClient(settings) as client:
            client.ask([ask_for(number) for number in range(200)])
            assert 2 < one.requests / other.requests < 4.5
            other.behave = lambda body: Reply("status", status=503)
            answers = client.ask([ask_for(number) for number in range(200, 300)])
            assert [answer.value.number for answer in answers] == list(range(200, 300))


def test_an_endpoint_that_dies_ends_a_batch_soon():
    """Neither retries of each question one after the other, nor for ever."""
    dead = False

    def behave(body):
        return Reply("status", "gone", status=503) if dead else Reply("text", said(body))

    with JudgeServer(behave) as server, client_of(server, deadline=1.0) as client:
        assert client.ask([ask_for(1)])[0].value.number == 1
        dead = True
        begun = time.monotonic()
        answers = client.ask([ask_for(number) for number in range(2, 400)])
        assert time.monotonic() - begun < 6
        assert all(isinstance(answer, Failure) for answer in answers)
        # The deadline may end in the middle of a request.
        others = [one.reason for one in answers if not re.search(r"HTTP 503|no answer within", one.reason)]
        assert not others
        assert any("HTTP 503" in answer.reason for answer in answers)
        assert server.requests < 150
        dead = False
        deadline = time.monotonic() + 10
        while isinstance(client.ask([ask_for(500)])[0], Failure):
            assert time.monotonic() < deadline


def test_the_wait_that_a_server_asks_for_is_kept():
    times = []

    def behave(body):
        times.append(time.monotonic())
        if len(times) == 1:
            return Reply("status", status=429, headers="Retry-After: 1.2\r\n")
        return Reply("text", said(body))

    answer, _ = one_answer(behave)
    assert isinstance(answer, Answer)
    assert 1.2 <= times[1] - times[0] < 2.5
    times.clear()
    begun = time.monotonic()
    answer, _ = one_answer(lambda body: Reply("status", status=429, headers="Retry-After: 3600\r\n"), deadline=5.0)
    assert "HTTP 429 (1 request, deadline of 5 s)" in answer.reason
    assert time.monotonic() - begun < 3


def waiting(body) -> Reply:
    return Reply("status", "slow down", status=429, headers="Retry-After: 60\r\n")


def with_one_that_waits(calls: int, **more) -> tuple[list, list[JudgeServer]]:
    """Answers to `calls` questions by three endpoints, the first of which always asks to wait for a minute."""
    behave = [waiting, *[lambda body: Reply("text", said(body))] * 2]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(JudgeServer(one, keep_bodies=False)) for one in behave]
        client = stack.enter_context(client_of(*servers, **more))
        return client.ask([ask_for(number) for number in range(calls)]), servers


def test_a_question_whose_endpoint_asks_to_wait_goes_to_another():
    for more in ({"retries": 0}, {"rpm": 6000}):
        answers, (busy, *others) = with_one_that_waits(100, deadline=10.0, **more)
        assert [answer.value.number for answer in answers if isinstance(answer, Answer)] == list(range(100))
        assert 1 <= busy.requests <= 8, "it is asked again before its time"
        assert min(one.requests for one in others) > 20


@pytest.mark.slow
def test_10000_questions_of_which_none_fails_while_an_endpoint_is_free():
    begun = time.monotonic()
    answers, servers = with_one_that_waits(10_000, concurrency=32, deadline=20.0)
    failed = [answer.reason for answer in answers if isinstance(answer, Failure)]
    print(f"\n{time.monotonic() - begun:.1f} s, requests {[one.requests for one in servers]}")
    assert not failed
    assert [answer.value.number for answer in answers] == list(range(10_000))


def test_an_endpoint_that_asks_to_wait_at_the_start_is_asked_later(caplog):
    busy = True

    def behave(body):
        wait = Reply("status", "slow down", status=429, headers="Retry-After: 1\r\n")
        return wait if busy else Reply("text", said(body) if not is_probe(body) else '{"ok": [true]}')

    with JudgeServer(behave, probes_too=True) as one, JudgeServer(lambda body: Reply("text", said(body))) as other:
        with client_of(one, other) as client:
            client.connect()
            assert f"judge endpoint {one.url} asks to wait (HTTP 429 slow down)" in caplog.text
            busy = False
            deadline = time.monotonic() + 10
            number = 0
            while not any(not is_probe(body) for body in one.seen):
                assert isinstance(client.ask([ask_for(number)])[0], Answer)
                number += 1
                assert time.monotonic() < deadline
        busy = True
        # Where there is no other, the start waits as long as a question would, and then says so.
        line = refused(one, deadline=0.5)
        assert line.startswith(f"judge endpoint {one.url} asks to wait (HTTP 429: slow down); start again later")


def test_questions_that_can_only_wait_too_long_fail_at_once():
    with JudgeServer(waiting) as server, client_of(server, deadline=5.0) as client:
        begun = time.monotonic()
        answers = client.ask([ask_for(number) for number in range(200)])
        assert time.monotonic() - begun < 5
        assert server.requests <= 8
    assert all("HTTP 429" in answer.reason and "slow down" in answer.reason for answer in answers)


def test_a_date_is_read_against_the_date_of_the_answer():
    ahead = {"date": "Wed, 21 Oct 2015 07:28:00 GMT", "retry-after": "Wed, 21 Oct 2015 07:28:07 GMT"}
    assert retry_after(ahead) == 7
    assert retry_after(ahead | {"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT"}) == 0
    assert retry_after(ahead | {"retry-after": "Wed, 21 Oct 2015 09:28:03 +0200"}) == 3
    assert retry_after(ahead | {"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}) == 3600
    assert 0 <= retry_after(ahead | {"date": "yesterday", "retry-after": "Wed, 21 Oct 2015 07:28:07 -0000"}) == 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("-5", 0),
        ("1e400", 0),
        ("inf", 0),
        ("9" * 12, 3600),
        ("9" * 5000, 0),
        ("1.5", 1.5),
        ("2s", 2),
        ("3, 9", 3),
        ("", 0),
        (" 4 ", 4),
        ("Wed, 99 Foo 2015", 0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0),
    ],
)
def test_odd_values_of_retry_after(value, seconds):
    assert retry_after({"retry-after": value}) == seconds


def test_retry_after_is_a_number_or_a_date():
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "soon"}) == retry_after({"retry-after": "nan"}) == retry_after({}) == 0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 57 < retry_after({"retry-after": later}) < 61


def test_requests_and_tokens_a_minute_are_kept():
    def behave(body):
        return Reply("text", said(body))

    with JudgeServer(behave) as server, client_of(server, rpm=600) as client:
        begun = time.monotonic()
        client.ask([ask_for(number) for number in range(15)])
        assert time.monotonic() - begun >= 1.4
    pace = Pace(60_000)
    assert [pace.reserve(500, 0.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    pace.correct(1000)
    assert pace.reserve(500, 0.0) == pytest.approx(2.5)
    assert Pace(0).reserve(10**9, 0.0) == 0


def test_a_retry_waits_its_turn_without_using_up_its_deadline():
    """Each fifth question fails once; with ten turns a second its second turn comes after a deadline of a second."""
    seen = collections.Counter()

    def behave(body):
        seen[text_of(body)] += 1
        fails = seen[text_of(body)] == 1 and int(text_of(body)) % 5 == 0
        return Reply("status", "once", status=500) if fails else Reply("text", said(body))

    with JudgeServer(behave) as server, client_of(server, rpm=600, deadline=1.0, attempt_timeout=1.0) as client:
        answers = client.ask([ask_for(number) for number in range(30)])
    assert [answer.value.number for answer in answers if isinstance(answer, Answer)] == list(range(30)), answers


def test_a_server_that_counts_no_tokens_is_not_charged_for_the_bytes_of_a_picture():
    picture = np.random.default_rng(0).integers(0, 256, (280, 280, 3), np.uint8)
    ask = Ask("number.v1", ({"role": "user", "content": "7"},), Number, image=picture)
    server = JudgeServer(lambda body: Reply("raw", completion('{"number": 7}', usage={})))
    with server, client_of(server) as client:
        (answer,) = client.ask([ask])
    assert answer.tokens_in == 1 + 108  # a token for each 28 x 28 pixels, and 8
    assert answer.tokens_out == 4


def test_what_is_said_of_a_question_changes_no_setting():
    """Its text may be quoted in it."""

    def behave(body):
        if text_of(body) == "1":
            return Reply("status", "this question about a seed and its temperature is too long", status=400)
        return Reply("text", said(body))

    with JudgeServer(behave) as server, client_of(server, temperature=0.5) as client:
        first, second = client.ask([ask_for(1)])[0], client.ask([ask_for(2)])[0]
    assert isinstance(first, Failure)
    assert second.value.number == 2
    assert {"temperature", "seed"} <= server.seen[-1].keys()


def test_a_proxy_is_not_asked_for_this_machine_and_a_bad_one_is_one_line(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    answer, _ = one_answer(lambda body: Reply("text", said(body)))
    assert answer.value.number == 7
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:9")
    assert "HTTP_PROXY, ALL_PROXY" in refused(urls=("http://127.0.0.1:9/v1",))


def test_a_breaker_opens_lets_one_through_and_closes():
    breaker = Breaker()
    for _ in range(8):
        assert breaker.may_call(0.0)
        breaker.begin(0.0)
        breaker.failed(0.0, "HTTP 500")
    assert not breaker.may_call(0.5)
    assert breaker.may_call(1.0)
    breaker.begin(1.0)
    assert not breaker.may_call(1.0)  # One is being tried.
    breaker.failed(1.0, "HTTP 500")
    assert not breaker.may_call(2.0)  # For twice as long.
    assert breaker.may_call(3.1)
    assert breaker.down_for(3.1) == pytest.approx(3.1)
    breaker.begin(3.1)
    breaker.succeeded()
    assert breaker.may_call(3.1)
    assert breaker.down_for(3.1) < 0


def test_a_question_asked_twice_is_sent_once():
    with JudgeServer(lambda body: Reply("text", said(body))) as server, client_of(server) as client:
        answers = client.ask([ask_for(7), ask_for(8), ask_for(7), ask_for(7, draw=1)])
        assert [answer.value.number for answer in answers] == [7, 8, 7, 7]
        assert server.requests == 3
        assert (client.usage().calls, client.usage().cached) == (4, 1)


def test_ctrl_c_ends_a_wait_at_once():
    """The signal's handler raises in the caller; what is under way is given up, and closing does not wait for it."""
    import signal

    def interrupt(*_):
        raise KeyboardInterrupt

    with JudgeServer(lambda body: Reply("hang")) as server:
        client = client_of(server, attempt_timeout=HANG, deadline=HANG)
        client.connect()
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            begun = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                client.ask([ask_for(number) for number in range(20)])
            client.close()
            assert time.monotonic() - begun < 3
        finally:
            signal.signal(signal.SIGALRM, before)
    assert not [thread for thread in threading.enumerate() if thread.name == "judge-client"]
