"""What language models are asked to write offline: references of pictures, and the criteria of RubiCap."""

from typing import Annotated, Literal

import numpy as np
import pydantic

from balcap_jax.judges import prompts
from balcap_jax.judges.client import Ask
from balcap_jax.judges.schema import PLAIN

DESCRIBE = "describe.v1"
RUBRIC_WRITER = "rubric_writer.v1"


class Description(pydantic.BaseModel):
    """What `describe_ask` is answered with."""

    caption: str


class Criterion(pydantic.BaseModel):
    criterion: str
    weight: Annotated[Literal[1, 2, 3], PLAIN]


class Rubrics(pydantic.BaseModel):
    """What `rubrics_ask` is answered with; its dump is the field "rubrics" of a data set."""

    rubrics: list[Criterion]


def describe_ask(image: np.ndarray, request: str, max_tokens: int = 2048) -> Ask:
    """Asks for a description of a picture, uint8 [height, width, 3]; the answer's value is a `Description`.

    `request` is the sample's own prompt.
    """

    def check(answer: Description) -> str:
        return "" if answer.caption.strip() else "empty description"

    messages = prompts.render(DESCRIBE, request=request)
    return Ask(DESCRIBE, messages, Description, max_tokens, image, check)


def rubrics_ask(caption: str, reference: str, max_tokens: int = 2048) -> Ask:
    """Asks what a student's first caption lacks beside the reference; the answer's value is a `Rubrics`.

    Weights are 3 (critical), 2 (important) and 1 (minor).
    """
    messages = prompts.render(RUBRIC_WRITER, caption=caption, reference=reference)
    return Ask(RUBRIC_WRITER, messages, Rubrics, max_tokens)
