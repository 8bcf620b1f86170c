"""No fault hides another: each check names all that it finds, and what does not depend on a fault is checked."""

import collections
import hashlib
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
from doctor.set_up import ANNOTATIONS, ROOT, assert_fault, seeing, write_lines

from balcap_jax import rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes
from balcap_jax.doctor import __main__ as doctor
from balcap_jax.doctor import checkpoint, judge, pictures
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding
from balcap_jax.models.formats import loading
from balcap_jax.training import evaluation

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
from misbehaving import JudgeServer, Reply, blocks_of, kind_of


def faults_of(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.found) for finding in found if finding.verdict == FAULT]


# ---- a judge that fails too often ------------------------------------------------------------------------------------


def is_of_trial(body: dict) -> bool:
    """Whether it is about one of the captions that time the judge, which begin with their number."""
    return any(text.startswith("View ") for _, text in blocks_of(body))


class Failing:
    """Fails a share of the requests about the trial's captions, or of its questions, however often they are asked."""

    def __init__(self, share: float, *, of_questions: bool = False, kinds=("precision", "recall", "linguistic")):
        self.share, self.of_questions, self.kinds = share, of_questions, kinds
        self.lock, self.asked = threading.Lock(), collections.Counter()

    def __call__(self, body: dict) -> Reply:
        if not is_of_trial(body) or kind_of(body) not in self.kinds:
            return seeing(body)
        question = json.dumps(body["messages"])
        with self.lock:
            self.asked[question] += 1
            number = 0 if self.of_questions else self.asked[question]
        draw = int(hashlib.sha256(f"{question} {number}".encode()).hexdigest()[:8], 16) / 2**32
        return Reply("status", "broken", status=500) if draw < self.share else seeing(body)


def test_a_judge_that_fails_all_questions_of_the_trial(sound, seen):
    with JudgeServer(Failing(1.0, of_questions=True)) as server:
        (finding,), heard = judge.look(sound.config(judge__endpoints=server.url), seen, 5.0)
    assert_fault(finding, f"judge {server.url}", "36 of 36 questions failed (", "see the server's log")
    assert finding.found.endswith("HTTP 500); a run stops above 0.2 (judge.max_failure_rate)")
    assert (heard.trial, heard.problem) == (None, "the judge comes first")


def test_a_judge_that_answers_no_question_of_one_kind(sound, seen):
    """A third of all questions, which max_failure_rate lets pass: but no caption would be rewarded."""
    lenient = {"judge__max_failure_rate": 0.9}
    with JudgeServer(Failing(1.0, of_questions=True, kinds=("linguistic",))) as server:
        (finding,), _ = judge.look(sound.config(judge__endpoints=server.url, **lenient), seen, 5.0)
    assert_fault(finding, f"judge {server.url}", "none by linguistic was answered", "see the server's log")


def test_a_judge_that_fails_by_chance(sound, seen):
    """Two fifths of its requests. A run asks again; where it does not, or questions stay without answer, it stops."""
    for more, is_fault in (
        ({"judge__retries": 0}, True),
        ({"judge__retries": 0, "judge__max_failure_rate": 0.9}, False),
    ):
        with JudgeServer(Failing(0.4)) as server:
            (finding,), heard = judge.look(sound.config(judge__endpoints=server.url, **more), seen, 5.0)
        assert (finding.verdict == FAULT, heard.trial is None) == (is_fault, is_fault), finding
    with JudgeServer(Failing(0.4)) as server:
        (finding,), heard = judge.look(sound.config(judge__endpoints=server.url), seen, 5.0)
    assert finding.verdict == OK, finding
    assert heard.trial.usage.failures.total() <= 0.2 * heard.trial.asked
    with JudgeServer(Failing(0.4, of_questions=True)) as server:
        (finding,), _ = judge.look(sound.config(judge__endpoints=server.url), seen, 5.0)
    assert_fault(finding, f"judge {server.url}", "questions failed (", "see the server's log")


