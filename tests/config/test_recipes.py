"""Every recipe and variant is valid, freezes what it says it freezes, and finds the layers that it adapts."""

import functools
import itertools
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balcap_jax import models, rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config import ablations
from balcap_jax.config import recipes as config_lib
from balcap_jax.config.__main__ import main as show_config
from balcap_jax.data.scenes.tokenizer import scenes_tokenizer
from balcap_jax.train import main as train_command
from balcap_jax.train_step import init_state, split, vision_is_frozen
from balcap_jax.training import required
from balcap_jax.training.programs import LORA_STAGES, check_freezes, freeze_of, make_optimizer, of_last_stage, params_of

CONFIGS = Path(__file__).parents[2] / "configs"
SCENES = ["", "tiny", "qwen", "qwen3", "lora", "tiny,qwen", "tiny,qwen3", "qwen,lora", "qwen3,lora", "tiny,lora,qwen"]
# The published models, and the variant of scenes of their family.
MODELS = {"llava15_7b": "", "qwen25vl_3b": "qwen", "qwen25vl_7b": "qwen"}
MODELS |= dict.fromkeys(("qwen3vl_2b", "qwen3vl_4b", "qwen3vl_8b"), "qwen3")
VARIANTS = ["", "rl", "sft", "lora", "sft,lora", "one", "sft,one"]


@functools.cache
def shapes(variant: str):
    """The parameter tree of the scenes recipe's model: paths are those of every model of the family."""
    config = config_lib.load(f"{CONFIGS / 'scenes.py'}:{variant}")
    policy, processor = models.build(config.model, scenes_tokenizer())
    assert processor.image_tokens == 9
    return jax.eval_shape(policy.init, jax.random.key(0))


def check_stages(config, params) -> None:
    for stage in config_lib.stage_order(config):
        freeze = config.stages[stage].freeze
        paths = flax.traverse_util.flatten_dict(params, sep="/")
        for alternative in re.sub(r"\^\((.*)\)/", lambda found: found[1], freeze).split("|"):
            name = alternative.removeprefix("^").removesuffix("/")
            assert not name or any(path.startswith(f"{name}/") for path in paths), (stage, freeze)
        params = jax.eval_shape(functools.partial(params_of, config, stage=stage), params)
        trainable, frozen = split(params, freeze_of(config, stage))
        parts = {path.split("/")[0] for path in trainable}
        if config.lora.rank and stage in LORA_STAGES:
            assert len(trainable) == 14
            assert all("/lora_" in path for path in trainable)
            assert {str(leaf.dtype) for leaf in frozen.values()} == {"bfloat16"}
        elif stage == "vision":
            assert parts == {"vision"}
        elif stage == "rl":
            assert parts == {"decoder"}
        else:
            assert "vision" not in parts
            assert "decoder" in parts
        assert vision_is_frozen(params, freeze_of(config, stage)) == (parts == {"decoder"})


@pytest.mark.parametrize("variant", SCENES)
def test_scenes(variant):
    config = config_lib.load(f"{CONFIGS / 'scenes.py'}:{variant}")
    check_stages(config, shapes(next((name for name in ("qwen3", "qwen") if name in variant), "")))


