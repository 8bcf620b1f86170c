"""The settings table, its checks, recipes, the command line, and what may change when a run is resumed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from balcap_jax import advantages, rewards
from balcap_jax.cli.arguments import CommandParser, place
from balcap_jax.cli.errors import UserError
from balcap_jax.config import __main__ as config
from balcap_jax.config import recipes as config_lib

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a recipe with the given lines in get_config(variant) and returns its path."""

    def write(*body: str, name: str = "recipe.py") -> str:
        lines = ["from balcap_jax.config import default_config", "def get_config(variant=''):"]
        lines += [f"    {line}" for line in ("config = default_config()", *body, "return config")]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def changed(**fields) -> ConfigDict:
    """The default configuration with `group__field=value` overrides."""
    config = config_lib.default_config()
    for name, value in fields.items():
        *groups, leaf = name.split("__")
        at = config
        for group in groups:
            at = at[group]
        at[leaf] = value
    return config


def error_of(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- the table ------------------------------------------------------------------------------------------------------


def test_defaults_pass_and_are_the_documented_ones():
    config = config_lib.default_config()
    config_lib.check(config)
    assert (config.rollout.group_size, config.rollout.max_tokens, config.rollout.buckets) == (8, 96, (96,))
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.kl_coef) == (0.2, 0.2, 0.0)
    assert (config.advantage.estimator, config.advantage.eps_group, config.advantage.ddof) == ("c_gdpo", 1e-4, 1)
    assert config.rewards.weights == (1.0, 1.0, 1.0)
    assert (config.rewards.gate_low, config.rewards.gate_high) == (0.5, 2.0)
    assert (config.optim.b1, config.optim.b2, config.optim.clip_norm) == (0.9, 0.95, 1.0)
    assert config_lib.stage_order(config) == ("sft", "rl")


def test_every_field_has_a_meaning_a_default_of_its_type_and_stands_in_the_table():
    names = [field.name for field in config_lib.FIELDS.values()]
    assert len(set(names)) == len(names)
    types = {"int": int, "float": float, "bool": bool, "str": str, "ints": tuple, "floats": tuple}
    for field in config_lib.FIELDS.values():
        if field.kind == "int or auto":
            assert field.default in ("auto", 1), field.name
        else:
            assert type(field.default) is types[field.kind], field.name
        assert len(field.meaning) > 8, field.name
    rows = config.table(width=200).splitlines()
    printed = [line.split()[0] for line in rows if line and not line.startswith(" ")]
    assert printed == ["field", *names]
    (row,) = [line for line in rows if line.startswith("rollout.top_p ")]
    assert row.split()[:5] == ["rollout.top_p", "float", "1", "[0.0001,", "1]"]


def test_one_default_config_does_not_change_another():
    config_lib.default_config().stages.rl.steps = 7
    assert config_lib.default_config().stages.rl.steps == 100


# ---- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("rollout__tempature", "rollout.temperature"),
        ("stages__rl__learning_rat", "stages.rl.learning_rate"),
        ("group_size", "rollout.group_size"),
        ("loss__eps_group", "advantage.eps_group"),
    ],
)
def test_unknown_field_names_the_nearest(name, near):
    message = error_of(config_lib.check, changed(**{name: 1}))
    assert message == f"unknown config field {name.replace('__', '.')!r}; did you mean {near!r}?"


def test_unknown_field_like_no_other_names_the_listing():
    message = error_of(config_lib.check, changed(zzqxzzqx=1))
    assert "python -m balcap_jax.config" in message
    assert "did you mean" not in message


def test_unknown_groups_are_reported_empty_or_not():
    assert "'rewrds'" in error_of(config_lib.check, changed(rewrds=ConfigDict()))
    assert "'rewrds.gate'" in error_of(config_lib.check, changed(rewrds=ConfigDict({"gate": True})))


def test_a_group_set_to_a_value_and_a_missing_field():
    message = error_of(config_lib.check, changed(rollout=3))
    assert "'rollout' is a group" in message
    assert "group_size" in message
    config = config_lib.default_config()
    del config.optim["b2"]
    assert "'optim.b2' is missing" in error_of(config_lib.check, config)
    assert "default_config" in error_of(config_lib.check, ConfigDict())


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("rollout__group_size", "eight", "an integer"),
        ("rollout__group_size", 8.0, "an integer"),
        ("rollout__group_size", True, "an integer"),
        ("rollout__temperature", "1.0", "a number"),
        ("rollout__temperature", float("nan"), "a number"),
        ("optim__eps", float("inf"), "a number"),
        ("rewards__gate", 1, "True or False"),
        ("data__prompt", None, "a string"),
        ("rollout__buckets", 96, "a tuple of integers"),
        ("rollout__buckets", (), "a tuple of integers, at least one"),
        ("rollout__buckets", (64.0, 96), "a tuple of integers"),
        ("rewards__weights", "1,1,1", "a tuple of numbers"),
    ],
)
def test_ill_typed_value_names_field_type_and_value(name, value, kind):
    message = error_of(config_lib.check, changed(**{name: value}))
    assert message.startswith(f"config field {name.replace('__', '.')!r} must be {kind}, got {value!r}")


