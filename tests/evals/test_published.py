"""Golden vectors and tables of the published metrics: DCScore, CaptionQA, CapArena-Auto, checklists, CAPTURE."""

import json
import random
import statistics

import numpy as np
import pytest

from balcap_jax.evals.caparena import CapArena, read_results, shown_first, verdict_of
from balcap_jax.evals.captionqa import BONUS, CaptionQA, is_yes_no, parse_letter
from balcap_jax.evals.capture import f1, graph_score
from balcap_jax.evals.checklist import Checklist
from balcap_jax.evals.dcscore import DCScore, image_score
from balcap_jax.evals.engine import Item, resampled_sums

# ---- DCScore: what the published function gave on these -------------------------------------------------------------

DC_GOLDEN = [
    (
        [1, 1, 1, 0, 1, 1],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 3, None, None],
        10,
        (0.666667, 0.242424, 0.355556, 0.6, 0.151515, 0.241935),
        29.8746,
    ),
    ([1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 2, 3], 4, (1, 1, 1, 1, 1, 1), 100.0),
    ([1, 0, 1], [0, 0, 0], [None, 2, 2], 5, (0, 0, 0, 0, 0, 0), 0.0),
]


@pytest.mark.parametrize(("relevance", "verified", "matched", "oracle", "parts", "score"), DC_GOLDEN)
def test_dcscore_golden_vectors(relevance, verified, matched, oracle, parts, score):
    found = image_score(relevance, [matched] * 3, [verified] * 3, oracle)
    assert found == pytest.approx(parts, abs=1e-6)
    assert 100 * (found[2] + found[5]) / 2 == pytest.approx(score, abs=5e-5)


def test_dcscore_averages_all_pairs_of_draws():
    matches, checks = [[0, None], [0, 0], [None, None]], [[1, 1], [1, 0], [0, 0]]
    trials = [image_score([1, 1], [m], [v], 2) for m in matches for v in checks]
    assert image_score([1, 1], matches, checks, 2) == pytest.approx(
        [statistics.mean(t) for t in zip(*trials, strict=True)]
    )


def test_dcscore_over_images():
    metric = DCScore()
    item = Item("a", "x", ("", ["f"] * 10, None))
    rows = []
    for relevance, verified, matched, oracle, _, _ in DC_GOLDEN:
        judgement = {"relevance": relevance, "matches": [matched] * 3, "verified": [verified] * 3}
        rows.append(metric.parts(Item("a", "x", ("", ["f"] * oracle, None)), judgement))
    sums = np.sum(rows, axis=0)
    assert metric.score(sums) == pytest.approx((29.8746 + 100 + 0) / 3, abs=1e-4)
    assert metric.parts(item, {"relevance": [], "matches": [], "verified": []}) is None
    assert metric.parts(item, {"relevance": [0], "matches": [[0]], "verified": [[1]]}) is None
    with pytest.raises(ValueError, match="other lengths"):
        metric.parts(item, {"relevance": [1, 1], "matches": [[0]], "verified": [[1, 1]]})


# ---- CaptionQA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B)", "B"),
        ("a cat", "A"),
        ("The answer is E", "E"),
        ("Answer: C\nD", "D"),
        ("Answer: see below\nAnswer: D", "D"),
        ("<think>A</think>B</think>C", "B"),
        ("<thinking>A</thinking>B", "A"),
        ("\\boxed{D}", "D"),
        ("E or 2", "E"),
        ("Z", None),
        ("None", None),
        ("", None),
        ("<think>A or B?</think>C", "C"),
        ("option 3", "C"),
        ("99", None),
    ],
)
def test_captionqa_letters(answer, expected):
    place = parse_letter(answer, 5)
    assert (None if place is None else "ABCDE"[place]) == expected


@pytest.mark.parametrize(
    ("question", "choices", "expected"),
    [
        ("What is white?", ["Yes", "Snow"], True),  # "no" is in Snow
        ("What is white?", ["Yes", "Milk"], False),
        ("Is it red?", ["red", "blue"], True),
        ("Island or sea?", ["island", "sea"], False),  # "is" without a space
        ("May one enter?", ["a", "b"], True),
    ],
)
def test_captionqa_yes_no_questions_have_no_way_out(question, choices, expected):
    assert is_yes_no(question, choices) is expected


def captionqa_file(tmp_path, entries):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(entries))
    return path


def question(answer="red", choices=("red", "blue", "green", "pink"), text="Which colour?", category=("Colour", "x")):
    return {"question": text, "choices": list(choices), "answer": answer, "category": list(category)}


