"""What the groups of a configuration are made of: the types of fields with their ranges, and the base of groups."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, Field, model_validator

from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import resolved

# Upper bounds that only say what cannot be meant: counters stay within int32, and one axis within any memory.
STEPS, IMAGES, SIZE, WIDE = 100_000_000, 10_000_000, 65_536, 16_777_216


def _path(text: str) -> str:
    try:
        resolved(text, "")
    except UserError as error:
        raise ValueError(str(error).strip()) from error
    return text


def _count_or_auto(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value <= SIZE):
        raise ValueError(f"must be auto, or an integer in [1, {SIZE}], got {shown(value)}")
    return value


T = TypeVar("T")
Resumable = Annotated[T, "resumable"]
"""May change when a run is resumed: it changes neither what is learnt nor how it is evaluated."""
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Path = Annotated[Text, AfterValidator(_path), "path"]
Dtype = Literal["float32", "bfloat16"]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Steps = Annotated[int, Field(ge=0, le=STEPS)]
SomeSteps = Annotated[int, Field(ge=1, le=STEPS)]
Size = Annotated[int, Field(ge=1, le=SIZE)]
Wide = Annotated[int, Field(ge=1, le=WIDE)]
WideOrNone = Annotated[int, Field(ge=0, le=WIDE)]
Few = Annotated[int, Field(ge=1, le=1024)]
FewOrNone = Annotated[int, Field(ge=0, le=1024)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Images = Annotated[int, Field(ge=1, le=IMAGES)]
Devices = Annotated[int, Field(ge=-1, le=SIZE)]
# Not a union: the place that pydantic then gives for an error is no field's name.
CountOrAuto = Annotated[Any, AfterValidator(_count_or_auto), "auto"]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=1e6)]
Seconds = Annotated[float, Field(ge=0.1, le=86_400)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Scale = Annotated[float, Field(ge=1e-3, le=1000)]
PromptSize = Annotated[int, Field(ge=8, le=SIZE)]


class Group(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Fields. Strict: no value changes its meaning (no 1.5 -> 1, no "1" -> 1, no True -> 1)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (name of a field, what is wrong with it) for demands of fields on each other; the first counts."""
        yield from ()

    @model_validator(mode="after")
    def check(self) -> Self:
        for name, problem in self.problems():
            raise ValueError(f"config field {name!r} {problem}")
        return self
