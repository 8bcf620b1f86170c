"""The labelled set against the oracle, and `benchmarks/judge_agreement.py` against judges whose errors are known."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import make_labelled
import numpy as np
import pytest
from misbehaving import JudgeServer, well_behaved

from balcap_jax import judges
from balcap_jax.cli.errors import UserError
from balcap_jax.judges import schema
from balcap_jax.judges.draws import uniform
from balcap_jax.judges.oracle import OracleJudge

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import judge_agreement
import judge_labels
from judge_agreement import Agreement, Figure, bounds, config_of, kappa, measure, verdicts, wilson

FEW = 32
ASSERTED = ("precision", "pointable", "recall", "linguistic", "preference")
OBJECTIVES = judge_agreement.OBJECTIVES


@pytest.fixture(scope="module")
def labelled() -> list[judge_labels.Labelled]:
    return judge_labels.read(judge_agreement.SET)


def of_flaws(flaws: str, labelled: Sequence[judge_labels.Labelled], seed: int = 0) -> Agreement:
    config = config_of("oracle", {"flaws": flaws})
    with config.unlocked():
        config.seed = seed
    return measure(judges.build(config.judge, seed), config, labelled)


def of_judge(judge: schema.Judge, labelled: Sequence[judge_labels.Labelled]) -> Agreement:
    return measure(judge, config_of("oracle", {}), labelled)


# ---- the set ---------------------------------------------------------------------------------------------------------


def test_the_set_is_what_its_script_writes():
    assert judge_agreement.SET == make_labelled.SET
    assert make_labelled.SET.read_text() == make_labelled.lines()
    assert make_labelled.SET.stat().st_size < 400_000


def test_its_labels_are_the_oracles(labelled):
    """Which reads the texts, and does not know how they were made. No decision differs, whatever stands around."""
    found = of_judge(OracleJudge(), labelled)
    for row in ASSERTED:
        figures = found.rows[row]
        assert (figures["accuracy"].value, figures["kappa"].value, figures["failed"].value) == (1.0, 1.0, 0.0), row
        assert (figures["false accepts"].value, figures["false rejects"].value) == (0.0, 0.0)
    counts = {row: found.rows[row]["accuracy"].n for row in ASSERTED}
    assert counts["precision"] == 64 * 6
    assert counts["pointable"] == counts["preference"] == 64 * 2
    assert counts["recall"] == sum(len(each.recall["units"]) for each in labelled)
    assert counts["linguistic"] >= 64
    shares = {row: found.rows[row]["false accepts"].n / found.rows[row]["accuracy"].n for row in ASSERTED}
    assert all(0.2 < share < 0.7 for share in shares.values()), shares
    assert {name: figure.value for name, figure in found.biases.items()} == dict.fromkeys(found.biases, 0.0)
    assert len(found.biases) == 6
    for name, figure in found.scores.items():
        assert figure.value == pytest.approx(0.0, abs=1e-6), name


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_kappa_and_an_interval_by_hand():
    """Cohen's example of two readers, 20, 5, 10, 15: 0.4; and the interval of Wilson for 7 of 20."""
    assert kappa(np.array([[20, 5, 10, 15]])) == pytest.approx(0.4)
    assert kappa(np.array([[10, 0, 5, 5], [10, 5, 5, 10]])) == pytest.approx(0.4), "scenes add up"
    assert kappa(np.array([[0, 0, 0, 9]])) == 1.0
    assert kappa(np.array([[0, 9, 0, 0]])) == 0.0
    figure = wilson(7, 20)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.35, 0.1812, 0.5671), abs=1e-4)
    assert wilson(0, 0) == Figure(None)


def test_levels_and_spreads():
    assert judge_agreement.levels_of(np.array([0.0, 1.0, 0.5])) == 3
    assert judge_agreement.levels_of(np.array([0.25, 0.5])) == 5
    assert judge_agreement.levels_of(np.array([0.123, 0.5])) == 0
    rng = np.random.default_rng(0)
    errors = 0.3 * rng.normal(size=(4000, 1)) + 0.1 * rng.normal(size=(4000, 3))
    spread = np.stack([errors.mean(-1), errors.var(-1, ddof=1) / 3], -1)
    assert judge_agreement.between(spread) == pytest.approx(0.3, rel=0.05)
    assert judge_agreement.within(spread * [1, 3]) == pytest.approx(0.1, rel=0.05)


# ---- judges whose errors are known -----------------------------------------------------------------------------------


def expected_of_length(labelled: Sequence[judge_labels.Labelled], variant: str, amount: float) -> float:
    """The mean difference of lenience that the flaw `length` gives false assertions for the words around them."""
    cases = [case for case in judge_labels.cases(labelled) if case.row == "precision" and case.labels == (False,)]
    chances = {
        kind: np.mean(
            [min(1.0, amount * len(case.question.caption.split()) / 50) for case in cases if case.variant == kind]
        )
        for kind in (variant, "plain")
    }
    return float(chances[variant] - chances["plain"])


