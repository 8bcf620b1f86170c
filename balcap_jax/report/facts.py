"""What a run is: at the top of the page what a reader asks first, and at its end all that was recorded."""

import collections
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.bucket import shown
from balcap_jax.report.run import KINDS, STAGE_LABELS, Run, is_number, mapping

_SHOWN_PROMPT = 160  # characters of a prompt at the top of the page


def heads(run: Run) -> dict[str, str]:
    """Data, prompt, judge, cost, model, training and time, as far as the run's files say."""
    config = run.config
    found = {
        "recipe": str(config.get("name") or ""),
        "data": _data(run),
        "prompt": _prompt(run),
        "judge": _judge(run),
        "judge's cost": _cost(run),
        "model": _model(config),
        "trained": _trained(config),
        "time": _time(run),
    }
    return {name: text for name, text in found.items() if text}


def _data(run: Run) -> str:
    data = mapping(run.config.get("data"))
    name = data.get("name")
    if not isinstance(name, str):
        return ""
    place = data.get("manual_dir") if name == "sharegpt4v" else data.get("data_dir")
    text = name if name.startswith("scenes") or not isinstance(place, str) else f"{name}, {shown(place)}"
    images = [mapping(run.evaluation(label, kind)).get("images") for kind in KINDS for label in run.labels[-1:]]
    count = next(filter(is_number, images), None)
    return f"{text}; {count:g} held-out images" if count else text


def _prompt(run: Run) -> str:
    asked = mapping(run.config.get("data")).get("prompt")
    if isinstance(asked, str) and asked:
        return _short(asked)
    judged = (
        image.prompt for kind in KINDS for label in run.labels for image in run.judged[kind].get(label, {}).values()
    )
    counted = collections.Counter(prompt for prompt in judged if prompt)
    if not counted:
        return ""
    prompt = _short(next(iter(counted.most_common(1)))[0])
    return prompt if len(counted) == 1 else f"{prompt} (and {len(counted) - 1} others)"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_PROMPT else text[: _SHOWN_PROMPT - 1] + "…"


def _judge(run: Run) -> str:
    judge = mapping(run.config.get("judge"))
    name = judge.get("name")
    if not isinstance(name, str):
        return ""
    # The model that answered, as it is kept beside each caption: that of training, which may be wrong on purpose.
    models = collections.Counter(
        caption.judge for step in run.steps[-1:] for image in run.rollouts(step) for caption in image.captions
    ) or collections.Counter(
        caption.judge
        for kind in KINDS
        for label in run.labels[-1:]
        for image in run.judged[kind].get(label, {}).values()
        for caption in image.captions
    )
    answered = next((model for model, _ in models.most_common() if model), "")
    if name == "oracle":
        return answered or _flawed(judge) or "oracle (the rules of scenes)"
    where = judge.get("path") if name == "policy" else judge.get("endpoints")
    model = answered or (judge.get("model") if isinstance(judge.get("model"), str) else "")
    return ", ".join(part for part in (name, model, where if isinstance(where, str) else "") if part)


def _flawed(judge: Mapping[str, Any]) -> str:
    flaws = judge.get("flaws")
    return f"oracle with {flaws}" if isinstance(flaws, str) and flaws else ""


def _cost(run: Run) -> str:
    counts = {name: value for name, value in run.spent.items() if is_number(value)}
    if not counts:
        return ""
    cost = counts.get("cost", 0)
    parts = [f"{counts.get('calls', 0):,.0f} calls"]
    if counts.get("cached"):
        parts[0] += f" ({counts['cached']:,.0f} from the cache)"
    parts.append(f"{counts.get('tokens_in', 0):,.0f} tokens in, {counts.get('tokens_out', 0):,.0f} out")
    parts.append(f"cost {cost:,.2f}" if cost else "no price set (judge.price_in, judge.price_out)")
    return "; ".join(parts)


def _model(config: Mapping[str, Any]) -> str:
    model, lora = mapping(config.get("model")), mapping(config.get("lora"))
    if not model:
        return ""
    path, family = model.get("path"), model.get("family")
    text = shown(path) if isinstance(path, str) and path else "from random parameters"
    text = f"{family}, {text}" if isinstance(family, str) else text
    rank = lora.get("rank")
    return f"{text}, LoRA of rank {rank:g}" if is_number(rank) and rank else text


def _trained(config: Mapping[str, Any]) -> str:
    stages, rollout = mapping(config.get("stages")), mapping(config.get("rollout"))
    order = stages.get("order")
    parts = []
    for name in [part.strip() for part in order.split(",")] if isinstance(order, str) else []:
        settings = mapping(stages.get(name))
        steps, size, group = settings.get("steps"), settings.get("batch_size"), rollout.get("group_size")
        if not is_number(steps) or not steps:
            continue
        text = f"{STAGE_LABELS.get(name, name)} {steps:g} steps"
        if is_number(size):
            text += f" of {size:g} images"
            text += f" × {group:g} captions" if name == "rl" and is_number(group) else ""
        parts.append(text)
    return "; ".join(parts)


def _time(run: Run) -> str:
    seconds = _seconds(run)
    parts = [duration(_wall(dict(seconds)))] if seconds else []
    if isinstance(run.summary.get("device"), str):
        parts.append(f"on {run.summary['device']}")
    try:
        written = (run.path / "summary.json").stat().st_mtime
        parts.append(f"{datetime.datetime.fromtimestamp(written, datetime.UTC):%Y-%m-%d}")
    except (OSError, OverflowError, ValueError):
        pass
    return ", ".join(parts)


def _seconds(run: Run) -> dict[str, float]:
    return {name: value for name, value in mapping(run.summary.get("seconds")).items() if is_number(value)}


def _wall(seconds: dict[str, float]) -> float:
    """The whole time, which is taken out of `seconds` where it is among them."""
    return seconds.pop("wall", None) or seconds.pop("total", None) or sum(seconds.values())


def all_facts(run: Run) -> dict[str, str]:
    """One line per fact of a run, for the table of facts."""
    summary, facts = run.summary, {"directory": shown(run.path)}
    if isinstance(summary.get("command"), str):
        facts["command"] = summary["command"]
    if run.config:
        digest = hashlib.sha256(json.dumps(run.config, sort_keys=True).encode()).hexdigest()
        facts["config"] = f"sha256 {digest[:12]}"
    versions = {**mapping(summary.get("versions"))}
    device = summary.get("device") or versions.pop("device", None)
    if device:
        facts["device"] = str(device)
    if versions:
        facts["versions"] = " · ".join(f"{name} {version}" for name, version in versions.items())
    if run.records:
        spans: dict[str, list[float]] = {}
        for record in run.records:
            spans.setdefault(str(record.get("stage")), []).append(record["step"])
        facts["logged steps"] = ", ".join(f"{stage} {span[0]:g} to {span[-1]:g}" for stage, span in spans.items())
    if seconds := _seconds(run):
        facts["total time"] = duration(_wall(seconds))
        longest_first = sorted(seconds.items(), key=lambda item: -item[1])
        facts["of which"] = ", ".join(f"{name} {duration(value)}" for name, value in longest_first)
    return facts


def duration(seconds: float) -> str:
    """Seconds as text of two units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of a config by their dotted names, as JSON."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = json_text.dumps(value, ensure_ascii=False)
    return leaves


def aligned(columns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The union of the columns' rows; `same` says whether all columns agree."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name, "") for column in columns] for name in names}
    return [{"name": name, "values": values, "same": len(set(values)) == 1} for name, values in rows.items()]
