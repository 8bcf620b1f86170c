"""reward_anatomy, executed with the oracle and with an endpoint: its text is true of its numbers."""

import os

import nbformat
import pytest
from judges.misbehaving import JudgeServer, well_behaved
from notebooks.kernels import NOTEBOOKS, executed, outputs, printed

PROBE = """{
    "curves": {name: values.tolist() for name, values in curves.items()},
    "assertions": scores.detail[0][0]["assertions"],
    "covered": scores.detail[0][0]["covered"],
    "rewards": scores.rewards[0, 0].tolist(),
    "rules": {title: dict(zip(names, row.tolist())) for title, row in rules.items()},
    "flawed": {flaws: dict(zip(names, pushed(flawed_scores(flaws), gate=gate).tolist())) for flaws in FLAWS[2:4]},
    "right": {flaws: [ranking(flawed_scores(flaws, count)) for count in (1, 9)] for flaws in FLAWS[1:3]},
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Executed with an endpoint that answers."""
    server = JudgeServer(well_behaved)
    folder = tmp_path_factory.mktemp("anatomy")
    previous = os.environ.get("HOME")
    os.environ["HOME"] = str(folder)  # The cache of answers lies there.
    try:
        changes = {'ENDPOINT = ""': f'ENDPOINT = "{server.url}"'}
        return *executed("reward_anatomy", folder, PROBE, changes, optimised=False), server
    finally:
        os.environ["HOME"] = previous
        server.close()


def test_what_it_prints_is_what_is_stored(run):
    stored = printed(nbformat.read(NOTEBOOKS / "reward_anatomy.ipynb", as_version=4))
    assert printed(run[0])[:-1] == stored[:-1]
    assert stored[-1] == "No endpoint is given: the oracle judged all of the above.\n"


def test_the_rewards_are_shares_of_what_is_shown(run):
    probe = run[1]
    holds = sum(one["verified"] and one["pointable"] for one in probe["assertions"])
    assert 0 < holds < len(probe["assertions"])
    assert probe["rewards"][0] == pytest.approx(holds / len(probe["assertions"]))
    assert probe["rewards"][1] == pytest.approx(sum(probe["covered"]) / len(probe["covered"]))
    page = outputs(run[0], "text/html")[0]
    assert page.count(">holds<") == holds


def test_remarks_cost_precision_with_pointability_and_bring_it_without(run):
    probe = run[1]
    total = len(probe["assertions"])
    holds = sum(one["verified"] and one["pointable"] for one in probe["assertions"])
    assert probe["curves"]["true and pointable"] == pytest.approx([holds / (total + count) for count in range(6)])
    assert probe["curves"]["only true"] == pytest.approx([(holds + count) / (total + count) for count in range(6)])


def test_each_objective_alone_puts_a_cheat_beside_the_reference_and_all_together_do_not(run):
    rules = run[1]["rules"]
    cheats = {"precision alone": "terse", "recall alone": "everything", "linguistic alone": "eloquent"}
    for title, cheat in cheats.items():
        assert rules[title][cheat] == pytest.approx(rules[title]["reference"], abs=0.02)
    for title in ("all three", "all, with the gate"):
        others = [value for name, value in rules[title].items() if name != "reference"]
        assert rules[title]["reference"] > max(others) + 0.5


def test_lenient_judges_lift_what_they_are_lenient_with_and_votes_do_not_mend_it(run):
    exact = run[1]["rules"]["all, with the gate"]
    length, praise = run[1]["flawed"].values()
    assert length["terse"] < exact["terse"] - 0.3
    assert praise["praise"] > exact["praise"] + 0.3
    (_, by_chance), (biased_once, biased) = run[1]["right"].values()
    assert by_chance > 0.95
    assert biased < biased_once < 0.8


def test_an_endpoint_judges_the_same_captions(run):
    notebook, _, server = run
    text = printed(notebook)[-1]
    assert "judge: the-model, " in text
    # The captions of eight scenes, six each and some of them equal in language, after those of the first scene.
    assert all(
        f"{name:10} 48 of 48 answered, mean difference" in text for name in ("precision", "recall", "linguistic")
    )
    assert len(server.seen) > 100