def test_captionqa_points_and_averages(tmp_path):
    entries = [
        {"id": "nat_001", "questions": [question(), question(), question(), question()]},
        {"id": "doc_001", "questions": [question(choices=("yes", "no"), answer="no", text="Is it?")]},
    ]
    metric = CaptionQA()
    items = metric.items({"nat_001": "c", "doc_001": "d"}, captionqa_file(tmp_path, entries))
    letters = "ABCDEFGH"
    golds = [letters[item.data["gold"]] for item in items]
    way_out = [item.data["cannot"] for item in items]
    assert way_out[4] is None
    answers = [golds[0], letters[way_out[1]], "no letter?", golds[3], golds[4]]
    rows = np.array([metric.parts(item, {"answer": a}) for item, a in zip(items, answers, strict=True)])
    sums = rows.sum(0)
    natural, document = (1 + (1 / 4 + BONUS) + 0 + 1) / 4, 1.0
    assert metric.score(sums) == pytest.approx(100 * (natural + document) / 2)
    figures = metric.figures(sums)
    assert figures["micro"] == pytest.approx(100 * (1 + 0.3 + 0 + 1 + 1) / 5)
    assert (figures["cannot_answer"], figures["unparsable"]) == (1, 1)
    assert figures["domain/natural"] == pytest.approx(100 * natural)


def test_captionqa_domains_of_names_without_one(tmp_path):
    def figures(*names: str) -> dict[str, float]:
        metric = CaptionQA()
        path = captionqa_file(tmp_path, [{"id": name, "questions": [question()]} for name in names])
        items = metric.items(dict.fromkeys(names, "c"), path)
        answers = ["ABCDEFGH"[items[0].data["gold"]], *["none"] * (len(items) - 1)]
        rows = [metric.parts(item, {"answer": answer}) for item, answer in zip(items, answers, strict=True)]
        return {name: value for name, value in metric.figures(np.sum(rows, axis=0)).items() if "domain" in name}

    assert figures("one.png", "two.png") == {}  # "micro" says it.
    assert figures("one.png", "nat_2.png") == {"domain/none": 100.0, "domain/natural": 0.0}


def test_captionqa_shuffles_with_one_generator_that_skipped_questions_leave_alone(tmp_path):
    whole = [question(), question(answer="black"), question(choices=("red",)), question()]
    entries = [{"id": "nat_1", "questions": whole}, {"id": "nat_2", "questions": [question()]}]
    path = captionqa_file(tmp_path, entries)
    found = CaptionQA().items({"nat_1": "c", "nat_2": "c"}, path)
    assert [item.id for item in found] == ["nat_1#0", "nat_1#3", "nat_2#0"]
    rng, orders = random.Random(0), []
    for _ in range(3):
        order = list(range(5))
        rng.shuffle(order)
        orders.append([[*whole[0]["choices"], "The caption does not say."][k] for k in order])
    assert [item.data["options"] for item in found] == orders
    missing = CaptionQA().items({"nat_2": "c"}, path)
    assert [(item.id, item.caption) for item in missing] == [("nat_1#0", None), ("nat_1#3", None), ("nat_2#0", "c")]
    assert missing[2].data["options"] == orders[0]


def test_captionqa_in_its_published_form_and_what_is_skipped_is_counted(tmp_path):
    path = tmp_path / "natural.json"
    asked = [
        question("red "),
        question("3", choices=(3, 4)),
        question("mauve"),
        question("a", choices=("a",)),
        "nothing",
    ]
    path.write_text(json.dumps({"nat_001": asked}))
    metric = CaptionQA()
    items = metric.items({"nat_001": "c"}, path)
    assert [item.id for item in items] == ["nat_001#0", "nat_001#1"]
    assert [item.data["options"][item.data["gold"]] for item in items] == ["red", "3"]
    sums = np.sum([metric.parts(item, {"answer": "no letter here"}) for item in items], axis=0)
    assert metric.figures(sums)["skipped"] == 3.0


@pytest.mark.parametrize(
    ("domains", "overall"),
    [((88.78, 90.81, 94.73, 86.82), 90.28), ((71.64, 75.85, 85.38, 68.36), 75.31)],
)
def test_captionqa_board_averages(tmp_path, domains, overall):
    """GPT-5 and Qwen2.5-VL-7B: the mean of the four domains, whatever their sizes."""
    metric = CaptionQA()
    metric.items(
        {}, captionqa_file(tmp_path, [{"id": f"{d}_1", "questions": []} for d in ("nat", "doc", "ecom", "emb")])
    )
    sizes = (10445, 7422, 5886, 9274)
    by_name = dict(
        zip(("natural", "document", "e-commerce", "embodied"), zip(domains, sizes, strict=True), strict=True)
    )
    parts = [0.0] * 5
    for name in sorted(by_name):
        mean, size = by_name[name]
        parts += [mean / 100 * size, size]
    assert float(metric.score(np.array(parts))) == pytest.approx(overall, abs=0.0051)


