"""Result files: what identifies a run, which of them still count, and what of a run's directory is kept."""

import json

import pytest

from balcap_jax.ablate import results
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes

CONFIG = recipes.load("configs/scenes.py", {"stages.rl.steps": "80"})


def result_of(config, **more):
    identity = results.identity(config)
    made = {"config": identity, "config_digest": results.digest(identity), "greedy": {}, "sampled": {}}
    return made | {"seconds": 1.5, "jobs": 2, "device": "cpu", "versions": {}} | more


def other(**fields):
    return recipes.load("configs/scenes.py", {"stages.rl.steps": "80"} | fields)


def test_a_run_is_what_decides_its_result():
    assert results.difference(result_of(CONFIG), CONFIG) is None
    neutral = ({"data.data_dir": "/elsewhere"}, {"log.tensorboard": "False"}, {"checkpoint.every": "7"})
    for same in (*neutral, {"stages.rl.micro_batches": "4"}):
        assert results.digest(results.identity(other(**same))) == results.digest(results.identity(CONFIG))
    # A result that names a field which counted once is not one of another config.
    older = result_of(CONFIG)
    older |= {"config": older["config"] | {"stages.rl.micro_batches": 2}, "config_digest": "older"}
    assert results.difference(older, CONFIG) is None
    for fields, said in (
        ({"seed": "1"}, "seed: 0 -> 1"),
        ({"rewards.weights": "1,2,1"}, "rewards.weights: [1.0, 1.0, 1.0] -> [1.0, 2.0, 1.0]"),
        ({"log.eval_images": "64"}, "log.eval_images: 128 -> 64"),
    ):
        assert results.difference(result_of(CONFIG), other(**fields)) == said


def test_a_field_that_the_code_gets_later_makes_no_result_old():
    saved = result_of(CONFIG)
    del saved["config"]["loss.kl_coef"], saved["config"]["advantage.ddof"]
    saved["config_digest"] = results.digest(saved["config"])
    # The recipe sets loss.kl_coef away from its default, advantage.ddof not.
    assert results.difference(saved, CONFIG) == "loss.kl_coef: 0.0 -> 0.02"
    saved["config"]["loss.kl_coef"] = 0.02
    assert results.difference(saved, CONFIG) is None
    saved["config"]["loss.old"] = 3
    assert results.difference(saved, CONFIG) == "loss.old: 3 -> no such field"


def test_files(tmp_path):
    path = results.path_of(tmp_path, "habits-grpo_s0.1", 100)
    assert path.name == "habits-grpo_s0.1-seed100.json"
    assert results.fresh(path, CONFIG) == (None, None)
    saved = result_of(CONFIG, seconds=3.5)
    results.write(path, saved)
    assert results.read(path) == saved
    assert results.fresh(path, CONFIG) == (saved, None)
    assert results.fresh(path, other(seed="4")) == (None, "seed: 0 -> 4")
    assert len(path.read_text().splitlines()) == 2 + len(saved)
    assert len(path.read_bytes()) < 6000
    for seed in (3, 20):
        results.write(results.path_of(tmp_path, "habits-grpo_s0.1", seed), saved)
    results.write(results.path_of(tmp_path, "habits-grpo", 5), saved)
    assert results.seeds_of(tmp_path, "habits-grpo_s0.1") == [3, 20]
    assert results.seeds_of(tmp_path, "habits-grpo_s0.1", pilot=True) == [100]
    assert results.seeds_of(tmp_path / "none", "habits-grpo") == []


@pytest.mark.parametrize("content", ['{"config": {}}', "[]", "{", '{"config": [], "config_digest": ""}'])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    path = tmp_path / "x-seed0.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x-seed0\.json.*delete it, and the study makes that run anew"):
        results.read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", None),
        ("seconds", -1.0),
        ("jobs", 0),
        ("device", 3),
        ("versions", ["jax"]),
        ("greedy", {"after": []}),
        ("greedy", {"after": {"arena": "12"}}),
        ("sampled", {"base": {"b_capscore": None}}),
    ],
)
def test_a_damaged_field_is_named(tmp_path, field, value):
    path = tmp_path / "x-seed0.json"
    results.write(path, result_of(CONFIG) | {field: value})
    with pytest.raises(UserError, match=rf"x-seed0\.json is no result of a study \({field}.*delete it"):
        results.read(path)
    path.write_text(path.read_text().replace('"seconds": 1.5', '"seconds": NaN'))
    with pytest.raises(UserError, match=r"x-seed0\.json"):
        results.read(path)


