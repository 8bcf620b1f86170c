"""The toy tower's pretraining: which object, colour and size is seen where. CLIP's tower, as LLaVA's, needs none."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balcap_jax.cli.errors import UserError
from balcap_jax.data.scenes import labels
from balcap_jax.data.scenes.world import Scene
from balcap_jax.models.policy import Params, Policy
from balcap_jax.train_step import (
    CompiledStep,
    Metrics,
    TrainState,
    accumulate,
    apply_gradients,
    as_mean,
    finalise,
    masked_mean,
)
from balcap_jax.training.job import Examples, Job, Stage


class VisionBatch(NamedTuple):
    """`Prompt.images` and the classes of each image token by attribute, [B, I, A] int32."""

    images: Any
    labels: jax.Array


class VisionStage(Stage):
    """Pretraining of the vision tower on what is seen where, the miniature's stand-in for CLIP."""

    name = "vision"
    writes_captions = False

    def __init__(self, job: Job):
        super().__init__(job)
        # Families differ in the number of features that a tower of some width gives.
        size, processor = job.config.model.image_size, job.processor
        blank = processor([np.zeros((size, size, 3), np.uint8)], [""])
        params = jax.eval_shape(job.policy.init, jax.random.key(0))
        width, needed = jax.eval_shape(job.policy.features, params, blank.images).shape[-1], sum(labels.CLASSES)
        if width < needed:
            raise UserError(
                f"the vision tower gives {width} features, but the stage vision tells {needed} classes apart and needs "
                f"at least as many; raise model.vision_width ({job.config.model.vision_width}), or leave the stage out"
            )
        placed = int((blank.tokens == processor.tokenizer.convert_tokens_to_ids(processor.image_token)).sum())
        self._side = math.isqrt(placed)
        if not placed == self._side**2 == processor.image_tokens:
            raise UserError(
                f"a picture of {size} x {size} pixels has {placed} image tokens of up to {processor.image_tokens}, but "
                "the stage vision needs as many as there may be, in a square; set model.max_image_tokens to a square "
                "number that the picture fills, or leave the stage out"
            )
        self._update: Any = None

    def advance(self, state: TrainState, examples: Examples, step: int) -> tuple[TrainState, dict[str, float], None]:
        """One update on the examples' images. -> (state, values for the log, no samples)"""
        job = self.job
        classes = np.stack([labels.of_tokens(Scene.from_json(text), self._side) for text in examples["scene"]])
        images = job.processor.prepare_images(examples["image"], examples["id"])
        batch = VisionBatch(*self.rows.put((images, classes)))
        if self._update is None:
            options = {"freeze": self.programs.freeze, "micro_batches": self.programs.settings.micro_batches}
            update = make_vision_step(job.policy, self.programs.optimizer, labels.CLASSES, **options)
            with job.clock.phase("compile"):
                self._update = update.lower(state, batch).compile()
        with job.clock.phase("update"):
            state, metrics = self._update(state, batch)
            values = finalise(metrics)
        return state, values | {"tokens": float(math.prod(batch.labels.shape[:-1]))}, None


def make_vision_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    classes: tuple[int, ...],
    *,
    freeze: str = "",
    micro_batches: int = 1,
) -> CompiledStep:
    """The compiled update of vision pretraining: every image token is classified by each of A attributes.

    It stands in for the pretraining that a real model's CLIP tower brings. The classifier is a fixed orthonormal map
    of the features (Hoffer et al., arXiv 1801.04540). So the stage adds no parameters that the policy would have to
    drop afterwards. `classes[a]` is the number of classes of attribute a; their sum must not exceed the tower's
    width.
    """

    def step(state: TrainState, batch: VisionBatch) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Params, part: VisionBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
            features = policy.features(params, part.images).astype(jnp.float32)
            logits = features @ _orthonormal(features.shape[-1], sum(classes))
            loss, right, start = 0.0, [], 0
            for a, count in enumerate(classes):
                of_attribute = logits[..., start : start + count]
                loss += optax.softmax_cross_entropy_with_integer_labels(of_attribute, part.labels[..., a]).sum()
                right.append(of_attribute.argmax(-1) == part.labels[..., a])
                start += count
            return loss / batch.labels[..., 0].size, {"right": jnp.stack(right, -1)}

        loss, saved, gradient = accumulate(loss_fn, state.params, batch, freeze, micro_batches)
        state, update_metrics = apply_gradients(optimizer, state, gradient, freeze)
        accuracy = masked_mean(saved["right"], jnp.ones_like(saved["right"]))
        return state, {"loss": as_mean(loss), "vision/accuracy": accuracy, **update_metrics}

    return CompiledStep(step)


def _orthonormal(rows: int, columns: int) -> jax.Array:
    """A fixed [rows, columns] matrix with orthonormal columns, the same on every machine and in every run."""
    return jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(rows, columns)))[0], jnp.float32)
