"""Estimates what a run's judging costs, in calls, tokens and money, before the run begins."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from balcap_jax.config.schema import parse_shares
from balcap_jax.judges import prompts
from balcap_jax.judges.budget import MILLION

_CHARACTERS_PER_TOKEN = 4
_ASSERTION_TOKENS, _TOKENS_PER_ASSERTION = 50, 10  # of an assertion in the answer, and of the caption for each
_LISTED = {"recall": 20, "rubric": 8}  # units of a reference, criteria of a rubric
_LISTED_TOKENS, _VERDICT_TOKENS = 45, 35  # of one of these in its block, and of the verdict on it
_MARKS_TOKENS = 80
_PIXELS_PER_TOKEN = 28 * 28
_QUESTIONS = 5  # of a picture, where each question is asked
_ORDERS = 2  # in which an evaluation compares a caption with the reference
_LEAST = 2  # captions of a group that a question is asked about: their scores are compared
_QUESTION_TOKENS, _LETTER_TOKENS = 150, 10  # of a question with its options, and of the answer


def captions_of(config: Mapping[str, Any], order: tuple[str, ...]) -> int:
    """The number of captions that a run judges: all samples of rl, and those of all evaluations."""
    rl = config["stages"]["rl"]
    trained = rl["steps"] * rl["batch_size"] * config["rollout"]["group_size"] if "rl" in order else 0
    return trained + _evaluated(config, order)


def _evaluated(config: Mapping[str, Any], order: tuple[str, ...]) -> int:
    evaluations = set()
    for index, stage in enumerate(order):
        if stage == "rl":
            evaluations.add(order[index - 1] if index else "base")
        if stage in ("sft", "rl"):
            every, steps = config["stages"][stage]["eval_every"], config["stages"][stage]["steps"]
            evaluations.add(stage)
            evaluations |= {f"{stage}-{step}" for step in range(every, steps, every)} if every else set()
    images = config["log"]["eval_images"]
    if config["data"]["name"] == "scenes":  # How many test pictures others have is known once they are read.
        images = min(images, config["data"]["test_size"])
    captions = len(evaluations) * images * (config["log"]["eval_samples"] + 1)
    if config["checkpoint"]["best_metric"]:  # One greedy caption of each picture every time.
        rl = config["stages"]["rl"]
        captions += -(-rl["steps"] // rl["eval_every"]) * config["log"]["eval_images"]
    return captions


def calls_of_step(config: Mapping[str, Any], method: str) -> int:
    """Questions by a `method` of the judge in one step of rl, without those that judge.ask leaves out."""
    group, batch = config["rollout"]["group_size"], config["stages"]["rl"]["batch_size"]
    share = parse_shares(config["judge"]["ask"]).get(method, 1.0)
    asked = asked_of(group, share)
    return batch * asked * _repeated(config, method, asked)


def _repeated(config: Mapping[str, Any], method: str, group: int) -> int:
    """Questions about one caption of a group of so many."""
    if method == "choice":
        return config["rewards"]["draws"] or _QUESTIONS
    return min(config["rewards"]["opponents"], group - 1) if method == "preference" else 1


def asked_of(group: int, share: float) -> int:
    """How many captions of a group are asked about: the share, rounded, and at least two."""
    return min(group, max(_LEAST, int(share * group + 0.5)))


def tokens_of(prompt: str, caption_tokens: int, image_tokens: int, most: int) -> tuple[int, int]:
    """About the tokens of one question and of its answer, which has at most `most`."""
    more = {"recall": {"units": []}, "rubric": {"criteria": []}, "choice": {"question": "", "options": []}}
    texts = {"first": "", "second": ""} if prompt == "preference" else {"caption": ""} | more.get(prompt, {})
    fixed = sum(len(message["content"]) for message in prompts.render(prompt, **texts)) // _CHARACTERS_PER_TOKEN
    length, listed = fixed + caption_tokens, _LISTED.get(prompt, 0)
    if prompt == "precision":
        length, answer = length + image_tokens, _ASSERTION_TOKENS * -(-caption_tokens // _TOKENS_PER_ASSERTION)
    elif prompt == "preference":
        length, answer = length + image_tokens + caption_tokens, _MARKS_TOKENS
    elif prompt == "choice":
        length, answer = length + _QUESTION_TOKENS, _LETTER_TOKENS
    else:
        length, answer = length + listed * _LISTED_TOKENS, listed * _VERDICT_TOKENS or _MARKS_TOKENS
    return length, min(answer, most)


class Amount(NamedTuple):
    """What the questions by one method of the judge come to in a whole run."""

    calls: int
    tokens_in: int
    tokens_out: int

    def cost(self, judge: Mapping[str, Any]) -> float:
        """By the prices of the config group `judge`."""
        return (self.tokens_in * judge["price_in"] + self.tokens_out * judge["price_out"]) / MILLION


def amounts(config: Mapping[str, Any], order: tuple[str, ...], methods: tuple[str, ...]) -> dict[str, Amount]:
    """{method: about what it takes} in the config's whole run, if captions have the greatest length and none is cached.

    methods: those of the judge that the reward asks.
    """
    length, image_tokens, found = config["rollout"]["max_tokens"], image_tokens_of(config), {}
    steps = config["stages"]["rl"]["steps"] if "rl" in order else 0
    for method in methods:
        each = tokens_of(method, length, image_tokens, config["judge"]["max_tokens"])
        in_evaluations = _ORDERS if method == "preference" else _repeated(config, method, captions_of(config, order))
        calls = steps * calls_of_step(config, method) + _evaluated(config, order) * in_evaluations
        found[method] = Amount(calls, calls * each[0], calls * each[1])
    return found


def total(parts: Mapping[str, Amount]) -> Amount:
    """The sum of all methods."""
    return Amount(*(sum(part[i] for part in parts.values()) for i in range(len(Amount._fields))))


def estimate(config: Mapping[str, Any], order: tuple[str, ...], methods: tuple[str, ...]) -> str:
    """The table of `amounts`, with their cost."""
    judge = config["judge"]
    if judge["name"] != "remote":
        return f"the judge {judge['name']!r} asks no endpoint: nothing to pay, no cost"
    steps = config["stages"]["rl"]["steps"] if "rl" in order else 0
    parts = amounts(config, order, methods)
    rows = [(prompts.name_of(method), *amount) for method, amount in parts.items()]
    captions, length = captions_of(config, order), config["rollout"]["max_tokens"]
    lines = [
        f"{captions:,} captions to judge; about, if each has rollout.max_tokens ({length}) and none is cached:",
        f"{'prompt':14}{'calls':>14}{'tokens in':>18}{'tokens out':>18}",
        *(f"{name:14}{a:14,}{b:18,}{c:18,}" for name, a, b, c in [*rows, ("total", *total(parts))]),
    ]
    if judge["price_in"] or judge["price_out"]:
        prices = f"{judge['price_in']:g} in, {judge['price_out']:g} out per million tokens"
        lines.append(f"{'cost':14}{total(parts).cost(judge):14,.2f}    at {prices}")
    else:
        lines.append("cost: set judge.price_in and judge.price_out (per million tokens)")
    if steps:
        asked = sum(calls_of_step(config, prompt) for prompt in methods)
        lines.append(f"a step of rl asks {asked:,} questions, {judge['concurrency']} at once (judge.concurrency)")
    if not judge["endpoints"].strip():
        lines.append("seconds: name the servers in judge.endpoints, and a few questions to them are timed")
    return "\n".join(lines)


def image_tokens_of(config: Mapping[str, Any]) -> int:
    """About the tokens of the largest picture that the judge is shown."""
    pixels = config["model"]["image_size"] ** 2 if config["data"]["name"] == "scenes" else config["data"]["max_pixels"]
    return -(-pixels // _PIXELS_PER_TOKEN) + 8


def seconds_of_step(config: Mapping[str, Any], seconds: Mapping[str, float], servers: int) -> float:
    """How long the questions of one step of rl take, if `seconds` {method} are those of an answer.

    judge.concurrency are under way at once, and no more are begun than judge.rpm and judge.tpm let `servers` have.
    """
    judge, calls = config["judge"], {method: calls_of_step(config, method) for method in seconds}
    questions = sum(calls.values())
    work = sum(calls[method] * seconds[method] for method in seconds)
    times = [work / min(judge["concurrency"], questions), *seconds.values()]
    if judge["rpm"]:
        times.append(60 * questions / (judge["rpm"] * servers))
    if judge["tpm"]:
        length, image = config["rollout"]["max_tokens"], image_tokens_of(config)
        tokens = sum(calls[method] * sum(tokens_of(method, length, image, judge["max_tokens"])) for method in seconds)
        times.append(60 * tokens / (judge["tpm"] * servers))
    return max(times)


TARGETS = (30, 60, 120, 300)  # seconds of a rollout that judging might hide behind


def sizing(
    config: Mapping[str, Any], seconds: Mapping[str, float], at_once: int, servers: int, rollout: float = 0.0
) -> str:
    """How long judging takes, and what would hide it: a table.

    seconds: {method of the judge: seconds of an answer}, as measured with `at_once` questions under way at `servers`.
    rollout: seconds of a step's rollout, 0 = not known.

    By Little's law, questions a second = questions under way / seconds of an answer. It holds while a server has no
    more under way than it had in the trial; a server that can have more does more.
    """
    calls = {method: calls_of_step(config, method) for method in seconds}
    asked, work = sum(calls.values()), sum(calls[method] * seconds[method] for method in seconds)
    rl, concurrency = config["stages"]["rl"], config["judge"]["concurrency"]
    step = seconds_of_step(config, seconds, servers)
    width = max(map(len, seconds))
    lines = [
        f"{'question':{width}}  seconds of an answer   a step asks",
        *(f"{method:{width}}{seconds[method]:22.2f}{calls[method]:14,}" for method in seconds),
        f"a step's {asked:,} questions, {min(concurrency, asked)} at once: about {step:,.1f} s; "
        f"the run's {rl['steps']:,} steps: {step * rl['steps'] / 3600:,.1f} h",
    ]
    if at_once < min(concurrency, asked):
        lines.append(f"that is if {concurrency} at once are answered as fast as the {at_once} of this trial")
    lines.append("to judge a step while the next one is sampled (pipeline.depth=1):")
    lines.append(f"{'rollout, s':>12}{'judge.concurrency':>20}{'servers like these':>20}")
    per_server = at_once / servers
    for target in sorted({*TARGETS, *((rollout,) if rollout else ())}):
        needed = math.ceil(work / target)
        lines.append(f"{target:12g}{needed:20,}{math.ceil(needed / per_server):20,}")
    lines.append(
        f"servers: each with {per_server:g} questions under way, as here; if more at once are no slower, fewer do "
        "(raise judge.concurrency and ask again)"
    )
    return "\n".join(lines)