def test_means_of_an_evaluation():
    evaluation = {
        "precision": {"mean": 0.8123456, "std": 0.1},
        "b_capscore": {"mean": 77.51234567, "std": 3.0},
        "corpus_b_capscore": {"mean": 78.25, "std": None},
        "arena": {"mean": -0.25, "std": 0.5},
        "truncated": {"mean": 0.0625, "std": 0.2},
        "tokens": {"mean": 50.5, "std": 1.0},
        "recall": {"mean": None, "std": None},
        "n": 128,
        "images": 128,
        "invalid": 2,
        "digest": "abc",
        "habits": {"praise": {"share": 0.375, "n": 8}},
    }
    assert results.means_of(evaluation) == {
        "precision": 81.2346,
        "b_capscore": 77.5123,
        "corpus_b_capscore": 78.25,
        "arena": -25.0,
        "truncated": 6.25,
        "tokens": 50.5,
        "n": 128,
        "invalid": 2,
        "digest": "abc",
        "habits": {"praise": 37.5},
    }
    summary = {kind: {"align": evaluation, "sft": evaluation} for kind in ("greedy", "evaluations")}
    summary["greedy"]["rl"] = evaluation
    found = results.evaluations(summary, ("vision", "align", "sft", "rl"))
    assert {kind: [*roles] for kind, roles in found.items()} == {
        "greedy": ["after", "ceiling", "base"],
        "sampled": ["ceiling", "base"],
    }


def test_the_lowest_of_the_three_objectives():
    three = {"precision": 80.0, "recall": 61.5, "linguistic": 99.0}
    result = {"greedy": {"after": three | {"arena": -3.0, "digest": "x", "tokens": 4}}}
    assert results.metrics_of(result, "greedy", "after") == three | {"arena": -3.0, "lowest": 61.5}
    assert results.metrics_of({"greedy": {"after": {"recall": 5.0}}}, "greedy", "after") == {"recall": 5.0}
    assert results.metrics_of(result, "greedy", "base") == {}


def records(count):
    for update in range(1, count + 1):
        yield {
            "stage": "rl",
            "reward/precision": update / 100,
            "reward/precision_std": 0.1 if update <= 20 else 9.0,
            "reward/recall_std": 0.1 * (update % 2),
            "b_capscore": 50.0 + update,
            "true/precision": update / 200 if update != 3 else None,
            "true/b_capscore": 40.0,
        }


def test_spread_within_groups_is_of_the_first_batches():
    assert results.group_std([*records(30)]) == pytest.approx({"precision": 0.1, "recall": 0.05})
    assert results.group_std([]) == {}


def test_weights_are_inverse_to_the_spread():
    spreads = {"precision": 0.1, "recall": 0.2, "linguistic": 0.05}
    weights = [float(text) for text in results.inverse_std({"group_std": spreads}, "f").split(",")]
    assert weights == pytest.approx([0.857, 0.4286, 1.7143], abs=1e-3)  # 10, 5 and 20 over their mean 35/3
    assert [weight * std for weight, std in zip(weights, spreads.values(), strict=True)] == pytest.approx(
        [0.0857] * 3, abs=1e-4
    )
    for bad in ({}, {"precision": 0.0}, {"precision": None}):
        with pytest.raises(UserError, match="has no group_std above 0"):
            results.inverse_std({"group_std": bad}, "f")


def test_trajectories_are_means_over_five_updates():
    first, second, third = results.trajectory([*records(12)])
    assert first == {
        "update": 5,
        "proxy": {"precision": 3.0, "b_capscore": 53.0},
        "true": {"precision": 1.5, "b_capscore": 40.0},  # of 0.5, 1, 2 and 2.5: update 3 has none
    }
    assert (second["update"], second["proxy"]["b_capscore"]) == (10, 58.0)
    assert (third["update"], third["proxy"]["b_capscore"]) == (12, 61.5)
    assert results.trajectory([{"reward/precision": 0.1}]) == []


def test_records_of_training_are_those_of_one_stage(tmp_path):
    lines = [{"step": 1, "stage": "sft"}, {"step": 2, "stage": "rl"}, {"step": 3, "stage": "rl"}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [one["step"] for one in results.training_records(tmp_path, "rl")] == [2, 3]