@pytest.mark.parametrize(
    ("name", "value", "demand"),
    [
        ("rollout__temperature", 0.0, "in [0.01, 100]"),
        ("rollout__temperature", 1e-40, "in [0.01, 100]"),
        ("rollout__top_p", 0.0, "in [0.0001, 1]"),
        ("rollout__top_p", 1e-300, "in [0.0001, 1]"),
        ("rollout__top_p", 1.5, "in [0.0001, 1]"),
        ("optim__b2", 1.0, "in [0, 0.99999]"),
        ("optim__eps", 1e-300, "in [1e-20, 1]"),
        ("loss__clip_low", 1.0, "in [0.0001, 1)"),
        ("loss__clip_low", 0.0, "in [0.0001, 1)"),
        ("loss__clip_high", 0, "in [0.0001, 100]"),
        ("stages__rl__learning_rate", 1e300, "in [0, 10]"),
        ("stages__rl__steps", 10**18, "in [0, 100000000]"),
        ("stages__rl__batch_size", 10**12, "in [1, 65536]"),
        ("judge__failure_rate", -0.1, "in [0, 1]"),
        ("advantage__ddof", 2, "in [0, 1]"),
        ("advantage__kappa", 0.0, "in [0.01, 100]"),
        ("checkpoint__keep", 0, "in [1, 100000000]"),
        ("rewards__weights", (1.0, -1.0, 1.0), "in [0, 1000]"),
        ("rewards__weights", (1.0, 1e300, 1.0), "in [0, 1000]"),
        ("seed", 2**31, "in [0, 2147483647]"),
    ],
)
def test_value_out_of_range(name, value, demand):
    message = error_of(config_lib.check, changed(**{name: value}))
    assert message.startswith(f"config field {name.replace('__', '.')!r} must be {demand}, got {value}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("rollout__top_p", 1.0), ("rollout__eval_temperature", 0.0), ("optim__b1", 0.0), ("advantage__ddof", 0)],
)
def test_ends_of_closed_ranges_are_allowed(name, value):
    config_lib.check(changed(**{name: value}))


def test_every_number_has_bounds_within_what_fp32_and_int32_hold():
    largest = {"int": 2**31 - 1, "float": 1e12}
    for field in config_lib.FIELDS.values():
        kind = field.kind.removesuffix("s")
        if kind in largest:
            assert -1024 <= field.low < field.high <= largest[kind], field.name
            assert field.low == 0 or abs(field.low) >= 1e-20, field.name
            for number in field.default if isinstance(field.default, tuple) else [field.default]:
                assert field.holds(number), field.name


@pytest.mark.parametrize("name", ["rollout.parts", "mesh.sampling"])
def test_a_count_may_be_left_to_the_memory(name):
    field = name.replace(".", "__")
    for value in ("auto", 1, 4, 65_536):
        assert dict(config_lib.leaves(config_lib.check(changed(**{field: value}))))[name] == value
    for text, value in {"auto": "auto", "12": 12}.items():
        overridden = config_lib.check(config_lib.default_config(), {name: text})
        assert dict(config_lib.leaves(overridden))[name] == value
    for value in (0, -1, 65_537, 1.5, True, "all", None, (2,)):
        message = error_of(config_lib.check, changed(**{field: value}))
        assert message.startswith(f"config field {name!r} must be auto, or an integer in [1, 65536], got "), message
    (row,) = [line for line in config.table(width=200).splitlines() if line.startswith(f"{name} ")]
    assert "int or auto" in row
    assert "auto | [1, 65536]" in row


@pytest.mark.parametrize("text", ["\udcff", "a\ud800b"])
def test_text_that_has_no_utf_8_form(text):
    """What bytes of a command line that are no UTF-8 come as."""
    message = error_of(config_lib.check, changed(data__prompt=text))
    assert message.startswith("config field 'data.prompt' must be Unicode text, got ")
    assert message.isascii()


def test_choices():
    message = error_of(config_lib.check, changed(advantage__estimator="gdop"))
    assert "c_gdpo, gdpo, grpo, dr_grpo, rloo" in message
    assert "did you mean 'gdpo'?" in message
    message = error_of(config_lib.check, changed(advantage__aggregation="softmin"))
    assert "sum, soft_min, conflict" in message
    assert "did you mean 'soft_min'?" in message