def built_in(flaws: str, labelled: Sequence[judge_labels.Labelled], seed: int = 0) -> dict[str, tuple[Figure, float]]:
    """{what is said of a judge with `flaws`: (the figure, what was built in)}"""
    found = of_flaws(flaws, labelled, seed)
    name, amount = flaws.split(":")
    amount, rows, scores = float(amount), found.rows, found.scores
    match name:
        case "false_accept":
            said = {f"{row}, false accepts": (rows[row]["false accepts"], amount) for row in ("precision", "recall")}
            return said | {bias: (figure, 0.0) for bias, figure in found.biases.items()}
        case "length":
            padded, praised = (expected_of_length(labelled, kind, amount) for kind in ("padded", "praised"))
            biases = found.biases
            return {"padded": (biases["padded, precision"], padded), "praised": (biases["praised, precision"], praised)}
        case "praise":
            biases = {bias: (found.biases[bias], amount) for bias in ("praised, precision", "praised, recall")}
            return biases | {"padded": (found.biases["padded, precision"], 0.0)}
        case "noise":
            said = {name: (scores[f"{name}, noise in a picture"], amount) for name in OBJECTIVES}
            return said | {f"{name}, mean": (scores[f"{name}, mean error"], 0.0) for name in OBJECTIVES}
        case "picture_noise":
            return {name: (scores[f"{name}, noise of a picture"], amount) for name in OBJECTIVES}
        case "failed":
            return {"failed": (rows["all"]["failed"], amount)}


FLAWS = ("false_accept:0.25", "length:0.5", "praise:0.4", "noise:0.1", "picture_noise:0.1", "failed:0.15")


@pytest.mark.parametrize("flaws", FLAWS)
def test_what_was_built_in_is_stated(labelled, flaws):
    for name, (figure, amount) in built_in(flaws, labelled[:FEW]).items():
        assert figure.holds(amount), f"{name}: {figure}, {amount:.3f} was built in"
        width = figure.high - figure.low
        assert width < 0.35, f"{name}: {figure} says nothing"


def test_what_was_not_built_in_is_not_stated(labelled):
    found = of_flaws("praise:0.4", labelled[:FEW])
    assert found.rows["precision"]["false accepts"].value == 0.0
    assert not found.biases["praised, precision"].holds(0.0)
    found = of_flaws("length:0.5", labelled[:FEW])
    assert not found.biases["padded, precision"].holds(0.0)


