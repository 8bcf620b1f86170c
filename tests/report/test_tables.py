"""Tables of a run: which evaluations are before, after and the ceiling, and what is said of them and of habits."""

import html.parser
import json

import pytest
from made_runs import Page, captions_of, make_run, page_of

from balcap_jax.data.scenes.habits import HABITS
from balcap_jax.report.page import write_report
from balcap_jax.report.run import KINDS, before_and_after, ceiling_of, closed_share, load_run
from balcap_jax.report.tables import before_after_table, habit_table, result_text


@pytest.mark.parametrize(
    ("labels", "ends"),
    [
        (["rl", "rl-50", "sft", "sft-100"], ["sft", "rl"]),
        (["rl-100", "rl-50", "sft"], ["sft", "rl-100"]),
        (["rl", "base", "rl-5"], ["base", "rl"]),
        (["sft", "sft-9", "sft-10"], ["sft-9", "sft"]),
        (["sft"], ["sft"]),
        (["align", "sft", "rl"], ["sft", "rl"]),
        (["align", "sft", "sft-9"], ["sft-9", "sft"]),
        (["align"], []),
        ([], []),
    ],
)
def test_which_evaluations_are_before_and_after(labels, ends):
    assert before_and_after(labels) == ends


def test_before_and_after_follow_the_order_in_which_the_stages_ran(tmp_path):
    assert before_and_after(["base", "rl", "sft"], ("rl", "sft")) == ["base", "sft"]
    assert before_and_after(["rl", "sft", "sft-9"], ("rl", "sft")) == ["rl", "sft"]
    evaluations = {label: {"precision": value} for label, value in (("sft", 0.5), ("rl", 0.6), ("base", 0.1))}
    assert "+40.0" in before_after_table({"greedy": evaluations}, ("rl", "sft"))
    (tmp_path / "config.json").write_text('{"stages": {"order": "rl, sft"}}')
    (tmp_path / "summary.json").write_text(json.dumps({"greedy": evaluations}))
    assert load_run(tmp_path).labels == ["base", "sft"]


@pytest.mark.parametrize(
    ("labels", "order", "ceiling", "ends"),
    [
        (["align", "sft", "rl"], ("vision", "align", "sft", "rl"), "align", ["sft", "rl"]),
        (["align", "sft"], ("align", "sft"), "align", ["sft"]),
        (["sft", "rl"], ("align", "sft", "rl"), None, ["sft", "rl"]),
        # No faults were taught: RL starts from this policy, which is what "before" means.
        (["align", "rl"], ("vision", "align", "rl"), None, ["align", "rl"]),
        (["sft", "align", "rl"], ("sft", "align", "rl"), None, ["sft", "rl"]),
        (["align"], ("vision", "align"), None, ["align"]),
    ],
)
def test_the_ceiling_is_the_end_of_align_where_a_later_stage_teaches_faults(labels, order, ceiling, ends):
    assert ceiling_of(labels, order) == ceiling
    assert before_and_after(labels, order) == ends


def test_a_table_without_a_changed_caption_says_so():
    def table(*digests):
        labels = ("base", "rl")
        values = [{"precision": 0.5, "n": 4, "digest": digest} for digest in digests]
        return before_after_table({"greedy": dict(zip(labels, values, strict=False))})

    assert "no caption changed: all captions after are those before" in table("a", "a")
    for digests in (("a", "b"), ("a",), (None, None)):
        assert "no caption changed" not in table(*digests)


