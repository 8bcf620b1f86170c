"""Flops, loops and collectives read from compiled programs, against what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_llava import P, make_params, make_policy, make_prompt

from balcap_jax.aot import hlo
from balcap_jax.models.attention import block_of
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Sampling, make_rollout


def analyse(function, *arrays, open_turns: int = 1) -> hlo.Analysis:
    return hlo.Program(jax.jit(function).lower(*arrays).compile().as_text()).analyse(open_turns)


def test_a_matmul_counts_two_flops_per_multiplication():
    assert analyse(lambda a, b: a @ b, jnp.ones((32, 64)), jnp.ones((64, 48))).flops == 2 * 32 * 64 * 48


def test_a_loop_counts_as_often_as_it_turns():
    weights = jnp.ones((7, 64, 64))

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]

    assert analyse(layers, jnp.ones((32, 64)), weights).flops == 7 * 2 * 32 * 64 * 64


def test_a_loop_that_ends_by_itself_counts_the_turns_that_are_given():
    def halve(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: 0.1 * (x @ w), x)

    flops = analyse(halve, jnp.ones((32, 64)), jnp.eye(64), open_turns=11).flops
    assert flops == 11 * 2 * 32 * 64 * 64


def test_of_several_loops_that_end_by_themselves_the_first_takes_the_turns():
    """As a rollout's stages do, the later ones on fewer rows; what is open inside one is counted apart."""

    def stages(x, w, count):
        def halve(x):
            return jax.lax.fori_loop(0, count, lambda _, x: 0.1 * (x @ w), x)

        x = jax.lax.while_loop(lambda x: x.sum() > 9, halve, x)
        return jax.lax.while_loop(lambda x: x.sum() > 1, halve, x[:8])

    lowered = jax.jit(stages).lower(jnp.ones((32, 64)), jnp.eye(64), jnp.int32(3))
    flops = hlo.Program(lowered.compile().as_text()).analyse(11, 3).flops
    assert flops == 11 * 3 * 2 * 32 * 64 * 64


def split(x, *axes):
    mesh = sharding.make_mesh({"replica": 1, "data": 1, "fsdp": 4, "tensor": 1}, jax.devices()[:4])
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


def test_activations_that_travel_in_an_open_loop_are_no_weights():
    """The loop of decoding in small: each device keeps its part of `w`, and partial sums meet."""
    x, w = split(jnp.ones((8, 64)), None, "fsdp"), split(jnp.ones((64, 64)), "fsdp")

    def decode(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: jnp.tanh(x @ w), x)

    inside = [moved for moved in analyse(decode, x, w, open_turns=5).collectives if moved.in_open_loop]
    assert inside
    assert all(moved.times == 5 and not moved.of_invariant for moved in inside)


GATHERING = """HloModule jit_decode

%body (state: (f32[8,64], f32[16,64])) -> (f32[8,64], f32[16,64]) {
  %state = (f32[8,64]{1,0}, f32[16,64]{1,0}) parameter(0)
  %x = f32[8,64]{1,0} get-tuple-element(%state), index=0
  %w = f32[16,64]{1,0} get-tuple-element(%state), index=1
  %whole = f32[64,64]{1,0} all-gather(%w), channel_id=1, dimensions={0}
  %next = f32[8,64]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[8,64]{1,0} all-reduce(%next), channel_id=2, to_apply=%add
  ROOT %out = (f32[8,64]{1,0}, f32[16,64]{1,0}) tuple(%sum, %w)
}

%condition (state: (f32[8,64], f32[16,64])) -> pred[] {
  %state = (f32[8,64]{1,0}, f32[16,64]{1,0}) parameter(0)
  %x = f32[8,64]{1,0} get-tuple-element(%state), index=0
  ROOT %go = pred[] custom-call(%x), custom_call_target="any"
}

ENTRY %main (x: f32[8,64], w: f32[16,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %w = f32[16,64]{1,0} parameter(1)
  %start = (f32[8,64]{1,0}, f32[16,64]{1,0}) tuple(%x, %w)
  %loop = (f32[8,64]{1,0}, f32[16,64]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %y = f32[8,64]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_weights_that_are_gathered_in_an_open_loop_are_found():
    found = {moved.kind: moved for moved in hlo.Program(GATHERING).analyse(5).collectives}
    assert found["all-gather"].of_invariant
    assert not found["all-reduce"].of_invariant
    assert (found["all-gather"].size, found["all-gather"].times) == (64 * 64 * 4, 5)


def test_what_a_turn_reads_and_moves():
    (turn,) = hlo.Program(GATHERING).analyse(5).turns
    # The gathered weight is the same in every turn. The all-gather gives [64, 64], the all-reduce [8, 64].
    assert (turn.weights, turn.cache) == (64 * 64 * 4, 0)
    assert (turn.moved, turn.collectives) == (64 * 64 * 4 + 8 * 64 * 4, 2)


def test_a_rollout_reads_its_matrices_and_its_cache_once_a_step():
    """By hand: kernels of all layers and of the output; keys and values of each branch's blocks, and of prompts."""
    batch, group, length = 4, 2, 40
    block, blocks = 16, 3
    assert block_of(length) == block
    policy = make_policy()
    sampling, rows = Sampling(group, length), (make_prompt(policy, batch=batch), np.zeros(batch, np.uint32))
    lowered = make_rollout(policy, sampling).lower(make_params(policy), *rows, np.uint32(0), np.uint32(0))
    (turn,) = hlo.Program(lowered.compile().as_text()).analyse(length - 1, blocks).turns
    c = policy.decoder
    layer = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_size + 3 * c.width * c.mlp
    assert turn.weights == 4 * (c.layers * layer + c.width * c.vocab)
    keys = 4 * 2 * c.layers * c.kv_heads * c.head_size
    assert turn.cache == keys * batch * (P + group * blocks * block)
    assert (turn.moved, turn.collectives) == (0, 0)


