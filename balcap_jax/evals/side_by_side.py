"""Human side-by-side votes in the form of ImageInWords: win, tie and loss of one caption source against another.

A line holds one picture's votes, {"metrics/Hallucination": "IIW is marginally better", ...}, either itself (DCI_Test,
DOCCI_Test) or under the name of a comparison ("iiw-human-sxs-gpt4v" in IIW-400). Lines without votes are captions.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from balcap_jax.cli.errors import UserError

_QUESTION = "metrics/"
_VOTE = re.compile(r"(?P<source>.+) is (?P<how>substantially|marginally) better")
NEUTRAL = "Neutral"
LEVELS = ("substantially", "marginally")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """sources: the first, the other. votes[question][level] counts pictures; a level is (source, how) or NEUTRAL."""

    name: str
    sources: tuple[str, str]
    votes: Mapping[str, Mapping[Any, int]]

    def row(self, question: str) -> tuple[float, float, float, float, float]:
        """Percentages that add up to 100: the first source substantially and marginally better, neither, the other
        marginally and substantially better."""
        counts = self.votes[question]
        first, other = self.sources
        levels = [(first, how) for how in LEVELS] + [NEUTRAL] + [(other, how) for how in reversed(LEVELS)]
        total = sum(counts.values())
        return tuple(100.0 * counts.get(level, 0) / total for level in levels)  # type: ignore[return-value]

    def win_tie_loss(self, question: str) -> tuple[float, float, float]:
        """Percentages of pictures on which the first source was better, neither, or the other."""
        best, better, tie, worse, worst = self.row(question)
        return best + better, tie, worse + worst


def comparisons(lines: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Comparison]:
    """All comparisons of a file's (where, object) lines, as `cli.files.read_jsonl` gives them.

    Of two sources the first is the one whose name begins with IIW, or the one of the first vote.

    Raises:
      UserError: a vote of another form, more than two sources in one comparison, or no vote at all.
    """
    votes: dict[str, dict[str, collections.Counter]] = {}
    for where, entry in lines:
        groups = {name: value for name, value in entry.items() if isinstance(value, Mapping)}
        for name, group in ({"": entry} | groups).items():
            for question, text in group.items():
                if question.startswith(_QUESTION):
                    of_question = votes.setdefault(name, {})
                    counts = of_question.setdefault(question.removeprefix(_QUESTION), collections.Counter())
                    counts[_level(text, f"{where}, {question}")] += 1
    if not votes:
        raise UserError('no line has a vote: a vote is "metrics/QUESTION": "SOURCE is marginally better"')
    return [Comparison(name, _sources(name, of_question), of_question) for name, of_question in votes.items()]


def _level(text: Any, where: str) -> Any:
    if text == NEUTRAL:
        return NEUTRAL
    vote = _VOTE.fullmatch(text) if isinstance(text, str) else None
    if vote is None:
        raise UserError(
            f'{where}: {text!r} is no vote; votes are "Neutral" and "SOURCE is marginally|substantially better"'
        )
    return vote["source"], vote["how"]


def _sources(name: str, of_question: Mapping[str, collections.Counter]) -> tuple[str, str]:
    sources = list(dict.fromkeys(level[0] for counts in of_question.values() for level in counts if level != NEUTRAL))
    if len(sources) > 2:
        raise UserError(f"the comparison {name!r} has votes for {', '.join(sources)}: side by side are two")
    sources.sort(key=lambda source: (not source.startswith("IIW-Human"), not source.startswith("IIW")))
    return (*sources, *["the other"] * (2 - len(sources)))  # type: ignore[return-value]


def markdown(comparison: Comparison) -> str:
    """The table of one comparison, percentages rounded to whole numbers as they are published."""
    first, other = comparison.sources
    head = ("question", f"{first} ++", f"{first} +", "-", f"{other} +", f"{other} ++", "win / tie / loss")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for question in comparison.votes:
        cells = [f"{value:.0f}" for value in comparison.row(question)]
        cells.append(" / ".join(f"{value:.0f}" for value in comparison.win_tie_loss(question)))
        lines.append(f"| {question} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Win, tie and loss, and the five levels, of each question of a comparison, in percent."""
    questions = {
        question: {"win_tie_loss": comparison.win_tie_loss(question), "levels": comparison.row(question)}
        for question in comparison.votes
    }
    return {"name": comparison.name, "sources": comparison.sources, "questions": questions}
