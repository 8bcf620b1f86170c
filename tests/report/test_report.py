"""The report: escaping of untrusted text, no request to anywhere, what is shown of a run, and of a damaged one."""

import json
import math
import re

import numpy as np
import pytest
from made_runs import HOSTILE, Page, captions_of, make_run, page_of

from balcap_jax.cli.errors import UserError
from balcap_jax.report import __main__ as report
from balcap_jax.report import charts
from balcap_jax.report.gallery import PNG_SIGNATURE, choose_images
from balcap_jax.report.page import _csp_hash, write_report
from balcap_jax.report.run import KINDS, load_run

# --- safety ---


def test_hostile_text_stays_text(tmp_path):
    run = make_run(tmp_path / "run", hostile=HOSTILE)
    markup = write_report([run]).read_text()
    page = Page(markup)
    assert "script" not in page.tags
    assert page.tags.count("img") == 24  # the pictures and no other
    assert not {"iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    assert [(tag, name) for tag, name, _ in page.attributes if name.startswith("on") or name == "style"] == []
    # Nothing that a browser would follow or run: alt texts may contain anything, being text.
    followed = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background", "formaction"}
    values = {(tag, value[:22]) for tag, name, value in page.attributes if name in followed and tag != "a"}
    assert values == {("img", "data:image/png;base64,")}
    links = {value for tag, name, value in page.attributes if name in followed and tag == "a"}
    sections = {"#content", "#results", "#habits", "#curves", "#captions", "#images", "#run"}
    assert links == sections | {f"#image-{number}" for number in range(1, 25)}  # to places of this page, named by us
    inputs = {(name, value) for tag, name, value in page.attributes if tag == "input" and name != "aria-label"}
    ids = {
        ("id", value) for name, value in inputs if re.fullmatch(r"(filter|scheme)-[a-z0-9]+", value) and name == "id"
    }
    named = {("class", "pick"), ("type", "radio"), ("name", "scheme"), ("name", "filter"), ("checked", "")}
    assert inputs == named | ids
    assert "url(" not in markup
    assert "@import" not in markup
    assert f"dots{HOSTILE}" in page.text
    assert page.text.count(HOSTILE) > 100  # shown as it is, in captions, assertions, units, ids, facts and config
    assert "49" not in re.findall(r"example/\"&gt;(.*?)&lt;", markup)  # not evaluated as a template


def test_no_request_is_possible(tmp_path):
    run = make_run(tmp_path / "run")
    markup = write_report([run]).read_text()
    assert "http:" not in markup
    assert "https:" not in markup
    policies = [value for tag, name, value in Page(markup).attributes if tag == "meta" and "default-src" in value]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    style = re.search(r"<style>(.*?)</style>", markup, re.DOTALL).group(1)
    assert _csp_hash(style) in policies[0]
    assert "&#39;" not in style  # the style sheet itself came through unescaped
    assert "&quot;" not in style


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "images/../../secret.png", "link.png"])
def test_pictures_outside_samples_are_not_read(tmp_path, name):
    run = make_run(tmp_path / "run", images=2)
    (run / "secret.png").write_bytes(PNG_SIGNATURE + b"secret")
    (run / "samples" / "link.png").symlink_to(run / "secret.png")
    for file in (captions_of(run, kind, label) for kind in KINDS for label in ("sft", "rl")):
        lines = [json.loads(line) | {"image": name} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    assert "img" not in page.tags
    assert f"picture {name}: outside samples/, not shown" in page.text


def test_a_file_that_is_no_png_and_a_lone_surrogate(tmp_path):
    run = make_run(tmp_path / "run", images=2)
    (run / "samples" / "images" / "scene-0.png").write_text("<svg onload=alert(1)>")
    file = captions_of(run, "greedy", "rl")
    file.write_text(file.read_text().replace("Describe", "x").replace("T", "\\ud800\\u202e\\u0000", 1))
    page = page_of(run)
    assert page.tags.count("img") == 1
    assert "images/scene-0.png: not a PNG" in page.text
    assert "\u202e" not in page.text
    assert "\x00" not in page.text


# --- content ---


def test_page_of_one_run(tmp_path):
    run = make_run(tmp_path / "scenes-run")
    summary = json.loads((run / "summary.json").read_text())["greedy"]
    page = page_of(run)
    gain = summary["rl"]["b_capscore"]["mean"] - summary["sft"]["b_capscore"]["mean"]
    assert gain > 10
    assert f"from {summary['sft']['b_capscore']['mean']:.1f} {gain:+.1f}" in page.text
    assert "b-CapScore, corpus" in page.text
    assert "Not everything could be shown" not in page.text
    assert "6 min 41 s" in page.text
    assert "sft 1 to 60, rl 61 to 180" in page.text
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    titles = [label.partition(" over steps")[0] for label in labels if " over steps" in label]
    assert titles[:4] == ["precision", "recall", "linguistic", "b-CapScore"]
    assert {"Mean words", "Truncated", "SFT loss", "Gradient norm", "KL to reference", "Judge failures"} <= set(titles)
    assert sum(label.startswith("Seconds per step by phase; rollout ") for label in labels) == 1


def test_each_assertion_is_marked_and_each_missed_unit_listed(tmp_path):
    run = make_run(tmp_path / "run", images=3, samples=1)
    page = page_of(run)
    verified = wrong = vague = 0
    for file in (captions_of(run, kind, label) for kind in KINDS for label in ("sft", "rl")):
        for line in file.read_text().splitlines():
            image = json.loads(line)
            (caption,) = image["captions"]
            for one in caption["assertions"]:
                verified += one["verified"] and one["pointable"]
                wrong += not one["verified"] and one["pointable"]
                vague += not one["pointable"]
            missed = [u for u, c in zip(image["reference_units"], caption["covered"], strict=True) if not c]
            heading = f"Reference units not covered: {len(missed)} of 4"
            assert " ○ ".join([heading, *missed]) in page.text
    assert min(verified, wrong, vague) > 0
    # The legend has one of each sign.
    assert (page.text.count("✓"), page.text.count("✗"), page.text.count("≈")) == (verified + 1, wrong + 1, vague + 1)
    assert page.text.count("not verified: there is") == wrong  # for those who hear the page
    assert page.text.count("not pointable: the picture is lovely (praise, nothing to point at)") == vague


def test_images_are_spread_over_the_ranking(tmp_path):
    run = load_run(make_run(tmp_path / "run", images=24))

    def change(image_id):
        return run.judged["greedy"]["rl"][image_id].b_capscore - run.judged["greedy"]["sft"][image_id].b_capscore

    ranked = sorted(run.judged["greedy"]["rl"], key=change, reverse=True)
    chosen = choose_images(run)
    assert len(chosen) == 8
    assert chosen[0] == (ranked[0], "highest change in b-CapScore of greedy captions")
    assert chosen[-1] == (ranked[-1], "lowest change in b-CapScore of greedy captions")
    places = [ranked.index(image_id) for image_id, _ in chosen]
    assert places == sorted(places)
    assert max(np.diff(places)) <= 4
    assert (ranked[11], "median change in b-CapScore of greedy captions") in chosen
    few = load_run(make_run(tmp_path / "few", images=3))
    assert len(choose_images(few)) == 3


def test_failed_judge_calls_are_named(tmp_path):
    run = make_run(tmp_path / "run", images=1, samples=1)
    for kind, count in (("greedy", 1), ("evaluations", 2)):
        assert "not ranked" not in page_of(run).text
        file = captions_of(run, kind, "rl")
        line = json.loads(file.read_text())
        line["captions"][0] |= {
            "b_capscore": None,
            "rewards": {"precision": 0.5, "recall": None, "linguistic": math.nan},
            "covered": None,
            "failures": {"recall": "timeout after 3 tries"},
        }
        file.write_text(json.dumps(line) + "\n")
        page = page_of(run)
        assert page.text.count("No recall score: timeout after 3 tries") == count
    assert "not ranked: no b-CapScore" in page.text
    assert "nan" not in page.text.lower().split()


def test_several_runs_side_by_side(tmp_path, monkeypatch):
    first = make_run(tmp_path / "a" / "run", seed=1)
    second = make_run(tmp_path / "b" / "run", seed=2, gain=0.5)
    monkeypatch.chdir(tmp_path)
    page = Page(write_report([first, second]).read_text())
    assert (tmp_path / "report.html").exists()
    assert "run · run (2)" in page.text
    assert "run (2) · SFT" in page.text  # on the same cards: both runs have the same held-out images
    assert page.tags.count("article") == 24
    assert "rollout.temperature 1.0 0.5" in page.text
    curves = [value for tag, name, value in page.attributes if tag == "path" and name == "class" and "curve" in value]
    assert sum("s1" in value for value in curves) == sum("s2 d2" in value for value in curves) > 10


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "samples"])
def test_a_run_directory_with_nothing_in_it(tmp_path, name):
    (tmp_path / name).mkdir() if name == "samples" else (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"not a run \(nothing readable in metrics.jsonl"):
        write_report([tmp_path])


