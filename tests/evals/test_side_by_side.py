"""ImageInWords: the tables of human votes, on a small file and on the published ones."""

import json
import os
from pathlib import Path

import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl
from balcap_jax.evals.side_by_side import comparisons, markdown

PUBLISHED = Path(os.environ.get("BALCAP_IIW", Path(__file__).parents[3] / "shared" / "data" / "iiw"))
# Per question, in percent: IIW substantially and marginally better, neutral, the other marginally and substantially.
DOCCI = {
    "Comprehensiveness": (19, 33, 38, 6, 4),
    "Specificity": (65, 22, 8, 2, 3),
    "Hallucination": (13, 34, 41, 12, 0),
    "First few line(s) as tldr": (54, 30, 11, 4, 1),
    "Human Like": (23, 46, 30, 0, 1),
}
GPT4V = {
    "Comprehensiveness": (19, 29, 39, 10, 3),
    "Specificity": (34, 35, 15, 10, 6),
    "Hallucination": (31, 34, 29, 6, 0),
    "First few line(s) as tldr": (34, 47, 8, 6, 5),
    "Human Like": (13, 27, 41, 13, 6),
}


def read(path):
    return read_jsonl(path, "give votes")


def test_a_small_file(tmp_path):
    path = tmp_path / "votes.jsonl"
    lines = [
        {"metrics/Q": "X is marginally better", "sxs": {"metrics/R": "Neutral"}},
        {"metrics/Q": "IIW is substantially better"},
        {"metrics/Q": "Neutral"},
        {"metrics/Q": "X is substantially better"},
        {"caption": "no vote"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = comparisons(read(path))
    assert first.sources == ("IIW", "X")
    assert first.row("Q") == (25, 0, 25, 25, 25)
    assert first.win_tie_loss("Q") == (25, 25, 50)
    assert (second.name, second.row("R")) == ("sxs", (0, 0, 100, 0, 0))
    assert "| Q | 25 | 0 | 25 | 25 | 25 | 25 / 25 / 50 |" in markdown(first)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"metrics/Q": "X is better"}, "is no vote"),
        ({"metrics/Q": 3}, "is no vote"),
        ({"caption": "x"}, "no line has a vote"),
        (
            {
                "metrics/P": "X is marginally better",
                "metrics/Q": "Y is marginally better",
                "metrics/R": "Z is marginally better",
            },
            "side by side are two",
        ),
    ],
)
def test_what_is_no_side_by_side_is_refused(tmp_path, line, message):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        comparisons(read(path))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no votes of ImageInWords in {PUBLISHED} (or $BALCAP_IIW)")
@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [("DOCCI_Test.jsonl", "", DOCCI), ("IIW-400.jsonl", "iiw-human-sxs-gpt4v", GPT4V)],
)
def test_published_tables(file, name, expected):
    (found,) = [one for one in comparisons(read(PUBLISHED / file)) if one.name == name]
    assert {question: found.row(question) for question in found.votes} == expected
