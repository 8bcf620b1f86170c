"""What language models are asked to write offline: the criteria of RubiCap."""

from typing import Literal

import pydantic

from balcap_jax.judges import prompts
from balcap_jax.judges.client import Ask

RUBRIC_WRITER = "rubric_writer.v1"


class Criterion(pydantic.BaseModel):
    criterion: str
    weight: Literal[1, 2, 3]


class Rubrics(pydantic.BaseModel):
    """What `rubrics_ask` is answered with; its dump is the field "rubrics" of a data set."""

    rubrics: list[Criterion]


def rubrics_ask(caption: str, reference: str, max_tokens: int = 2048) -> Ask:
    """Asks what a student's first caption lacks beside the reference; the answer's value is a `Rubrics`.

    Weights are 3 (critical), 2 (important) and 1 (minor).
    """
    messages = prompts.render(RUBRIC_WRITER, caption=caption, reference=reference)
    return Ask(RUBRIC_WRITER, messages, Rubrics, max_tokens)
