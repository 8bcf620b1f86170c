"""What a stage of training compiles, built from config, policy and mesh alone: its rollout, its update, its state.

The stages run these programs and `aot` compiles them for devices that need not exist: what is proved to fit is what
runs.
"""

import dataclasses
import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from balcap_jax import models, rewards, train_step
from balcap_jax.advantages import BEST_OF
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.config.recipes import stage_order
from balcap_jax.config.schema import RUN_FIELDS
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer
from balcap_jax.models import lora, packing
from balcap_jax.models.formats import language
from balcap_jax.models.formats.safetensors import fetch
from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.models.prompting import PromptProcessor
from balcap_jax.parallel import sharding
from balcap_jax.parallel.host_batch import make_reordering
from balcap_jax.rollout import CompiledRollout, LoweredRollout, Rollout, Sampling, lower_rollout
from balcap_jax.train_step import CompiledStep, RLBatch, SFTBatch, TrainState
from balcap_jax.training import room

# The stages that train adapters, where there are any.
LORA_STAGES = ("sft", "rl")


class Programs:
    """The programs of the stage `name`, with its optimiser, its freeze pattern and the shapes that it works on.

    Arguments may be arrays or shapes with shardings: `lower_*` and `abstract_*` allocate nothing.
    """

    def __init__(self, config: ConfigDict, name: str, mesh: Mesh | None, policy: Policy, processor: PromptProcessor):
        self.config, self.name, self.mesh, self.policy, self.processor = config, name, mesh, policy, processor
        self.settings = config.stages[name]
        self.optimizer, self.freeze = make_optimizer(config, name), freeze_of(config, name)
        rollout = config.rollout
        self.sampling = Sampling(
            rollout.group_size,
            rollout.max_tokens,
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            refill=rollout.refill,
        )
        self.imitates_best = name == "rl" and config.advantage.estimator == BEST_OF
        self.anchored = self.imitates_best or (name == "rl" and config.loss.kl_coef > 0)
        self.names = rewards.objectives(config.rewards)

    # ---- the state

    def init(self, params: Params) -> TrainState:
        """The state before the first update, from the parameters that the stage starts from."""
        return train_step.init_state(params_of(self.config, params, self.name), self.optimizer, self.freeze)

    def start(self, params: Params) -> TrainState:
        """`init`, placed on the mesh."""
        placed = state_shardings(self.mesh, jax.eval_shape(self.init, params))
        params = jax.device_put(params, sharding.tree_shardings(self.mesh, params))
        return jax.jit(self.init, out_shardings=placed)(params)

    def abstract_state(self, params: Params) -> TrainState:
        """Shapes, types and shardings of what `start` returns."""
        state = jax.eval_shape(self.init, params)
        return sharding.abstract(state, state_shardings(self.mesh, state))

    def reference(self, state: TrainState) -> Params | None:
        """The trained parameters of `state`, its own arrays, where the stage keeps them: for the KL term, or to sample
        from. None where it does not."""
        return train_step.trained(state.params, self.freeze) if self.anchored else None

    def sampler(self, params: Params, reference: Params | None) -> Params:
        """The parameters that sample: the newest, or those of the stage's start whose best captions are imitated."""
        if not self.imitates_best:
            return params
        at_start = flax.traverse_util.flatten_dict(reference, sep="/")
        return train_step.join(at_start, self.split(params)[1])

    def abstract_checkpoint(self, params: Params) -> dict[str, Any]:
        """The arrays of a checkpoint of this stage, as they are to be restored."""
        state = self.abstract_state(params)
        arrays = {"state": state}
        if self.anchored:
            arrays["reference"] = self.reference(state)
        if self.name == "rl" and self.config.pipeline.depth:
            arrays["in_flight"] = self.abstract_rollout(state.params)
        return arrays

    def split(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trained, frozen) parameters of the stage, flat by path."""
        return train_step.split(params, self.freeze)

    # ---- the rollout

    def abstract_prompt(self) -> Prompt:
        return jax.tree.map(lambda x: self._rows(x.shape[1:], x.dtype), _blank(self.processor))

    def abstract_rollout(self, params: Params) -> Rollout:
        """Shapes, types and layout of a batch that is sampled and not learnt from yet; `params` may be abstract."""
        embeds = jax.eval_shape(self.policy.encode, params, _blank(self.processor).images)
        branch = (self.sampling.group_size,)
        tokens = (*branch, self.sampling.max_tokens)
        return Rollout(
            tokens=self._rows(tokens, jnp.int32),
            mask=self._rows(tokens, bool),
            policy_log_probs=self._rows(tokens, jnp.float32),
            lengths=self._rows(branch, jnp.int32),
            truncated=self._rows(branch, bool),
            slots=self._rows((), jnp.float32),
            image_embeds=self._rows(embeds.shape[1:], embeds.dtype),
        )

    def fits(
        self, params: Params, free: int | None, batch_size: int | None = None, sampling: Sampling | None = None
    ) -> list[room.Fit]:
        """The ways to sample a batch that may fit into `free` bytes of a device (None: not known), see `room.fits`.

        batch_size, sampling: those of the stage, or of an evaluation beside it. Where rollout.parts is fixed, a part of
        the latter holds at most as many branches as one of the stage.
        """
        batch_size, own = batch_size or self.settings.batch_size, sampling or self.sampling
        parts, split = self.config.rollout.parts, self.config.mesh.sampling
        possible = sharding.possible_parts(self.mesh, batch_size)
        if parts != "auto":
            branches = self.settings.batch_size * self.sampling.group_size / parts
            at_most = [count for count in possible if batch_size * own.group_size / count <= branches]
            possible = [at_most[0] if at_most else possible[-1]]
        splits = sharding.possible_splits(self.mesh) if split == "auto" else [split]
        batch = room.Batch(batch_size, self.processor.prompt_tokens, own, possible)
        return room.fits(self.policy, params, batch, self.config.model.dtype, self.mesh, splits, free)

    def lower_rollout(
        self, params: Params, fit: room.Fit, inputs: tuple[Any, ...] | None = None, sampling: Sampling | None = None
    ) -> LoweredRollout:
        """The rollout of the stage, or of another batch `inputs` and `sampling`, in the way `fit`."""
        if inputs is None:
            number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=sharding.replicated(self.mesh))
            inputs = (self.abstract_prompt(), self._rows((), jnp.uint32), number, number)
        sampling = dataclasses.replace(sampling or self.sampling, parts=fit.parts)
        return lower_rollout(self.policy, sampling, self.config.model.dtype, params, *inputs, mesh=fit.mesh)

    def compile_rollout(
        self, params: Params, inputs: tuple[Any, ...], sampling: Sampling | None = None
    ) -> tuple[room.Fit, CompiledRollout]:
        """The rollout for these arguments, in the first way that fits beside what lies on the devices now."""
        free = room.free_bytes(self.mesh)
        if free is not None and self.config.pipeline.depth and self.name == "rl":  # A batch in flight lies there too.
            beside = (self.abstract_rollout(params), self.abstract_prompt())
            free = max(free - sharding.bytes_per_device(beside), 0)
        ways = self.fits(params, free, len(inputs[0].tokens), sampling)
        return room.compile_first(ways, lambda fit: self.lower_rollout(params, fit, inputs, sampling), free)

    # ---- the update

    def update(self, micro_batches: int, token_bucket: int = 0) -> CompiledStep:
        """`update(state, RLBatch, reference)` of the stage rl, `update(state, SFTBatch)` of the others.

        With a `token_bucket` of the config its responses are packed.
        """
        options = {"freeze": self.freeze, "micro_batches": micro_batches, "token_bucket": token_bucket}
        if self.name != "rl":
            return train_step.make_sft_step(self.policy, self.optimizer, **options)
        return train_step.make_rl_step(self.policy, self.optimizer, self.objective, **options)

    @property
    def objective(self) -> train_step.RLObjective:
        """What the stage rl makes of rewards and log-probabilities."""
        config, rollout = self.config, self.config.rollout
        gated = rewards.resolve(config.rewards.name).gated
        return train_step.RLObjective(
            names=self.names,
            weights=tuple(config.rewards.weights),
            gated=(*gated, *[False] * (len(self.names) - len(gated))),  # That of the length is never gated.
            max_tokens=rollout.max_tokens,
            scales=tuple(config.rewards.scales),
            gate=config.rewards.gate,
            gate_low=config.rewards.gate_low,
            gate_high=config.rewards.gate_high,
            temperature=rollout.temperature,
            **config.advantage,
            **config.loss,
        )

    def compile_advantages(self, batch: int, group: int) -> Any:
        """`RLObjective.advantages_of` of whole batches [batch, group], arrays of one device: `function(**arrays)`."""
        members, objectives = (batch, group), (batch, group, len(self.names))
        arrays = {
            "rewards": jax.ShapeDtypeStruct(objectives, np.float32),
            "valid": jax.ShapeDtypeStruct(objectives, bool),
            "words": jax.ShapeDtypeStruct(members, np.int32),
            "reference_words": jax.ShapeDtypeStruct(members[:1], np.int32),
            "truncated": jax.ShapeDtypeStruct(members, bool),
        }
        return jax.jit(lambda **arrays: self.objective.advantages_of(**arrays)[0]).lower(**arrays).compile()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(length, token bucket) of each update: padded ones of each length, then packed ones, of the longest."""
        rollout = self.config.rollout
        packed = [(rollout.max_tokens, bucket) for bucket in rollout.token_buckets]
        return [*((length, 0) for length in rollout.buckets), *packed]

    def lower_update(
        self,
        state: TrainState,
        length: int,
        reference: Params | None = None,
        group: int | None = None,
        token_bucket: int = 0,
    ) -> jax.stages.Lowered:
        """The update for responses of `length` tokens, G = `group` targets each in a stage that imitates captions."""
        batch = self._batch(state.params, length, group)
        inputs = (batch, reference) if self.name == "rl" else (batch,)
        micro_batches = self.micro_batches(state.params, token_bucket, group)
        return self.update(micro_batches, token_bucket).lower(state, *inputs)

    def micro_batches(self, params: Params, token_bucket: int, group: int | None = None) -> int:
        """The number of micro-batches of an update, see `packing.micro_batches_of`; `params` may be abstract.

        A vision side that is trained holds more than its tokens for each picture: then it is that of the padded update.
        """
        settings, rollout = self.settings, self.config.rollout
        if not token_bucket or not train_step.vision_is_frozen(params, self.freeze):
            return settings.micro_batches
        sizes = {"prompt": self.config.model.prompt_tokens, "group": group or self.group_size}
        return packing.micro_batches_of(token_bucket, settings.micro_batches, length=rollout.max_tokens, **sizes)

    def lower_reordering(self, state: TrainState, group: int | None = None) -> jax.stages.Lowered:
        """The program that deals the rows of a batch out before a packed update, see `host_batch.make_reordering`."""
        batch = self._batch(state.params, self.config.rollout.max_tokens, group)
        return make_reordering(self.mesh).lower(batch, self._rows((), jnp.int32))

    @property
    def devices(self) -> int:
        """The number of parts that a batch is in over the mesh."""
        return sharding.parts_of(self.mesh)

    def _batch(self, params: Params, length: int, group: int | None) -> RLBatch | SFTBatch:
        if self.name == "rl":
            return self._rl_batch(params, length)
        tokens = (group or self.group_size, length)
        return SFTBatch(self.abstract_prompt(), self._rows(tokens, jnp.int32), self._rows(tokens, bool))

    @property
    def group_size(self) -> int:
        """G: samples of a prompt in rl, targets in sft; other stages have one target."""
        return {"rl": self.sampling.group_size, "sft": self.config.data.captions_per_image}.get(self.name, 1)

    def _rl_batch(self, params: Params, length: int) -> RLBatch:
        rollout = self.abstract_rollout(params)
        tokens, scores = (self.group_size, length), (self.group_size, len(self.names))
        return RLBatch(
            prompt=self.abstract_prompt(),
            image_embeds=rollout.image_embeds,
            responses=self._rows(tokens, jnp.int32),
            mask=self._rows(tokens, bool),
            old_log_probs=self._rows(tokens, jnp.float32),
            rewards=self._rows(scores, jnp.float32),
            valid=self._rows(scores, bool),
            words=self._rows((self.group_size,), jnp.int32),
            reference_words=self._rows((), jnp.int32),
            truncated=rollout.truncated,
        )

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """[B, *shape], a row for each prompt of a batch, split as batches are."""
        rows = sharding.batch_sharding(self.mesh)
        return jax.ShapeDtypeStruct((self.settings.batch_size, *shape), dtype, sharding=rows)


