"""The data of a chat client: its settings, questions with pictures, and answers."""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pydantic
from PIL import Image


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """Where and how to ask. `endpoints` are (base URL up to and with /v1, weight); limits are those of each endpoint.

    rpm, tpm: requests and tokens a minute, 0 = no limit.
    deadline: seconds of one question from its first request to its answer, all retries included.
    attempt_timeout: seconds of one request.
    retries: requests after the first; answers of 429 ("too many requests") do not count, only the deadline ends those.
    api_key_env: name of the environment variable that holds the key, "" = no key.
    temperature, seed: of the model's sampling; the seed is sent where the temperature is above 0.
    max_tokens: longest answer to the question at the start, which finds out what an endpoint takes.
    """

    endpoints: tuple[tuple[str, float], ...]
    model: str
    api_key_env: str = ""
    concurrency: int = 32
    rpm: int = 0
    tpm: int = 0
    deadline: float = 120.0
    attempt_timeout: float = 60.0
    retries: int = 4
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 2048


@dataclasses.dataclass(frozen=True)
class Ask:
    """One question.

    prompt: name and version of the prompt text, such as "precision.v1"; for caches and records.
    messages: ({"role": "system" | "user", "content": text}, ...), rendered.
    schema: pydantic model of the answer, a JSON object; its fields are asked for in their order.
    max_tokens: longest answer.
    image: uint8 [height, width, 3], sent with the last message; None = text only.
    check: says what is wrong with a well-formed answer ("" = nothing); such an answer is asked for again.
    draw: the number of a repetition of the same question, which is sampled anew.
    prefix: a name of how its messages and picture begin, for questions that begin alike; they are sent to one endpoint,
      which keeps what it computed of the beginning. "" = like no other.
    """

    prompt: str
    messages: tuple[Mapping[str, str], ...]
    schema: type[pydantic.BaseModel]
    max_tokens: int = 1024
    image: np.ndarray | None = None
    check: Callable[[Any], str] | None = None
    draw: int = 0
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """`value` is an instance of the question's schema; tokens are those of the request that gave it, 0 if cached."""

    value: Any
    tokens_in: int = 0
    tokens_out: int = 0
    cached: bool = False


_LARGEST_PNG = 256  # pixels of the longer side: above, a photograph as PNG is several times its JPEG
_QUALITY = 92


def data_url(image: np.ndarray) -> str:
    """uint8 [height, width, 3] as a data URL; the same array gives the same text."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    form, settings = ("PNG", {}) if max(image.shape[:2]) <= _LARGEST_PNG else ("JPEG", {"quality": _QUALITY})
    file = io.BytesIO()
    picture.save(file, format=form, **settings)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_tokens(image: np.ndarray | None) -> int:
    """About what models count for a picture: one token per 28 x 28 pixels, and some for its frame."""
    if image is None:
        return 0
    height, width = image.shape[:2]
    return -(-height // 28) * -(-width // 28) + 8
