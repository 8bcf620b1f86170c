"""Answers on disk: found again by what decides them alone, by several processes, within a size, never a failure."""

import json
import multiprocessing
import sqlite3
import time

import numpy as np
import pydantic
import pytest
from misbehaving import JudgeServer, Reply, is_probe

from balcap_jax.cli.errors import UserError
from balcap_jax.judges.chat import cache
from balcap_jax.judges.chat.cache import AnswerFile
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.types import Ask, ChatSettings
from balcap_jax.judges.schema import Failure


class Word(pydantic.BaseModel):
    word: str


class OtherWord(pydantic.BaseModel):
    word: str
    why: str = ""


IMAGE = np.zeros((4, 4, 3), np.uint8)


def ask_of(text: str = "q", **more) -> Ask:
    given = {"prompt": "word.v1", "messages": ({"role": "user", "content": text},), "schema": Word, "max_tokens": 50}
    return Ask(**(given | more))


def client_of(server: JudgeServer, folder, **more) -> ChatClient:
    settings = {"model": "m", "retries": 0} | more
    return ChatClient(ChatSettings(((server.url, 1.0),), **settings), AnswerFile(str(folder), 1.0))


def behave(body: dict) -> Reply:
    return Reply("text", '{"word": "yes", "why": ""}')


def test_a_second_client_asks_nothing(tmp_path):
    with JudgeServer(behave) as server:
        with client_of(server, tmp_path) as client:
            first = client.ask([ask_of("a"), ask_of("b", image=IMAGE)])
        with client_of(server, tmp_path) as client:
            second = client.ask([ask_of("b", image=IMAGE), ask_of("a"), ask_of("c")])
            usage = client.usage()
        assert server.requests == 3
    assert [answer.cached for answer in (*first, *second)] == [False, False, True, True, False]
    assert {answer.value.word for answer in (*first, *second)} == {"yes"}
    assert (usage.calls, usage.cached, usage.tokens_in) == (3, 2, 100)


@pytest.mark.parametrize(
    "change",
    [
        {"text": "other"},
        {"prompt": "word.v2"},
        {"schema": OtherWord},
        {"max_tokens": 51},
        {"image": IMAGE},
        {"image": IMAGE.reshape(2, 8, 3)},
        {"image": IMAGE + 1},
        {"draw": 1},
        {"model": "other"},
        {"temperature": 0.5},
    ],
    ids=repr,
)
def test_whatever_decides_an_answer_is_part_of_its_key(tmp_path, change):
    of_client = {name: change[name] for name in ("model", "temperature") if name in change}
    of_ask = {name: value for name, value in change.items() if name not in of_client}
    base = ask_of(image=IMAGE) if change.get("image") is not None and change["image"].shape != IMAGE.shape else ask_of()
    with JudgeServer(behave) as server:
        with client_of(server, tmp_path) as one, client_of(server, tmp_path, **of_client) as other:
            assert one.key(base) != other.key(ask_of(**of_ask))
        # Where and how fast it is asked does not.
        with client_of(server, tmp_path, concurrency=3, rpm=5) as one, client_of(server, tmp_path, seed=9) as other:
            assert one.key(base) == other.key(base)
        warm = {"temperature": 1.0}
        with client_of(server, tmp_path, **warm) as one, client_of(server, tmp_path, **warm, seed=9) as other:
            assert one.key(base) != other.key(base)


def test_replicas_share_answers_and_another_server_is_asked_anew(tmp_path):
    def asked(*servers: JudgeServer) -> bool:
        settings = ChatSettings(tuple((server.url, 1.0 + i) for i, server in enumerate(servers)), "m", retries=0)
        with ChatClient(settings, AnswerFile(str(tmp_path), 1.0)) as client:
            (answer,) = client.ask([ask_of()])
        return not answer.cached

    with JudgeServer(behave) as one, JudgeServer(behave) as other, JudgeServer(behave) as third:
        assert asked(one, other)
        assert not asked(one, other)
        assert not asked(other, one), "the order and the weights of replicas are no part of the question"
        assert asked(one)
        assert asked(one, third)
        assert not asked(one)