# ---- CapArena-Auto ---------------------------------------------------------------------------------------------------

BOARD = {
    "Gemini-1.5-pro-002": (56.17, 29, 61, 78.5),
    "GPT-4o-0806": (44.00, 0, 55.5, 76.5),
    "Qwen2.5VL-72B": (35.33, -1, 49, 58),
    "Gemini-2.0-flash-exp": (30.83, -2, 39.5, 55),
    "Ovis-2-34b": (27.00, -15, 33.5, 62.5),
    "Claude-3.5-Sonnet-0620": (21.50, -14, 30, 48.5),
    "InternVL2-26B": (13.00, -38.5, 20, 57.5),
    "GPT-4o-mini-0718": (9.33, -36, 17, 47),
    "Ovis-1_6-27b": (3.00, -49.5, 14.5, 44),
    "GLM-4V-Plus": (-0.17, -51.5, 13, 38),
    "CogVLM2-19B": (-8.50, -56.5, 0, 31),
    "Qwen2-VL-72B": (-9.00, -50.5, -4.5, 28),
    "LLaVA-OV-72b": (-12.33, -57.5, -6, 26.5),
    "LLama-3.2-90B": (-25.67, -72, -13, 8),
    "Hunyuan-standard": (-26.00, -63, -19, 4),
    "Internvl2-5-8b": (-29.83, -71, -29, 10.5),
    "MiniCPM-V2.6-8B": (-38.00, -80, -34, 0),
    "Qwen2-VL-2B": (-48.67, -86, -49.5, -10.5),
    "Qwen2-VL-7B": (-49.00, -78, -59, -10),
    "LLaVA-1.6-34B": (-67.50, -92, -53.5, -57),
    "cambrian-34b": (-75.00, -93, -76, -56),
    "LLaVA-1.5-7B": (-94.00, -99.5, -92, -90.5),
}


def arena(tmp_path, model="", per_opponent=200):
    entries = {
        f"{name}_{i}.jpg": {"captions": {"human": "h", name: f"by {name}"}, "ref_model": name}
        for name in ("cog", "cpm", "gpt")
        for i in range(per_opponent)
    }
    path = tmp_path / "auto.json"
    path.write_text(json.dumps(entries))
    metric = CapArena(model=model)
    return metric, metric.items(dict.fromkeys(entries, "two words"), path, tmp_path)


@pytest.mark.parametrize("name", BOARD)
def test_caparena_board_averages(tmp_path, name):
    """From 600 verdicts that give the board's figure against each opponent."""
    average, gpt, cog, cpm = BOARD[name]
    metric, items = arena(tmp_path)
    rows = []
    for opponent, points in (("gpt", gpt), ("cog", cog), ("cpm", cpm)):
        won = round(2 * points)  # of 200; the rest ties
        for i, item in enumerate(item for item in items if item.category == opponent):
            ours = "caption 1" if item.data["first"] else "caption 2"
            theirs = "caption 2" if item.data["first"] else "caption 1"
            winner = "tie" if i >= abs(won) else ours if won > 0 else theirs
            rows.append(metric.parts(item, {"winner": winner}))
    sums = np.sum(rows, axis=0)
    assert round(float(metric.score(sums)), 2) == pytest.approx(average, abs=0.0051)
    assert metric.figures(sums)["against/gpt"] == gpt
    assert metric.figures(sums)["board_words"] == 2


def test_caparena_counts_what_is_no_verdict_as_published(tmp_path):
    metric, items = arena(tmp_path, per_opponent=2)
    won = {"winner": "caption 1" if items[0].data["first"] else "caption 2"}
    skipped = metric.parts(items[1], {"winner": "Caption 1 is better, I think"})
    sums = np.sum([metric.parts(items[0], won), skipped], axis=0)
    assert metric.figures(sums)["against/cog"] == 50.0
    assert metric.figures(sums)["skipped"] == 1.0
    assert metric.figures(sums)["board_words"] == 2.0, "the length is over skipped rows too"
    assert [verdict_of(text) for text in ("Caption 1 is better.", "Caption 2 is better", "Tie.", "tie", "x")] == [
        1,
        2,
        0,
        0,
        None,
    ]
    own, others = arena(tmp_path, model="gpt", per_opponent=2)
    assert {item.category for item in others} == {"cog", "cpm"}
    lost = {"winner": "caption 2" if others[0].data["first"] else "caption 1"}
    sums = np.sum([own.parts(others[0], lost), *(own.parts(one, {"winner": "tie"}) for one in others[1:])], axis=0)
    assert own.figures(sums)["against/gpt"] == 0.0
    assert own.of_category(own.parts(others[0], lost)) == -100.0, "the model's own 0 is none of the opponent's"
    assert float(own.score(sums)) == pytest.approx(-50 / 3), "the board's mean is over all three"
    assert 60 < sum(shown_first(f"{i}.jpg") for i in range(200)) < 140


