"""Whole runs with a judge behind a chat endpoint: what they write, what they cost, how they stop and go on."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from command_runs import (
    arguments,
    checkpoints,
    finish,
    read_metrics,
    read_samples,
    read_summary,
    start,
    the_one_line,
    train,
)

from balcap_jax.judges.budget import Spending
from balcap_jax.judges.cost import captions_of, estimate
from balcap_jax.judges.schema import Usage

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
from misbehaving import JudgeServer, Reply, text_of, well_behaved

KEY = "sk-a-very-secret-key-0123456789"
COUNTED = ("judge/calls", "judge/cache_hit_rate", "judge/tokens_in", "judge/tokens_out", "judge/cost")


def remote(server: JudgeServer, tmp_path: Path, **more) -> dict:
    return {
        "judge__name": "remote",
        "judge__endpoints": server.url,
        "judge__cache_dir": tmp_path / "cache",
        "judge__retries": 1,
        "judge__timeout": 20,
        "judge__price_in": 1,
        "judge__price_out": 10,
        "stages__order": "rl",
        "stages__rl__eval_every": 0,
        "checkpoint__every": 1,
    } | more


def numbers_of(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a cache changes."""
    return [
        {name: value for name, value in line.items() if name not in (*COUNTED, "judge/cost_total")}
        for line in read_metrics(workdir)
    ]


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_in_mid_judging_repeats_no_cached_call_and_no_key_is_written(
    tmp_path, data_dir, monkeypatch, depth
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    process, killed = None, threading.Event()

    def behave(body: dict) -> Reply:
        if process is not None and server.requests > 160 and not killed.is_set():
            killed.set()
            process.kill()
        reply = well_behaved(body)
        answer = json.loads(reply.content)
        if "why" in answer:
            answer["why"] = f"somebody gave me {KEY}"  # A server that repeats the key must not have it written either.
        return Reply("text", json.dumps(answer))

    with JudgeServer(behave, key=KEY) as server:
        given = remote(server, tmp_path, judge__api_key_env="JUDGE_KEY", judge__concurrency=1, pipeline__depth=depth)
        process = start("balcap_jax.train", *arguments(tmp_path / "killed", data_dir, **given))
        finish(process, expected=-9)
        before = len(server.seen)
        assert 160 < before < 180
        assert 1 <= checkpoints(tmp_path / "killed")[-1] < 6
        process = None
        train(tmp_path / "killed", data_dir, **given)
        # The one that was under way when the run was killed is the only one that may come twice.
        texts = [(body["messages"][0]["content"], text_of(body)) for body in server.seen]
        assert len(texts) - len(set(texts)) <= 1

        whole = given | {"judge__cache_dir": tmp_path / "other cache"}
        train(tmp_path / "whole", data_dir, **whole)
        assert len(server.seen) - len(texts) == len(set(texts))

    assert numbers_of(tmp_path / "killed") == numbers_of(tmp_path / "whole")
    assert read_samples(tmp_path / "killed") == read_samples(tmp_path / "whole")
    assert read_summary(tmp_path / "killed") == read_summary(tmp_path / "whole")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert set(server.keys) == {f"Bearer {KEY}"}

    ledger = json.loads((tmp_path / "whole" / "judge.json").read_text())
    asked = len(set(texts))
    assert ledger["calls"] - ledger["cached"] == asked
    assert (ledger["tokens_in"], ledger["tokens_out"]) == (100 * asked, 10 * asked)
    assert ledger["cost"] == pytest.approx(asked * (100 * 1 + 10 * 10) / 1e6)
    lines = read_metrics(tmp_path / "whole")
    spent = sum(line["judge/cost"] for line in lines)
    assert lines[-1]["judge/cost_total"] == pytest.approx(spent)  # The first line has the evaluation before it too.
    record = json.loads((tmp_path / "whole" / "samples" / "step-000003.jsonl").read_text().splitlines()[0])
    about = {"model": "the-model"} | {name: f"{name}.v2" for name in ("precision", "recall", "linguistic")}
    assert record["captions"][0]["judge"] == about


def test_too_many_failures_name_the_endpoint_and_the_reason(tmp_path, data_dir):
    def behave(body: dict) -> Reply:
        if body["messages"][0]["content"].startswith("You mark"):
            return Reply("status", "overloaded", status=400)
        return well_behaved(body)

    with JudgeServer(behave) as server:
        given = remote(server, tmp_path, log__eval_images=1)
        done = train(tmp_path / "run", data_dir, expected=2, **given)
        line = the_one_line(done.stderr)
        assert "of the last" in line
        assert f" x {server.url}: HTTP 400)" in line
        assert "the run is saved, mend the judge" in line
        assert checkpoints(tmp_path / "run")
        server.behave = well_behaved
        train(tmp_path / "run", data_dir, **given)


@pytest.mark.parametrize("depth", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_judge_that_has_cost_enough_stops_the_run_which_can_go_on(tmp_path, data_dir, depth):
    with JudgeServer(well_behaved) as server:
        given = remote(server, tmp_path, judge__max_cost=0.01, pipeline__depth=depth, log__eval_samples=2)
        done = train(tmp_path / "run", data_dir, expected=2, **given)
        line = the_one_line(done.stderr)
        assert "stopped at step 1: the judge has cost 0.01" in line
        assert "judge.max_cost is 0.01; the run is saved, raise it" in line
        asked = server.requests
        assert asked < 2 * 4 * 3 * 3 + 10, "the next batch was asked about as well"  # evaluation and step are 36 each
        done = train(tmp_path / "run", data_dir, expected=2, **given)
        assert "judge.max_cost is 0.01; raise it to go on" in the_one_line(done.stderr)
        assert server.requests == asked
        done = train(tmp_path / "run", data_dir, **(given | {"judge__max_cost": 1}))
        assert "going on after step 1 of 6 (rl)" in done.stdout


def test_an_endpoint_that_is_down_is_found_before_anything_is_built(tmp_path, data_dir):
    given = {"judge__name": "remote", "judge__endpoints": "http://127.0.0.1:9/v1", "judge__cache_dir": ""}
    done = train(tmp_path / "run", data_dir, expected=2, **given)
    assert the_one_line(done.stderr).startswith(
        "error: judge endpoint http://127.0.0.1:9/v1 is down (connection refused); start it"
    )
    assert not (tmp_path / "run").exists()


def test_the_estimate_of_a_config(capsys, data_dir):
    from balcap_jax import train as training
    from balcap_jax.cli.arguments import CommandParser
    from balcap_jax.config import recipes as configuration

    given = [one for one in arguments("unused", data_dir) if "workdir" not in one]
    remote_judge = ["--config.judge.name=remote", "--config.judge.price_in=2", "--config.judge.price_out=10"]
    with pytest.raises(SystemExit) as ended:
        training.main([*given, *remote_judge, "--estimate_judge"])
    assert ended.value.code == 2
    text, failed = capsys.readouterr()
    started = (
        "error: seconds are not measured: judge endpoint http://localhost:8000/v1 is down (connection refused); start"
    )
    assert the_one_line(failed).startswith(started)
    parser = CommandParser()
    configuration.add_arguments(parser)
    config, _ = configuration.parse_command_line([*given, *remote_judge], parser)
    # 6 steps of 4 x 3 captions; sft, rl-4 and rl evaluated on 4 pictures with 3 + 1 captions each.
    assert captions_of(config, ("sft", "rl")) == 72 + 3 * 16
    assert "120 captions to judge" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:1].isalpha()}
    total = [int(number.replace(",", "")) for number in rows["total"]]
    assert total[0] == 3 * 120
    for column in range(3):
        each = [int(rows[f"{name}.v2"][column].replace(",", "")) for name in ("precision", "recall", "linguistic")]
        assert sum(each) == total[column]
    assert "a step of rl asks 36 questions, 32 at once" in text
    assert float(rows["cost"][0]) == pytest.approx((2 * total[1] + 10 * total[2]) / 1e6, abs=0.006)
    config.unlock()
    config.judge.name = "oracle"
    assert "no cost" in estimate(config, ("sft", "rl"), ("precision",))
    config.judge.name, config.judge.endpoints = "remote", ""
    assert "seconds: name the servers in judge.endpoints" in estimate(config, ("sft", "rl"), ("precision",))


