"""What is written of results: tables with numbers that were put in, figures that place them, and pages."""

import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from balcap_jax.ablate import drawings, figures, report, results
from balcap_jax.ablate.__main__ import PAGES
from balcap_jax.ablate.figures import Panel, Series
from balcap_jax.ablate.plans import Plan
from balcap_jax.ablate.studies import (
    BUDGET,
    CROSSED,
    FIELDS,
    FLAWS,
    JUDGES,
    POINTABILITY,
    RECIPE,
    RIVALS,
    SPREAD,
    STUDIES,
    flawed,
)
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes

SVG = "{http://www.w3.org/2000/svg}"
COST = {"seconds": 90.0, "jobs": 2, "device": "1 x cpu", "versions": {"jax": "0.10.1"}}


def result(score, **more):
    """A result whose captions have b-CapScore `score` after, 60 before."""
    means = {"precision": score, "recall": score - 10, "linguistic": score + 5, "b_capscore": score}
    means |= {"dcscore": score - 4, "captionqa": score - 2, "arena": score - 50, "words": score / 2, "in_band": 99.0}
    base = dict.fromkeys(means, 60.0)
    return {kind: {"base": base, "after": means} for kind in ("greedy", "sampled")} | COST | more


def of(study, score, seeds=(0, 1, 2), **more):
    """Results of all arms: those of the arm number k and the seed s have the b-CapScore score(k, s)."""
    return {arm: {seed: result(score(number, seed), **more) for seed in seeds} for number, arm in enumerate(study.arms)}


