"""Vision pretraining: the labels of image tokens, and the step that learns them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from balcap_jax import train_step
from balcap_jax.data.scenes import labels, world
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.llava import Llava
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.training.vision_stage import VisionBatch, make_vision_step

TOWER = VisionConfig(image_size=12, patch_size=4, width=32, layers=2, heads=2, mlp=32)
POLICY = Llava(TOWER, DecoderConfig(16, 16, 1, 2, 2, 8, 16), image_token=3, pad_token=0, end_tokens=(2,))
CLASSES = (3, 5)


def batch(seed: int = 0) -> VisionBatch:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (8, 12, 12, 3)).astype(np.uint8)
    classes = np.stack([rng.integers(0, count, (8, 9)) for count in CLASSES], -1).astype(np.int32)
    return VisionBatch(jnp.asarray(images), jnp.asarray(classes))


def start(freeze: str = "^(projector|decoder)/"):
    optimizer = optax.adamw(3e-3)
    return optimizer, train_step.init_state(jax.jit(POLICY.init)(jax.random.key(0)), optimizer, freeze), freeze


def test_labels_name_the_object_at_the_centre_of_each_token():
    for seed in range(50):
        scene = world.sample_scene(seed)
        for side in (3, 6, 7):
            found = labels.of_tokens(scene, side)
            for row in range(side):
                for column in range(side):
                    cell = int((row + 0.5) / side * 3) * 3 + int((column + 0.5) / side * 3)
                    one = next((o for o in scene.objects if o.cell == cell), None)
                    shape, colour, size, texture, ground, pattern = found[row * side + column]
                    assert (world.GROUNDS[ground], world.PATTERNS[pattern]) == (scene.ground, scene.pattern)
                    if one is None:
                        assert (shape, colour, size, texture) == (0, 0, 0, 0)
                    else:
                        assert world.SHAPES[shape - 1] == one.shape
                        assert world.COLOURS[colour - 1] == one.colour
                        assert world.SIZES[size - 1] == one.size
                        assert world.TEXTURES[texture - 1] == one.texture


def test_loss_and_accuracy_equal_a_slow_computation():
    optimizer, state, freeze = start()
    data = batch()
    features = np.asarray(POLICY.features(state.params, data.images), np.float64)
    head = np.linalg.qr(np.random.default_rng(0).normal(size=(32, sum(CLASSES))))[0]
    loss, right = 0.0, []
    for b in range(8):
        for i in range(9):
            logits = features[b, i] @ head
            for a, part in enumerate((logits[:3], logits[3:])):
                loss += np.log(np.exp(part).sum()) - part[data.labels[b, i, a]]
                right.append(part.argmax() == data.labels[b, i, a])
    _, metrics = make_vision_step(POLICY, optimizer, CLASSES, freeze=freeze)(state, data)
    np.testing.assert_allclose(float(metrics["loss"].total), loss / 72, rtol=1e-5)
    accuracy = metrics["vision/accuracy"]
    np.testing.assert_allclose(float(accuracy.total / accuracy.count), np.mean(right), rtol=1e-6)


def test_it_learns_and_leaves_the_rest_alone():
    optimizer, state, freeze = start()
    before = jax.tree.map(np.asarray, state.params)
    step = make_vision_step(POLICY, optimizer, CLASSES, freeze=freeze)
    data = batch()
    losses = []
    for _ in range(60):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"].total))
    assert losses[-1] < 0.5 * losses[0]
    for part in ("projector", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, before[part], state.params[part])


def test_micro_batches_add_up():
    updated = []
    for parts in (1, 4):
        _, state, freeze = start()
        optimizer = optax.sgd(0.1)
        state = train_step.init_state(state.params, optimizer, freeze)
        step = make_vision_step(POLICY, optimizer, CLASSES, freeze=freeze, micro_batches=parts)
        updated.append(step(state, batch())[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *updated)
