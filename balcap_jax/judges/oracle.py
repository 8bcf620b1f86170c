"""The exact judge of the scenes world: checks each claim of a caption against the scene graph, marks language by rule.

It knows nothing of the habits and faults that captions are given; recall and language are judged from text alone.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.cli.errors import UserError
from balcap_jax.data.scenes.answering import answer_from
from balcap_jax.data.scenes.language import NUMBERS, Claim, Subject
from balcap_jax.data.scenes.reading import Parsed, covers, parse
from balcap_jax.data.scenes.rubrics import STATES, unit_of
from balcap_jax.data.scenes.world import Scene, SceneObject
from balcap_jax.judges import schema
from balcap_jax.judges.draws import uniform
from balcap_jax.judges.schema import (
    ChoiceVerdict,
    Failure,
    Judge,
    LinguisticVerdict,
    PrecisionVerdict,
    PreferenceVerdict,
    RecallVerdict,
    RubricVerdict,
)

CRITERIA = ("clarity", "fluency", "coherency")
TIE = 0.05  # captions whose worth differs by no more than this are equal
_HIGHEST_MARK = 5
# What one slip of language costs each mark, in sentences: a caption whose every sentence holds a slip of weight 1 gets
# the mark 1. One slip is never free, and the costs add up slowly enough that fixing each one shows.
SLIPS: dict[str, tuple[float, float, float]] = {
    "fragment": (0, 1, 0),
    "broken": (0, 1, 0),
    "run-on": (0, 1, 0),
    "missing stop": (0, 1, 0),
    "lower-case start": (0, 0.5, 0),
    "article": (0, 0.5, 0),
    "choppy": (0, 0.5, 0),
    "stray mark": (0, 0.5, 0),
    "unparsable": (1, 1, 1),
    "repeated sentence": (1.75, 0, 1),
    "repeated claim": (0.5, 0, 0),
    "contradiction": (1, 0, 0),
    "vague object": (1, 0, 0),
    "unplaced object": (0.5, 0, 0),
    "extra relation": (0.5, 0, 0),
    "remark in between": (0.5, 0, 1),
    "remark at the end": (0.5, 0, 0.5),
    "order jump": (0, 0, 1),
    "no opening": (0, 0, 1),
    "late opening": (0, 0, 1),
    "no background": (0, 0, 0.5),
    "misplaced background": (0, 0, 1),
}


class OracleJudge(Judge):
    """The judge of scenes.

    `failure_rate` in [0, 1] makes that share of calls fail. A hash of `seed` and the question chooses them, so that the
    same question fails in every run: a stand-in for a judge that is unreachable or answers nonsense.
    """

    is_exact = True

    def __init__(self, failure_rate: float = 0.0, seed: int = 0):
        if not 0.0 <= failure_rate <= 1.0:
            raise ValueError(f"failure_rate must be within [0, 1], got {failure_rate}")
        self.failure_rate, self.seed = failure_rate, seed

    def precision(self, questions: Sequence[schema.PrecisionQuestion]) -> list[PrecisionVerdict | Failure]:
        """Needs `metadata["scene"]`: a Scene, or its JSON text. Raises UserError where it is missing or unreadable."""
        verdicts: list[PrecisionVerdict | Failure] = []
        for question in questions:
            scene = scene_of(question.metadata)
            failure = self._failure("precision", question.caption, str(scene.seed))
            verdicts.append(failure or judge_precision(question.caption, scene, pointability=question.pointability))
        return verdicts

    def recall(self, questions: Sequence[schema.RecallQuestion]) -> list[RecallVerdict | Failure]:
        return [self._failure("recall", q.caption, *q.units) or judge_recall(q.caption, q.units) for q in questions]

    def linguistic(self, questions: Sequence[schema.LinguisticQuestion]) -> list[LinguisticVerdict | Failure]:
        return [self._failure("linguistic", q.caption) or judge_linguistic(q.caption) for q in questions]

    def choice(self, questions: Sequence[schema.ChoiceQuestion]) -> list[ChoiceVerdict | Failure]:
        """Needs the scenes' own `query`. Answers only what the caption states; else with the last option.

        Raises UserError for a question that is not about a scene.
        """
        return [self._failure("choice", q.caption, q.question, str(q.draw)) or judge_choice(q) for q in questions]

    def preference(self, questions: Sequence[schema.PreferenceQuestion]) -> list[PreferenceVerdict | Failure]:
        """Needs `metadata["scene"]`, as precision does; see `judge_preference`."""
        verdicts: list[PreferenceVerdict | Failure] = []
        for question in questions:
            seed = str(scene_of(question.metadata).seed)
            failure = self._failure("preference", question.first, question.second, seed)
            verdicts.append(failure or judge_preference(question))
        return verdicts

    def rubric(self, questions: Sequence[schema.RubricQuestion]) -> list[RubricVerdict | Failure]:
        """Needs the scenes' own criteria, each about one unit. Raises UserError for any other."""
        return [
            self._failure("rubric", q.caption, *q.criteria) or judge_rubric(q.caption, q.criteria) for q in questions
        ]

    def _failure(self, *content: str) -> Failure | None:
        if not self.failure_rate:
            return None
        if uniform(str(self.seed), *content) < self.failure_rate:
            return Failure(f"simulated failure of the {content[0]} judge (failure_rate {self.failure_rate:g})")
        return None


