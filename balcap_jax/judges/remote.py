"""The judge of the rewards, asked of language models through a `Client`: questions to prompts, answers to verdicts.

One caption per request, so that whatever a caption does to its judge, it does to its own score alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import pydantic

from balcap_jax.errors import UserError
from balcap_jax.judges import prompts
from balcap_jax.judges.cache import AnswerFile
from balcap_jax.judges.client import Answer, Ask, ChatClient, ChatSettings
from balcap_jax.judges.schema import (
    Assertion,
    ChoiceQuestion,
    ChoiceVerdict,
    Failure,
    LinguisticQuestion,
    LinguisticVerdict,
    PrecisionQuestion,
    PrecisionVerdict,
    RecallQuestion,
    RecallVerdict,
    RubricQuestion,
    RubricVerdict,
    Usage,
)
from balcap_jax.judges.settings import parse_endpoints


# Answers as models give them: a reason before each flag, so that the flag follows from it.
class _CheckedAssertion(pydantic.BaseModel):
    text: str
    why: str
    verified: bool
    pointable: bool


class _Precision(pydantic.BaseModel):
    assertions: list[_CheckedAssertion]


class _Unit(pydantic.BaseModel):
    unit: int
    why: str
    covered: bool


class _Recall(pydantic.BaseModel):
    units: list[_Unit]


class _Linguistic(pydantic.BaseModel):
    why: str
    clarity: int = pydantic.Field(ge=1, le=5)
    fluency: int = pydantic.Field(ge=1, le=5)
    coherency: int = pydantic.Field(ge=1, le=5)


class _Criterion(pydantic.BaseModel):
    criterion: int
    why: str
    passed: bool


class _Rubric(pydantic.BaseModel):
    criteria: list[_Criterion]


class ReferenceUnits(pydantic.BaseModel):
    """What `units_ask` is answered with."""

    units: list[str]


class Client(Protocol):
    """Who answers: `client.ChatClient` behind endpoints, or `policy.PolicyClient` on the mesh."""

    model: str

    def ask(self, asks: Sequence[Ask]) -> list[Answer | Failure]: ...

    def usage(self) -> Usage: ...

    def close(self) -> None: ...


class RemoteJudge:
    """Implements `judges.schema.Judge`; `client` may be asked other questions too.

    `about` is what records say of it: the model, and name and version of each prompt.
    """

    def __init__(self, client: Client, max_tokens: int = 2048):
        self.client, self.max_tokens = client, max_tokens

    @property
    def about(self) -> Mapping[str, str]:
        names = ("precision", "recall", "linguistic", "choice", "rubric")
        return {"model": self.client.model} | {name: prompts.name_of(name) for name in names}

    def precision(self, questions: Sequence[PrecisionQuestion]) -> list[PrecisionVerdict | Failure]:
        """Raises UserError for a question without a picture."""
        if any(question.image is None for question in questions):
            raise UserError("the judge of precision looks at pictures, which this data set does not have")
        asks = [_said(question.caption, lambda q=question: self._precision_ask(q)) for question in questions]
        return self._verdicts(asks, _precision_verdict, PrecisionVerdict(assertions=[]))

    def recall(self, questions: Sequence[RecallQuestion]) -> list[RecallVerdict | Failure]:
        asks = [_said(question.caption, lambda q=question: self._recall_ask(q)) for question in questions]
        verdicts = self._verdicts(asks, _recall_verdict, None)
        return [
            RecallVerdict(covered=[False] * len(question.units)) if verdict is None else verdict
            for question, verdict in zip(questions, verdicts, strict=True)
        ]

    def linguistic(self, questions: Sequence[LinguisticQuestion]) -> list[LinguisticVerdict | Failure]:
        asks = [_said(question.caption, lambda q=question: self._linguistic_ask(q)) for question in questions]
        return self._verdicts(asks, _linguistic_verdict, LinguisticVerdict(clarity=1, fluency=1, coherency=1))

    def choice(self, questions: Sequence[ChoiceQuestion]) -> list[ChoiceVerdict | Failure]:
        """An answer without a letter is an answer, and a wrong one; the same question's draws are asked anew."""
        asks = [_said(question.caption, lambda q=question: self._choice_ask(q)) for question in questions]
        return self._verdicts(asks, lambda verdict: verdict, ChoiceVerdict(answer=""))

    def rubric(self, questions: Sequence[RubricQuestion]) -> list[RubricVerdict | Failure]:
        asks = [_said(question.caption, lambda q=question: self._rubric_ask(q)) for question in questions]
        verdicts = self._verdicts(asks, _rubric_verdict, None)
        return [
            RubricVerdict(passed=[False] * len(question.criteria)) if verdict is None else verdict
            for question, verdict in zip(questions, verdicts, strict=True)
        ]

    def usage(self) -> Usage:
        return self.client.usage()

    def close(self) -> None:
        self.client.close()

    def _verdicts(self, asks: Sequence[Ask | None], verdict: Callable[[Any], Any], of_nothing: Any) -> list:
        """One verdict or Failure per question; `of_nothing` where there is nothing to ask about."""
        answers = iter(self.client.ask([ask for ask in asks if ask is not None]))
        found: Iterable[Answer | Failure | None] = [None if ask is None else next(answers) for ask in asks]
        return [
            of_nothing if answer is None else answer if isinstance(answer, Failure) else verdict(answer.value)
            for answer in found
        ]

    def _precision_ask(self, question: PrecisionQuestion) -> Ask:
        messages = prompts.render("precision", caption=question.caption)
        return Ask(prompts.name_of("precision"), messages, _Precision, self.max_tokens, question.image)

    def _recall_ask(self, question: RecallQuestion) -> Ask:
        messages = prompts.render("recall", caption=question.caption, units=list(question.units))
        check = numbered(range(1, len(question.units) + 1), "units", lambda answer: [one.unit for one in answer.units])
        return Ask(prompts.name_of("recall"), messages, _Recall, self.max_tokens, check=check)

    def _linguistic_ask(self, question: LinguisticQuestion) -> Ask:
        messages = prompts.render("linguistic", caption=question.caption)
        return Ask(prompts.name_of("linguistic"), messages, _Linguistic, self.max_tokens)

    def _choice_ask(self, question: ChoiceQuestion) -> Ask:
        texts = {"caption": question.caption, "question": question.question}
        messages = prompts.render("choice", **texts, options=[list(option) for option in question.options])
        return Ask(prompts.name_of("choice"), messages, ChoiceVerdict, self.max_tokens, draw=question.draw)

    def _rubric_ask(self, question: RubricQuestion) -> Ask:
        criteria = list(question.criteria)
        messages = prompts.render("rubric", caption=question.caption, criteria=criteria)
        check = numbered(
            range(1, len(criteria) + 1), "criteria", lambda answer: [one.criterion for one in answer.criteria]
        )
        return Ask(prompts.name_of("rubric"), messages, _Rubric, self.max_tokens, check=check)


