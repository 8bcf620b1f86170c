"""The main job with the Qwen families and with adapters: through every stage, resumed, to a model."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_runs import assert_same_run, read_arrays, read_metrics, read_model, read_summary, rewind, train

from balcap_jax import models

# The same 3 x 3 image tokens as the recipe's, each of 2 x 2 patches, in windows of 2 x 2 tokens.
QWEN = {
    "model__family": "qwen2_5_vl",
    "model__patch_size": 4,
    "model__max_image_tokens": 9,
    "model__window_size": 16,
    "model__full_attention_layers": 1,
    "model__mrope_section": "1,1,2",
    "model__qkv_bias": True,
    "stages__vision__freeze": "^(merger|decoder)/",
    "stages__align__freeze": "^vision/",
    "stages__rl__freeze": "^(vision|merger)/",
}
QWEN3 = QWEN | {
    "model__family": "qwen3_vl",
    "model__vision_positions": 16,
    "model__deepstack_layers": 0,
    "model__qkv_bias": False,
    "stages__vision__freeze": "^(merger|deepstack|decoder)/",
    "stages__rl__freeze": "^(vision|merger|deepstack)/",
}
LORA = {"lora__rank": 2, "lora__alpha": 3.0, "loss__kl_coef": 0.5}
SCALE = 1.5
BRIEF = {
    "stages__sft__steps": 2,
    "stages__rl__steps": 3,
    "stages__rl__eval_every": 0,
    "log__tensorboard": False,
    "log__samples_every": 0,
}
# vision is steps 1 and 2, align 3, sft 4 and 5, rl 6 to 8; saved every 2 and at the end of each stage.
STAGES = {"stages__order": "vision,align,sft,rl", "stages__vision__steps": 2, "stages__align__steps": 1}
STAGES |= {f"stages__{name}__batch_size": 4 for name in ("vision", "align")}
STAGES |= {f"stages__{name}__warmup_steps": 1 for name in ("vision", "align")}
FAMILIES = {"qwen2_5_vl": QWEN, "qwen3_vl": QWEN3}
EACH = ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, data_dir):
    """family -> (the overrides, the workdir of an uninterrupted run of all stages), run on first use."""
    done = {}

    def run(family: str) -> tuple[dict, Path]:
        given = FAMILIES[family] | LORA | BRIEF | STAGES
        if family not in done:
            workdir = tmp_path_factory.mktemp("families") / "whole"
            train(workdir, data_dir, **given)
            done[family] = given, workdir
        return done[family]

    return run


def state_of(workdir, step: int) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint by path, such as "['decoder']['embed']"."""
    arrays = read_arrays(workdir / "checkpoints" / str(step) / "arrays")
    start = "['state']['params']"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def is_adapter(name: str) -> bool:
    return "lora_" in name


def assert_merged(model: dict[str, np.ndarray], trained: dict[str, np.ndarray]) -> None:
    """The saved model is base + scale * a b, rounded once to the base's type and written in fp32."""
    assert model.keys() == {name for name in trained if not is_adapter(name)}
    moved = 0
    for name, array in model.items():
        wanted, layer = trained[name], name.removesuffix("['kernel']")
        assert array.dtype == np.float32
        array = array.astype(wanted.dtype)
        if f"{layer}['lora_a']" in trained:
            a, b = (trained[f"{layer}['lora_{side}']"].astype(np.float64) for side in "ab")
            exact = wanted + SCALE * (a @ b).reshape(wanted.shape)
            error = np.abs(array.astype(np.float64) - exact)
            assert (error <= 2**-8 * np.abs(exact) + 1e-12).all(), name
            moved += int((array != wanted).any())
        else:
            assert array.tobytes() == wanted.tobytes(), name
    assert moved == 7


