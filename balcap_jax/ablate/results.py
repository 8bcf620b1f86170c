"""What a finished run of a study leaves: one small JSON file, by which no run is made twice.

RESULTS/LABEL-seedN.json

run, seed, recipe, fields        how it was made, `config` with all that decides its result, and `config_digest`
greedy, sampled                  {"base" | "after" | "ceiling": metrics in points, words and tokens, habits in %}
judge_calls                      questions to the judge in training
group_std                        mean standard deviation within groups of each raw reward, first WARM_UP batches
trajectory                       proxy and true scores of training captions every TRAJECTORY updates, in points, of
                                 runs whose judge has flaws
seconds, jobs, device, versions  what it cost, how many ran at a time, and where
"""

import hashlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from ml_collections import ConfigDict

from balcap_jax.ablate.studies import PILOT_SEEDS, WARM_UP
from balcap_jax.ablate.table import METRICS, points
from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import read_json_object, read_jsonl, write_text
from balcap_jax.config import recipes as configuration
from balcap_jax.config.schema import FIELDS
from balcap_jax.report.run import CEILING, KINDS

TRAJECTORY = 5  # updates of a point
_DIGITS = 4
# Where things lie changes no result, and how a batch is cut changes no more of it than rounding does.
_UNCOUNTED = re.compile(r"data\.data_dir|stages\.\w+\.micro_batches")
_REMEDY = "delete it, and the study makes that run anew"
_NAME = re.compile(r"(?P<label>.+)-seed(?P<seed>[0-9]{1,10})\.json")


# ---- identity --------------------------------------------------------------------------------------------------------


def identity(config: ConfigDict) -> dict[str, Any]:
    """The fields that decide a run's result, seed included: {dotted name: JSON value}."""
    fields = (
        (name, value)
        for name, value in configuration.leaves(config)
        if not FIELDS[name].resumable and not _UNCOUNTED.fullmatch(name)
    )
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(fields)}


