"""The ledger of what judging costs, and its limits: money, and failures in a row."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_object, write_text
from balcap_jax.judges.schema import Judge, Usage
from balcap_jax.parallel import distributed

LEDGER = "judge.json"
_COUNTS = ("calls", "cached", "tokens_in", "tokens_out")
_NOTHING = dict.fromkeys((*_COUNTS, "cost"), 0)
_SHOWN = 3  # reasons of failures that an error names
_CHECKED_CALLS = 32  # a share of fewer questions shows little
MILLION = 1e6


class Spending:
    """The ledger of a run: what its judge took in all processes and over all restarts, in the file `path`.

    The file is written after each step, not with the checkpoints: steps that a killed run makes again were paid for
    too. All processes make one ledger and call its methods at the same places. A judge that asks nobody (the oracle)
    has none. Of `judge` only `usage()` is called; `reasons` covers the last `window` steps.

    Raises UserError when the file is unreadable, or when judge.max_cost has been reached already.
    """

    def __init__(self, judge: Judge, config: Mapping[str, Any], path: Path, window: int = 1):
        self._judge, self._config, self._path = judge, config, path
        self._counts = config["name"] != "oracle"
        self._seen = Usage()  # of this process, at the last update
        self._checked = judge.usage()  # of this process, when `exhausted` looked last
        self._since = Usage()  # of all processes, since the last step
        self._failures: collections.deque[collections.Counter] = collections.deque(maxlen=window)
        self.totals: dict[str, float] = dict(_NOTHING)
        if self._counts:
            self.totals = distributed.from_first(self._read() if distributed.is_first() else None)
            if self.spent:
                raise UserError(f"{self._path}: {self.limit_text()}; raise it to go on")

    @property
    def spent(self) -> bool:
        """Whether judge.max_cost has been reached."""
        return bool(self._config["max_cost"]) and self.totals["cost"] >= self._config["max_cost"]

    def update(self) -> None:
        """Adds what the judge took since the last update, and writes the ledger."""
        if not self._counts:
            return
        now = self._judge.usage()
        added = sum(distributed.all_gather(now - self._seen), Usage())
        self._seen, self._since = now, self._since + added
        for name in _COUNTS:
            self.totals[name] += getattr(added, name)
        self.totals["cost"] += self._cost(added)
        if distributed.is_first():
            write_text(self._path, json_text.dumps(self.totals, indent=2) + "\n")

    def step(self) -> dict[str, float]:
        """Updates, and returns the metrics of what the judge took since the last step, evaluations included."""
        if not self._counts:
            return {}
        self.update()
        since, self._since = self._since, Usage()
        self._failures.append(since.failures)
        return {
            "judge/calls": since.calls,
            "judge/cache_hit_rate": since.cached / since.calls if since.calls else 0.0,
            "judge/tokens_in": since.tokens_in,
            "judge/tokens_out": since.tokens_out,
            "judge/cost": self._cost(since),
            "judge/cost_total": self.totals["cost"],
        }

    def _cost(self, usage: Usage) -> float:
        return (usage.tokens_in * self._config["price_in"] + usage.tokens_out * self._config["price_out"]) / MILLION

    def reasons(self) -> str:
        """ " (most often ...)": where and why calls of the last steps failed; "" where no reason is known."""
        return _most_often(sum(self._failures, collections.Counter()))

    def exhausted(self) -> str:
        """Which failures are too many, and why, in one line, else "": a dead judge makes a failure of all that is left.

        The share of this process's questions that failed may be judge.max_failure_rate at most, each time at least 32
        have been asked since the last look.
        """
        usage = self._judge.usage()
        since = usage - self._checked
        if since.calls < _CHECKED_CALLS:
            return ""
        self._checked, rate = usage, self._config["max_failure_rate"]
        if since.failures.total() <= rate * since.calls:
            return ""
        return (
            f"{since.failures.total()} of {since.calls} questions to the judge failed{_most_often(since.failures)}, "
            f"more than judge.max_failure_rate = {rate:g} allows"
        )

    def stop_text(self, step: int) -> str:
        return f"stopped at step {step}: {self.limit_text()}; the run is saved, raise it and run the same command again"

    def limit_text(self) -> str:
        return f"the judge has cost {self.totals['cost']:.4g}, and judge.max_cost is {self._config['max_cost']:g}"

    def _read(self) -> dict[str, float]:
        remedy = "delete it to begin to count anew"
        try:
            ledger = read_json_object(self._path, remedy)
        except FileNotFoundError:
            return dict(_NOTHING)
        if not all(_is_amount(ledger.get(name)) for name in _NOTHING):
            raise UserError(f"{self._path} is no ledger of a judge; {remedy}")
        return {name: ledger[name] for name in _NOTHING}


def _most_often(failures: collections.Counter) -> str:
    reasons = "; ".join(f"{number} x {reason}" for reason, number in failures.most_common(_SHOWN))
    return f" (most often {reasons})" if reasons else ""


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e18
