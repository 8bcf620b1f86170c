"""How captions are made: the options of a command, what a model or other captions fill in, and what is recorded."""

import argparse
import dataclasses
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balcap_jax.captioning import provenance
from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import place
from balcap_jax.cli.errors import UserError
from balcap_jax.config.schema import FIELDS

DEFAULT_PROMPT = "Describe this image in detail."  # of models that name none
DEFAULT_TOKENS = 256  # longest caption of models that name none
DEFAULT_DTYPE = "bfloat16"  # of models that were not trained here
AXES = ("replica", "data", "fsdp", "tensor")
# Families whose pictures keep their own sizes, up to a cap. Others have one size, which is part of the architecture.
_CAPPED = ("qwen2_5_vl", "qwen3_vl")
_RANGES = {
    "temperature": FIELDS["rollout.eval_temperature"],
    "top_p": FIELDS["rollout.top_p"],
    "top_k": FIELDS["rollout.top_k"],
    "max_tokens": FIELDS["rollout.max_tokens"],
    "samples": FIELDS["rollout.group_size"],
    "prompt_tokens": FIELDS["model.prompt_tokens"],
    "max_image_tokens": FIELDS["model.max_image_tokens"],
    "batch_size": dataclasses.replace(FIELDS["rollout.group_size"], low=1, high=4096),
    "threads": dataclasses.replace(FIELDS["rollout.group_size"], low=1, high=1024),
    "seed": dataclasses.replace(FIELDS["seed"], low=0, high=2**32 - 1),
}
_SAMPLED = ("top_p", "top_k", "samples", "keep", "seed")  # settings that greedy captions do not depend on


@dataclasses.dataclass(frozen=True)
class Options:
    """How captions are made; None is what the model says (`of_model`).

    `temperature` 0 is greedy. Of `samples` captions `keep` "best" writes the one with the highest mean log-probability;
    "all" writes all of them beside it. `batch_size` counts pictures on each data-parallel device.
    """

    prompt: str | None = None
    batch_size: int = 8
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    samples: int = 1
    keep: str = "best"
    seed: int = 0
    dtype: str | None = None
    prompt_tokens: int | None = None
    max_image_tokens: int | None = None
    threads: int = 4

    def check(self) -> None:
        """Raises UserError for a value out of its range, and for several samples of a greedy caption."""
        for name, field in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not field.holds(value):
                raise UserError(f"--{name}={value} is out of range: it must be in {field.range_text}")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"--samples={self.samples} needs --temperature above 0: greedy captions are all the same")

    def of_model(self, fields: Mapping[str, Any]) -> "Options":
        """With what the `fields` of a model say wherever these options say nothing.

        A model that was trained here says what it was trained with. Others are computed in bfloat16. A larger image cap
        makes as much more room in the prompt, unless that is given too.

        Raises:
          UserError: an image cap for a family whose pictures have one size.
        """
        capped = fields["family"] in _CAPPED
        if self.max_image_tokens and not capped:
            raise UserError(
                f"--max_image_tokens={self.max_image_tokens}: pictures of a {fields['family']} model have one size; "
                "leave it out"
            )
        room, cap = self.prompt_tokens, self.max_image_tokens
        if capped and cap and not room:
            room = fields["prompt_tokens"] + max(0, cap - fields["max_image_tokens"])
        return dataclasses.replace(
            self,
            prompt=fields.get("prompt") or DEFAULT_PROMPT if self.prompt is None else self.prompt,
            max_tokens=self.max_tokens or fields.get("max_tokens") or DEFAULT_TOKENS,
            dtype=self.dtype or (fields["dtype"] if "prompt" in fields else DEFAULT_DTYPE),
            prompt_tokens=room,
            max_image_tokens=(cap or fields["max_image_tokens"]) if capped else None,
        )

    def settings(self) -> dict[str, Any]:
        """What captions depend on; all captions of one file share it."""
        names = ["prompt", "temperature", "max_tokens", "dtype"]
        names += ["max_image_tokens"] if self.max_image_tokens else []
        names += _SAMPLED if self.temperature else []
        return {name: getattr(self, name) for name in names}