def test_files_nested_too_deeply_are_noted(tmp_path):
    run = make_run(tmp_path / "run", images=2)
    for name in ("summary.json", "config.json"):
        (run / name).write_text("[" * 100_000)
    assert page_of(run).text.count("torn or not a JSON object, ignored") == 2


def name_captions(file) -> list[dict]:
    """Gives each caption of a file of one image a text of its own."""
    line = json.loads(file.read_text())
    for number, caption in enumerate(line["captions"]):
        caption["caption"] = f"This is {file.stem} {number}."
    file.write_text(json.dumps(line))
    return line["captions"]


def test_greedy_captions_are_shown_and_sampled_ones_folded_behind_them(tmp_path):
    run = make_run(tmp_path / "run", images=1, samples=3)
    captions = {label: [name_captions(captions_of(run, kind, label)) for kind in KINDS] for label in ("sft", "rl")}
    markup = write_report([run]).read_text()
    for label, title in (("sft", "SFT"), ("rl", "RL")):
        greedy, sampled = captions[label]
        column = markup[markup.index(f"<header><span>{title} <small") :].partition("</section>")[0]
        opened, _, folded = column.partition('<details class="more">')
        assert [greedy[0]["caption"] in part for part in (opened, folded)] == [True, False]
        assert f"b-CapScore {greedy[0]['b_capscore']:.1f}</span>" in opened
        mean = np.mean([caption["b_capscore"] for caption in sampled])
        assert folded.startswith(f"<summary>3 sampled, mean b-CapScore {mean:.1f}</summary>")
        assert [caption["caption"] in folded for caption in sampled] == [True] * 3


