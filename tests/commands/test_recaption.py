"""References, units and criteria written by a judge: what is asked, what is written, and what a kill leaves behind."""

import json
import threading

import numpy as np
import pytest
from judges.misbehaving import JudgeServer, Reply, kind_of, text_of, well_behaved
from PIL import Image
from system.command_runs import finish, start, start_afresh

from balcap_jax import data, recaption
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines
from balcap_jax.config import recipes as configuration


@pytest.fixture
def photos(tmp_path):
    """Five pictures, of which "c.png" has the pixels of "a.png", and a text file by the name of a picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(["a", "b", "c", "deep/d", "e"]):
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(0 if name == "c" else i).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1 if name == "c" else 9)
    (folder / "torn.jpg").write_text("no picture")
    return folder


def judge_of(server, tmp_path, **fields):
    given = {"endpoints": server.url, "model": "the-model", "cache_dir": tmp_path / "cache"} | fields
    return [f"--judge.{name}={value}" for name, value in given.items()]


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(tmp_path, server, *arguments, **fields):
    recaption.main([*map(str, arguments), *judge_of(server, tmp_path, **fields)])


def test_references_of_a_folder_can_be_trained_on(photos, tmp_path, capsys):
    out = photos / "captions.jsonl"
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, f"--images={photos}", f"--out={out}", "--prompt=What is here?")
        asked = [kind_of(body) for body in server.seen]
        assert (asked.count("describe"), asked.count("units")) == (4, 4)
        run(tmp_path, server, f"--images={photos}", f"--out={out}", "--prompt=What is here?")
        assert server.requests == 8, "the second run asked again"
    written = lines_of(out)
    assert [line["image"] for line in written] == ["a.png", "b.png", "deep/d.png", "e.png"]
    assert lines_of(photos / "captions.duplicates.jsonl") == [{"same_as": "a.png", "image": "c.png"}]
    (failed,) = lines_of(photos / "captions.errors.jsonl")
    assert failed["image"] == "torn.jpg"
    assert "no picture" in failed["error"]
    assert len({line["caption"] for line in written}) == 4
    for line in written:
        first, second = line["reference_units"]
        assert line["caption"] == f"{first}. {second}."
        assert line["prompt"] == "What is here?"
        assert second == "It is asked: What is here?"
    assert "4 lines (0 new)" in capsys.readouterr().out

    settings = {"name": "photos", "data_dir": str(out), "max_pixels": 0, "validation_share": 0.3, "test_share": 0.3}
    splits = data.load(settings, 16)
    examples = [part[i] for part in splits[:3] for i in range(len(part))]
    assert {one["id"]: one["reference"] for one in examples} == {line["image"]: line["caption"] for line in written}
    assert "reference_units" in splits.fields


def test_each_sample_of_sharegpt4v_keeps_its_own_prompt(photos, tmp_path):
    entries = [
        {
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nTell me of {name}"},
                {"from": "gpt", "value": "An old caption."},
            ],
        }
        for name in ("a", "b", "b")
    ]
    source = tmp_path / "elsewhere" / "share.json"
    source.parent.mkdir()
    source.write_text(json.dumps(entries))
    out = tmp_path / "out.jsonl"
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, f"--images={source}", f"--root={photos}", f"--out={out}")
    written = lines_of(out)
    assert [(line["image"], line["prompt"]) for line in written] == [
        ("photos/a.png", "Tell me of a"),
        ("photos/b.png", "Tell me of b"),
    ]
    assert all("An old caption" not in json.dumps(line) for line in written)


def test_units_and_rubrics_are_added_to_what_lines_say(photos, tmp_path):
    source = photos / "captions.jsonl"
    known = [
        {"image": "a.png", "caption": "A dog. It is red.", "mine": 1},
        {"image": "b.png", "id": "second", "captions": ["A cat."], "questions": []},
        {"image": "e.png", "caption": "A hat."},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in known))
    students = tmp_path / "students.jsonl"
    students.write_text('{"image": "a.png", "caption": "a hog"}\n{"id": "second", "image": "x", "caption": "a bat"}\n')
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, "--write=units", f"--images={source}", f"--out={tmp_path / 'units.jsonl'}")
        given = [f"--images={source}", f"--students={students}", f"--out={tmp_path / 'rubrics.jsonl'}"]
        run(tmp_path, server, "--write=rubrics", *given)
        assert {kind_of(body) for body in server.seen} == {"units", "rubric_writer"}
    first, second, third = lines_of(tmp_path / "units.jsonl")
    assert first == known[0] | {"image": "photos/a.png", "reference_units": ["A dog", "It is red"]}
    assert second == known[1] | {"image": "photos/b.png", "reference_units": ["A cat"]}
    assert third["reference_units"] == ["A hat"]
    rubrics = lines_of(tmp_path / "rubrics.jsonl")
    assert [line["rubrics"][0]["criterion"] for line in rubrics] == ["is not a hog", "is not a bat"]
    assert {line["rubrics"][0]["weight"] for line in rubrics} <= {1, 2, 3}
    (left,) = lines_of(tmp_path / "rubrics.errors.jsonl")
    assert left == {"error": "the student's file has no caption of it", "image": "photos/e.png"}


def test_rubrics_of_sharegpt4v_find_the_students_captions_by_path(photos, tmp_path):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}]
    source = photos / "share.json"
    source.write_text(json.dumps([{"image": "deep/d.png", "conversations": turns, "reference_units": ["A dog"]}]))
    students = tmp_path / "students.jsonl"
    students.write_text('{"image": "deep/d.png", "caption": "a hog"}\n')
    out = tmp_path / "out.jsonl"
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, "--write=rubrics", f"--images={source}", f"--students={students}", f"--out={out}")
    (line,) = lines_of(out)
    assert [one["criterion"] for one in line["rubrics"]] == ["is not a hog"]
    assert (line["image"], line["reference_units"]) == ("photos/deep/d.png", ["A dog"])


def test_a_picture_is_asked_about_once_however_its_path_is_spelt(photos, tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}]
    source = photos / "share.json"
    names = ["a.png", "./b.png", "deep/../e.png", str(photos / "deep/d.png"), "./a.png", "deep/../b.png"]
    entries = [{"image": name, "conversations": turns} for name in names]
    source.write_text(json.dumps([*entries, {"id": "text", "conversations": turns}]))
    students = tmp_path / "students.jsonl"
    said = {"./a.png": "a hog", str(photos / "b.png"): "a bat", "e.png": "a hen", "deep/../deep/d.png": "a cod"}
    students.write_text("".join(json.dumps({"image": name, "caption": text}) + "\n" for name, text in said.items()))
    out = tmp_path / "out.jsonl"
    with JudgeServer(well_behaved) as server:
        given = ["--write=rubrics", f"--students={students}", f"--out={out}"]
        run(tmp_path, server, *given, f"--images={source}")
        asked = server.requests
        source.write_text(json.dumps([entry | {"image": f"deep/.././{entry['image']}"} for entry in entries[:3]]))
        run(tmp_path, server, *given, f"--images={source}")
        assert server.requests == asked, "other spellings were asked about again"
    assert "1 entries of text alone are left out" in capsys.readouterr().out
    lines = {line["image"]: line["rubrics"][0]["criterion"] for line in lines_of(out)}
    assert lines == {
        "photos/a.png": "is not a hog",
        "photos/b.png": "is not a bat",
        "photos/e.png": "is not a hen",
        "photos/deep/d.png": "is not a cod",
    }


def test_failures_are_named_and_asked_again_on_demand(photos, tmp_path):
    def behave(body):
        if kind_of(body) == "describe" or "asked" not in text_of(body):
            return well_behaved(body)
        return Reply("status", "no", status=400)

    out = tmp_path / "out.jsonl"
    given = [f"--images={photos}", f"--out={out}"]
    with JudgeServer(behave) as server:
        with pytest.raises(SystemExit):
            run(tmp_path, server, *given)
        failed = lines_of(tmp_path / "out.errors.jsonl")
        assert sum("HTTP 400" in line["error"] for line in failed) == 5, "a copy of what failed is a failure too"
        server.behave = well_behaved
        before = server.requests
        with pytest.raises(SystemExit):
            run(tmp_path, server, *given)
        assert server.requests == before
        run(tmp_path, server, *given, "--retry_errors")
    assert len(lines_of(out)) == 4
    assert [line["image"] for line in lines_of(tmp_path / "out.errors.jsonl")] == ["photos/torn.jpg"]


def test_a_judge_that_dies_stops_it_and_leaves_the_rest_to_be_asked(tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i:02}.png")
    out = tmp_path / "out.jsonl"
    given = [f"--images={folder}", f"--out={out}"]
    with JudgeServer(well_behaved) as server:
        server.behave = lambda body: well_behaved(body) if server.requests < 10 else Reply("status", "no", status=400)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, server, *given, concurrency=8)
        said = capsys.readouterr().err
        assert ended.value.code != 0
        assert "judge.max_failure_rate = 0.2 allows" in said
        assert "HTTP 400" in said
        assert not (tmp_path / "out.errors.jsonl").exists() or len(lines_of(tmp_path / "out.errors.jsonl")) < 32
        server.behave = well_behaved
        run(tmp_path, server, *given, "--retry_errors", concurrency=8)
    assert sorted(line["image"] for line in lines_of(out)) == [f"many/{i:02}.png" for i in range(40)]


def test_a_file_that_is_not_its_own_is_refused_untouched(photos, tmp_path, capsys):
    for name, content in {
        "one.jsonl": '{"precious": 1}',
        "two.jsonl": '{"a": 1}\n{"b": 2}',
        "text.jsonl": "no JSON",
    }.items():
        out = tmp_path / name
        out.write_text(content)
        with JudgeServer(well_behaved) as server, pytest.raises(SystemExit):
            run(tmp_path, server, f"--images={photos}", f"--out={out}")
        assert "name another file with --out" in capsys.readouterr().err
        assert out.read_text() == content


def test_names_that_are_no_text_do_not_hinder_a_second_run(photos, tmp_path):
    (photos / b"b\xffd.jpeg".decode(errors="surrogateescape")).write_bytes((photos / "b.png").read_bytes())
    out = tmp_path / "out.jsonl"
    given = [f"--images={photos}", f"--out={out}"]
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, *given)
        run(tmp_path, server, *given, "--retry_errors")
    assert [line["image"] for line in lines_of(tmp_path / "out.errors.jsonl")].count("photos/b\\xffd.jpeg") == 1


def test_other_settings_do_not_mix_in_one_file(photos, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, f"--images={photos}", f"--out={out}")
        with pytest.raises(SystemExit):
            run(tmp_path, server, f"--images={photos}", f"--out={out}", "--prompt=Say one word.")
    assert "made with prompt" in capsys.readouterr().err


def test_lines_that_were_torn_or_only_lack_their_end(tmp_path):
    path = tmp_path / "lines.jsonl"
    for content, entries in (('{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}]), ('{"a": 1}\n{"b"', [{"a": 1}])):
        path.write_text(content)
        with AppendedLines(path) as lines:
            assert lines.entries == entries
        assert path.read_text() == content, "looking changes nothing"
        with AppendedLines(path) as lines:
            lines.append([{"c": 3}])
        assert lines_of(path) == [*entries, {"c": 3}]


def test_killed_at_any_point_nothing_is_asked_twice_and_no_line_is_lost(photos, tmp_path):
    process, killed = None, threading.Event()

    def behave(body):
        if process is not None and server.requests > 5 and not killed.is_set():
            killed.set()
            process.kill()
        return well_behaved(body)

    out = tmp_path / "out.jsonl"
    with JudgeServer(behave) as server:
        given = [f"--images={photos}", f"--out={out}", *judge_of(server, tmp_path, concurrency=1)]
        process = start("balcap_jax.recaption", *given)
        finish(process, expected=-9)
        before = server.requests
        assert 5 < before < 8
        process = None
        finish(start_afresh("balcap_jax.recaption", *given))
        texts = [json.dumps(body["messages"]) for body in server.seen]
        assert len(texts) - len(set(texts)) <= 1, "only the one under way may come twice"
        whole = tmp_path / "whole.jsonl"
        run(tmp_path, server, f"--images={photos}", f"--out={whole}", concurrency=1, cache_dir=tmp_path / "other")
    assert lines_of(out) == lines_of(whole)
    assert len(lines_of(out)) == 4


def test_the_cost_limit_stops_between_batches_and_the_ledger_lasts(photos, tmp_path):
    out = tmp_path / "out.jsonl"
    prices = {"price_in": 1000, "price_out": 0, "concurrency": 1, "max_cost": 0.3}
    with JudgeServer(well_behaved) as server:
        with pytest.raises(SystemExit):
            run(tmp_path, server, f"--images={photos}", f"--out={out}", **prices)
        assert server.requests == 4  # Two pictures of two questions of 100 tokens each; 0.2 is below the limit.
        assert len(lines_of(out)) == 2
        ledger = json.loads((tmp_path / "out.judge.json").read_text())
        assert ledger["cost"] == pytest.approx(0.4)
        run(tmp_path, server, f"--images={photos}", f"--out={out}", **prices | {"max_cost": 10})
        assert json.loads((tmp_path / "out.judge.json").read_text())["calls"] == 8
    assert len(lines_of(out)) == 4


def test_the_estimate_asks_nobody(photos, capsys):
    recaption.main([f"--images={photos}", "--estimate", "--judge.price_in=1", "--judge.price_out=2"])
    told = capsys.readouterr().out
    assert "6 pictures" in told
    assert "describe.v1" in told
    assert "units.v1" in told
    # 6 x (fixed + 1400) x 1 + 6 x 300 x 2 and the same of units, per million
    total = float(told.split("cost: ")[1])
    assert 0.01 < total < 0.1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--images=nowhere", "--out=x.jsonl"], "nowhere"),
        (["--images={photos}"], "--out"),
        (["--images={photos}", "--out=x.jsonl", "--write=rubrics"], "--students"),
        (["--images={photos}", "--out=x.jsonl", "--write=units"], "has no reference"),
        (["--images={photos}", "--out=x.jsonl", "--max_pixels=0"], "--max_pixels=0"),
        (["--images={photos}", "--out=x.jsonl", "--judge.endpoint=http://h/v1"], "judge.endpoints"),
        (["--images={photos}", "--out=x.jsonl", "--judge.endpoints=http://127.0.0.1:9/v1"], "127.0.0.1:9"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(photos, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        recaption.main([text.format(photos=photos) for text in arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert not list(tmp_path.glob("x*"))


def test_another_judge_does_not_write_into_the_same_file(photos, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, f"--images={photos}", f"--out={out}")
        before = out.read_bytes()
        source = tmp_path / "more.jsonl"
        source.write_text(json.dumps({"image": "photos/a.png", "caption": "A dog."}) + "\n")
        with pytest.raises(SystemExit):
            run(tmp_path, server, "--write=units", f"--images={source}", f"--out={out}")
    assert "made with write 'references', not 'units'" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_judge_fields_on_a_command_line_are_those_of_the_schema():
    rest, judge = configuration.take_judge(["--a", "--judge.rpm=7", "--judge.model", "m"])
    assert rest == ["--a"]
    assert (judge.name, judge.rpm, judge.model) == ("remote", 7, "m")
    with pytest.raises(UserError, match=r"judge\.rpm"):
        configuration.take_judge(["--judge.rpm=fast"])


def test_lines_of_students_are_checked(tmp_path):
    path = tmp_path / "s.jsonl"
    with AppendedLines(path) as lines:
        lines.append([{"image": "a"}])
    with pytest.raises(UserError, match="line 1 has no picture and caption"):
        recaption.Sources("", "rubrics", students=str(path)).drafts()