def table(text, first):
    """{first cell: other cells} of the table in `text` whose head begins with `first`."""
    lines = text.split("\n")
    start = next(k for k, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = cells
    return rows


def test_worst_cases_over_the_scales():
    # c-GDPO at 0.1, 1, 10 (+ seed), GRPO at 0.1 to 10, fixed weights. GRPO counts at 0.3 and 3 as little.
    scores = [81, 80, 79, 74, 50, 78, 51, 75, 76]
    found = of(SPREAD, lambda arm, seed: scores[arm] + seed)
    text = report.section(SPREAD, found, "figures/spread.svg")
    assert table(text, "estimator") == {
        "full": ["80.0 ± 1.0", "1.0"],
        "grpo": ["75.0 ± 1.0", "4.0"],
        "grpo_fixed": ["77.0 ± 1.0", "0.0"],
    }
    assert "27 runs, seeds 0, 1, 2; 40 min of runs, about 20 min on the clock" in text
    assert "Missing: seeds 3, 4 of all." in text
    del found["grpo"][1], found["full"][0]
    assert report.lacking(SPREAD, found) == " Missing: seeds 3, 4 of all; full (0); grpo (1)."
    assert report.lacking(SPREAD, of(SPREAD, lambda arm, seed: 1.0, seeds=SPREAD.seeds)) == ""
    seven = {arm: by_seed | {7: by_seed[2]} for arm, by_seed in found.items()}
    assert report.lacking(SPREAD, seven).endswith(" Beside the plan, hence in no primary claim: seeds 7.")
    assert "![" in text
    assert table(text, "variant")["base"][0] == "60.0 ± 0.0"
    assert table(text, "variant")["grpo_s3"][0] == "**52.0 ± 1.0**"


def test_a_worst_case_without_one_of_its_scales_is_none():
    """GRPO's worst scale has no result yet: the lowest of the others would turn the headline round."""
    found = of(SPREAD, lambda arm, seed: 80.0 - arm)
    del found["grpo_s10"], found["full_s0.1"][1], found["grpo_fixed"]
    rows = table(report.worst_cases(report.values_of(found)), "estimator")
    assert rows == {"full": ["78.0 ± 0.0", "1.0"], "grpo": ["-", "-"], "grpo_fixed": ["-", "-"]}


def test_a_study_with_own_fields_names_them():
    text = report.section(POINTABILITY, {"full": {}}, "", ["--config=my.py", "--config.rewards.weights=1,1,2"])
    assert "balcap ablate --study=pointability --out=DIR --config=my.py --config.rewards.weights=1,1,2\n" in text


def test_comparisons_have_intervals_and_what_could_be_seen():
    found = of(POINTABILITY, lambda arm, seed: 80 - arm * (4, 5, 6)[seed])
    text = report.comparisons(POINTABILITY, report.values_of(found))
    mean, p, seen = table(text, "variant")["no_pointability"][1:]
    # Differences -4, -5, -6 of the arena: t(0.975, 2) = 4.30265, so +- 2.48; t = -8.66, p = 0.013.
    assert (mean, p) == ("-5.0 ± 2.5", "0.013")
    assert float(seen) == pytest.approx(3.26, abs=0.05)


def test_the_cheapest_share_within_a_point():
    scores = {"full": 80.0, "ask_0.5": 79.4, "ask_0.25": 77.0}
    calls = {"full": 30720, "ask_0.5": 15360, "ask_0.25": 7680}
    found = {arm: {seed: result(scores[arm] + seed, judge_calls=calls[arm]) for seed in (0, 1)} for arm in scores}
    text = report.section(BUDGET, found)
    rows = table(text, "share asked")
    assert [row[0] for row in rows.values()] == ["30,720", "15,360", "7,680"]
    assert [row[2] for row in rows.values()] == ["", "-0.6 ± 0.0", "-3.0 ± 0.0"]
    assert "within 1 point of the full bill, by the mean: a share of 0.5" in text
    found["ask_0.25"] = {7: result(99.0, judge_calls=7680)}  # of no seed that the full bill has
    text = report.bills(found, report.values_of(found))
    assert [*table(text, "share asked")] == ["1", "0.5"]
    assert text.endswith("a share of 0.5.")


def test_judges_are_compared_with_the_exact_one():
    path = [
        {"update": 5, "proxy": {"b_capscore": 70.0}, "true": {"b_capscore": 65.0}},
        {"update": 10, "proxy": {"b_capscore": 90.0}, "true": {"b_capscore": 72.0}},
    ]
    found = of(JUDGES, lambda arm, seed: 80.0 + seed, trajectory=path)
    bad = flawed("grpo", "length:0.5")
    found[bad] = {seed: result(70.0 + seed + seed % 2, trajectory=path) for seed in (0, 1, 2)}
    found[flawed("full", "noise:0.3", 3)] = {seed: result(83.0 + seed) for seed in (0, 1, 2)}
    text = report.section(JUDGES, found)
    scores = table(text, "judge")
    assert scores["exact"] == ["81.0 ± 1.0"] * 4
    assert scores["length:0.5"] == ["81.0 ± 1.0", "71.3 ± 1.2", "81.0 ± 1.0", "81.0 ± 1.0"]
    after = text.split("Against the same")[1]
    losses = table(after, "judge")
    assert {*losses} == {*FLAWS}
    assert losses["praise:0.5"] == ["+0.0 ± 0.0", "-", "-", "-"]  # Only the full method was trained with it.
    assert losses["length:0.5"] == ["+0.0 ± 0.0", "-9.7 ± 1.4", "+0.0 ± 0.0", "+0.0 ± 0.0"]
    flattery = table(after.split("What the judge says")[1], "judge")
    assert flattery["coarse:3"] == ["18.0 ± 0.0", "-", "-", "-"]
    assert flattery["false_accept:0.3"] == ["18.0 ± 0.0"] * 4
    votes = table(after.split("Votes")[1], "judge")
    assert votes["noise:0.3"] == ["81.0 ± 1.0", "84.0 ± 1.0", "+3.0 ± 0.0"]


def test_a_study_without_results_says_how_to_run_it():
    text = report.section(RIVALS, {arm: {} for arm in RIVALS.arms})
    assert "balcap ablate --study=rivals --out=DIR" in text
    assert text.rstrip().endswith("Not yet run.")
    assert drawings.draw(RIVALS, {arm: {} for arm in RIVALS.arms}, {}) == ""


def test_the_table_of_the_primary_claims():
    found = of(POINTABILITY, lambda arm, seed: 80 - 20 * arm + seed * (1 + arm), seeds=(0, 1, 2, 3, 4))
    text = report.primary({POINTABILITY.name: report.values_of(found)})
    line = next(line for line in text.split("\n") if "no_pointability" in line)
    # Differences 20, 19, 18, 17, 16: t = 18 / (1.581 / sqrt(5)) = 25.5, p = 1.4e-5, times four by Holm's rule.
    assert line == "| 2 | arena (mini): full - no_pointability | 5 of 5 | +18.0 ± 2.0 | < 0.0001 | 2.7 | 3.9 |"
    claims = text.split("\n")[:4]
    statement = "With pointability the arena score is higher where captions pad"
    assert claims[1] == f"2. {statement}: **yes** (p by Holm's rule < 0.0001)."
    assert [claim.startswith(f"{number}. ") for number, claim in enumerate(claims, 1)] == [True] * 4
    assert sum(claim.endswith(": **0 of 5 seeds**.") for claim in claims) == 3
    del found["full"][3]
    text = report.primary({POINTABILITY.name: report.values_of(found)})
    assert "| 4 of 5 | " in text
    assert ": **4 of 5 seeds** (p by Holm's rule 0.0009)." in text


def test_the_pilot_plans_seeds():
    found = of(POINTABILITY, lambda arm, seed: 80.0 + (3, 5, 1)[seed - 100] * (arm == 0), seeds=(100, 101, 102))
    text = report.pilot({POINTABILITY.name: report.values_of(found)})
    assert table(text, "study")["pointability"][1:] == ["2.00", "3", "6", "9", "3.4"]
    assert "No pilot has two seeds" in report.pilot({})
    wide = of(POINTABILITY, lambda arm, seed: 80.0 + 60 * seed * (arm == 0), seeds=(100, 101, 102))
    assert table(report.pilot({POINTABILITY.name: report.values_of(wide)}), "study")["pointability"][3:5] == [
        "> 1000",
        "> 1000",
    ]


def test_the_whole_cost_counts_shared_runs_once(tmp_path):
    plan = Plan(RECIPE, {}, tmp_path, tmp_path / "results")
    studies = [SPREAD, RIVALS]
    found = {study.name: of(study, lambda arm, seed: 70.0, seeds=(0, 1, 9), seconds=360.0) for study in studies}
    base = {"config": {}, "config_digest": "", "greedy": {}, "sampled": {}} | COST | {"seconds": 1800.0, "jobs": 1}
    for name, seed in (("align", 0), ("habits-base", 0), ("align", 100), ("habits-full", 0)):
        results.write(results.path_of(plan.results, name, seed), base)
    shared = {*SPREAD.arms} & {*RIVALS.arms}
    assert shared
    arms = len(SPREAD.arms) + len(RIVALS.arms) - len(shared)
    assert report.whole_cost(plan, found, studies) == (
        f"All studies: {2 * arms} of {5 * arms} planned runs, each counted once: {arms / 5:.1f} h, about "
        f"{arms / 10:.1f} h on the clock. Their 2 bases: 1.0 h, about 1.0 h on the clock.\n"
    )


# ---- figures ---------------------------------------------------------------------------------------------------------


def circles(root):
    return [(float(c.get("cx")), float(c.get("cy")), float(c.get("r"))) for c in root.iter(f"{SVG}circle")]


def test_curves_place_their_points():
    series = [Series("a <b>", [(0.1, 70.0), (1.0, 75.0), (10.0, 80.0)], 0, [(1.0, 74.0)])]
    root = xml.etree.ElementTree.fromstring(figures.svg([Panel("p & q", "x", "y", series, log_x=True)], "t"))
    [line] = [line for line in root.iter(f"{SVG}polyline") if line.get("points").count(" ") == 2]
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # evenly apart by factors
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1
    seed = next(circle for circle in circles(root) if circle[2] == 2.5)
    assert seed[0] == x1
    assert (seed[1] - y1) / (y0 - y1) == pytest.approx(0.2, abs=0.02)
    assert "a <b>" in [text.text for text in root.iter(f"{SVG}text")]


def test_labels_of_neighbours_do_not_lie_on_each_other():
    points = [(1.0, 2.0), (1.0, 2.01), (1.01, 2.0), (5.0, 9.0)]
    series = [Series(f"n{k}", [point], k, line=False, label=f"label{k}") for k, point in enumerate(points)]
    root = xml.etree.ElementTree.fromstring(figures.svg([Panel("p", "x", "y", series)], "t"))
    places = {t.text: (float(t.get("x")), float(t.get("y"))) for t in root.iter(f"{SVG}text")}
    first, second, third = sorted(places[f"label{k}"][1] for k in range(3))
    assert second - first >= 11
    assert third - second >= 11
    assert places["label3"][1] < first


def test_panels_without_points_are_left_out():
    drawn = Panel("one", "x", "y", [Series("s", [(1.0, 2.0)], 0)])
    text = figures.svg([drawn, Panel("none", "x", "y", [Series("s", [], 0)])], "t")
    assert ">one<" in text
    assert ">none<" not in text


def test_every_study_has_a_figure():
    path = [
        {"update": step, "proxy": {"b_capscore": 60.0 + step}, "true": {"b_capscore": 60.0 + step / 2}}
        for step in (5, 10)
    ]
    for study in STUDIES.values():
        found = of(study, lambda arm, seed: 70.0 + arm + seed, judge_calls=100, trajectory=path)
        root = xml.etree.ElementTree.fromstring(drawings.draw(study, found, report.values_of(found)))
        width, height = float(root.get("width")), float(root.get("height"))
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert all(0 <= x <= width and 0 <= y <= height for x, y, _ in circles(root))
        if study is RIVALS:
            assert {"BalCap", "caprl", "arena", "base", "Long and noisy?"} <= {*texts}
        elif study is JUDGES:
            assert {*FLAWS} <= {*texts}
            dashed = [line for line in root.iter(f"{SVG}polyline") if "d" in line.get("class").split()]
            # A proxy of each method in the panels of two judges, of one method in the others, and the legend.
            assert len(dashed) == 4 * len(CROSSED) + (len(FLAWS) - len(CROSSED)) + 4
        elif study not in (SPREAD, BUDGET):
            assert {*study.arms} <= {*texts}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_page_keeps_what_is_not_generated():
    text = "# A\n<!-- ablate: x -->\nold\n<!-- end: x -->\ntext\n<!-- ablate: y -->\n<!-- end: y -->\n"
    page, other = Path("p.md"), Path("q.md")
    once = report.replaced({page: text, other: "# B\n"}, "x", "new \\1\n")
    assert once == {page: text.replace("old", "new \\1"), other: "# B\n"}
    assert report.replaced(once, "x", "new \\1\n") == once
    with pytest.raises(UserError, match=r"p\.md must have the lines <!-- ablate: z --> and <!-- end: z --> once"):
        report.replaced({page: text}, "z", "new")
    for twice in ({page: text + text}, {page: text, other: text}):
        with pytest.raises(UserError, match="once"):
            report.replaced(twice, "x", "new")


def test_a_page_that_lacks_a_place_leaves_the_others_as_they_are(tmp_path):
    pages = [tmp_path / "a.md", tmp_path / "b.md"]
    for page, name in zip(pages, "xy", strict=True):
        page.write_text(f"<!-- ablate: {name} -->\nold\n<!-- end: {name} -->\n")
    with pytest.raises(UserError, match=r"a\.md or .*b\.md must have the lines <!-- ablate: z -->"):
        report.rewrite(pages, {"x": "new\n", "z": "new\n"})
    assert all("old" in page.read_text() for page in pages)
    report.rewrite(pages, {"y": "new\n", "x": "newer\n"})
    assert [page.read_text().splitlines()[1] for page in pages] == ["newer", "new"]


def test_the_pages_of_results_have_a_place_for_every_section():
    texts = {page: page.read_text() for page in (Path(__file__).parents[2] / page for page in PAGES)}
    for name in (*STUDIES, "primary", "pilot", "cost"):
        assert any("new" in text.splitlines() for text in report.replaced(texts, name, "new\n").values())
    for page, text in texts.items():
        for link in re.findall(r"\]\((figures/[^)]*)\)", text):
            assert (page.parent / link).exists(), link


def test_results_shows_the_figure_of_every_study_that_has_one():
    page = Path(__file__).parents[2] / PAGES[0]
    told = set(re.findall(r"\]\(figures/study_(\w+)\.svg\)", page.read_text()))
    assert told == {path.stem.removeprefix("study_") for path in (page.parent / "figures").glob("study_*.svg")}


def test_results_of_another_config_do_not_count(tmp_path, capsys):
    plan = Plan(RECIPE, {}, tmp_path, tmp_path / "results")
    study = STUDIES["leave_one_out"]
    today = FIELDS["stages.rl.steps"]
    for seed, steps in ((0, today), (1, "81"), (100, today)):
        config = recipes.load(RECIPE, plan.fields(study.world, seed) | {"stages.rl.steps": steps})
        identity = results.identity(config)
        saved = result(70.0) | {"config": identity, "config_digest": results.digest(identity)}
        saved |= {"judge_calls": 1}
        results.write(results.path_of(plan.results, study.label("full"), seed), saved)
    found = report.load(plan, study)
    assert [*found["full"]] == [0]
    assert found["grpo"] == {}
    assert [*report.load(plan, study, pilot=True)["full"]] == [100]
    report.load(plan, study)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"is of another config (stages.rl.steps: 81 -> {FIELDS['stages.rl.steps']}) and does not count"
    )
    assert "habits-full-seed1.json" in line
    missing = [run.name for run in plan.missing([study], [0, 1])]
    assert "habits-full-seed0" not in missing
    assert "habits-full-seed1" in missing
    path = results.path_of(plan.results, study.label("full"), 0)
    results.write(path, results.read(path) | {"greedy": {}})
    with pytest.raises(
        UserError, match=r"full-seed0\.json is no result of a study \(greedy\.after\.b_capscore: missing"
    ):
        report.load(plan, study)
