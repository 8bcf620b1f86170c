"""The checks before a run: a sound set-up passes without a word of warning, and each planted fault is found by name."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor.set_up import ANNOTATIONS, RECIPE, ROOT, assert_fault, seeing, write_lines
from ml_collections import ConfigDict

from balcap_jax.config import recipes
from balcap_jax.doctor import __main__ as doctor
from balcap_jax.doctor import checkpoint, devices, judge, outlay, pictures, places
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, first_fault
from balcap_jax.judges.schema import Usage
from balcap_jax.training.judge_trial import Trial
from balcap_jax.training.workdir import claim

torch = pytest.importorskip("torch", reason="transformers needs torch to write a model")
from hub_directories import hub_directory  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
from misbehaving import JudgeServer, Reply, kind_of, well_behaved  # noqa: E402


@pytest.fixture(scope="module")
def seen(sound) -> pictures.Seen:
    return pictures.look(sound.config(), 96, tokenizer=False)[1]


@pytest.fixture(scope="module")
def built(sound) -> checkpoint.Built:
    return checkpoint.look(sound.config(), None)[1]


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_a_sound_set_up_passes_without_a_word_of_warning(sound, tmp_path, capsys):
    start = time.process_time()
    doctor.main(sound.command(tmp_path / "run"))
    assert time.process_time() - start < 60
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.splitlines()[-1] == "ready"
    assert not [word for word in ("fault", "warning", "error", "left out") if word in output.lower()]
    assert f"model   {sound.folder / 'model'}: qwen2_5_vl, " in output, "the block of training"
    rows = {line.split()[1]: line for line in output.splitlines() if line.startswith("  ok ")}
    checks = {"settings", "checkpoint", "data", "prompts", "references", "judge", "workdir", "disk", "time", "money"}
    assert rows.keys() == checks
    assert "13 samples to train on, 4 for validation, 7 held out for tests" in rows["data"]
    assert "units.jsonl has lines about 24 of 24 samples" in rows["references"]
    assert f"judge {sound.server.url}" in rows["judge"]
    # The answers are shown: two assertions, two units, and marks.
    shown = [line for line in output.splitlines() if line.startswith("  precision ")]
    assert [line.split(":")[0].split()[1:] for line in shown] == [["A", "picture"], ["Of", "a", "thing"]]
    assert all(" verified, " in line for line in shown)
    assert sum(line.startswith("  recall      ") for line in output.splitlines()) == 2
    assert sum(line.startswith("  linguistic  clarity ") for line in output.splitlines()) == 1
    assert not (tmp_path / "run").exists(), "it left something"


def test_faults_come_first_and_the_first_of_them_last_on_stderr(sound, tmp_path, capsys):
    more = {"model.path": sound.folder / "none", "data.prompt": "word " * 300}
    with pytest.raises(SystemExit) as ended:
        doctor.main(sound.command(tmp_path, **more))
    assert ended.value.code == 1
    output, errors = capsys.readouterr()
    verdicts = [
        line.split()[0] for line in output.splitlines() if line.startswith(("  fault", "  ok", "  not checked"))
    ]
    assert verdicts == sorted(verdicts, key=["fault", "not", "ok"].index)
    (last,) = errors.splitlines()
    assert last.startswith(f"not ready: checkpoint: no model at {sound.folder / 'none'}")
    assert last.endswith("give a directory of a Hugging Face checkpoint, of an adapter, or one that training wrote")


def test_json_says_the_same(capsys, monkeypatch, tmp_path):
    """Of a published recipe to which nothing was given."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", "--json"])
    assert ended.value.code == 1
    output, errors = capsys.readouterr()
    told = json.loads(output)
    assert told["ready"] is False
    verdicts = {entry["check"]: entry["verdict"] for entry in told["checks"]}
    assert [check for check, verdict in verdicts.items() if verdict == FAULT] == ["settings", "checkpoint", "data"]
    first = told["checks"][0]
    assert errors.strip() == f"not ready: {first['check']}: {first['found']}; {first['remedy']}"
    assert verdicts["time"] == OK, "steps and tokens are known all the same"


