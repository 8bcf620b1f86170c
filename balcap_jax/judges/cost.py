"""What judging costs: tokens and money by step and in total, and an estimate before a run begins."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balcap_jax import distributed, json_text
from balcap_jax.errors import UserError
from balcap_jax.evals.held_out import write_text
from balcap_jax.judges import prompts
from balcap_jax.judges.schema import Judge, Usage

LEDGER = "judge.json"
_COUNTS = ("calls", "cached", "tokens_in", "tokens_out")
_SHOWN = 3  # reasons of failures that an error names
_LOOKED_AT = 32  # questions; of fewer the share says little
_MILLION = 1e6


class Spending:
    """The ledger of a run: what its judge took in all processes and over all restarts, in the file `path`.

    The file is written after each step, not with the checkpoints: what was paid for steps that a killed run makes once
    more was paid all the same. All processes make one and call its methods at the same places. A judge that asks
    nobody (the oracle) has no ledger. Of `judge` only `usage()` is called; `window` updates are kept for `reasons`.

    Raises UserError when the file is unreadable, or when judge.max_cost has been reached already.
    """

    def __init__(self, judge: Judge, config: Mapping[str, Any], path: Path, window: int = 1):
        self._judge, self._config, self._path = judge, config, path
        self._counts = config["name"] != "oracle"
        self._seen = Usage()  # of this process, at the last update
        self._since = Usage()  # of all processes, since the last step
        self._cost_since = 0.0
        self._failures: collections.deque[collections.Counter] = collections.deque(maxlen=window)
        self.totals: dict[str, float] = dict.fromkeys((*_COUNTS, "cost"), 0)
        if self._counts:
            self.totals = distributed.from_first(self._read() if distributed.is_first() else None)
            if self.spent:
                raise UserError(f"{self._path}: {self.limit_text()}; raise it to go on")

    @property
    def spent(self) -> bool:
        """Whether judge.max_cost has been reached."""
        return bool(self._config["max_cost"]) and self.totals["cost"] >= self._config["max_cost"]

    def update(self) -> None:
        """Adds what has been asked since the last update, and writes the ledger."""
        if not self._counts:
            return
        now = self._judge.usage()
        more = [getattr(now, name) - getattr(self._seen, name) for name in _COUNTS]
        mine = Usage(*more, now.failures - self._seen.failures)
        self._seen = now
        added = sum(distributed.all_gather(mine), Usage())
        cost = (added.tokens_in * self._config["price_in"] + added.tokens_out * self._config["price_out"]) / _MILLION
        self._since, self._cost_since = self._since + added, self._cost_since + cost
        for name in _COUNTS:
            self.totals[name] += getattr(added, name)
        self.totals["cost"] += cost
        if distributed.is_first():
            write_text(self._path, json_text.dumps(self.totals, indent=2) + "\n")

    def step(self) -> dict[str, float]:
        """`update`, and the metrics of what was asked since the last step, evaluations in between included."""
        if not self._counts:
            return {}
        self.update()
        since, cost = self._since, self._cost_since
        self._since, self._cost_since = Usage(), 0.0
        self._failures.append(since.failures)
        return {
            "judge/calls": since.calls,
            "judge/cache_hit_rate": since.cached / since.calls if since.calls else 0.0,
            "judge/tokens_in": since.tokens_in,
            "judge/tokens_out": since.tokens_out,
            "judge/cost": cost,
            "judge/cost_total": self.totals["cost"],
        }

    def reasons(self) -> str:
        """ " (most often ...)": where and why calls of the last steps failed; "" where nothing is known of it."""
        return _most_often(sum(self._failures, collections.Counter()))

    def stop_text(self, step: int) -> str:
        return f"stopped at step {step}: {self.limit_text()}; the run is saved, raise it and run the same command again"

    def limit_text(self) -> str:
        return f"the judge has cost {self.totals['cost']:.4g}, and judge.max_cost is {self._config['max_cost']:g}"

    def _read(self) -> dict[str, float]:
        remedy = "delete it to begin to count anew"
        try:
            ledger = json_text.read_object(self._path, remedy)
        except FileNotFoundError:
            return dict.fromkeys((*_COUNTS, "cost"), 0)
        if not all(_is_amount(ledger.get(name)) for name in (*_COUNTS, "cost")):
            raise UserError(f"{self._path} is no ledger of a judge; {remedy}")
        return {name: ledger[name] for name in (*_COUNTS, "cost")}


class Patience:
    """Whether a judge that was asked offline still answers: a dead one would make a failure of all that is left.

    Each time at least 32 questions have been asked since the last look, the share of them that failed may be
    `judge.max_failure_rate` at most.
    """

    def __init__(self, judge: Judge, config: Mapping[str, Any]):
        self._judge, self._rate = judge, config["max_failure_rate"]
        self._seen = judge.usage()

    def exhausted(self) -> str:
        """What failed and why, in one line, once too much has; else ""."""
        now = self._judge.usage()
        calls, failures = now.calls - self._seen.calls, now.failures - self._seen.failures
        if calls < _LOOKED_AT:
            return ""
        self._seen = now
        if failures.total() <= self._rate * calls:
            return ""
        return (
            f"{failures.total()} of {calls} questions to the judge failed{_most_often(failures)}, more than "
            f"judge.max_failure_rate = {self._rate:g} allows"
        )


def _most_often(failures: collections.Counter) -> str:
    shown = "; ".join(f"{number} x {reason}" for reason, number in failures.most_common(_SHOWN))
    return f" (most often {shown})" if shown else ""


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e18


# ---- before a run ---------------------------------------------------------------------------------------------------

_CHARACTERS_PER_TOKEN = 4
_ASSERTION_TOKENS, _TOKENS_PER_ASSERTION = 50, 10  # of an assertion in the answer, and of the caption for each
_LISTED = {"recall": 20, "rubric": 8}  # units of a reference, criteria of a rubric
_LISTED_TOKENS, _VERDICT_TOKENS = 45, 35  # of one of these in its block, and of what is said of it
_MARKS_TOKENS = 80
_PIXELS_PER_TOKEN = 28 * 28
_QUESTIONS = 5  # of a picture, where each of them is asked
_QUESTION_TOKENS, _LETTER_TOKENS = 150, 10  # of a question with its options, and of the answer


def captions_of(config: Mapping[str, Any], order: tuple[str, ...]) -> int:
    """Captions that a run has judged: all samples of rl, and those of all evaluations."""
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
    if prompt == "precision":
        answer = _ASSERTION_TOKENS * -(-caption_tokens // _TOKENS_PER_ASSERTION)
        return fixed + caption_tokens + image_tokens, min(answer, most)
    if prompt in _LISTED:
        listed = _LISTED[prompt]
        return fixed + caption_tokens + listed * _LISTED_TOKENS, min(listed * _VERDICT_TOKENS, most)
    if prompt == "choice":
        return fixed + caption_tokens + _QUESTION_TOKENS, min(_LETTER_TOKENS, most)
    return fixed + caption_tokens, min(_MARKS_TOKENS, most)


def estimate(config: Mapping[str, Any], order: tuple[str, ...], asked: tuple[str, ...]) -> str:
    """A table of calls, tokens and cost of the config's whole run, whose reward asks the prompts `asked`.

    Captions are taken to be as long as they may be, and nothing to be in the cache.
    """
    judge = config["judge"]
    if judge["name"] != "remote":
        return f"the judge {judge['name']!r} asks no endpoint: nothing to pay, no cost"
    captions, length = captions_of(config, order), config["rollout"]["max_tokens"]
    pixels = config["model"]["image_size"] ** 2 if config["data"]["name"] == "scenes" else config["data"]["max_pixels"]
    image_tokens = -(-pixels // _PIXELS_PER_TOKEN) + 8
    rows, sums = [], [0, 0, 0]
    for prompt in asked:
        each = tokens_of(prompt, length, image_tokens, judge["max_tokens"])
        calls = captions * ((config["rewards"]["draws"] or _QUESTIONS) if prompt == "choice" else 1)
        row = [calls, calls * each[0], calls * each[1]]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        rows.append((prompts.name_of(prompt), *row))
    cost = (sums[1] * judge["price_in"] + sums[2] * judge["price_out"]) / _MILLION
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
