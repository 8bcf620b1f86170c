"""The programs of a recipe, compiled from abstract parameters: nothing is allocated, and the devices need not exist.

What `aot` prints is computed here: memory per chip, flops against those of the model, and collectives.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax.aot import hlo
from balcap_jax.models.attention import block_of
from balcap_jax.models.packed_attention import TILE
from balcap_jax.models.policy import Params
from balcap_jax.parallel import sharding
from balcap_jax.parallel.sharding import bytes_per_device
from balcap_jax.training import programs as training
from balcap_jax.training.programs import Programs

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """hbm: bytes that a program may use on one device. flops: bf16 peak of one device, per second."""

    hbm: float
    flops: float


# By `device_kind`. What XLA lets a program have is a little less than the memory that is sold; where its figure is not
# known it is the latter. Since it does not refuse a program that is too large on every chip, `Report.fits` compares.
CHIPS = {
    "TPU v4": Chip(31.75 * GIB, 275e12),
    "TPU v5 lite": Chip(15.75 * GIB, 197e12),
    "TPU v5": Chip(95.0 * GIB, 459e12),
    "TPU v5p": Chip(95.0 * GIB, 459e12),
    "TPU v6 lite": Chip(31.25 * GIB, 918e12),
    "TPU7x": Chip(94.75 * GIB, 1153e12),
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program that is traced and not compiled yet.

    open_turns: turns of a loop that ends by itself, at most; inner_turns: those of one inside it. resident: bytes per
    device that lie beside the program's own arrays while it runs. model_flops, repeated_flops: of all devices, what the
    mathematics needs with the prompt shared by its G samples and without (0 where no such figure is given). note: what
    is to be said of it. otherwise: what comes in its place where it does not fit.
    """

    name: str
    lowered: jax.stages.Lowered
    open_turns: int = 1
    inner_turns: int = 1
    resident: int = 0
    model_flops: float = 0.0
    repeated_flops: float = 0.0
    note: str = ""
    otherwise: "Callable[[], Planned] | None" = None


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program; bytes and flops are those of one device."""

    planned: Planned
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    collectives: tuple[hlo.Collective, ...]
    seconds: float
    turns: tuple[hlo.Turn, ...] = ()

    @property
    def total(self) -> int:
        """Bytes in use at once: arguments that outputs overwrite count once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code + self.planned.resident

    def parts(self) -> dict[str, int]:
        """The terms of `total`, largest first."""
        parts = {
            "arguments": self.arguments,
            "new outputs": self.outputs - self.aliased,
            "temporaries": self.temporaries,
            "code": self.code,
            "resident beside it": self.planned.resident,
        }
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    def fits(self, hbm: float) -> bool:
        return self.total <= hbm


