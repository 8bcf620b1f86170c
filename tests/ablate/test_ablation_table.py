"""The study's table: means, spreads, paired intervals of given runs, verdicts on claims, and how they are written."""

import math
import xml.etree.ElementTree

import pytest

from balcap_jax.ablate import plot
from balcap_jax.ablate.statistics import Paired
from balcap_jax.ablate.table import (
    BASE,
    METRICS,
    claims_markdown,
    claims_of,
    difference,
    markdown,
    mean_and_spread,
    points,
    rows,
    verdict,
)
from balcap_jax.ablate.variants import FULL, LEAVE_ONE_OUTS, VARIANTS, Variant
from balcap_jax.config import ablations

VALUES = {
    BASE: {0: {"b_capscore": 40.0}},
    FULL: {
        seed: {"b_capscore": value, "dcscore": 60.0, "words": 40.0} for seed, value in enumerate((78.0, 79.0, 80.0))
    },
    # Differences -4, -5, -6: mean -5, sd 1; with t(0.975, 2) = 4.30265 the half width is 2.48414.
    "grpo": {
        0: {"b_capscore": 74.0, "dcscore": 57.0},
        1: {"b_capscore": 74.0, "dcscore": 63.0},
        2: {"b_capscore": 74.0},
    },
    "mine<&>": {1: {"b_capscore": 79.5}},
}


def test_points_of_an_evaluation():
    evaluation = {
        "b_capscore": {"mean": 77.5, "std": 3.0},
        "precision": {"mean": 0.812, "std": 0.1},
        "arena": {"mean": -0.25, "std": 0.5},
        "words": {"mean": 41.5, "std": 1.0},
        "recall": {"mean": None, "std": None},
        "tokens": {"mean": 50.0, "std": 1.0},
        "n": 12,
    }
    assert points(evaluation) == pytest.approx({"b_capscore": 77.5, "arena": -25.0, "words": 41.5, "precision": 81.2})


def test_mean_and_spread():
    assert mean_and_spread([74.0, 76.0, 81.0]) == (77.0, pytest.approx(math.sqrt((9 + 1 + 16) / 2)))
    assert mean_and_spread([3.0]) == (3.0, None)


def test_differences_are_paired_by_seed():
    found = difference(VALUES, "grpo", FULL, "b_capscore")
    assert (found.mean, found.n) == (-5.0, 3)
    assert found.half() == pytest.approx(4.302652729911275 / math.sqrt(3))
    two = difference(VALUES, "grpo", FULL, "dcscore")  # -3 and 3, of the seeds that both have; t(0.975, 1) = 12.7062
    assert (two.mean, two.n) == (0.0, 2)
    assert two.half() == pytest.approx(12.706204736 * math.sqrt(18) / math.sqrt(2))
    assert difference(VALUES, "mine<&>", FULL, "b_capscore") == Paired(0.5, None, 1)
    assert difference(VALUES, "mine<&>", "grpo", "dcscore") is None
    assert difference(VALUES, "grpo", "no_gate", "dcscore") is None


@pytest.mark.parametrize(
    ("mean", "half", "direction", "said"),
    [
        (-5.0, 2.5, -1, "yes"),
        (-5.0, 2.5, 1, "no"),
        (-2.0, 2.5, -1, "not told apart"),
        (-2.0, 2.5, 1, "not told apart"),
        (5.0, 2.5, 1, "yes"),
        (0.0, 0.0, 1, "not told apart"),
        (-5.0, 2.5, 0, "no"),
        (-2.0, 2.5, 0, "not told apart"),
        (-0.2, 0.5, 0, "yes"),
        (5.0, 2.5, 0, "yes"),
        (-5.0, None, -1, "one seed"),
    ],
)
def test_a_claim_is_settled_only_beyond_the_spread(mean, half, direction, said):
    sd = None if half is None else half * math.sqrt(3) / 4.302652729911275  # t(0.975, 2)
    assert verdict(Paired(mean, sd, 3 if sd is not None else 1), direction) == said


