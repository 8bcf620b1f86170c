"""The rewards' judge by language models: questions become prompts, answers become verdicts.

Each request holds one caption, so that whatever a caption does to its judge, it does to its own score alone.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.config.schema import parse_endpoints
from balcap_jax.data.images import picture_hash
from balcap_jax.judges import prompts, schema
from balcap_jax.judges.chat.cache import AnswerFile
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat.forms import of_length
from balcap_jax.judges.chat.types import Ask, ChatSettings
from balcap_jax.judges.schema import PLAIN, Failure, Judge, Mark, Usage


# Answers as models give them: a reason before each flag, so that the flag follows from it. Each has its `verdict`.
class _CheckedAssertion(pydantic.BaseModel):
    text: str
    why: str
    verified: bool
    pointable: bool


class _Precision(pydantic.BaseModel):
    assertions: list[_CheckedAssertion]

    def verdict(self) -> schema.PrecisionVerdict:
        """Each assertion once: saying it again must not count again."""
        unique: dict[str, _CheckedAssertion] = {}
        for assertion in self.assertions:
            unique.setdefault(" ".join(assertion.text.casefold().split()).rstrip(".!"), assertion)
        return schema.PrecisionVerdict(assertions=[schema.Assertion(**each.model_dump()) for each in unique.values()])


class _Unit(pydantic.BaseModel):
    unit: Annotated[int, PLAIN]
    why: str
    covered: bool


class _Recall(pydantic.BaseModel):
    units: list[_Unit]

    def verdict(self) -> schema.RecallVerdict:
        return schema.RecallVerdict(covered=[each.covered for each in sorted(self.units, key=lambda each: each.unit)])


class _Linguistic(pydantic.BaseModel):
    why: str
    clarity: Mark
    fluency: Mark
    coherency: Mark

    def verdict(self) -> schema.LinguisticVerdict:
        return schema.LinguisticVerdict(clarity=self.clarity, fluency=self.fluency, coherency=self.coherency)


class _Choice(pydantic.BaseModel):
    answer: str

    def verdict(self) -> schema.ChoiceVerdict:
        return schema.ChoiceVerdict(answer=self.answer)


class _Criterion(pydantic.BaseModel):
    criterion: Annotated[int, PLAIN]
    why: str
    passed: bool


class _Rubric(pydantic.BaseModel):
    criteria: list[_Criterion]

    def verdict(self) -> schema.RubricVerdict:
        in_order = sorted(self.criteria, key=lambda each: each.criterion)
        return schema.RubricVerdict(passed=[each.passed for each in in_order])


class _Preference(pydantic.BaseModel):
    why: str
    winner: Literal["caption 1", "caption 2", "tie"]

    def verdict(self) -> schema.PreferenceVerdict:
        return schema.PreferenceVerdict(winner=("tie", "caption 1", "caption 2").index(self.winner))


_METHODS = ("precision", "recall", "linguistic", "choice", "rubric", "preference")


class RemoteJudge(Judge):
    """A judge by prompts. `client` is a ChatClient, or answers as one does, as `mesh_judge.PolicyClient`."""

    def __init__(self, client: ChatClient, max_tokens: int = 2048):
        self.client, self.max_tokens = client, max_tokens

    @property
    def about(self) -> Mapping[str, str]:
        """The model, and name and version of each prompt."""
        return {"model": self.client.model} | {name: prompts.name_of(name) for name in _METHODS}

    def mixed(self, questions: Sequence[Any]) -> list[Any]:
        """One verdict or Failure for each of questions of any kinds, which are all under way at once.

        No request is made about an empty caption: models make something up. An answer of a choice without a letter is
        an answer, and a wrong one. Raises UserError for a question about a picture without one.
        """
        known = [_without_asking(question) for question in questions]
        pictures: dict[Any, str] = {}
        asked = [question for question, verdict in zip(questions, known, strict=True) if verdict is None]
        answers = iter(self.client.ask([self._render(question, pictures) for question in asked]))
        verdicts = []
        for verdict in known:
            if verdict is None:
                answer = next(answers)
                verdict = answer if isinstance(answer, Failure) else answer.value.verdict()
            verdicts.append(verdict)
        return verdicts

    precision = recall = linguistic = choice = rubric = preference = mixed

    def usage(self) -> Usage:
        return self.client.usage()

    def close(self) -> None:
        self.client.close()

    def _render(self, question: Any, pictures: dict[Any, str]) -> Ask:
        """The question as it is sent; `pictures` keeps the hash of each picture."""
        match question:
            case schema.PrecisionQuestion():
                return self._of_picture(question, _Precision, {"caption": question.caption}, pictures)
            case schema.PreferenceQuestion():
                texts = {"first": question.first, "second": question.second}
                return self._of_picture(question, _Preference, texts, pictures)
            case schema.RecallQuestion():
                units = list(question.units)
                check = numbered(range(1, len(units) + 1), "units", lambda answer: [each.unit for each in answer.units])
                texts = {"units": units, "caption": question.caption}
                return self._ask(question, of_length(_Recall, len(units)), texts, units, check=check)
            case schema.LinguisticQuestion():
                return self._ask(question, _Linguistic, {"caption": question.caption})
            case schema.ChoiceQuestion():
                options = [list(option) for option in question.options]
                answer = _choice_schema(tuple(letter for letter, _ in options))
                texts = {"caption": question.caption, "question": question.question, "options": options}
                return self._ask(question, answer, texts, question.caption, draw=question.draw)
            case schema.RubricQuestion():
                criteria = list(question.criteria)
                check = numbered(
                    range(1, len(criteria) + 1), "criteria", lambda answer: [each.criterion for each in answer.criteria]
                )
                texts = {"criteria": criteria, "caption": question.caption}
                return self._ask(question, of_length(_Rubric, len(criteria)), texts, criteria, check=check)
            case _:
                raise TypeError(f"no question that a judge knows: {type(question).__name__}")

    def _of_picture(
        self, question: Any, answer: type[pydantic.BaseModel], texts: Mapping[str, Any], pictures: dict[Any, str]
    ) -> Ask:
        image = question.image
        buffer = image.ctypes.data, image.shape, image.strides
        if buffer not in pictures:  # Hashing a photograph takes milliseconds.
            pictures[buffer] = picture_hash(image)
        return self._ask(question, answer, texts, pictures[buffer], image=image)

    def _ask(
        self, about: Any, answer: type[pydantic.BaseModel], texts: Mapping[str, Any], begins: Any = None, **rest
    ) -> Ask:
        """`texts` are the variables of the prompt; `begins` is what it shows first, where others begin so too."""
        name = prompts.name_of(about.method)
        digest = hashlib.sha256(repr((name, begins)).encode(errors="replace")).hexdigest()
        prefix = "" if begins is None else f"{name}/{digest[:24]}"
        return Ask(name, prompts.render(about.method, **texts), answer, self.max_tokens, prefix=prefix, **rest)


def _without_asking(question: Any) -> Any:
    """The verdict where an empty caption, or two equal ones, decide it; else None.

    Raises UserError for a question about a picture without one.
    """
    if isinstance(question, schema.PrecisionQuestion | schema.PreferenceQuestion) and question.image is None:
        raise UserError(f"the judge of {question.method} looks at pictures, which this data set does not have")
    match question:
        case schema.PreferenceQuestion():
            return schema.preferred_unseen(question)
        case _ if question.caption.strip():
            return None
        case schema.PrecisionQuestion():
            return schema.PrecisionVerdict(assertions=[])
        case schema.RecallQuestion():
            return schema.RecallVerdict(covered=[False] * len(question.units))
        case schema.LinguisticQuestion():
            return schema.LinguisticVerdict(clarity=1, fluency=1, coherency=1)
        case schema.ChoiceQuestion():
            return schema.ChoiceVerdict(answer="")
        case schema.RubricQuestion():
            return schema.RubricVerdict(passed=[False] * len(question.criteria))


@functools.cache
def _choice_schema(letters: tuple[str, ...]) -> type[pydantic.BaseModel]:
    """A server that keeps to schemas can answer with one of the letters only; another server may send any text."""
    answer = Annotated[str, pydantic.Field(json_schema_extra={"enum": list(letters)})]
    return pydantic.create_model("_Choice", __base__=_Choice, answer=(answer, ...))


def make_client(config: Mapping[str, Any], seed: int, processes: int = 1) -> ChatClient:
    """The client of the config group `judge`, not yet connected. Raises UserError without endpoints or a key.

    Each of `processes` that judge at once gets its share of the limits, at least one request at a time and a minute.
    """

    def share(limit: int) -> int:
        return max(limit // processes, 1) if limit else 0

    if not config["endpoints"].strip():
        raise UserError(
            "config field 'judge.endpoints' is empty: name the servers of the judge, such as http://judge:8000/v1 "
            "(launch/judge_server.sh starts one)"
        )
    settings = ChatSettings(
        endpoints=parse_endpoints(config["endpoints"]),
        attempt_timeout=config["timeout"],
        seed=seed,
        **{name: share(config[name]) for name in ("concurrency", "rpm", "tpm")},
        **{name: config[name] for name in ("model", "api_key_env", "deadline", "retries", "temperature", "max_tokens")},
    )
    cache = AnswerFile(config["cache_dir"], config["cache_gb"]) if config["cache_dir"] else None
    return ChatClient(settings, cache)


def numbered(expected: Sequence[int], what: str, numbers_of: Callable[[Any], list[int]]) -> Callable[[Any], str]:
    """A check that an answer is on each of the `expected` numbers of units or criteria (`what`) once."""

    def check(answer: Any) -> str:
        numbers = numbers_of(answer)
        if len(numbers) != len(expected):
            return f"answer on {'fewer' if len(numbers) < len(expected) else 'more'} {what} than were asked"
        return "" if sorted(numbers) == list(expected) else f"answer on other {what} than were asked"

    return check
