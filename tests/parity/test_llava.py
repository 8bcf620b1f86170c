"""The whole LLaVA against transformers: random weights at small size, fp32 unless the test's name says bf16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the reference implementations need torch, of the [dev] extra")
pytest.importorskip("transformers")

import transformers  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402
from reference_llava import make_reference, pixels, relative_error, to_params  # noqa: E402
from tiny_llava import BOS, EOS, IMAGE, PAD, make_policy  # noqa: E402

from balcap_jax.models import attention, decoder  # noqa: E402
from balcap_jax.models.decoder import Block  # noqa: E402
from balcap_jax.models.llava import vision  # noqa: E402
from balcap_jax.models.llava.processing import MAX_ASPECT, VICUNA_TEMPLATE, LlavaProcessor, fit  # noqa: E402
from balcap_jax.models.policy import Prompt  # noqa: E402
from balcap_jax.rollout import Sampling, make_rollout  # noqa: E402

# Two correct fp32 implementations agree to about 1e-6 at these sizes.
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
B, G, P, R, V = 3, 2, 19, 6, 41
# Words before and after each image, per batch.
BATCHES = {0: [(0, 2), (3, 1), (4, 5)], 1: [(1, 1), (0, 9), (7, 0)]}


def small_policy(**language):
    # Norms whose epsilons differ and matter, so that none stands where another belongs.
    tower = {"norm_eps": 1e-2, "keep_unused": True, "layers": 4, "dtype": language.get("dtype", "float32")}
    return make_policy(tower=tower, norm_eps=1e-3, vocab=V, **language)


@functools.cache
def models():
    """(transformers model, our policy, its parameters) with the same weights."""
    policy = small_policy()
    reference = make_reference(policy)
    return reference, policy, to_params(policy, dict(reference.named_parameters()))


def make_batch(policy, seed: int, side: str = "right") -> tuple[Prompt, list[list[int]]]:
    """Prompts of B images with text around them, padded on `side`; and their rows of tokens."""
    rng, size = np.random.default_rng(seed), policy.vision.image_size
    rows = []
    for before, after in BATCHES[seed]:
        words = rng.integers(IMAGE + 1, V, before + after).tolist()
        rows.append([BOS, *words[:before], *[IMAGE] * policy.image_tokens, *words[before:]])
    tokens, mask = np.full((B, P), PAD, np.int32), np.zeros((B, P), bool)
    for b, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(P - len(row), P)
        tokens[b, where], mask[b, where] = row, True
    positions = np.where(mask, np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    return Prompt(tokens, mask, positions, rng.integers(0, 256, (B, size, size, 3)).astype(np.uint8)), rows


def make_responses(seed: int) -> np.ndarray:
    """Tokens [B, G, R]."""
    return np.random.default_rng(100 + seed).integers(IMAGE + 1, V, (B, G, R)).astype(np.int32)


def reference_inputs(rows, images, side: str = "right") -> dict[str, torch.Tensor]:
    """The reference's arguments for `rows` of tokens, padded on `side`."""
    longest = max(map(len, rows))
    pad = [[PAD] * (longest - len(row)) for row in rows]
    real = torch.tensor([[1] * len(row) + [0] * len(p) for row, p in zip(rows, pad, strict=True)])
    return {
        "input_ids": torch.tensor([row + p if side == "right" else p + row for row, p in zip(rows, pad, strict=True)]),
        "attention_mask": real if side == "right" else real.flip(1),
        "pixel_values": pixels(images),
    }


def reference_logits(reference, prompt, rows, responses, side: str = "right") -> torch.Tensor:
    """[B, G, R, V]: what predicts each response token, every sample a sequence of its own."""
    per_sample = []
    for g in range(G):
        longer = [row + responses[b, g].tolist() for b, row in enumerate(rows)]
        inputs = reference_inputs(longer, prompt.images, side)
        inputs["pixel_values"] = inputs["pixel_values"].to(reference.dtype)
        logits = reference(**inputs).logits
        ends = [np.flatnonzero(mask)[-1] for mask in inputs["attention_mask"].numpy()]
        per_sample.append(torch.stack([logits[b, end - R : end] for b, end in enumerate(ends)]))
    return torch.stack(per_sample, dim=1)


