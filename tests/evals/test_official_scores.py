"""What the official code gives on odd inputs, item by item: official_scores.json, by metric.

General benchmarks: [the question's fields, prediction, score], of MMBench a list of (fields, prediction) of rotations.
CaptionQA: [a picture's (question, reply), scores]. DCScore: [judgement, statements of the reference, score or null].
The commits are those that docs/evaluation.md names.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from judges.misbehaving import JudgeServer, Reply, blocks_of
from PIL import Image

from balcap_jax import evaluate
from balcap_jax.evals import vqa
from balcap_jax.evals.dcscore import DCScore
from balcap_jax.evals.engine import Item
from balcap_jax.evals.vqa_data import read_questions
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.types import ChatSettings
from balcap_jax.judges.chat_judge import RemoteJudge
from balcap_jax.judges.schema import ChoiceQuestion, Failure

OFFICIAL = json.loads(Path(__file__).with_name("official_scores.json").read_text(encoding="utf-8"))
assert OFFICIAL.keys() == {*vqa.BENCHMARKS, "captionqa", "dcscore"}


@pytest.mark.parametrize("name", vqa.BENCHMARKS)
def test_general_benchmarks(tmp_path, name):
    lines, predictions = [], {}
    for i, (*case, _) in enumerate(OFFICIAL[name]):
        for k, (fields, prediction) in enumerate(case[0] if name == "mmbench" else [case]):
            index = i + k * 1_000_000
            if isinstance(fields.get("answers"), dict):  # TextVQA: how many people said what
                fields = {"answers": [text for text, count in fields["answers"].items() for _ in range(count)]}
            lines.append(json.dumps({"index": index, "question": "?", **fields}))
            predictions[str(index)] = prediction
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    metric = vqa.Answers(name)
    items = metric.items(read_questions(tmp_path / "q.jsonl"), predictions)
    found = [metric.parts(item, judged)[0] for item, judged in zip(items, metric.judge(None, items), strict=True)]
    wrong = [
        (case, score)
        for case, score in zip(OFFICIAL[name], found, strict=True)
        if score != pytest.approx(case[-1], abs=1e-12)
    ]
    assert not wrong


def evaluated(tmp_path, behave, metric, **files):
    """Lines and results of a metric whose judge behaves so."""
    given = [f"--{name}={tmp_path / file}" for name, file in files.items()]
    judge = ["--judge.model=m", "--judge.cache_dir=", "--judge.retries=0"]
    with JudgeServer(behave, forms=()) as server:
        evaluate.main(
            [f"--metric={metric}", *given, f"--out={tmp_path / 'o'}", *judge, f"--judge.endpoints={server.url}"]
        )
    lines = [json.loads(line) for line in (tmp_path / "o/items.jsonl").read_text().splitlines()]
    return lines, json.loads((tmp_path / "o/results.json").read_text())


@pytest.mark.parametrize(("asked", "scores"), OFFICIAL["captionqa"])
def test_captionqa_from_replies_to_scores(tmp_path, asked, scores):
    """Any reply is scored: one that is empty, or no JSON, or names no option, is an item of 0 points."""
    questions = [question | {"question": f"{question['question']} {k}"} for k, (question, _) in enumerate(asked)]
    replies = dict(zip((one["question"] for one in questions), (reply for _, reply in asked), strict=True))
    (tmp_path / "q.json").write_text(json.dumps({"nat_1": questions}))
    (tmp_path / "c.json").write_text('{"nat_1": "a caption"}')

    def behave(body):
        return Reply("text", replies[dict(blocks_of(body))["question"]])

    lines, results = evaluated(tmp_path, behave, "captionqa", captions="c.json", questions="q.json")
    assert [line["parts"][0] for line in lines] == pytest.approx(scores, abs=1e-12)
    assert (results["invalid"], results["n"]) == (0, len(scores))


def test_captionqa_counts_replies_that_name_no_option(tmp_path, capsys):
    replies = ["", "   ", "I cannot tell", '{"answer": 7}', '{"answer": "A"} {"answer": "B"}', "\\boxed{A}"]
    asked = {"question": "?", "choices": ["one", "two"], "answer": "one"}
    (tmp_path / "q.json").write_text(json.dumps({f"nat_{k}": [asked] for k in range(len(replies))}))
    (tmp_path / "c.json").write_text(json.dumps({f"nat_{k}": str(k) for k in range(len(replies))}))

    def behave(body):
        return Reply("text", replies[int(dict(blocks_of(body))["caption"])])

    _, results = evaluated(tmp_path, behave, "captionqa", captions="c.json", questions="q.json")
    assert (results["n"], results["invalid"], results["unparsable"]) == (6, 0, 4)
    assert "4 answers name no option" in capsys.readouterr().out


@pytest.mark.parametrize(("judgement", "statements", "score"), OFFICIAL["dcscore"])
def test_dcscore(judgement, statements, score):
    metric = DCScore()
    parts = metric.parts(Item("a", "x", ("o", ["one"] * statements, None)), judgement)
    assert parts == score if score is None else metric.of_item(parts) == pytest.approx(score, abs=1e-9)


def test_dcscore_takes_what_the_published_script_takes(tmp_path):
    """A relevance of 0.5, a match with a statement that the reference lacks, and a statement said twice."""
    judgement, statements, score = OFFICIAL["dcscore"][-1]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    reference = {"image_name": "a.png", "oracle_caption": "o", "oracle_facts": [str(k) for k in range(statements)]}
    (tmp_path / "oracle.jsonl").write_text(json.dumps(reference))
    (tmp_path / "c.json").write_text('{"a.png": "a caption"}')
    left = {kind: [*judgement[kind]] for kind in ("matches", "verified")}

    def behave(body):
        system = body["messages"][0]["content"]
        if system.startswith("You split"):
            facts = zip(judgement["facts"], judgement["relevance"], strict=True)
            return Reply("text", json.dumps({"facts": [{"fact": fact, "relevance": flag} for fact, flag in facts]}))
        if system.startswith("You match"):
            draw = enumerate(-1 if k is None else k for k in left["matches"].pop())
            return Reply("text", json.dumps({"matches": [{"fact": i, "why": "", "match": k} for i, k in draw]}))
        draw = enumerate(left["verified"].pop())
        return Reply("text", json.dumps({"facts": [{"fact": i, "why": "", "verified": flag} for i, flag in draw]}))

    _, results = evaluated(tmp_path, behave, "dcscore", captions="c.json", references="oracle.jsonl", images=".")
    assert (results["invalid"], results["score"]) == (0, pytest.approx(score, abs=1e-9))


@pytest.mark.parametrize("reply", ["", "hm", "B", "\\boxed{A}", '{"answer": 7}'])
def test_what_a_metric_scores_as_0_stays_missing_in_a_reward(reply):
    with JudgeServer(lambda body: Reply("text", reply), forms=()) as server:
        settings = ChatSettings(endpoints=((server.url, 1.0),), model="m", retries=0)
        with contextlib.closing(RemoteJudge(ChatClient(settings))) as judge:
            (verdict,) = judge.choice([ChoiceQuestion("a caption", "?", (("A", "one"), ("B", "two")))])
    assert isinstance(verdict, Failure)
