"""The report: escaping of untrusted text, no request to anywhere, what is shown of a run, and of a damaged one."""

import html.parser
import json
import math
import re

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.report import __main__ as report
from balcap_jax.report import charts
from balcap_jax.report.page import (
    GALLERY_IMAGES,
    PNG_SIGNATURE,
    _csp_hash,
    before_after_table,
    choose_images,
    write_report,
)
from balcap_jax.report.run import before_and_after, load_run

OBJECTS = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
PLACES = ("top left", "top right", "bottom left", "bottom right")
HOSTILE = (
    '<script>alert(1)</script><img src=x onerror=alert(2)>" onmouseover="alert(3)" x=\''
    '\'><svg/onload=alert(4)></style></title><a href="https://evil.example/">{{ 7 * 7 }}</a>-->'
)


# --- a realistic run, seeded ---


def make_run(path, seed=0, *, sft=60, rl=120, images=24, samples=2, gain=1.0, hostile=""):
    """Writes a run directory as train leaves it; `hostile` is put into every text that is untrusted."""
    rng = np.random.default_rng(seed)
    (path / "samples" / "images").mkdir(parents=True)
    lines = []
    for step in range(1, sft + rl + 1):
        if step <= sft:
            values = {
                "loss": 4 * math.exp(-step / 20) + 0.6 + rng.normal(0, 0.05),
                "grad_norm": 1 + rng.gamma(2, 0.3),
                "time/update": 0.3 + rng.gamma(2, 0.01),
                "time/rollout": 0.0,
                "time/judge": 0.0,
                "time/other": 0.02,
                "tokens_per_second": 9000 + rng.normal(0, 300),
            }
        else:
            t = 1 - math.exp(-(step - sft) / 50)
            noise = rng.normal(0, 0.02, size=8)
            values = {
                "reward/precision": 0.62 + gain * 0.2 * t + noise[0],
                "reward/precision_std": 0.1,
                "reward/recall": 0.48 + gain * 0.22 * t + noise[1],
                "reward/linguistic": 0.55 + gain * 0.3 * t + noise[2],
                **{f"advantage/zero_std_frac/{name}": 0.1 * (1 + t) for name in ("precision", "recall", "linguistic")},
                "b_capscore": 100 * (0.55 + gain * 0.2 * t + noise[3]),
                "gate/in_band": min(1.0, 0.8 + 0.2 * t + noise[4] / 2),
                "judge/failure_rate": float(rng.random() < 0.1) * 0.05,
                "length/mean": 26 + 12 * t + 30 * noise[5],
                "length/ratio_mean": 0.7 + 0.3 * t + noise[5],
                "length/truncated_frac": max(0.0, 0.06 * (1 - t) + noise[6] / 5),
                "loss": noise[7] / 10,
                "kl": 0.02 * t,
                "entropy": 1.4 - 0.8 * t + noise[6],
                "grad_norm": 0.4 + rng.gamma(2, 0.1),
                "drift/max_abs_logp": abs(noise[7]) * 1e-4,
                "time/rollout": 0.6 + 0.2 * t + rng.gamma(2, 0.02),
                "time/judge": 0.08 + rng.gamma(2, 0.005),
                "time/update": 0.45 + rng.gamma(2, 0.02),
                "time/other": 0.03,
                "tokens_per_second": 3000 + rng.normal(0, 200),
            }
        lines.append({"step": step, "stage": "sft" if step <= sft else "rl", **values})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(
        json.dumps(
            {"data": {"name": "scenes" + hostile}, "rollout": {"group": 8, "temperature": gain}, "stages": {"sft": sft}}
        )
    )
    evaluations = {label: make_captions(path, label, images, samples, gain, hostile) for label in ("sft", "rl")}
    summary = {
        "evaluations": evaluations,
        "greedy": evaluations,
        "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11"},
        "device": "1 x cpu, 2 host cores" + hostile,
        "command": "python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes" + hostile,
        "seconds": {"wall": 401.0, "rollout": 90.0, "update": 150.0, "judge": 12.0, "compile": 95.0, "other": 54.0},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def make_captions(path, label, images, samples, gain, hostile):
    """Writes samples/eval-<label>.jsonl with pictures; returns the evaluation for summary.json."""
    lines, everything = [], []
    skill = 0.6 if label == "sft" else 0.6 + 0.3 * gain
    for number in range(images):
        scene = np.random.default_rng([7, number])
        rng = np.random.default_rng([number, len(label)])
        picture, units = PIL.Image.new("RGB", (96, 96), "#d8d4cc"), []
        draw = PIL.ImageDraw.Draw(picture)
        for corner in range(4):
            thing, colour = scene.choice(OBJECTS), scene.choice(COLOURS)
            x, y = 12 + 48 * (corner % 2), 12 + 48 * (corner // 2)
            shape = draw.ellipse if thing in ("circle", "star") else draw.rectangle
            shape((x, y, x + 28, y + 28), fill=str(colour), outline="black")
            units.append(f"there is a {colour} {thing} in the {PLACES[corner]}")
        picture.save(path / "samples" / "images" / f"scene-{number}.png")
        captions = []
        for _ in range(samples):
            covered = [bool(rng.random() < skill) for _ in units]
            assertions = [
                {
                    "text": unit + hostile,
                    "why": ("" if hit else "the object there has another colour") + hostile,
                    "verified": hit,
                    "pointable": True,
                }
                for unit, hit in zip(units, [rng.random() < skill for _ in units], strict=True)
            ]
            if rng.random() > skill - 0.3:
                why = "praise, nothing to point at" + hostile
                assertions.append(
                    {"text": "the picture is lovely" + hostile, "why": why, "verified": True, "pointable": False}
                )
            text = ". ".join(f"T{one['text'][1:]}" for one in assertions) + "."
            marks = [int(rng.integers(3, 5 if label == "sft" else 6)) for _ in range(3)]
            rewards = {
                "precision": sum(one["verified"] and one["pointable"] for one in assertions) / len(assertions),
                "recall": sum(covered) / len(covered),
                "linguistic": sum(marks) / 15,
            }
            harmonic = 0.0 if min(rewards.values()) == 0 else 3 / sum(1 / value for value in rewards.values())
            captions.append(
                {
                    "caption": text,
                    "words": len(text.split()),
                    "tokens": len(text.split()) + 4,
                    "truncated": False,
                    "in_band": bool(rng.random() < 0.95),
                    "rewards": rewards,
                    "b_capscore": 100 * harmonic,
                    "assertions": assertions,
                    "covered": covered,
                    **dict(zip(("clarity", "fluency", "coherency"), marks, strict=True)),
                    "failures": {},
                }
            )
        everything += captions
        lines.append(
            {
                "id": f"scene-{number}{hostile}",
                "image": f"images/scene-{number}.png",
                "prompt": "Describe the picture.",
                "reference": ". ".join(f"T{unit[1:]}" for unit in units) + "." + hostile,
                "reference_units": [unit + hostile for unit in units],
                "captions": captions,
            }
        )
    file = path / "samples" / f"eval-{label}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def spread(values):
        return {"mean": float(np.mean(values)), "std": float(np.std(values))}

    names = ("precision", "recall", "linguistic")
    means = [np.mean([one["rewards"][name] for one in everything]) for name in names]
    return {name: spread([one["rewards"][name] for one in everything]) for name in names} | {
        "b_capscore": spread([one["b_capscore"] for one in everything]),
        "corpus_b_capscore": float(300 / sum(1 / mean for mean in means)),
        "words": spread([one["words"] for one in everything]),
        "in_band": float(np.mean([one["in_band"] for one in everything])),
        "truncated": 0.0,
        "n": images * samples,
        "images": images,
    }


class Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(*workdirs, out=None) -> Page:
    return Page(write_report(workdirs, out).read_text())


# --- safety ---


def test_hostile_text_stays_text(tmp_path):
    run = make_run(tmp_path / "run", hostile=HOSTILE)
    markup = write_report([run]).read_text()
    page = Page(markup)
    assert "script" not in page.tags
    assert page.tags.count("img") == GALLERY_IMAGES  # the pictures and no other
    assert not {"a", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    assert [(tag, name) for tag, name, _ in page.attributes if name.startswith("on") or name == "style"] == []
    # Nothing that a browser would follow or run: alt texts may contain anything, being text.
    followed = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background", "formaction"}
    assert {value[:22] for _, name, value in page.attributes if name in followed} == {"data:image/png;base64,"}
    assert "url(" not in markup
    assert "@import" not in markup
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
    for label in ("sft", "rl"):
        file = run / "samples" / f"eval-{label}.jsonl"
        lines = [json.loads(line) | {"image": name} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    assert "img" not in page.tags
    assert f"picture {name}: outside samples/, not shown" in page.text


def test_a_file_that_is_no_png_and_a_lone_surrogate(tmp_path):
    run = make_run(tmp_path / "run", images=2)
    (run / "samples" / "images" / "scene-0.png").write_text("<svg onload=alert(1)>")
    file = run / "samples" / "eval-rl.jsonl"
    file.write_text(file.read_text().replace("Describe", "x").replace("T", "\\ud800\\u202e\\u0000", 1))
    page = page_of(run)
    assert page.tags.count("img") == 1
    assert "images/scene-0.png: not a PNG" in page.text
    assert "\u202e" not in page.text
    assert "\x00" not in page.text


# --- content ---


def test_page_of_one_run(tmp_path):
    run = make_run(tmp_path / "scenes-run")
    summary = json.loads((run / "summary.json").read_text())["evaluations"]
    page = page_of(run)
    gain = summary["rl"]["b_capscore"]["mean"] - summary["sft"]["b_capscore"]["mean"]
    assert gain > 10
    assert f"from {summary['sft']['b_capscore']['mean']:.1f} {gain:+.1f}" in page.text
    assert "b-CapScore, corpus" in page.text
    assert "Not everything could be shown" not in page.text
    assert "6 min 41 s" in page.text
    assert "sft 1 to 60, rl 61 to 180" in page.text
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    titles = [label.partition(" over steps")[0] for label in labels]
    assert titles[:4] == ["precision", "recall", "linguistic", "b-CapScore"]
    assert {"Mean words", "Truncated", "SFT loss", "KL to reference", "Judge failures"} <= set(titles)
    assert labels[-1].startswith("Seconds per step by phase; rollout ")


def test_each_assertion_is_marked_and_each_missed_unit_listed(tmp_path):
    run = make_run(tmp_path / "run", images=3, samples=1)
    page = page_of(run)
    verified = wrong = vague = 0
    for label in ("sft", "rl"):
        for line in (run / "samples" / f"eval-{label}.jsonl").read_text().splitlines():
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
        return run.evaluations["rl"][image_id].b_capscore - run.evaluations["sft"][image_id].b_capscore

    ranked = sorted(run.evaluations["rl"], key=change, reverse=True)
    chosen = choose_images(run)
    assert len(chosen) == 8
    assert chosen[0] == (ranked[0], "highest change in b-CapScore")
    assert chosen[-1] == (ranked[-1], "lowest change in b-CapScore")
    places = [ranked.index(image_id) for image_id, _ in chosen]
    assert places == sorted(places)
    assert max(np.diff(places)) <= 4
    assert (ranked[11], "median change in b-CapScore") in chosen
    few = load_run(make_run(tmp_path / "few", images=3))
    assert len(choose_images(few)) == 3


def test_failed_judge_calls_are_named(tmp_path):
    run = make_run(tmp_path / "run", images=1, samples=1)
    file = run / "samples" / "eval-rl.jsonl"
    line = json.loads(file.read_text())
    line["captions"][0] |= {
        "b_capscore": None,
        "rewards": {"precision": 0.5, "recall": None, "linguistic": math.nan},
        "covered": None,
        "failures": {"recall": "timeout after 3 tries"},
    }
    file.write_text(json.dumps(line) + "\n")
    page = page_of(run)
    assert "No recall score: timeout after 3 tries" in page.text
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
    assert page.tags.count("article") == 8
    assert "rollout.temperature 1.0 0.5" in page.text
    curves = [value for tag, name, value in page.attributes if tag == "path" and name == "class" and "curve" in value]
    assert sum("s1" in value for value in curves) == sum("s2 d2" in value for value in curves) > 10


@pytest.mark.parametrize(
    ("labels", "ends"),
    [
        (["rl", "rl-50", "sft", "sft-100"], ["sft", "rl"]),
        (["rl-100", "rl-50", "sft"], ["sft", "rl-100"]),
        (["rl", "base", "rl-5"], ["base", "rl"]),
        (["sft", "sft-9", "sft-10"], ["sft-9", "sft"]),
        (["sft"], ["sft"]),
        ([], []),
    ],
)
def test_which_evaluations_are_before_and_after(labels, ends):
    assert before_and_after(labels) == ends


def test_before_and_after_follow_the_order_in_which_the_stages_ran(tmp_path):
    assert before_and_after(["base", "rl", "sft"], ("rl", "sft")) == ["base", "sft"]
    assert before_and_after(["rl", "sft", "sft-9"], ("rl", "sft")) == ["rl", "sft"]
    evaluations = {label: {"precision": value} for label, value in (("sft", 0.5), ("rl", 0.6), ("base", 0.1))}
    assert "+40.0" in before_after_table({"evaluations": evaluations}, ("rl", "sft"))
    (tmp_path / "config.json").write_text('{"stages": {"order": "rl, sft"}}')
    (tmp_path / "summary.json").write_text(json.dumps({"evaluations": evaluations}))
    assert load_run(tmp_path).labels == ["base", "sft"]


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
    for evaluation in summary["evaluations"].values():
        evaluation["b_capscore"] = {"mean": large, "std": large}
        large = -large
    (run / "summary.json").write_text(json.dumps(summary))
    for file in (run / "samples").glob("eval-*.jsonl"):
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
    file = run / "samples" / "eval-rl.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], '{"id": 5, "captions": []}', *lines[2:], lines[1][:100]]))
    page = page_of(run)
    for note in (
        "metrics.jsonl: line 181 torn or not an object, skipped",
        "summary.json: torn or not a JSON object, ignored",
        "config.json: not readable (No such file or directory)",
        "samples/eval-rl.jsonl line 2: skipped, bad field id",
        "eval-rl.jsonl: line 25 torn or not an object, skipped",
    ):
        assert note in page.text
    assert page.tags.count("figure") > 10
    assert page.tags.count("article") == 8


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


# --- the printed table ---


def test_before_after_table():
    summary = {
        "evaluations": {
            "rl": {
                "precision": {"mean": 0.8, "std": 0.1},
                "b_capscore": {"mean": 70.26},
                "words": 30,
                "in_band": 0.975,
            },
            "sft": {
                "precision": {"mean": 0.6},
                "recall": 0.5,
                "b_capscore": 52.1,
                "words": 41.5,
                "in_band": 0.8,
                "n": 48,
            },
        }
    }
    summary["evaluations"]["rl"]["n"] = 192
    assert before_after_table(summary).splitlines() == [
        "192 captions                   SFT        RL    change",
        "precision                     60.0      80.0     +20.0",
        "recall                        50.0         -         -",
        "linguistic                       -         -         -",
        "b-CapScore                    52.1      70.3     +18.2",
        "mean words                    41.5      30.0     -11.5",
        "in band                      80.0%     97.5%     +17.5",
    ]
    assert before_after_table({}) == "no evaluation yet"
    assert "change" not in before_after_table({"evaluations": {"sft": {"precision": 0.5}}})