def our_logits(policy, params, prompt: Prompt, responses) -> tuple[jax.Array, jax.Array]:
    """[B, G, R, V] by the update's path, and [B, V] of the first response token by the rollout's."""
    embeds = policy.encode(params, prompt.images)
    _, first = policy.prefill(params, prompt, embeds)
    x = policy._prompt_embeddings(params, prompt, embeds)
    y = decoder.embed(policy.decoder, params["decoder"], responses)
    hidden = decoder.forward(policy.decoder, params["decoder"], x, prompt.mask, prompt.positions, y)
    return decoder.logits(policy.decoder, params["decoder"], hidden), first


# ---- the model


def test_every_block_of_the_tower_equals_transformers():
    """Patches and first norm, each layer, features without the class token, projector; and what no feature needs."""
    reference, policy, params = models()
    c, images = policy.vision, make_batch(policy, 0)[0].images

    @jax.jit
    def blocks(params):
        tower = params["vision"]
        x = vision.Patches(c).apply({"params": tower["patches"]}, images)
        outputs = [x]
        for layers in (tower["layers"], tower["unused"]["layers"]):
            for i in range(len(layers["up"]["bias"])):
                x = vision.VisionBlock(c).apply({"params": jax.tree.map(lambda leaf, i=i: leaf[i], layers)}, x)
                outputs.append(x)
        last = vision.nn.LayerNorm(c.norm_eps).apply({"params": tower["unused"]["norm"]}, x[:, 0])
        return outputs, last, policy.features(params, images), policy.encode(params, images)

    outputs, last, features, embeds = blocks(params)
    with torch.no_grad():
        theirs = reference.model.vision_tower(pixels(images), output_hidden_states=True)
        # Layer -2 without the class token, as LLaVA takes them.
        their_features = theirs.hidden_states[-2][:, 1:]
        their_embeds = reference.model.multi_modal_projector(their_features)
        whole = reference.model.get_image_features(pixels(images))
    whole = torch.stack(list(getattr(whole, "pooler_output", whole)))
    assert len(outputs) == len(theirs.hidden_states) == c.layers + 1
    errors = [relative_error(x, y) for x, y in zip(outputs, theirs.hidden_states, strict=True)]
    print("tower blocks", [f"{error:.1e}" for error in errors])
    ends = {
        "post norm": relative_error(last, theirs.pooler_output),
        "features": relative_error(features, their_features),
        "projector": relative_error(embeds, their_embeds),
        "image features": relative_error(embeds, whole),
    }
    print({name: f"{error:.1e}" for name, error in ends.items()})
    assert max(errors + list(ends.values())) <= TOLERANCE


