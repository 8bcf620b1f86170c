"""A reward of a user's own: its exceptions, and scores of another form than a reward's, are errors of one line."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from balcap_jax.cli import json_text
from balcap_jax.cli.errors import UserError, raised, shown
from balcap_jax.judges import schema
from balcap_jax.rewards.base import Samples, Scores, without_nonfinite

_METHODS = ("precision", "recall", "linguistic", "choice", "rubric", "preference", "mixed")
_ASSERTION = schema.Assertion(text="a", verified=True, pointable=True)
# Answers that a judge might give, for a call whose scores nobody uses.
_ANSWERS: dict[str, Callable[[Any], Any]] = {
    "precision": lambda _: schema.PrecisionVerdict(assertions=[_ASSERTION]),
    "recall": lambda question: schema.RecallVerdict(covered=[True] * len(question.units)),
    "linguistic": lambda _: schema.LinguisticVerdict(clarity=3, fluency=3, coherency=3),
    "choice": lambda question: schema.ChoiceVerdict(answer=question.options[0][0]),
    "rubric": lambda question: schema.RubricVerdict(passed=[True] * len(question.criteria)),
    "preference": lambda _: schema.PreferenceVerdict(winner=1),
}
_FORM = "see balcap_jax/rewards/base.py"


class OwnReward:
    """The reward `cls`, which `rewards.name` names; every call of it is checked.

    Raises UserError, which names `rewards.name`, where the class cannot be made or called, or gives another form of
    scores. A valid score that is no finite float32 becomes a missing value.
    """

    def __init__(self, name: str, cls: type, judge: schema.Judge, settings: Mapping[str, Any]):
        self._where = f"config field 'rewards.name' is {name!r}:"
        self._judge = _Judge(judge)
        self._file = None
        with self._one_line("making it"):
            self._file = getattr(sys.modules.get(cls.__module__), "__file__", None)
            self.names, self.gated, self.needs, self.asks = cls.names, cls.gated, cls.needs, cls.asks
            self._reward = cls(self._judge, settings)

    def __call__(self, samples: Samples) -> Scores:
        # A reward that computes with JAX may transfer between host and device.
        with self._one_line("a call of it"), jax.transfer_guard("allow"):
            # The result may be objects of its own, which raise only when they are read.
            checked = self._checked(self._reward(samples), (*samples.shape, len(self.names)))
        return without_nonfinite(checked, self.names)

    def try_out(self, samples: Samples) -> None:
        """Calls it once, with a stand-in for its judge, whose answers may cost money."""
        self._judge.stands_in = True
        try:
            self(samples)
        finally:
            self._judge.stands_in = False

    def _checked(self, scores: Any, shape: tuple[int, int, int]) -> Scores:
        if not isinstance(scores, Scores):
            raise self._wrong(f"a call of it must return Scores with rewards of shape {_text(shape)}", scores)
        for field, kinds, what in (("rewards", "fiub", "numbers"), ("valid", "b", "bools")):
            array = getattr(scores, field)
            if type(array) is not np.ndarray or array.dtype.kind not in kinds or array.shape != shape:
                raise self._wrong(f"Scores.{field} must be a NumPy array of {what} of shape {_text(shape)}", array)
        detail, (prompts, group, _) = scores.detail, shape
        if not _is_list(detail, prompts) or not all(_is_list(entries, group) for entries in detail):
            raise self._wrong(f"Scores.detail must be {prompts} lists of {group} dicts each", detail)
        for b, entries in enumerate(detail):
            for g, entry in enumerate(entries):
                if not isinstance(entry, Mapping) or not isinstance(entry.get("failures", {}), Mapping):
                    raise self._wrong(f"Scores.detail[{b}][{g}], and 'failures' in it, must be a dict", entry)
                try:
                    json_text.dumps(dict(entry))
                except (TypeError, ValueError, RecursionError) as error:
                    raise UserError(
                        f"{self._where} Scores.detail[{b}][{g}] must hold what JSON can ({error}); convert it with "
                        f"float() or .tolist(), {_FORM}"
                    ) from error
        with np.errstate(over="ignore"):
            return Scores(scores.rewards.astype(np.float32), scores.valid, detail)

    def _wrong(self, rule: str, value: Any) -> UserError:
        return UserError(f"{self._where} {rule} (B examples, G captions, K objectives); got {_given(value)}; {_FORM}")

    @contextlib.contextmanager
    def _one_line(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # Whatever it raises, an exit too, is its author's to fix.
            frames = traceback.extract_tb(error.__traceback__)
            last = ([frame for frame in frames if frame.filename == self._file] or frames)[-1]
            where = f"{last.filename}, line {last.lineno}"
            raise UserError(f"{self._where} {what} raised {raised(error)} ({where})") from error


class _Judge:
    """`judge`; while it `stands_in`, questions are answered here and reach nobody."""

    def __init__(self, judge: schema.Judge):
        self._judge, self.stands_in = judge, False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._judge, name)
        if name not in _METHODS:
            return value
        return lambda batch: [_ANSWERS[each.method](each) for each in batch] if self.stands_in else value(batch)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _given(value: Any) -> str:
    """Type and shape of a value, such as "ndarray (float32) of shape [2, 3]"."""
    kind = type(value).__name__ + (f" ({shown(value.dtype, str)})" if hasattr(value, "dtype") else "")
    try:
        shape = np.shape(value)
    except Exception as error:  # Its own `__array__` may raise anything, as that of a tensor on a device does.
        ragged = isinstance(error, ValueError) and isinstance(value, list | tuple)
        return f"{kind} of {len(value)} parts of different lengths" if ragged else kind
    return f"{kind} of shape {_text(shape)}" if shape else kind