def make_client(config: Mapping[str, Any], seed: int, processes: int = 1) -> ChatClient:
    """The client of the config group `judge`, not yet connected. Raises UserError where the key is not set.

    Of `processes` that judge at once each gets its share of the limits, at least one request at a time and a minute.
    """

    def share(limit: int) -> int:
        return max(limit // processes, 1) if limit else 0

    settings = ChatSettings(
        endpoints=parse_endpoints(config["endpoints"]),
        model=config["model"],
        api_key_env=config["api_key_env"],
        concurrency=share(config["concurrency"]),
        rpm=share(config["rpm"]),
        tpm=share(config["tpm"]),
        deadline=config["deadline"],
        attempt_timeout=config["timeout"],
        retries=config["retries"],
        temperature=config["temperature"],
        seed=seed,
    )
    cache = AnswerFile(config["cache_dir"], config["cache_gb"]) if config["cache_dir"] else None
    return ChatClient(settings, cache)


def units_ask(reference: str, max_tokens: int = 2048) -> Ask:
    """Asks for the facts that a reference states; the answer's value is a `ReferenceUnits`."""
    return Ask(prompts.name_of("units"), prompts.render("units", reference=reference), ReferenceUnits, max_tokens)


def _said(caption: str, ask: Callable[[], Ask]) -> Ask | None:
    """No question about an empty caption: models make something up."""
    return ask() if caption.strip() else None


def numbered(wanted: Sequence[int], what: str, numbers_of: Callable[[Any], list[int]]) -> Callable[[Any], str]:
    """A check that an answer is on each of the `wanted` numbers of units or criteria (`what`) once."""

    def check(answer: Any) -> str:
        numbers = numbers_of(answer)
        if len(numbers) != len(wanted):
            return f"answer on {'fewer' if len(numbers) < len(wanted) else 'more'} {what} than were asked"
        return "" if sorted(numbers) == list(wanted) else f"answer on other {what} than were asked"

    return check


def _precision_verdict(answer: _Precision) -> PrecisionVerdict:
    """Each assertion once: saying it again must not count again."""
    once = {}
    for one in answer.assertions:
        once.setdefault(" ".join(one.text.casefold().split()).rstrip(".!"), one)
    return PrecisionVerdict(assertions=[Assertion(**one.model_dump()) for one in once.values()])


def _recall_verdict(answer: _Recall) -> RecallVerdict:
    return RecallVerdict(covered=[one.covered for one in sorted(answer.units, key=lambda one: one.unit)])


def _rubric_verdict(answer: _Rubric) -> RubricVerdict:
    return RubricVerdict(passed=[one.passed for one in sorted(answer.criteria, key=lambda one: one.criterion)])


def _linguistic_verdict(answer: _Linguistic) -> LinguisticVerdict:
    return LinguisticVerdict(clarity=answer.clarity, fluency=answer.fluency, coherency=answer.coherency)
