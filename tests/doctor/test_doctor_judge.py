"""What `doctor` finds of a judge: each planted fault by name."""

import functools
import json
import sys
from pathlib import Path

import pytest
from doctor.set_up import assert_fault, seeing
from ml_collections import ConfigDict

from balcap_jax.doctor import judge, pictures
from balcap_jax.doctor.findings import FAULT, OK, Finding

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))
from misbehaving import JudgeServer, Reply, kind_of, well_behaved


def of_judge(config: ConfigDict, seen: pictures.Seen, patience: float = 5.0) -> list[Finding]:
    return judge.look(config, seen, patience)[0]


def test_a_judge_that_is_down(sound, seen):
    (finding,) = of_judge(sound.config(judge__endpoints="http://127.0.0.1:9/v1"), seen)
    assert_fault(finding, "judge http://127.0.0.1:9/v1", "is down (connection refused)", "start it")


def test_a_judge_that_knows_no_such_model(sound, seen):
    def refuses(body: dict) -> str:
        return "" if body["model"] == "the-model" else f"The model {body['model']} does not exist"

    with JudgeServer(seeing, refuses=refuses) as server:
        (finding,) = of_judge(sound.config(judge__endpoints=server.url, judge__model="gpt-5o"), seen)
    assert_fault(
        finding,
        f"judge {server.url}",
        "HTTP 400: The model gpt-5o does not exist",
        "mend judge.endpoints or judge.model",
    )


FAILING = {
    "no JSON": (Reply("text", "What a lovely caption!"), "", "take a model that keeps to a JSON schema"),
    "too late": (Reply("hang"), "no answer within ", "raise judge.timeout"),
    "HTTP 503": (Reply("status", "overloaded", status=503), "HTTP 503", "see the server's log"),
    "HTTP 413": (Reply("status", "too large", status=413), "HTTP 413", "mend judge.model or judge.max_tokens"),
}


@pytest.mark.parametrize("name", FAILING)
def test_answers_that_cannot_be_used(sound, seen, name):
    reply, found, remedy = FAILING[name]

    def behave(body: dict) -> Reply:
        return reply if kind_of(body) == "recall" else seeing(body)

    with JudgeServer(behave) as server:
        (finding,) = of_judge(sound.config(judge__endpoints=server.url), seen, 3.0)
    assert_fault(finding, f"judge {server.url}", "no answer about recall: ", remedy)
    assert found in finding.found
    assert server.url in finding.found


def test_a_judge_that_does_not_see(sound, seen):
    with JudgeServer(well_behaved) as server:  # It marks words, whatever the picture.
        (finding,) = of_judge(sound.config(judge__endpoints=server.url), seen)
    assert_fault(
        finding, f"judge {server.url}", "on plain grey ones: it does not see", "name a model that sees pictures"
    )
    assert finding.details, "its answers are shown all the same"


def test_a_judge_that_finds_no_fact_in_its_own_sentence(sound, seen):
    """The units are those of three pictures, of which each says the same two."""

    def behave(body: dict, covered: int) -> Reply:
        answer = json.loads(seeing(body).content)
        for number, unit in enumerate(answer.get("units", [])):
            unit["covered"] = number < covered
        return Reply("text", json.dumps(answer))

    for covered, verdict in ((0, FAULT), (1, OK)):
        with JudgeServer(functools.partial(behave, covered=covered)) as server:
            (finding,) = of_judge(sound.config(judge__endpoints=server.url), seen)
        assert finding.verdict == verdict
        if verdict == FAULT:
            found = "it finds 0 of 6 reference units in captions that consist of these very sentences"
            assert_fault(finding, f"judge {server.url}", found, "name a model that understands the question")
            assert finding.details, "its answers are shown all the same"


def test_a_server_that_answers_to_any_name(sound, seen):
    for models, lists in (
        (b'{"data": [{"id": "the-model"}, {"id": "b"}]}', "the-model, b"),
        (b'{"data": [{"id": "nope"}, {"id": "b"}]}', ""),
        (b"what?", ""),
    ):
        with JudgeServer(seeing, models=models) as server:
            (finding,) = of_judge(sound.config(judge__endpoints=server.url, judge__model="nope"), seen)
        assert finding.verdict == OK
        lines = [line for line in finding.details if " lists " in line]
        said = f"judge {server.url} lists {lists}, and not 'nope' (judge.model), to which it answers: see that it is"
        assert [line.startswith(said) for line in lines] == [True] * bool(lists)


def test_one_of_several_endpoints(sound, seen):
    with JudgeServer(seeing, models=b'{"data": [{"id": "another"}]}') as other:
        urls = f"{sound.server.url},{other.url},http://127.0.0.1:9/v1"
        first, second, third = of_judge(sound.config(judge__endpoints=urls), seen)
    assert first.verdict == OK
    assert_fault(second, f"judge {other.url}", "it serves 'another', and ", "name it in judge.model")
    assert_fault(third, "judge http://127.0.0.1:9/v1", "is down", "start it")


def test_a_judge_that_may_be_asked_seldom(sound, seen):
    """Few questions show what an answer takes: a hundred would wait for their turn.

    Three of the reward, three about pictures, one about grey ones, as all references are the same, and one about units.
    """
    with JudgeServer(seeing) as server:
        limited = sound.config(judge__endpoints=server.url, judge__rpm=100_000)
        (finding,), heard = judge.look(limited, seen, 5.0)
        asked = server.requests
    assert finding.verdict == OK
    assert (asked, heard.trial.asked, heard.trial.servers) == (8, 8, 1)
    assert heard.trial.seconds.keys() == {"precision", "recall", "linguistic"}