def test_every_decoder_block_equals_transformers():
    reference, policy, params = models()
    c, side = policy.decoder, "left"
    prompt, rows = make_batch(policy, 1, side)

    @jax.jit
    def blocks(params):
        x = policy._prompt_embeddings(params, prompt, policy.encode(params, prompt.images))
        block, rope, outputs = Block(c), decoder.rope_table(c, prompt.positions), [x]
        for i in range(c.layers):
            weights = {"params": jax.tree.map(lambda stacked, i=i: stacked[i], params["decoder"]["layers"])}
            q, k, v = block.apply(weights, x, rope, method="qkv")
            x = block.apply(weights, x, attention.causal(q, k, v, prompt.mask), method="output")
            outputs.append(x)
        # The last of the reference's hidden states has gone through the final norm.
        outputs[-1] = decoder.RMSNorm(c.norm_eps).apply({"params": params["decoder"]["norm"]}, x)
        return outputs

    inputs = reference_inputs(rows, prompt.images, side)
    with torch.no_grad():
        theirs = reference(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    errors = [relative_error(x[prompt.mask], y[real]) for x, y in zip(blocks(params), theirs, strict=True)]
    print("decoder blocks", [f"{error:.1e}" for error in errors])
    assert max(errors) <= TOLERANCE, errors


def test_logits_equal_transformers():
    reference, policy, params = models()
    ours = jax.jit(functools.partial(our_logits, policy))
    allowed = [v for v in range(V) if v not in policy.forbidden]
    errors = {}
    for seed in BATCHES:
        for side in ("right", "left"):
            (prompt, rows), responses = make_batch(policy, seed, side), make_responses(seed)
            logits, first = ours(params, prompt, responses)
            with torch.no_grad():
                theirs = reference_logits(reference, prompt, rows, responses, side)
            errors[seed, side] = relative_error(logits, theirs)
            errors[seed, side, "prefill"] = relative_error(first[:, allowed], theirs[:, 0, 0, allowed])
    print("logits", {key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE, errors


def test_gradients_of_every_parameter_equal_transformers():
    reference, policy, params = models()
    (prompt, rows), responses = make_batch(policy, 0), make_responses(0)
    weights = np.random.default_rng(5).standard_normal((B, G, R)).astype(np.float32)

    def ours(params):
        embeds = policy.encode(params, prompt.images)
        return jnp.sum(weights * policy.log_probs(params, prompt, embeds, responses))

    loss, gradients = jax.jit(jax.value_and_grad(ours))(params)

    reference.zero_grad()
    logits = reference_logits(reference, prompt, rows, responses)
    logits = logits.index_fill(-1, torch.tensor(policy.forbidden), -1e30)
    chosen = torch.gather(logits.log_softmax(-1), -1, torch.tensor(responses).long()[..., None])[..., 0]
    their_loss = (torch.tensor(weights) * chosen).sum()
    their_loss.backward()
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)

    # What no feature depends on has no gradient there, and zeros here.
    theirs = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in reference.named_parameters()
    }
    theirs, gradients = (flatten_dict(tree, sep="/") for tree in (to_params(policy, theirs), gradients))
    unused = {path for path in theirs if path.startswith("vision/unused/")}
    assert {path for path, leaf in theirs.items() if not np.any(leaf)} == unused
    assert {path for path, leaf in gradients.items() if not np.any(leaf)} == unused
    errors = {}
    for path in theirs.keys() - unused:
        # A key's bias moves all logits of a softmax row alike: its gradient is zero but for rounding, so it is
        # measured against that of the kernel beside it.
        scale = theirs[path.replace("vision/layers/k/bias", "vision/layers/k/kernel")]
        errors[path] = float(np.max(np.abs(gradients[path] - theirs[path])) / np.max(np.abs(scale)))
    worst = sorted(errors.items(), key=lambda item: -item[1])[:4]
    print("gradients", worst)
    assert worst[0][1] <= GRADIENT_TOLERANCE, worst


@pytest.mark.parametrize(("seed", "side"), [(0, "left"), (1, "right")])
def test_greedy_generation_equals_transformers_for_64_tokens(seed, side):
    reference, policy, params = models()
    # No sample may end, so that all 64 tokens are compared.
    banned = (PAD, BOS, EOS, IMAGE)
    policy = dataclasses.replace(policy, forbidden=banned)
    prompt, rows = make_batch(policy, seed, side)
    rollout = make_rollout(policy, Sampling(1, 64, greedy=True))
    out = rollout(params, prompt, jnp.arange(B, dtype=jnp.uint32), jnp.uint32(0), jnp.uint32(0))
    inputs = reference_inputs(rows, prompt.images, "left")
    settings = transformers.GenerationConfig(
        max_new_tokens=64, do_sample=False, suppress_tokens=list(banned), pad_token_id=PAD, eos_token_id=EOS
    )
    with torch.no_grad():
        theirs = reference.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
    assert theirs.shape == (B, 64)
    assert len(np.unique(theirs)) > 8  # not one token over and over
    np.testing.assert_array_equal(out.tokens[:, 0], theirs.numpy())


def test_bf16_is_as_near_to_fp32_as_transformers_bf16():
    reference, _, params = models()
    policy = small_policy(dtype="bfloat16")
    (prompt, rows), responses = make_batch(policy, 1), make_responses(1)
    logits, _ = jax.jit(functools.partial(our_logits, policy))(params, prompt, responses)
    with torch.no_grad():
        exact = reference_logits(reference, prompt, rows, responses)
        theirs = reference_logits(make_reference(policy).to(torch.bfloat16), prompt, rows, responses)
    ours, theirs = (relative_rms(x, exact) for x in (logits, theirs))
    print(f"bf16: ours {ours:.1e}, transformers {theirs:.1e}")
    assert ours <= 1.25 * theirs
    assert ours <= 0.05


def relative_rms(ours, exact: torch.Tensor) -> float:
    ours = ours.float().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours, np.float32)
    return float(np.sqrt(np.mean((ours - exact.numpy()) ** 2) / np.mean(exact.numpy() ** 2)))