def test_a_run_without_greedy_captions_shows_sampled_ones(tmp_path):
    run = make_run(tmp_path / "run", images=1, samples=3)
    for label in ("sft", "rl"):
        captions_of(run, "greedy", label).unlink()
    captions = name_captions(captions_of(run, "evaluations", "rl"))
    markup = write_report([run]).read_text()
    assert "change in b-CapScore of sampled captions" in markup
    opened, _, folded = markup[markup.index("<header><span>RL <small") :].partition('<details class="more">')
    assert [caption["caption"] in opened for caption in captions] == [True, False, False]
    assert [caption["caption"] in folded for caption in captions] == [False, True, True]
    assert folded.startswith("<summary>2 more</summary>")


def test_each_caption_is_marked_with_its_habits(tmp_path):
    run = make_run(tmp_path / "run", images=1, samples=1)
    marks = {"sft": {"companion": True, "praise": False, "mine": True}, "rl": {"companion": False, "praise": False}}
    for label, habits in marks.items():
        for kind, odd in zip(KINDS, ({}, {"praise": "yes", "odd": 3}), strict=True):
            line = json.loads(captions_of(run, kind, label).read_text())
            line["captions"][0]["habits"] = habits | odd
            captions_of(run, kind, label).write_text(json.dumps(line))
    text = page_of(run).text
    assert text.count("Habits: companion mine b-CapScore") + text.count("Habits: companion mine precision") == 2
    assert text.count("Habits: none") == 2
    assert text.count("Habits:") == 4
    line["captions"][0]["habits"] = "a user's own reward had a word for it"
    captions_of(run, "evaluations", "rl").write_text(json.dumps(line))
    assert page_of(run).text.count("Habits:") == 3


# --- charts ---