# After step 3 the parameters hold no adapters yet.
@pytest.mark.parametrize(("step", "stage"), [(3, "align"), (6, "rl")])
@pytest.mark.parametrize("family", EACH)
def test_all_stages_resumed_equal_uninterrupted(tmp_path, data_dir, run_of, family, step, stage):
    """Nothing was evaluated, or all of it was lost: the ends of align and of sft are evaluated from checkpoints."""
    given, whole = run_of(family)
    resumed = tmp_path / "resumed"
    rewind(whole, resumed, step)
    (resumed / "summary.json").unlink()
    for file in (resumed / "samples").glob("*.jsonl"):
        file.unlink()
    done = train(resumed, data_dir, **given)
    assert f"going on after step {step} of 8 ({stage})" in done.stdout
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_stage_trains(run_of, family):
    _, whole = run_of(family)
    log = read_metrics(whole)
    assert [line["stage"] for line in log] == ["vision"] * 2 + ["align"] + ["sft"] * 2 + ["rl"] * 3
    divergence = [line["kl"] for line in log if line["stage"] == "rl"]
    assert divergence[0] < 1e-6 < divergence[-1], "the KL term never left 0: nothing was tested"
    assert max(line["drift/max_abs_logp"] for line in log if line["stage"] == "rl") < 1e-3
    assert "b-CapScore" in (whole / "report.html").read_text()
    for evaluations in read_summary(whole).values():
        assert list(evaluations) == ["align", "sft", "rl"]
        assert evaluations["align"] != evaluations["sft"]

    before, seen, sft, rl = (state_of(whole, step) for step in (2, 3, 5, 8))
    assert not any(map(is_adapter, seen))
    assert all(before[name].tobytes() == seen[name].tobytes() for name in seen if name.startswith("['vision']"))
    mergers = ["['merger']['second']['kernel']", "['deepstack']['layers']['second']['kernel']"]
    for name in mergers[: 1 + (family == "qwen3_vl")]:
        assert (before[name] != seen[name]).any()
    for trained in (sft, rl):
        for (
            name,
            array,
        ) in seen.items():  # In bf16 from the first step with adapters on, and bit for bit the same since.
            assert trained[name].dtype == jnp.bfloat16
            assert trained[name].tobytes() == array.astype(jnp.bfloat16).tobytes(), name
    adapters = [name for name in sft if is_adapter(name)]
    assert len(adapters) == 14
    assert all((sft[name] != rl[name]).any() for name in adapters)
    reference = {
        name.removeprefix("['reference']"): array
        for name, array in read_arrays(whole / "checkpoints" / "8" / "arrays").items()
        if name.startswith("['reference']")
    }
    assert reference.keys() == set(adapters)  # Of the base there is one copy.
    assert all(reference[name].tobytes() == sft[name].tobytes() for name in adapters)
    assert_merged(read_model(whole / "model"), rl)

    policy, params, processor = models.load(whole / "model")
    prompt = processor([np.full((24, 24, 3), 90, np.uint8)], ["describe"])
    embeds = jax.jit(policy.encode)(params, prompt.images)
    assert embeds.shape == (1, 9, 16 * (1 + (family == "qwen3_vl")))  # and what the first layer adds
    assert np.isfinite(embeds).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("family", EACH)
def test_new_adapters_on_a_saved_model(tmp_path, data_dir, run_of, family):
    """The way of published models: base from a directory, adapters in RL alone."""
    given, whole = run_of(family)
    base = tmp_path / "base"
    shutil.copytree(whole / "model", base)
    train(tmp_path / "run", data_dir, **(given | {"stages__order": "rl", "model__path": base}))
    trained, start = state_of(tmp_path / "run", 3), read_model(base)
    assert all(trained[name].tobytes() == array.astype(jnp.bfloat16).tobytes() for name, array in start.items())
    assert_merged(read_model(tmp_path / "run" / "model"), trained)
    fields, own = (models.read_fields(model) for model in (tmp_path / "run" / "model", base))
    assert fields == own