def digest(fields: Mapping[str, Any]) -> str:
    """Of what `identity` gives."""
    return hashlib.sha256(json_text.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def difference(result: Mapping[str, Any], config: ConfigDict) -> str | None:
    """What keeps a result from being that of `config`, "field: saved -> wanted"; None where nothing does.

    A field that the code has got since then is no difference while it is at its default: then the run is as it was.
    """
    wanted = identity(config)
    saved = {name: value for name, value in result["config"].items() if not _UNCOUNTED.fullmatch(name)}
    if result["config_digest"] == digest(wanted):
        return None
    defaults = identity(configuration.default_config())
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            return f"{name}: {shown(saved[name])} -> no such field"
        old = saved.get(name, defaults[name])
        if old != wanted[name]:
            return f"{name}: {shown(old)} -> {shown(wanted[name])}"
    return None


_STRICT = pydantic.ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
_Means = pydantic.create_model("_Means", __config__=_STRICT, **dict.fromkeys(METRICS, (float, 0.0)))


class _Result(pydantic.BaseModel):
    """What readers of a result take for granted."""

    model_config = _STRICT

    config: dict[str, Any]
    config_digest: str
    greedy: dict[str, _Means]
    sampled: dict[str, _Means]
    seconds: Annotated[float, pydantic.Field(ge=0)]
    jobs: Annotated[int, pydantic.Field(ge=1)]
    device: str
    versions: dict[str, str]


# ---- files -----------------------------------------------------------------------------------------------------------


def path_of(results: Path, label: str, seed: int) -> Path:
    return results / f"{label}-seed{seed}.json"


def read(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
      FileNotFoundError, NotADirectoryError: there is none.
      UserError: it is none that `write` wrote.
    """
    result = read_json_object(path, _REMEDY)
    try:
        _Result.model_validate(result)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is no result of a study ({where}: {first['msg']}); {_REMEDY}") from None
    return result


def check_evaluated(result: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where a run's result lacks the scores after training, which a base's may."""
    for kind in KINDS.values():
        if "b_capscore" not in result[kind].get("after", {}):
            raise UserError(f"{path} is no result of a study ({kind}.after.b_capscore: missing); {_REMEDY}")


def fresh(path: Path, config: ConfigDict) -> tuple[dict[str, Any] | None, str | None]:
    """-> (the result of `config`, or None; why a file that is there is not it)"""
    try:
        result = read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    changed = difference(result, config)
    return (None, changed) if changed else (result, None)


def seeds_of(results: Path, label: str, *, pilot: bool = False) -> list[int]:
    """Seeds of which there is a file, ascending: those of pilots, or the others."""
    found = (_NAME.fullmatch(path.name) for path in results.glob("*.json"))
    seeds = sorted(int(match["seed"]) for match in found if match and match["label"] == label)
    return [seed for seed in seeds if (seed >= PILOT_SEEDS[0]) == pilot]


def bases(results: Path) -> list[dict[str, Any]]:
    """The results of what runs went on from, but for pilots'."""
    names = ((path, _NAME.fullmatch(path.name)) for path in sorted(results.glob("*.json")))
    return [
        read(path)
        for path, match in names
        if match and (match["label"] == CEILING or match["label"].endswith("-base"))
        if int(match["seed"]) < PILOT_SEEDS[0]
    ]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """One line for each entry: small, and two versions of a file can be compared."""
    lines = [f" {json_text.dumps(name)}: {json_text.dumps(value)}" for name, value in result.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


# ---- what a run's directory says -------------------------------------------------------------------------------------


def evaluations(summary: Mapping[str, Any], order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{kind: {"base" | "after" | "ceiling": means}} of summary.json, those that are there."""
    labels = {"after": order[-1], "ceiling": CEILING} | ({"base": order[-2]} if len(order) > 1 else {})
    return {
        name: {role: means_of(summary[kind][label]) for role, label in labels.items() if label in summary.get(kind, {})}
        for kind, name in KINDS.items()
    }


def means_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The means of one evaluation: METRICS and what stands beside them, rounded; habits as shares in %."""
    extra = {"corpus_b_capscore": 1, "tokens": 1, "truncated": 100}
    means = points(evaluation)
    for name, factor in extra.items():
        if (mean := (evaluation.get(name) or {}).get("mean")) is not None:
            means[name] = factor * mean
    rounded: dict[str, Any] = {name: round(value, _DIGITS) for name, value in means.items()}
    rounded |= {name: evaluation[name] for name in ("n", "invalid", "digest") if name in evaluation}
    habits = {name: round(100 * one["share"], _DIGITS) for name, one in evaluation.get("habits", {}).items()}
    return rounded | ({"habits": habits} if habits else {})


def training_records(workdir: Path, stage: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one stage, in the order of steps."""
    lines = (record for _, record in read_jsonl(workdir / "metrics.jsonl", "delete that run to have it made anew"))
    return [record for record in lines if record.get("stage") == stage]


def group_std(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{objective: mean standard deviation within groups of its raw score} over the first WARM_UP records."""
    keys = [key for key in records[0] if key.startswith("reward/") and key.endswith("_std")] if records else []
    return {
        key.removeprefix("reward/").removesuffix("_std"): _mean(record.get(key) for record in records[:WARM_UP])
        for key in keys
    }


def trajectory(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over TRAJECTORY updates of proxy and true scores, in points; empty where there are no true ones."""
    names = [key.removeprefix("true/") for key in records[0] if key.startswith("true/")] if records else []
    found = []
    for start in range(0, len(records) if names else 0, TRAJECTORY):
        window = records[start : start + TRAJECTORY]
        point: dict[str, Any] = {"update": start + len(window), "proxy": {}, "true": {}}
        for name in names:
            factor, proxy = (1, name) if name == "b_capscore" else (100, f"reward/{name}")
            for kind, key in (("proxy", proxy), ("true", f"true/{name}")):
                if (value := _mean(record.get(key) for record in window)) is not None:
                    point[kind][name] = round(factor * value, _DIGITS)
        found.append(point)
    return found


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if json_text.is_number(value)]
    return statistics.fmean(known) if known else None


def inverse_std(result: Mapping[str, Any], where: Path) -> str:
    """The field rewards.weights whose entries are 1/std of each objective, with a mean of 1.

    Raises:
      UserError: an objective had no spread.
    """
    spreads = result.get("group_std") or {}
    if not spreads or not all(json_text.is_number(std) and std > 0 for std in spreads.values()):
        raise UserError(f"{where} has no group_std above 0 of each objective, got {shown(spreads)}; {_REMEDY}")
    inverse = [1 / std for std in spreads.values()]
    return ",".join(f"{value / statistics.fmean(inverse):.4f}" for value in inverse)


def metrics_of(result: Mapping[str, Any], kind: str, role: str) -> dict[str, float]:
    """METRICS of an evaluation of a result, those that it has; "lowest" is that of the three objectives."""
    means = result[kind].get(role, {})
    values = {name: means[name] for name in METRICS if json_text.is_number(means.get(name))}
    three = [values[name] for name in ("precision", "recall", "linguistic") if name in values]
    return values | ({"lowest": min(three)} if len(three) == 3 else {})
