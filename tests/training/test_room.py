"""How many parts and over how many devices: by hand for a published model, and as a stage of training chooses."""

import dataclasses
import functools
import types

import jax
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as configuration
from balcap_jax.parallel import sharding
from balcap_jax.training import room
from balcap_jax.training.programs import check_mesh, of_last_stage

GIB = 2**30
LAYERS, WIDTH, VOCAB = 28, 3584, 152_064
B, G, P, R = 128, 8, 512, 1024
KERNELS = LAYERS * (WIDTH * (2 * 28 + 2 * 4) * 128 + 3 * WIDTH * 18_944) + WIDTH * VOCAB
TOKEN = LAYERS * 2 * 4 * 128 * 2  # bytes of its keys and values


@functools.cache
def made(variant="", **overrides):
    """(programs, abstract parameters) of Qwen2.5-VL-7B on eight devices, `fsdp` over all unless overrides say more."""
    overrides = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    config = configuration.load(f"configs/qwen25vl_7b.py:{variant}", overrides)
    programs, params = of_last_stage(config, sharding.make_mesh(config.mesh, jax.devices()[:8]))
    return programs, programs.abstract_state(params).params


def fits(free, variant="", **overrides):
    programs, params = made(variant, **overrides)
    return programs.fits(params, free)


def test_where_memory_is_not_known_the_batch_stays_whole_and_matrices_as_training_splits_them():
    for parts in (1, "auto"):
        (fit,) = fits(None, rollout__parts=parts)
        assert (fit.parts, fit.split, fit.free) == (1, 8, None)
    assert str(fit) == "in 1 part, matrices over 8 of 8 devices; the devices do not tell their memory"
    (fit,) = fits(None, mesh__sampling=2, rollout__parts=4)
    assert (fit.parts, fit.split) == (4, 2)


def test_bytes_by_hand():
    """Of a device: its part of the weights in bfloat16, and the cache of its share of a part's prompts and branches."""
    small = LAYERS * (2 * WIDTH + (28 + 2 * 4) * 128) + WIDTH  # norms and biases, whole where they do not divide
    for parts, split in ((1, 8), (4, 2)):
        (fit,) = fits(None, mesh__sampling=split, rollout__parts=parts)
        weights = 2 * (KERNELS + WIDTH * VOCAB) / split
        cache = B / 8 / parts * (P + G * R) * TOKEN
        assert weights + cache < fit.bytes < weights + cache + 2 * small


def test_a_refilled_rollout_holds_all_prompts_and_its_lines():
    """Of 16 prompts on each device, 4 parts have 32 rows: two lines for each 8 of them, and two more."""
    held = {}
    for refill in (False, True):
        (fit,) = fits(None, mesh__sampling=2, rollout__parts=4, rollout__refill=refill)
        held[refill] = fit.bytes
    assert held[True] - held[False] == (16 + 10 - 4) * P * TOKEN


def test_of_the_splits_that_fit_the_one_that_reads_and_sends_the_least():
    def cost(split, parts=1):
        sent = 57 * 2 * (split - 1) * (B * G / 8 / parts) * WIDTH * 2
        return 2 * KERNELS / split + 8 * sent + 57 * 2**23 * (split > 1)

    costs = {split: cost(split) for split in (1, 2, 4, 8)}
    assert min(costs, key=costs.get) == 4
    (fit,) = fits(80 * GIB)
    assert (fit.parts, fit.split) == (1, 4)
    # With little room, over more devices; with a quarter of the rows less is sent, and splitting costs less.
    assert fits(13 * GIB)[0].split == 8
    costs = {split: cost(split, 4) for split in (1, 2, 4, 8)}
    assert min(costs, key=costs.get) == 8
    assert fits(80 * GIB, rollout__parts=4)[0].split == 8
    assert fits(80 * GIB, mesh__sampling=1)[0].split == 1


def test_parts_are_as_few_as_fit():
    """Weights over all devices and half of the cache take 5.5 GiB; a quarter 3.6."""
    ways = fits(5 * GIB, rollout__parts="auto")
    assert [fit.parts for fit in ways] == [4, 8, 16]
    assert all(fit.split == 8 for fit in ways)
    assert ways[0].bytes < 5 * GIB
    assert str(ways[0]).startswith("in 4 parts, matrices over 8 of 8 devices; 3.")
    assert [fit.parts for fit in fits(6 * GIB, rollout__parts="auto")] == [2, 4, 8, 16]
    # Where nothing fits, what takes the least is left to the compiler.
    assert [fit.parts for fit in fits(GIB, rollout__parts="auto")] == [16]


