"""Where packed responses lie, and which program a batch takes: against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balcap_jax.models import packing
from balcap_jax.models.packing import UNIT

PARTS, PROMPTS, GROUP, R = 2, 3, 2, 70  # R is no multiple of a unit.
LENGTHS = np.array([[[0, 1], [32, 33], [R, 64]], [[31, 0], [0, 0], [2, 65]]])


def packed_by_hand(x: np.ndarray, bucket: int) -> np.ndarray:
    """x [Q, b, G, R] end to end, each response filled up to whole units; 0 behind the last."""
    out = np.zeros((PARTS, packing.capacity(bucket, PROMPTS * GROUP) * UNIT), x.dtype)
    for part in range(PARTS):
        at = 0
        for row, length in zip(x[part].reshape(-1, R), LENGTHS[part].reshape(-1), strict=True):
            whole = np.concatenate([row, np.zeros(-R % UNIT, x.dtype)])
            for start in range(0, length, UNIT):
                out[part, at : at + UNIT] = whole[start : start + UNIT]
                at += UNIT
    return out


def test_units_lie_end_to_end_and_come_back():
    x = np.random.default_rng(0).normal(size=(PARTS, PROMPTS, GROUP, R)).astype(np.float32)
    bucket = 48  # 9 units in all; the first part has 9, the second 5
    at = packing.places(jnp.asarray(LENGTHS), R, bucket)
    assert at.source.shape == (PARTS, 9)
    assert at.fits.tolist() == [True, True]
    rows = x.reshape(PARTS * PROMPTS, GROUP, R)
    packed = packing.pack(rows, at)
    np.testing.assert_array_equal(packed, packed_by_hand(x, bucket))
    within = -(-LENGTHS.reshape(-1, GROUP) // UNIT) * UNIT
    np.testing.assert_array_equal(packing.unpack(packed, at, R), np.where(np.arange(R) < within[..., None], rows, 0))

    # Whose units they are: prompt and number, and the place of the response's first.
    assert at.prompt[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert at.chunk[0].tolist() == [0, 0, 0, 1, 0, 1, 2, 0, 1]
    assert at.first[0].tolist() == [0, 1, 2, 2, 4, 4, 4, 7, 7]
    assert at.chunk[1].tolist() == [0, 0, 0, 1, 2, 0, 0, 0, 0]

    assert packing.places(jnp.asarray(LENGTHS), R, 42).fits.tolist() == [False, True]  # 8 units


def test_the_way_back_is_the_transpose_and_gathers_alone():
    at = packing.places(jnp.asarray(LENGTHS), R, 48)
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(PARTS * PROMPTS, GROUP, R, 3)).astype(np.float32)
    places = rng.normal(size=(PARTS, 9 * UNIT, 3)).astype(np.float32)
    # <pack(x), y> = <x, pack'(y)>, and the same of unpack.
    packed, back = jax.vjp(lambda x: packing.pack(x, at), rows)
    np.testing.assert_allclose((packed * places).sum(), (rows * back(places)[0]).sum(), rtol=1e-5)
    unpacked, back = jax.vjp(lambda x: packing.unpack(x, at, R), places)
    np.testing.assert_allclose((unpacked * rows).sum(), (places * back(rows)[0]).sum(), rtol=1e-5)

    def both(rows, lengths):
        at = packing.places(lengths, R, 48)
        return packing.unpack(packing.pack(rows, at) ** 2, at, R).sum()

    text = jax.jit(jax.grad(both)).lower(rows, jnp.asarray(LENGTHS)).as_text()
    assert "gather" in text
    assert "scatter" not in text


# ------------------------------------------------------------------------------------------------- on the host


@pytest.mark.parametrize(
    ("bucket", "responses", "units"), [(32, 1, 1), (33, 1, 2), (256, 32, 256), (1, 1, 1), (1, 32, 1), (1, 33, 2)]
)
def test_capacity_is_whole_units(bucket, responses, units):
    assert packing.capacity(bucket, responses) == units


def test_the_smallest_bucket_that_holds_the_fullest_part():
    """Two devices, two micro-batches of 2 prompts with 2 responses each; the last bucket takes one micro-batch."""
    buckets = {64: 2, 96: 2, 144: 2, 160: 1}

    def chosen(*units, padded=200):
        lengths = np.zeros((8, 2), int)
        lengths[: len(units), 0] = UNIT * np.array(units)
        choice = packing.choose(lengths, buckets, 2, padded)
        return choice and choice.bucket

    # A part of 4 responses holds 8, 12 and 18 units, one of 8 then 40.
    assert [chosen(units) for units in (0, 8, 9, 12, 13, 18)] == [64, 64, 96, 96, 144, 144]
    assert [chosen(19), chosen(40), chosen(40, 40)] == [160, 160, 160]
    assert chosen(41) is None  # Nothing holds it: never a cut.
    # Dealt out one to a part, where the first four rows as they come would be one device's.
    assert [chosen(8, 8, 8, 8), chosen(8, 8, 8, 8, 1), chosen(5, 5, 5, 5, 3, 3, 3, 3)] == [64, 96, 64]
    # A padded program of hardly more positions is the better one.
    assert [chosen(8, padded=80), chosen(8, padded=79)] == [64, None]
    assert packing.choose(np.full((8, 2), 5), {}, 2, 200) is None


def test_one_part_keeps_its_order():
    lengths = np.array([[1], [99], [40]])
    assert packing.choose(lengths, {96: 1}, 1, 200).order is None
    assert packing.choose(lengths, {96: 3}, 1, 200) is None
    assert packing.choose(lengths, {128: 3}, 1, 200).order.tolist() == [1, 2, 0]


def test_parts_are_those_of_the_update():
    """`accumulate` takes every second row for a micro-batch, and each of these is split over the devices."""
    batch, devices, micro_batches = 16, 4, 2
    part = packing.part_of_rows(batch, devices, micro_batches)
    cut = np.arange(batch).reshape(-1, micro_batches).T.reshape(micro_batches, devices, -1)
    for m in range(micro_batches):
        for d in range(devices):
            assert np.flatnonzero(part == d * micro_batches + m).tolist() == cut[m, d].tolist()


def test_a_packed_update_takes_as_many_prompts_at_once_as_fill_a_padded_one():
    def parts(bucket, micro_batches, **changes):
        sizes = {"prompt": 512, "group": 8, "length": 1024} | changes
        return packing.micro_batches_of(bucket, micro_batches, **sizes)

    # 512 + 8 x 1024 = 8,704 positions of a prompt where it is padded; 2,560, 4,608 and 7,168 where it is packed.
    assert [parts(bucket, 8) for bucket in (256, 512, 832, 1024)] == [4, 8, 8, 8]
    assert [parts(bucket, 4) for bucket in (256, 512, 832)] == [2, 4, 4]
    assert parts(256, 1) == 1
    assert parts(64, 8, prompt=0) == 1
    assert parts(256, 6) == 2  # A divisor: 3 is the next.
    assert parts(256, 9) == 3


def test_prompts_are_dealt_out_by_their_units():
    # The largest first, each to the emptiest part with room: {9, 1}, {7, 2}, {5, 4}, {4, 4}.
    order = packing.deal(np.array([1, 2, 4, 4, 4, 5, 7, 9]), devices=2, micro_batches=2)
    # Rows 0 and 2 are the first device's first part, 1 and 3 its second.
    assert order.tolist() == [7, 6, 0, 1, 5, 2, 4, 3]
    assert order.dtype == np.int32


def test_dealing_evens_32_parts_out():
    """Share of real tokens where each part of a step has room for the fullest one, in units of 256 tokens; the
    lengths are lognormal with mean 220, 1% run to 1,024."""
    rng = np.random.default_rng(0)
    batch, group, parts = 128, 8, 32
    sigma = np.sqrt(np.log(1.25))
    tokens = dealt = as_drawn = 0
    for _ in range(50):
        lengths = np.exp(np.log(220) - sigma**2 / 2 + sigma * rng.normal(size=(batch, group)))
        lengths = np.where(rng.random((batch, group)) < 0.01, 1024, np.clip(lengths, 8, 1024).astype(int))
        sums = lengths.sum(1)
        order = packing.deal(sums, parts, 1)
        assert sorted(order.tolist()) == list(range(batch))
        tokens += sums.sum()
        as_drawn += -(-packing.largest_part(sums, parts, 1) // 256) * 256 * parts
        dealt += -(-packing.largest_part(sums[order], parts, 1) // 256) * 256 * parts
    assert 0.77 < tokens / as_drawn < 0.82
    assert 0.92 < tokens / dealt < 0.95
