"""The towers and mergers of the Qwen families against transformers: random weights, fp32, many image sizes."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference implementations need torch, of the [dev] extra")
pytest.importorskip("transformers")

from reference_qwen import grid_thw, make_reference, pixels, relative_error, to_params  # noqa: E402
from tiny_qwen import FAMILIES, make_images, make_policy  # noqa: E402

from balcap_jax.models.qwen2_5_vl import vision  # noqa: E402
from balcap_jax.models.qwen3_vl import vision as vision_3  # noqa: E402

# Two correct fp32 implementations agree to about 1e-6 at these sizes.
TOLERANCE = 1e-5
# Rows and columns of merged tokens; windows of Qwen2.5-VL are 4 x 4, an image has at most 40 tokens. The grid of 5 x 5
# positions of Qwen3-VL is stretched to some and shrunk to others.
GRIDS = {
    "one token": (1, 1),
    "smaller than a window": (2, 3),
    "one window": (4, 4),
    "one row": (1, 4),
    "one column": (4, 1),
    "two windows, one partial": (4, 5),
    "four windows, three partial": (5, 5),
    "whole windows": (4, 8),
    "wide, partial": (3, 11),
    "tall, partial": (11, 3),
    "fills the cap, wide": (5, 8),
    "fills the cap, tall": (10, 4),
    "four windows, all partial but one": (5, 7),
    "all windows in one row": (3, 13),
}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """(transformers model, our policy, its parameters) with the same weights."""
    policy = make_policy(request.param)
    reference = make_reference(policy)
    return reference, policy, to_params(policy, reference.state_dict())


def outputs_of_blocks(reference, policy, patches, grids) -> list[torch.Tensor]:
    """[patches, width] after each block, all images one after the other, in the reference's window order."""
    seen = []
    hooks = [block.register_forward_hook(lambda *args: seen.append(args[2])) for block in reference.model.visual.blocks]
    with torch.no_grad():
        reference.model.visual(pixels(policy.vision, np.concatenate(patches)), grid_thw=grid_thw(grids))
    for hook in hooks:
        hook.remove()
    return seen


def test_every_block_equals_transformers(models):
    reference, policy, params = models
    c, grids = policy.vision, [(5, 7), (1, 1), (3, 11)]
    images, patches = make_images(policy, grids)

    @jax.jit
    def blocks_of_3(params):
        x = vision.PatchEmbedding(c, bias=True).apply({"params": params["patch"]}, images.patches)
        x = x + vision_3.position_embeddings(c, params["positions"], images)
        x, mask, places = (array.reshape(3, c.windows * c.slots, -1) for array in (x, images.mask, images.positions))
        rope, outputs = vision.rope_table(c, places), []
        for i in range(c.layers):
            weights = jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"])
            x = vision_3.VisionBlock(c).apply({"params": weights}, x, rope, mask[..., 0])
            outputs.append(x.reshape(*images.mask.shape, -1))
        last, _ = vision_3.encode(c, params, images)
        return outputs, last.reshape(*images.mask.shape, -1)

    @jax.jit
    def blocks(params):
        x = vision.PatchEmbedding(c).apply({"params": params["patch"]}, images.patches)
        rope, outputs = vision.rope_table(c, images.positions), []
        for i in range(c.layers):
            weights = jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"])
            is_full = i in c.full_attention_layers
            x = vision.VisionBlock(c).apply({"params": weights}, x, rope, images.mask, is_full)
            outputs.append(x)
        return outputs, vision.encode(c, params, images)

    run = blocks_of_3 if hasattr(c, "deepstack_layers") else blocks
    ours, last = run(params["vision"])
    theirs = outputs_of_blocks(reference, policy, patches, grids)
    # The real slots, window by window, are the reference's order of patches.
    errors = [relative_error(x[images.mask], y) for x, y in zip(ours, theirs, strict=True)]
    print("blocks", [f"{error:.1e}" for error in errors])
    assert max(errors) <= TOLERANCE, errors
    assert relative_error(last[images.mask], theirs[-1]) <= TOLERANCE


def test_one_program_encodes_images_of_every_size(models):
    reference, policy, params = models
    traces = []

    @jax.jit
    def encode(params, images):
        traces.append(images.patches.shape)
        return policy.features(params, images), policy.encode(params, images)

    names, grids = list(GRIDS), list(GRIDS.values())
    errors = {}
    for start in range(0, len(grids), 2):
        batch = grids[start : start + 2]
        images, patches = make_images(policy, batch, seed=start)
        features, embeds = encode(params, images)
        for b, (rows, columns) in enumerate(batch):
            with torch.no_grad():
                seen = reference.model.get_image_features(pixels(policy.vision, patches[b]), grid_thw([batch[b]]))
            # Behind the embeddings, DeepStack's features of the tower's layers.
            theirs = [seen.pooler_output[0], *(x[0] for x in getattr(seen, "deepstack_features", ()))]
            ours = np.split(np.asarray(embeds[b, : rows * columns]), len(theirs), axis=-1)
            assert len(theirs) == 1 + len(getattr(policy.vision, "deepstack_layers", ()))
            errors[names[start + b]] = max(map(relative_error, ours, theirs))
            assert not np.any(features[b, rows * columns :])  # no noise of padding slots
    print("grids", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE, errors
    assert len(errors) == len(GRIDS) >= 12
    assert len(traces) == 1


def test_an_image_does_not_see_its_neighbours_or_the_noise_of_empty_slots(models):
    _, policy, params = models
    encode = jax.jit(policy.encode)
    (first, _), (second, _) = (make_images(policy, [(3, 5), grid], seed=7) for grid in ((2, 3), (5, 8)))
    second = second._replace(patches=np.where(second.mask[..., None], second.patches, 255 - second.patches))
    second.patches[0][first.mask[0]] = first.patches[0][first.mask[0]]
    ours = [np.asarray(encode(params, images))[0, :15] for images in (first, second)]
    np.testing.assert_array_equal(*ours)


def test_a_layer_runs_only_one_kind_of_attention():
    """The scores of full attention, [.., W * S, W * S], are computed inside a conditional and nowhere else."""
    policy = make_policy()
    params = jax.eval_shape(policy.init, jax.random.key(0))
    images, _ = make_images(policy, [(5, 7)])
    c = policy.vision
    size = c.windows * c.slots

    def sizes(jaxpr, inside: bool):
        for equation in jaxpr.eqns:
            yield from ((inside, variable.aval.shape) for variable in equation.outvars)
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner, inside or equation.primitive.name == "cond")

    def places(config):
        traced = jax.make_jaxpr(lambda p: vision.encode(config, p, images))(params["vision"])
        return {inside for inside, shape in sizes(traced.jaxpr, False) if shape[-2:] == (size, size)}

    assert places(c) == {True}
    assert places(dataclasses.replace(c, full_attention_layers=())) == set()