def test_share_of_the_distance_to_the_ceiling():
    scores = {"sft": {"b_capscore": 40.0}, "rl": {"b_capscore": {"mean": 70.0}}, "align": {"b_capscore": 80.0}}
    assert closed_share(["sft", "rl"], "align", scores) == pytest.approx(0.75)
    assert closed_share(["sft", "rl"], "align", scores | {"rl": {"b_capscore": 84.0}}) == pytest.approx(1.1)
    assert closed_share(["sft", "rl"], "align", scores | {"rl": {"b_capscore": 30.0}}) == pytest.approx(-0.25)
    for ceiling in (40.9, 39.0, None, "x"):  # not above, or not by a point
        assert closed_share(["sft", "rl"], "align", scores | {"align": {"b_capscore": ceiling}}) is None
    assert closed_share(["sft", "rl"], None, scores) is None
    assert closed_share(["sft"], "align", scores) is None
    assert closed_share(["sft", "rl"], "align", {"sft": 3, "rl": None}) is None


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
    assert before_after_table(summary, kind="evaluations").splitlines() == [
        "192 captions                   SFT        RL    change",
        "precision                     60.0      80.0     +20.0",
        "recall                        50.0         -         -",
        "linguistic                       -         -         -",
        "b-CapScore                    52.1      70.3     +18.2",
        "mean words                    41.5      30.0     -11.5",
        "in band                      80.0%     97.5%     +17.5",
    ]
    assert before_after_table({}) == before_after_table(summary) == "no evaluation yet"
    assert "change" not in before_after_table({"greedy": {"sft": {"precision": 0.5}}})
    assert before_after_table({"greedy": {"align": {"precision": 0.5}}}) == "no evaluation yet"


def evaluation(score, companion, praise, **more):
    """Of 48 captions; a habit is (share, n) or None."""
    habits = {"praise": praise, "companion": companion}
    means = {name: {"mean": value / 100, "std": 0.1} for name, value in more.items()}
    return means | {
        "b_capscore": {"mean": score, "std": 9.0},
        "corpus_b_capscore": {"mean": score + 1, "std": None},
        "n": 48,
        "images": 48,
        "habits": {name: dict(zip(("share", "n"), one, strict=True)) for name, one in habits.items() if one},
    }


MEASURED = {
    "evaluations": {
        "align": evaluation(70.0, (0.0, 60), (0.125, 80), dcscore=66.0),
        "sft": evaluation(35.0, (0.5, 60), (0.25, 80), dcscore=30.0),
        "rl": evaluation(65.0, (0.1, 60), (0.05, 80), dcscore=60.0),
    },
    "greedy": {
        "align": evaluation(80.0, (0.0, 15), (0.0, 20), dcscore=75.0, arena=10.0, rouge_l=60.0),
        "sft": evaluation(40.0, (0.8, 15), (0.95, 20), dcscore=33.0, arena=-50.0, rouge_l=40.0),
        "rl": evaluation(75.0, (0.2, 15), None, dcscore=70.0, arena=5.0, rouge_l=55.0),
    },
}


def test_what_ends_a_training():
    """Greedy captions, sampled ones, habits; in each table the objectives, a run's own, the miniature's."""
    assert result_text(MEASURED).splitlines() == [
        "",
        "48 held-out images, greedy captions",
        "48 captions                    SFT        RL    change   ceiling",
        "precision                        -         -         -         -",
        "recall                           -         -         -         -",
        "linguistic                       -         -         -         -",
        "b-CapScore                    40.0      75.0     +35.0      80.0",
        "rouge l                       40.0      55.0     +15.0      60.0",
        "DCScore (mini)                33.0      70.0     +37.0      75.0",
        "arena (mini)                 -50.0       5.0     +55.0      10.0",
        "RL closes 88% of the distance from SFT to the ceiling in b-CapScore",
        "",
        "48 held-out images, sampled captions",
        "48 captions                    SFT        RL    change   ceiling",
        "precision                        -         -         -         -",
        "recall                           -         -         -         -",
        "linguistic                       -         -         -         -",
        "b-CapScore                    35.0      65.0     +30.0      70.0",
        "DCScore (mini)                30.0      60.0     +30.0      66.0",
        "",
        "                            greedy             sampled",
        "habits, % of captions          SFT        RL       SFT        RL",
        "companion                     80.0      20.0      50.0      10.0",
        "praise                        95.0         -      25.0       5.0",
    ]
    assert result_text({}) == ""
    without = {kind: {"sft": {"precision": 0.5}} for kind in MEASURED}
    assert habit_table(without) == ""
    assert "habits" not in result_text(without)


