"""The command: judging through a server, kills and resumes, what is counted, and bad input."""

import base64
import json
import math
import random
import threading

import jax
import numpy as np
import pytest
from judges.misbehaving import JudgeServer, Reply, blocks_of, digest, kind_of, right_answer, text_of, well_behaved
from PIL import Image
from system.command_runs import finish, start, start_afresh

from balcap_jax import evaluate, models
from balcap_jax.captioning import captioner
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as configuration
from balcap_jax.data import photos
from balcap_jax.evals.dcscore import DCScore
from balcap_jax.evals.engine import Item
from balcap_jax.evals.inputs import Texts, read_captions
from balcap_jax.evals.vqa_data import read_questions

CHECK = "--metric=checklist"


def checklists(tmp_path, count=8):
    path = tmp_path / "checklists.jsonl"
    lines = [
        {"id": f"p{i}", "items": [{"kind": "count" if j % 2 else "text", "question": f"Is {i} {j}?"} for j in range(3)]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def captions(tmp_path, count=8, name="captions.jsonl", shuffle=None):
    lines = [json.dumps({"image": f"images/p{i}", "caption": f"Caption {i}."}) for i in range(count)]
    if shuffle is not None:
        random.Random(shuffle).shuffle(lines)
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def opinion(text: str) -> str:
    return ("yes", "no", "not_mentioned")[digest(text) % 3]


def answers(body: dict) -> Reply:
    """Answers each question of a checklist by a digest of it and the caption."""
    blocks = blocks_of(body)
    caption = blocks[-1][1]
    found = [
        {"question": i, "why": "so", "answer": opinion(question + caption)}
        for i, (kind, question) in enumerate(blocks[:-1], start=1)
        if kind == "question"
    ]
    return Reply("text", json.dumps({"answers": found}))


def judged_by(server, tmp_path, **fields):
    given = {"endpoints": server.url, "model": "the-model", "cache_dir": "", "retries": 0} | fields
    return [f"--judge.{name}={value}" for name, value in given.items()]


def results_of(out):
    return json.loads((out / "results.json").read_text())


def lines_of(out):
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


def expected_precision(numbers=range(8)) -> float:
    said = [opinion(f"Is {i} {j}?Caption {i}.") for i in numbers for j in range(3)]
    return 100 * said.count("yes") / (said.count("yes") + said.count("no"))


def test_results_say_what_was_judged_and_by_whom(tmp_path, capsys):
    given = [
        CHECK,
        f"--captions={captions(tmp_path)}",
        f"--checklists={checklists(tmp_path)}",
        f"--out={tmp_path / 'o'}",
    ]
    with JudgeServer(answers) as server:
        evaluate.main([*given, *judged_by(server, tmp_path)])
        evaluate.main([*given, *judged_by(server, tmp_path)])
        assert server.requests == 8
    results = results_of(tmp_path / "o")
    assert results["score"] == pytest.approx(expected_precision())
    low, high = results["confidence"]
    assert low <= results["score"] <= high
    assert (results["n"], results["invalid"], results["words"]) == (8, 0, 2.0)
    assert (results["judge"], results["prompts"]) == ("the-model", "checklist.v1")
    assert len(lines_of(tmp_path / "o")) == 8
    assert "checklist: " in capsys.readouterr().out


def test_the_order_of_lines_changes_nothing(tmp_path):
    found = []
    with JudgeServer(answers) as server:
        for seed in (None, 1):
            out = tmp_path / f"o{seed}"
            given = [f"--captions={captions(tmp_path, name=f'{seed}.jsonl', shuffle=seed)}", f"--out={out}"]
            evaluate.main([CHECK, f"--checklists={checklists(tmp_path)}", *given, *judged_by(server, tmp_path)])
            found.append({k: v for k, v in results_of(out).items() if k != "inputs"})
    assert found[0] == found[1]


def test_failures_are_counted_shown_and_judged_again_on_demand(tmp_path, capsys):
    def behave(body):
        caption = blocks_of(body)[-1][1]
        if caption == "Caption 3.":
            return Reply("status", "no", status=400)
        return Reply("text", "no JSON") if caption == "Caption 5." else answers(body)

    out = tmp_path / "o"
    given = [CHECK, f"--captions={captions(tmp_path, 7)}", f"--checklists={checklists(tmp_path)}", f"--out={out}"]
    with JudgeServer(behave) as server:
        evaluate.main([*given, *judged_by(server, tmp_path)])
        results = results_of(out)
        assert (results["n"], results["invalid"]) == (5, 3)
        assert results["errors"]["no caption"] == 1
        assert any("HTTP 400" in reason for reason in results["errors"])
        assert results["score"] == pytest.approx(expected_precision([0, 1, 2, 4, 6]))
        assert "3 items are not in it" in capsys.readouterr().out
        server.behave = answers
        evaluate.main([*given, *judged_by(server, tmp_path), "--retry_errors"])
    results = results_of(out)
    assert (results["n"], results["invalid"]) == (7, 1)
    assert results["score"] == pytest.approx(expected_precision(range(7)))


def test_killed_at_any_point_nothing_is_judged_twice_and_the_result_is_the_same(tmp_path):
    process, killed = None, threading.Event()

    def behave(body):
        if process is not None and server.requests > 9 and not killed.is_set():
            killed.set()
            process.kill()
        return answers(body)

    given = [CHECK, f"--captions={captions(tmp_path, 20)}", f"--checklists={checklists(tmp_path, 20)}"]
    with JudgeServer(behave) as server:
        judge = judged_by(server, tmp_path, concurrency=1, cache_dir=tmp_path / "cache")
        process = start("balcap_jax.evaluate", *given, *judge, f"--out={tmp_path / 'killed'}")
        finish(process, expected=-9)
        before = server.requests
        assert 9 < before < 13
        assert 0 < len(lines_of(tmp_path / "killed")) < 20
        process = None
        finish(start_afresh("balcap_jax.evaluate", *given, *judge, f"--out={tmp_path / 'killed'}"))
        texts = [text_of(body) for body in server.seen]
        assert len(texts) - len(set(texts)) <= 1, "only the one under way may come twice"
        other = judged_by(server, tmp_path, concurrency=1)
        evaluate.main([*given, *other, f"--out={tmp_path / 'whole'}"])
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")


def test_judgements_of_another_folder_need_no_judge(tmp_path):
    given = [CHECK, f"--captions={captions(tmp_path)}", f"--checklists={checklists(tmp_path)}"]
    with JudgeServer(answers) as server:
        evaluate.main([*given, *judged_by(server, tmp_path), f"--out={tmp_path / 'o'}"])
    items = tmp_path / "o" / "items.jsonl"
    kept = items.read_text().splitlines()
    items.write_text(
        "\n".join([kept[0], json.dumps({"id": "p1", "judgement": {"answers": {"1": "maybe"}}}), *kept[2:7]])
    )
    evaluate.main([*given, f"--judgements={items}", f"--out={tmp_path / 'again'}"])
    results = results_of(tmp_path / "again")
    assert (results["n"], results["judge"]) == (6, "")
    assert results["errors"]["no judgement of it is given"] == 1
    assert any("another form" in reason for reason in results["errors"])
    assert results["score"] == pytest.approx(expected_precision([0, 2, 3, 4, 5, 6]))


def test_dcscore_from_pictures_to_the_score(tmp_path):
    """A judge that finds each sentence a fact, matches equal ones, and holds all but "wrong" ones for true."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "oracle.jsonl").write_text(
        json.dumps({"image_name": "a.png", "oracle_caption": "o", "oracle_facts": ["one", "two"]})
        + "\n"
        + json.dumps({"image_name": "gone.png", "oracle_caption": "o", "oracle_facts": ["one"]})
        + "\n"
    )
    (tmp_path / "c.json").write_text(json.dumps({"a.png": "one. wrong. mood", "gone.png": "one"}))

    def behave(body):
        blocks = blocks_of(body)
        system = body["messages"][0]["content"]
        if system.startswith("You split a caption"):
            facts = blocks[0][1].split(". ")
            return Reply("text", json.dumps({"facts": [{"fact": f, "relevance": int(f != "mood")} for f in facts]}))
        said = [text for kind, text in blocks if kind == "statement"]
        if system.startswith("You match"):
            known = [text for kind, text in blocks if kind == "reference"]
            found = [{"fact": i, "why": "", "match": known.index(f) if f in known else -1} for i, f in enumerate(said)]
            return Reply("text", json.dumps({"matches": found[::-1]}))
        found = [{"fact": i, "why": "", "verified": f != "wrong"} for i, f in enumerate(said)]
        return Reply("text", json.dumps({"facts": found}))

    given = [f"--captions={tmp_path / 'c.json'}", f"--references={tmp_path / 'oracle.jsonl'}", f"--images={tmp_path}"]
    with JudgeServer(behave) as server:
        evaluate.main(["--metric=dcscore", *given, f"--out={tmp_path / 'o'}", *judged_by(server, tmp_path)])
    results = results_of(tmp_path / "o")
    assert (results["n"], results["invalid"]) == (1, 1)
    assert "gone.png: no such file" in results["errors"]
    # All: P 2/3, R (1 + 1) / (2 + 1). Relevant: P 1/2, R 1/2.
    assert results["score"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2, abs=1e-4)


def test_bcapscore_from_pictures_to_the_score(tmp_path):
    """Three objectives by a judge, their harmonic mean by picture, and what cannot be judged is counted."""
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "a.png")
    units = ["there is a car", "the car is red", "a tree"]
    lines = [
        {"image": name, "caption": "A red car.", "reference_units": units}
        for name in ("a.png", "sub/../a.png", "gone.png")
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {"a.png": "A red car. It is fast. It is here.", "gone.png": "A car."}
    (tmp_path / "c.json").write_text(json.dumps(said))
    given = [f"--captions={tmp_path / 'c.json'}", f"--references={tmp_path / 'r.jsonl'}", f"--images={tmp_path}"]
    with JudgeServer(well_behaved) as server:
        evaluate.main(["--metric=bcapscore", *given, f"--out={tmp_path / 'o'}", *judged_by(server, tmp_path)])
        replies = {kind_of(body): right_answer(body) for body in server.seen if said["a.png"] in text_of(body)}
    results = results_of(tmp_path / "o")
    assert (results["n"], results["invalid"]) == (2, 1), "one picture has two names, the caption is that of both"
    assert "gone.png: no such file" in results["errors"]
    held = [one["verified"] and one["pointable"] for one in replies["precision"]["assertions"]]
    covered = [one["covered"] for one in replies["recall"]["units"]]
    marks = [replies["linguistic"][name] for name in ("clarity", "fluency", "coherency")]
    three = [np.mean(held), np.mean(covered), np.mean(marks) / 5]
    shown = [results["precision"], results["recall"], results["linguistic"]]
    assert shown == pytest.approx([100 * value for value in three], abs=1e-4)
    assert results["score"] == pytest.approx(100 * 3 / sum(1 / value for value in three), abs=1e-4)
    assert results["score"] > 0


def test_capture_from_graphs_to_the_score(tmp_path, capsys):
    reference = {"objects": ["car", "tree"], "attributes": {"car": ["red"]}, "relations": [["car", "under", "tree"]]}
    half = {"objects": ["car"], "attributes": {"car": ["red"]}, "relations": []}
    lines = [
        {"id": "a", "candidate": reference, "references": [reference]},
        {"id": "b", "candidate": half, "references": [reference]},
        {"id": "c", "candidate": None, "references": [reference]},
    ]
    graphs = tmp_path / "g.jsonl"
    graphs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(["--metric=capture", f"--graphs={graphs}", f"--out={tmp_path / 'o'}"])
    results = results_of(tmp_path / "o")
    assert (results["n"], results["invalid"]) == (2, 1)
    # Objects: P 1, R 1/2; attributes all; relations none.
    assert results["score"] == pytest.approx(100 * (1 + (0.5 * 2 / 3 + 0.5) / 1.2) / 2, abs=1e-3)
    assert results["f1/relations"] == pytest.approx(50.0, abs=1e-3)
    graphs.write_text(json.dumps(lines[0] | {"candidate": {"objects": "car"}}) + "\n")
    with pytest.raises(SystemExit):
        evaluate.main(["--metric=capture", f"--graphs={graphs}", f"--out={tmp_path / 'p'}"])
    assert "its objects are no list" in capsys.readouterr().err


# ---- general benchmarks ----------------------------------------------------------------------------------------------


def run_benchmark(tmp_path, metric, questions, predictions):
    path = tmp_path / f"q{questions[0]}"
    path.write_text(questions[1])
    said = tmp_path / "predictions.jsonl"
    said.write_text("".join(json.dumps({"question_id": k, "prediction": v}) + "\n" for k, v in predictions.items()))
    out = tmp_path / "o"
    evaluate.main([f"--metric={metric}", f"--questions={path}", f"--predictions={said}", f"--out={out}"])
    return results_of(out)


def test_mmbench_counts_a_question_when_all_its_rotations_are_right(tmp_path):
    rows = ["index\tquestion\tA\tB\tanswer\tcategory\tl2-category"]
    right = {}
    for i, (first, second) in enumerate([(True, True), (True, False), (False, False)]):
        for k, is_right in enumerate((first, second)):
            index = i + k * 1_000_000
            rows.append(f"{index}\tq{i}\tred\tblue\t{'AB'[k]}\tcolour\tfine")
            right[str(index)] = "AB"[k] if is_right else "BA"[k]
    results = run_benchmark(tmp_path, "mmbench", (".tsv", "\n".join(rows)), right)
    assert results["score"] == pytest.approx(100 / 3)
    assert results["each_rotation"] == pytest.approx(50.0)
    assert (results["n"], results["questions"]) == (3, 6)
    assert results["kind/fine"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("metric", "suffix", "content", "predictions", "score"),
    [
        (
            "chartqa",
            ".json",
            [{"imgname": "a.png", "query": "n?", "label": "10"}, {"imgname": "a.png", "query": "m?", "label": "x"}],
            {"1": "10.4", "2": "y"},
            50.0,
        ),
        (
            "docvqa",
            ".json",
            {"data": [{"questionId": 7, "question": "q", "answers": ["hello"], "image": "d/a.png"}]},
            {"7": "hell"},
            80.0,
        ),
        (
            "textvqa",
            ".json",
            {"data": [{"question_id": 3, "question": "q", "answers": ["stop"] * 2 + ["go"] * 8}]},
            {"3": "Stop."},
            60.0,
        ),
        (
            "ocrbench",
            ".json",
            [{"dataset_name": "HME100k", "image_path": "a.jpg", "question": "q", "answers": ["x ^ 2"], "type": "t"}],
            {"1": "it is x^2"},
            1.0,
        ),
        (
            "seedbench",
            ".json",
            {"questions": [{"question_id": "s1", "question": "q", "choice_a": "x", "choice_b": "y", "answer": "B"}]},
            {"s1": "b"},
            100.0,
        ),
        (
            "scienceqa",
            ".json",
            {"12": {"question": "q", "choices": ["x", "y"], "answer": 1, "hint": "h", "split": "test"}},
            {"12": "B. y"},
            100.0,
        ),
        (
            "blink",
            ".jsonl",
            [{"id": "1", "question": "q", "choices": ["x", "y"], "answer": "A"}],
            {"1": "(A) x"},
            100.0,
        ),
        (
            "blink",
            ".tsv",
            "index\tquestion\tA\tB\tanswer\timage\n1\tq\tx\ty\tA\t['aGVsbG8=', 'aGVsbG8=']\n",
            {"1": "a"},
            100.0,
        ),
        (
            "blink",
            ".jsonl",
            [{"idx": "val_1", "sub_task": "Jigsaw", "question": "q", "choices": ["x", "y"], "answer": "(B)"}],
            {"val_1": "(b)"},
            100.0,
        ),
        (
            "chartqa",
            ".json",
            [{"imgname": "a.png", "query": "n?", "label": "[2014, 2018]"}],
            {"1": "[2014, 2018]"},
            100.0,
        ),
        (
            "seedbench",
            ".json",
            {
                "questions": [
                    {"question_id": k, "question": "q", "choice_a": "x", "choice_b": "y", "answer": "A", "data_type": t}
                    for k, t in (("1", "image"), ("2", "video"))
                ]
            },
            {"1": "A"},
            100.0,
        ),
        ("mmstar", ".jsonl", [{"id": "1", "question": "q", "choices": ["x", "y"], "answer": "A"}], {"1": "hm"}, 0.0),
        ("infovqa", ".jsonl", [{"id": "1", "question": "q", "answers": ["abc"]}], {"1": "abd"}, 100 * 2 / 3),
    ],
)
def test_official_forms(tmp_path, metric, suffix, content, predictions, score):
    lines = content if suffix == ".tsv" else json.dumps(content)
    if suffix == ".jsonl":
        lines = "\n".join(map(json.dumps, content))
    results = run_benchmark(tmp_path, metric, (suffix, lines), predictions)
    assert results["score"] == pytest.approx(score)
    assert results["unparsable"] == (1 if metric == "mmstar" else 0)


def test_rotations_share_the_picture_of_the_first(tmp_path):
    pixels = base64.b64encode(b"picture" * 20).decode()
    path = tmp_path / "mmbench.tsv"
    rows = ["index\tquestion\tA\tB\tanswer\timage", f"7\tq\tx\ty\tA\t{pixels}", "1000007\tq\ty\tx\tB\t7"]
    path.write_text("\n".join(rows) + "\n")
    assert [one.picture for one in read_questions(path)] == [b"picture" * 20] * 2


def test_pictures_and_splits_of_published_files(tmp_path):
    problems = {
        "1": {"question": "q", "choices": ["x"], "answer": 0, "image": "image.png", "split": "test"},
        "2": {"question": "q", "choices": ["x"], "answer": 0, "image": None, "split": "test"},
    }
    files = {
        "problems": (problems, "test/1/image.png"),
        "textvqa": ({"data": [{"question_id": 3, "image_id": "ab", "question": "q", "answers": ["x"]}]}, "ab.jpg"),
        "infovqa": (
            {"data": [{"questionId": 3, "image_local_name": "9.png", "question": "q", "answers": ["x"]}]},
            "9.png",
        ),
    }
    for name, (content, picture) in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert [one.picture for one in read_questions(tmp_path / f"{name}.json")] == [picture]
    entry = {"questionId": 3, "question": "q", "answers": ["x"]}
    (tmp_path / "d.json").write_text(json.dumps({"data": [entry | {"data_split": "val"}]}))
    assert len(list(read_questions(tmp_path / "d.json", "val"))) == 1


def test_the_halves_of_chartqa(tmp_path):
    folder = tmp_path / "chartqa"
    folder.mkdir()
    for kind, label in (("human", "5"), ("augmented", "6")):
        (folder / f"test_{kind}.json").write_text(json.dumps([{"imgname": "a.png", "query": "n?", "label": label}]))
    said = tmp_path / "said.json"
    said.write_text(json.dumps({"human:1": "5", "augmented:1": "8"}))
    given = [f"--questions={folder}", f"--predictions={said}", f"--out={tmp_path / 'o'}"]
    evaluate.main(["--metric=chartqa", *given])
    results = results_of(tmp_path / "o")
    assert (results["score"], results["kind/human"], results["kind/augmented"]) == (50.0, 100.0, 0.0)


def test_submissions_of_docvqa_and_answers_to_nothing(tmp_path, capsys):
    path, said = tmp_path / "q.json", tmp_path / "said.json"
    path.write_text(
        json.dumps({"data": [{"questionId": 7, "question": "q", "answers": ["hello"], "image": "d/a.png"}]})
    )
    said.write_text(
        json.dumps([{"questionId": 7, "image": "d/a.png", "answer": "hello"}, {"questionId": 8, "answer": "x"}])
    )
    evaluate.main(["--metric=docvqa", f"--questions={path}", f"--predictions={said}", f"--out={tmp_path / 'o'}"])
    results = results_of(tmp_path / "o")
    assert (results["score"], results["unused"], results["unused_ids"]) == (100.0, 1, ["8"])
    assert "1 texts or judgements are of no item here (8)" in capsys.readouterr().out


def arena_files(tmp_path):
    entries = {f"{i}.jpg": {"captions": {"human": "h", "rival": "r"}, "ref_model": "rival"} for i in range(4)}
    (tmp_path / "auto.json").write_text(json.dumps(entries))
    (tmp_path / "captions.json").write_text(json.dumps(dict.fromkeys(entries, "a caption")))
    rows = [
        {"img": f"{i}.jpg", "source1": "me", "source2": "rival", "ref_model": "rival", "judge": "Caption 1 is better."}
        for i in range(3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"img": "3.jpg", "source1": "me", "source2": "rival"}]))
    files = {"captions": "captions.json", "opponents": "auto.json", "images": "", "judgements": "rows.json"}
    return ["--metric=caparena", *(f"--{name}={tmp_path / file}" for name, file in files.items())]


def test_the_arena_from_published_rows(tmp_path, capsys):
    given = arena_files(tmp_path)
    for k, name in enumerate(([], ["--name=me"])):
        evaluate.main([*given, *name, f"--out={tmp_path / f'o{k}'}"])
        results = results_of(tmp_path / f"o{k}")
        assert (results["score"], results["n"], results["invalid"], results["skipped"]) == (75.0, 4, 0, 1)
        assert {name: one["score"] for name, one in results["categories"].items()} == {"rival": 75.0}
    with pytest.raises(SystemExit):
        evaluate.main([*given, "--name=somebody", f"--out={tmp_path / 'o'}"])
    assert "name the evaluated one with --name" in capsys.readouterr().err


def test_a_bare_letter_answers_a_question_about_a_caption(tmp_path):
    path = tmp_path / "q.json"
    asked = {"question": "Which?", "choices": ["red", "blue"], "answer": "red", "category": ["c"]}
    path.write_text(json.dumps({"nat_1": [asked], "nat_2": [asked]}))
    (tmp_path / "c.json").write_text('{"nat_1": "one", "nat_2": "two"}')
    given = [f"--captions={tmp_path / 'c.json'}", f"--questions={path}", f"--out={tmp_path / 'o'}"]
    with JudgeServer(lambda body: Reply("text", "B" if "one" in text_of(body) else "hm"), forms=()) as server:
        evaluate.main(["--metric=captionqa", *given, *judged_by(server, tmp_path)])
    results = results_of(tmp_path / "o")
    assert (results["n"], results["invalid"], results["unparsable"]) == (2, 0, 1)


@pytest.mark.parametrize(
    "judgement", [{"answers": None}, {"answers": "yes"}, {"answers": [1]}, {}, {"answers": {"1": 3}}]
)
def test_judgements_of_another_form_are_counted(tmp_path, judgement):
    lines = [{"id": "p0", "judgement": judgement}, {"id": "p1", "judgement": {"answers": {"1": "yes"}}}]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [
        f"--captions={captions(tmp_path, 2)}",
        f"--checklists={checklists(tmp_path, 2)}",
        f"--out={tmp_path / 'o'}",
    ]
    evaluate.main([CHECK, *given, f"--judgements={tmp_path / 'j.jsonl'}"])
    results = results_of(tmp_path / "o")
    assert (results["n"], results["invalid"]) == (1, 1)
    assert "another form" in next(iter(results["errors"]))


def test_items_twice_captions_twice_and_a_place_that_is_a_file(tmp_path, capsys):
    given = [CHECK, f"--captions={captions(tmp_path)}"]

    def refused(*arguments) -> str:
        with JudgeServer(answers) as server, pytest.raises(SystemExit):
            evaluate.main([*given, *arguments, *judged_by(server, tmp_path)])
        (line,) = capsys.readouterr().err.splitlines()
        return line

    twice = checklists(tmp_path, 2)
    (tmp_path / "twice.jsonl").write_text(twice.read_text() * 2)
    assert "2 items twice, such as 'p0'" in refused(
        f"--checklists={tmp_path / 'twice.jsonl'}", f"--out={tmp_path / 'o'}"
    )
    (tmp_path / "file").touch()
    assert "file" in refused(f"--checklists={twice}", f"--out={tmp_path / 'file'}")
    (tmp_path / "c.json").write_text('{"p1": "first", "p1": "second"}')
    given[1] = f"--captions={tmp_path / 'c.json'}"
    assert "has 'p1' twice" in refused(f"--checklists={twice}", f"--out={tmp_path / 'o'}")


def test_another_temperature_does_not_go_on_in_the_same_folder(tmp_path, capsys):
    given = [
        CHECK,
        f"--captions={captions(tmp_path)}",
        f"--checklists={checklists(tmp_path)}",
        f"--out={tmp_path / 'o'}",
    ]
    with JudgeServer(answers) as server:
        evaluate.main([*given, *judged_by(server, tmp_path)])
        with pytest.raises(SystemExit):
            evaluate.main([*given, *judged_by(server, tmp_path, temperature=0.5)])
    assert "with temperature 0.0, not 0.5" in capsys.readouterr().err


def test_questions_without_options_are_refused_where_letters_are_scored(tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "1", "question": "Which? A: x, B: y", "answer": "A"}\n')
    (tmp_path / "said.json").write_text('{"1": "A"}')
    given = [f"--questions={path}", f"--predictions={tmp_path / 'said.json'}", f"--out={tmp_path / 'o'}"]
    with pytest.raises(SystemExit):
        evaluate.main(["--metric=mmstar", *given])
    assert "has no options" in capsys.readouterr().err


def test_many_answers(tmp_path):
    rng = random.Random(0)
    wanted = [rng.choice(["yes", "no"]) for _ in range(20_000)]
    said = {str(i): rng.choice(["yes", "no"]) for i in range(19_000)}
    lines = (json.dumps({"id": str(i), "question": "q", "answers": [text]}) for i, text in enumerate(wanted))
    results = run_benchmark(tmp_path, "docvqa", (".jsonl", "\n".join(lines)), said | {"5": "word " * 100_000})
    right = sum(wanted[i] == said[str(i)] for i in range(19_000) if i != 5)
    assert results["score"] == pytest.approx(100 * right / 19_000)
    assert (results["n"], results["invalid"]) == (19_000, 1000)


def test_a_model_answers_and_a_second_run_asks_it_nothing(tmp_path, monkeypatch):
    record = photos.Record("a", "", "what is here yes no " * 20, ("yes no " * 20,))
    tokenizer = photos.caption_tokenizer(photos.Photos([record] * 3, 1, 0))
    sizes = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 16, "mlp": 16, "layers": 2}
    sizes |= {"width": 16, "heads": 2, "kv_heads": 1, "head_size": 8, "image_size": 24, "patch_size": 8}
    fields = configuration.default_config().model.to_dict() | sizes | {"prompt_tokens": 64}
    policy, processor = models.build(fields, tokenizer)
    model = models.save(tmp_path / "model", fields, jax.jit(policy.init)(jax.random.key(0)), processor)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    rows = ["index\tquestion\tanswer\timage\tsplit"]
    rows += [f"{i}\tn?\t1\t{base64.b64encode(content).decode()}\ttest" for i in range(2)]
    rows.append(f"9\tn?\t1\t{base64.b64encode(content).decode()}\tval")
    (tmp_path / "q.tsv").write_text("\n".join(rows) + "\n")
    given = ["--metric=chartqa", f"--questions={tmp_path / 'q.tsv'}", f"--model={model}", f"--out={tmp_path / 'o'}"]
    evaluate.main([*given, "--split=test"])
    results = results_of(tmp_path / "o")
    assert (results["n"], results["invalid"], results["questions"]) == (2, 0, 2)
    asked = [json.loads(line) for line in (tmp_path / "o" / "questions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in asked] == ["n?\nAnswer the question using a single word or phrase."] * 2
    said = (tmp_path / "o" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in said} == {"0", "1"}
    monkeypatch.setattr(captioner, "Captioner", None)  # A second run must not load the model.
    evaluate.main([*given, "--split=test"])
    assert results_of(tmp_path / "o") == results


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"id": "p1", "caption": "a"}\n{"id": "p1", "caption": "b"}\n', "'p1' has a text already"),
        (b'{"id": "p1", "caption": "\xff"}\n', "line 1 is not JSON (not a text file)"),
        (b'{"id": "p1"}\n', "line 1 has no id and text"),
        (b"[1]\n", "line 1 is no JSON object"),
    ],
)
def test_bad_captions_are_one_line(tmp_path, capsys, content, named):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        evaluate.main([CHECK, f"--captions={path}", f"--checklists={checklists(tmp_path)}", f"--out={tmp_path / 'o'}"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "o").exists()


def test_captions_of_nothing_that_is_asked_are_a_plain_error(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"elsewhere": "x"}')
    given = [CHECK, f"--captions={tmp_path / 'c.json'}", f"--checklists={checklists(tmp_path, 1)}"]
    given.append(f"--out={tmp_path / 'o'}")
    with pytest.raises(SystemExit):
        evaluate.main([*given, "--judge.endpoints=http://127.0.0.1:9/v1"])
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with JudgeServer(answers) as server, pytest.raises(SystemExit):
        evaluate.main([*given, *judged_by(server, tmp_path)])
    assert "1 x no caption" in capsys.readouterr().err


def test_a_folder_of_another_evaluation_is_left_alone(tmp_path, capsys):
    given = [CHECK, f"--checklists={checklists(tmp_path)}", f"--out={tmp_path / 'o'}"]
    with JudgeServer(answers) as server:
        evaluate.main([*given, f"--captions={captions(tmp_path)}", *judged_by(server, tmp_path)])
        before = (tmp_path / "o" / "items.jsonl").read_bytes()
        with pytest.raises(SystemExit):
            evaluate.main([*given, f"--captions={captions(tmp_path, 4, 'fewer.jsonl')}", *judged_by(server, tmp_path)])
    assert "holds an evaluation with inputs" in capsys.readouterr().err
    assert (tmp_path / "o" / "items.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--metric=dcsore"], "dcsore"),
        (["--metric=dcscore"], "needs --captions"),
        (["--metric=chartqa", "--questions=x.json"], "--predictions=F.jsonl, or --model=DIR"),
        (["--metric=side_by_side", "--votes=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, named):
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, f"--out={tmp_path / 'o'}"])
    assert named in capsys.readouterr().err


# ---- what must not be taken for something else -----------------------------------------------------------------------


def test_a_caption_is_found_for_one_picture():
    texts = Texts({"a/1.jpg": "one", "x/2.jpg": "two", "3": "three", "4.jpg": "four"})
    assert texts.find("a/1.jpg") == "one"
    assert texts.find("b/1.jpg") is None, "another folder's picture of the same name"
    assert texts.find("images/x/2.jpg") == texts.find("images/x/2.jpg") == "two"
    assert texts.find("2", "", "x/2.jpg") == "two"
    assert texts.find("a/4.jpg") == "four"
    with pytest.raises(UserError, match=r"'4.jpg' may be that of 'a/4.jpg' or of 'b/4.jpg'"):
        texts.find("b/4.jpg")
    assert texts.unused == ["3"]


def test_a_caption_is_found_however_its_path_is_spelt(tmp_path):
    texts = Texts(
        {"./a/1.jpg": "one", "/data/b/1.jpg": "two", "c/../2.jpg": "three", "d/e/1.jpg": "four", "1.jpg": "five"}
    )
    assert texts.find("a/1.jpg") == texts.find("x/../a//1.jpg") == "one"
    assert texts.find("b/1.jpg") == texts.find("/data/c/../b/1.jpg") == "two"
    assert texts.find("2.jpg") == texts.find("./2.jpg") == "three"
    assert texts.find("/data/d/e/1.jpg") == "four"
    assert texts.find("./1.jpg") == "five"
    assert texts.find("f/1.jpg") is None
    lines = [{"image": "a.jpg", "caption": "x"}, {"image": "b/.././a.jpg", "caption": "y"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"line 2: 'b/\.\./\./a\.jpg' has a text already"):
        read_captions(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"question": {"a": 1}, "answers": ["x"]}, "stands where a text belongs"),
        ({"question": "Q", "answers": [{"a": 1}]}, "stands where a text belongs"),
        ({"question": "Q", "answers": {"a": 1}}, "stands where a text belongs"),
        ({"question": "Q", "answers": [None]}, "has no answer"),
        ({"question": "Q", "answer": math.nan}, "has no answer"),
    ],
)
def test_what_is_no_text_is_no_answer(tmp_path, row, named):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=named):
        list(read_questions(path))


@pytest.mark.parametrize("answer", ["[{[1]}]", "[{[1]:2}]", "[" + "-" * 20_000 + "1]"])
def test_a_cell_that_is_no_python_list_is_the_answer_itself(tmp_path, answer):
    (tmp_path / "q.tsv").write_text(f"index\tquestion\tanswer\n{'9' * 5000}\tQ\t{answer}\n")
    (question,) = read_questions(tmp_path / "q.tsv")
    assert question.answers == (answer,)


def test_options_that_pandas_writes_as_nan_are_none(tmp_path):
    row = {"index": 1, "question": "Q", "A": "banana", "B": "apple", "C": math.nan, "D": "nan", "answer": "A"}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row))
    (question,) = read_questions(path)
    assert question.options == {"A": "banana", "B": "apple"}


@pytest.mark.parametrize(
    "edited",
    [
        {"parts": [1.0]},
        {"parts": [10**400]},
        {"parts": "x"},
        {"words": 10**400},
        {"id": 3},
    ],
)
def test_an_edited_line_is_named_and_nothing_is_lost(tmp_path, capsys, edited):
    out = tmp_path / "o"
    given = [CHECK, f"--checklists={checklists(tmp_path)}", f"--captions={captions(tmp_path)}", f"--out={out}"]
    with JudgeServer(answers) as server:
        evaluate.main([*given, *judged_by(server, tmp_path)])
        lines = lines_of(out)
        lines[2] |= edited
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / "items.jsonl").write_text(text)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            evaluate.main([*given, *judged_by(server, tmp_path)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "items.jsonl" in line
    assert "remove" in line
    assert (out / "items.jsonl").read_text() == text


def test_an_empty_caption_states_nothing_and_any_match_is_one(tmp_path):
    metric = DCScore()
    item = Item("a", " ", ("o", ["one"], tmp_path / "a.png"))
    (missing,) = metric.judge(NobodyIsAsked(), [item])
    assert missing.reason == "a.png: no such file"
    (tmp_path / "a.png").touch()
    (judged,) = metric.judge(NobodyIsAsked(), [item])
    assert metric.parts(item, judged) is None
    for match in (0, 1, 50):  # also with a statement that the reference lacks, as in the published script
        draws = {"facts": ["x"], "relevance": [1], "matches": [[match]], "verified": [[1]]}
        assert metric.parts(item, draws) == pytest.approx([1, 1, 1, 1, 1, 1, 1])


class NobodyIsAsked:
    def ask(self, asks):
        assert not asks
        return []


def test_letters_are_of_the_options_that_were_shown(tmp_path):
    """Judgements of a run in which other pictures had captions, and so other shuffles."""
    asked = {"question": "Which?", "choices": ["red", "blue", "green"], "answer": "red", "category": ["c"]}
    questions, whole = {f"nat_{i}": [asked] * 3 for i in range(4)}, tmp_path / "whole"
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "c.json").write_text(json.dumps(dict.fromkeys(questions, "text")))
    (tmp_path / "fewer.json").write_text(json.dumps(dict.fromkeys(list(questions)[1:], "text")))

    def right(body):
        options = [text for kind, text in blocks_of(body) if kind == "option"]
        return Reply("text", "ABCD"[options.index("red")])

    given = ["--metric=captionqa", f"--questions={tmp_path / 'q.json'}"]
    with JudgeServer(right, forms=()) as server:
        evaluate.main([*given, f"--captions={tmp_path / 'c.json'}", f"--out={whole}", *judged_by(server, tmp_path)])
    assert results_of(whole)["score"] == 100.0
    given += [f"--captions={tmp_path / 'fewer.json'}", f"--judgements={whole / 'items.jsonl'}"]
    evaluate.main([*given, f"--out={tmp_path / 'o'}"])
    assert (results_of(tmp_path / "o")["score"], results_of(tmp_path / "o")["invalid"]) == (100.0, 3)


def test_words_are_those_of_captions_not_of_questions(tmp_path):
    """And unknown where only what was made of a caption is given."""
    asked = {"question": "Which?", "choices": ["red", "blue"], "answer": "red", "category": ["c"]}
    (tmp_path / "q.json").write_text(json.dumps({"nat_1": [asked] * 9, "nat_2": [asked]}))
    (tmp_path / "c.json").write_text('{"nat_1": "one", "nat_2": "one two three"}')
    given = [f"--captions={tmp_path / 'c.json'}", f"--questions={tmp_path / 'q.json'}", f"--out={tmp_path / 'o'}"]
    with JudgeServer(lambda body: Reply("text", "B"), forms=()) as server:
        evaluate.main(["--metric=captionqa", *given, *judged_by(server, tmp_path)])
    assert results_of(tmp_path / "o")["words"] == 2.0
    graph = {"objects": ["car"], "attributes": [], "relations": []}
    (tmp_path / "g.jsonl").write_text(json.dumps({"id": "a", "candidate": graph, "references": [graph]}))
    evaluate.main(["--metric=capture", f"--graphs={tmp_path / 'g.jsonl'}", f"--out={tmp_path / 'p'}"])
    assert (results_of(tmp_path / "p")["words"], results_of(tmp_path / "p")["empty"]) == (None, 0)


def test_without_anything_to_divide_by_there_is_no_score(tmp_path, capsys):
    given = [CHECK, f"--checklists={checklists(tmp_path, 2)}", f"--captions={captions(tmp_path, 2)}"]

    def says_nothing(body):
        questions = [kind for kind, _ in blocks_of(body) if kind == "question"]
        found = [{"question": i, "why": "", "answer": "not_mentioned"} for i, _ in enumerate(questions, start=1)]
        return Reply("text", json.dumps({"answers": found}))

    with JudgeServer(says_nothing) as server, pytest.raises(SystemExit):
        evaluate.main([*given, f"--out={tmp_path / 'o'}", *judged_by(server, tmp_path)])
    assert "what it divides by is 0 over all 2 judgements" in capsys.readouterr().err
    assert results_of(tmp_path / "o")["coverage"] == 0.0