def test_curve_geometry(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": s, "stage": "sft" if s <= 2 else "rl", "grad_norm": v} for s, v in enumerate([1, 2, None, 4], 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skipped = []
    (group,) = charts.chart_groups([load_run(run)], skipped)
    (chart,) = group["charts"]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert chart["y_ticks"][0] == (bottom, "0")
    assert chart["y_ticks"][-1] == (top, "4")
    third = round(left + (right - left) / 3, 1)
    middle, quarter = (top + bottom) / 2, bottom - (bottom - top) / 4
    left, right, top = float(left), float(right), float(top)
    # Steps 1 and 2 are connected; step 3 has no value; step 4 is a dot.
    assert (
        chart["lines"][0]["path"] == f"M{left} {quarter}L{left} {quarter}L{third} {middle}M{right} {top}L{right} {top}"
    )
    assert [boundary["x"] for boundary in chart["boundaries"]] == [third]
    assert "kl (rl)" in skipped


def test_a_stage_that_counts_from_one_again_follows_the_last(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": s, "stage": stage} for stage, n in (("sft", 3), ("rl", 2)) for s in range(1, n + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["step"] for record in load_run(run).records] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("small", [5e-324, -1e-310, 1e-305, -1e-291, 1e-280, -1e-30, -5])
def test_a_curve_of_the_smallest_numbers_or_of_negative_times_is_drawn(tmp_path, small):
    run = make_run(tmp_path / "run", sft=4, rl=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {key: small for key in line if key not in ("step", "stage")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    assert page.tags.count("svg") > 3
    assert not re.search(r"\b(nan|inf)\b", page.text)


LARGE = 1.7e308


@pytest.mark.parametrize("large", [LARGE, -LARGE, 1.1e300, int(LARGE)], ids=["large", "below", "just", "int"])
def test_numbers_whose_sums_are_none_are_missing(tmp_path, large):
    run = make_run(tmp_path / "run", sft=4, rl=4, images=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[::2]:
        line |= {key: large for key in line if key not in ("step", "stage")}
        large = -large
    lines[1]["step"] = lines[5]["step"] = large
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load_run(run)
    assert len(loaded.records) == len(lines) - 2
    (curve,) = (one for one in charts._curves(()) if one.title == "SFT loss")
    assert [math.isnan(value) for _, value in charts._series(loaded, curve)] == [True, True, False]

    summary = json.loads((run / "summary.json").read_text())
    summary["seconds"] = {"rl": large, "sft": large}
    for evaluation in (summary[kind][label] for kind in KINDS for label in ("sft", "rl")):
        evaluation["b_capscore"] = {"mean": large, "std": large}
        evaluation["habits"] = {"companion": {"share": large, "n": large}}
        large = -large
    (run / "summary.json").write_text(json.dumps(summary))
    for file in (run / "samples").glob("*.jsonl"):
        images = [json.loads(line) for line in file.read_text().splitlines()]
        for caption in (caption for image in images for caption in image["captions"]):
            caption |= {"b_capscore": large, "clarity": large}
        file.write_text("".join(json.dumps(image) + "\n" for image in images))
        large = -large
    page = page_of(run)
    assert not re.search(r"\b(nan|inf)\b", page.text)
    assert "no b-CapScore" in page.text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.5, 1]),
        (0.12, 0.88, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (5, 5, [4.5, 5, 5.5]),
        (-3e-5, 1e-5, [-3e-5, -2e-5, -1e-5, 0, 1e-5]),
        (0, 23_400, [0, 10_000, 20_000, 30_000]),
    ],
)
def test_ticks_cover_the_range_in_round_steps(low, high, ticks):
    assert charts.ticks(low, high) == pytest.approx(ticks, abs=1e-12)


def test_thinning_keeps_the_mean_and_long_runs_small(tmp_path):
    points = [(float(step), float(step % 7)) for step in range(1, 2401)]
    thin = charts._thinned(points)
    assert len(thin) == 240
    assert np.isclose(np.mean([value for _, value in thin]), np.mean([value for _, value in points]))


# --- damage ---


def test_torn_and_missing_files_are_said_and_the_rest_shown(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 181, "sta')
    (run / "summary.json").write_text('{"evaluations": {"sft": ')
    (run / "config.json").unlink()
    (run / "samples" / "images" / "scene-3.png").unlink()
    with captions_of(run, "greedy", "sft").open("a") as file:
        file.write('{"id": "scene-24", "capt')
    file = captions_of(run, "evaluations", "rl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], '{"id": 5, "captions": []}', *lines[2:], lines[1][:100]]))
    page = page_of(run)
    for note in (
        "metrics.jsonl: line 181 torn or not an object, skipped",
        "summary.json: torn or not a JSON object, ignored",
        "config.json: not readable (No such file or directory)",
        "samples/eval-rl.jsonl line 2: skipped, bad field id",
        "eval-rl.jsonl: line 25 torn or not an object, skipped",
        "greedy-sft.jsonl: line 25 torn or not an object, skipped",
    ):
        assert note in page.text
    assert page.tags.count("figure") > 10
    assert page.tags.count("article") == 24


@pytest.mark.parametrize("kept", ["metrics.jsonl", "config.json", "summary.json", "samples"])
def test_any_single_part_is_enough(tmp_path, kept):
    whole, run = make_run(tmp_path / "whole", images=2), tmp_path / "run"
    run.mkdir()
    (whole / kept).rename(run / kept)
    page = page_of(run)
    assert "Not everything could be shown" in page.text


@pytest.mark.parametrize("content", ["[]", "{}", '{"evaluations": [1]}', '{"evaluations": {"rl": 3}, "seconds": "x"}'])
def test_odd_summaries(tmp_path, content):
    run = make_run(tmp_path / "run", images=2)
    (run / "summary.json").write_text(content)
    assert page_of(run).tags.count("article") == 2


def test_a_directory_that_is_no_run(tmp_path, capsys):
    with pytest.raises(UserError, match="no such directory"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*: not a run \(.*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path, capsys):
    run = make_run(tmp_path / "run", images=2)
    out = tmp_path / "new" / "page.html"
    report.main([str(run), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        report.main([])
    assert ended.value.code == 2


def test_a_place_that_cannot_be_written(tmp_path):
    run = make_run(tmp_path / "run", images=2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report([run], tmp_path / "file" / "report.html")
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot write the report \(not a regular file\)"):
        write_report([run])
    with pytest.raises(UserError, match="null: cannot write"):
        write_report([run], "/dev/null")
    assert not list(run.glob(".*"))  # nothing half-written is left