# ---- the processor

# One message as the chat format of LLaVA-1.5 writes it: "USER: <image>\nText ASSISTANT:" (model page of transformers'
# documentation), images before the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@functools.cache
def processors() -> tuple[transformers.LlavaProcessor, LlavaProcessor]:
    """transformers' and ours, at the published size: 336 pixels, patches of 14, a Llama tokenizer."""
    texts = ["USER: describe the image in detail.\n\nWhat is it? ASSISTANT: a red ball, left of the cube"] * 2
    tokenizer = transformers.LlamaTokenizer().train_new_from_iterator(texts, vocab_size=300, show_progress=False)
    tokenizer.add_bos_token = True
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True, normalized=False)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    side = {"height": 336, "width": 336}
    theirs = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return theirs, LlavaProcessor(tokenizer, 336, 576, prompt_tokens=640, template=VICUNA_TEMPLATE)


def picture(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(height * width).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize(
    "instruction", ["describe the image in detail.", "  what is\n\nit?  ", "Größe – 大?", "a {red} <b>ball</b>"]
)
def test_ids_positions_and_pixels_equal_transformers_for_a_chat_message(instruction):
    theirs, ours = processors()
    image = picture(427, 640)
    message = {"role": "user", "content": [{"type": "text", "text": instruction}, {"type": "image"}]}
    text = theirs.apply_chat_template([message], add_generation_prompt=True)
    assert text == f"USER: <image>\n{instruction} ASSISTANT:"
    expected = theirs(images=image, text=text, return_tensors="pt")
    ids = expected["input_ids"][0].tolist()
    assert (ids[0], ids.count(theirs.image_token_id)) == (theirs.tokenizer.bos_token_id, 576)

    prompt = ours([np.asarray(image)], [instruction])
    assert prompt.tokens[0, : len(ids)].tolist() == ids
    assert prompt.mask[0].tolist() == [True] * len(ids) + [False] * (640 - len(ids))
    assert (prompt.tokens[0, len(ids) :] == theirs.tokenizer.pad_token_id).all()
    assert prompt.positions[0, : len(ids)].tolist() == list(range(len(ids)))
    assert relative_error(pixels(prompt.images), expected["pixel_values"]) <= 1e-6


# Longer sides that do not come out even, images smaller than the crop, strips, a single pixel, and the sizes of the
# largest and the smallest of a folder of photographs.
SIZES = [(1, 1), (1, 60), (60, 1), (7, 31), (31, 33), (32, 32), (32, 33), (33, 32), (45, 91), (47, 97), (101, 67)]


@pytest.mark.parametrize("size", [32, 336])
def test_pixels_equal_the_clip_image_processor(size):
    reference = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_rescale=False, do_normalize=False
    )
    for height, width in SIZES if size == 32 else [(3578, 2064), (285, 190), (427, 640), (336, 500), (335, 337)]:
        image = picture(height, width)
        theirs = reference(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(fit(np.asarray(image), size), np.moveaxis(theirs, 0, -1), f"{height} x {width}")


@pytest.mark.parametrize("axis", [0, 1])
def test_very_long_images_keep_their_middle(axis):
    """Beyond MAX_ASPECT the crop is that of the whole image, to within a pixel along the longer edge."""
    ramp = np.arange(40 * 4 * MAX_ASPECT) // 40 % 251
    image = np.stack([np.broadcast_to(ramp[:, None], (len(ramp), 4))] * 3, -1).astype(np.uint8)
    whole = Image.fromarray(image).resize((32, len(ramp) * 8), Image.Resampling.BICUBIC)
    top = (whole.height - 32) // 2
    expected = np.asarray(whole)[top - 1 : top + 33]
    got = fit(image if axis == 0 else image.swapaxes(0, 1), 32)
    got = got if axis == 0 else got.swapaxes(0, 1)
    assert any(np.array_equal(got, expected[shift : shift + 32]) for shift in range(3))
    assert fit(np.zeros((1, 200_000, 3), np.uint8), 32).shape == (32, 32, 3)