def test_the_one_of_several_endpoints_that_fails(sound, seen):
    with JudgeServer(seeing) as good, JudgeServer(Failing(1.0)) as bad:
        urls = f"{good.url},{bad.url}"
        first, second = judge.look(sound.config(judge__endpoints=urls, judge__retries=0), seen, 5.0)[0]
    assert first.verdict == OK
    assert_fault(second, f"judge {bad.url}", "questions failed (", "see the server's log")


def test_a_judge_that_fails_and_is_asked_seldom(sound, seen):
    """Of its eight questions the last, about units in their own words, has no answer."""

    def behave(body: dict) -> Reply:
        return Reply("status", "broken", status=500) if "one thing is there." in str(blocks_of(body)) else seeing(body)

    limited = {"judge__rpm": 100_000, "judge__max_failure_rate": 0.1}
    with JudgeServer(behave) as server:
        (finding,), _ = judge.look(sound.config(judge__endpoints=server.url, **limited), seen, 5.0)
    assert_fault(finding, f"judge {server.url}", "1 of 8 questions failed (1 x ", "see the server's log")
    assert "a run stops above 0.1" in finding.found


# ---- what does not depend on the data --------------------------------------------------------------------------------


def test_a_judge_is_connected_to_without_data(sound, monkeypatch):
    (finding,), heard = judge.look(sound.config(judge__endpoints="http://127.0.0.1:9/v1"), None, 5.0)
    assert_fault(finding, "judge http://127.0.0.1:9/v1", "is down (connection refused)", "start it")
    with JudgeServer(seeing, key="secret") as server:
        (finding,), _ = judge.look(sound.config(judge__endpoints=server.url), None, 5.0)
        assert_fault(finding, f"judge {server.url}", "asks for a key", "put it into an environment variable")
        monkeypatch.setenv("JUDGE_KEY", "secret")
        keyed = {"judge__endpoints": server.url, "judge__api_key_env": "JUDGE_KEY", "judge__model": "nope"}
        (finding,), heard = judge.look(sound.config(**keyed), None, 5.0)
        assert server.requests == 0, "questions of the reward"
    assert finding.verdict == UNCHECKED
    assert finding.found.startswith("nope answers; the data come first")
    assert [" lists the-model, and not 'nope' (judge.model)" in line for line in finding.details] == [True]
    assert heard.about == {"model": "nope"}
    with JudgeServer(seeing, models=b'{"data": [{"id": "another"}]}') as other:
        urls = f"{sound.server.url},{other.url}"
        first, second = judge.look(sound.config(judge__endpoints=urls), None, 5.0)[0]
    assert first.verdict == UNCHECKED
    assert_fault(second, f"judge {other.url}", "it serves 'another', and ", "name it in judge.model")


def test_data_judge_and_references_that_are_all_at_fault(own):
    (own.folder / "data" / ANNOTATIONS).unlink()
    more = {"judge__endpoints": "http://127.0.0.1:9/v1", "data__units": own.folder / "none.jsonl"}
    found, block = doctor.examine(own.config(**more), str(own.folder / "run"))
    assert [check for check, _ in faults_of(found)] == ["data", "references", "judge http://127.0.0.1:9/v1"]
    assert block == ""


def of_references(config) -> Finding:
    found = {finding.check: finding for finding in pictures.look(config, 96, tokenizer=False)[0]}
    assert found["data"].verdict == FAULT
    return found["references"]


def test_lines_are_read_without_the_data(own):
    (own.folder / "data" / ANNOTATIONS).unlink()
    units = own.folder / "units.jsonl"
    finding = of_references(own.config())
    assert finding.verdict == UNCHECKED
    assert finding.found == "the data come first; units.jsonl has 24 lines that can be read"
    finding = of_references(own.config(data__units=own.folder / "none.jsonl"))
    assert_fault(
        finding, "references", "none.jsonl cannot be read (No such file", "give the JSONL file that `recaption`"
    )
    lines = units.read_text().splitlines(keepends=True)
    units.write_text("".join(lines[:5]) + '{"image": "data/coc')
    assert_fault(of_references(own.config()), "references", f"{units}, line 6", "mend or remove that line")
    write_lines(units, [{"image": "a.png", "reference_units": "a thing"}])
    assert_fault(of_references(own.config()), "references", '"reference_units" must be a list', "`python -m balcap_jax")
    units.write_text("\n")
    assert_fault(of_references(own.config()), "references", f"{units} (data.units) has no line", "run the same `recap")