def test_collectives_in_loops_count_as_often_as_they_run():
    weights = split(jnp.ones((7, 64, 64)), None, "fsdp")

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]

    found = analyse(layers, split(jnp.ones((32, 64)), "fsdp"), weights).collectives
    inside = [moved for moved in found if moved.loops]
    assert inside
    assert all(moved.times == 7 and not moved.in_open_loop for moved in inside)


def test_the_start_of_a_collective_names_its_operands_and_moves_its_result():
    text = GATHERING.replace(
        "%whole = f32[64,64]{1,0} all-gather(%w), channel_id=1, dimensions={0}",
        "%both = (f32[16,64]{1,0}, f32[64,64]{1,0}, u32[]) all-gather-start(%w), channel_id=1, dimensions={0}\n"
        "  %whole = f32[64,64]{1,0} all-gather-done(%both)",
    )
    found = {moved.kind: moved for moved in hlo.Program(text).analyse(5).collectives}
    assert found["all-gather"].size == 64 * 64 * 4
    assert found["all-gather"].of_invariant


def test_what_a_kernel_says_of_itself_may_hold_line_breaks():
    text = """HloModule jit_f

ENTRY %main (a: bf16[2,8,4], b: bf16[1,16,4]) -> bf16[2,8,4] {
  %a = bf16[2,8,4]{2,1,0} parameter(0)
  %b = bf16[1,16,4]{2,1,0} parameter(1)
  ROOT %splash_mha_fwd.1 = bf16[2,8,4]{2,1,0} custom-call(%a, %b, %b), frontend_attributes={kernel_metadata={
"block": "{\\"q\\": 512}"
}}, metadata={op_name="jit(f)/pallas_call"}
}
"""
    program = hlo.Program(text)
    assert program.computations["main"]["splash_mha_fwd.1"].op_name == "jit(f)/pallas_call"
    assert program.analyse().flops == 2 * 2 * (2 * 8 * 16 * 4)


def test_computations_of_another_core_end_where_they_end():
    """XLA writes the core behind the brace, on chips that move work to their sparse cores."""
    text = """HloModule jit_decode

%scattered (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}, execution_thread="sparsecore"

%called_computation (c: f32[8,16], d: f32[16,4]) -> f32[8,4] {
  %c = f32[8,16]{1,0} parameter(0)
  %d = f32[16,4]{1,0} parameter(1)
  %s = ((f32[8,16]{1,0}, f32[16,4]{1,0}), f32[8,4]{1,0}) call-start(%c, %d), to_apply=%scattered
  ROOT %e = f32[8,4]{1,0} call-done(%s)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,16], y: f32[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[16,4]{1,0} parameter(1)
  %s.1 = ((f32[8,16]{1,0}, f32[16,4]{1,0}), f32[8,4]{1,0}) call-start(%x, %y), to_apply=%called_computation
  ROOT %r = f32[8,4]{1,0} call-done(%s.1)
}
"""
    program = hlo.Program(text)
    assert [*program.computations] == ["scattered", "called_computation", "main"]
    assert program.analyse().flops == 2 * 8 * 16 * 4


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("nothing")
