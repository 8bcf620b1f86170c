"""Evaluations side by side: paired tests against brute force, what is shown, and bad input."""

import itertools
import json
import random
import types
import warnings

import numpy as np
import pytest

from balcap_jax import compare
from balcap_jax.cli.errors import UserError


def folder(tmp_path, name, scores, metric="docvqa", **more):
    """An evaluation with these item scores; None = an invalid item."""
    out = tmp_path / name
    out.mkdir(parents=True)
    valid = [score for score in scores.values() if score is not None]
    results = {"metric": metric, "score": float(np.mean(valid)), "confidence": [1.0, 2.0], "words": 33.3}
    (out / "results.json").write_text(json.dumps(results | {"n": len(valid), "invalid": 0} | more))
    lines = [
        {"id": key} | ({"error": "x"} if score is None else {"score": score, "parts": answered(score)})
        for key, score in scores.items()
    ]
    (out / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(out)


def answered(score):
    """Parts of one answer of a benchmark whose score is a mean."""
    return [score / 100, 1, score / 100, 1, 0, 0]


def asked(tmp_path, name, rights):
    """A CaptionQA evaluation: {picture: {question: whether it is answered rightly}}, domains by the first letter."""
    out = tmp_path / name
    out.mkdir(parents=True)
    domains, lines = sorted({picture[0] for picture in rights}), []
    for picture, answers in rights.items():
        for question, right in answers.items():
            of_domain = [v for domain in domains for v in ((int(right), 1) if domain == picture[0] else (0, 0))]
            parts = [int(right), int(right), 0, 0, 1, *of_domain]
            line = {"id": f"{picture}#{question}", "group": picture, "score": 100.0 * right, "parts": parts}
            lines.append(line)
    metric = compare.metric_of("captionqa")
    metric.restore({"domains": domains})
    score = float(metric.score(np.sum([line["parts"] for line in lines], axis=0)))
    results = {"metric": "captionqa", "score": score, "n": len(lines), "invalid": 0, "state": metric.state()}
    (out / "results.json").write_text(json.dumps(results))
    (out / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(out)


def test_the_sign_test_counts_all_outcomes_of_fair_coins():
    for tosses in range(1, 11):
        heads = [sum(coins) for coins in itertools.product((0, 1), repeat=tosses)]
        for better in range(tosses + 1):
            uneven = abs(2 * better - tosses)
            expected = sum(abs(2 * h - tosses) >= uneven for h in heads) / len(heads)
            assert compare.sign_test(better, tosses - better) == pytest.approx(expected)
    assert compare.sign_test(0, 0) == 1.0
    assert 0 < compare.sign_test(49_000, 51_000) < 1e-9


def test_only_items_that_both_have_valid_are_compared(tmp_path):
    base = compare.read(folder(tmp_path, "a", {"p": 10, "q": 20, "r": None, "s": 5}))
    other = compare.read(folder(tmp_path, "b", {"p": 13, "q": 19, "r": 50, "t": 90}))
    test = compare.paired(base, other)
    assert (test.items, test.groups, test.better, test.worse) == (2, 2, 1, 1)
    assert test.difference == pytest.approx(1.0)
    assert test.p == 1.0
    alone = compare.read(folder(tmp_path, "c", {"x": 1, "y": 2}))
    assert compare.paired(base, alone) is None


def test_the_paired_interval_is_narrower_than_that_of_unpaired_scores(tmp_path):
    rng = random.Random(0)
    hard = {str(i): rng.uniform(0, 100) for i in range(200)}
    better = {key: value + rng.gauss(2, 1) for key, value in hard.items()}
    base = compare.read(folder(tmp_path, "a", hard))
    test = compare.paired(base, compare.read(folder(tmp_path, "b", better)))
    low, high = test.confidence
    assert low < test.difference < high
    assert high - low == pytest.approx(2 * 1.96 * 1 / 200**0.5, rel=0.25)  # The spread between items is gone.
    assert low > 0
    assert test.p < 1e-6


def test_the_difference_is_that_of_the_scores_and_is_tested_by_picture(tmp_path):
    """More questions are lost in the large domain than won in the small one, but the mean of the domains rises."""
    small, large = (
        {f"n{i}": {"0": False} for i in range(4)},
        {f"d{i}": dict.fromkeys("0123456789", True) for i in range(8)},
    )
    base = compare.read(asked(tmp_path, "base", small | large))
    won = {"n0": {"0": True}, "n1": {"0": True}}
    lost = {f"d{i}": large[f"d{i}"] | {"3": False} for i in range(3)}
    other = compare.read(asked(tmp_path, "other", small | large | won | lost))
    test = compare.paired(base, other)
    assert test.difference == pytest.approx(other.results["score"] - base.results["score"])
    assert test.difference > 0
    assert (test.items, test.groups, test.better, test.worse) == (84, 12, 2, 3)


def test_an_interval_counts_pictures_not_their_questions(tmp_path):
    """Questions that all say the same tell no more than one of them does."""
    rng = random.Random(1)
    pairs = [(rng.random() < 0.4, rng.random() < 0.6) for _ in range(60)]
    width = {}
    for questions in (1, 10):
        rights = [
            {f"n{i}": {str(q): pair[k] for q in range(questions)} for i, pair in enumerate(pairs)} for k in (0, 1)
        ]
        base, other = (compare.read(asked(tmp_path, f"{questions} {k}", rights[k])) for k in (0, 1))
        low, high = compare.paired(base, other).confidence
        width[questions] = high - low
    assert width[10] == pytest.approx(width[1])


def test_rounding_is_no_vote(tmp_path):
    """The same judgements added up in another order."""
    base = compare.read(folder(tmp_path, "a", {str(i): 50.0 + i for i in range(12)}))
    other = compare.read(folder(tmp_path, "b", {str(i): 50.0 + i + 1e-12 for i in range(12)}))
    assert (compare.paired(base, other).better, compare.paired(base, other).p) == (0, 1.0)


@pytest.mark.parametrize(
    "odd",
    [{"confidence": [1]}, {"confidence": [1, 10**400]}, {"words": float("nan")}, {"figure": 10**400}],
)
def test_odd_figures_are_left_out(tmp_path, odd, capsys):
    named = [folder(tmp_path, "a|b", {"p": 1, "q": 2}, **odd), folder(tmp_path, "c", {"p": 2, "q": 5}, **odd)]
    compare.main([*named, f"--out={tmp_path / 'out'}"])
    assert "nan" not in capsys.readouterr().out
    (_, second) = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert second["against"] == named[0]
    assert second["paired"]["difference"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "parts",
    [
        [[1e308, 1, 1e308, 1, 0, 0]] * 3,
        [[-1e308, 1e-300, 0, 1, 0, 0]] * 3,
        [[0] * 6] * 3,
        [[10**307, 1, 0, 1, 0, 0]] * 3,
    ],
    ids=["large", "quotient", "zeros", "integers"],
)
@pytest.mark.parametrize("score", [1e308, 1.0])
def test_a_difference_that_is_no_number_is_an_empty_cell(tmp_path, parts, score, capsys):
    named = [folder(tmp_path, "a", {"p": 1, "q": 2, "r": 3}), folder(tmp_path, "b", {"p": 2, "q": 5, "r": 1})]
    lines = [
        {"id": key, "score": score * sign, "parts": part}
        for key, sign, part in zip("pqr", (1, 1, -1), parts, strict=True)
    ]
    (tmp_path / "b" / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare.main([*named, f"--out={tmp_path / 'out'}"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {named[1]} "))
    assert [cell.strip() for cell in row.split("|")][7:9] == ["", ""]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())[1]["paired"]["difference"] is None


def test_tables_and_page(tmp_path, capsys):
    first = folder(tmp_path, "a|b<script>", {"p": 10, "q": 20})
    second = folder(tmp_path, "second", {"p": 11, "q": 23})
    third = folder(tmp_path, "third", {"p": 1, "q": 2}, metric="infovqa", confidence=None)
    compare.main([first, second, third, f"--out={tmp_path / 'out'}"])
    text = capsys.readouterr().out
    assert "## docvqa" in text
    assert "## infovqa" in text
    assert "| +2.00 |" in text
    assert "| 2 / 0 of 2 |" in text
    assert "| 33.3 |" in text
    assert text.strip() == (tmp_path / "out" / "comparison.md").read_text().strip()
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<rect") == 3
    assert "http" not in page
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())) == 3


@pytest.mark.parametrize(
    ("results", "items", "message"),
    [
        (None, "", "no results.json"),
        ("{}", "", "no metric and score"),
        ('{"metric": "docvqa", "score": 1}', '{"score": 1}\n', "no id"),
        ('{"metric": "docvqa", "score": 1}', "nothing\n", "is not JSON"),
        ('{"metric": "docvqa", "score": 1}', None, "cannot be read"),
        ('{"metric": "docvqa", "score": 1}', '{"id": "a", "parts": [1, "b"]}\n', "parts that are no numbers"),
        ('{"metric": "mine", "score": 1}', "", "unknown metric 'mine'"),
        ('{"metric": "captionqa", "score": 1, "state": []}', "", "state of another form"),
    ],
)
def test_what_is_no_evaluation(tmp_path, results, items, message):
    if results is not None:
        (tmp_path / "results.json").write_text(results)
    if items is not None:
        (tmp_path / "items.jsonl").write_text(items)
    with pytest.raises(UserError, match=message):
        compare.read(tmp_path)


def test_a_folder_named_twice(tmp_path, capsys):
    name = folder(tmp_path, "a", {"p": 1, "q": 2})
    with pytest.raises(SystemExit):
        compare.main([name, f"{name}/"])
    assert "named twice" in capsys.readouterr().err


def test_results_of_another_judge_or_of_other_questions_are_marked(tmp_path, capsys):
    one = folder(tmp_path, "one", {"p": 1.0, "q": 2.0}, judge="model-a", benchmark="1")
    alike = folder(tmp_path, "alike", {"p": 2.0, "q": 3.0}, judge="model-a", benchmark="1")
    other = folder(tmp_path, "other", {"p": 1.0, "q": 2.0}, judge="<b>model</b>", benchmark="1")
    compare.main([one, alike])
    assert "cannot be compared" not in capsys.readouterr().out
    compare.main([one, alike, other, f"--out={tmp_path / 'out'}"])
    told = capsys.readouterr().out
    assert "judge differs" in told
    assert "benchmark differs" not in told
    assert "&lt;b&gt;model" in (tmp_path / "out" / "comparison.html").read_text()


MADE = {"model": "/a", "prompt": "Describe.", "max_tokens": 256, "temperature": 0.0, "dtype": "bfloat16"}


def test_captions_made_otherwise_give_no_verdict_unless_it_is_asked_for(tmp_path, capsys):
    base = folder(tmp_path, "base", {"p": 10, "q": 20}, captions=MADE)
    rl = folder(tmp_path, "rl", {"p": 12, "q": 26}, captions=MADE | {"model": "/b"})
    other = {"model": "/b", "prompt": "What is <b>this</b>?", "dtype": "float32"}
    odd = folder(tmp_path, "odd", {"p": 12, "q": 26}, captions=MADE | other)
    compare.main([base, rl, odd, f"--out={tmp_path / 'out'}"])
    told = capsys.readouterr().out
    row = {line.split("|")[1].strip(): line for line in told.splitlines() if line.startswith("| /")}
    assert "| +4.00 |" in row[rl]
    assert "| no verdict: other prompt, compute type |" in row[odd]
    assert "+4.00" not in row[odd]
    assert f"prompt differs ({base}: Describe., {odd}: What is <b>this</b>?)" in told
    assert f"compute type differs ({base}: bfloat16, {odd}: float32)" in told
    assert "What is &lt;b&gt;this&lt;/b&gt;?" in (tmp_path / "out" / "comparison.html").read_text()
    _, second, third = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (second["differs"], second["paired"]["difference"]) == ([], pytest.approx(4.0))
    assert (third["differs"], third["paired"]) == (["prompt", "compute type"], None)

    compare.main([base, odd, "--allow_different", f"--out={tmp_path / 'allowed'}"])
    told = capsys.readouterr().out
    assert "| +4.00 |" in told
    assert "More than the model may explain the difference: compute type differs" in told
    for text in (told, (tmp_path / "allowed" / "comparison.html").read_text()):
        assert "cannot be compared" not in text
    unknown = folder(tmp_path, "unknown", {"p": 12, "q": 26})
    compare.main([base, unknown])
    told = capsys.readouterr().out
    assert f"How the captions of {unknown} were made is not known" in told
    assert "| +4.00 |" in told


def test_nothing_in_common_is_an_error_behind_the_table(tmp_path, capsys):
    base, rl = folder(tmp_path, "base", {"p": 1, "q": 2, "r": 3}), folder(tmp_path, "rl", {"P": 1, "Q": 2, "r": 4})
    mine = folder(tmp_path, "mine", {"p": 1, "q": 2}, metric="infovqa")
    for named, why in (((base, rl), f"{base} and {rl} have fewer than"), ((rl, mine), "no two of the folders are of")):
        with pytest.raises(SystemExit) as ended:
            compare.main(named)
        told, failed = capsys.readouterr()
        assert (ended.value.code, failed.count("\n")) == (2, 1)
        assert failed.startswith(f"error: nothing is compared: {why}")
        assert "## docvqa" in told
        assert ("| no verdict: fewer than two items in common |" in told) == (named == (base, rl))
    compare.main([rl])  # The table of one alone is what was asked for.
    compare.main([base, rl, folder(tmp_path, "third", {"p": 2, "q": 4})])
    assert "| +1.50 |" in capsys.readouterr().out


def test_another_judge_gives_no_verdict(tmp_path, capsys):
    named = [folder(tmp_path, judge, {"p": 10, "q": 20}, judge=judge) for judge in ("a", "b")]
    compare.main(named)
    assert "| no verdict: other judge |" in capsys.readouterr().out


def test_captions_that_are_all_the_same_are_said_to_be(tmp_path, capsys):
    named = [folder(tmp_path, name, {"p": 10, "q": 20}, inputs="1") for name in ("a", "b")]
    other = folder(tmp_path, "c", {"p": 10, "q": 20}, inputs="2")
    compare.main([*named, other])
    told = capsys.readouterr().out
    assert f"No caption differs between {named[0]} and {named[1]}" in told
    assert f"between {named[0]} and {other}" not in told


def test_folders_of_evaluations_and_a_metric_without_a_score(tmp_path, capsys):
    for name, by in (("base", 0), ("rl", 3)):
        folder(tmp_path / name, "docvqa", {"p": 10 + by, "q": 20 + by})
        out = folder(tmp_path / name, "dcscore", {"p": None, "q": 1}, metric="dcscore")
        results = {"metric": "dcscore", "score": None, "confidence": None}
        (tmp_path / name / "dcscore" / "results.json").write_text(json.dumps(results))
    compare.main([str(tmp_path / "base"), str(tmp_path / "rl")])
    told = capsys.readouterr().out
    assert "| +3.00 |" in told
    assert f"dcscore of {out} has no score: none of its items was valid" in told
    with pytest.raises(SystemExit):
        compare.main([out])
    assert "has no score" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "rl"), str(tmp_path / "rl" / "docvqa")])
    assert "named twice" in capsys.readouterr().err


def test_a_metric_that_one_side_lacks_is_named(tmp_path):
    def evaluation(side: str, metric: str) -> types.SimpleNamespace:
        (tmp_path / side / metric).mkdir(parents=True)
        return types.SimpleNamespace(name=str(tmp_path / side / metric), results={"metric": metric})

    found = [evaluation("base", "dcscore"), evaluation("base", "captionqa"), evaluation("rl", "captionqa")]
    (line,) = compare.lacking([tmp_path / "base", tmp_path / "rl"], found)
    assert line.startswith(f"dcscore: {tmp_path / 'rl'} has none, ")
    (tmp_path / "rl" / "dcscore").mkdir()
    (tmp_path / "rl" / "dcscore" / "results.json").touch()  # It has no score, and another line says so.
    assert compare.lacking([tmp_path / "base", tmp_path / "rl"], found) == []
