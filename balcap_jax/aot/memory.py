"""The programs of a recipe, compiled from abstract parameters: nothing is allocated, and the devices need not exist.

What `aot` prints is computed here: memory per chip, flops against those of the model, and collectives.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax import models, rewards, train_step
from balcap_jax.aot import hlo
from balcap_jax.cli.files import resolved
from balcap_jax.config.schema import RUN_FIELDS
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer
from balcap_jax.models import lora
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Sampling, make_rollout
from balcap_jax.training import stages
from balcap_jax.training.job import Job, freeze_of, make_optimizer, params_of, state_shardings

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

    open_turns: turns of a loop that ends by itself, at most. resident: bytes per device that lie beside the program's
    own arrays while it runs. model_flops, repeated_flops: of all devices, what the mathematics needs with the prompt
    shared by its G samples and without (0 where no such figure is given).
    """

    name: str
    lowered: jax.stages.Lowered
    open_turns: int = 1
    resident: int = 0
    model_flops: float = 0.0
    repeated_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled program; bytes and flops are those of one device."""

    name: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    resident: int
    flops: float
    model_flops: float
    repeated_flops: float
    collectives: tuple[hlo.Collective, ...]
    seconds: float

    @property
    def total(self) -> int:
        """Bytes in use at once: arguments that outputs overwrite count once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code + self.resident

    def parts(self) -> dict[str, int]:
        """The terms of `total`, largest first."""
        parts = {
            "arguments": self.arguments,
            "new outputs": self.outputs - self.aliased,
            "temporaries": self.temporaries,
            "code": self.code,
            "resident beside it": self.resident,
        }
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    def fits(self, hbm: float) -> bool:
        return self.total <= hbm


def build_policy(config: ConfigDict) -> tuple[Policy, Any]:
    """Policy and processor of the recipe's sizes. The tokenizer is a stand-in: no program depends on its words."""
    fields = config.model.to_dict()
    if fields["path"] and resolved(fields["path"]).is_dir():
        own = {name: fields[name] for name in RUN_FIELDS if fields[name] != ""}
        fields = models.read_fields(fields["path"]) | own
    policy, processor = models.build(fields | {"template": ""}, scenes_tokenizer())
    if config.lora.rank:
        policy = lora.Adapted(policy, config.lora.alpha / config.lora.rank)
    return policy, processor


def job_of(config: ConfigDict, mesh: Mesh | None = None) -> tuple[Job, Params]:
    """What the recipe's last stage works on, with a stand-in for the judge, and its parameters as shapes."""
    policy, processor = build_policy(config)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    params = jax.eval_shape(lambda p: params_of(config, p, stages_of(config)[-1]), params)
    return Job(config, mesh, policy, processor, _Named(rewards.objectives(config.rewards)), None), params


def plan(config: ConfigDict, mesh: Mesh) -> Iterator[Planned]:
    """The programs of the recipe's last stage on `mesh`: for `rl` the change of layout, the rollout and the update.

    Raises:
      UserError: the mesh does not divide a parameter or the batch.
    """
    *_, stage = stages_of(config)
    settings = config.stages[stage]
    sharding.check_batch(mesh, stage, settings.batch_size, settings.micro_batches)
    job, params = job_of(config, mesh)
    optimizer, freeze = make_optimizer(config, stage), freeze_of(config, stage)
    state = jax.eval_shape(lambda p: train_step.init_state(p, optimizer, freeze), params)
    state = sharding.abstract(state, state_shardings(mesh, state))
    prompt = abstract_prompt(job.processor, mesh, settings.batch_size)
    if stage == "rl":
        yield from _rl_programs(job, state, prompt)
    else:
        yield _sft_program(job, state, prompt, stage)


def stages_of(config: ConfigDict) -> tuple[str, ...]:
    return tuple(name.strip() for name in config.stages.order.split(","))