def test_lines_are_read_before_the_data_are_named(sound):
    given = {"data__name": "photos", "data__data_dir": pictures.DATA_DIR, "data__manual_dir": ""}
    found = {f.check: f for f in pictures.look(sound.config(**given), 96, tokenizer=False)[0]}
    assert [finding.verdict for finding in found.values()] == [UNCHECKED, UNCHECKED]
    assert found["references"].found.endswith("units.jsonl has 24 lines that can be read")
    given["data__units"] = sound.folder / "none.jsonl"
    found = {f.check: f for f in pictures.look(sound.config(**given), 96, tokenizer=False)[0]}
    assert_fault(found["references"], "references", "none.jsonl cannot be read", "give the JSONL file")


def test_pictures_whose_captions_the_lines_were_to_bring(sound, tmp_path):
    """They have none of their own, which is no fault of them."""
    listed = tmp_path / "captions.jsonl"
    write_lines(listed, [{"image": str(path)} for path in sorted((sound.folder / "data" / "coco").iterdir())])
    given = {"data__name": "photos", "data__data_dir": listed, "data__manual_dir": "", "data__units": tmp_path / "no"}
    found = {f.check: f for f in pictures.look(sound.config(**given), 96, tokenizer=False)[0]}
    assert (found["data"].verdict, found["references"].verdict) == (UNCHECKED, FAULT)
    assert found["data"].found.startswith("the references come first")


# ---- the metric of the best step -------------------------------------------------------------------------------------


def test_a_metric_that_nothing_measures(sound):
    (finding,) = (f for f in pictures.look(sound.config(checkpoint__best_metric="evall/foo"), 96, False)[0] if f.remedy)
    found = "'checkpoint.best_metric' must be one of precision, recall, linguistic, b_capscore, corpus_b_capscore, got"
    assert_fault(finding, "data", f"{found} 'evall/foo'", "name one of these")


def test_a_metric_of_scenes_that_are_to_be_made(tmp_path):
    recipe, given = str(ROOT / "configs" / "scenes.py"), {"data.data_dir": str(tmp_path), "stages.rl.eval_every": "5"}
    wrong = recipes.load(recipe, given | {"checkpoint.best_metric": "evall/foo"})
    finding = pictures.look(wrong, 96, tokenizer=True)[0][0]
    known = "dcscore, captionqa, arena, b_capscore, corpus_b_capscore"
    assert_fault(finding, "data", f"{known}, got 'evall/foo'", "name one of these")
    right = recipes.load(recipe, given | {"checkpoint.best_metric": "captionqa"})
    assert pictures.look(right, 96, tokenizer=True)[0][0].verdict == OK


REWARDS = {
    "balcap": {},
    "lexical": {"rewards__weights": "1"},
    "arena": {"rewards__weights": "1"},
    "text": {"rewards__weights": "1,1", "rewards__length": "none"},
    "caprl": {"rewards__weights": "1,1", "rewards__length": "ramp"},
}


@pytest.mark.parametrize("name", REWARDS)
def test_metrics_without_a_judge_that_is_connected(sound, name):
    """The names are those of what evaluations score by the judge itself."""
    config = sound.config(rewards__name=name, checkpoint__best_metric="", **REWARDS[name])
    fields = frozenset({"reference", "captions", "reference_units"})
    unconnected = judge.RemoteJudge(judge.make_client(config.judge, 0))
    reward = rewards.build(config.rewards, unconnected, 0)
    assert evaluation.measured_names(config, fields) == tuple(
        evaluation.measured(config, unconnected, reward, fields).names
    )