def test_adapters_need_no_second_copy_of_their_base():
    (full,), (adapters,) = (fits(None, variant) for variant in ("", "lora"))
    # Both layouts split the base over eight devices, along other axes but for the table of words.
    assert adapters.bytes < full.bytes + 0.2 * GIB
    one = {"mesh__fsdp": 1, "mesh__data": 8, "mesh__sampling": 1}
    (full,), (adapters,) = (fits(None, variant, **one) for variant in ("", "lora"))
    cache = B / 8 * (P + G * R) * TOKEN
    assert full.bytes > cache + 2 * KERNELS
    assert adapters.bytes < cache + 0.5 * GIB


# ------------------------------------------------------------------------------------------------- the compiler


class Compiled:
    """A rollout that takes so many bytes, or that the compiler refuses (None)."""

    def __init__(self, new_bytes):
        self.new_bytes = new_bytes

    def compile(self):
        if self.new_bytes is None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
        return self


def first_of(sizes, free):
    ways = [room.Fit(parts, None, 0, free) for parts in range(1, len(sizes) + 1)]
    asked = []

    def lower(fit):
        asked.append(fit.parts)
        return Compiled(sizes[fit.parts - 1])

    fit, compiled = room.compile_first(ways, lower, free)
    assert fit.bytes == compiled.new_bytes
    assert asked == list(range(1, fit.parts + 1))
    return fit.parts


def test_the_first_that_fits_is_taken():
    assert first_of([10], 5) == 1  # There is no other.
    assert first_of([10, 8, 5, 2], 5) == 3
    assert first_of([10, None, 5, 2], 4) == 4
    assert first_of([10, 9, 8], 5) == 3
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        first_of([10, None], 5)


def test_other_errors_of_the_compiler_are_errors():
    def lower(fit):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        room.compile_first([room.Fit(1, None, 0, 5), room.Fit(2, None, 0, 5)], lower, 5)


def test_what_is_free_is_what_the_fullest_device_has_left():
    def devices(*stats):
        made = [types.SimpleNamespace(memory_stats=lambda given=given: given) for given in stats]
        return types.SimpleNamespace(local_devices=made)

    one = {"bytes_limit": 16 * GIB, "bytes_in_use": 5 * GIB}
    other = one | {"bytes_in_use": 7 * GIB}
    assert room.free_bytes(devices(one, other)) == 9 * GIB
    assert room.free_bytes(devices(one, None)) is None
    assert room.free_bytes(devices({"bytes_in_use": 1})) is None
    assert room.free_bytes(sharding.make_mesh({"replica": 1, "data": 8, "fsdp": 1, "tensor": 1})) is None


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"rollout.parts": "3"},
            r"rollout\.parts is 3: 128 prompts over 8 devices .* in 1, 2, 4, 8, 16 parts ",
        ),
        ({"rollout.parts": "32"}, r"rollout\.parts is 32: "),
        ({"mesh.sampling": "3"}, r"mesh\.sampling is 3, but on the mesh .* over 1, 2, 4, 8 devices while sampling"),
        ({"mesh.sampling": "16"}, r"mesh\.sampling is 16, "),
    ],
)
def test_what_a_mesh_cannot_do_is_one_line(overrides, message):
    config = configuration.load("configs/qwen25vl_7b.py", overrides)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:8])
    for check in (lambda: check_mesh(config, mesh, "rl"), lambda: of_last_stage(config, mesh)):
        with pytest.raises(UserError, match=message) as caught:
            check()
        assert "\n" not in str(caught.value)


def test_an_evaluation_holds_no_more_branches_than_a_part_of_training():
    programs, params = made(rollout__parts=8)  # 16 prompts x 8 at a time
    for images, group, parts in ((128, 2, 2), (128, 1, 1), (64, 8, 4), (8, 64, 1)):
        sampling = dataclasses.replace(programs.sampling, group_size=group)
        (fit,) = programs.fits(params, None, images, sampling)
        assert fit.parts == parts, (images, group)
