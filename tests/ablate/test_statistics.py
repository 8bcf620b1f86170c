"""Paired tests, their power and Holm's rule against SciPy, other formulas, hand-made numbers and simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from scipy.special import chdtri, ndtr

from balcap_jax.ablate.statistics import Paired, detectable, holm, paired, power, seeds_needed

DIFFERENCES = [1.0, 2.0, 3.5, 0.2, -0.4]


def test_paired_t_tests_are_those_of_scipy():
    found = paired(DIFFERENCES)
    for null in (0.0, 1.0, -2.0, 3.0):
        each = {
            side: scipy.stats.ttest_1samp(DIFFERENCES, null, alternative=side)
            for side in ("two-sided", "greater", "less")
        }
        assert found.p(null) == pytest.approx(each["two-sided"].pvalue, rel=1e-9)
        assert found.p_above(null) == pytest.approx(min(1, 2 * each["greater"].pvalue), rel=1e-9)
        assert found.p_below(null) == pytest.approx(min(1, 2 * each["less"].pvalue), rel=1e-9)
    low, high = scipy.stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.95)
    assert (found.mean - found.half(), found.mean + found.half()) == pytest.approx((low, high))
    low, high = scipy.stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.9875)
    assert 2 * found.half(0.0125) == pytest.approx(high - low)


def test_a_pair_and_equal_differences_have_their_limits():
    one = paired([2.5])
    assert (one.mean, one.sd, one.n) == (2.5, None, 1)
    assert [one.half(), one.p(), one.p_above(), one.p_below(), one.detectable()] == [None] * 5
    # Three equal differences, as two saturated metrics have, are no proof of a difference.
    same = Paired(1.0, 0.0, 3)
    assert [same.p(), same.p_above(), same.p_below(), same.p(1.0), same.detectable()] == [None] * 5
    assert same.half() == 0.0


def test_power_is_the_probability_to_reject():
    """Against the mean of normal probabilities over quantiles of the standard deviation's own distribution."""
    middles = (np.arange(20_000) + 0.5) / 20_000
    for n in (2, 3, 5, 12, 40):
        root = np.sqrt(chdtri(n - 1, middles) / (n - 1))
        for effect in (0.1, 0.5, 1.0, 2.5, 9.0):
            for alpha in (0.05, 0.0125):
                shift, bound = effect * math.sqrt(n) / 1.5, scipy.stats.t.isf(alpha / 2, n - 1)
                expected = np.mean(ndtr(shift - bound * root) + ndtr(-shift - bound * root))
                assert power(effect, 1.5, n, alpha) == pytest.approx(expected, abs=2e-5), (n, effect, alpha)
    assert power(0.0, 1.0, 5) == 0.05
    assert power(-2.0, 1.0, 5) == power(2.0, 1.0, 5)


def test_seeds_for_a_power_have_it_and_one_less_has_not():
    """A textbook's: 80% power at an effect of one sd takes 10 pairs, at half of one 34 (Cohen 1988, two-sided 0.05)."""
    assert (seeds_needed(1.0, 1.0), seeds_needed(1.0, 0.5)) == (10, 34)
    assert seeds_needed(2.0, 3.0) == 6
    assert seeds_needed(2.0, 3.0, alpha=0.0125) == 9
    assert seeds_needed(0.0, 3.0) == 2
    assert seeds_needed(1000.0, 0.1) is None
    generator = np.random.default_rng(0)
    for sd, n in ((2.0, 6), (4.0, seeds_needed(4.0, 3.0))):
        for count, enough in ((n, True), (n - 1, False)):
            draws = generator.normal(3.0, sd, (40_000, count))
            share = np.mean(scipy.stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
            assert share == pytest.approx(power(3.0, sd, count), abs=0.01)
            assert (share > 0.8) == enough


@pytest.mark.parametrize(("sd", "n"), [(1.0, 2), (1.7, 3), (2.0, 5), (0.01, 8), (30.0, 40)])
def test_the_detectable_effect_has_the_power_asked_for(sd, n):
    for alpha in (0.05, 0.0125):
        assert power(detectable(sd, n, 0.8, alpha), sd, n, alpha) == pytest.approx(0.8, abs=1e-4)
    assert Paired(0.0, sd, n).detectable() == pytest.approx(detectable(sd, n))


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.04]) == pytest.approx([1.0, 1.0, 0.12])
    assert holm([]) == []
