"""What the page says of single captions: marks in their text, changes with intervals, filters, rollouts, heads."""

import json
import re

import numpy as np
import pytest
from made_runs import HOSTILE, OBJECTIVES, Page, captions_of, make_run, page_of

from balcap_jax.judges.schema import Assertion
from balcap_jax.report import charts, rollouts
from balcap_jax.report.changes import change, means_of
from balcap_jax.report.facts import heads
from balcap_jax.report.gallery import gallery
from balcap_jax.report.marks import pieces
from balcap_jax.report.page import row_starts, write_report
from balcap_jax.report.run import JudgedImage, Row, load_run
from balcap_jax.report.tables import between, headlines, tables

# --- marks in a caption's text ---


def stated(*texts, refuted=(), vague=()):
    return [Assertion(text=text, verified=i not in refuted, pointable=i not in vague) for i, text in enumerate(texts)]


def test_a_wrong_place_is_marked_apart_from_the_object_that_is_there():
    caption = "We see two shapes. A large green circle occupies the top left. What a lovely picture!"
    assertions = stated(
        "there are two shapes",
        "there is a green circle",
        "the green circle is large",
        "the green circle is at the top left",
        "a lovely picture",
        refuted=(3,),
        vague=(4,),
    )
    assert [tuple(piece) for piece in pieces(caption, assertions)] == [
        ("We see ", "", 0),
        ("two shapes", "good", 1),
        (". A ", "", 0),
        ("large", "good", 3),
        (" ", "", 0),
        ("green circle", "good", 2),
        (" occupies the ", "", 0),
        ("top left", "bad", 4),
        (". What a ", "", 0),
        ("lovely", "vague", 5),
        (" picture!", "", 0),
    ]


def test_of_two_like_objects_each_has_its_own_sentence():
    caption = "A red ball lies left. A red ball lies right."
    found = pieces(caption, stated("a red ball", "another red ball", "it is on the right", refuted=(1, 2)))
    assert [(piece.text, piece.number) for piece in found if piece.kind] == [
        ("red ball", 1),
        ("red ball", 2),
        ("right", 3),
    ]


def test_an_assertion_in_several_pieces_is_numbered_once():
    found = pieces("A red and very large ball.", stated("it is large", "a red ball", refuted=(1,)))
    assert [tuple(piece) for piece in found if piece.kind] == [
        ("red", "bad", 2),
        ("large", "good", 1),
        ("ball", "bad", 0),
    ]


def test_what_shares_few_words_with_a_caption_is_not_placed():
    caption = "A dog runs on the beach."
    assert [p.text for p in pieces(caption, stated("a cat sleeps under an old wooden table")) if p.kind] == []
    assert [p.text for p in pieces(caption, stated("a dog is running on a beach")) if p.kind] == ["dog", "beach"]
    assert pieces(caption, None) == pieces(caption, []) == [(caption, "", 0)]
    assert pieces("…", stated("nothing")) == [("…", "", 0)]


def test_the_pieces_are_the_caption_whatever_it_holds():
    rng = np.random.default_rng(0)
    alphabet = [*"ab AB.!?\n'’-é漢\u202e<&", "red ", "ball ", HOSTILE]
    for _ in range(200):
        caption = "".join(rng.choice(alphabet, size=rng.integers(0, 60)))
        texts = ["".join(rng.choice(alphabet, size=rng.integers(0, 8))) for _ in range(5)]
        assert "".join(piece.text for piece in pieces(caption, stated(*texts, refuted=(1,), vague=(3,)))) == caption


# --- changes ---


def images_of(values):
    captions = {str(i): [{"caption": "", "rewards": {"precision": v}} for v in row] for i, row in enumerate(values)}
    return {name: JudgedImage(id=name, captions=rows) for name, rows in captions.items()}


def test_the_interval_of_a_change_is_that_of_paired_pictures():
    rng = np.random.default_rng(0)
    level = rng.uniform(0.2, 0.6, size=(400, 1))  # Pictures differ far more than they change.
    before, after = level + rng.normal(0, 0.02, (400, 3)), level + 0.1 + rng.normal(0, 0.02, (400, 3))
    found = change(images_of(before), images_of(after), Row("precision", "precision", 100))
    differences = 100 * (after.mean(1) - before.mean(1))
    half = 1.96 * differences.std(ddof=1) / 20
    assert found.mean == pytest.approx(differences.mean())
    assert found.images == 400
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert half < 0.2  # unpaired it would be above 1.5


