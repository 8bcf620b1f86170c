"""Reward functions: captions in, a [B, G, K] array with a validity mask out.

A reward of your own is a class of the form of `base.RewardFn` in a module that Python can import, and one line in a
config: `config.rewards.name = "package.module:Class"`.
"""

import difflib
import importlib
from collections.abc import Collection, Mapping
from typing import Any

from balcap_jax.cli.errors import UserError, raised, shown, streams_kept
from balcap_jax.data.words import count_words
from balcap_jax.judges import parse_flaws, parse_shares
from balcap_jax.judges.schema import Judge
from balcap_jax.rewards.arena import ArenaReward, BalCapArenaReward
from balcap_jax.rewards.balcap import BalCapReward, TextReward
from balcap_jax.rewards.base import Joined, RewardFn, Samples, Scores
from balcap_jax.rewards.caprl import CaprlReward
from balcap_jax.rewards.feedquill import FeedquillReward
from balcap_jax.rewards.flawed import OF_SCORES, Flawed
from balcap_jax.rewards.length import LengthPenalised
from balcap_jax.rewards.lexical import LexicalReward
from balcap_jax.rewards.own import OwnReward
from balcap_jax.rewards.rubicap import RubicapReward
from balcap_jax.rewards.sparing import Sparing

REWARDS: dict[str, type] = {
    "balcap": BalCapReward,
    "caprl": CaprlReward,
    "rubicap": RubicapReward,
    "feedquill": FeedquillReward,
    "lexical": LexicalReward,
    "arena": ArenaReward,
    "balcap_arena": BalCapArenaReward,
    "text": TextReward,
}