def judge_precision(caption: str, scene: Scene, *, pointability: bool = True) -> PrecisionVerdict:
    """One assertion per unique claim of the caption. Without `pointability` remarks hold: nothing refutes them."""
    assertions = []
    for claim in parse(caption).claims:
        why = _refutation(claim, scene) if pointability or claim.kind != "remark" else ""
        pointable = claim.kind not in ("remark", "unparsable")
        assertions.append(schema.Assertion(text=claim.text, why=why, verified=not why, pointable=pointable))
    return PrecisionVerdict(assertions=assertions)


def judge_recall(caption: str, units: Sequence[str]) -> RecallVerdict:
    parsed = parse(caption)
    return RecallVerdict(covered=[covers(parsed, unit) for unit in units])


def judge_rubric(caption: str, criteria: Sequence[str]) -> RubricVerdict:
    """A criterion is met where the caption covers its unit."""
    units = [unit_of(criterion) for criterion in criteria]
    if None in units:
        raise UserError(
            f"the oracle judge answers the criteria of scenes only, which begin with {STATES.strip()!r}, not "
            f"{criteria[units.index(None)]!r}; use it with that data set, or choose another judge (judge.name)"
        )
    return RubricVerdict(passed=judge_recall(caption, units).covered)


def judge_linguistic(caption: str) -> LinguisticVerdict:
    return LinguisticVerdict(**dict(zip(CRITERIA, _marks(parse(caption)), strict=True)))


def judge_choice(question: schema.ChoiceQuestion) -> ChoiceVerdict:
    """The letter of the option that the caption states; the last letter, of "cannot answer", where it states none."""
    if not isinstance(question.query, Mapping):
        raise UserError(
            "the oracle judge answers the questions of scenes only: use it with that data set, or choose another judge "
            "(judge.name)"
        )
    stated = answer_from(parse(question.caption), question.query, [text for _, text in question.options])
    letters = [letter for letter, text in question.options if text == stated]
    return ChoiceVerdict(answer=letters[0] if letters else question.options[-1][0])


def judge_preference(question: schema.PreferenceQuestion) -> PreferenceVerdict:
    """The caption of more worth; a tie where they differ by no more than TIE."""
    scene = scene_of(question.metadata)
    margin = worth(question.first, scene, question.units) - worth(question.second, scene, question.units)
    return PreferenceVerdict(winner=1 if margin > TIE else 2 if margin < -TIE else 0)


