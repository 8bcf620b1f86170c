"""The suite of caption benchmarks: one folder, captions made once, and metrics that fail alone; and its comparison."""

import json
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from evals.test_evaluate import answers, judged_by, opinion, results_of
from judges.misbehaving import JudgeServer, Reply, kind_of
from PIL import Image

from balcap_jax import caption, compare, evaluate, models
from balcap_jax.captioning import captioner
from balcap_jax.config import recipes as configuration
from balcap_jax.config.recipes import take_judge
from balcap_jax.data import photos
from balcap_jax.evals import protocol
from balcap_jax.evals.inputs import Texts, read_captions

NAMES = [f"p{i}.png" for i in range(4)]
SETTINGS = {"model": "/m", "model_digest": "d", "prompt": "Describe.", "max_tokens": 9, "temperature": 0.0}
SETTINGS |= {"dtype": "bfloat16", "max_image_tokens": 384}


def bench(tmp_path):
    """Checklists and CaptionQA of four pictures, DeCapBench of the first; an arena that is broken."""
    data = tmp_path / "bench"
    (data / "images" / "dcscore").mkdir(parents=True)
    for name in NAMES:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / "images" / name)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / "images" / "dcscore" / NAMES[0])
    lines = [{"id": name, "items": [{"kind": "c", "question": f"Is {name}?"}]} for name in NAMES]
    (data / "checklist.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = {"question": "Which?", "choices": ["red", "blue"], "answer": "red", "category": ["c"]}
    (data / "captionqa.json").write_text(json.dumps({name: [asked, asked] for name in NAMES}))
    oracle = {"image_name": NAMES[0], "oracle_caption": "o", "oracle_facts": ["one"]}
    (data / "dcscore.jsonl").write_text(json.dumps(oracle) + "\n")
    (data / "caparena.json").write_text("[]")
    return data


def captions(tmp_path, name, settings=None, **texts):
    """Captions of the pictures, the first two of them cut, and of the one in images/dcscore an empty one."""
    path = tmp_path / f"{name}.jsonl"
    lines = [{"image": one, "caption": texts.get(one[:2], f"Caption {one}.")} for one in NAMES]
    lines = [line | {"truncated": i < 2} for i, line in enumerate(lines)]
    lines.append({"image": f"dcscore/{NAMES[0]}", "caption": "", "truncated": False})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings:
        path.with_name(f"{name}.settings.json").write_text(json.dumps(settings))
    return path


def judge(body):
    return Reply("text", "hm") if kind_of(body) == "choice" else answers(body)


def test_one_metric_that_fails_stops_no_other(tmp_path, capsys):
    file, out = captions(tmp_path, "c", SETTINGS), tmp_path / "eval" / "base"
    given = ["--suite=captions", f"--data={bench(tmp_path)}", f"--captions={file}", f"--out={out}"]
    with JudgeServer(judge) as server:
        evaluate.main([*given, *judged_by(server, tmp_path)])
        asked = server.requests
        evaluate.main([*given, *judged_by(server, tmp_path)])
        assert server.requests == asked  # What is judged is not asked again.
    told = capsys.readouterr().out
    assert "bcapscore: left out: there is no bcapscore.jsonl in " in told
    assert "caparena: no score: " in told
    assert "is no JSON object" in told
    # The caption of images/dcscore is the empty one, and not that of images/p0.png.
    assert "dcscore: no score: none of the 1 items has a valid judgement (1 x no statement" in told
    checklist = results_of(out / "checklist")
    said = [opinion(f"Is {name}?Caption {name}.") for name in NAMES]
    assert checklist["score"] == pytest.approx(100 * said.count("yes") / (said.count("yes") + said.count("no")))
    assert (checklist["captions"], checklist["truncated"]) == (SETTINGS, 50.0)
    assert "50.0% of the captions were cut at 9 tokens" in told
    assert (results_of(out / "dcscore")["score"], results_of(out / "dcscore")["truncated"]) == (None, 0.0)
    assert results_of(out / "captionqa")["unparsable"] == 8
    assert "warning: 100% of the answers are none" in told

    other = captions(tmp_path, "other", SETTINGS | {"model": "/n", "model_digest": "e"}, p3="Another.")
    given = ["--suite=captions", f"--data={tmp_path / 'bench'}", f"--captions={other}"]
    with JudgeServer(judge) as server:
        evaluate.main([*given, f"--out={tmp_path / 'eval' / 'rl'}", *judged_by(server, tmp_path)])
    capsys.readouterr()
    compare.main([str(out), str(tmp_path / "eval" / "rl")])
    told = capsys.readouterr().out
    assert "## checklist" in told
    assert "## captionqa" in told
    assert "no verdict" not in told
    for name in (out, tmp_path / "eval" / "rl"):
        assert f"dcscore of {name / 'dcscore'} has no score: none of its items was valid" in told
    assert "| truncated | 50.00 | 50.00 |" in told


def test_a_suite_of_which_nothing_works_fails(tmp_path, capsys):
    data, out = bench(tmp_path), tmp_path / "o"
    for name in ("checklist.jsonl", "captionqa.json"):
        (data / name).unlink()

    def refused(*given) -> str:
        with pytest.raises(SystemExit) as ended:
            evaluate.main([*given, f"--out={out}"])
        assert ended.value.code == 2
        return capsys.readouterr().err

    file = captions(tmp_path, "c")
    with JudgeServer(judge) as server:
        given = ["--suite=captions", f"--captions={file}", *judged_by(server, tmp_path)]
        assert f"none of the 2 benchmarks of {data} has a score" in refused(*given, f"--data={data}")
        assert "holds no benchmark; it takes dcscore.jsonl, captionqa.json, " in refused(*given, f"--data={tmp_path}")
        capsys.readouterr()
        file.write_text("no captions\n")
        assert refused(*given, f"--data={data}").startswith(f"error: {file}, line 1 is not JSON")
        assert capsys.readouterr().out == ""
    assert "needs --data=DIR" in refused("--suite=captions", f"--captions={file}")
    assert "needs either --model=DIR or --captions=F.jsonl" in refused("--suite=captions", f"--data={data}")
    assert "give either --metric or --suite" in refused(f"--captions={file}")
    given = ["--suite=captions", f"--captions={file}", f"--data={data}"]
    assert "--prompt is for captions that --model writes" in refused(*given, "--prompt=a")
    given = ["--metric=docvqa", "--questions=q", "--model=m"]
    assert "--prompt is for --suite=captions: general benchmarks have their own" in refused(*given, "--prompt=a")


def test_a_judge_that_is_down_is_described_once(tmp_path, capsys):
    given = ["--suite=captions", f"--data={bench(tmp_path)}", f"--captions={captions(tmp_path, 'c')}"]
    with pytest.raises(SystemExit):
        evaluate.main([*given, f"--out={tmp_path / 'o'}", "--judge.endpoints=http://127.0.0.1:9/v1"])
    told, failed = capsys.readouterr()
    assert told.count("is down (connection refused)") == 1
    assert "captionqa: no score: for the reason of dcscore" in told
    assert "checklist: no score: for the reason of dcscore" in told
    assert failed.count("\n") == 1


def test_a_model_captions_the_pictures_once(tmp_path, monkeypatch, capsys):
    data, out = bench(tmp_path), tmp_path / "o"
    record = photos.Record("a", lambda: None, "what is here " * 20, ("yes no " * 20,))
    tokenizer = photos.caption_tokenizer(photos.Photos([record] * 3, 1, 0))
    sizes = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 16, "mlp": 16, "layers": 2}
    sizes |= {"width": 16, "heads": 2, "kv_heads": 1, "head_size": 8, "image_size": 24, "patch_size": 8}
    fields = configuration.default_config().model.to_dict() | sizes | {"prompt_tokens": 64}
    policy, processor = models.build(fields, tokenizer)
    model = models.save(tmp_path / "model", fields, jax.jit(policy.init)(jax.random.key(0)), processor)
    given = [
        "--suite=captions",
        f"--data={data}",
        f"--model={model}",
        f"--out={out}",
        "--max_tokens=3",
        "--prompt=what",
    ]
    with JudgeServer(judge) as server:
        evaluate.main([*given, *judged_by(server, tmp_path)])
        monkeypatch.setattr(captioner, "Captioner", None)  # A second run must not load the model.
        evaluate.main([*given, *judged_by(server, tmp_path)])
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert {line["image"] for line in lines} == {*NAMES, f"dcscore/{NAMES[0]}"}
    results = results_of(out / "checklist")
    made = {"model": str(model), "prompt": "what", "max_tokens": 3, "temperature": 0.0, "dtype": "bfloat16"}
    assert {name: results["captions"][name] for name in made} == made
    cut = [line["truncated"] for line in lines if "/" not in line["image"]]
    assert results["truncated"] == 25.0 * sum(cut)