def resolve(name: str) -> type:
    """The class that `rewards.name` names.

    Raises:
      UserError: neither one of REWARDS, nor an importable class of the form of a reward.
    """
    if name in REWARDS:
        return REWARDS[name]
    where = f"config field 'rewards.name' is {name!r}:"
    module, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, REWARDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else "or package.module:Class for one of your own"
        raise UserError(f"{where} rewards are {', '.join(REWARDS)}; {hint}")
    try:
        with streams_kept():
            cls = getattr(importlib.import_module(module), attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Whatever the module raises, an exit too, is its author's to fix.
        raise UserError(f"{where} it cannot be imported ({raised(error)})") from error
    try:
        problem = _problem(cls)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{where} looking at it raised {raised(error)}") from error
    if problem:
        raise UserError(f"{where} {problem}; see balcap_jax/rewards/base.py")
    return cls


def _problem(cls: Any) -> str:
    """What keeps an object from being a reward; "" = nothing."""
    if not isinstance(cls, type) or not hasattr(cls, "__call__"):  # noqa: B004 - of its objects
        return "it is no class whose objects can be called"
    for name, kind in (("names", str), ("gated", bool), ("needs", str), ("asks", str)):
        value = getattr(cls, name, None)
        if not isinstance(value, tuple) or not all(isinstance(entry, kind) for entry in value):
            return f"its {name!r} must be a tuple of {kind.__name__}, got {shown(value)}"
    if not cls.names or len(set(cls.names)) < len(cls.names) or len(cls.gated) != len(cls.names):
        return "it must have at least one name, none twice, and one flag in 'gated' for each"
    return ""


def objectives(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the K objectives of the config group `rewards`, in the order of its weights.

    Raises:
      UserError: there is no such reward, or it has an objective of the length's name.
    """
    names = resolve(config["name"]).names
    if config["length"] == "none":
        return names
    if "length" in names:
        raise UserError(
            f"config field 'rewards.name' is {config['name']!r}: its objective 'length' has the name of that of "
            f"rewards.length {config['length']!r}; rename it, or set rewards.length to none"
        )
    return (*names, "length")


def check_asked(config: Mapping[str, Any]) -> None:
    """Raises UserError where `judge.ask` of a whole configuration names no question of its reward."""
    shares, name = parse_shares(config["judge"]["ask"]), config["rewards"]["name"]
    if shares and name not in REWARDS:
        raise UserError(
            f"config field 'judge.ask' leaves out questions of rewards of this package, and rewards.name is {name!r}; "
            "leave it empty"
        )
    asks = resolve(name).asks
    for method in shares:
        if method not in asks:
            known = f"asks for {', '.join(asks)}" if asks else "asks nobody"
            raise UserError(f"config field 'judge.ask' names {method!r}, and the reward {name!r} {known}")


def check_settings(config: Mapping[str, Any]) -> None:
    """Checks a whole configuration's weights, judge and data set against its reward, before anything is built.

    Raises:
      UserError: they do not fit, or `objectives` fails.
    """
    check_asked(config)
    if parse_flaws(config["judge"]["flaws"]) and not resolve(config["rewards"]["name"]).asks:
        raise UserError(
            f"config field 'judge.flaws' is {config['judge']['flaws']!r}, and the reward {config['rewards']['name']!r} "
            "asks no judge; leave it empty"
        )
    settings, data = config["rewards"], config["data"]["name"]
    names = objectives(settings)
    if len(settings["weights"]) != len(names):
        raise UserError(
            f"config field 'rewards.weights' needs {len(names)} numbers for {settings['name']} ({', '.join(names)}), "
            f"got {settings['weights']}"
        )
    if settings["scales"] and len(settings["scales"]) != len(names):
        raise UserError(
            f"config field 'rewards.scales' needs {len(names)} numbers for {settings['name']} ({', '.join(names)}), or "
            f"none, got {settings['scales']}"
        )
    if data != "scenes" and config["judge"]["name"] == "oracle" and resolve(settings["name"]).asks:
        raise UserError(
            f"config field 'judge.name' is oracle, which knows the scenes only: with data.name {data!r} set it to "
            "remote, or rewards.name to lexical, which needs no judge"
        )


def build(config: Mapping[str, Any], judge: Judge, seed: int = 0, tried_on: Samples | None = None) -> RewardFn:
    """The reward function of the config group `rewards`; one of the user's own is tried out on `tried_on` at once.

    Raises:
      UserError: the user's own cannot be made, or does not score those samples as a reward must.
    """
    name, settings = config["name"], dict(config) | {"seed": seed}
    if name in REWARDS:
        reward = REWARDS[name](judge, settings)
    else:
        reward = OwnReward(name, resolve(name), judge, settings)
        if tried_on is not None:
            reward.try_out(tried_on)
    return reward if config["length"] == "none" else LengthPenalised(reward, settings)


def in_training(reward: RewardFn, judge: Mapping[str, Any], seed: int) -> RewardFn:
    """`reward` as training calls it, by the config group `judge`: with what `ask` leaves out, and the errors of scores
    that `flaws` names."""
    shares, flaws = parse_shares(judge["ask"]), parse_flaws(judge["flaws"])
    flaws = {name: amount for name, amount in flaws.items() if name in OF_SCORES}
    if shares:
        reward = Sparing(reward, shares, seed)
    return Flawed(reward, flaws, judge["votes"], seed) if flaws else reward


def truth(judge: Judge, fields: Collection[str]) -> RewardFn | None:
    """What scores the captions of training beside a judge that is wrong on purpose: BalCap's three, exactly.

    None for any other judge. `fields` are those that examples have.
    """
    exact = judge.exact()
    return None if exact is judge or not set(BalCapReward.needs) <= set(fields) else BalCapReward(exact)


def measure(reward: RewardFn, judge: Judge, fields: Collection[str]) -> RewardFn:
    """The reward that evaluations score: `reward`, and with an exact judge the objectives of BalCap beside it.

    So runs of different rewards can be compared where that costs nothing. `fields` are those that examples have.
    """
    is_balcap = isinstance(reward, BalCapReward) and reward.pointability
    if isinstance(reward, RewardFn):
        reward = reward.measured()
    if is_balcap or not judge.is_exact or "scene" not in fields:
        return reward
    return Joined(BalCapReward(judge), reward)


def check(config: Mapping[str, Any], judge: Judge, fields: Collection[str], data: str) -> None:
    """Raises UserError where the data set `data`, whose examples have `fields`, or the judge is not enough."""
    check_fields(config, fields, data)
    reward, name = resolve(config["name"]), config["name"]
    for method in reward.asks:
        if not hasattr(judge, method):
            raise UserError(
                f"the reward {name!r} asks its judge for {method!r}, which the judge {type(judge).__name__} does not "
                "answer; set judge.name to remote, or choose another reward (rewards.name)"
            )


def check_fields(config: Mapping[str, Any], fields: Collection[str], data: str) -> None:
    """Raises UserError where the data set `data`, whose examples have `fields`, lacks one that the reward reads."""
    for field in resolve(config["name"]).needs:
        if field not in fields:
            raise UserError(
                f"the reward {config['name']!r} needs {field!r} beside a picture, and the data set {data!r} has none; "
                "add them to the data, or choose another reward (rewards.name)"
            )


__all__ = ["RewardFn", "Samples", "Scores", "build", "check", "check_settings", "count_words", "measure"]
__all__ += ["check_fields", "in_training", "objectives", "resolve", "truth"]
