"""The report of a real run, from another directory and through a path with spaces; and what it is made from."""

import html
import itertools
import json
import re

import numpy as np
import pytest
from command_runs import RECIPE, finish, read_summary, start_afresh

from balcap_jax import data
from balcap_jax.config import recipes
from balcap_jax.data.input import examples
from balcap_jax.data.scenes.habits import HABITS, habits_of
from balcap_jax.data.scenes.world import Scene


def test_captions_of_before_and_after(finished):
    elsewhere = finished.workdir.parents[1]
    page = finished.workdir / "report.html"
    written_by_training = page.read_text()
    page.unlink()
    done = finish(start_afresh("balcap_jax.report", str(finished.workdir.relative_to(elsewhere)), cwd=elsewhere))
    assert done.stderr == ""
    # Captions are there as they are, but for the marks of what their judge said.
    text, written_by_training = (
        re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]*</mark>|<mark[^>]*>", "", markup) for markup in (page.read_text(), written_by_training)
    )
    assert str(page.relative_to(elsewhere)) in done.stdout
    for label, (kind, count) in itertools.product(("sft", "rl"), (("greedy", 1), ("eval", 3))):
        records = captions_of(finished.workdir, kind, label)
        assert [len(record["captions"]) for record in records] == [count] * 4
        shown = [
            html.escape(record["captions"][0]["caption"]) in text
            and html.escape(record["captions"][0]["caption"]) in written_by_training
            for record in records
        ]
        assert all(shown), (kind, label)


def captions_of(workdir, kind, label):
    return [json.loads(line) for line in (workdir / "samples" / f"{kind}-{label}.jsonl").read_text().splitlines()]


def test_habits_of_all_captions_are_counted(finished, data_dir):
    """Of each caption against its own scene, and the shares of the summary against a slow count."""
    recipe = recipes.load(str(RECIPE))
    splits = data.load(recipe.data.to_dict() | {"data_dir": str(data_dir)}, recipe.model.image_size)
    scenes = {one["id"]: Scene.from_json(one["scene"]) for one in examples(splits.test, 4)}
    summary = read_summary(finished.workdir)
    for (kind, prefix), label in itertools.product(
        (("greedy", "greedy"), ("evaluations", "eval")), ("sft", "rl-8", "rl")
    ):
        found = []
        for record in captions_of(finished.workdir, prefix, label):
            for caption in record["captions"]:
                assert caption["habits"] == habits_of(caption["caption"], scenes[record["id"]])
                found += caption["habits"].items()
        counted = summary[kind][label]["habits"]
        assert counted, "no habit could occur: nothing was tested"
        assert list(counted) == [name for name in HABITS if name in dict(found)]
        for name, entry in counted.items():
            of_habit = [has for other, has in found if other == name]
            assert entry == {"share": pytest.approx(sum(of_habit) / len(of_habit)), "n": len(of_habit)}


def test_kept_rollouts_have_the_advantages_of_their_update(finished):
    """Against a slow count over the whole batch: the gated reward as a z-score of its group, then over the batch."""
    files = sorted((finished.workdir / "samples").glob("step-*.jsonl"))
    assert files
    logged = {record["step"]: record for record in map(json.loads, (finished.workdir / "metrics.jsonl").open())}
    for file in files:
        groups = [json.loads(line)["captions"] for line in file.read_text().splitlines()]
        names = list(groups[0][0]["rewards"])
        rewards = np.array([[[each["rewards"][name] for name in names] for each in group] for group in groups])
        inside = np.array([[each["in_band"] for each in group] for group in groups])
        rewards[..., names.index("linguistic")] *= inside
        spread = rewards.std(1, ddof=1, keepdims=True) + 1e-4
        each = (rewards - rewards.mean(1, keepdims=True)) / spread
        total = each.sum(-1)
        combined = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
        assert np.abs(each).max() > 0.5
        kept = [[[one["advantages"][name] for name in names] for one in group] for group in groups]
        np.testing.assert_allclose(kept, each, atol=2e-3)
        np.testing.assert_allclose([[one["advantage"] for one in group] for group in groups], combined, atol=2e-3)
        assert all(one["contributes"] for group in groups for one in group)
        # What was logged of the update is of these z-scores too: their share in it.
        share = np.abs(each).sum((0, 1)) / np.abs(each).sum()
        record = logged[int(file.stem.removeprefix("step-"))]
        np.testing.assert_allclose([record[f"advantage/share/{name}"] for name in names], share, atol=2e-3)
