"""Estimates what a run's judging costs, in calls, tokens and money, before the run begins."""

from collections.abc import Mapping
from typing import Any

from balcap_jax.judges import prompts
from balcap_jax.judges.budget import MILLION

_CHARACTERS_PER_TOKEN = 4
_ASSERTION_TOKENS, _TOKENS_PER_ASSERTION = 50, 10  # of an assertion in the answer, and of the caption for each
_LISTED = {"recall": 20, "rubric": 8}  # units of a reference, criteria of a rubric
_LISTED_TOKENS, _VERDICT_TOKENS = 45, 35  # of one of these in its block, and of the verdict on it
_MARKS_TOKENS = 80
_PIXELS_PER_TOKEN = 28 * 28
_QUESTIONS = 5  # of a picture, where each question is asked
_QUESTION_TOKENS, _LETTER_TOKENS = 150, 10  # of a question with its options, and of the answer


def captions_of(config: Mapping[str, Any], order: tuple[str, ...]) -> int:
    """The number of captions that a run judges: all samples of rl, and those of all evaluations."""
    rl = config["stages"]["rl"]
    trained = rl["steps"] * rl["batch_size"] * config["rollout"]["group_size"] if "rl" in order else 0
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
    captions = trained + len(evaluations) * images * (config["log"]["eval_samples"] + 1)
    if config["checkpoint"]["best_metric"]:  # One greedy caption of each picture every time.
        captions += -(-rl["steps"] // rl["eval_every"]) * config["log"]["eval_images"]
    return captions


def tokens_of(prompt: str, caption_tokens: int, image_tokens: int, most: int) -> tuple[int, int]:
    """About the tokens of one question and of its answer, which has at most `most`."""
    more = {"recall": {"units": []}, "rubric": {"criteria": []}, "choice": {"question": "", "options": []}}
    texts = {"caption": ""} | more.get(prompt, {})
    fixed = sum(len(message["content"]) for message in prompts.render(prompt, **texts)) // _CHARACTERS_PER_TOKEN
    length, listed = fixed + caption_tokens, _LISTED.get(prompt, 0)
    if prompt == "precision":
        length, answer = length + image_tokens, _ASSERTION_TOKENS * -(-caption_tokens // _TOKENS_PER_ASSERTION)
    elif prompt == "choice":
        length, answer = length + _QUESTION_TOKENS, _LETTER_TOKENS
    else:
        length, answer = length + listed * _LISTED_TOKENS, listed * _VERDICT_TOKENS or _MARKS_TOKENS
    return length, min(answer, most)


def estimate(config: Mapping[str, Any], order: tuple[str, ...], methods: tuple[str, ...]) -> str:
    """A table of calls, tokens and cost of the config's whole run, whose reward asks the judge's `methods`.

    It assumes captions of the greatest length, and an empty cache.
    """
    judge = config["judge"]
    if judge["name"] != "remote":
        return f"the judge {judge['name']!r} asks no endpoint: nothing to pay, no cost"
    captions, length = captions_of(config, order), config["rollout"]["max_tokens"]
    pixels = config["model"]["image_size"] ** 2 if config["data"]["name"] == "scenes" else config["data"]["max_pixels"]
    image_tokens = -(-pixels // _PIXELS_PER_TOKEN) + 8
    rows, sums = [], [0, 0, 0]
    for prompt in methods:
        each = tokens_of(prompt, length, image_tokens, judge["max_tokens"])
        calls = captions * ((config["rewards"]["draws"] or _QUESTIONS) if prompt == "choice" else 1)
        row = [calls, calls * each[0], calls * each[1]]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        rows.append((prompts.name_of(prompt), *row))
    cost = (sums[1] * judge["price_in"] + sums[2] * judge["price_out"]) / MILLION
    lines = [
        f"{captions:,} captions to judge; about, if each has rollout.max_tokens ({length}) and none is cached:",
        f"{'prompt':14}{'calls':>14}{'tokens in':>18}{'tokens out':>18}",
        *(f"{name:14}{a:14,}{b:18,}{c:18,}" for name, a, b, c in [*rows, ("total", *sums)]),
    ]
    if judge["price_in"] or judge["price_out"]:
        prices = f"{judge['price_in']:g} in, {judge['price_out']:g} out per million tokens"
        lines.append(f"{'cost':14}{cost:14,.2f}    at {prices}")
    else:
        lines.append("cost: set judge.price_in and judge.price_out (per million tokens)")
    return "\n".join(lines)