def worth(caption: str, scene: Scene, units: Sequence[str]) -> float:
    """The worth of a caption to a reader: (covered units - assertions that don't hold) / units + linguistic score.

    A false statement costs as much as a true one gives. This is an average, unlike b-CapScore: one part can stand in
    for another. Without units, assertions that hold count in their place, over all objects of the scene.
    """
    return _worth(caption, scene, tuple(units))


@functools.lru_cache(maxsize=8192)
def _worth(caption: str, scene: Scene, units: tuple[str, ...]) -> float:
    assertions = judge_precision(caption, scene).assertions
    wrong = sum(not assertion.verified for assertion in assertions)
    covered = sum(judge_recall(caption, units).covered) if units else len(assertions) - wrong
    return (covered - wrong) / len(units or scene.objects) + sum(_marks(parse(caption))) / (_HIGHEST_MARK * 3)


def _marks(parsed: Parsed) -> list[int]:
    """Clarity, fluency, coherency: 5 less four times the share of sentences lost to slips, rounded against the text."""
    if not parsed.sentences:
        return [1, 1, 1]
    lost = [0.0, 0.0, 0.0]
    for finding in parsed.findings:
        for i, cost in enumerate(SLIPS[finding.name]):
            lost[i] += cost
    return [5 - min(4, math.ceil(4 * share / len(parsed.sentences))) for share in lost]


# ---- claims against the graph ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _objects(scene: Scene) -> dict[Subject, list[SceneObject]]:
    """The objects of a scene by (colour, shape), and by shape alone under colour ""."""
    objects: dict[Subject, list[SceneObject]] = {}
    for item in scene.objects:
        objects.setdefault((item.colour, item.shape), []).append(item)
        objects.setdefault(("", item.shape), []).append(item)
    return objects


_read_scene = functools.lru_cache(maxsize=4096)(Scene.from_json)


def scene_of(metadata: Mapping[str, Any]) -> Scene:
    """The scene of an example, from `metadata["scene"]`: a Scene, or its JSON text. Raises UserError without one."""
    scene = metadata.get("scene")
    if isinstance(scene, Scene):
        return scene
    if isinstance(scene, bytes):
        scene = scene.decode()
    if not isinstance(scene, str):
        raise UserError(
            'the oracle judge needs the scene graph in metadata["scene"], which this data set does not store: '
            "use it with the scenes data set, or choose another judge (judge.name)"
        )
    try:
        return _read_scene(scene)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f'the scene graph in metadata["scene"] cannot be read ({error}): rebuild the data set'
        ) from error


def _refutation(claim: Claim, scene: Scene) -> str:
    """Why the claim does not hold; empty when it does."""
    objects = _objects(scene)
    match claim.kind:
        case "remark":
            return "points at nothing that can be seen"
        case "unparsable":
            return "says nothing that can be understood"
        case "count":
            return "" if claim.value == NUMBERS[len(scene.objects)] else f"there are {NUMBERS[len(scene.objects)]}"
        case "ground":
            return "" if claim.value == scene.ground else f"it is {scene.ground}"
        case "pattern":
            return "" if claim.value == scene.pattern else f"it is {scene.pattern}"
        case "relation":
            first, second = (objects.get(subject, ()) for subject in claim.subject)
            if not first or not second:
                return "no such object"
            holds = any(_related(a, claim.value, b) for a in first for b in second)
            return "" if holds else "they are placed otherwise"
    candidates = objects.get(claim.subject, ())
    if not candidates:
        return "no such object"
    if claim.kind == "object":
        return ""
    actual = [getattr(item, claim.kind) for item in candidates]  # size, texture or place
    return "" if claim.value in actual else f"it is {' or '.join(actual)}"


def _related(first: SceneObject, relation: str, second: SceneObject) -> bool:
    return first.row < second.row if relation == "above" else first.column < second.column