def test_no_interval_where_there_is_nothing_to_resample_or_other_captions_were_counted():
    row = Row("precision", "precision", 100)
    same = images_of([[0.5], [0.7]])
    assert change(same, same, row) == (0.0, 0.0, 0.0, 2)
    assert change(same, same, row, expected=0.4) is not None
    assert change(same, same, row, expected=20.0) is None
    assert change(same, images_of([[0.5]]), row) is None
    assert change(same, images_of([[None], [None]]), row) is None
    assert means_of(images_of([[0.5, None, 0.7]]), row) == {"0": pytest.approx(60)}


def test_greedy_and_sampled_stand_on_the_cards_with_their_intervals(tmp_path):
    run = load_run(make_run(tmp_path / "run"))
    rows = headlines(tables([run]))
    assert [row["name"] for row in rows] == ["b-CapScore", "precision", "recall", "linguistic"]
    text = page_of(run.path).text
    for row in rows:
        assert [side["kind"] for side in row["kinds"]] == ["greedy", "sampled"]
        for side in row["kinds"]:
            (entry,) = side["runs"]
            assert entry["span"].low < entry["delta"] < entry["span"].high
            shown = f"{side['kind']} {entry['after']:.1f} from {entry['before']:.1f} {entry['delta']:+.1f}"
            signed = [rollouts.signed(value, 1) for value in (entry["span"].low, entry["span"].high)]
            assert f"{shown} {signed[0]} to {signed[1]}" in text


def test_a_second_run_is_compared_with_the_first_over_the_same_pictures(tmp_path):
    runs = [load_run(make_run(tmp_path / name, gain=gain)) for name, gain in (("one", 1.0), ("two", 0.3))]
    greedy, _ = between(runs)
    assert (greedy["run"], greedy["base"], greedy["kind"], greedy["images"]) == ("two", "one", "greedy", 24)
    found = {name: (span, verdict) for name, span, verdict in greedy["rows"]}
    after = [
        np.mean([image.captions[0].rewards["recall"] for image in run.judged["greedy"]["rl"].values()]) for run in runs
    ]
    span, verdict = found["recall"]
    assert span.mean == pytest.approx(100 * (after[1] - after[0]))
    assert (span.high < 0, verdict) == (True, "down")
    assert between([runs[0], runs[0]])[0]["rows"][0][2] == ""  # no difference, no verdict
    assert "Against one" in page_of(*(run.path for run in runs), out=tmp_path / "page.html").text


# --- filters ---


def test_filters_let_through_what_their_names_say(tmp_path):
    run = load_run(make_run(tmp_path / "run", images=60))
    shown = gallery([run])
    filters = {one["title"]: number for number, one in enumerate(shown["filters"])}
    passed = {
        title: [card["id"] for card in shown["cards"] if number in card["classes"]] for title, number in filters.items()
    }
    assert {title: len(ids) for title, ids in passed.items()} == {f["title"]: f["count"] for f in shown["filters"]}
    before, after = (run.judged["greedy"][label] for label in ("sft", "rl"))
    for name in OBJECTIVES:
        fell = {i for i in after if after[i].captions[0].rewards[name] < before[i].captions[0].rewards[name] - 1e-6}
        assert set(passed[f"{name} fell"]) == fell
    sampled = run.judged["evaluations"]["rl"]
    outside = {i for i in after if any(c.in_band is False for c in (*after[i].captions, *sampled[i].captions))}
    assert set(passed["out of the length band"]) == outside
    has = {i for i in after if any(c.habits["companion"] for c in (*after[i].captions, *sampled[i].captions))}
    assert set(passed["habit: companion"]) == has
    ranked = sorted(after, key=lambda i: after[i].b_capscore - before[i].b_capscore)
    worst = [i for i in ranked if after[i].b_capscore < before[i].b_capscore][:12]
    assert set(passed["worst regressions"]) == set(worst)
    assert set(passed["largest gains"]) == set(ranked[-12:])
    assert [len(passed[name]) for name in ("spread over the ranking", "all")] == [8, 60]
    changes = [after[i].b_capscore - before[i].b_capscore for i in passed["all"]]
    assert changes == sorted(changes)  # from the largest loss to the largest gain
    markup = write_report([run.path]).read_text()
    for title, number in filters.items():
        assert len(re.findall(rf'<article class="card example[^"]* filter-{number}[ "]', markup)) == len(passed[title])
        assert f"#filter-{number}:checked ~ .cards > .example:not(.filter-{number}) {{ display: none; }}" in markup