def test_the_choices_of_the_advantage_are_those_that_it_computes():
    choices = {name: config_lib.FIELDS[f"advantage.{name}"].choices for name in ("estimator", "aggregation")}
    assert choices == {"estimator": advantages.ESTIMATORS, "aggregation": tuple(advantages.AGGREGATIONS)}


@pytest.mark.parametrize("aggregation", ["soft_min", "conflict"])
def test_aggregations_other_than_the_sum_need_z_scores(aggregation):
    for estimator in ("c_gdpo", "gdpo"):
        config_lib.check(changed(advantage__aggregation=aggregation, advantage__estimator=estimator))
    for estimator in ("grpo", "dr_grpo", "rloo", "best_of"):
        fields = {"advantage__aggregation": aggregation, "advantage__estimator": estimator}
        message = error_of(config_lib.check, changed(**fields))
        assert message == (
            f"config field 'advantage.aggregation' is {aggregation!r}, which needs z-scores of each objective, and "
            f"advantage.estimator is {estimator!r}; take c_gdpo, or the aggregation 'sum'"
        )


@pytest.mark.parametrize("group_size", [1, 0])
def test_rl_needs_two_samples_in_a_group(group_size):
    message = error_of(config_lib.check, changed(rollout__group_size=group_size))
    assert "rollout.group_size" in message
    assert "a group needs at least 2 samples" in message


def test_one_sample_in_a_group_is_fine_without_rl():
    config_lib.check(changed(rollout__group_size=1, stages__order="sft"))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"stages__order": "sft,dpo"}, ["stages.order", "'dpo'", "sft, rl"]),
        ({"stages__order": ""}, ["stages.order"]),
        ({"stages__order": "rl,rl"}, ["stages.order", "twice"]),
        ({"stages__rl__micro_batches": 3}, ["stages.rl.batch_size", "16", "stages.rl.micro_batches", "3"]),
        ({"stages__sft__batch_size": 5000}, ["stages.sft.batch_size", "data.train_size", "4096"]),
        ({"rollout__buckets": (96, 64)}, ["rollout.buckets", "ascending"]),
        ({"rollout__buckets": (96, 96)}, ["rollout.buckets", "ascending"]),
        ({"rollout__refill": True}, ["rollout.refill", "rollout.parts to auto"]),
        ({"rollout__token_buckets": (64, 32)}, ["rollout.token_buckets", "ascending"]),
        ({"rollout__token_buckets": (64, 97)}, ["rollout.token_buckets", "rollout.max_tokens (96)", "(64, 97)"]),
        ({"rollout__token_buckets": (31, 32, 76, 77)}, ["no batch takes", "32 tokens or more", "token_buckets=32,76"]),
        ({"rollout__max_tokens": 80}, ["rollout.buckets", "80", "--config.rollout.buckets=80"]),
        ({"rewards__gate_low": 2.0}, ["rewards.gate_low", "rewards.gate_high"]),
        ({"rewards__weights": (1.0, 1.0)}, ["rewards.weights", "3 numbers", "precision, recall, linguistic"]),
        ({"rewards__weights": (0.0, 0.0, 0.0)}, ["rewards.weights", "above 0"]),
        ({"rewards__weights": (0.0, 1e-300, 0.0)}, ["rewards.weights", "at least 0.01"]),
        ({"rollout__eval_temperature": 1e-40}, ["rollout.eval_temperature", "0 (greedy) or at least 0.01"]),
        ({"stages__rl__freeze": "vision/("}, ["stages.rl.freeze", "regular expression"]),
        (
            {"stages__rl__schedule": "cosine", "stages__rl__steps": 5},
            ["'stages.rl.steps' (5)", "'stages.rl.warmup_steps' (5)", "cosine"],
        ),
        ({"mesh__data": 0}, ["mesh.data", "-1"]),
        ({"model__image_size": 100}, ["model.image_size", "model.patch_size"]),
        ({"model__kv_heads": 3}, ["model.heads", "model.kv_heads"]),
        ({"model__head_size": 15}, ["model.head_size", "even"]),
        ({"model__feature_layer": -5}, ["model.feature_layer", "[-4, -1]"]),
        ({"log__profile": "0:3"}, ["'log.profile' must be first:last", "1 <= first <= last, got '0:3'"]),
        ({"log__profile": "5:4"}, ["log.profile", "got '5:4'"]),
        ({"log__profile": "5"}, ["log.profile", "got '5'"]),
        ({"model__prompt_tokens": 36}, ["model.prompt_tokens", "36 image tokens"]),
    ],
)
def test_fields_that_contradict_each_other(fields, parts):
    def check(config):
        config_lib.check(config)
        rewards.check_settings(config)

    message = error_of(check, changed(**fields))
    for part in parts:
        assert part in message