@pytest.mark.parametrize("judge", [{}, {"judge": None}, {"judge": ""}, {"judge": "Caption 3 is better"}])
def test_caparena_skips_published_rows_without_a_verdict(tmp_path, judge):
    row = {"img": "a.jpg", "source1": "me", "source2": "gpt", "ref_model": "gpt"} | judge
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (judgement,) = read_results(tmp_path / "rows.json", "me").values()
    assert verdict_of(judgement["winner"]) is None


# ---- checklists, CAPTURE --------------------------------------------------------------------------------------------


def test_checklist_coverage_and_precision(tmp_path):
    path = tmp_path / "checklists.jsonl"
    lines = [
        {"id": "a", "image": "images/a.jpg", "items": [{"kind": "count", "question": f"q{i}?"} for i in range(4)]},
        {"id": "b", "items": [{"kind": "text", "question": "t?"}, {"kind": "count", "question": "c?"}]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metric = Checklist()
    items = metric.items({"images/a.jpg": "x", "b": "y"}, path)
    assert [item.caption for item in items] == ["x", "y"]
    judged = [{"1": "yes", "2": "no", "3": "not_mentioned"}, {"1": "yes", "2": "yes"}]  # The fourth was left out.
    sums = np.sum([metric.parts(i, {"answers": a}) for i, a in zip(items, judged, strict=True)], axis=0)
    assert float(metric.score(sums)) == pytest.approx(75.0)  # 3 yes of 4 answered
    figures = metric.figures(sums)
    assert figures["coverage"] == pytest.approx(100 * 4 / 6)
    assert figures["coverage/count"] == pytest.approx(60.0)
    assert figures["precision/text"] == 100.0
    with pytest.raises(ValueError, match="maybe"):
        metric.parts(items[0], {"answers": {"1": "maybe"}})


def test_checklists_as_capeval_publishes_them_and_items_without_a_kind(tmp_path):
    path = tmp_path / "checklists.jsonl"
    asked = {f"{kind}_checklist": [{"Tags": ["x"], "Question": f"{kind}?"}] for kind in ("instance", "attribute")}
    lines = [{"id": "a", "img_path": "images/a.jpg", **asked}, {"id": "b", "items": [{"question": "q?"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metric = Checklist()
    items = metric.items({"a.jpg": "x", "b": "y"}, path)
    assert items[0].data == [("instance", "instance?"), ("attribute", "attribute?")]
    judged = [{"1": "yes", "2": "no"}, {"1": "yes"}]
    sums = np.sum([metric.parts(i, {"answers": a}) for i, a in zip(items, judged, strict=True)], axis=0)
    assert metric.figures(sums)["questions"] == 3.0, "each once"
    assert float(metric.score(sums)) == pytest.approx(100 * 2 / 3)


def test_capture_matching():
    assert f1(["dog", "red car"], ["dog", "car", "tree"]) == pytest.approx(
        2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3), abs=1e-5
    )
    assert f1(["dog", "dog"], ["dog"]) == pytest.approx(2 * 0.5 * 1 / 1.5, abs=1e-5)  # one to one
    assert f1([], ["dog"]) == 0.0

    def similarity(mine, theirs):
        assert (mine, theirs) == (["sofa"], ["couch", "lamp"])  # what the exact pass left
        return np.array([[0.8, 0.1]])

    assert f1(["dog", "sofa"], ["dog", "couch", "lamp"], similarity) == pytest.approx(
        2 * (1.8 / 2) * (1.9 / 3) / (1.8 / 2 + 1.9 / 3), abs=1e-5
    )
    one = {"objects": ["dog"], "attributes": {"dog": ["Red"]}, "relations": [["dog", "on", "mat"]]}
    other = {"objects": ["dog"], "attributes": ["red"], "relations": ["cat on mat"]}
    score, objects, attributes, relations = graph_score(one, other)
    assert (objects, attributes, relations) == pytest.approx((1, 1, 0), abs=1e-5)
    assert score == pytest.approx(1.0 / 1.2, abs=1e-5)


def test_the_bootstrap_is_that_of_drawing_items_with_replacement():
    matrix = np.column_stack([np.arange(50.0), np.ones(50)])
    sums = resampled_sums(matrix, 4000)
    means = sums[:, 0] / sums[:, 1]
    assert (sums[:, 1] == 50).all()
    assert means.mean() == pytest.approx(24.5, abs=0.15)
    assert means.std() == pytest.approx(matrix[:, 0].std() / 50**0.5, rel=0.05)
    assert (resampled_sums(matrix, 4000) == sums).all()