def abstract_prompt(processor: Any, mesh: Mesh, batch: int) -> Prompt:
    """Prompts of `batch` pictures without a number."""
    side = 64
    one = processor([np.zeros((side, side, 3), np.uint8)], ["describe the picture ."])
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype, sharding=rows), one)


def _rl_programs(job: Job, state: train_step.TrainState, prompt: Prompt) -> Iterator[Planned]:
    config, mesh = job.config, job.mesh
    reference = train_step.trained(state.params, freeze_of(config, "rl")) if config.loss.kl_coef else None
    beside = bytes_per_device((state, reference))
    sampled = state.params
    relay = sharding.make_relay(mesh, state.params, config.model.dtype)
    if relay is not None:
        decoder = {"decoder": state.params["decoder"]}
        lowered = relay.lower(decoder)
        yield Planned("layout for sampling", lowered, resident=beside - bytes_per_device(decoder))
        sampled = {**state.params, **sharding.abstract(lowered.out_info, sharding.sampling_shardings(mesh, decoder))}
        beside -= bytes_per_device({name: tree for name, tree in state.params.items() if name != "decoder"})
    else:
        beside -= bytes_per_device(sampled)

    settings = config.rollout
    group, length = settings.group_size, settings.max_tokens
    batch = config.stages.rl.batch_size
    sampling = Sampling(group, length, settings.temperature, settings.top_p, settings.top_k)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    keys = jax.ShapeDtypeStruct((batch,), jnp.uint32, sharding=rows)
    number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=everywhere)
    rollout = make_rollout(job.policy, sampling)
    lowered = rollout.lower(sampled, prompt, keys, number, number)
    yield Planned("rollout", lowered, open_turns=length - 1, resident=beside)

    drawn, names = lowered.out_info, len(job.reward.names)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=rows)

    embeds = drawn.image_embeds
    inputs = train_step.RLBatch(
        prompt,
        of(embeds.shape[1:], embeds.dtype),
        of((group, length), jnp.int32),
        of((group, length), bool),
        of((group, length), jnp.float32),
        of((group, names), jnp.float32),
        of((group, names), bool),
        of((group,), jnp.int32),
        of((), jnp.int32),
        of((group,), bool),
    )
    step = stages.RLStage(job)._step
    lowered = step.lower(state, inputs, reference)
    yield Planned(
        "update",
        lowered,
        model_flops=model_flops(job, state.params, "rl", batch, group, length),
        repeated_flops=model_flops(job, state.params, "rl", batch, group, length, repeated=True),
    )