class Cells(html.parser.HTMLParser):
    """The cells of a page's tables by row."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self._inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag):
        self._inside &= tag not in ("td", "th")

    def handle_data(self, data):
        if self._inside:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())


def rows_of_page(run) -> list[list[str]]:
    return Cells(write_report([run]).read_text()).rows


def test_the_page_has_the_ceiling_and_the_habits(tmp_path):
    run = make_run(tmp_path / "run", images=2)
    (run / "summary.json").write_text(json.dumps(MEASURED))
    rows = rows_of_page(run)
    names = [row[0] for row in rows]
    assert rows[0] == ["", "SFT", "RL", "change", "ceiling"]
    assert rows[1] == ["b-CapScore", "40.0 ± 9.0", "75.0 ± 9.0", "+35.0", "80.0 ± 9.0"]
    assert names[1:6] == ["b-CapScore", "b-CapScore, corpus", "rouge l", "DCScore (mini)", "arena (mini)"]
    assert rows[names.index("companion")] == [
        "companion", HABITS["companion"], "80.0%", "20.0%", "50.0%", "10.0%", "0.0%", "15 / 60"
    ]  # fmt: skip
    assert rows[names.index("praise")] == ["praise", HABITS["praise"], "95.0%", "–", "25.0%", "5.0%", "0.0%", "– / 80"]
    assert rows[names.index("companion") - 1][1:] == ["meaning", "SFT", "RL", "SFT", "RL", "ceiling", "n"]
    text = page_of(run).text
    assert "distance to the ceiling 88% closed, in b-CapScore" in text
    assert "RL closes 88% of the distance from SFT to the ceiling in b-CapScore." in text
    assert "b-CapScore greedy 75.0 from 40.0 +35.0 sampled 65.0 from 35.0 +30.0" in text
    assert text.index("Greedy captions (48 images, 48 captions)") < text.index("Sampled captions (48")


def test_the_ceiling_is_in_no_chart_and_on_no_card(tmp_path):
    run = make_run(tmp_path / "run", images=2)
    before = Page(write_report([run]).read_text())
    summary = json.loads((run / "summary.json").read_text())
    for kind in KINDS:
        summary[kind]["align"] = MEASURED[kind]["align"]
        captions_of(run, kind, "align").write_text(captions_of(run, kind, "rl").read_text())
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report([run]).read_text())
    assert load_run(run).ceiling == "align"
    assert "ceiling" in page.text
    for tag in ("header", "blockquote", "path"):
        assert page.tags.count(tag) == before.tags.count(tag) > 2, tag


def test_runs_with_and_without_a_ceiling_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name, images=2) for name in ("one", "two")]
    (runs[0] / "summary.json").write_text(json.dumps(MEASURED))
    rows = Cells(write_report(runs, tmp_path / "report.html").read_text()).rows
    rows = rows[rows.index(["", "SFT", "RL", "change", "ceiling", "SFT", "RL", "change"]) - 1 :]
    assert rows[0] == ["", "one", "two"]
    score = next(row for row in rows if row[0] == "b-CapScore")
    assert score[1:5] == ["40.0 ± 9.0", "75.0 ± 9.0", "+35.0", "80.0 ± 9.0"]
    assert len(score) == 8
    companion = next(row for row in rows if row[0] == "companion")
    assert companion[2:8] == ["80.0%", "20.0%", "50.0%", "10.0%", "0.0%", "15 / 60"]
    assert len(companion) == 13
    assert next(row for row in rows if row[0] == "dots")[2:8] == ["–"] * 5 + ["– / –"]


@pytest.mark.parametrize("odd", [3, "x", [1], {"companion": 3}, {"companion": {"share": "x", "n": None}}, {"": {}}])
def test_odd_habits(tmp_path, odd):
    run = make_run(tmp_path / "run", images=2)
    summary = {kind: {label: MEASURED[kind][label] | {"habits": odd} for label in MEASURED[kind]} for kind in KINDS}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "b-CapScore greedy 75.0 from 40.0 +35.0 sampled 65.0 from 35.0 +30.0" in page_of(run).text
    assert "80.0" in result_text(summary)