def of_command(arguments: argparse.Namespace, fields: Mapping[str, Any]) -> Options:
    """The options of a command line with `add_arguments`, for a model of these `fields`.

    What `--like` names fills in what the command line leaves out, but for an image cap that the model cannot have.

    Raises:
      UserError: a value out of its range, or captions without settings behind `--like`.
    """
    names = [field.name for field in dataclasses.fields(Options)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if arguments.like:
        like = {name: value for name, value in provenance.read(Path(arguments.like)).items() if name in names}
        if fields["family"] not in _CAPPED:
            like.pop("max_image_tokens", None)
        odd = [name for name, value in like.items() if not _is_setting(name, value)]
        if odd:
            settings = provenance.beside(Path(arguments.like), ".settings.json")
            raise UserError(
                f"{settings}: {odd[0]} is {reprlib.repr(like[odd[0]])}, which no caption is made with; name captions "
                "that `caption` wrote"
            )
        given = like | given
    options = Options(**given)
    options.check()
    return options.of_model(fields)


def _is_setting(name: str, value: Any) -> bool:
    """Whether a file of settings may hold this value of an option."""
    if name in _RANGES:
        has_type = json_text.is_number(value) if name in ("temperature", "top_p") else type(value) is int
        return has_type and _RANGES[name].holds(value)
    allowed = {"dtype": ("float32", "bfloat16"), "keep": ("best", "all")}
    return isinstance(value, str) and (name not in allowed or value in allowed[name])


def mesh_sizes(text: str) -> dict[str, int]:
    """Sizes of the mesh by axis for text such as "fsdp:4" or "data:2,tensor:4".

    An axis that is not named is 1; `data` takes the devices that the others leave, where none is -1.

    Raises:
      UserError: an unknown axis, or a size that is none.
    """
    sizes = dict.fromkeys(AXES, 1)
    named = [part.strip().partition(":") for part in text.split(",") if part.strip()]
    axes = [axis for axis, *_ in named]
    for axis, _, size in named:
        if axis not in AXES or not re.fullmatch(r"-1|[1-9][0-9]{0,5}", size) or axes.count(axis) > 1:
            raise UserError(
                f"--mesh={text}: {axis}:{size} is no axis and size; give some of {', '.join(AXES)}, such as "
                "fsdp:4,tensor:2, where -1 takes all devices that are left"
            )
        sizes[axis] = int(size)
    if "data" not in axes and -1 not in sizes.values():
        sizes["data"] = -1
    return sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options as arguments, each absent from the result where it is not given; and --mesh and --like."""
    defaults, unset = Options(), argparse.SUPPRESS
    group = parser.add_argument_group("captions", "how a model writes them")
    add = group.add_argument
    prompt = f"for pictures without their own (default: the model's, or {DEFAULT_PROMPT!r})"
    add("--prompt", default=unset, help=prompt)
    add("--max_tokens", type=int, default=unset, help=f"longest caption (default: the model's, or {DEFAULT_TOKENS})")
    add("--temperature", type=float, default=unset, help=f"0 = greedy (default: {defaults.temperature})")
    add("--top_p", type=float, default=unset, help=f"nucleus, in (0, 1] (default: {defaults.top_p})")
    add("--top_k", type=int, default=unset, help=f"likeliest tokens only; 0 = all (default: {defaults.top_k})")
    add("--samples", type=int, metavar="N", default=unset, help="captions drawn per picture (default: 1)")
    keep = 'of N samples: the one of the highest mean log-prob, or beside it all, as "samples" (default: best)'
    add("--keep", choices=("best", "all"), default=unset, help=keep)
    add("--seed", type=int, default=unset, help=f"of sampling (default: {defaults.seed})")
    dtype = f"compute type (default: the model's where it was trained here, else {DEFAULT_DTYPE})"
    add("--dtype", choices=("float32", "bfloat16"), default=unset, help=dtype)
    add(
        "--max_image_tokens", type=int, metavar="I", default=unset, help="larger pictures shrink (default: the model's)"
    )
    add(
        "--prompt_tokens", type=int, metavar="P", default=unset, help="room for prompt and image (default: the model's)"
    )
    like = "captions whose prompt, temperature, token limit, image cap and compute type are taken"
    add("--like", metavar="F.jsonl", type=place, help=like)
    size = f"pictures at a time on each data-parallel device (default: {defaults.batch_size})"
    add("--batch_size", type=int, default=unset, help=size)
    mesh = "how devices are used, as fsdp:4,tensor:2 (default: all of them for pictures of their own)"
    add("--mesh", default="", help=mesh)
    add("--threads", type=int, default=unset, help=f"that read pictures (default: {defaults.threads})")