def test_a_window_of_the_profiler():
    config_lib.check(changed(log__profile="1:1"))
    config_lib.check(changed(log__profile="10:12"))


def test_sizes_of_a_saved_model_are_not_checked():
    config_lib.check(changed(model__kv_heads=3, model__path="somewhere"))


def test_stage_that_does_not_run_is_not_checked_across_fields():
    config_lib.check(changed(stages__order="sft", stages__rl__micro_batches=3))


# ---- recipes and overrides ------------------------------------------------------------------------------------------


def test_recipe_variant_and_overrides(write_recipe):
    recipe = write_recipe("config.stages.rl.steps = {'': 10, 'tiny': 2}[variant]", "config.optim.clip_norm = 2")
    assert config_lib.load(recipe).stages.rl.steps == 10
    overrides = {
        "stages.sft.steps": "1e3",
        "stages.rl.learning_rate": "3e-5",
        "rollout.max_tokens": "64",
        "rollout.buckets": "32,64",
        "rewards.weights": "(1, 0.5, 2)",
        "rewards.gate": "false",
        "model.remat": "none",
        "mesh.data": "-1",
        "data.prompt": "What is 1, 2?",
        "log.wandb": "",
    }
    config = config_lib.load(f"{recipe}:tiny", overrides)
    assert config.stages.rl.steps == 2
    assert config.stages.sft.steps == 1000
    assert type(config.stages.sft.steps) is int
    assert config.stages.rl.learning_rate == 3e-5
    assert config.rollout.buckets == (32, 64)
    assert config.rewards.weights == (1.0, 0.5, 2.0)
    assert all(type(weight) is float for weight in config.rewards.weights)
    assert config.rewards.gate is False
    assert (config.model.remat, config.data.prompt, config.log.wandb) == ("none", "What is 1, 2?", "")
    assert type(config.optim.clip_norm) is float  # the recipe wrote 2


def test_one_bucket_on_the_command_line_is_a_tuple(write_recipe):
    config = config_lib.load(write_recipe(), {"rollout.buckets": "96"})
    assert config.rollout.buckets == (96,)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("rollout.tempature", "1", ["unknown config field 'rollout.tempature'", "'rollout.temperature'"]),
        ("rollout.group_size", "eight", ["rollout.group_size", "an integer", "'eight'"]),
        ("rollout.group_size", "8.5", ["rollout.group_size", "an integer", "'8.5'"]),
        ("rollout.group_size", "", ["rollout.group_size", "an integer", "''"]),
        ("rollout.temperature", "none", ["rollout.temperature", "a number", "'none'"]),
        ("rollout.temperature", "[].clear()", ["rollout.temperature", "a number"]),
        ("rollout.buckets", "64,ninety", ["rollout.buckets", "a tuple of integers", "'64,ninety'"]),
        ("rewards.gate", "maybe", ["rewards.gate", "True or False", "'maybe'"]),
        ("stages.rl", "5", ["'stages.rl' is a group", "learning_rate"]),
        ("stages", "5", ["'stages' is a group (order, vision, align, sft, rl), it can't be set to '5'"]),
        ("model", "5", ["'model' is a group (family, path, image_size, ", " more), it can't"]),
    ],
)
def test_bad_override(write_recipe, name, text, parts):
    message = error_of(config_lib.load, write_recipe(), {name: text})
    for part in parts:
        assert part in message


def test_field_that_a_recipe_misspells(write_recipe):
    message = error_of(config_lib.load, write_recipe("config.rollout.tempature = 0.5"))
    assert message == "unknown config field 'rollout.tempature'; did you mean 'rollout.temperature'?"


def test_loaded_config_takes_no_new_fields(write_recipe):
    config = config_lib.load(write_recipe())
    with pytest.raises((KeyError, AttributeError)):
        config.rollout.tempature = 1.0


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("x = 1\n", ["no function get_config", "forkme"]),
        ("def get_config(:\n", ["line 1", "syntax"]),
        ("import json\n\njson.loads('{')\n", ["line 3", "JSONDecodeError"]),
        ("def get_config():\n    raise ValueError('first\\nsecond')\n", ["line 2", "ValueError: first second"]),
        ("def get_config():\n    return {}\n", ["ConfigDict", "dict"]),
        ("import no_such_module_at_all\n", ["line 1", "ModuleNotFoundError"]),
    ],
)
def test_recipe_that_fails(tmp_path, source, parts):
    path = tmp_path / "bad.py"
    path.write_text(source)
    message = error_of(config_lib.load, str(path))
    assert str(path) in message
    for part in parts:
        assert part in message


