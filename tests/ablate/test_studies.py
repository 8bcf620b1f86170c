"""The registry of studies: its configs, and that runs of one name are one run."""

import math

import pytest

from balcap_jax.ablate.plans import Plan, judge_calls
from balcap_jax.ablate.results import digest, identity
from balcap_jax.ablate.studies import (
    CROSSED,
    FIELDS,
    FLAWS,
    JUDGED,
    JUDGES,
    PARTS,
    PILOT_SEEDS,
    RECIPE,
    SCALES,
    SPREAD,
    STUDIES,
    UTILITY_REWARDS,
    asked,
    scaled,
)
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes

STEPS = int(FIELDS["stages.rl.steps"])


@pytest.fixture
def plan(tmp_path):
    return Plan(RECIPE, {}, tmp_path, tmp_path / "results")


def test_the_studies_are_those_asked_for():
    assert [*STUDIES] == ["spread", "moods", "pointability", "gate", "rivals", "judges", "budget", "leave_one_out"]
    assert [*SPREAD.arms] == [
        *("full_s0.1", "full", "full_s10"),
        *("grpo_s0.1", "grpo_s0.3", "grpo", "grpo_s3", "grpo_s10", "grpo_fixed"),
    ]
    assert [scaled("grpo", scale) for scale in SCALES] == [*SPREAD.arms][3:8]
    assert {*STUDIES["rivals"].arms} == {"full", "arena", "lexical", "best_of", *UTILITY_REWARDS}
    # Four methods with the exact judge and two others, one method with seven, unbiased noise and two with votes.
    assert (len(JUDGED), len(CROSSED), len(FLAWS)) == (4, 2, 9)
    assert len(JUDGES.arms) == 4 * 3 + 7 + 3
    assert [asked(share) for share in (1, 0.5, 0.25)] == [*STUDIES["budget"].arms]
    for study in STUDIES.values():
        assert study.against in study.arms
        assert max(study.seeds) < min(PILOT_SEEDS)
        assert all(arm.about and "\n" not in arm.about for arm in study.arms.values())


def test_updates_are_cut_where_the_batch_allows_it(plan, tmp_path):
    def stage(fields):
        return Plan(RECIPE, fields, tmp_path, tmp_path).of(SPREAD, "full", 0)[2].stages.rl

    assert stage({}).micro_batches == PARTS
    assert stage({"stages.rl.batch_size": "4"}).micro_batches == 1
    for own in (1, 2):
        assert stage({"stages.rl.micro_batches": str(own)}).micro_batches == own
    base = plan.missing([SPREAD], [0])[0]
    assert base.is_base
    assert base.config.stages.rl.micro_batches == 1  # A base is the same for all.


def test_all_arms_have_configs_and_one_name_is_one_run(plan):
    """Over all studies: equal labels have equal configs, and other labels other ones."""
    known: dict[str, str] = {}
    for study in STUDIES.values():
        for name in study.arms:
            made = plan.of(study, name, 3)
            if made is None:
                assert name == "grpo_fixed"
                continue
            config = made[2]
            assert (config.seed, config.stages.rl.steps, config.log.eval_images) == (3, STEPS, 128)
            assert recipes.stage_order(config)[:3] == ("vision", "align", "sft")
            key = digest(identity(config))
            assert known.setdefault(study.label(name), key) == key, name
    assert len({*known.values()}) == len(known)


def test_fields_of_arms(plan):
    def config(study, arm):
        return plan.of(STUDIES[study], arm, 0)[2]

    assert config("spread", "grpo_s0.1").rewards.scales == pytest.approx((1, 1, 0.1))
    assert config("spread", "grpo_s0.1").advantage.estimator == "grpo"
    assert config("moods", "conflict").data.captioner == "moods"
    assert config("pointability", "full").data.captioner == "padding"
    assert not config("gate", "no_gate").rewards.gate
    for arm in STUDIES["gate"].arms:  # Room for captions of twice a reference's words and more, where length pays.
        assert (config("gate", arm).judge.flaws, config("gate", arm).rollout.max_tokens) == ("length:0.4", 128)
    assert config("gate", "ramp").rewards.weights == (*config("gate", "full").rewards.weights, 1.0)
    voted = config("judges", "full_false_accept_0.3_votes_3").judge
    assert (voted.flaws, voted.votes) == ("false_accept:0.3", 3)
    assert config("judges", "full_failed_0.3").judge.max_failure_rate == 1
    assert config("budget", "ask_0.25").judge.ask == "precision:0.25,recall:0.25,linguistic:0.25"


def test_questions_to_the_judge(plan):
    """Updates are of 16 pictures with 8 captions each; three questions about each caption, or a share."""

    def calls(study, arm):
        return judge_calls(plan.of(STUDIES[study], arm, 0)[2])

    captions = STEPS * 16 * 8
    assert calls("budget", "full") == 3 * captions
    assert calls("budget", "ask_0.5") == 3 * captions / 2
    assert calls("budget", "ask_0.25") == 3 * captions / 4
    assert calls("rivals", "caprl") == 8 * captions
    assert calls("rivals", "arena") == 2 * captions
    assert calls("rivals", "lexical") == 0
    assert calls("judges", "full_noise_0.3_votes_3") == 9 * captions


def test_runs_go_on_from_bases_that_they_share(plan):
    runs = {run.name: run for run in plan.missing([STUDIES["moods"], STUDIES["pointability"], STUDIES["gate"]], [7])}
    order = [*runs]
    assert {name for name, run in runs.items() if run.is_base} == {
        *("align-seed7", "moods-base-seed7", "padding-base-seed7", "habits-base-seed7"),
    }
    assert len(runs) == 4 + 7 + 2 + 5
    for name, run in runs.items():
        if run.base is not None:
            assert order.index(run.base.name) < order.index(name)
            assert runs[run.base.name] is run.base
            ours, theirs = recipes.stage_order(run.config), recipes.stage_order(run.base.config)
            assert ours[: len(theirs)] == theirs
    assert runs["utility-no_gate-seed7"].base is runs["habits-base-seed7"]
    assert runs["moods-base-seed7"].base is runs["align-seed7"]
    assert runs["moods-base-seed7"].config.data.captioner == "moods"
    assert runs["align-seed7"].config.stages.order == "vision,align"


def test_studies_share_runs(plan):
    names = [run.name for run in plan.missing([STUDIES["spread"], STUDIES["leave_one_out"]], [0])]
    assert len(names) == len({*names})
    assert names.count("habits-grpo-seed0") == 1
    # 2 bases; 9 arms, of which one waits for another's result; 17 of which full and grpo are shared.
    assert len(names) == 2 + 8 + 15


def test_seeds_are_made_one_after_the_other(plan):
    seeds = [run.seed for run in plan.missing([STUDIES["budget"]])]
    assert seeds == sorted(seeds)
    assert {*seeds} == {*STUDIES["budget"].seeds}


def test_an_unknown_field_is_named_by_the_config(tmp_path):
    plan = Plan(RECIPE, {"rewards.weight": "1"}, tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"unknown config field 'rewards\.weight'"):
        plan.missing([SPREAD], [0])


def test_scales_span_two_decades_evenly():
    assert math.prod(SCALES) == pytest.approx(0.9, rel=0.01)
    assert (min(SCALES), max(SCALES)) == (0.1, 10.0)