def test_without_units_all_else_is_checked(sound):
    found, block = doctor.examine(sound.config(data__units=sound.folder / "none.jsonl"))
    verdicts = {finding.check: finding.verdict for finding in found}
    faults = [check for check, verdict in verdicts.items() if verdict == FAULT]
    assert faults == ["references"]
    assert verdicts[f"judge {sound.server.url}"] == OK, "by sentences in place of units"
    assert "13 samples to train on" in block


def test_the_scenes_need_nothing(tmp_path, capsys):
    given = [f"--config.data.data_dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}"]
    doctor.main([f"--config={ROOT / 'configs' / 'scenes.py'}", *given])
    output, errors = capsys.readouterr()
    assert errors == ""
    assert output.endswith("\nready\n")
    assert "8,192 + 64 + 128 pictures will be made" in output
    assert "data    scenes: 8,192 samples to train on, 64 for validation, 128 for tests" in output
    assert "precision 1.00, recall 1.00, linguistic 1.00 for the reference of scenes-test-000000" in output
    assert os.listdir(tmp_path) == []


def test_a_bad_configuration_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", "--config.rollout.bucket=5"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown config field 'rollout.bucket'; did you mean ")
    with pytest.raises(SystemExit) as ended:
        doctor.main([f"--config={RECIPE}", "--workdir=s3://bucket/run"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --workdir: it is a URL, and files are ")


def test_what_a_recipe_leaves_to_its_user(capsys):
    finding = doctor._settings(recipes.load(RECIPE))
    assert_fault(finding, "settings", "the recipe 'qwen25vl_3b' leaves to you: --config.data.manual_dir=FOLDER", "give")


# ---- checkpoint ------------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4967215360\n"


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reshape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (model / "config.json").write_text(json.dumps(config))


CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a shard is missing": (lambda model: shards(model)[1].unlink(), "is missing, though model", "download this shard"),
    "half of a shard": (lambda model: cut(shards(model)[0]), "is cut short", "download or copy it again"),
    "a pointer for a shard": (
        lambda model: shards(model)[0].write_text(POINTER),
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "a pointer for the tokenizer": (
        lambda model: (model / "tokenizer.json").write_text(POINTER),
        "tokenizer.json is a pointer of Git LFS",
        "git lfs pull",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json is missing", "copy"),
    "no processor": (
        lambda model: (model / "preprocessor_config.json").unlink(),
        "has no preprocessor_config.json",
        "download that file too",
    ),
    "other sizes": (reshape, "by config.json it is [40, 24]", "give the checkpoint that belongs to this config.json"),
    "no config": (lambda model: (model / "config.json").unlink(), "config.json is missing", "give a directory"),
}


@pytest.mark.parametrize("name", CHECKPOINT_FAULTS)
def test_faults_of_a_checkpoint(sound, tmp_path, name):
    plant, found, remedy = CHECKPOINT_FAULTS[name]
    shutil.copytree(sound.folder / "model", tmp_path / "model")
    plant(tmp_path / "model")
    (finding,), _ = checkpoint.look(sound.config(model__path=tmp_path / "model"), None)
    assert_fault(finding, "checkpoint", found, remedy)


def test_a_checkpoint_of_another_family(sound, tmp_path):
    hub_directory("llava", tmp_path / "model", torch.bfloat16)
    (finding,), _ = checkpoint.look(sound.config(model__path=tmp_path / "model"), None)
    assert_fault(finding, "checkpoint", "is of the family llava, the recipe 'qwen25vl_3b' is one of qwen2_5_vl", "take")


def test_a_frozen_part_that_is_not_there(sound):
    (finding,), _ = checkpoint.look(sound.config(stages__rl__freeze="^projector/"), None)
    assert_fault(finding, "checkpoint", "'stages.rl.freeze' ('^projector/') matches no parameter", "paths begin with")


# ---- data, prompts, references ---------------------------------------------------------------------------------------


def of_data(config: ConfigDict) -> dict[str, Finding]:
    return {finding.check: finding for finding in pictures.look(config, 96, tokenizer=False)[0]}


def test_data_without_their_json(own):
    (own.folder / "data" / ANNOTATIONS).unlink()
    found = of_data(own.config())
    assert_fault(found["data"], "data", f"no {ANNOTATIONS} in ", "put ShareGPT4V's JSON there")
    assert found["references"].verdict == UNCHECKED


def test_pictures_that_were_not_fetched(own):
    for path in sorted((own.folder / "data" / "coco").iterdir())[:12]:
        path.unlink()
    assert_fault(of_data(own.config())["data"], "data", "12 of 24 pictures are left out: coco/0000", "fetch what is")


def test_pictures_that_are_empty(own):
    for path in sorted((own.folder / "data" / "coco").iterdir())[5:10]:
        path.write_bytes(b"")
    finding = of_data(own.config())["data"]
    assert_fault(finding, "data", "5 of 24 pictures are left out: coco/000000000005.png (", "fetch what is missing")


def test_pictures_that_are_cut_off(own):
    """They begin as pictures do, so that only opening them shows it."""
    for path in (own.folder / "data" / "coco").iterdir():
        if pictures.data.photos.split_of(f"coco/{path.name}", 0.2, 0.2) == "train" and "0" in path.name[-6:-4]:
            cut(path)
    finding = of_data(own.config())["data"]
    assert_fault(finding, "data", " are damaged: coco/0000", "fetch these pictures again")


def test_fewer_samples_than_a_batch(sound):
    finding = of_data(sound.config(stages__rl__batch_size=16))["data"]
    assert_fault(finding, "data", "13 samples to train on, and a batch of rl takes 16", "lower stages.rl.batch_size")


def test_a_few_pictures_may_be_missing(own):
    path = min((own.folder / "data" / "coco").iterdir())
    path.unlink()
    finding = of_data(own.config())["data"]
    assert finding.verdict == OK
    assert "1 left out: coco/000000000000.png (" in finding.found


def test_a_prompt_that_is_too_long_for_all(sound, seen, built):
    config = sound.config(data__prompt="word " * 300)
    finding = pictures.prompts(config, seen, built.processor)
    count = len(seen.looked_at) + len(seen.shown)
    found = f"{count} of {count} prompts that were looked at need more than model.prompt_tokens (224), up to "
    assert_fault(finding, "prompts", found, "set model.prompt_tokens to ")
    needed = int(finding.remedy.split()[3])
    enough = checkpoint.look(sound.config(model__prompt_tokens=needed), None)[1].processor
    assert pictures.prompts(config, seen, enough).verdict == OK
    short = checkpoint.look(sound.config(model__prompt_tokens=needed - 1), None)[1].processor
    assert pictures.prompts(config, seen, short).verdict == FAULT


def test_a_prompt_that_is_too_long_for_one(own, built):
    path = own.folder / "data" / ANNOTATIONS
    entries = json.loads(path.read_text())
    names = {entry["image"]: entry for entry in entries}
    name = next(name for name in names if pictures.data.photos.split_of(name, 0.2, 0.2) == "train")
    names[name]["conversations"][0]["value"] = "word " * 300
    path.write_text(json.dumps(entries))
    config = own.config()
    finding = pictures.prompts(config, pictures.look(config, 96, tokenizer=False)[1], built.processor)
    assert_fault(finding, "prompts", "1 of ", "or shorten the prompts")
    assert f"({name})" in finding.found


def test_captions_that_cannot_be_long_enough(own, built):
    path = own.folder / "data" / ANNOTATIONS
    path.write_text(path.read_text().replace("A picture. Of a thing.", "A thing is here. " * 40))
    config = own.config()
    finding = pictures.prompts(config, pictures.look(config, 96, tokenizer=False)[1], built.processor)
    assert_fault(finding, "prompts", "captions of rollout.max_tokens (16) end below", "raise rollout.max_tokens to ")


def test_units_that_are_not_there(sound):
    found = of_data(sound.config(data__units=sound.folder / "none.jsonl"))
    assert_fault(found["references"], "references", "none.jsonl", "")
    assert found["data"].verdict == OK


def test_units_about_half_of_the_pictures(own):
    lines = (own.folder / "units.jsonl").read_text().splitlines(keepends=True)
    (own.folder / "units.jsonl").write_text("".join(lines[::2]))
    found = of_data(own.config())
    assert_fault(found["references"], "references", "has no line about 12 of 24 samples", "run the same `recaption`")
    assert found["data"].verdict == OK


def test_units_about_other_pictures(own):
    write_lines(own.folder / "units.jsonl", [{"image": "elsewhere/a.png", "reference_units": ["a thing is there"]}])
    found = of_data(own.config())
    assert_fault(found["references"], "references", "no line of ", "give what recaption wrote about these")


def test_lines_without_what_the_reward_reads(own):
    lines = [json.loads(line) for line in (own.folder / "units.jsonl").read_text().splitlines()]
    write_lines(
        own.folder / "units.jsonl", [line | ({"reference_units": []} if n % 2 else {}) for n, line in enumerate(lines)]
    )
    finding = of_data(own.config())["references"]
    assert_fault(finding, "references", "have no reference_units, such as coco/", "have `recaption` write it")
    write_lines(own.folder / "units.jsonl", [{"image": line["image"], "caption": "A thing."} for line in lines])
    finding = of_data(own.config())["references"]
    assert_fault(finding, "references", "the reward needs 'reference_units'", "recaption")


# ---- judge -----------------------------------------------------------------------------------------------------------


def of_judge(config: ConfigDict, seen: pictures.Seen, patience: float = 5.0) -> list[Finding]:
    return judge.look(config, seen, patience)[0]


def test_a_judge_that_is_down(sound, seen):
    (finding,) = of_judge(sound.config(judge__endpoints="http://127.0.0.1:9/v1"), seen)
    assert_fault(finding, "judge http://127.0.0.1:9/v1", "is down (connection refused)", "start it")


def test_a_judge_that_knows_no_such_model(sound, seen):
    def refuses(body: dict) -> str:
        return "" if body["model"] == "the-model" else f"The model {body['model']} does not exist"

    with JudgeServer(seeing, refuses=refuses) as server:
        (finding,) = of_judge(sound.config(judge__endpoints=server.url, judge__model="gpt-5o"), seen)
    assert_fault(
        finding,
        f"judge {server.url}",
        "HTTP 400: The model gpt-5o does not exist",
        "mend judge.endpoints or judge.model",
    )


FAILING = {
    "no JSON": (Reply("text", "What a lovely caption!"), "", "take a model that keeps to a JSON schema"),
    "too late": (Reply("hang"), "no answer within ", "raise judge.timeout"),
    "HTTP 503": (Reply("status", "overloaded", status=503), "HTTP 503", "see the server's log"),
    "HTTP 413": (Reply("status", "too large", status=413), "HTTP 413", "mend judge.model or judge.max_tokens"),
}


@pytest.mark.parametrize("name", FAILING)
def test_answers_that_cannot_be_used(sound, seen, name):
    reply, found, remedy = FAILING[name]

    def behave(body: dict) -> Reply:
        return reply if kind_of(body) == "recall" else seeing(body)

    with JudgeServer(behave) as server:
        (finding,) = of_judge(sound.config(judge__endpoints=server.url), seen, 3.0)
    assert_fault(finding, f"judge {server.url}", "no answer about recall: ", remedy)
    assert found in finding.found
    assert server.url in finding.found


def test_a_judge_that_does_not_see(sound, seen):
    with JudgeServer(well_behaved) as server:  # It marks words, whatever the picture.
        (finding,) = of_judge(sound.config(judge__endpoints=server.url), seen)
    assert_fault(
        finding, f"judge {server.url}", "on plain grey ones: it does not see", "name a model that sees pictures"
    )
    assert finding.details, "its answers are shown all the same"


def test_a_judge_that_finds_no_fact_in_its_own_sentence(sound, seen):
    """The units are those of three pictures, of which each says the same two."""

    def behave(body: dict, covered: int) -> Reply:
        answer = json.loads(seeing(body).content)
        for number, unit in enumerate(answer.get("units", [])):
            unit["covered"] = number < covered
        return Reply("text", json.dumps(answer))

    for covered, verdict in ((0, FAULT), (1, OK)):
        with JudgeServer(functools.partial(behave, covered=covered)) as server:
            (finding,) = of_judge(sound.config(judge__endpoints=server.url), seen)
        assert finding.verdict == verdict
        if verdict == FAULT:
            found = "it finds 0 of 6 reference units in captions that consist of these very sentences"
            assert_fault(finding, f"judge {server.url}", found, "name a model that understands the question")
            assert finding.details, "its answers are shown all the same"


def test_a_server_that_answers_to_any_name(sound, seen):
    for models, lists in (
        (b'{"data": [{"id": "the-model"}, {"id": "b"}]}', "the-model, b"),
        (b'{"data": [{"id": "nope"}, {"id": "b"}]}', ""),
        (b"what?", ""),
    ):
        with JudgeServer(seeing, models=models) as server:
            (finding,) = of_judge(sound.config(judge__endpoints=server.url, judge__model="nope"), seen)
        assert finding.verdict == OK
        lines = [line for line in finding.details if " lists " in line]
        said = f"judge {server.url} lists {lists}, and not 'nope' (judge.model), to which it answers: see that it is"
        assert [line.startswith(said) for line in lines] == [True] * bool(lists)


def test_one_of_several_endpoints(sound, seen):
    with JudgeServer(seeing, models=b'{"data": [{"id": "another"}]}') as other:
        urls = f"{sound.server.url},{other.url},http://127.0.0.1:9/v1"
        first, second, third = of_judge(sound.config(judge__endpoints=urls), seen)
    assert first.verdict == OK
    assert_fault(second, f"judge {other.url}", "it serves 'another', and ", "name it in judge.model")
    assert_fault(third, "judge http://127.0.0.1:9/v1", "is down", "start it")


def test_a_judge_that_may_be_asked_seldom(sound, seen):
    """Few questions show what an answer takes: a hundred would wait for their turn.

    Three of the reward, three about pictures, one about grey ones, as all references are the same, and one about units.
    """
    with JudgeServer(seeing) as server:
        limited = sound.config(judge__endpoints=server.url, judge__rpm=100_000)
        (finding,), heard = judge.look(limited, seen, 5.0)
        asked = server.requests
    assert finding.verdict == OK
    assert (asked, heard.trial.asked, heard.trial.servers) == (8, 8, 1)
    assert heard.trial.seconds.keys() == {"precision", "recall", "linguistic"}


# ---- workdir and disk ------------------------------------------------------------------------------------------------


def test_the_workdir_of_another_config(sound, tmp_path):
    (tmp_path / "config.json").write_text(recipes.to_text(sound.config(seed=7)))
    finding = places.workdir(sound.config(), str(tmp_path))
    assert_fault(finding, "workdir", "holds a run of another config (seed: 7 -> 0)", "choose another --workdir")
    assert "the run there goes on" in places.workdir(sound.config(seed=7), str(tmp_path)).found


def test_a_workdir_with_a_model_and_no_checkpoint(sound, tmp_path):
    (tmp_path / "config.json").write_text(recipes.to_text(sound.config()))
    (tmp_path / "model").mkdir()
    finding = places.workdir(sound.config(), str(tmp_path))
    assert_fault(
        finding, "workdir", "holds a trained model and no checkpoint to go on from", "choose another --workdir"
    )
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert places.workdir(sound.config(), str(tmp_path)).verdict == OK


def test_a_workdir_that_is_a_file(sound, tmp_path):
    (tmp_path / "file").touch()
    finding = places.workdir(sound.config(), str(tmp_path / "file"))
    found = f"cannot write to workdir {tmp_path / 'file'}: it is a file, and a run takes a folder"
    assert_fault(finding, "workdir", found, "choose another --workdir")


def test_without_a_workdir_the_last_line_says_so(sound, tmp_path, capsys):
    given = [argument for argument in sound.command(tmp_path) if not argument.startswith("--workdir")]
    doctor.main(given)
    output, errors = capsys.readouterr()
    last = "ready, but for the place of the run: without --workdir neither that nor the room on its disk was looked at"
    assert (output.splitlines()[-1], errors) == (last, "")


def test_a_workdir_below_a_file(sound, tmp_path):
    (tmp_path / "file").touch()
    finding = places.workdir(sound.config(), str(tmp_path / "file" / "run"))
    assert_fault(finding, "workdir", "cannot write to workdir", "choose another --workdir")


def test_a_workdir_in_use(sound, tmp_path):
    with claim(tmp_path / "run", sound.config()):
        finding = places.workdir(sound.config(), str(tmp_path / "run"))
    assert_fault(finding, "workdir", "another process is training in", "choose another --workdir")


def test_a_disk_without_renames(sound, tmp_path, monkeypatch):
    def refused(path: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported", str(path))

    monkeypatch.setattr(places, "rename_directory", refused)
    finding = places.workdir(sound.config(), str(tmp_path / "run"))
    assert_fault(finding, "workdir", "does not take what training does to it: Operation not supported", "renames")
    assert os.listdir(tmp_path) == []


def test_room_is_not_guessed_for_a_model_or_a_place_that_is_not_known(sound, tmp_path):
    path, place = sound.folder / "none", "/proc/nope/x"
    for workdir, given, first in (
        (tmp_path / "run", {"model__path": path}, "checkpoint"),
        (place, {}, "workdir"),
    ):
        found = {finding.check: finding for finding in doctor.examine(sound.config(**given), str(workdir))[0]}
        assert [name for name, finding in found.items() if finding.verdict == FAULT] == [first]
        assert found["disk"] == Finding("disk", UNCHECKED, f"the {first} comes first")


def test_both_amounts_have_one_unit(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3_150_000))
    finding = places.disk(sound.config(judge__cache_gb=0.02), str(tmp_path / "run"))
    assert finding.found.startswith("0.00 GB are free at ")
    assert " 0.02 GB are needed" in finding.found


def test_too_many_checkpoints_for_the_disk(sound, tmp_path):
    finding = places.disk(sound.config(checkpoint__keep=100_000_000), str(tmp_path / "run"))
    assert_fault(finding, "disk", f"are free at {tmp_path / 'run'}, ", "lower checkpoint.keep")


def test_a_cache_larger_than_its_disk(sound, tmp_path):
    finding = places.disk(sound.config(judge__cache_gb=1e6), str(tmp_path / "run"))
    assert_fault(finding, "disk", "1,000,000.00 GB", "lower judge.cache_gb")


def test_a_cache_that_cannot_be_written(sound, tmp_path):
    (tmp_path / "file").touch()
    finding = places.disk(sound.config(judge__cache_dir=tmp_path / "file" / "cache"), str(tmp_path / "run"))
    assert_fault(finding, "disk", f"cannot be kept in {tmp_path / 'file' / 'cache'} (judge.cache_dir): Not a", "name a")
    finding = places.disk(sound.config(judge__cache_dir=tmp_path / "new" / "cache"), str(tmp_path / "run"))
    assert finding.verdict == OK
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_bytes_of_a_checkpoint(sound, built):
    """By hand: trained numbers in float32 with two moments, the frozen tower in bfloat16, and captions in flight."""
    size = places.sizes(sound.config(), built.file_bytes)
    flat = {
        "/".join(key.key for key in path): leaf for path, leaf in checkpoint.jax.tree.leaves_with_path(built.params)
    }
    frozen = sum(leaf.size for path, leaf in flat.items() if path.startswith(("vision/", "merger/")))
    trained = sum(leaf.size for leaf in flat.values()) - frozen
    tokens = 2 * 4 * 16 * (4 + 1 + 4) + 2 * 4 * (4 + 1) + 2 * 4 + 2 * 16 * 24 * 4
    assert size.each == pytest.approx(12 * trained + 2 * frozen + tokens, abs=4096)
    assert size.checkpoints == (2 + 1 + 1) * size.each, "two are kept, one is written, one is the best"
    assert size.models == 2 * 2 * (trained + frozen)


# ---- time and money --------------------------------------------------------------------------------------------------

HEARD = judge.Heard(
    {"model": "m"}, Trial(Usage(12, 0, 12_000, 6_000), {"precision": 3.0, "recall": 2.0, "linguistic": 1.0}, 12, 2)
)


def of_outlay(config: ConfigDict, planned: devices.Slice | None = None, **limits: float) -> tuple[Finding, Finding]:
    of_time, money = outlay.look(config, HEARD, planned, outlay.Limits(**limits))
    return of_time, money


def test_the_hours_of_a_run_by_hand(sound):
    """700 steps of 128 x 8 captions, 2 s an answer on average, 512 at once: 12 s a step."""
    published = {"stages.rl.steps": 700, "stages.rl.batch_size": 128, "rollout.group_size": 8, "judge.concurrency": 512}
    published |= {"stages.rl.eval_every": 0, "checkpoint.best_metric": "", "log.eval_images": 1, "log.eval_samples": 1}
    config = sound.config(**published)
    questions = 3 * (700 * 128 * 8 + 2 * 2)
    hours = 12.0 / 3600 * questions / 3072
    of_time, money = of_outlay(config)
    assert (
        f"716,800 captions, at most 11,468,800 tokens to sample; {questions:,} questions to the judge, {hours:.2f} h"
        in of_time.found
    )
    assert (of_time.verdict, money.verdict) == (OK, OK)
    assert_fault(
        of_outlay(config, max_hours=2.0)[0],
        "time",
        f"{hours:.2f} h are more than --max_hours (2)",
        "raise judge.concurrency",
    )
    slow = of_outlay(config, step_seconds=36.0, max_hours=6.0)[0]
    assert_fault(slow, "time", "7.00 h are more than --max_hours (6)", "take more chips or fewer steps")
    serial = of_outlay(sound.config(**published, pipeline__depth=0), step_seconds=36.0, max_hours=7.5)[0]
    assert_fault(serial, "time", f"{7 + hours:.2f} h are more than", "take more chips")
    limited = sound.config(**published, judge__rpm=100)  # 2 servers: 3,072 questions take 15.36 minutes.
    assert_fault(
        of_outlay(limited, max_hours=100.0)[0], "time", f"{15.36 / 60 * questions / 3072:.2f} h are more", "judge.rpm"
    )
    # 1,000 tokens in and 500 out a question, at 0.5 and 2 per million.
    priced = {"judge.price_in": 0.5, "judge.price_out": 2.0}
    cost = questions * (1000 * 0.5 + 500 * 2) / 1e6
    finding = of_outlay(sound.config(**published, **priced, judge__max_cost=50))[1]
    assert_fault(
        finding, "money", f"the judge will cost about {cost:,.2f}, and the run stops at judge.max_cost (50)", "raise it"
    )
    chips = devices.Slice(16, 9.0)
    finding = of_outlay(sound.config(**published, **priced), chips, chip_hour_price=1.2, budget=100.0)[1]
    held = 16 * 1.2 * hours  # by the judge, which is slower than the chips
    assert_fault(finding, "money", f"{cost + held:,.2f} are more than --budget (100)", "lower stages.rl.steps")
    assert (
        of_outlay(sound.config(**published, **priced), chips, chip_hour_price=1.2, budget=cost + held + 1)[1].verdict
        == OK
    )


# ---- devices ---------------------------------------------------------------------------------------------------------


GIB = 2**30


def program(name: str, gib: float, seconds: float, **more: object) -> dict:
    """A program as `aot` writes it."""
    return {
        "program": name,
        "fits": gib <= 15.75,
        "hbm": 15.75 * GIB,
        "total": gib * GIB,
        "peak_seconds": seconds,
    } | more


def of_devices(monkeypatch, programs: list[dict], errors: str = "") -> tuple[Finding, devices.Slice | None]:
    """What is found where `aot` has written `programs`, or has ended with `errors`."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:5] == ["-m", "balcap_jax.aot", "--config=x", "--topology=v5e:4x4"]
        if programs:
            Path(command[-1].partition("=")[2]).write_text(json.dumps(programs))
        return subprocess.CompletedProcess(command, 2, "", errors)

    monkeypatch.setattr(devices.subprocess, "run", run)
    return devices.look(["--config=x"], "v5e:4x4", 2)


def test_programs_that_fit(monkeypatch):
    programs = [
        program("rollout", 8.0, 0.5),
        program("update padded 96", 12.0, 3.0),
        program("update packed 48", 9.0, 2.0),
    ]
    finding, planned = of_devices(monkeypatch, programs)
    assert finding.verdict == OK
    assert finding.found.startswith("v5e:4x4: 32 chips of 15.75 GiB take rollout 8.00, update padded 96 12.00, ")
    assert planned == devices.Slice(32, 2.5), "a rollout and the least update"


def test_programs_that_do_not_fit(monkeypatch):
    finding, planned = of_devices(monkeypatch, [program("rollout", 8.0, 0.5), program("update", 21.5, 3.0)])
    assert_fault(finding, "devices", "and the update needs 21.50 GiB", "take a larger slice")
    refused = {"program": "rollout", "fits": False, "hbm": 15.75 * GIB, "refused": "Used 30G of 15G hbm"}
    assert_fault(
        of_devices(monkeypatch, [refused])[0], "devices", "the rollout needs Used 30G of 15G hbm", "larger slice"
    )
    error = "error: --topology=v5e:9x9: libtpu knows no such topology; name one as v5e:4x8 or v5p:2x2x2\n"
    finding, planned = of_devices(monkeypatch, [], error)
    assert_fault(finding, "devices", "libtpu knows no such topology", "name one as v5e:4x8 or v5p:2x2x2")
    assert planned is None


@pytest.mark.slow
def test_a_small_slice_that_is_compiled_for(tmp_path):
    pytest.importorskip("libtpu", reason="the compiler for TPUs is in the extra [aot]")
    given = [f"--config={ROOT / 'configs' / 'scenes.py'}:tiny"]
    finding, planned = devices.look(given, "v5e:1x1", 1)
    assert finding.verdict == OK, finding
    assert planned.chips == 1
    assert 0 < planned.peak_seconds < 1
    finding, _ = devices.look(given, "v5e:nope", 1)
    assert_fault(finding, "devices", "--topology is 'v5e:nope'", "name one as v5e:4x8")


def test_the_first_fault_is_the_earliest():
    findings = [Finding("a", OK, "x"), Finding("b", UNCHECKED, "y"), Finding("c", FAULT, "z"), Finding("d", FAULT, "w")]
    assert first_fault(findings).check == "c"