ODD_RECIPES = {
    "ends well": ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
    "ends in get_config": ("def get_config():\n    raise SystemExit\n", "line 2: SystemExit"),
    "of no Exception": ("class Odd(BaseException): pass\nraise Odd('a\\nb')\n", "line 2: Odd: a b"),
    "GeneratorExit": ("raise GeneratorExit\n", "line 1: GeneratorExit"),
    "StopIteration": ("def get_config():\n    raise StopIteration(3)\n", "line 2: StopIteration: 3"),
    "that says nothing": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd\n",
        "line 3: Odd: a Odd that cannot be shown (ValueError)",
    ),
    "recursion": ("def get_config():\n    return get_config()\n", "line 2: RecursionError"),
    "deep": (f"x = {'-' * 100_000}1\n", "recipe.py: "),
    "null": ("x = 1\0\n", "null bytes"),
    "another's syntax": ("exec('(')\n", "line 1: SyntaxError: '(' was never closed (<string>, line 1)"),
    "class": ("get_config = dict\n", "no signature found for builtin type"),
    "no signature": ("class A:\n    __signature__ = 3\n    __call__ = print\nget_config = A()\n", "TypeError: "),
    "coroutine": ("async def get_config(): pass\n", "must return a ConfigDict, got coroutine"),
    "pretends": (
        "from ml_collections import ConfigDict\nclass A:\n    __class__ = ConfigDict\nget_config = A\n"
        "get_config.__signature__ = __import__('inspect').Signature()\n",
        "AttributeError: ",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD_RECIPES)
def test_recipe_that_does_something_odd(tmp_path, name):
    source, part = ODD_RECIPES[name]
    path = tmp_path / "recipe.py"
    path.write_text(source)
    message = error_of(config_lib.load, str(path))
    assert message.startswith(f"recipe {path}")
    assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "does",
    [
        "sys.stdout.close(); sys.stderr.close()",
        "sys.stdout = sys.stderr = None",
        "sys.stdout.detach(); sys.stderr.detach()",
        "sys.stdout.buffer.close(); sys.stderr.buffer.close()",
        "sys.stdout = sys.stderr = open('/dev/null', 'w')",
    ],
)
@pytest.mark.parametrize("ends", ["", "raise ValueError('bad')", "sys.exit()"])
def test_recipe_that_closes_its_streams(write_recipe, monkeypatch, capfd, does, ends):
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        monkeypatch.setattr(sys, name, open(descriptor, "w", closefd=False))  # noqa: SIM115
    recipe = write_recipe(f"import sys; {does}", ends)
    if ends:
        with pytest.raises(SystemExit):
            config.main([f"--config={recipe}"])
    else:
        config.main([f"--config={recipe}"])
    written, said = capfd.readouterr()
    assert ("rollout.group_size = " in written) == (not ends)
    assert (said.count("\n"), said.startswith("error: recipe ")) == ((1, True) if ends else (0, False))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("config.data.prompt = {}", "'data.prompt' must be a string, got {} ("),
        ("config.data.prompt = {'a': {'b': 1}}", "'data.prompt' must be a string, got a: b: 1 ("),
        ("config.data.prompt = b'x'", "'data.prompt' must be a string, got b'x' ("),
        ("config.data.prompt = '\\0'", "'data.prompt' must be Unicode text"),
        ("config.data.prompt = str", "'data.prompt' must be a string, got <class 'str'> ("),
        ("config.data.itself = config", "unknown config field 'data.itself"),
        ("config.data = config", "unknown config field 'data."),
        ("config['a\\nb'] = 1", "unknown config field 'a\\nb'"),
        ("config.seed = 10**5000", "'seed' must be in [0, 2147483647], got a int that cannot be shown"),
        ("config.optim.eps = 10**400", "line 4: OverflowError: int too large"),
        ("config.optim.eps = float('nan')", "'optim.eps' must be a number, got nan"),
        ("config.rewards.weights = (1, -(10**400), 1)", "'rewards.weights' must be a tuple of numbers"),
        ("from fractions import Fraction; config.optim.eps = Fraction(10**400, 3)", "'optim.eps'"),
        ("from ml_collections import FieldReference; config.seed = FieldReference(1) // 0", "ZeroDivisionError"),
        (
            "from ml_collections import config_dict as c; config.seed = c.required_placeholder(int)",
            "RequiredValueError",
        ),
        ("config.seed = type('O', (), {'__repr__': lambda self: 1 / 0})()", "got a O that cannot be shown"),
        (
            "config.seed = type('O', (), {'__repr__': lambda self: exit(0)})()",
            "got a O that cannot be shown (SystemExit)",
        ),
        ("config.seed = 'x' * 1_000_000", "'seed' must be an integer, got 'xxx"),
    ],
)
def test_odd_value_in_a_recipe(write_recipe, line, part):
    message = error_of(config_lib.load, write_recipe(line))
    assert part in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000