def test_a_failed_call_has_a_filter_and_its_image_a_card(tmp_path):
    run = make_run(tmp_path / "run", images=30)
    file = captions_of(run, "greedy", "rl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[4]["captions"][0] |= {"b_capscore": None, "failures": {"recall": "timeout"}, "truncated": True}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = gallery([load_run(run)])
    titles = [one["title"] for one in shown["filters"]]
    for title in ("a judge’s call failed", "truncated"):
        number = titles.index(title)
        assert [card["id"] for card in shown["cards"] if number in card["classes"]] == ["scene-4"]
    assert (shown["cards"][-1]["id"], shown["cards"][-1]["why"]) == ("scene-4", "not ranked: no b-CapScore")
    assert "speaks to its judge" not in titles


def test_a_page_of_many_images_keeps_their_captions_and_leaves_out_what_is_folded(tmp_path):
    run = make_run(tmp_path / "run", images=210, samples=2)
    shown = gallery([load_run(run)])
    assert 200 <= len(shown["cards"]) <= 208
    whole = [card for card in shown["cards"] if card["is_whole"]]
    assert 20 <= len(whole) <= 32
    markup = write_report([run]).read_text()
    assert len(re.findall(r'<details class="more">', markup)) == 2 * len(whole)
    assert len(Page(markup).tags) < 40_000


# --- rollouts ---


def test_rollouts_say_why_a_caption_went_up_or_down(tmp_path):
    path = make_run(tmp_path / "run", images=2, kept=(61, 80, 100, 120, 140, 180))
    found = rollouts.groups(load_run(path))
    assert [group["step"] for group in found] == [61, 61, 100, 100, 120, 120, 180, 180]
    assert [group["image"].id for group in found[:2]] == ["train-61-0", "train-61-1"]
    for group in found:
        values = [member["caption"].advantage for member in group["members"]]
        assert values == sorted(values, reverse=True)
    first = found[0]["members"][0]
    up = sorted((v, n) for n, v in first["caption"].advantages.items() if v > 0.05)[::-1]
    text = ", ".join(f"{name} +{value:.2f}" for value, name in up)
    assert first["why"].startswith(f"raised by {text}")
    page = page_of(path)
    assert f"Raised by {text}" in page.text
    assert page.text.count("Out of the length band") + page.text.count("; out of the length band, so") == 8
    assert f"+{first['caption'].advantage:.2f} advantage" in page.text


def test_weights_decide_what_raised_a_caption_and_are_named(tmp_path):
    path = make_run(tmp_path / "run", images=2, kept=(61,))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rewards": {"weights": [1.0, 0.0, 2.0]}}))
    group = rollouts.groups(load_run(path))[0]
    assert group["weights"] == {"recall": 0.0, "linguistic": 2.0}
    assert not any("recall" in member["why"] for member in group["members"])
    member = max(group["members"], key=lambda member: member["caption"].advantages["linguistic"])
    assert f"linguistic +{2 * member['caption'].advantages['linguistic']:.2f}" in member["why"]
    assert "Weights: recall 0, linguistic 2" in page_of(path).text


@pytest.mark.parametrize(
    "odd", [{"advantage": "x"}, {"advantages": 3}, {"advantages": {"precision": "x"}}, {"judge": 3}]
)
def test_odd_advantages_are_missing(tmp_path, odd):
    path = make_run(tmp_path / "run", images=2, kept=(61,))
    file = path / "samples" / "step-000061.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["captions"][0] |= odd
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ("Rollouts of one prompt" in page_of(path).text) == ("advantage" not in odd)


def test_runs_without_advantages_have_no_such_part(tmp_path):
    path = make_run(tmp_path / "run", images=2)
    (path / "samples" / "step-000061.jsonl").write_text(captions_of(path, "greedy", "rl").read_text())
    (path / "samples" / "step-x.jsonl").write_text("x")
    (path / "samples" / "step-61.jsonl").write_text("x")
    page = page_of(path)
    assert "Rollouts of one prompt" not in page.text
    assert "Not everything could be shown" not in page.text


# --- the top of the page ---


def test_data_prompt_judge_and_cost_stand_at_the_top(tmp_path):
    path = make_run(tmp_path / "my run", images=3, kept=(61,))
    config = {
        "name": "photos",
        "data": {"name": "photos", "data_dir": "/data/photos"},
        "judge": {"name": "remote", "endpoints": "http://judge:8000/v1", "model": ""},
        "model": {"family": "qwen2_5_vl", "path": "hf/qwen"},
        "lora": {"rank": 16},
        "stages": {"order": "sft,rl", "sft": {"steps": 60, "batch_size": 8}, "rl": {"steps": 120, "batch_size": 4}},
        "rollout": {"group_size": 8},
    }
    (path / "config.json").write_text(json.dumps(config))
    spent = {"calls": 12345, "cached": 345, "tokens_in": 1e6, "tokens_out": 2e5, "cost": 3.456}
    (path / "judge.json").write_text(json.dumps(spent))
    found = heads(load_run(path))
    assert found.pop("time").startswith("6 min 41 s, on 1 x cpu, 2 host cores, 20")
    assert found == {
        "recipe": "photos",
        "data": "photos, /data/photos; 3 held-out images",
        "prompt": "Describe the picture.",
        "judge": "remote, the judge's model, http://judge:8000/v1",
        "judge's cost": "12,345 calls (345 from the cache); 1,000,000 tokens in, 200,000 out; cost 3.46",
        "model": "qwen2_5_vl, hf/qwen, LoRA of rank 16",
        "trained": "SFT 60 steps of 8 images; RL 120 steps of 4 images × 8 captions",
    }
    text = page_of(path).text
    assert text.index("my run") < text.index("12,345 calls") < text.index("Before and after")


@pytest.mark.parametrize("odd", [3, [], {"name": 3}, {"name": "remote", "endpoints": 5, "model": []}, {"order": 3}])
def test_odd_configs_have_heads_of_what_is_known(tmp_path, odd):
    path = make_run(tmp_path / "run", images=2)
    groups = ("data", "judge", "model", "lora", "stages", "rollout", "rewards", "name")
    (path / "config.json").write_text(json.dumps(dict.fromkeys(groups, odd)))
    (path / "judge.json").write_text(json.dumps({"calls": "x", "cost": None}))
    assert "b-CapScore greedy" in page_of(path).text


# --- the judge beside the truth, and the layout of charts ---


def test_a_wrong_judge_is_drawn_beside_the_truth(tmp_path):
    page = page_of(make_run(tmp_path / "run", images=2, flawed=True))
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    both = [label for label in labels if ", the truth, ends at" in label]
    assert [label.partition(" over steps")[0] for label in both] == [*OBJECTIVES, "b-CapScore"]
    assert all(", the judge, ends at" in label for label in both)
    t = 1 - np.exp(-120 / 50)
    found = float(re.search(r"the truth, ends at ([0-9.]+)", both[0]).group(1))
    assert found == pytest.approx(100 * (0.6 - 0.2 * t), abs=0.3)  # of a curve that is smoothed over its end
    assert "the truth" not in page_of(make_run(tmp_path / "exact", images=2)).text


def test_a_chart_of_one_stage_counts_its_steps(tmp_path):
    run = load_run(make_run(tmp_path / "run", sft=60, rl=120))
    groups = charts.chart_groups([run], [])
    found = {chart["title"]: chart for group in reversed(groups) for chart in group["charts"]}
    ends = {title: [text for _, text in chart["x_ticks"]][-1] for title, chart in found.items()}
    assert [ends[title] for title in ("SFT loss", "precision", "Gradient norm")] == ["60", "100", "150"]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    # The evaluations of sft and of rl stand at the ends of the curve, whose first step is 1.
    assert [mark["x"] for mark in found["precision"]["diamonds"]] == [left, right]
    assert found["Gradient norm"]["boundaries"]
    assert not found["SFT loss"]["boundaries"]


@pytest.mark.parametrize("high", [4.0, 500.0])
def test_a_few_high_points_leave_the_axis_and_are_named(tmp_path, high):
    path = make_run(tmp_path / "run", sft=60, rl=60)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[0]["grad_norm"] = high
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = charts.chart_groups([load_run(path)], [])
    (chart,) = (one for group in groups for one in group["charts"] if one["title"] == "Gradient norm")
    assert chart["peak"] == ("500.0" if high == 500.0 else "")
    assert float(chart["y_ticks"][-1][1]) <= 10


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_no_chart_is_alone_on_a_row_of_several(columns):
    for count in range(2, 17):
        width, starts = row_starts(count, columns)
        sizes = np.diff([*starts, count + 1])
        assert width == max(sizes) <= columns
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == count
        if columns > 2:
            assert min(sizes) > 1


def test_each_group_of_charts_has_several(tmp_path):
    for name, options in (("both", {}), ("rl", {"sft": 0}), ("sft", {"rl": 0})):
        markup = write_report([make_run(tmp_path / name, images=2, **options)]).read_text()
        counts = [int(count) for count in re.findall(r'<div class="charts n(\d+)', markup)]
        assert counts
        assert min(counts) > 1, name
