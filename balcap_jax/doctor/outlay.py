"""What a run will take: hours of its judge and chips, and money, against what they may take."""

from typing import NamedTuple

from ml_collections import ConfigDict

from balcap_jax import rewards
from balcap_jax.config.recipes import stage_order
from balcap_jax.doctor.devices import Slice
from balcap_jax.doctor.findings import FAULT, OK, Finding
from balcap_jax.doctor.judge import Heard
from balcap_jax.judges import cost
from balcap_jax.judges.cost import Amount

TIME, MONEY = "time", "money"
_HOUR = 3600.0


class Limits(NamedTuple):
    """What the user has said, 0 = nothing. step_seconds: of a step's rollout and update, as measured elsewhere."""

    chip_hour_price: float = 0.0
    step_seconds: float = 0.0
    max_hours: float = 0.0
    budget: float = 0.0


class Hours(NamedTuple):
    """Of the whole run, None = not known; `least`: those of the chips are a lower bound."""

    judge: float | None
    chips: float | None
    least: bool

    def total(self, beside: bool) -> float | None:
        """Both, or the longer one where the judge works beside the next rollout."""
        known = [hours for hours in (self.judge, self.chips) if hours is not None]
        return (max(known) if beside else sum(known)) if known else None


def look(config: ConfigDict, heard: Heard, planned: Slice | None, limits: Limits) -> list[Finding]:
    """The findings on time and on money."""
    methods = rewards.resolve(config.rewards.name).asks if config.judge.name == "remote" else ()
    total = cost.total(cost.amounts(config, stage_order(config), methods))
    hours = _hours(config, total, heard, planned, limits)
    known = (config, total, heard, hours, planned, limits)
    return [_time(*known), _money(*known)]


def _hours(config: ConfigDict, total: Amount, heard: Heard, planned: Slice | None, limits: Limits) -> Hours:
    judge = chips = None
    steps = config.stages.rl.steps if "rl" in stage_order(config) else 0
    if heard.trial is not None:
        seconds, servers = heard.trial.seconds, heard.trial.servers
        asked = sum(cost.calls_of_step(config, method) for method in seconds)
        judge = cost.seconds_of_step(config, seconds, servers) * total.calls / asked / _HOUR
    least = not limits.step_seconds
    if limits.step_seconds or planned:
        chips = (limits.step_seconds or planned.peak_seconds) * steps / _HOUR
    return Hours(judge, chips, least)


def _time(
    config: ConfigDict, total: Amount, heard: Heard, hours: Hours, planned: Slice | None, limits: Limits
) -> Finding:
    order, parts = stage_order(config), []
    for name in order:
        stage = config.stages[name]
        if stage.steps and name == "rl":
            captions = stage.steps * stage.batch_size * config.rollout.group_size
            tokens = captions * config.rollout.max_tokens
            parts.append(f"rl {stage.steps:,} steps, {captions:,} captions, at most {tokens:,} tokens to sample")
        elif stage.steps:
            parts.append(f"{name} {stage.steps:,} steps")
    text = "; ".join(parts)
    if total.calls:
        text += f"; {total.calls:,} questions to the judge"
    if hours.judge is not None:
        trial, at_once = heard.trial, config.judge.concurrency
        mean = sum(trial.seconds.values()) / len(trial.seconds)
        text += f", {hours.judge:,.2f} h with {mean:.2f} s an answer (of {trial.at_once} at once) and {at_once} at once"
    elif heard.problem:
        text += f", seconds not measured ({heard.problem})"
    if hours.chips is not None:
        where = f"on {planned.chips} chips" if planned else "of the chips"
        text += f"; {'at least ' * hours.least}{hours.chips:,.2f} h {where}{' at their peak' * hours.least}"
    whole = hours.total(bool(config.pipeline.depth))
    if limits.max_hours and whole is not None and whole > limits.max_hours:
        found = f"{whole:,.2f} h are more than --max_hours ({limits.max_hours:g}): {text}"
        return Finding(TIME, FAULT, found, _faster(config, hours, heard))
    return Finding(TIME, OK, text)


def _faster(config: ConfigDict, hours: Hours, heard: Heard) -> str:
    """What to do about the hours, by what takes most of them."""
    if hours.judge is None or (hours.chips or 0.0) > hours.judge:
        return "take more chips or fewer steps (stages.rl.steps), or allow more"
    if config.judge.rpm or config.judge.tpm:
        with_limits = cost.seconds_of_step(config, heard.trial.seconds, heard.trial.servers)
        free = config.copy_and_resolve_references()
        with free.unlocked():
            free.judge.rpm = free.judge.tpm = 0
        if cost.seconds_of_step(free, heard.trial.seconds, heard.trial.servers) < with_limits:
            return "judge.rpm or judge.tpm bounds it: have them raised, or name more endpoints"
    return "raise judge.concurrency, add servers, or ask less (judge.ask, stages.rl.steps)"


def _money(
    config: ConfigDict, total: Amount, heard: Heard, hours: Hours, planned: Slice | None, limits: Limits
) -> Finding:
    judge, texts, sums = config.judge, [], []
    expected = most = total.cost(judge)
    if heard.trial is not None and heard.trial.asked:
        usage, share = heard.trial.usage, total.calls / heard.trial.asked
        expected = Amount(0, int(usage.tokens_in * share), int(usage.tokens_out * share)).cost(judge)
    if total.calls:
        texts.append(f"judge at most {total.tokens_in:,} tokens in and {total.tokens_out:,} out")
        if most:
            texts[-1] += f", {most:,.2f}"
            if heard.trial is not None:
                texts[-1] += f", about {expected:,.2f} if captions are as long as references"
            sums.append(expected)
        else:
            texts[-1] += " (--judge_price=IN,OUT for a sum)"
    chip_hours = hours.total(bool(config.pipeline.depth))
    if chip_hours is not None:
        chips, least = (planned.chips if planned else 1), "at least " * hours.least
        texts.append(f"{least}{chip_hours * chips:,.2f} chip-hours" + ("" if planned else " for each chip"))
        if limits.chip_hour_price:
            sums.append(chip_hours * chips * limits.chip_hour_price)
            texts[-1] += f", {sums[-1]:,.2f}"
    text = "; ".join(texts) or "the judge costs nothing; chip-hours are known with --topology or --step_seconds"
    if judge.max_cost and expected > judge.max_cost:
        found = f"the judge will cost about {expected:,.2f}, and the run stops at judge.max_cost ({judge.max_cost:g})"
        remedy = "raise it, lower stages.rl.steps, or ask less (judge.ask)"
        return Finding(MONEY, FAULT, f"{found}: {text}", remedy)
    if limits.budget and sum(sums) > limits.budget:
        found = f"{sum(sums):,.2f} are more than --budget ({limits.budget:g}): {text}"
        return Finding(MONEY, FAULT, found, "lower stages.rl.steps, ask less (judge.ask), or allow more")
    return Finding(MONEY, OK, text)