@pytest.mark.parametrize("word", ["system", "enum", "minItems", "json_schema", "temperature"])
def test_what_is_left_out_of_a_question_is_part_of_its_key(tmp_path, word):
    said = {"temperature": "no temperature, please"}.get(word, "no")
    with JudgeServer(behave) as server:
        with client_of(server, tmp_path) as client:
            client.ask([ask_of()])
        server.refuses = lambda body: said if word in json.dumps(body) and is_probe(body) else ""
        for cached in (False, True):
            with client_of(server, tmp_path) as client:
                assert client.ask([ask_of()])[0].cached == cached


class Marked(pydantic.BaseModel):
    passed: bool = pydantic.Field(alias="pass")


def test_fields_with_names_of_their_own_are_found_again(tmp_path):
    with JudgeServer(lambda body: Reply("text", '{"pass": true}')) as server:
        for cached in (False, True):
            with client_of(server, tmp_path) as client:
                (answer,) = client.ask([ask_of(schema=Marked)])
                assert (answer.value.passed, answer.cached) == (True, cached)


def test_failures_are_asked_again(tmp_path):
    broken = True
    with JudgeServer(lambda body: Reply("status", status=400) if broken else behave(body)) as server:
        for _ in range(2):
            with client_of(server, tmp_path) as client:
                assert isinstance(client.ask([ask_of()])[0], Failure)
        broken = False
        with client_of(server, tmp_path) as client:
            assert client.ask([ask_of()])[0].value.word == "yes"
        assert server.requests == 3


def test_a_damaged_entry_is_asked_again(tmp_path):
    with JudgeServer(behave) as server:
        with client_of(server, tmp_path) as client:
            client.ask([ask_of()])
        with sqlite3.connect(tmp_path / "answers.sqlite3") as db:
            db.execute("UPDATE answers SET value = '{\"wor'")
        db.close()
        with client_of(server, tmp_path) as client:
            assert not client.ask([ask_of()])[0].cached
            assert client.ask([ask_of()])[0].cached


def write(folder: str, start: int) -> None:
    answers = AnswerFile(folder, 1.0)
    for number in range(start, start + 300):
        answers.put(str(number), f"answer {number}")
        assert answers.get(str(number)) == f"answer {number}"
    answers.close()


def test_several_processes_use_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write, args=(str(tmp_path), start)) for start in (0, 150, 300)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    answers = AnswerFile(str(tmp_path), 1.0)
    assert all(answers.get(str(number)) == f"answer {number}" for number in range(600))
    answers.close()


def test_the_size_is_bounded_and_what_was_used_last_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_USED_AGAIN", -1.0)  # Else a use within the hour is not noted.
    answers = AnswerFile(str(tmp_path), 1e-3)  # 1 MB
    text = "x" * 4000
    for number in range(1500):
        answers.put(str(number), text)
        assert answers.get("0") == text
    answers.close()
    assert answers.path.stat().st_size < 1.5e6
    with sqlite3.connect(answers.path) as db:
        kept = {int(key) for (key,) in db.execute("SELECT key FROM answers")}
    db.close()
    assert 150 < len(kept) < 250
    assert 0 in kept
    assert kept - {0} == set(range(1500 - len(kept) + 1, 1500))


def test_what_is_no_cache_is_one_line(tmp_path):
    (tmp_path / "answers.sqlite3").write_bytes(b"something else" * 1000)
    with pytest.raises(UserError, match=r"cannot be used \(file is not a database\); delete it"):
        AnswerFile(str(tmp_path), 1.0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be used \(File exists\)|\(Not a directory\)"):
        AnswerFile(str(tmp_path / "file"), 1.0)


def test_a_disk_that_fails_later_costs_answers_kept_and_not_the_run(tmp_path, caplog):
    answers = AnswerFile(str(tmp_path), 1.0)
    answers._db.execute("PRAGMA query_only = ON")
    answers.put("a", "b")
    answers.put("c", "d")
    assert answers.get("a") is None
    assert len(caplog.records) == 1
    assert "judge's cache" in caplog.text
    answers.close()


def test_a_cache_that_another_process_holds_costs_one_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BUSY_SECONDS", 0.2)
    answers = AnswerFile(str(tmp_path), 1.0)
    holder = sqlite3.connect(answers.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    for number in range(20):
        answers.put(str(number), "answer")
    assert time.monotonic() - begun < 2
    holder.execute("ROLLBACK")
    assert answers.get("0") is None, "it is left alone for a while"
    monkeypatch.setattr(cache, "_PAUSE", 0.0)
    answers._left_alone_until = 0.0
    answers.put("21", "answer")
    assert answers.get("21") == "answer"
    answers.close()
    holder.close()