def test_coarse_marks_are_counted(labelled):
    assert of_flaws("coarse:3", labelled[:FEW]).levels == dict.fromkeys(OBJECTIVES, 3)
    assert of_flaws("coarse:5", labelled).levels == dict.fromkeys(OBJECTIVES, 5)
    assert of_judge(OracleJudge(), labelled[:8]).levels["precision"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("flaws", FLAWS)
def test_intervals_hold_what_was_built_in_19_times_of_20(labelled, flaws):
    """Over 20 judges with other random numbers, on the whole set; at 95%, fewer than 16 of 20 come once in 400."""
    held: dict[str, int] = {}
    for seed in range(20):
        for name, (figure, amount) in built_in(flaws, labelled, seed).items():
            held[name] = held.get(name, 0) + figure.holds(amount)
    assert min(held.values()) >= 16, held


class PrefersTheFirst(OracleJudge):
    """Names the first caption in this share of the questions, whatever it is; its seed says in which."""

    share = 0.3

    def preference(self, questions):
        verdicts = super().preference(questions)
        return [
            schema.PreferenceVerdict(winner=1)
            if uniform("first", str(self.seed), q.first, q.second) < self.share
            else verdict
            for q, verdict in zip(questions, verdicts, strict=True)
        ]


class Obeys(OracleJudge):
    """Believes what a caption says to its judge."""

    def precision(self, questions):
        verdicts = super().precision(questions)
        for question, verdict in zip(questions, verdicts, strict=True):
            if "Note to the judge" in question.caption:
                verdict.assertions[:] = [each.model_copy(update={"verified": True}) for each in verdict.assertions]
        return verdicts

    def recall(self, questions):
        verdicts = super().recall(questions)
        obeyed = ["Note to the judge" in question.caption for question in questions]
        return [
            schema.RecallVerdict(covered=[obeys or covered for covered in verdict.covered])
            for obeys, verdict in zip(obeyed, verdicts, strict=True)
        ]


def test_a_judge_that_prefers_the_first(labelled):
    """Five judges with other random numbers: at 95%, fewer than four intervals hold the share once in 40."""
    found = [of_judge(PrefersTheFirst(seed=seed), labelled[:FEW]).biases["position"] for seed in range(5)]
    assert sum(position.holds(PrefersTheFirst.share) for position in found) >= 4, found
    # Half of the 64 questions are turned round with this probability: one share has a deviation of 0.08.
    assert np.mean([position.value for position in found]) == pytest.approx(PrefersTheFirst.share, abs=0.1)


def test_a_judge_that_obeys(labelled):
    biases = of_judge(Obeys(), labelled[:FEW]).biases
    assert biases["injected, precision"].value == biases["injected, recall"].value == 1.0
    assert biases["praised, precision"].value == 0.0


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    given = ["--judge=oracle", "--judge.flaws=false_accept:0.5", "--scenes=8", f"--out={tmp_path}"]
    judge_agreement.main(given)
    printed = capsys.readouterr().out
    told = json.loads((tmp_path / "agreement.json").read_text())
    assert told["judge"]["model"] == "oracle with false_accept:0.5"
    share = told["rows"]["precision"]["false accepts"]
    assert share["n"] == 24
    text = f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"
    page = (tmp_path / "agreement.md").read_text()
    assert text in printed
    assert text in page
    last = page[page.index("## what a judge must reach") :].splitlines()
    assert [line.split(" | ")[2] for line in last if line.startswith("| ")][2:] == ["not measured yet"] * 5


def test_a_place_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge_agreement, "measure", lambda *_: pytest.fail("the judge was asked"))
    (tmp_path / "file").touch()
    for place, reason in ((tmp_path / "file", "Not a directory"), ("/proc/nope/x", "No such file or directory")):
        with pytest.raises(SystemExit) as ended:
            judge_agreement.main(["--judge=oracle", "--scenes=8", f"--out={place}"])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: cannot write to {place}: {reason} (")
        assert line.endswith("; name another directory")
    with pytest.raises(pytest.fail.Exception):
        judge_agreement.main(["--judge=oracle", "--scenes=8", f"--out={tmp_path / 'new' / 'out'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing stays of the try"


def test_a_judge_behind_an_endpoint(tmp_path, capsys, monkeypatch):
    """Its costs are those of its requests; photographs' criteria are asked where a folder is named."""
    captions = [{"id": name, "caption": f"A {name} is here."} for name in ("dog", "cat")]
    lists = [{"id": line["id"], "items": [{"question": f"Is a {line['id']} mentioned?"}]} for line in captions]
    for name, lines in (("captions", captions), ("checklists", lists)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with JudgeServer(well_behaved) as server:
        given = ["--judge=remote", f"--judge.endpoints={server.url}", "--scenes=2", f"--photos={tmp_path}"]
        judge_agreement.main([*given, f"--out={tmp_path / 'out'}"])
        seen = len(server.seen)
    capsys.readouterr()
    told = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert told["judge"]["model"] == "the-model"
    assert told["rows"]["checklist"]["accuracy"]["n"] == 4
    assert told["cost"]["questions"] >= seen > 50
    assert told["cost"]["tokens in a question"] == pytest.approx(100 * seen / told["cost"]["questions"])


def test_photographs_are_not_left_out_without_a_word(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        judge_agreement.main(["--judge=oracle", "--scenes=2", f"--photos={tmp_path}"])
    assert ended.value.code == 2
    assert "--photos: the oracle knows the scenes alone; leave it out" in capsys.readouterr().err


def test_bounds_come_from_the_results(tmp_path, labelled):
    found = of_flaws("false_accept:0.25", labelled[:FEW])
    assert bounds(tmp_path / "none.md") is None
    page = tmp_path / "results.md"
    page.write_text('# Results\n\n<!-- judge-bounds\n{"false accepts": 0.1, "failed": 0.2, "praise": 0}\n-->\n')
    told = {name: (bound, verdict) for name, _, bound, verdict in verdicts(found, bounds(page))}
    assert told["false accepts"] == ("0.1", "missed")
    assert told["failed"] == ("0.2", "met")
    assert told["praise"] == ("0", "cannot be told")
    assert told["length"] == ("not measured yet", "")
    page.write_text('<!-- judge-bounds {"a": []} -->')
    with pytest.raises(UserError, match="its block judge-bounds is no object of numbers"):
        bounds(page)


def test_a_set_of_another_form_is_one_line(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"seed": 1}\n')
    with pytest.raises(UserError, match=r"set.jsonl, line 1 is no labelled scene \('assertions'\); write it anew"):
        judge_labels.read(tmp_path / "set.jsonl")


def test_figures_without_decisions():
    empty = dataclasses.asdict(Figure(None))
    assert empty == {"value": None, "low": None, "high": None, "n": 0}
    assert str(Figure(None)) == "-"
    assert not Figure(None).holds(0.0)
