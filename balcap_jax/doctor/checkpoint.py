"""Checks of the checkpoint that a run starts from: whole, of the recipe's family, with tokenizer and processor."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from balcap_jax import models
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.config.groups import Model
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, fault
from balcap_jax.models.formats import hf, language, loading, safetensors
from balcap_jax.models.policy import Params, Policy
from balcap_jax.models.prompting import PromptProcessor
from balcap_jax.training.programs import check_freezes, model_fields

CHECK = "checkpoint"
GB = 1e9
_NAMED = 8  # files that a finding names; it counts the others


class Built(NamedTuple):
    """A policy whose weights are not read: `params` are shapes. file_bytes: of the weights on disk, 0 = none."""

    family: str
    policy: Policy
    processor: PromptProcessor
    params: Params
    file_bytes: int = 0


def look(config: ConfigDict, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[Finding], Built | None]:
    """The findings, all faults or one, and the policy where there is one; headers alone are read.

    tokenizer: that of the data, for a model that starts from random numbers; None where there is none.
    """
    model = config.model
    try:
        if model.path:
            found, built = _published(config)
        elif model.decoder_path:
            found, built = _before_a_language_model(config)
        elif tokenizer is None:
            return [Finding(CHECK, UNCHECKED, "the tokenizer is made from the data, which come first")], None
        else:
            policy, processor = models.build(model.to_dict(), tokenizer)
            built = Built(model.family, policy, processor, _shapes(policy))
            count = _count(built.params)
            found = [Finding(CHECK, OK, f"none is read: {count:,} parameters start from random numbers")]
    except UserError as error:
        if model.path:
            return faults(CHECK, model.path, error), None
        return _faults(CHECK, error, _read_alone(model.decoder_path) if model.decoder_path else ()), None
    try:
        check_freezes(config, built.params)
    except UserError as error:
        found = [*(finding for finding in found if finding.verdict == FAULT), fault(CHECK, error)]
    return found, built


def faults(check: str, path: str, error: UserError) -> list[Finding]:
    """All that is wrong with the files of a model that `whole` has refused with `error`, a row for each remedy."""
    try:
        directory = loading.find(path).checkpoint
    except UserError:
        return [fault(check, error)]
    rows = _faults(check, error, _files_alone(directory, tuple(loading.CHECKPOINTS.values())))
    if not _has_processor(directory):
        rows.append(_without_processor(check, directory))
    return rows


def _read_alone(path: str) -> list[UserError]:
    """As `_files_alone`, of a language model."""
    try:
        directory = safetensors.fetch(resolved(path).absolute())
    except UserError as error:
        return [error]
    return _files_alone(directory, (language.LLAMA,)) if hf.is_checkpoint(directory) else []


def _files_alone(directory: Path, families: Sequence[ModuleType]) -> list[UserError]:
    """What is wrong with configuration, tokenizer and weights, each read without the others."""
    found = []
    readers = (
        lambda: hf.read_fields(directory, families),
        lambda: loading.read_own(directory),
        lambda: loading.read_tokenizer(directory),
    )
    for read in readers:
        try:
            read()
        except UserError as error:
            found.append(error)
    return found + safetensors.problems(directory, hf.is_constant)


def _faults(check: str, first: UserError, others: Sequence[UserError]) -> list[Finding]:
    """The errors as findings, `first` before the others: one that names all files of the same remedy."""
    texts: dict[str, list[str]] = {}
    for finding in (fault(check, error) for error in {str(error): error for error in (first, *others)}.values()):
        texts.setdefault(finding.remedy, []).append(finding.found)
    rows = []
    for remedy, found in texts.items():
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        rows.append(Finding(check, FAULT, ", ".join(found[:_NAMED]) + more, remedy))
    return rows


def whole(path: str, **overrides: Any) -> loading.Opened:
    """A directory whose shards are all there, of whole length, with the names and shapes that its config.json asks for.

    Raises:
      UserError: as `loading.load` does.
    """
    opened = loading.open_model(path, **overrides)
    hf.check(opened.checkpoint, loading.flat_shapes(opened.like), cast=True)
    return opened


def _published(config: ConfigDict) -> tuple[list[Finding], Built]:
    fields, overrides = model_fields(config)
    opened = whole(config.model.path, **overrides)
    directory, family = opened.place.checkpoint, fields["family"]
    built, rows = Built(family, opened.policy, opened.processor, opened.like, _bytes(opened.checkpoint)), []
    if config.model.family != family and _names_sizes(config):
        found = f"{directory} is of the family {family}, the recipe {config.name!r} is one of {config.model.family}"
        remedy = "give the checkpoint that the recipe is for in model.path, or take a recipe of that family"
        rows.append(Finding(CHECK, FAULT, found, remedy))
    if not _has_processor(directory):
        rows.append(_without_processor(CHECK, directory))
    return rows or [Finding(CHECK, OK, _described(opened.checkpoint, family, built, directory))], built


def _has_processor(directory: Path) -> bool:
    return any((directory / name).is_file() for name in hf.PROCESSORS)


def _without_processor(check: str, directory: Path) -> Finding:
    found = f"{directory} has no {' or '.join(hf.PROCESSORS)}: how pictures are prepared would be guessed"
    return Finding(check, FAULT, found, "download that file too")


def _before_a_language_model(config: ConfigDict) -> tuple[list[Finding], Built]:
    fields, _ = model_fields(config)
    policy, processor = models.build(fields, language.read_tokenizer(config.model.decoder_path))
    checkpoint, own = language.open_decoder(config.model.decoder_path, policy.decoder)
    hf.check(checkpoint, loading.flat_shapes(own), cast=True)
    built = Built(fields["family"], policy, processor, _shapes(policy), _bytes(checkpoint))
    return [Finding(CHECK, OK, _described(checkpoint, "a language model", built, checkpoint.directory))], built


def _described(checkpoint: hf.Checkpoint, what: str, built: Built, directory: Path) -> str:
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    count = sum(tensor.size // tensor.dtype.itemsize for tensor in checkpoint.tensors.values())
    return (
        f"{directory}: {what}, {count:,} numbers in {len(files)} file{'s' * (len(files) > 1)} of "
        f"{built.file_bytes / GB:.2f} GB, {len(built.processor.tokenizer):,} words"
    )


def _names_sizes(config: ConfigDict) -> bool:
    """Whether the recipe is for one model: one that leaves all sizes at their defaults takes any family."""
    return any(config.model[name] != Model.model_fields[name].default for name in ("family", "width", "layers"))


def _bytes(checkpoint: hf.Checkpoint) -> int:
    return sum(tensor.size for tensor in checkpoint.tensors.values())


def _shapes(policy: Policy) -> Params:
    return jax.eval_shape(policy.init, jax.random.key(0))


def _count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
