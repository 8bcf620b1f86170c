"""A judge on the mesh: probabilities against a plain forward pass, padding, written answers, and training with it."""

import collections
import dataclasses
import functools
import importlib.resources
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balcap_jax import judges, models
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as configuration
from balcap_jax.data import photos
from balcap_jax.judges import prompts
from balcap_jax.judges.chat_judge import RemoteJudge
from balcap_jax.judges.mesh_judge import (
    MARKS,
    YES_NO,
    Model,
    PolicyClient,
    Question,
    YesNoJudge,
    build_judge,
    statements_of,
)
from balcap_jax.judges.prompts import render
from balcap_jax.judges.schema import (
    ChoiceQuestion,
    Failure,
    LinguisticQuestion,
    PrecisionQuestion,
    PreferenceQuestion,
    RecallQuestion,
    RubricQuestion,
)

# What the judges of these tests know of language.
CORPUS = "yes no Yes No YES NO one two three four five A B C D E F G H I picture caption data marks code fact answer "
QUESTIONS = "".join(
    file.read_text() for file in importlib.resources.files(prompts).iterdir() if file.name.endswith(".j2")
)
SIZES = {"vision_width": 16, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 16, "mlp": 16, "layers": 2}
SIZES |= {"width": 16, "heads": 2, "kv_heads": 1, "head_size": 8, "dtype": "float32", "prompt_tokens": 64}
FAMILIES = {
    "llava": {"family": "llava", "image_size": 24, "patch_size": 8},
    "qwen2_5_vl": {
        "family": "qwen2_5_vl",
        "patch_size": 4,
        "window_size": 16,
        "full_attention_layers": (1,),
        "max_image_tokens": 9,
        "min_image_tokens": 4,
        "mrope_section": (2, 1, 1),
        "qkv_bias": True,
    },
    "qwen3_vl": {
        "family": "qwen3_vl",
        "patch_size": 4,
        "vision_positions": 9,
        "deepstack_layers": (0,),
        "max_image_tokens": 9,
        "min_image_tokens": 4,
        "mrope_section": (2, 1, 1),
    },
}
# What a judge takes from a family is in the test of its probabilities, for each; what follows is done alike for all.
ONE_FAMILY = pytest.mark.parametrize(
    "directory",
    ["qwen3_vl", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llava", "qwen2_5_vl"))],
    indirect=True,
)
BUCKETS = (400, 800)
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    """A random model of each family, with a tokenizer that knows the words of an answer."""
    record = photos.Record("a", "", CORPUS * 20, (QUESTIONS,))
    tokenizer = photos.caption_tokenizer(photos.Photos([record] * 3, 1, 0))
    fields = configuration.default_config().model.to_dict() | SIZES | FAMILIES[request.param]
    policy, processor = models.build(fields, tokenizer)
    params = jax.jit(policy.init)(jax.random.key(3))
    params["decoder"] = jax.tree.map(lambda x: x * 3.0, params["decoder"])  # or all answers were about as likely
    folder = tmp_path_factory.mktemp("judge") / request.param
    return models.save(folder, fields, params, processor)


@pytest.fixture(scope="module")
def loaded(directory):
    return models.load(directory)


def judge_on(loaded, batch_size=4, buckets=BUCKETS) -> Model:
    return Model(*loaded, buckets=buckets, batch_size=batch_size)


@functools.partial(jax.jit, static_argnums=0)
def log_probs(policy, params, prompt, responses):
    """Compiled for prompts with a picture and for those without."""
    no_image = jnp.zeros((1, 1, policy.decoder.width))
    embeds = no_image if prompt.images is None else policy.encode(params, prompt.images)
    return policy.log_probs(params, prompt, embeds, responses)


def plain_probabilities(loaded, question: Question, words) -> np.ndarray:
    """By the log-probabilities of whole responses of one token, spelling by spelling."""
    policy, params, processor = loaded
    text = "\n\n".join(message["content"] for message in question.messages)
    room = dataclasses.replace(processor, prompt_tokens=BUCKETS[-1])
    if question.image is None:
        room = dataclasses.replace(room, template="{prompt}")
        tokens, mask = room.encode_prompts([text], [0], ["x"])
        prompt = models.Prompt(tokens, mask, room.text_positions(mask), None)
    else:
        prompt = room([question.image], [text])
    found = []
    for word in words:
        spellings = {s + w for w in (word, word.capitalize(), word.upper()) for s in ("", " ")}
        ids = {tuple(room.tokenizer.encode(text, add_special_tokens=False)) for text in spellings}
        one = np.array([[list(i) for i in sorted(ids) if len(i) == 1]], np.int32)
        found.append(float(np.exp(np.asarray(log_probs(policy, params, prompt, one))).sum()))
    return np.array(found) / sum(found)


def questions(count: int = 5) -> list[Question]:
    texts = [f"A dog {'and a cat ' * (7 * i)}is there." for i in range(count)]
    with_picture = [Question(render("verified", caption=text, statement=text), IMAGE) for text in texts]
    return with_picture + [Question(render("covered", caption=text, unit="A dog.")) for text in texts]


def test_probabilities_are_those_of_a_plain_forward_pass(loaded):
    asked = questions(2)
    found = judge_on(loaded).probabilities(asked, YES_NO)
    for question, probabilities in zip(asked, found, strict=True):
        assert probabilities.sum() == pytest.approx(1, abs=1e-6)
        assert probabilities == pytest.approx(plain_probabilities(loaded, question, YES_NO), abs=1e-5)
    assert max(p[0] for p in found) - min(p[0] for p in found) > 1e-4, "the texts made no difference"


@ONE_FAMILY
def test_batches_padding_and_buckets_change_nothing(loaded):
    asked = questions(3)
    found = judge_on(loaded, 4).probabilities(asked, MARKS)
    alone = judge_on(loaded, 1).probabilities(asked[::-1], MARKS)[::-1]
    long = judge_on(loaded, 3, BUCKETS[1:]).probabilities(asked, MARKS)
    for one, other, third in zip(found, alone, long, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
        assert one == pytest.approx(third, abs=1e-5)


@ONE_FAMILY
def test_a_prompt_that_is_too_long_is_a_failure_of_its_own(loaded):
    model = judge_on(loaded, 2)
    asked = [questions(1)[1], Question(render("covered", caption="word " * 3000, unit="x")), questions(1)[1]]
    first, second, third = model.probabilities(asked, YES_NO)
    assert isinstance(second, Failure)
    assert "longer than the last of judge.prompt_buckets" in second.reason
    assert first == pytest.approx(third)
    assert model.calls == 3
    assert sum(model.failures.values()) == 1


class Scripted:
    """A model whose answers, and whose probabilities, are given by a function of the prompt."""

    def __init__(self, say):
        self.say, self.failures = say, {}
        self.calls = self.tokens_in = self.tokens_out = 0

    def answer(self, questions, max_tokens):
        return [self.say(question.messages[-1]["content"]) for question in questions]

    probabilities = answer

    def word_ids(self, words):
        return np.zeros((len(words), 1), np.int32)


def test_written_answers_go_through_the_same_parser():
    def say(text):
        if "second" in text:
            return "no JSON"
        return "```json\n" + json.dumps({"why": "so", "clarity": 5, "fluency": 4, "coherency": 3}) + "\n```"

    model = Scripted(say)
    model.failures = collections.Counter()
    judge = RemoteJudge(PolicyClient(model, "m"))
    first, second = judge.linguistic([LinguisticQuestion("first"), LinguisticQuestion("second")])
    assert (first.clarity, first.fluency, first.coherency) == (5, 4, 3)
    assert isinstance(second, Failure)
    assert sum(judge.usage().failures.values()) == 1
    assert judge.about["model"] == "m"


@ONE_FAMILY
def test_a_random_model_writes_nothing_usable_and_says_so(loaded):
    judge = RemoteJudge(PolicyClient(judge_on(loaded, 2), "random"), max_tokens=12)
    verdicts = judge.linguistic([LinguisticQuestion("A dog."), LinguisticQuestion("")])
    assert isinstance(verdicts[0], Failure)
    assert verdicts[1].clarity == 1  # nothing was asked about nothing
    assert judge.usage().calls == 1


def test_yes_and_no_become_verdicts():
    def say(text):
        if "wrong" in text:
            return np.array([0.4, 0.6])
        if "aspect" in text or "fluency" in text or "clarity" in text or "coherency" in text:
            return np.array([0.0, 0.0, 0.5, 0.5, 0.0])
        if "The options" in text:
            return np.array([0.1, 0.3, 0.2, 0.4] + [0.0] * 5)
        return np.array([0.5, 0.5])

    judge = YesNoJudge(Scripted(say), "m")
    metadata = {}
    (verdict,) = judge.precision([PrecisionQuestion("A dog. A wrong cat. A dog!", IMAGE, metadata)])
    # The whole caption stands beside each statement: every prompt speaks of what is wrong.
    assert [one.text for one in verdict.assertions] == ["A dog.", "A wrong cat."]
    assert not any(one.verified for one in verdict.assertions)
    (verdict,) = judge.precision([PrecisionQuestion("A dog. It sits.", IMAGE, metadata)])
    assert all(one.verified and one.pointable for one in verdict.assertions)
    recall = judge.recall([RecallQuestion("x", ["a", "wrong", "c"]), RecallQuestion(" ", ["a"])])
    assert [one.covered for one in recall] == [[True, False, True], [False]]
    (rubric,) = judge.rubric([RubricQuestion("x", ["wrong", "b"])])
    assert rubric.passed == [False, True]
    (marks,) = judge.linguistic([LinguisticQuestion("x")])
    assert (marks.clarity, marks.fluency, marks.coherency) == (3.5, 3.5, 3.5)
    (choice,) = judge.choice([ChoiceQuestion("x", "q", (("A", "1"), ("B", "2"), ("C", "3")))])
    assert choice.answer == "B"  # D is likelier, and not offered
    with pytest.raises(UserError, match="looks at pictures"):
        judge.precision([PrecisionQuestion("x", None, metadata)])


def test_the_likeliest_of_three_words_is_the_preference():
    def say(text):
        if "broken" in text:
            return Failure("too long")
        probabilities = {"tie": np.array([0.5, 0.3, 0.2]), "first": np.array([0.1, 0.6, 0.3])}
        return next(
            (p for word, p in probabilities.items() if word in text.split("</data-")[0]), np.array([0.1, 0.2, 0.7])
        )

    pairs = [("first a", "b"), ("tie a", "b"), ("a", "b"), ("a", "a"), ("", "b"), ("a", "broken")]
    judge = YesNoJudge(Scripted(say), "m")
    *verdicts, failure = judge.preference([PreferenceQuestion(*pair, IMAGE, {}) for pair in pairs])
    assert [verdict.winner for verdict in verdicts] == [1, 0, 2, 0, 2]
    assert isinstance(failure, Failure)
    with pytest.raises(UserError, match="the judge of preference looks at pictures"):
        judge.preference([PreferenceQuestion("a", "b", None, {})])


def test_a_failure_of_one_statement_is_one_of_its_caption_alone():
    def say(text):
        return Failure("too long") if "bad" in text else np.array([0.9, 0.1])

    judge = YesNoJudge(Scripted(say), "m")
    first, second = judge.precision([PrecisionQuestion("Good. bad.", IMAGE, {}), PrecisionQuestion("Good.", IMAGE, {})])
    assert isinstance(first, Failure)
    assert len(second.assertions) == 1
    one, other = judge.recall([RecallQuestion("x", ["bad", "good"]), RecallQuestion("x", ["good"])])
    assert isinstance(one, Failure)
    assert other.covered == [True]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog. It is red.", ["A dog.", "It is red."]),
        ("Dr. Smith sits; he reads.", ["Dr. Smith sits", "he reads."]),
        ("- a dog\n- a cat\n\n3. A hat", ["a dog", "a cat", "A hat"]),
        ("A dog. a dog", ["A dog."]),
        ('He says "Stop!" Then he goes.', ['He says "Stop!"', "Then he goes."]),
        ("It is 3.5 m long.", ["It is 3.5 m long."]),
        ("... !", []),
        ("", []),
    ],
)
def test_statements(caption, expected):
    assert statements_of(caption) == expected