def test_the_commands_of_the_page_can_be_given():
    """Each with the arguments that it needs, as far as that can be said without its files."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    page = page.replace("$J", "http://judge:8000/v1")
    commands = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("balcap ")]
    evaluations = [given for name, *given in commands if name == "evaluate" and "..." not in given]
    assert len(evaluations) >= 12
    for given in evaluations:
        rest, _ = take_judge(given)
        args = evaluate.make_parser().parse_args(rest)
        evaluate.check_arguments(evaluate.make_parser(), args)
    for given in ([*given] for name, *given in commands if name == "caption"):
        caption.make_parser().parse_args(given)


def test_what_decides_between_two_files_of_captions():
    assert protocol.differences(SETTINGS, SETTINGS | {"model": "/n", "seed": 3}) == {}
    assert protocol.differences({}, SETTINGS) == {}
    assert protocol.differences(SETTINGS, SETTINGS | {"dtype": "float32"}) == {"compute type": ("bfloat16", "float32")}
    one_size = {name: value for name, value in SETTINGS.items() if name != "max_image_tokens"}
    assert protocol.differences(SETTINGS, one_size) == {}  # Of another family, whose pictures have one size.
    changes = {"prompt": "What?", "max_tokens": 8, "temperature": 1.0, "max_image_tokens": 256, "samples": 4}
    named = ["prompt", "token limit", "temperature", "image cap", "samples a picture"]
    assert list(protocol.differences(SETTINGS, SETTINGS | changes)) == named


def test_prompts_of_single_pictures_are_part_of_how_captions_were_made(tmp_path):
    lines = [{"id": "a", "caption": "x", "prompt": "Count."}, {"id": "b", "caption": "y"}]
    found = []
    for prompt in ("Count.", "Look."):
        path = tmp_path / "c.jsonl"
        path.write_text(
            "".join(json.dumps(line | ({"prompt": prompt} if i == 0 else {})) + "\n" for i, line in enumerate(lines))
        )
        found.append(protocol.made(SETTINGS, read_captions(path)))
    assert found[0]["own_prompts"].startswith("1, digest ")
    assert list(protocol.differences(*found)) == ["prompts of single pictures"]
    assert "own_prompts" not in protocol.made(SETTINGS, Texts({"a": "x"}))
