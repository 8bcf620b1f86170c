"""Batches from a random-access source: order, shards, resumption."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.data import input as data_input
from balcap_jax.data import photos

LENGTH = 53


class Source:
    """Examples as a TFDS data source hands them out: text as bytes, a ragged list of text."""

    def __init__(self, length: int = LENGTH):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return {
            "id": f"é-{i}".encode(),
            "image": np.full((4, 5, 3), i, np.uint8),
            "captions": [f"c{i}-{j}".encode() for j in range(i % 4)],
            "units": np.array([b"unit", b"\xc3\xa9"], object)[: i % 3],
            "boxes": np.zeros((i % 2, 4), np.float32),
            "index": i,
        }


def indices(batch: dict) -> list[int]:
    return [int(i) for i in batch["index"]]


def take(iterator, count: int) -> list[list[int]]:
    return [indices(next(iterator)) for _ in range(count)]


def test_columns():
    batch = next(data_input.make_dataset(Source(), batch_size=8, seed=0))
    order = indices(batch)
    assert batch["image"].shape == (8, 4, 5, 3)
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], order)
    assert batch["id"] == [f"é-{i}" for i in order]
    assert batch["captions"] == [[f"c{i}-{j}" for j in range(i % 4)] for i in order]
    assert batch["units"] == [["unit", "é"][: i % 3] for i in order]
    assert [len(boxes) for boxes in batch["boxes"]] == [i % 2 for i in order]


def test_epochs_reshuffle_and_drop_the_remainder():
    batches = take(data_input.make_dataset(Source(), batch_size=8, seed=1), 18)
    epochs = [[i for batch in batches[start : start + 6] for i in batch] for start in (0, 6, 12)]
    for epoch in epochs:
        assert len(set(epoch)) == 48  # six batches of eight, no example twice
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) > 1  # not always the same examples are left out
    assert set().union(*epochs) == set(range(LENGTH))
    assert batches != take(data_input.make_dataset(Source(), batch_size=8, seed=2), 18)
    # Shuffled over the whole, not in a window.
    assert abs(np.corrcoef(np.arange(48), epochs[0])[0, 1]) < 0.5


def test_order_does_not_depend_on_threads_or_prefetch():
    expected = take(data_input.make_dataset(Source(), batch_size=4, seed=3, threads=0), 30)
    for threads, prefetch in ((1, 1), (2, None), (8, 16)):
        iterator = data_input.make_dataset(Source(), batch_size=4, seed=3, threads=threads, prefetch=prefetch)
        assert take(iterator, 30) == expected


def test_unshuffled_and_not_repeated():
    iterator = data_input.make_dataset(Source(), batch_size=10, seed=0, shuffle=False, repeat=False)
    assert [indices(batch) for batch in iterator] == [list(range(i, i + 10)) for i in range(0, 50, 10)]


class Counted(Source):
    """Counts its readings."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def __getitem__(self, i):
        self.read += 1
        return super().__getitem__(i)


def test_what_is_kept_is_read_once_and_is_the_same():
    source = Counted()
    kept = data_input.make_dataset(data_input.Kept(source), batch_size=10, seed=2, threads=0, prefetch=0)
    expected = data_input.make_dataset(Source(), batch_size=10, seed=2)
    for _ in range(3 * LENGTH // 10):
        batch, same = next(kept), next(expected)
        assert [batch["id"], batch["captions"]] == [same["id"], same["captions"]]
        np.testing.assert_array_equal(batch["image"], same["image"])
    assert source.read <= LENGTH


def test_what_is_kept_ends_where_the_source_does():
    kept = data_input.Kept(Source())
    assert len(kept) == LENGTH
    assert kept[-1]["index"] == LENGTH - 1
    with pytest.raises(IndexError):
        kept[LENGTH]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_parts_of_a_batch_make_up_the_whole_whoever_reads_them(count):
    whole = take(data_input.make_dataset(Source(), batch_size=6, seed=4), 20)
    parts, states = [], []
    for index in range(count):
        source, rows = Counted(), np.arange(6)[index * 6 // count : (index + 1) * 6 // count]
        iterator = data_input.make_dataset(source, batch_size=6, seed=4, rows=rows, threads=0, prefetch=0)
        parts.append(take(iterator, 20))
        states.append(iterator.get_state())
        assert source.read == 20 * 6 // count, "what others have of the batch was read too"
    assert [[i for part in step for i in part] for step in zip(*parts, strict=True)] == whole
    # The state of any of them, or of the whole, is that of all.
    assert all(state == states[0] for state in states)
    iterator = data_input.make_dataset(Source(), batch_size=6, seed=4, rows=[5, 0])
    iterator.set_state(states[0])
    following = take(data_input.make_dataset(Source(), batch_size=6, seed=4), 21)[-1]
    assert take(iterator, 1) == [[following[5], following[0]]]


@pytest.mark.parametrize("threads", [0, 2])
def test_resumes_with_the_next_batch(threads):
    iterator = data_input.make_dataset(Source(), batch_size=4, seed=5, threads=threads)
    take(iterator, 17)  # into the second epoch, the read-ahead running
    state = json.dumps(iterator.get_state())
    following = take(iterator, 20)
    fresh = data_input.make_dataset(Source(), batch_size=4, seed=5, threads=threads)
    take(fresh, 3)
    fresh.set_state(json.loads(state))
    assert take(fresh, 20) == following
    fresh.set_state(json.loads(state))  # and back again
    assert take(fresh, 20) == following


def test_resumes_in_another_process():
    iterator = data_input.make_dataset(Source(), batch_size=4, seed=6)
    take(iterator, 29)
    state = iterator.get_state()
    here = pathlib.Path(__file__).parent
    code = f"""
import json, sys
sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]
from test_input import Source, take, data_input
iterator = data_input.make_dataset(Source(), batch_size=4, seed=6)
iterator.set_state(json.loads(sys.argv[1]))
print(json.dumps(take(iterator, 15)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(state)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == take(iterator, 15)


def test_too_few_examples_is_one_clear_line():
    with pytest.raises(UserError, match=r"batch of 8 .*: 7 in the data set"):
        data_input.make_dataset(Source(7), batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"rows \[0, 8\]"):
        data_input.make_dataset(Source(20), batch_size=8, seed=0, rows=[0, 8])


def test_first_examples_in_order():
    rows = data_input.examples(Source(), 4)
    assert [row["id"] for row in rows] == ["é-0", "é-1", "é-2", "é-3"]
    assert rows[3]["captions"] == ["c3-0", "c3-1", "c3-2"]
    assert len(data_input.examples(Source())) == LENGTH
    assert [row["index"] for row in data_input.examples(Source(), 99)] == list(range(LENGTH))


def test_examples_of_different_fields_do_not_mix():
    with pytest.raises(ValueError, match="differ in their fields"):
        data_input.as_columns([{"a": 1}, {"b": 1}])


def test_prompts_are_counted_from_all_records_or_from_examples_over_the_whole_source():
    records = [photos.Record(str(i), lambda: None, "rare" if i < 2 else "often", ("a",)) for i in range(7)]
    assert list(data_input.prompts_of(photos.Photos(records, 1, 0)).items()) == [("often", 5), ("rare", 2)]
    source = [{"prompt": "first half" if i < 480 else "second half"} for i in range(1000)]
    found = data_input.prompts_of(source)
    assert list(found) == ["second half", "first half"]
    assert found.total() == 64
    assert data_input.prompts_of([{"prompt": b"one"}] * 3) == {"one": 3}