@pytest.mark.parametrize(
    ("variant", "trained"),
    [
        ("smollm2", {"align": {"projector", "decoder"}, "sft": {"projector", "decoder"}, "rl": {"decoder"}}),
        ("smollm2,lora", {"align": {"projector"}, "sft": {"decoder"}, "rl": {"decoder"}}),
        ("smollm2,tiny,grpo", {"rl": {"decoder"}}),
    ],
)
def test_a_language_model_in_the_scenes(variant, trained):
    """It is of SmolLM2's size before its directory is there; no stage trains the embedding, which is the output too."""
    config = config_lib.load(f"{CONFIGS / 'scenes.py'}:{variant}")
    programs, params = of_last_stage(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
    adapters = 30 * 8 * (2 * 576 + 2 * (576 + 192) + 2 * 576 + 3 * (576 + 1536)) if "lora" in variant else 0
    assert count == 134_515_008 + 64 * 576 + adapters
    assert programs.policy.decoder.tied_embeddings
    params = jax.eval_shape(programs.policy.init, jax.random.key(0))
    for stage in config_lib.stage_order(config):
        params = jax.eval_shape(functools.partial(params_of, config, stage=stage), params)
        trainable = split(params, freeze_of(config, stage))[0]
        assert "decoder/embed" not in trainable
        if stage in trained:
            assert {path.split("/")[0] for path in trainable} == trained[stage], stage
            assert len(trainable) == 14 or not (config.lora.rank and stage in LORA_STAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert config.rollout.buckets == (config.rollout.max_tokens,)


@pytest.mark.parametrize(("name", "variant"), list(itertools.product(MODELS, VARIANTS)))
def test_models(name, variant):
    config = config_lib.load(f"{CONFIGS / name}.py:{variant}")
    check_stages(config, shapes(MODELS[name]))
    stage = config.stages["sft" if "sft" in variant else "rl"]
    assert config.stages.order == ("sft" if "sft" in variant else "rl")
    assert stage.batch_size == 128
    assert stage.warmup_steps == round(0.05 * stage.steps)
    assert config.rollout.group_size == 8
    assert config.model.dtype == "bfloat16"
    assert (config.data.name, config.judge.name, config.pipeline.depth) == ("sharegpt4v", "remote", 1)
    assert config.checkpoint.best_metric == ("" if "sft" in variant else "b_capscore")
    assert config.stages.rl.eval_every % config.checkpoint.every == 0


# What each variant changes in the recipe; everything else stays.
CHANGES = {
    "no_recall": {"rewards.weights": (1.0, 0.0, 1.0)},
    "recall_only": {"rewards.weights": (0.0, 1.0, 0.0)},
    "no_pointability": {"rewards.pointability": False},
    "no_gate": {"rewards.gate": False},
    "no_batch_norm": {"advantage.batch_norm": "none"},
    "tau_3": {"rewards.gate_high": 3.0},
    "grpo": {"advantage.estimator": "grpo"},
    "best_of": {"advantage.estimator": "best_of"},
    "soft_min": {"advantage.aggregation": "soft_min"},
    "conflict": {"advantage.aggregation": "conflict"},
    "ramp": {
        "rewards.length": "ramp",
        "rewards.weights": (1.0, 1.0, 1.0, 1.0),
        "rewards.gate": False,
        "rewards.length_start": 256,
        "rewards.length_end": 512,
    },
    # The released script: RLOO, no KL (as here), 1e-6 after 20 steps of warm-up, 128 x 8, temperature 1, 8 questions.
    "caprl": {
        "rewards.name": "caprl",
        "rewards.weights": (1.0,),
        "advantage.estimator": "rloo",
        "stages.rl.warmup_steps": 20,
        "checkpoint.best_metric": "accuracy",
    },
    "rubicap": {
        "rewards.name": "rubicap",
        "rewards.weights": (1.0,),
        "advantage.estimator": "grpo",
        "checkpoint.best_metric": "rubric",
    },
    "feedquill": {
        "rewards.name": "feedquill",
        "rewards.weights": (1.0, 1.0),
        "checkpoint.best_metric": "verified_fraction",
    },
    "lexical": {
        "rewards.name": "lexical",
        "rewards.weights": (1.0,),
        "checkpoint.best_metric": "rouge_l",
        "judge.name": "oracle",
    },
    "scenes": {"data.name": "scenes", "data.captions_per_image": 4, "judge.name": "oracle"},
    "lora": {
        "lora.rank": 64,
        "lora.alpha": 64.0,
        "stages.sft.learning_rate": 1e-4,
        "stages.rl.learning_rate": 1e-5,
    },
    # A batch as on many chips, in pieces that one device holds.
    "one": {
        "lora.rank": 64,
        "lora.alpha": 64.0,
        "stages.sft.learning_rate": 1e-4,
        "stages.rl.learning_rate": 1e-5,
        "stages.sft.micro_batches": 128,
        "stages.rl.micro_batches": 128,
        "rollout.parts": "auto",
    },
}


def test_each_variant_changes_what_it_says_and_nothing_else():
    recipe = f"{CONFIGS / 'qwen25vl_3b'}.py"
    base = dict(config_lib.leaves(config_lib.load(recipe)))
    assert base["loss.kl_coef"] == 0
    assert (base["rollout.temperature"], base["rewards.draws"], base["stages.rl.learning_rate"]) == (1.0, 8, 1e-6)
    for variant, changes in CHANGES.items():
        found = dict(config_lib.leaves(config_lib.load(f"{recipe}:{variant}")))
        assert {field: value for field, value in found.items() if value != base[field]} == changes, variant
    for variant in ablations.NAMES:
        rewards.check_settings(config_lib.load(f"{recipe}:{variant},lora"))


GIVEN = {"data.manual_dir": "sg4v", "data.units": "units.jsonl", "judge.endpoints": "http://a/v1,http://b/v1"}


@pytest.mark.parametrize(
    ("recipe", "missing"),
    [
        ("qwen25vl_3b.py", ["data.manual_dir", "data.units", "judge.endpoints"]),
        ("qwen25vl_3b.py:caprl", ["data.manual_dir", "data.units", "judge.endpoints"]),
        ("qwen25vl_3b.py:feedquill", ["data.manual_dir", "judge.endpoints"]),
        ("llava15_7b.py:lexical", ["data.manual_dir"]),
        ("qwen25vl_7b.py:scenes,sft", []),
        ("photos.py", ["data.data_dir"]),
        ("scenes.py", []),
    ],
)
def test_what_recipes_leave_to_be_given(recipe, missing):
    assert named_as_missing(recipe, {}) == missing
    assert named_as_missing(recipe, GIVEN | {"data.data_dir": "photos"}) == []
    for field in {"data.manual_dir", "judge.endpoints"} & set(missing):
        # The JSON itself may hold units: whether it does is seen once it is there.
        without = {name: value for name, value in GIVEN.items() if name not in (field, "data.units")}
        asked = [name for name in missing if name == field or (field == "data.manual_dir" and name == "data.units")]
        assert named_as_missing(recipe, without) == asked


def named_as_missing(recipe: str, given: dict[str, str]) -> list[str]:
    try:
        required.check(config_lib.load(str(CONFIGS / recipe), given))
    except UserError as error:
        return re.findall(r"--config\.([\w.]+)=", str(error))
    return []


def test_what_is_to_be_given_is_asked_for_by_train_alone(capsys, tmp_path):
    """`config` shows a recipe as it is, and nothing is made before all is given."""
    recipe = f"--config={CONFIGS / 'llava15_7b.py'}"
    show_config([recipe])
    assert 'judge.endpoints = ""' in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        train_command([recipe, f"--workdir={tmp_path / 'run'}"])
    assert caught.value.code == 2
    assert re.fullmatch(r"error: the recipe 'llava15_7b' leaves to you: .*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "overrides", "message"),
    [
        ("", {"stages.rl.freeze": "^visoin/"}, r"'stages.rl.freeze' \('\^visoin/'\) matches no parameter; .* vision/"),
        ("", {"stages.sft.freeze": "."}, r"'stages.sft.freeze' \('.'\) leaves no parameter to train"),
        ("lora", {"stages.rl.freeze": "lora"}, r"'stages.rl.freeze' \('lora'\) leaves no parameter to train"),
        ("lora", {"stages.align.freeze": "lora"}, r"'stages.align.freeze' \('lora'\) matches no parameter"),
        ("lora", {"lora.targets": "visoin"}, "'lora.targets' .* matches no dense layer"),
    ],
)
def test_what_freezes_all_or_nothing_is_refused(variant, overrides, message):
    recipe = f"{CONFIGS / 'scenes.py'}:{variant}"
    check_freezes(config_lib.load(recipe), shapes(""))
    with pytest.raises(UserError, match=message):
        check_freezes(config_lib.load(recipe, overrides), shapes(""))


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_update_has_a_rate_and_the_warm_up_ends_at_the_peak(warmup, schedule):
    """Adam's first updates on a constant gradient are as long as the rate."""
    names = {"steps": 8, "warmup_steps": warmup, "learning_rate": 0.5, "schedule": schedule}
    config = config_lib.load(str(CONFIGS / "scenes.py"), {f"stages.rl.{name}": str(x) for name, x in names.items()})
    optimizer, params = make_optimizer(config, "rl"), {"x": jnp.zeros(())}
    state, rates = optimizer.init(params), []
    for _ in range(8):
        updates, state = optimizer.update({"x": jnp.ones(())}, state, params)
        rates.append(-float(updates["x"]))
    rising = [0.5 * (step + 1) / warmup for step in range(warmup)]
    if schedule == "cosine":
        falling = [0.25 * (1 + np.cos(np.pi * (step - warmup) / (9 - warmup))) for step in range(warmup + 1, 9)]
    else:
        falling = [0.5] * (8 - warmup)
    np.testing.assert_allclose(rates, rising + falling, rtol=1e-5)
    assert min(rates) > 0


def test_a_stage_without_steps_has_a_schedule():
    config = config_lib.load(str(CONFIGS / "scenes.py"), {"stages.sft.steps": "0"})
    make_optimizer(config, "sft").init({"x": jnp.zeros(())})


def test_forkme():
    for variant in ("", "tiny"):
        config_lib.load(f"{CONFIGS / 'forkme.py'}:{variant}")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("scenes.py:qwem", "unknown variant 'qwem'; there are tiny, qwen, qwen3, smollm2, lora"),
        ("qwen25vl_3b.py:tiny", "unknown variant 'tiny'; there are rl, sft, lora"),
        ("llava15_7b.py:rl,sft", "variants rl and sft exclude each other"),
        ("qwen25vl_7b.py:no_recall,caprl", "variants no_recall and caprl exclude each other"),
        ("scenes.py:grpo,tiny,rloo", "variants grpo and rloo exclude each other"),
        ("scenes.py:soft_min,grpo", "variants soft_min and grpo exclude each other"),
        ("qwen25vl_3b.py:caprl,soft_min", "which needs z-scores of each objective, and advantage.estimator is 'rloo'"),
        ("scenes.py:best_of,rloo", "variants best_of and rloo exclude each other"),
    ],
)
def test_unknown_variants_are_refused(recipe, message):
    with pytest.raises(UserError, match=message):
        config_lib.load(str(CONFIGS / recipe))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stages.order": "sft,align,rl"}, "'lora.rank' is above 0.* come after all others, got 'sft,align,rl'"),
        ({"stages.order": "vision,align"}, "'lora.rank' is above 0.* must be in config field 'stages.order'"),
        ({"lora.targets": "(q"}, "'lora.targets' is no regular expression"),
        ({"lora.base_dtype": "float16"}, "'lora.base_dtype' must be one of float32, bfloat16"),
    ],
)
def test_adapters_where_they_cannot_be(overrides, message):
    with pytest.raises(UserError, match=message):
        config_lib.load(f"{CONFIGS / 'scenes.py'}:lora", overrides)


def test_first_moments_and_what_is_frozen_take_half_the_memory_where_asked():
    halves = {"optim.mu_dtype": "bfloat16", "optim.frozen_dtype": "bfloat16"}
    config = config_lib.load(str(CONFIGS / "scenes.py"), halves)

    def start(stage, params):
        params = params_of(config, params, stage)
        return init_state(params, make_optimizer(config, stage), freeze_of(config, stage))

    state = jax.eval_shape(functools.partial(start, "rl"), shapes(""))
    trainable, frozen = split(state.params, freeze_of(config, "rl"))
    assert {str(leaf.dtype) for leaf in trainable.values()} == {"float32"}
    assert {str(leaf.dtype) for leaf in frozen.values()} == {"bfloat16"}
    moments = state.opt_state[1][0]
    assert {str(leaf.dtype) for leaf in moments.mu.values()} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in moments.nu.values()} == {"float32"}
    # What the next stage trains is float32 again.
    later = jax.eval_shape(functools.partial(start, "align"), state.params)
    assert {str(leaf.dtype) for leaf in split(later.params, freeze_of(config, "align"))[0].values()} == {"float32"}
