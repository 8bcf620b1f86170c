"""Checks of the data: found and held out, prompts that fit, and what the reward reads beside a picture."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from balcap_jax import data, rewards
from balcap_jax.cli import json_text, storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl, resolved
from balcap_jax.config.groups import DATA_DIR
from balcap_jax.config.recipes import stage_order
from balcap_jax.data.input import NO_CAPTION, NO_PICTURE, Data, LeftOut, examples
from balcap_jax.data.listing import lines_of
from balcap_jax.data.records import MEND_LINE, UNITS, read_record
from balcap_jax.data.words import count_words
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, fault
from balcap_jax.doctor.places import existing, try_objects
from balcap_jax.models.prompting import PromptProcessor, PromptTooLong
from balcap_jax.training import judge_trial
from balcap_jax.training.evaluation import check_best_metric, measured_names
from balcap_jax.training.workdir import readable

DATA, PROMPTS, REFERENCES = "data", "prompts", "references"
_SHOWN = 3  # held-out pictures that are opened at least
_SPREAD, _LONGEST = 32, 16  # samples that are opened: evenly spaced, and those with the longest prompts
_MOST_LEFT_OUT = 0.1  # share of the pictures that may be left out, or lack what the reward needs
_SIZES = ("train_size", "validation_size", "test_size")
_FEW_SCENES = 16  # of a split that are made to look at
_NAMED = 2  # pictures that a finding names
_NO_LINE = "no line in "  # how `records.join` begins the reason of a picture without a line


class Seen(NamedTuple):
    """The data, the samples of them that were opened, and held-out ones; bytes that making the data set will take."""

    splits: Data
    looked_at: list[dict[str, Any]]
    shown: list[dict[str, Any]]
    to_make: tuple[Path, int] | None = None


def look(config: ConfigDict, image_size: int, tokenizer: bool) -> tuple[list[Finding], Seen | None]:
    """The findings on the data and on what the reward needs of them, and what was seen where there is something.

    tokenizer: whether that of a model from scratch is wanted. What the data set prints while it is read is dropped.
    """
    needs = rewards.resolve(config.rewards.name).needs
    if config.data.name in ("photos", "parquet") and config.data.data_dir == DATA_DIR:
        missing = "the settings come first: they say where the pictures are (data.data_dir)"
        return [Finding(DATA, UNCHECKED, missing), lines_alone(config, missing)], None
    try:
        with _quiet(), _opened(config, image_size, tokenizer, needs) as (splits, to_make):
            seen, damaged = _seen(config, splits, to_make)
            return [*_found(config, seen, damaged), *_beside(config, seen)], seen
    except UserError as error:
        return _without_units(config, image_size, tokenizer, error)


def _without_units(
    config: ConfigDict, image_size: int, tokenizer: bool, error: UserError
) -> tuple[list[Finding], Seen | None]:
    """As `look`, where that raised `error`: of the data alone, if they can be read without what belongs to them.

    Else of the lines about them alone.
    """
    lines = lines_alone(config, "the data come first")
    if config.data.name == "scenes":
        return [fault(DATA, error), lines], None
    alone = config.copy_and_resolve_references()
    with alone.unlocked():
        alone.data.units = ""
    try:
        with _quiet(), _opened(alone, image_size, tokenizer, ()) as (splits, to_make):
            seen, damaged = _seen(config, splits, to_make)
    except UserError as own:
        if config.data.units and any(reason in str(own) for reason in NO_CAPTION):  # The lines are to bring them.
            first = Finding(DATA, UNCHECKED, "the references come first: the pictures have no captions of their own")
            return [first if lines.verdict == FAULT else fault(DATA, error), lines], None
        if lines.verdict != FAULT and str(error) != str(own):
            lines = fault(REFERENCES, error)
        return [fault(DATA, own), lines], None
    return [*_found(config, seen, damaged), fault(REFERENCES, error)], seen


def lines_alone(config: ConfigDict, missing: str) -> Finding:
    """Whether data.units can be read, where the data cannot: whether its lines fit them is not known.

    missing: what comes first.
    """
    if not config.data.units or config.data.name == "scenes":
        return Finding(REFERENCES, UNCHECKED, missing)
    try:
        file, count = storage.fetch(resolved(config.data.units)), 0
        for number, line in lines_of(file, *UNITS):
            where = f"{file}, line {number}"
            read_record(json_text.parse_object(line, where, MEND_LINE), where, needs_caption=False)
            count += 1
    except UserError as error:
        return fault(REFERENCES, error)
    if not count:
        return Finding(REFERENCES, FAULT, f"{file} (data.units) has no line", "run the same `recaption` again")
    found = f"{missing}; {file.name} has {count:,} line{'s' * (count > 1)} that can be read"
    return Finding(REFERENCES, UNCHECKED, found)


@contextlib.contextmanager
def _opened(
    config: ConfigDict, image_size: int, tokenizer: bool, needs: Sequence[str]
) -> Iterator[tuple[Data, tuple[Path, int] | None]]:
    """The data set, and where it will be made with how many bytes; of one that is to be made a few examples."""
    folder = data.to_be_made(config.data, image_size)
    if folder is None:
        yield data.load(config.data, image_size, tokenizer=tokenizer, needs=needs), None
        return
    place = existing(resolved(config.data.data_dir))
    if url := storage.url_of(folder):
        try_objects(url)
    elif not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        raise UserError(f"the data set cannot be made in {folder}: {place} is not to be written to; set data.data_dir")
    few = config.data.copy_and_resolve_references()
    with tempfile.TemporaryDirectory(prefix="balcap-doctor-") as aside:
        with few.unlocked():
            few.data_dir = aside
            for name in _SIZES:
                few[name] = min(few[name], _FEW_SCENES)
        splits = data.load(few, image_size, tokenizer=tokenizer, needs=needs)
        size = sum(path.stat().st_size for path in Path(aside).rglob("*") if path.is_file())
        share = sum(config.data[name] for name in _SIZES) / sum(few[name] for name in _SIZES)
        yield splits, (folder, int(size * share))


def _seen(config: ConfigDict, splits: Data, to_make: tuple[Path, int] | None) -> tuple[Seen, list[LeftOut]]:
    """Opens samples. -> (what was seen, those among them that cannot be used)"""
    with readable(config.data):
        looked_at = examples(splits.train, places=_places(splits.train))
        shown = examples(splits.test, _shown(config))
    return Seen(splits, looked_at, shown, to_make), list(splits.damaged)


def _shown(config: ConfigDict) -> int:
    """How many held-out pictures are opened: what a trial of the judge takes."""
    asks = rewards.resolve(config.rewards.name).asks
    return max(_SHOWN, judge_trial.pictures_of(config)) if asks and config.judge.name == "remote" else _SHOWN


def _places(source: Sequence[Any]) -> list[int]:
    """Those of the samples that are opened."""
    places = set(np.unique(np.linspace(0, len(source) - 1, _SPREAD).astype(int)).tolist()) if len(source) else set()
    if (prompts := getattr(source, "prompts", None)) is not None:
        lengths = np.array([len(prompt) for prompt in prompts])
        places |= set(np.argsort(-lengths, kind="stable")[:_LONGEST].tolist())
    return sorted(places)


# ---- data ------------------------------------------------------------------------------------------------------------


def _found(config: ConfigDict, seen: Seen, damaged: Sequence[LeftOut]) -> list[Finding]:
    """All faults, or what there is."""
    splits = seen.splits
    left_out = [entry for entry in splits.left_out if not entry.reason.startswith(_NO_LINE)]
    used, rows = sum(map(len, splits[:3])), []
    if len(left_out) > _MOST_LEFT_OUT * (used + len(left_out)):
        found = f"{len(left_out):,} of {used + len(left_out):,} pictures {_are(left_out)} left out: {_named(left_out)}"
        rows.append(Finding(DATA, FAULT, found, _remedy(config, left_out)))
    opened, empty = len(seen.looked_at) + len(seen.shown) + len(damaged), [one for one in damaged if is_empty(one)]
    if broken := [one for one in damaged if not is_empty(one)]:
        found = f"of {opened} pictures that were opened {len(broken)} {_are(broken)} damaged: {_named(broken)}"
        remedy = "fetch these pictures again: others would be trained on in their place"
        rows.append(Finding(DATA, FAULT, found, remedy))
    if len(empty) > _MOST_LEFT_OUT * opened:
        found = f"{len(empty)} of {opened} samples that were opened {_are(empty)} left out: {_named(empty)}"
        rows.append(Finding(DATA, FAULT, found, _remedy(config, empty)))
    rows += _sizes(config, seen)
    if rows:
        return rows
    if seen.to_make:
        sizes = " + ".join(f"{config.data[name]:,}" for name in _SIZES)
        return [Finding(DATA, OK, f"scenes: {sizes} pictures will be made in {seen.to_make[0]}")]
    without = f", {len(empty)} of them left out: {_named(empty)}" if empty else ""
    return [Finding(DATA, OK, f"{_counts(config, splits)}; {opened} opened{without}")]


def _sizes(config: ConfigDict, seen: Seen) -> list[Finding]:
    """The faults of splits that are too small for what the config does with them."""
    rows = []
    train, validation, test = map(len, seen.splits[:3])
    if seen.to_make:
        train, validation, test = (config.data[name] for name in _SIZES)
    for name in stage_order(config):
        stage = config.stages[name]
        if stage.steps and stage.batch_size > train:
            found = f"{train:,} sample{'s' * (train != 1)} to train on, and a batch of {name} takes"
            remedy = f"lower stages.{name}.batch_size, or add pictures"
            rows.append(Finding(DATA, FAULT, f"{found} {stage.batch_size:,}", remedy))
    metric = config.checkpoint.best_metric
    try:
        check_best_metric(metric, measured_names(config, seen.splits.fields), validation)
    except UserError as error:
        rows.append(fault(DATA, error, "name one of these, or leave the field empty"))
    if not test:
        remedy = f"raise data.{'test_size' if config.data.name == 'scenes' else 'test_share'}"
        rows.append(Finding(DATA, FAULT, "no picture is held out to be evaluated on", remedy))
    return rows


def _are(entries: Sequence[Any]) -> str:
    return "is" if len(entries) == 1 else "are"


def is_empty(entry: LeftOut) -> bool:
    """Whether a sample lacks its picture or its caption, which fetching it again does not bring."""
    return entry.reason in (*NO_CAPTION, NO_PICTURE)


def _remedy(config: ConfigDict, left_out: Sequence[LeftOut]) -> str:
    """What to do about samples that are left out, by what most of them lack."""
    if 2 * sum(entry.reason in NO_CAPTION for entry in left_out) > len(left_out):
        return "write these captions, or have `recaption` write references and give its file in data.units"
    if 2 * sum(map(is_empty, left_out)) > len(left_out):
        return "take these rows out, or have pictures written into them"
    if config.data.name == "photos" and Path(config.data.data_dir).is_dir():
        return "fetch these pictures again, or take them out of the folder"
    return "fetch what is missing, or take the entries about it out of the file"


def _counts(config: ConfigDict, splits: Data) -> str:
    train, validation, test = (f"{len(split):,}" for split in splits[:3])
    text = f"{config.data.name}: {train} samples to train on, {validation} for validation, {test} held out for tests"
    left_out = [entry for entry in splits.left_out if not entry.reason.startswith(_NO_LINE)]
    return text + (f", {len(left_out):,} left out: {_named(left_out)}" if left_out else "")


def _named(left_out: Sequence[LeftOut]) -> str:
    named = ", ".join(f"{entry.image} ({entry.reason})" for entry in left_out[:_NAMED])
    return named + (f" and {len(left_out) - _NAMED:,} more" if len(left_out) > _NAMED else "")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts(config: ConfigDict, seen: Seen | None, processor: PromptProcessor | None) -> Finding:
    """Whether the prompts of the samples that were opened fit with their pictures, and captions can be long enough."""
    if seen is None or processor is None:
        missing = "the data" if seen is None else "the checkpoint"
        return Finding(PROMPTS, UNCHECKED, f"{missing} come{'s' * (seen is not None)} first")
    lengths, too_long = [], {}
    for example in [*seen.looked_at, *seen.shown]:
        text = config.data.prompt or example["prompt"]
        try:
            prompt = processor([example["image"]], [text], [example["id"]])
            lengths.append(int(np.asarray(prompt.mask).sum()))
        except PromptTooLong as error:
            too_long[example["id"]] = error.needed
        except UserError as error:
            return fault(PROMPTS, error)
    room, count = config.model.prompt_tokens, len(lengths) + len(too_long)
    room = getattr(processor, "prompt_tokens", room)
    if too_long:
        name, needs = max(too_long, key=too_long.get), "needs" if len(too_long) == 1 else "need"
        found = f"{len(too_long)} of {count} prompts that were looked at {needs} more than model.prompt_tokens ({room})"
        remedy = f"set model.prompt_tokens to {too_long[name]} or more, or shorten the prompts"
        return Finding(PROMPTS, FAULT, f"{found}, up to {too_long[name]} with the picture ({name})", remedy)
    if problem := _too_short(config, seen, processor):
        return problem
    found = f"the longest of {count} with their pictures takes {max(lengths)} of {room} tokens"
    return Finding(PROMPTS, OK, found)


def _too_short(config: ConfigDict, seen: Seen, processor: PromptProcessor) -> Finding | None:
    """The finding where a caption as long as it may be stays below the band of lengths that the reward asks for."""
    gated = config.rewards.gate and any(rewards.resolve(config.rewards.name).gated) and "rl" in stage_order(config)
    if not gated:
        return None
    tokenizer, most = processor.tokenizer, config.rollout.max_tokens
    rates = [
        (len(tokenizer.encode(example["reference"], add_special_tokens=False)), count_words(example["reference"]))
        for example in seen.looked_at or seen.shown
    ]
    tokens = float(np.median([count for count, _ in rates]))
    needed = int(np.ceil(config.rewards.gate_low * tokens))
    if needed <= most:
        return None
    words = float(np.median([count for _, count in rates]))
    found = (
        f"references have {tokens:.0f} tokens ({words:.0f} words), and captions of rollout.max_tokens ({most}) end "
        f"below rewards.gate_low ({config.rewards.gate_low:g}) of them: language is never rewarded"
    )
    return Finding(PROMPTS, FAULT, found, f"raise rollout.max_tokens to {needed} or more, with rollout.buckets")


# ---- what the reward reads -------------------------------------------------------------------------------------------


def _beside(config: ConfigDict, seen: Seen) -> list[Finding]:
    """What the reward needs beside a picture, and how many pictures data.units has a line about: all faults, or one."""
    splits, settings, rows = seen.splits, config.rewards, []
    try:
        rewards.check_fields(settings, splits.fields, config.data.name)
    except UserError as error:
        rows.append(fault(REFERENCES, error))
    used = sum(map(len, splits[:3]))
    without = sum(entry.reason.startswith(_NO_LINE) for entry in splits.left_out)
    units = Path(config.data.units).name
    if without > _MOST_LEFT_OUT * (used + without):
        which = "which is" if without == 1 else "which are"
        found = f"{units} has no line about {without:,} of {used + without:,} samples, {which} left out"
        more, remedy = _failures(storage.fetch(resolved(config.data.units)))
        rows.append(Finding(REFERENCES, FAULT, found + more, remedy))
    needs = rewards.resolve(settings.name).needs
    examined = [*seen.looked_at, *seen.shown]
    for field in (field for field in needs if field in splits.fields):
        lacking = [example["id"] for example in examined if _is_empty(example, field)]
        if len(lacking) > _MOST_LEFT_OUT * len(examined):
            have = "has" if len(lacking) == 1 else "have"
            found = f"{len(lacking)} of {len(examined)} samples that were looked at {have} no {field}"
            remedy = "have `recaption` write it, or choose another reward (rewards.name)"
            rows.append(Finding(REFERENCES, FAULT, f"{found}, such as {lacking[0]}", remedy))
    empty = [example["id"] for example in examined if not str(example["reference"]).strip()]
    if empty:
        found = f"{len(empty)} of {len(examined)} references that were looked at {_are(empty)} empty"
        remedy = "write them with `recaption`, or remove these pictures"
        rows.append(Finding(REFERENCES, FAULT, f"{found}, such as that of {empty[0]}", remedy))
    if rows:
        return rows
    words = np.mean([count_words(example["reference"]) for example in examined])
    found = f"{', '.join(('reference', *needs))} there; references have {words:.0f} words on average"
    if config.data.units and config.data.name != "scenes":
        found += f"; {units} has lines about {used:,} of {used + without:,} samples"
    return [Finding(REFERENCES, OK, found)]


def _failures(units: Path) -> tuple[str, str]:
    """What `recaption` could not write beside the file of lines, and what to do about lines that are missing."""
    file = units.with_name(units.name.removesuffix(".jsonl") + ".errors.jsonl")
    try:
        failed = [entry for _, entry in read_jsonl(storage.fetch(file), "delete it")]
    except (OSError, UserError):
        failed = []
    if not failed:
        return "", "run the same `recaption` again: it writes what is missing"
    first = failed[0]
    found = f"; {file.name} names {len(failed):,}, such as {first.get('image')} ({first.get('error')})"
    remedy = "mend what it says and run the same `recaption` with --retry_errors, or take these samples out of the data"
    return found, remedy


def _is_empty(example: Mapping[str, Any], field: str) -> bool:
    value = example.get(field)
    return value is None or value in ("", "[]") or len(value) == 0


# ---- what is printed -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """What is printed inside, on stdout and stderr, goes into the text that it gives."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
