"""Examples that cannot be read: who stands in for them in training, and that nobody does in evaluations."""

import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.data.images import ImageError
from balcap_jax.data.input import examples, make_dataset
from balcap_jax.data.readable import Readable
from balcap_jax.training.evaluation import held_out

LENGTH = 40


class Numbers(Readable):
    """Example i is {"index": i}; those of `bad` cannot be read. `asked` are the examples that were read for."""

    def __init__(self, bad, length: int = LENGTH):
        super().__init__()
        self.bad, self.length, self.asked = frozenset(bad), length, set()

    def __len__(self):
        return self.length

    prompts = ()

    def texts(self):
        return iter(())

    def name(self, at):
        return f"number {at}"

    def read(self, at):
        self.asked.add(at)
        if at in self.bad:
            raise ImageError("spoilt")
        return {"index": at}


def batches(source: Readable, count: int, *, rows=None, size: int = 8) -> list[list[int]]:
    iterator = make_dataset(source, batch_size=size, seed=5, rows=rows, threads=0, prefetch=0)
    return [np.asarray(next(iterator)["index"]).tolist() for _ in range(count)]


@pytest.mark.parametrize("bad", [range(0, LENGTH, 5), range(10, 16), [LENGTH - 1]])
def test_no_batch_holds_an_example_twice(bad):
    plain, source = batches(Numbers([]), 25), Numbers(bad)
    replaced = 0
    for whole, batch in zip(plain, batches(source, 25), strict=True):
        assert len(set(batch)) == 8
        assert not set(batch) & source.bad
        assert all(there == here for there, here in zip(whole, batch, strict=True) if there not in source.bad)
        replaced += sum(there in source.bad for there in whole)
    assert replaced == 5 * len(source.bad)  # 25 batches are five epochs.
    assert sorted(entry.image for entry in source._found) == sorted(f"number {at}" for at in bad)


def test_stand_ins_are_the_same_whoever_reads_the_rows_and_whatever_was_read_before():
    bad = range(0, LENGTH, 3)
    whole = batches(Numbers(bad), 20)
    left, right = (batches(Numbers(bad), 20, rows=rows) for rows in (range(3), range(3, 8)))
    assert [a + b for a, b in zip(left, right, strict=True)] == whole
    again = Numbers(bad)
    for at in range(LENGTH):
        again.itself(at)
    assert batches(again, 20) == whole


def test_where_few_can_be_read_a_batch_is_filled_all_the_same():
    assert {at for batch in batches(Numbers(range(1, LENGTH)), 5) for at in batch} == {0}


def test_evaluations_are_of_what_can_be_read(capsys):
    source = Numbers({1, 2, 6})
    assert [one["index"] for one in examples(source, 5)] == [0, 3, 4, 5, 7]
    assert [one["index"] for one in held_out(source, 5, "test")] == [0, 3, 4, 5, 7]
    assert capsys.readouterr().out == "", "as many as were asked for"
    assert max(source.asked) == 7, "more were read than are needed"
    few = Numbers({1, 2, 6}, 8)
    assert [one["index"] for one in held_out(few, 48, "test")] == [0, 3, 4, 5, 7]
    assert capsys.readouterr().out == "held out: 5 of 8 pictures of test can be read; evaluations are of these\n"
    assert held_out(Numbers([], 0), 48, "validation") == []


def test_a_split_of_which_nothing_can_be_read_says_why():
    with pytest.raises(UserError) as told:
        held_out(Numbers(range(4), 4), 48, "test")
    assert str(told.value) == (
        "none of the 4 pictures of a split can be read, such as number 0 (spoilt); mend these, or give other data "
        "(data.data_dir)"
    )
