"""The judge of the rewards, asked of language models through a `Client`: questions to prompts, answers to verdicts.

One caption per request, so that whatever a caption does to its judge, it does to its own score alone.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.config.schema import parse_endpoints
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.cache import AnswerFile
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.forms import of_length
from balcap_jax.judges.chat.types import Answer, Ask, ChatSettings
from balcap_jax.judges.schema import (
    PLAIN,
    Assertion,
    ChoiceQuestion,
    ChoiceVerdict,
    Failure,
    LinguisticQuestion,
    LinguisticVerdict,
    Mark,
    PrecisionQuestion,
    PrecisionVerdict,
    RecallQuestion,
    RecallVerdict,
    RubricQuestion,
    RubricVerdict,
    Usage,
)


# Answers as models give them: a reason before each flag, so that the flag follows from it.
class _CheckedAssertion(pydantic.BaseModel):
    text: str
    why: str
    verified: bool
    pointable: bool


class _Precision(pydantic.BaseModel):
    assertions: list[_CheckedAssertion]


class _Unit(pydantic.BaseModel):
    unit: Annotated[int, PLAIN]
    why: str
    covered: bool


class _Recall(pydantic.BaseModel):
    units: list[_Unit]


class _Linguistic(pydantic.BaseModel):
    why: str
    clarity: Mark
    fluency: Mark
    coherency: Mark


class _Criterion(pydantic.BaseModel):
    criterion: Annotated[int, PLAIN]
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
        return self.mixed(questions)

    def recall(self, questions: Sequence[RecallQuestion]) -> list[RecallVerdict | Failure]:
        return self.mixed(questions)

    def linguistic(self, questions: Sequence[LinguisticQuestion]) -> list[LinguisticVerdict | Failure]:
        return self.mixed(questions)

    def choice(self, questions: Sequence[ChoiceQuestion]) -> list[ChoiceVerdict | Failure]:
        """An answer without a letter is an answer, and a wrong one; the same question's draws are asked anew."""
        return self.mixed(questions)

    def rubric(self, questions: Sequence[RubricQuestion]) -> list[RubricVerdict | Failure]:
        return self.mixed(questions)

    def mixed(self, questions: Sequence[Any]) -> list[Any]:
        """One verdict or Failure for each of questions of any kinds, which are all under way at once.

        No request is made about an empty caption: models make something up. Raises as the methods of the kinds do.
        """
        posed = [self._pose(question) for question in questions]
        said = [bool(question.caption.strip()) for question in questions]
        answers = iter(self.client.ask([ask for (ask, *_), asked in zip(posed, said, strict=True) if asked]))
        found = []
        for (_, verdict, of_nothing), asked in zip(posed, said, strict=True):
            answer = next(answers) if asked else None
            failed = isinstance(answer, Failure)
            found.append(of_nothing if answer is None else answer if failed else verdict(answer.value))
        return found

    def usage(self) -> Usage:
        return self.client.usage()

    def close(self) -> None:
        self.client.close()

    def _pose(self, question: Any) -> tuple[Ask, Callable[[Any], Any], Any]:
        """What is asked, what an answer means, and the verdict on an empty caption."""
        match question:
            case PrecisionQuestion():
                if question.image is None:
                    raise UserError("the judge of precision looks at pictures, which this data set does not have")
                ask = self._ask("precision", _Precision, image=question.image, caption=question.caption)
                return ask, _precision_verdict, PrecisionVerdict(assertions=[])
            case RecallQuestion():
                units = list(question.units)
                check = numbered(range(1, len(units) + 1), "units", lambda answer: [one.unit for one in answer.units])
                schema = of_length(_Recall, len(units))
                ask = self._ask("recall", schema, check=check, caption=question.caption, units=units)
                return ask, _recall_verdict, RecallVerdict(covered=[False] * len(units))
            case LinguisticQuestion():
                ask = self._ask("linguistic", _Linguistic, caption=question.caption)
                return ask, _linguistic_verdict, LinguisticVerdict(clarity=1, fluency=1, coherency=1)
            case ChoiceQuestion():
                schema = _choice_schema(tuple(letter for letter, _ in question.options))
                texts = {"question": question.question, "options": [list(option) for option in question.options]}
                ask = self._ask("choice", schema, draw=question.draw, caption=question.caption, **texts)
                return ask, lambda answer: ChoiceVerdict(answer=answer.answer), ChoiceVerdict(answer="")
            case RubricQuestion():
                criteria = list(question.criteria)
                check = numbered(
                    range(1, len(criteria) + 1), "criteria", lambda answer: [one.criterion for one in answer.criteria]
                )
                schema = of_length(_Rubric, len(criteria))
                ask = self._ask("rubric", schema, check=check, caption=question.caption, criteria=criteria)
                return ask, _rubric_verdict, RubricVerdict(passed=[False] * len(criteria))
            case _:
                raise TypeError(f"no question that a judge knows: {type(question).__name__}")

    def _ask(
        self,
        prompt: str,
        schema: type[pydantic.BaseModel],
        *,
        image: np.ndarray | None = None,
        check: Callable[[Any], str] | None = None,
        draw: int = 0,
        **texts: Any,
    ) -> Ask:
        messages = prompts.render(prompt, **texts)
        return Ask(prompts.name_of(prompt), messages, schema, self.max_tokens, image, check, draw)


@functools.cache
def _choice_schema(letters: tuple[str, ...]) -> type[pydantic.BaseModel]:
    """A server that keeps to schemas can answer with one of the letters only; of others any text is taken."""
    answer = Annotated[str, pydantic.Field(json_schema_extra={"enum": list(letters)})]
    return pydantic.create_model("_Choice", answer=(answer, ...))


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
        max_tokens=config["max_tokens"],
    )
    cache = AnswerFile(config["cache_dir"], config["cache_gb"]) if config["cache_dir"] else None
    return ChatClient(settings, cache)


def units_ask(reference: str, max_tokens: int = 2048) -> Ask:
    """Asks for the facts that a reference states; the answer's value is a `ReferenceUnits`."""
    return Ask(prompts.name_of("units"), prompts.render("units", reference=reference), ReferenceUnits, max_tokens)


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