# ---- all faults of a check -------------------------------------------------------------------------------------------


def test_all_that_a_checkpoint_lacks(sound, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sound.folder / "model", model)
    first, second, third, *_ = sorted(model.glob("*.safetensors"))
    for path in (first, third, model / "tokenizer.json", model / "preprocessor_config.json"):
        path.unlink()
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    config = sound.config(model__path=model)
    found, built = checkpoint.look(config, None)
    assert built is None
    texts = [(finding.verdict, finding.found, finding.remedy) for finding in found]
    assert [verdict for verdict, *_ in texts] == [FAULT] * 4, texts
    tokenizer, missing, short, processor = found
    assert_fault(tokenizer, "checkpoint", "tokenizer.json is missing", "copy")
    assert_fault(missing, "checkpoint", f"{first}, {third.name} are missing, though", "download these shards too")
    assert_fault(short, "checkpoint", f"{second} is cut short", "download or copy it again")
    assert_fault(processor, "checkpoint", "has no preprocessor_config.json", "download that file too")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):  # The first is what training says.
        loading.load(model)
    of_judge, _ = judge.look(sound.config(judge__name="policy", judge__path=model, pipeline__depth=0), None)
    assert [finding.check for finding in of_judge] == ["judge"] * 4


def test_files_of_one_remedy_are_one_row(sound, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sound.folder / "model", model)
    pointers = [*sorted(model.glob("*.safetensors")), model / "tokenizer.json"]
    for path in pointers:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4967215360\n")
    (finding,) = checkpoint.look(sound.config(model__path=model), None)[0]
    assert all(f"{path.name} is a pointer of Git LFS" in finding.found for path in pointers)
    assert finding.remedy.startswith("run `git lfs pull` there")


def test_a_checkpoint_of_another_recipe_and_a_part_that_is_not_there(sound, tmp_path):
    shutil.copytree(sound.folder / "model", tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    found, _ = checkpoint.look(sound.config(model__path=tmp_path / "model", stages__rl__freeze="^projector/"), None)
    assert [text.split("'")[1:2] or "processor" for _, text in faults_of(found)] == ["processor", ["stages.rl.freeze"]]


def test_all_faults_of_data(own):
    files = sorted((own.folder / "data" / "coco").iterdir())
    for path in files[:6]:
        path.unlink()
    split_of = {path: pictures.data.photos.split_of(f"coco/{path.name}", 0.2, 0.2) for path in files[6:]}
    cut = next(path for path, split in split_of.items() if split == "train")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    config = own.config(stages__rl__batch_size=64, checkpoint__best_metric="nothing")
    found = [finding for finding in pictures.look(config, 96, tokenizer=False)[0] if finding.check == "data"]
    left_out, damaged, batch, metric = found
    assert_fault(left_out, "data", "6 of 24 pictures are left out: coco/", "fetch what is missing")
    assert_fault(damaged, "data", f" 1 is damaged: coco/{cut.name} (", "fetch these pictures again")
    assert_fault(batch, "data", "samples to train on, and a batch of rl takes 64", "lower stages.rl.batch_size")
    assert_fault(metric, "data", "must be one of precision, ", "name one of these")


def test_all_faults_of_references(own):
    lines = [json.loads(line) for line in (own.folder / "units.jsonl").read_text().splitlines()]
    half = [line | ({"reference_units": [], "caption": "A."} if n % 2 else {}) for n, line in enumerate(lines[:16])]
    write_lines(own.folder / "units.jsonl", half)
    found = pictures.look(own.config(), 96, tokenizer=False)[0]
    without, lacking = (finding for finding in found if finding.check == "references")
    assert_fault(without, "references", "has no line about 8 of 24 samples, which are left out", "run the same")
    assert_fault(lacking, "references", "have no reference_units, such as coco/", "have `recaption` write it")