@pytest.mark.parametrize("kind", ["pipe", "device", "large", "not UTF-8"])
def test_recipe_that_is_no_file_of_text(tmp_path, kind):
    path = tmp_path / "recipe.py"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"x = '\xff'")
        if kind == "large":
            os.truncate(path, 1 << 40)
    reason = {"large": "1,099,511,627,776 bytes are more than", "not UTF-8": "not a text file"}.get(
        kind, "no regular file"
    )
    assert error_of(config_lib.load, str(path)).startswith(f"recipe {path}: {reason}")


@pytest.mark.parametrize(
    "text",
    ["0x" + "f" * 5000, "9" * 400, "9" * 5000, "1e400", "nan", "{[]: 1}", "[" * 5000, "-" * 9000 + "1", "1if 2else 3"],
)
@pytest.mark.parametrize("name", ["seed", "optim.eps", "rollout.buckets", "rewards.weights"])
def test_override_that_is_no_number_to_hold(write_recipe, name, text):
    message = error_of(config_lib.load, write_recipe(), {name: text})
    assert message.startswith(f"config field {name!r} must be ")
    assert len(message) < 1000


def test_override_of_a_field_with_an_endless_name(write_recipe):
    assert "unknown config field 'seedseed" in error_of(config_lib.load, write_recipe(), {"seed" * 20_000: "1"})


def test_saved_configuration_of_other_types():
    saved = json.loads(config_lib.to_text(changed()))
    for odd in ("100", None, [1], {"a": 1}):
        saved["stages"]["rl"]["steps"] = odd
        assert len(config_lib.differences(config_lib.from_text(json.dumps(saved)), changed())) >= 1


def test_missing_recipe_and_unasked_variant(tmp_path):
    assert "absent.py" in error_of(config_lib.load, str(tmp_path / "absent.py:tiny"))
    assert str(tmp_path) in error_of(config_lib.load, str(tmp_path))
    path = tmp_path / "plain.py"
    path.write_text("from balcap_jax.config import default_config as get_config\n")
    config_lib.load(str(path))
    assert "no variants" in error_of(config_lib.load, f"{path}:tiny")


def test_two_recipes_of_the_same_name_do_not_mix(write_recipe, tmp_path):
    first = write_recipe("config.seed = 1")
    assert config_lib.load(first).seed == 1
    assert config_lib.load(write_recipe("config.seed = 2")).seed == 2
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.py"]  # no byte code is left behind


def test_a_recipe_imports_what_lies_beside_it_and_no_other_recipe_gets_that(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    path = list(sys.path)
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "beside.py").write_text(f"SEED = {seed}\n")
        (folder / "json.py").write_text("raise ValueError('this is not the json of Python')\n")
        lines = ["import json", "import beside", "from balcap_jax.config import default_config", "def get_config():"]
        lines += ["    config = default_config()", "    config.seed = beside.SEED", "    return config"]
        (folder / "recipe.py").write_text("\n".join(lines) + "\n")
        assert config_lib.load(str(folder / "recipe.py")).seed == seed
        assert sorted(entry.name for entry in folder.iterdir()) == ["beside.py", "json.py", "recipe.py"]
    assert "beside" not in sys.modules
    assert sys.path == path


def test_a_copy_of_a_published_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("qwen25vl_3b.py", "vlm.py"):
        (tmp_path / name).write_text((ROOT / "configs" / name).read_text())
    copied = config_lib.load("qwen25vl_3b.py:lora")
    assert copied == config_lib.load(f"{ROOT}/configs/qwen25vl_3b.py:lora")
    assert not (tmp_path / "__pycache__").exists()


# ---- command line ---------------------------------------------------------------------------------------------------


def parse(argv):
    parser = CommandParser()
    config_lib.add_arguments(parser)
    parser.add_argument("--workdir", type=place, required=True)
    return config_lib.parse_command_line(argv, parser)


def test_command_line(write_recipe):
    recipe = write_recipe()
    argv = [f"--config={recipe}", "--config.seed=3", "--workdir", "w", "--config.rollout.top_k", "5", "--config.seed=4"]
    config, args = parse(argv)
    assert (config.seed, config.rollout.top_k, args.workdir) == (4, 5, "w")


