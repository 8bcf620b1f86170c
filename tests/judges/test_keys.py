"""A key is in nothing that is shown or written, however a server spells it; what a server says is one plain line."""

import html
import json
import urllib.parse

import pydantic
import pytest
from misbehaving import JudgeServer, Reply

from balcap_jax.judges.chat.cache import AnswerFile
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.keys import cleaned, without_key
from balcap_jax.judges.chat.types import Ask, ChatSettings

KEYS = ['sk-"quo\\te"/+&=<x>', "sk-proj-Ab_9.~", "%41&amp;\\u0041", "abc"]


def all_escaped(key: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in key)


SPELLINGS = {
    "as it is": lambda key: key,
    "JSON": lambda key: json.dumps(key)[1:-1],
    "JSON with slashes": lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    "JSON twice": lambda key: json.dumps(json.dumps(key))[3:-3],
    "unicode": all_escaped,
    "unicode in capitals": lambda key: "".join(f"\\u{ord(c):04X}" for c in key),
    "one character": lambda key: key[:2] + all_escaped(key[2]) + key[3:],
    "unicode twice": lambda key: json.dumps(all_escaped(key))[1:-1],
    "URL": lambda key: urllib.parse.quote(key, safe=""),
    "URL, all": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "URL twice": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "HTML": html.escape,
    "HTML, all": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "hexadecimal": lambda key: "".join(f"\\x{ord(c):02x}" for c in key),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_key_is_taken_out_in_any_spelling(name, key):
    text = f"Wrong key {SPELLINGS[name](key)}, they say"
    assert without_key(text, key) == "Wrong key [key], they say"


def test_other_texts_stay():
    text = 'a "b" \\u0041 %41 &amp; sk-other'
    assert without_key(text, "sk-right") == without_key(text, "") == text


@pytest.mark.parametrize("name", ["as it is", "JSON", "JSON twice", "unicode", "URL"])
@pytest.mark.parametrize("key", KEYS[:1])
def test_no_answer_error_or_file_holds_the_key(tmp_path, monkeypatch, name, key):
    class Why(pydantic.BaseModel):
        why: str

    spelled = SPELLINGS[name](key)
    # Some are what JSON makes of the key, others stand in the text that JSON is made of.
    of_json = name in ("JSON", "JSON with slashes", "unicode", "unicode in capitals")
    quoted = f'"{spelled}"' if of_json else json.dumps(spelled)
    monkeypatch.setenv("JUDGE_KEY", key)

    def behave(body):
        if "error" in body["messages"][-1]["content"]:
            return Reply("status", f'{{"error": {{"message": {quoted}}}}}', status=400)
        return Reply("text", f'{{"why": {quoted}}}')

    asks = [Ask("w.v1", ({"role": "user", "content": text},), Why) for text in ("why", "error")]
    with JudgeServer(behave) as server:
        settings = ChatSettings(((server.url, 1.0),), "m", api_key_env="JUDGE_KEY", retries=0)
        with ChatClient(settings, AnswerFile(str(tmp_path), 1.0)) as client:
            answer, failure = client.ask(asks)
    assert answer.value.why == "[key]"
    assert "HTTP 400, [key] (1 request)" in failure.reason
    for path in tmp_path.iterdir():
        assert key.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"\x00\x01I'm \xff\xfea teapot\x7f", "I'm a teapot"),
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07text \x1b(B.", "red text ."),
        (b"one\r\ntwo\ttabs\x0b\x0c\xc2\x85three", "one two tabs three"),
        ("\x9b1mbold \u202eright to left\u2069 \u200bnothing \ue000".encode(), "bold right to left nothing"),
        (b"\x1b]0;no end", "0;no end"),
        (b"sk-\x1b[1mright", "[key]"),
        (bytes(range(256)) * 20, None),
    ],
)
def test_what_a_server_says_is_one_printable_line(monkeypatch, said, shown):
    monkeypatch.setenv("JUDGE_KEY", "sk-right")

    class Raw(JudgeServer):
        async def _behave(self, reply, reader, writer):
            writer.write(b"HTTP/1.1 418 X\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
            return True

    class Word(pydantic.BaseModel):
        word: str

    with Raw(lambda body: None) as server:
        settings = ChatSettings(((server.url, 1.0),), "m", api_key_env="JUDGE_KEY")
        with ChatClient(settings) as client:
            (answer,) = client.ask([Ask("w.v1", ({"role": "user", "content": "w"},), Word)])
    assert answer.reason.isprintable()
    assert "\N{REPLACEMENT CHARACTER}" not in answer.reason
    if shown is not None:
        assert f"HTTP 418, {shown} (1 request)" in answer.reason
    assert len(cleaned("x" * 1000, "")) == 160