# ---- building, training ----------------------------------------------------------------------------------------------


def group(directory, **changes):
    judge = configuration.default_config().judge
    judge.update(name="policy", path=str(directory), prompt_buckets=BUCKETS, dtype="float32", batch_size=4, **changes)
    return judge


@ONE_FAMILY
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere"}, "no such folder: nowhere"),
        ({"prompt_buckets": (8,)}, "leaves no room for text"),
    ],
)
def test_bad_settings_are_found_when_the_judge_is_built(directory, changes, message):
    with pytest.raises(UserError, match=message):
        build_judge({**group(directory), **changes})


@ONE_FAMILY
def test_a_tokenizer_without_the_words(loaded, monkeypatch):
    model = judge_on(loaded)
    with pytest.raises(UserError, match="no token for 'unheardof'"):
        model.word_ids(["unheardof"])


@ONE_FAMILY
def test_a_judge_built_from_a_config_spreads_over_the_devices(directory):
    judge = judges.build(group(directory, scoring="yes_no"), seed=0)
    assert judge.about["recall"] == "covered.v1"
    (verdict,) = judge.recall([RecallQuestion("A dog.", ["A dog.", "A cat."])])
    assert len(verdict.covered) == 2
    assert judge.usage().calls == 2


def test_depth_1_is_refused(tmp_path):
    changes = {"judge.name": "policy", "judge.path": "x", "pipeline.depth": "1"}
    with pytest.raises(UserError, match=r"pipeline\.depth"):
        configuration.load("configs/scenes.py", changes)
