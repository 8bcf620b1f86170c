"""The field's metrics on the miniature world, where every judgement is exact: DCScore, CaptionQA and an arena.

They score a caption's statements about its scene, apart from the rewards that a run was trained with:

dcscore     F1 of assertions against reference units, mean of one over all assertions and one over the pointable ones
captionqa   questions about the scene, answered from the caption alone
arena       won less lost comparisons with fixed captions of the scene, by a rule that weighs what a reader learns

Protocols of the originals: DeCapBench (arXiv 2503.07906), CaptionQA (2511.21025), CapArena (2503.12329).
"""

import functools
from collections.abc import Collection, Sequence

import numpy as np

from balcap_jax.data.choices import lettered
from balcap_jax.data.scenes import faults, language
from balcap_jax.data.scenes.habits import habits_of
from balcap_jax.data.scenes.questions import questions
from balcap_jax.data.scenes.reading import claim_from_unit, covers, parse
from balcap_jax.data.scenes.world import Scene
from balcap_jax.judges.oracle import TIE, judge_choice, judge_precision, scene_of, worth
from balcap_jax.judges.schema import ChoiceQuestion, Judge
from balcap_jax.rewards.base import Joined, RewardFn, Samples, Scores, collect

QUESTIONS = 12  # per scene: every scene has as many
UNKNOWN_CREDIT = 0.05  # CaptionQA gives "cannot answer" this beyond a guess among the choices
# Fault rates of the arena's two hacked opponents: all that is there and much that is not, at length; a bare list.
LONG = {"invented object": 0.4, "remark": 0.4, "remark tail": 0.3, "closing remark": 1.0, "too long": 1.0}
TERSE = dict.fromkeys(
    ("list", "omitted opening", "omitted size", "omitted texture", "omitted relation", "omitted background"), 1.0
)
_QUESTIONS, _OPPONENTS = 11, 12  # streams of random numbers of one scene


def dcscore(caption: str, scene: Scene, units: Sequence[str]) -> float:
    """Miniature DCScore in [0, 1]: mean F1 over all assertions, and over those that point at something.

    precision = true assertions / assertions; recall = (covered units + x) / (units + x), where x true assertions state
    no unit: they extend the reference, as DeCapBench has it. A caption that asserts nothing gets 0.
    """
    parsed, known = parse(caption), {claim_from_unit(unit) for unit in units}
    verdicts = judge_precision(caption, scene).assertions
    true = [claim for claim, verdict in zip(parsed.claims, verdicts, strict=True) if verdict.verified]
    extra = sum(claim not in known for claim in true)
    covered = sum(covers(parsed, unit) for unit in units)
    recall = (covered + extra) / (len(units) + extra)
    pointable = sum(verdict.pointable for verdict in verdicts)
    return sum(_f1(len(true) / max(count, 1), recall) for count in (len(verdicts), pointable)) / 2


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def captionqa(caption: str, scene: Scene) -> float:
    """Miniature CaptionQA: mean credit of QUESTIONS questions; 1 right, 0 wrong, 1 / choices + 0.05 "cannot answer"."""
    return float(np.mean([_credit(caption, question) for question in _questions_of(scene)]))


def _credit(caption: str, question: dict) -> float:
    options, gold = lettered(question)
    answer = judge_choice(ChoiceQuestion(caption, question["question"], options, query=question["query"])).answer
    if answer == options[-1][0]:
        return 1 / (len(options) - 1) + UNKNOWN_CREDIT
    return float(answer == gold)


def arena(caption: str, scene: Scene, units: Sequence[str]) -> float:
    """Miniature CapArena: (comparisons won - lost) / comparisons with `opponents`, in [-1, 1]."""
    own = worth(caption, scene, units)
    margins = [own - worth(other, scene, units) for other in opponents(scene).values()]
    return sum((margin > TIE) - (margin < -TIE) for margin in margins) / len(margins)


@functools.lru_cache(maxsize=4096)
def opponents(scene: Scene) -> dict[str, str]:
    """The captions with which each caption of the scene is compared; they depend on the scene's seed alone."""
    rng = np.random.default_rng([0xA4E7A, _OPPONENTS, scene.seed])
    return {
        "reference": language.reference_caption(scene, rng),
        "base": faults.faulty_caption(scene, rng)[0],  # noise without habits
        "long": faults.write_caption(scene, LONG, rng)[0],
        "terse": faults.write_caption(scene, TERSE, rng)[0],
    }


@functools.lru_cache(maxsize=4096)
def _questions_of(scene: Scene) -> list[dict]:
    return questions(scene, np.random.default_rng([0xA4E7A, _QUESTIONS, scene.seed]), QUESTIONS)


class Miniature(RewardFn):
    """The three metrics in the form of a reward with K = 3, so that evaluations score them beside the objectives.

    A detail holds under "habits" which habits of the base captioner the caption has, of those that its scene allows.
    """

    names: tuple[str, ...] = ("dcscore", "captionqa", "arena")
    gated: tuple[bool, ...] = (False, False, False)
    needs: tuple[str, ...] = ("scene", "reference_units")

    def __call__(self, samples: Samples) -> Scores:
        scored = []
        for b, g in samples.where:
            scene, units = scene_of(samples.metadata[b]), samples.reference_units[b]
            caption = samples.captions[b][g]
            values = dcscore(caption, scene, units), captionqa(caption, scene), arena(caption, scene, units)
            scored.append([(value, {"habits": habits_of(caption, scene)}) for value in values])
        return collect(self, samples, scored, None)


def is_exact(judge: Judge, fields: Collection[str]) -> bool:
    """Whether the judge is exact about examples with these `fields`, so that evaluating them costs no call."""
    return judge.is_exact and set(Miniature.needs) <= set(fields)


def with_miniature(measure: RewardFn, judge: Judge, fields: Collection[str]) -> RewardFn:
    """The reward that evaluations score: `measure`, and the metrics beside it where a judge of scenes is exact.

    `fields` are those that examples have.
    """
    return Joined(measure, Miniature()) if is_exact(judge, fields) else measure