def test_the_estimate_times_a_few_questions(capsys, data_dir, tmp_path):
    """Answers about precision take 0.6 s, others 0.2 s; a step asks 6 of 12 captions about it, 12 about the others."""
    from balcap_jax import train as training

    def behave(body: dict) -> Reply:
        answer = well_behaved(body)
        answer.delay = 0.6 if body["messages"][0]["content"].startswith("You check captions") else 0.2
        return answer

    with JudgeServer(behave) as one, JudgeServer(behave) as other:
        given = remote(one, tmp_path, judge__concurrency=16, judge__ask="precision:0.6")
        given |= {"judge__endpoints": f"{one.url},{other.url}"}
        training.main(
            [*(a for a in arguments("unused", data_dir, **given) if "workdir" not in a), "--estimate_judge=2"]
        )
        text = capsys.readouterr().out
        asked = one.requests + other.requests
    assert 48 <= asked <= 160
    assert f"asked {asked} questions about" in text
    assert "16 at once" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    seconds = {name: float(rows[name][0]) for name in ("precision", "recall", "linguistic")}
    assert 0.6 <= seconds["precision"] < 0.6 + seconds["recall"]
    assert [int(rows[name][1]) for name in seconds] == [8, 12, 12]
    work = 8 * seconds["precision"] + 12 * (seconds["recall"] + seconds["linguistic"])
    needed, servers = map(int, rows["2"])
    assert needed == pytest.approx(work / 2, abs=1.0)
    assert servers == -(-needed // 8), "each server had 8 of the 16 questions under way"
    assert int(rows["300"][0]) == 1
    assert not list(tmp_path.iterdir()), "answers were kept"


def test_a_judge_without_endpoints_is_one_line():
    from balcap_jax.cli.errors import UserError
    from balcap_jax.config.recipes import default_config
    from balcap_jax.judges import build

    judge = default_config().judge
    judge.update({"name": "remote", "endpoints": " "})
    with pytest.raises(UserError, match=r"'judge\.endpoints' is empty: name the servers of the judge"):
        build(judge, seed=0)


def test_a_ledger_adds_up_and_one_that_is_torn_is_refused(tmp_path):
    from balcap_jax.cli.errors import UserError
    from balcap_jax.config.recipes import default_config

    class Judge:
        used = Usage(10, 4, 1_000_000, 200_000)

        def usage(self) -> Usage:
            return self.used

    config = default_config().judge
    config.update({"name": "remote", "price_in": 1.0, "price_out": 10.0, "max_cost": 7.0})
    spending = Spending(Judge(), config, tmp_path / "judge.json", window=2)
    assert spending.step()["judge/cost"] == pytest.approx(3.0)
    assert spending.step() == dict.fromkeys(COUNTED, 0) | {"judge/cost_total": pytest.approx(3.0)}
    again = Spending(Judge(), config, tmp_path / "judge.json", window=2)
    again.update()
    values = again.step()
    assert (values["judge/cost"], values["judge/cost_total"]) == (pytest.approx(3.0), pytest.approx(6.0))
    assert values["judge/cache_hit_rate"] == 0.4
    assert not again.spent
    Spending(Judge(), config, tmp_path / "judge.json", window=2).update()
    with pytest.raises(UserError, match=r"the judge has cost 9, and judge.max_cost is 7; raise it to go on"):
        Spending(Judge(), config, tmp_path / "judge.json", window=2)
    (tmp_path / "judge.json").write_text('{"calls": 3}')
    with pytest.raises(UserError, match="is no ledger of a judge; delete it"):
        Spending(Judge(), config, tmp_path / "judge.json", window=2)
    assert os.listdir(tmp_path) == ["judge.json"]