def _blank(processor: PromptProcessor) -> Prompt:
    """A prompt of one row: its shapes are those of any, since batches are padded to one shape."""
    return processor([np.zeros((64, 64, 3), np.uint8)], [""])


# ------------------------------------------------------------------------------------------------- the policy


def model_fields(config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the model, those among them that the recipe decides for a saved model): see RUN_FIELDS.

    Raises:
      UserError: model.path is no model, or model.decoder_path no language model.
    """
    fields = config.model.to_dict()
    if fields["decoder_path"]:
        return language.read_fields(fields["decoder_path"], fields), {}
    if not fields["path"]:
        return fields, {}
    stored = models.read_fields(fields["path"])
    overrides = {name: fields[name] for name in RUN_FIELDS if name in stored and fields[name] != ""}
    return stored | overrides, overrides


def adapted(config: ConfigDict, policy: Policy) -> Policy:
    """`policy`, with the adapters' term where the recipe trains adapters."""
    return lora.Adapted(policy, config.lora.alpha / config.lora.rank) if config.lora.rank else policy


def check_mesh(config: ConfigDict, mesh: Mesh, stage: str) -> None:
    """Raises UserError where `mesh` does not divide the batch of a stage, or can't sample as the fields say."""
    settings, parts, split = config.stages[stage], config.rollout.parts, config.mesh.sampling
    sharding.check_batch(mesh, stage, settings.batch_size, settings.micro_batches)
    if stage == "rl" and parts != "auto":
        sharding.check_parts(mesh, settings.batch_size, parts)
    if split != "auto":
        sharding.check_split(mesh, split)