def plan(config: ConfigDict, mesh: Mesh, hbm: float) -> Iterator[Planned]:
    """The programs of the recipe's last stage on `mesh`: for `rl` the change of layout, the rollout and the updates.

    Of the padded updates it is the longest; the packed ones are all there, with the flops of the tokens that they hold.

    hbm: bytes that programs may use on one device.

    Raises:
      UserError: the mesh does not divide a parameter or the batch.
    """
    programs, params = training.of_last_stage(config, mesh)
    state = programs.abstract_state(params)
    reference = programs.reference(state)
    length, in_flight = config.rollout.buckets[-1], 0
    if programs.name == "rl":
        length = config.rollout.max_tokens
        if config.pipeline.depth:  # The next batch lies beside the update, and the last one beside the rollout.
            in_flight = bytes_per_device((programs.abstract_rollout(state.params), programs.abstract_prompt()))
        yield from _rollout_programs(programs, state.params, bytes_per_device((state, reference)) + in_flight, hbm)
    name = "update" if programs.name == "rl" else f"{programs.name} update"
    sizes = (programs, state.params, programs.settings.batch_size, programs.group_size)
    buckets = config.rollout.token_buckets
    padded = f" padded {length}" if buckets else ""
    for token_bucket in (0, *buckets):
        computed = token_bucket or length
        yield Planned(
            name + (f" packed {token_bucket}" if token_bucket else padded),
            programs.lower_update(state, length, reference, token_bucket=token_bucket),
            open_turns=-(-length // TILE),  # of attention over packed responses: all blocks of the longest
            resident=in_flight,
            model_flops=model_flops(*sizes, computed),
            repeated_flops=model_flops(*sizes, computed, repeated=True),
        )


def _rollout_programs(programs: Programs, params: Params, held: int, hbm: float) -> Iterator[Planned]:
    """`held`: bytes per device of the training state, which stays in memory."""
    ways, tokens = programs.fits(params, int(hbm) - held), programs.sampling.max_tokens

    def relay_of(fit: training.room.Fit) -> sharding.Relay | None:
        return sharding.make_relay(programs.mesh, params, programs.config.model.dtype, fit.mesh)

    def planned(fit: training.room.Fit, *others: training.room.Fit) -> Planned:
        relay = relay_of(fit)
        # The rollout's own arguments hold a copy of what was moved.
        moved = 0 if relay is None else bytes_per_device(relay.take(params))
        return Planned(
            "rollout",
            programs.lower_rollout(params, fit).program,
            # A refilled rollout is one loop, in which no response need end before the others.
            open_turns=(tokens - 1) * (fit.parts if programs.sampling.refill else 1),
            inner_turns=-(-tokens // block_of(tokens)),
            resident=held + moved - bytes_per_device(params),
            note=str(fit),
            otherwise=functools.partial(planned, *others) if others else None,
        )

    if (relay := relay_of(ways[0])) is not None:
        yield Planned("layout for sampling", relay.lower(params), resident=held - bytes_per_device(relay.take(params)))
    yield planned(*ways)


def compile_and_read(planned: Planned) -> Report:
    """Compiles for the program's devices. Raises what XLA raises when it refuses, jax.errors.JaxRuntimeError."""
    start = time.perf_counter()
    compiled = planned.lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    analysis = hlo.Program(compiled.as_text()).analyse(planned.open_turns, planned.inner_turns)
    return Report(
        planned,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        analysis.flops,
        analysis.collectives,
        seconds,
        analysis.turns,
    )


# ------------------------------------------------------------------------------------------------- counting


def model_flops(
    programs: Programs, params: Params, batch: int, group: int, length: int, *, repeated: bool = False
) -> float:
    """Flops of one update on all devices as the mathematics has them: nothing is recomputed, nothing is padding's.

    A weight takes 2 flops per token forward (Kaplan et al., arXiv 2001.08361, section 2.1). It takes 2 for the gradient
    of what goes in, and 2 for its own if it is trained. Attention takes 4 per pair of positions, head and feature
    forward and 8 backward, over whole squares as in PaLM (arXiv 2204.02311, appendix B). A frozen vision side, whose
    embeddings come from the rollout, takes nothing in `rl`. `repeated` counts the prompt once per sample instead of
    once.
    """
    config, policy = programs.config, programs.policy
    sizes = policy.decoder
    trainable, frozen = programs.split(params)
    every = {**trainable, **frozen}

    def per_token(flat: dict[str, Any], where: Callable[[str], bool]) -> float:
        matrices = {path: leaf for path, leaf in flat.items() if path.endswith(("/kernel", "/lora_a", "/lora_b"))}
        return float(sum(math.prod(leaf.shape) for path, leaf in matrices.items() if where(path)))

    def matmuls(where: Callable[[str], bool]) -> float:
        return 6 * per_token(trainable, where) + 4 * per_token(frozen, where)

    prompts, prompt = batch * (group if repeated else 1), config.model.prompt_tokens
    responses = batch * group * length
    flops = matmuls(lambda path: path.startswith("decoder/layers/")) * (prompts * prompt + responses)
    head = 6 if any(path in trainable for path in ("decoder/embed", "decoder/head")) else 4
    flops += head * sizes.vocab * sizes.width * responses
    pairs = prompts * prompt**2 + responses * (prompt + length)
    flops += 12 * sizes.layers * sizes.heads * sizes.head_size * pairs
    if programs.anchored and programs.config.loss.kl_coef:  # The reference runs forward.
        layers = per_token(every, lambda path: path.startswith("decoder/layers/"))
        flops += 2 * layers * (prompts * prompt + responses) + 2 * sizes.vocab * sizes.width * responses
        flops += 4 * sizes.layers * sizes.heads * sizes.head_size * pairs
    backward = not all(path.startswith("decoder/") for path in trainable)
    if backward or programs.name != "rl":
        tokens = programs.processor.image_tokens * policy.vision.PATCHES_PER_TOKEN
        vision = per_token(every, lambda path: path.startswith("vision/"))
        flops += (6 if backward else 2) * vision * tokens * prompts
    return flops


# ------------------------------------------------------------------------------------------------- what XLA refuses


def refusal(message: str) -> str:
    """The sentence of an out-of-memory error that says how much is needed."""
    match = re.search(r"Used [\d.]+\w of [\d.]+\w hbm(?:\. Exceeded [^\n]*?\d\w(?=\.?\s|$))?", message)
    return match[0] if match else " ".join(message.split())[:300]


def largest_buffers(message: str, count: int = 4) -> str:
    """The largest allocations that such an error lists, one per line, with what made them."""
    sizes = re.findall(r"^\s*(?:\d+\.\s*)?Size: ([\d.]+\w)", message, re.MULTILINE)
    origins = re.findall(r'op_name="?([^"\n]*)"?', message)
    shapes = re.findall(r"^\s*Shape: (\S+)", message, re.MULTILINE)
    rows = zip(sizes, shapes, origins, strict=False)
    return "\n".join(f"    {size:>8} {shape} {origin}" for size, shape, origin in list(rows)[:count])
