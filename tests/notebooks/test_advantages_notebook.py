"""advantages, executed: its numbers are those that are stored, and those of independent arithmetic."""

import itertools
import math
from fractions import Fraction

import nbformat
import pytest
from notebooks.kernels import NOTEBOOKS, executed, printed

PROBE = """{
    "counts": counts,
    "shares": {name: [found[0], found[-1]] for name, found in shares.items()},
    "spreads": [0.02, 1.0],
    "alone": alone.tolist(),
    "combined": computed[0].tolist(),
    "naive": float(np.abs(naive).max()),
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return executed("advantages", tmp_path_factory.mktemp("advantages"), PROBE, optimised=False)


def test_what_it_prints_is_what_is_stored(run):
    stored = nbformat.read(NOTEBOOKS / "advantages.ipynb", as_version=4)
    assert printed(run[0]) == printed(stored)
    assert any("grpo tells 7 groups apart, c_gdpo 14" in text for text in printed(stored))


def test_the_groups_that_estimators_tell_apart_are_those_of_exact_arithmetic(run):
    def signs_and_squares(column):
        """Z-scores up to a common factor, exactly: the sign and the square of each."""
        mean = Fraction(sum(column), len(column))
        square = sum((value - mean) ** 2 for value in column)
        return [(value > mean) - (value < mean) and (value - mean) / abs(value - mean) * (value - mean) ** 2 / square
                for value in column]  # fmt: skip

    rows = list(itertools.product((0, 1), repeat=2))
    grpo, gdpo = set(), set()
    for group in itertools.combinations_with_replacement(rows, 4):
        grpo.add(tuple(sorted(signs_and_squares([sum(row) for row in group]))))
        columns = [signs_and_squares(column) for column in zip(*group, strict=True)]
        scores = [
            sum(math.copysign(math.sqrt(abs(value)), value) for value in member)
            for member in zip(*columns, strict=True)
        ]
        gdpo.add(tuple(round(score, 4) + 0.0 for score in sorted(scores)))
    assert run[1]["counts"] == {"grpo": len(grpo), "c_gdpo": len(gdpo)}


def test_an_objective_of_little_spread_keeps_its_share_in_c_gdpo_alone(run):
    shares = run[1]["shares"]
    assert shares["grpo"][0] == pytest.approx(0.02 / 1.02, abs=0.003)
    assert shares["c_gdpo"][0] > 0.47
    assert shares["grpo"][1] == pytest.approx(shares["c_gdpo"][1], abs=0.01)


def test_the_one_caption_inside_the_band_gets_what_the_text_says(run):
    for size, advantage in zip(range(2, 33), run[1]["alone"], strict=True):
        assert advantage == pytest.approx((size - 1) / math.sqrt(size), rel=2e-3)


def test_the_naive_z_score_of_a_constant_is_not_zero(run):
    assert run[1]["naive"] > 0.1