def of_last_stage(config: ConfigDict, mesh: Mesh | None = None) -> tuple[Programs, Params]:
    """The programs of a recipe's last stage and its parameters as shapes, from config and mesh alone.

    A model.path or model.decoder_path that is not there is passed over: the recipe's own sizes count then. The
    tokenizer is a stand-in, since no program depends on its words.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    name = stage_order(config)[-1]
    if mesh is not None:
        check_mesh(config, mesh, name)
    source = config.model.path or config.model.decoder_path
    is_there = source and fetch(resolved(source)).is_dir()
    fields = model_fields(config)[0] if is_there else config.model.to_dict()
    policy, processor = models.build(fields | {"template": ""}, scenes_tokenizer())
    policy = adapted(config, policy)
    params = jax.eval_shape(lambda key: params_of(config, policy.init(key), name), jax.random.key(0))
    return Programs(config, name, mesh, policy, processor), params


# ------------------------------------------------------------------------------------------------- the parts


def make_optimizer(config: ConfigDict, stage: str) -> optax.GradientTransformation:
    """AdamW with linear warm-up, a constant or cosine rate, and clipping by the global norm."""
    settings, optim = config.stages[stage], config.optim
    rate, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(settings.steps, warmup) + 1)
    else:
        schedule = optax.linear_schedule(0.0, rate, warmup) if warmup else optax.constant_schedule(rate)
    # Updates count from 1 here: both ends of a schedule are 0, and a step that changes nothing is a step lost.
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            lambda count: schedule(count + 1),
            optim.b1,
            optim.b2,
            optim.eps,
            mu_dtype=optim.mu_dtype,
            weight_decay=optim.weight_decay,
        ),
    )


def freeze_of(config: ConfigDict, stage: str) -> str:
    """What is not trained in `stage`, as a regular expression; with LoRA everything but adapters."""
    freeze = config.stages[stage].freeze
    if not (config.lora.rank and stage in LORA_STAGES):
        return freeze
    return f"{lora.FREEZE_BASE}|{freeze}" if freeze else lora.FREEZE_BASE


def check_freezes(config: ConfigDict, params: Params) -> None:
    """Raises UserError where a stage's `freeze` matches no parameter or leaves none to train; `params` may be abstract.

    Raises it too where lora.targets fit nothing.
    """
    for stage in stage_order(config):
        params = jax.eval_shape(functools.partial(params_of, config, stage=stage), params)
        freeze = config.stages[stage].freeze
        where = f"config field 'stages.{stage}.freeze' ({freeze!r})"
        if freeze and not train_step.split(params, freeze)[1]:
            parts = ", ".join(f"{part}/" for part in params)
            raise UserError(f"{where} matches no parameter; their paths begin with {parts}")
        if not train_step.split(params, freeze_of(config, stage))[0]:
            raise UserError(f"{where} leaves no parameter to train; match fewer, or set stages.{stage}.steps to 0")


def params_of(config: ConfigDict, params: Params, stage: str) -> Params:
    """The parameters as `stage` holds them, from those that it starts from.

    With LoRA the first stage that imitates or reinforces captions adds the adapters and brings the base to its type.
    Stages before it make a base where there was none, from random numbers, and train all of it. Without, what a stage
    freezes is brought to `optim.frozen_dtype`, and what it trains is float32.
    """
    if not (config.lora.rank and stage in LORA_STAGES):
        trainable, frozen = train_step.split(params, config.stages[stage].freeze)
        trainable = {path: leaf.astype(jnp.float32) for path, leaf in trainable.items()}
        frozen = {path: leaf.astype(config.optim.frozen_dtype) for path, leaf in frozen.items()}
        return train_step.join(trainable, frozen)
    if lora.has_adapters(params):
        return params
    params = lora.add(params, config.lora.rank, config.lora.targets, jax.random.key(config.seed))
    return lora.cast_base(params, config.lora.base_dtype)


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Shardings of an (abstract) state: moments live where their parameters live, counters everywhere."""
    params = sharding.tree_shardings(mesh, state.params)

    def moment(path, leaf):
        # The last key of a moment's path is its parameter's path: the optimiser sees a flat dict.
        name = getattr(path[-1], "key", None) if path else None
        return sharding.tree_shardings(mesh, {name: leaf})[name] if isinstance(name, str) else sharding.replicated(mesh)

    opt_state = jax.tree_util.tree_map_with_path(moment, state.opt_state)
    return TrainState(sharding.replicated(mesh), params, opt_state, sharding.replicated(mesh))
