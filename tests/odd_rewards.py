"""Rewards that go wrong as people's own do: `rewards.name` is odd_rewards:NAME."""

import asyncio

import numpy as np

from balcap_jax.judges.schema import ChoiceQuestion, LinguisticQuestion, PrecisionQuestion, RecallQuestion
from balcap_jax.rewards.base import Scores, ask_kinds


class Good:
    """Numbers of many kinds are taken; what is not valid may hold anything."""

    names, gated, needs, asks = ("mine", "yours"), (False, True), ("reference",), ()
    dtype = np.float32

    def __init__(self, judge, settings):
        self.judge = judge

    def rewards(self, shape):
        return np.arange(np.prod(shape)).reshape(shape).astype(self.dtype)

    def valid(self, shape):
        return np.ones(shape, bool)

    def detail(self, shape):
        return [[{"note": "so"} for _ in range(shape[1])] for _ in range(shape[0])]

    def __call__(self, samples):
        shape = (*samples.shape, 2)
        return Scores(self.rewards(shape), self.valid(shape), self.detail(shape))


class Float64(Good):
    dtype = np.float64


class Int8(Good):
    dtype = np.int8


class Bool(Good):
    dtype = bool


class AllNaN(Good):
    def rewards(self, shape):
        return np.full(shape, np.nan, np.float32)


class OneEach(Good):
    """NaN, infinities and what float32 cannot hold; the last one is marked as missing."""

    def rewards(self, shape):
        rewards = np.ones(shape)
        rewards.flat[:5] = np.nan, np.inf, -np.inf, 1e300, np.nan
        return rewards

    def valid(self, shape):
        valid = np.ones(shape, bool)
        valid.flat[4] = False
        return valid

    def detail(self, shape):
        return [[{"score": float("nan"), "rewards": 3, "words": "?"} for _ in range(shape[1])] for _ in range(shape[0])]


class OneForAll(Good):
    def rewards(self, shape):
        return np.ones((1, 1, 1), np.float32)


class OnePerPrompt(Good):
    def rewards(self, shape):
        return np.ones((shape[0], 1, shape[2]), np.float32)


class Flat(Good):
    def rewards(self, shape):
        return np.ones(np.prod(shape), np.float32)


class NoK(Good):
    def rewards(self, shape):
        return np.ones(shape[:2], np.float32)


class GroupsFirst(Good):
    def rewards(self, shape):
        return np.ones(shape, np.float32).swapaxes(0, 1)


class Lists(Good):
    def rewards(self, shape):
        return np.ones(shape).tolist()


class Ragged(Good):
    def rewards(self, shape):
        return [[1.0], [1.0, 2.0]]


class Objects(Good):
    def rewards(self, shape):
        return np.full(shape, None)


class Complex(Good):
    dtype = np.complex64


class Masked(Good):
    def rewards(self, shape):
        return np.ma.masked_array(np.ones(shape), np.ones(shape, bool))


class NoRewards(Good):
    def rewards(self, shape):
        return None


class NumbersValid(Good):
    def valid(self, shape):
        return np.ones(shape)


class FlatValid(Good):
    def valid(self, shape):
        return np.ones(shape[:2], bool)


class NoDetail(Good):
    def detail(self, shape):
        return None


class ShortDetail(Good):
    def detail(self, shape):
        return super().detail(shape)[:1]


class FlatDetail(Good):
    def detail(self, shape):
        return [{}] * (shape[0] * shape[1])


class TextDetail(Good):
    def detail(self, shape):
        return [["fine"] * shape[1]] * shape[0]


class NumpyDetail(Good):
    def detail(self, shape):
        return [[{"score": np.float32(0.5)} for _ in range(shape[1])] for _ in range(shape[0])]


class ReturnsNone(Good):
    def __call__(self, samples):
        return None


class ReturnsArray(Good):
    def __call__(self, samples):
        return self.rewards((*samples.shape, 2))


class ReturnsTuple(Good):
    def __call__(self, samples):
        return self.rewards((*samples.shape, 2)), None, None


class Raises(Good):
    def rewards(self, shape):
        raise KeyError("reference")


class Exits(Good):
    def rewards(self, shape):
        raise SystemExit(0)


class Recurses(Good):
    def rewards(self, shape):
        return self.rewards(shape)


class OnDevice:
    """As a tensor on a device is: no array can be made of it."""

    dtype = "torch.float32"

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class ReturnsTensor(Good):
    def __call__(self, samples):
        return OnDevice()


class Tensors(Good):
    def rewards(self, shape):
        return OnDevice()


class TensorsListed(Good):
    def rewards(self, shape):
        return [OnDevice(), OnDevice()]


class Unshown(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class RaisesUnshown(Good):
    def rewards(self, shape):
        raise Unshown


class Cancels(Good):
    def rewards(self, shape):
        raise asyncio.CancelledError


class Closes(Good):
    def rewards(self, shape):
        raise GeneratorExit


class OwnBase(BaseException):
    pass


class RaisesBase(Good):
    def rewards(self, shape):
        raise OwnBase("mine")


class RaisesBaseInMaking(Good):
    def __init__(self, judge, settings):
        raise OwnBase("made")


class OddDetail(Good):
    def detail(self, shape):
        class Rows(list):
            def __len__(self):
                raise OwnBase("no length")

        return Rows()


class ListNames(Good):
    names = (["a"], "b")


class NumberNames(Good):
    names, gated = (1,), (True,)


class NumberAsks(Good):
    asks = (5,)


class NumberNeeds(Good):
    needs = ("reference", None)


class TextGated(Good):
    names, gated = ("mine",), ("no",)


class _NoNames(type):
    @property
    def names(cls):
        raise Unshown


class RaisingNames(metaclass=_NoNames):
    def __call__(self, samples):
        return None


class UsesLength(Good):
    names = ("mine", "length")


def __getattr__(name):
    raise OwnBase if name == "Absent" else AttributeError(name)


class NoArguments(Good):
    def __init__(self):
        pass


class GoesWrongLater(Good):
    calls = 0

    def rewards(self, shape):
        self.calls += 1
        return super().rewards(shape if self.calls < 3 else shape[:2])


class Asks(Good):
    """Asks its judge all that there is, in its ways."""

    asks = ("precision", "recall", "linguistic", "choice")

    def __call__(self, samples):
        captions = [samples.captions[b][g] for b, g in samples.where]
        precision, recall = ask_kinds(
            self.judge,
            precision=[PrecisionQuestion(text, None, {}) for text in captions],
            recall=[RecallQuestion(text, ["a", "b"]) for text in captions],
        )
        marks = self.judge.linguistic([LinguisticQuestion(text) for text in captions])
        letters = self.judge.choice([ChoiceQuestion(text, "?", (("A", "a"), ("B", "b"))) for text in captions])
        assert len(precision[0].assertions) == 1
        assert (len(recall[0].covered), letters[0].answer) == (2, "A")
        rewards = np.array([one.clarity / 5 for one in marks]).reshape(*samples.shape, 1)
        shape = (*samples.shape, 2)
        return Scores(np.concatenate([rewards, rewards], -1), self.valid(shape), self.detail(shape))