def _sft_program(job: Job, state: train_step.TrainState, prompt: Prompt, stage: str) -> Planned:
    config = job.config
    group = config.data.captions_per_image if stage == "sft" else 1
    batch, length = config.stages[stage].batch_size, config.rollout.buckets[-1]
    rows = sharding.batch_sharding(job.mesh)
    inputs = train_step.SFTBatch(
        prompt,
        jax.ShapeDtypeStruct((batch, group, length), jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct((batch, group, length), bool, sharding=rows),
    )
    return Planned(
        f"{stage} update",
        stages.SFTStage(job, name=stage)._step.lower(state, inputs),
        model_flops=model_flops(job, state.params, stage, batch, group, length),
        repeated_flops=model_flops(job, state.params, stage, batch, group, length, repeated=True),
    )


def compile_and_read(planned: Planned) -> Report:
    """Compiles for the program's devices. Raises what XLA raises when it refuses, jax.errors.JaxRuntimeError."""
    start = time.perf_counter()
    compiled = planned.lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    analysis = hlo.Program(compiled.as_text()).analyse(planned.open_turns)
    return Report(
        planned.name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        planned.resident,
        analysis.flops,
        planned.model_flops,
        planned.repeated_flops,
        analysis.collectives,
        seconds,
    )


# ------------------------------------------------------------------------------------------------- counting


def bytes_per_device(tree: Any) -> int:
    """Bytes of an abstract tree on each device, by its shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def model_flops(
    job: Job, params: Params, stage: str, batch: int, group: int, length: int, *, repeated: bool = False
) -> float:
    """Flops of one update on all devices as the mathematics has them: nothing is recomputed, nothing is padding's.

    A weight takes 2 flops per token forward, 2 for the gradient of what goes in and 2 for its own if it is trained
    (Kaplan et al., arXiv 2001.08361, section 2.1); attention takes 4 per pair of positions, head and feature forward
    and 8 backward, over whole squares as in PaLM (arXiv 2204.02311, appendix B). A frozen vision side, whose embeddings
    come from the rollout, takes nothing in `rl`. `repeated` counts the prompt once per sample instead of once.
    """
    config, policy = job.config, job.policy
    sizes = policy.decoder
    trainable, frozen = train_step.split(params, freeze_of(config, stage))

    def per_token(flat: dict[str, Any], where: Callable[[str], bool]) -> float:
        return float(sum(math.prod(leaf.shape) for path, leaf in flat.items() if where(path) and _is_matrix(path)))

    def matmuls(where: Callable[[str], bool]) -> float:
        return 6 * per_token(trainable, where) + 4 * per_token(frozen, where)

    prompts, prompt = batch * (group if repeated else 1), config.model.prompt_tokens
    responses = batch * group * length
    flops = matmuls(lambda path: path.startswith("decoder/layers/")) * (prompts * prompt + responses)
    head = 6 if any(path in trainable for path in ("decoder/embed", "decoder/head")) else 4
    flops += head * sizes.vocab * sizes.width * responses
    pairs = prompts * prompt**2 + responses * (prompt + length)
    flops += 12 * sizes.layers * sizes.heads * sizes.head_size * pairs
    if stage == "rl" and config.loss.kl_coef:  # The reference runs forward.
        every = per_token({**trainable, **frozen}, lambda path: path.startswith("decoder/layers/"))
        flops += 2 * every * (prompts * prompt + responses) + 2 * sizes.vocab * sizes.width * responses
        flops += 4 * sizes.layers * sizes.heads * sizes.head_size * pairs
    if not (stage == "rl" and train_step.vision_is_frozen(params, freeze_of(config, stage))):
        tokens = job.processor.image_tokens * (4 if config.model.family == "qwen2_5_vl" else 1)
        backward = not train_step.vision_is_frozen(params, freeze_of(config, stage))
        every = per_token({**trainable, **frozen}, lambda path: path.startswith("vision/"))
        flops += (6 if backward else 2) * every * tokens * prompts
    return flops


def _is_matrix(path: str) -> bool:
    return path.endswith(("/kernel", "/lora_a", "/lora_b"))


@dataclasses.dataclass(frozen=True)
class _Named:
    """As much of a reward as the stage needs to be traced: names, and which of them the length gate holds."""

    names: tuple[str, ...]

    @property
    def gated(self) -> tuple[bool, ...]:
        return tuple(name == "linguistic" for name in self.names)


# ------------------------------------------------------------------------------------------------- what XLA refuses


def refusal(message: str) -> str:
    """The sentence of an out-of-memory error that says how much is needed."""
    found = re.search(r"Used [\d.]+\w of [\d.]+\w hbm[^.]*\.?[^.\n]*", message)
    return found[0].strip() if found else " ".join(message.split())[:300]


def largest_buffers(message: str, count: int = 4) -> str:
    """The largest allocations that such an error lists, one per line, with what made them."""
    sizes = re.findall(r"^\s*(?:\d+\.\s*)?Size: ([\d.]+\w)", message, re.MULTILINE)
    origins = re.findall(r'op_name="?([^"\n]*)"?', message)
    shapes = re.findall(r"^\s*Shape: (\S+)", message, re.MULTILINE)
    rows = zip(sizes, shapes, origins, strict=False)
    return "\n".join(f"    {size:>8} {shape} {origin}" for size, shape, origin in list(rows)[:count])
