"""The primary claims on hand-made seeds: what is compared, which p values count, and what is said."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from balcap_jax.ablate.claims import PILOT_RIVALS, PRIMARY, Claim, Part, assess, piloted, planned_seeds
from balcap_jax.ablate.statistics import power
from balcap_jax.ablate.studies import GATE, POINTABILITY, RIVALS, SPREAD, STUDIES

SPREAD_CLAIM, POINTABILITY_CLAIM, GATE_CLAIM, RIVALS_CLAIM = PRIMARY


def seeds(metric, *values):
    return {seed: {metric: value} for seed, value in enumerate(values)}


def planned(count, *claims):
    """The claims as if their studies had `count` seeds."""
    return [
        dataclasses.replace(
            claim,
            parts=tuple(
                dataclasses.replace(part, study=dataclasses.replace(part.study, seeds=tuple(range(count))))
                for part in claim.parts
            ),
        )
        for claim in claims
    ]


def test_the_claims_compare_what_was_stated():
    assert [claim.name for claim in PRIMARY] == ["spread", "pointability", "gate", "rivals"]
    [part] = SPREAD_CLAIM.parts
    assert part.metric == "b_capscore"
    assert part.arms == ("full_s0.1", "full", "full_s10")
    assert part.against == ("grpo_s0.1", "grpo", "grpo_s10")
    [part] = POINTABILITY_CLAIM.parts
    assert (part.metric, part.arms, part.against) == ("arena", ("full",), ("no_pointability",))
    assert [(part.metric, part.against, part.margin) for part in GATE_CLAIM.parts] == [
        ("in_band", ("no_gate",), 0.0),
        ("dcscore", ("no_gate",), 1.0),
        ("captionqa", ("no_gate",), 1.0),
    ]
    rivals = ("caprl", "rubicap", "feedquill", "arena", "lexical", "best_of")
    assert [part.against for part in RIVALS_CLAIM.parts] == [(name,) for name in rivals]
    assert {part.metric for part in RIVALS_CLAIM.parts} == {"lowest"}
    for claim in PRIMARY:
        for part in claim.parts:
            assert {*part.arms, *part.against} <= part.study.arms.keys()


def test_a_pilot_has_what_the_claims_compare():
    assert {*piloted(GATE).arms} == {"full", "no_gate"}
    assert {*SPREAD.arms} - {*piloted(SPREAD).arms} == {"grpo_fixed", "grpo_s0.3", "grpo_s3"}
    assert {*piloted(RIVALS).arms} == {"full", *PILOT_RIVALS}
    assert piloted(STUDIES["moods"]) == STUDIES["moods"]


def test_the_worst_case_is_taken_by_seed():
    part = Part(SPREAD, "b_capscore", ("grpo", "grpo_s3"))
    assert part.text() == "full - the lowest of grpo, grpo_s3"
    values = {
        "full": seeds("b_capscore", 80.0, 81.0, 82.0),
        "grpo": seeds("b_capscore", 79.0, 60.0, 70.0),
        "grpo_s3": seeds("b_capscore", 70.0, 78.0),
    }
    assert part.differences(values, (0, 1, 2)) == {0: 10.0, 1: 21.0}
    assert part.differences(values, (1, 9)) == {1: 21.0}
    both = Part(SPREAD, "b_capscore", ("grpo", "grpo_s3"), ("full", "full_s3"))
    three = values | {"full_s3": seeds("b_capscore", 90.0, 61.0, 50.0)}
    assert both.differences(three, (0, 1, 2)) == {0: 10.0, 1: 1.0}
    assert part.differences({}, (0, 1, 2)) == {}


def gate(in_band, dcscore, captionqa):
    zero = (0.0,) * len(in_band)
    columns = {"in_band": in_band, "dcscore": dcscore, "captionqa": captionqa}
    rows = {
        arm: {seed: {name: values[seed] for name, values in these.items()} for seed in range(len(in_band))}
        for arm, these in (("full", columns), ("no_gate", dict.fromkeys(columns, zero)))
    }
    return {GATE.name: rows}


def test_a_claim_of_several_parts_has_the_largest_p():
    change = {
        "in_band": (20.0, 22.0, 25.0, 19.0),
        "dcscore": (-0.5, -0.2, -0.6, -0.1),
        "captionqa": (0.3, 0.1, -0.4, 0),
    }
    four = planned(4, GATE_CLAIM)
    [one] = assess(gate(**change), four)
    expected = [
        scipy.stats.ttest_1samp(change[name], null).pvalue
        for name, null in (("in_band", 0), ("dcscore", -1), ("captionqa", -1))
    ]
    assert one.p == pytest.approx(max(expected))
    assert (one.adjusted, one.verdict) == (one.p, "yes")
    # A fall of two points is more than the margin, however far the share in band rises.
    [one] = assess(gate(change["in_band"], (-2.1, -2.0, -1.9, -2.2), change["captionqa"]), four)
    assert (one.p, one.verdict) == (1.0, "no")
    # A fall of 1.5 +- 1.3 points is neither within the margin nor surely beyond it.
    [one] = assess(gate(change["in_band"], (-1.5, -0.5, -2.5, -1.5), change["captionqa"]), four)
    assert one.verdict == "not told apart"
    sd = np.std(change["in_band"], ddof=1)
    assert power(one.parts[0].detectable(), sd, 4) == pytest.approx(0.8, abs=1e-4)


def test_holm_counts_all_claims_whether_or_not_they_have_seeds():
    low = {"full": seeds("arena", 5.0, 6.0, 7.5), "no_pointability": seeds("arena", 0.0, 0.2, 0.0)}
    p = scipy.stats.ttest_1samp([5.0, 5.8, 7.5], 0).pvalue
    assert 0.0125 < p < 0.05
    found = {one.claim.name: one for one in assess({POINTABILITY.name: low}, planned(3, *PRIMARY))}
    assert found["pointability"].p == pytest.approx(p)
    assert found["pointability"].adjusted == pytest.approx(4 * p)
    assert found["pointability"].verdict == "not told apart"
    assert [found[name].verdict for name in ("spread", "gate", "rivals")] == ["0 of 3 seeds"] * 3
    assert found["gate"].adjusted is None
    only = planned(3, POINTABILITY_CLAIM)
    [alone] = assess({POINTABILITY.name: low}, only)
    assert alone.verdict == "yes"
    swapped = {"full": low["no_pointability"], "no_pointability": low["full"]}
    [alone] = assess({POINTABILITY.name: swapped}, only)
    assert (alone.p, alone.verdict) == (1.0, "no")


def test_one_seed_is_no_test():
    values = {POINTABILITY.name: {"full": seeds("arena", 5.0), "no_pointability": seeds("arena", 1.0)}}
    [one] = assess(values, [POINTABILITY_CLAIM])
    assert (one.parts[0].mean, one.parts[0].detectable(), one.p, one.verdict) == (4.0, None, None, "1 of 5 seeds")


@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_is_said_before_the_last_planned_seed(sign):
    """A sharp difference of few seeds, and seeds that were added until it was sharp, are no answer."""
    zero = seeds("arena", *[0.0] * 8)
    for count in range(1, 5):
        high = seeds("arena", *(sign * (25.0 + 0.1 * seed) for seed in range(count)))
        [one] = assess({POINTABILITY.name: {"full": high, "no_pointability": zero}}, [POINTABILITY_CLAIM])
        assert one.verdict == f"{count} of 5 seeds"
        other = {seed + 5: value for seed, value in high.items()}
        [beyond] = assess({POINTABILITY.name: {"full": high | other, "no_pointability": zero}}, [POINTABILITY_CLAIM])
        assert beyond == one
    whole = seeds("arena", *(sign * (25.0 + 0.1 * seed) for seed in range(5)))
    [one] = assess({POINTABILITY.name: {"full": whole, "no_pointability": zero}}, [POINTABILITY_CLAIM])
    assert one.verdict == {1: "yes", -1: "no"}[sign]


def test_equal_differences_are_no_test():
    values = {POINTABILITY.name: {"full": seeds("arena", *[5.0] * 5), "no_pointability": seeds("arena", *[1.0] * 5)}}
    [one] = assess(values, [POINTABILITY_CLAIM])
    assert (one.p, one.adjusted, one.verdict) == (None, None, "no spread")


def test_one_weak_rival_decides():
    values = {arm: seeds("lowest", 70.0, 71.0, 72.0, 70.5) for arm in RIVALS.arms}
    values["full"] = seeds("lowest", 80.0, 82.0, 81.0, 80.5)
    four = planned(4, RIVALS_CLAIM)
    assert assess({RIVALS.name: values}, four)[0].verdict == "yes"
    values["lexical"] = seeds("lowest", 79.0, 83.0, 80.0, 81.0)
    [one] = assess({RIVALS.name: values}, four)
    assert one.p == pytest.approx(scipy.stats.ttest_1samp([1.0, -1.0, 1.0, -0.5], 0).pvalue)
    assert one.verdict == "not told apart"
    del values["lexical"][3]
    assert assess({RIVALS.name: values}, four)[0].verdict == "3 of 4 seeds"


def test_the_level_of_the_claims_holds_where_nothing_differs():
    """Of 400 draws without any effect, Holm's rule says yes or no to some claim in about a twentieth."""
    generator = np.random.default_rng(3)
    claims = [Claim(str(k), "", (Part(POINTABILITY, f"m{k}", ("no_pointability",)),)) for k in range(4)]
    wrong = 0
    for _ in range(400):
        draws = generator.normal(size=(2, 5, 4))
        values = {
            arm: {seed: {f"m{k}": draws[row, seed, k] for k in range(4)} for seed in range(5)}
            for row, arm in enumerate(("full", "no_pointability"))
        }
        wrong += any(one.verdict in ("yes", "no") for one in assess({POINTABILITY.name: values}, claims))
    assert 5 <= wrong <= 35  # 20 expected, with a standard deviation of 4.4


def test_seeds_are_planned_from_the_spread_of_the_pilot():
    values = {
        POINTABILITY.name: {
            "full": {seed: {"arena": value} for seed, value in zip((100, 101, 102), (3.0, 5.0, 1.0), strict=True)},
            "no_pointability": {seed: {"arena": 0.0} for seed in (100, 101, 102)},
        }
    }
    [one] = planned_seeds(values)
    assert (one["sd"], one["n"], one["part"]) == (2.0, 3, POINTABILITY_CLAIM.parts[0])
    assert one["seeds"] == [6, 9]  # at 0.05 and at 0.0125
    assert power(one["detectable"], 2.0, 5) == pytest.approx(0.8, abs=1e-4)
