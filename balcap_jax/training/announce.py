"""The block that a run prints when it starts: what is trained on what, who judges it, and what that will take."""

from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from balcap_jax import rewards
from balcap_jax.advantages import BEST_OF
from balcap_jax.config.recipes import stage_order
from balcap_jax.data import Data
from balcap_jax.judges import cost, parse_flaws
from balcap_jax.judges.schema import Judge
from balcap_jax.models.policy import Params

_LONGEST_PROMPT = 100  # characters that are shown


def block(
    config: ConfigDict, family: str, params: Params, splits: Data, shown: Sequence[dict[str, Any]], judge: Judge
) -> str:
    """Lines on model, data, reward, judge, prompt, batches and judging of the whole run.

    `family` is that of the model, `params` may be shapes, and `shown` are held-out examples.
    """
    order = stage_order(config)
    rows = [("model", _model(config, family, params)), ("data", _data(config, splits)), ("reward", _reward(config))]
    rows += [("judge", _judge(config, judge)), ("prompt", _prompt(config, shown))]
    rows += [(name, _stage(config, name)) for name in order if config.stages[name].steps]
    asks = rewards.resolve(config.rewards.name).asks
    lines = cost.estimate(config, order, asks).splitlines() if asks else ["the reward asks no judge"]
    rows += [("judging", lines[0]), *(("", line) for line in lines[1:])]
    return "\n".join(f"{name:8}{text}" for name, text in rows)


def _model(config: ConfigDict, family: str, params: Params) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    where = config.model.path or "from random numbers"
    if config.model.decoder_path:
        where = f"a new tower before {config.model.decoder_path}"
    adapters = f"; adapters of rank {config.lora.rank}" if config.lora.rank else ""
    return f"{where}: {family}, {count:,} parameters, computes in {config.model.dtype}{adapters}"


def _data(config: ConfigDict, splits: Data) -> str:
    data = config.data
    place = {"scenes": "", "sharegpt4v": f" in {data.manual_dir}"}.get(data.name, f" in {data.data_dir}")
    units = f", with what {data.units} says about them" if data.units and data.name != "scenes" else ""
    train, validation, test = (f"{len(split):,}" for split in splits[:3])
    return f"{data.name}{place}: {train} samples to train on, {validation} for validation, {test} for tests{units}"


def _reward(config: ConfigDict) -> str:
    names = rewards.objectives(config.rewards)
    weighted = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, config.rewards.weights, strict=True))
    rule = config.advantage.aggregation
    joined = "" if rule == "sum" else f", joined by {rule}"
    if config.advantage.estimator == BEST_OF:
        return f"{config.rewards.name}: {weighted}; the best of each group is imitated"
    return f"{config.rewards.name}: {weighted}; advantages by {config.advantage.estimator}{joined}"


def _judge(config: ConfigDict, judge: Judge) -> str:
    settings = config.judge
    if settings.name == "remote":
        ahead = ", beside the next rollout" if config.pipeline.depth else ""
        return f"remote: {judge.about['model']} at {settings.endpoints}, {settings.concurrency} requests at once{ahead}"
    if settings.name == "policy":
        return f"policy: {settings.path} on the devices that train"
    if parse_flaws(settings.flaws):
        return f"{judge.about['model']}, in training alone: the rules of the scenes"
    return "oracle: the rules of the scenes"


def _prompt(config: ConfigDict, shown: Sequence[dict[str, Any]]) -> str:
    """The one prompt, or that of the first held-out sample, on one line."""
    text = " ".join((config.data.prompt or shown[0]["prompt"]).split())
    text = repr(text if len(text) <= _LONGEST_PROMPT else f"{text[:_LONGEST_PROMPT]}...")
    return text if config.data.prompt else f"each sample's own, such as {text}"


def _stage(config: ConfigDict, name: str) -> str:
    stage, rollout = config.stages[name], config.rollout
    text = f"{stage.steps:,} steps of {stage.batch_size} prompts"
    if name == "rl":
        text += f" x {rollout.group_size} captions of up to {rollout.max_tokens:,} tokens"
    return f"{text}, learning rate {stage.learning_rate:g}"
