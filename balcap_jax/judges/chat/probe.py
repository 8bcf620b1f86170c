"""Finds out at the start what an endpoint takes, by a small question of the form that all later ones have.

The question has a system message and a schema with all that questions' schemas have. It allows the longest answer, and
has a picture where pictures are asked about. What is refused (HTTP 400, 422) is left out from then on.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.judges.chat.endpoint import Endpoint, time_limit
from balcap_jax.judges.chat.forms import FORMS, SCHEMA, SYSTEM, Form
from balcap_jax.judges.chat.keys import cleaned, without_key
from balcap_jax.judges.chat.parsing import UnusableAnswer, parse_answer
from balcap_jax.judges.chat.replies import CallError, Reply, error_of, is_success
from balcap_jax.judges.chat.types import Ask, data_url

TRIES = 3  # requests per form that may fail by chance (a busy server, a cut connection)
WAIT = 0.5  # seconds before such a request is sent again
_REFUSED = (400, 422)  # HTTP statuses of a question that holds what the server does not take
_FEW_TOKENS = 256  # of an answer, where the server has no room for more
_NAMES = 8  # models that an error lists


class _Probe(pydantic.BaseModel):
    """Servers that keep to no schema answer what the words ask for, and that is `ok` alone."""

    # Two entries, though the words ask for one: some servers take a length of one, and no other.
    ok: Annotated[list[bool], pydantic.Field(json_schema_extra={"minItems": 2, "maxItems": 2})]
    mark: Annotated[int, pydantic.Field(json_schema_extra={"minimum": 1, "maximum": 5})] = 3
    letter: Annotated[str, pydantic.Field(json_schema_extra={"enum": ["A", "B"]})] = "A"


_MESSAGES = (
    {"role": "system", "content": "You answer with one JSON object."},
    {"role": "user", "content": 'Answer with this JSON object and nothing else: {"ok": [true]}'},
)
_PICTURE = np.full((56, 56, 3), 128, np.uint8)  # Some models take none with a side below 28 pixels.


async def listed_models(endpoint: Endpoint) -> list[str] | UserError:
    """The names of the models that the server lists, or why it names none."""
    where = f"judge endpoint {endpoint.url}"
    try:
        async with _time_limit(endpoint):
            status, headers, body = await endpoint.request("GET", "/models")
        tree = json.loads(body) if is_success(status) else {}
        if not is_success(status) or (isinstance(tree, dict) and tree.get("error")):
            raise error_of(endpoint.url, status, headers, body)
        if isinstance(tree, dict):
            tree = tree.get("data") or tree.get("models")
        names = [entry if isinstance(entry, str) else entry.get("id") or entry["name"] for entry in tree]
        names = list(dict.fromkeys(names))
        if not names or not all(isinstance(name, str) and name.isprintable() and name.strip() for name in names):
            raise ValueError("no names")
        if any(without_key(name, endpoint.key) != name for name in names):
            raise ValueError("a key")
    except CallError as error:
        return refusal(endpoint, error)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return UserError(f"{where} lists no models; name one in judge.model")
    return names


async def listed_model(endpoint: Endpoint) -> str | UserError:
    """The name of the one model that the server lists, or why it names none. Raises UserError for several."""
    names = await listed_models(endpoint)
    if isinstance(names, UserError):
        return names
    if len(names) > 1:
        where = f"judge endpoint {endpoint.url}"
        raise UserError(f"judge.model is empty, and {where} lists several models ({named(names)}); name one")
    return names[0]


def named(models: Sequence[str]) -> str:
    """The first few of the models."""
    return ", ".join(models[:_NAMES]) + (f" and {len(models) - _NAMES} more" if len(models) > _NAMES else "")


async def ready(endpoint: Endpoint, model: str, sees: bool, *, patient: bool = False) -> None:
    """Finds out how an endpoint takes questions, with a picture if it `sees`; does nothing the second time.

    patient: waits where it asks to wait.

    Raises:
      CallError: it takes no questions. One with a remedy stays: it is raised again without a request.
    """
    if sees in endpoint.forms:
        return
    async with endpoint.probing:
        try:
            if sees in endpoint.unfit:
                raise endpoint.unfit[sees]
            if sees not in endpoint.forms:
                endpoint.forms[sees] = await _detect(endpoint, model, sees, patient)
        except CallError as error:
            endpoint.note(error)
            if error.remedy:
                endpoint.unfit[sees] = error
            raise


async def _detect(endpoint: Endpoint, model: str, sees: bool, patient: bool) -> Form:
    """The first of FORMS that the server takes and keeps to, with nothing left out of it that it takes.

    Raises:
      CallError: it is down, refuses the key, does not know the model, takes no picture, or gives empty answers.
    """
    picture = data_url(_PICTURE) if sees else ""

    async def refused(form: Form) -> CallError | None:
        """The error of a question in this form, None = it has an answer. Raises CallError where no form would help."""
        try:
            await _ask(endpoint, model, picture, patient, form)
        except CallError as error:
            if error.kind == "endpoint" or error.asks_to_wait:
                raise
            return error
        return None

    # With a picture most servers take the same.
    if False in endpoint.forms and await refused(endpoint.forms[False]) is None:
        return endpoint.forms[False]
    error = CallError(endpoint.url, "no answer")
    # In the end the system role is left out whatever the error: some servers answer 500 to what they do not take.
    for base in (frozenset(), SYSTEM):
        for name in FORMS:
            schema = frozenset() if name == "plain" else SCHEMA
            for left_out in dict.fromkeys((base, base | schema, base | SYSTEM, SYSTEM | schema)):
                form = Form(name, left_out)
                if last := await refused(form):
                    error = last
                    if error.status not in _REFUSED:
                        break  # It takes the form and does not keep to it, or does not say what it refuses.
                    continue
                # All schema keywords were left out at once: those go back that the server takes.
                for part in sorted(SCHEMA & left_out):
                    fuller = Form(name, form.left_out - {part})
                    if await refused(fuller) is None:
                        form = fuller
                return form
        if error.kind != "server":
            break
    if sees and False in endpoint.forms and error.kind != "server":
        remedy = "name a model that sees pictures in judge.model, or ask nothing about pictures (rewards.name=text)"
        detail = f"{error.reason} {error.detail}"
        raise CallError(endpoint.url, "takes no pictures", "endpoint", detail=detail, remedy=remedy) from error
    raise error


async def _ask(endpoint: Endpoint, model: str, picture: str, patient: bool, form: Form) -> None:
    """Asks once, and again where that failed by chance. Raises CallError where no question can be asked so."""
    settings, tries, max_tokens = endpoint.settings, 0, endpoint.settings.max_tokens
    while True:
        known = len(endpoint.unknown), endpoint.tokens_field
        question = Ask("probe", _MESSAGES, _Probe, max_tokens, _PICTURE if picture else None)
        try:
            async with _time_limit(endpoint):
                reply = await endpoint.post(model, question, picture, form)
            return _check(endpoint.url, form, reply)
        except CallError as error:
            if error.status in _REFUSED:
                _learn(endpoint, error.detail)
                if (len(endpoint.unknown), endpoint.tokens_field) != known:
                    continue  # Its error named a setting that it does not take.
                if max_tokens > _FEW_TOKENS and re.search(r"context|too (large|long|many)|exceed", error.detail):
                    max_tokens = _FEW_TOKENS
                    continue
            tries += 1
            asked_to_wait = error.asks_to_wait and not (patient and error.retry_after <= settings.deadline)
            if error.kind in ("endpoint", "question", "answer") or tries == TRIES or asked_to_wait:
                raise
            await asyncio.sleep(max(WAIT, error.retry_after))


def _time_limit(endpoint: Endpoint):
    return time_limit(endpoint.url, endpoint.settings.attempt_timeout, "endpoint")


def _check(url: str, form: Form, reply: Reply) -> None:
    """Raises CallError for an answer that shows that no answer will be of use, or none of this form."""
    if reply.cut:  # It shows nothing about the form.
        return
    if reply.remedy:
        raise CallError(url, reply.problem, "answer", remedy=reply.remedy)
    if form.name == "plain":  # Any text will do: letters are answers too, and small models err.
        return
    try:
        parse_answer(reply.text, _Probe)
    except UnusableAnswer as error:
        raise CallError(url, reply.problem or str(error), "answer") from error


def _learn(endpoint: Endpoint, message: str) -> None:
    """Newer hosted models refuse settings by name: the old field for the longest answer, a temperature, a seed.

    `message` is an error about a probe alone: an error about a question may quote the question.
    """
    if "max_completion_tokens" in message and endpoint.tokens_field == "max_tokens":
        endpoint.tokens_field = "max_completion_tokens"
        return
    for name in ("temperature", "seed"):
        if re.search(rf"\b{name}\b", message):
            endpoint.unknown.add(name)


def refusal(endpoint: Endpoint, error: CallError) -> UserError:
    """What is wrong with an endpoint, in one line."""
    reason, detail = cleaned(error.reason, endpoint.key), cleaned(error.detail, endpoint.key)
    detail = f": {detail}" if detail else ""
    where, name = f"judge endpoint {endpoint.url}", endpoint.settings.api_key_env
    if error.remedy:
        return UserError(f"{where} is of no use ({reason}{detail}); {error.remedy}")
    if error.status in (401, 403):
        if name:
            return UserError(f"{where} refuses the key in {name} ({reason}{detail}); put a valid one there")
        return UserError(
            f"{where} asks for a key ({reason}{detail}); put it into an environment variable and name that "
            "in judge.api_key_env"
        )
    if error.asks_to_wait:
        return UserError(f"{where} asks to wait ({reason}{detail}); start again later, or name others too")
    if error.status:
        return UserError(f"{where} does not answer ({reason}{detail}); mend judge.endpoints or judge.model")
    if error.kind == "answer":
        return UserError(
            f"{where} does not answer as a chat endpoint does ({reason}); judge.endpoints holds base URLs, "
            "up to and with /v1"
        )
    return UserError(
        f"{where} is down ({reason}); start it (launch/judge_server.sh starts one) or mend judge.endpoints"
    )