def test_negative_number_after_a_space(write_recipe):
    config, _ = parse([f"--config={write_recipe()}", "--workdir=w", "--config.model.feature_layer", "-3"])
    assert config.model.feature_layer == -3


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--workdir=w"], ["--config"]),
        (["--config={recipe}"], ["--workdir"]),
        (["--config={recipe}", "--workdir="], ["--workdir", "names no file or directory"]),
        (["--config={recipe}", "--workdir=w", "--config.seed"], ["--config.seed needs a value"]),
        (["--config={recipe}", "--config.seed", "--workdir=w"], ["--config.seed needs a value"]),
        (["--config={recipe}", "--workdir=w", "--seed=3"], ["--seed=3", "--config.seed=3"]),
        (["--config={recipe}", "--workdir=w", "--workdri=x"], ["unknown argument --workdri=x"]),
        (["--conf={recipe}", "--workdir=w"], ["--config"]),
    ],
)
def test_bad_command_line(write_recipe, argv, parts):
    recipe = write_recipe()
    message = error_of(parse, [argument.format(recipe=recipe) for argument in argv])
    for part in parts:
        assert part in message


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "balcap_jax.config", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_configurations_need_neither_jax_nor_rewards():
    code = "import balcap_jax.config, sys; assert not {'jax', 'balcap_jax.rewards'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


def test_command_prints_the_table():
    done = run()
    assert done.returncode == 0
    assert done.stderr == ""
    assert "rollout.temperature" in done.stdout


def test_command_prints_a_resolved_recipe(write_recipe):
    done = run(f"--config={write_recipe('config.seed = 5')}", "--config.rollout.top_p=0.9")
    lines = done.stdout.splitlines()
    assert "seed = 5    (default 0)" in lines
    assert "rollout.top_p = 0.9    (default 1)" in lines
    assert "rollout.top_k = 0" in lines
    assert len(lines) == len(config_lib.FIELDS)