def test_claims():
    assert claims_of("two_sided") == [("dcscore", 1, "no_gate", "paper")]
    assert claims_of("grpo")[-1] == ("b_capscore", -1, FULL, "method")
    assert claims_of("mine") == []
    assert claims_of("x", {"x": Variant("x", {"arena": 0}, {"words": 1})}) == [
        ("arena", 0, FULL, "paper"),
        ("words", 1, FULL, "method"),
    ]
    assert {*VARIANTS} - {*LEAVE_ONE_OUTS} == {"soft_min", "conflict"}
    assert {*VARIANTS} <= {FULL, *ablations.NAMES}
    for variant in VARIANTS.values():
        assert variant.against in VARIANTS
        assert {*variant.reported, *variant.expected} <= METRICS.keys()


def test_tables():
    table = rows(VALUES)
    assert [row["variant"] for row in table] == list(VALUES)
    assert table[2]["metrics"]["b_capscore"]["seeds"] == {"0": 74.0, "1": 74.0, "2": 74.0}
    assert "against_full" not in table[0]["metrics"]["b_capscore"]
    assert markdown(table).splitlines() == [
        "| variant | b-CapScore | DCScore (mini) | words |",
        "|---|---|---|---|",
        "| base | 40.0 | - | - |",
        "| full | 79.0 ± 1.0 | 60.0 ± 0.0 | 40.0 ± 0.0 |",
        "| grpo | **74.0 ± 0.0** | 60.0 ± 4.2 | - |",
        "| mine<&> | 79.5 | - | - |",
    ]
    assert claims_markdown(table).splitlines()[2:] == [
        "| grpo | DCScore (mini) | falls (paper) | full | +0.0 ± 38.1 | not told apart |",
        "| grpo | b-CapScore | falls (method) | full | -5.0 ± 2.5 | yes |",
    ]


def test_the_plot_is_whole_and_places_values_in_order():
    root = xml.etree.ElementTree.fromstring(plot.svg(rows(VALUES), "a <b> & c"))
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert [*VALUES] == texts[:4]
    assert [text for text in texts if text in METRICS.values()] == ["b-CapScore", "DCScore (mini)", "words"]
    seeds = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{space}circle") if c.get("class") == "s"]
    assert len(seeds) == sum(
        metric in one for by_seed in VALUES.values() for one in by_seed.values() for metric in METRICS
    )
    full = [x for x, y in seeds if y == seeds[1][1]][:3]
    assert full == sorted(full)
    # b-CapScore runs from 40 to 80 on one panel: equal steps are equally far apart.
    assert (full[2] - full[1]) == pytest.approx(full[1] - full[0], abs=0.15)
    assert (full[0] - seeds[0][0]) / (full[2] - full[0]) == pytest.approx((78 - 40) / 2, rel=0.05)


def test_more_panels_than_a_row_takes_go_below():
    every = dict.fromkeys(METRICS, 50.0)
    values = {name: {seed: {key: value + seed for key, value in every.items()} for seed in (0, 1)} for name in VALUES}
    root = xml.etree.ElementTree.fromstring(plot.svg(rows(values), "t"))
    space = "{http://www.w3.org/2000/svg}"
    blocks = root.findall(f"{space}g")
    assert len(blocks) == -(-len(METRICS) // plot.COLUMNS) == 2
    width, height = float(root.get("width")), float(root.get("height"))
    tops = [float(block.get("transform").split()[1].rstrip(")")) for block in blocks]
    assert tops == [0, height / 2]
    told = [[text.text for text in block.iter(f"{space}text")] for block in blocks]
    assert [texts[: len(VALUES)] for texts in told] == [[*VALUES]] * 2
    assert [text for texts in told for text in texts if text in METRICS.values()] == [*METRICS.values()]
    for circle in root.iter(f"{space}circle"):
        assert 0 < float(circle.get("cx")) < width
        assert 0 < float(circle.get("cy")) < height / 2