@pytest.mark.parametrize(
    "arguments", [["--config.rollout.tempature=1"], ["--config.rollout.group_size=1"], ["--frobnicate"]]
)
def test_command_ends_with_one_line_and_status_2(write_recipe, arguments):
    done = run(f"--config={write_recipe()}", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("variant", ["", ":tiny"])
def test_forkme(variant):
    config = config_lib.load(f"{ROOT}/configs/forkme.py{variant}")
    assert config.name == "forkme"
    assert config.stages.rl.steps == (2 if variant else 100)


def test_forkme_refuses_other_variants():
    assert "unknown variant 'huge'" in error_of(config_lib.load, f"{ROOT}/configs/forkme.py:huge")


# ---- text form and resuming -----------------------------------------------------------------------------------------


def test_text_comes_back_whole_and_does_not_depend_on_how_it_was_written():
    config = changed(rollout__buckets=[64, 96], optim__clip_norm=2, data__prompt='say "é"\n')
    text = config_lib.to_text(config)
    assert config_lib.to_text(config_lib.from_text(text)) == text
    assert text == config_lib.to_text(
        changed(data__prompt='say "é"\n', optim__clip_norm=2.0, rollout__buckets=(64, 96))
    )
    back = config_lib.from_text(text)
    assert back.rollout.buckets == (64, 96)
    assert back.optim.clip_norm == 2.0
    assert json.loads(text)["rollout"]["buckets"] == [64, 96]
    config_lib.check(back)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a": 2, "a.b": 1}', "[" * 100_000, '{"name": ' * 100_000])
def test_text_of_something_else(text):
    message = error_of(config_lib.from_text, text, "run/config.json", "delete it")
    assert re.fullmatch(r"run/config.json is (?:not|no) JSON .*; delete it", message)


def test_differences_name_field_and_values():
    found = config_lib.differences(changed(), changed(rollout__temperature=0.7, seed=1))
    assert found == ["rollout.temperature: 1.0 -> 0.7", "seed: 0 -> 1"]


def test_what_does_not_change_the_run_may_differ():
    new = changed(log__every=5, log__wandb="p", checkpoint__every=7, checkpoint__keep=9, data__read_threads=0)
    assert config_lib.differences(changed(), new) == []


def test_how_a_rollout_fits_the_devices_may_differ_and_how_it_is_learnt_from_may_not():
    new = changed(rollout__parts=4, rollout__refill=True, mesh__sampling=2, rollout__token_buckets=(32, 64))
    assert config_lib.differences(changed(), new) == ["rollout.token_buckets: () -> (32, 64)"]


def test_evaluations_before_and_after_are_of_the_same_size():
    assert config_lib.differences(changed(), changed(log__eval_images=8)) == ["log.eval_images: 48 -> 8"]


def test_the_last_stage_may_grow_only():
    old = changed()
    assert config_lib.differences(old, changed(stages__rl__steps=200)) == []
    assert config_lib.differences(old, changed(stages__rl__steps=50)) == ["stages.rl.steps: 100 -> 50"]
    assert config_lib.differences(old, changed(stages__sft__steps=500)) == ["stages.sft.steps: 400 -> 500"]
    only_sft = {"stages__order": "sft"}
    assert config_lib.differences(changed(**only_sft), changed(**only_sft, stages__sft__steps=500)) == []


def test_a_cosine_stage_may_not_grow():
    old = changed(stages__rl__schedule="cosine")
    (found,) = config_lib.differences(old, changed(stages__rl__schedule="cosine", stages__rl__steps=200))
    assert found == "stages.rl.steps: 100 -> 200 (the cosine schedule depends on it)"


def test_differences_with_another_version_of_the_table():
    old = config_lib.from_text(config_lib.to_text(changed()))
    old.rollout.beams = 3
    del old.rollout["top_k"]
    found = config_lib.differences(old, changed())
    assert found == ["rollout.beams: only in the saved configuration", "rollout.top_k: only in the new configuration"]


# ---- the project's own recipes by name -------------------------------------------------------------------------------


def test_a_recipe_by_name_is_the_file_of_the_repository(tmp_path, monkeypatch):
    by_path = {path.stem: path for path in (ROOT / "configs").glob("*.py")}
    # Neither the current directory nor what lies in it matters.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    (tmp_path / "forkme").write_text("raise ValueError\n")
    own = config_lib.own_files()
    assert {name: path.read_text() for name, path in own.items()} == {
        name: path.read_text() for name, path in by_path.items()
    }
    assert set(config_lib.own_recipes()) == set(by_path) - {"vlm"}
    assert config_lib.load("scenes:tiny,qwen") == config_lib.load(f"{ROOT}/configs/scenes.py:tiny,qwen")
    assert config_lib.load("forkme").name == "forkme"
    assert config_lib.load("qwen3vl_4b:lora") == config_lib.load(f"{ROOT}/configs/qwen3vl_4b.py:lora")


def test_an_installed_package_has_the_recipes_inside(tmp_path, monkeypatch):
    package = tmp_path / "site" / "balcap_jax"
    (package / "configs").mkdir(parents=True)
    (package / "config").mkdir()
    (tmp_path / "site" / "configs").mkdir()  # of somebody else's package
    (tmp_path / "site" / "configs" / "other.py").write_text("def get_config():\n    return 1\n")
    for name in ("qwen25vl_3b.py", "vlm.py"):
        (package / "configs" / name).write_text((ROOT / "configs" / name).read_text())
    by_path = config_lib.load("qwen25vl_3b:lora")
    monkeypatch.setattr(config_lib, "__file__", str(package / "config" / "recipes.py"))
    assert config_lib.own_files().keys() == {"qwen25vl_3b", "vlm"}
    assert config_lib.load("qwen25vl_3b:lora") == by_path
    assert "the path of a Python file, or one of: qwen25vl_3b" in error_of(config_lib.load, "other")


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        ("a/b.py", ("a/b.py", None)),
        ("a/b.py:x,y", ("a/b.py", "x,y")),
        ("my recipe", ("my recipe", None)),
        ("./scenes", ("./scenes", None)),
        ("scenes", (str(config_lib.own_files()["scenes"]), None)),
        ("scenes:", (str(config_lib.own_files()["scenes"]), "")),
        ("scenes:tiny,qwen", (str(config_lib.own_files()["scenes"]), "tiny,qwen")),
    ],
)
def test_what_is_a_path_and_what_a_name(recipe, found):
    assert config_lib.split_recipe(recipe) == found


def test_a_name_that_no_recipe_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_of(config_lib.load, "scense:tiny")
    assert line.startswith(
        "there is no recipe 'scense' (did you mean scenes?); give the path of a Python file, or one of: forkme, "
    )
    assert "vlm" not in line.split(", ")
    assert error_of(config_lib.load, "vlmm").startswith("there is no recipe 'vlmm'; give the path")
    assert "--config takes a Python file or a name such as scenes" in error_of(config_lib.load, "configs/scenes.py")
    (tmp_path / "mine").write_text("from balcap_jax.config import default_config as get_config\n")
    assert config_lib.load("mine").seed == 0  # A path without an ending still works.


def test_command_prints_a_recipe_to_copy(capsys):
    config.main(["--source=forkme"])
    assert capsys.readouterr().out == (ROOT / "configs" / "forkme.py").read_text()
    with pytest.raises(SystemExit):
        config.main(["--source=forkme", "--config=scenes"])
    assert capsys.readouterr().err == "error: give --config or --source, not both\n"
