"""A frozen vision-language model as judge, on the devices that train: for pods without a network.

`Model` holds the weights and the compiled programs: greedy answers by our own rollout, and the probability of given
words as the first word of an answer, one forward pass. `PolicyClient` answers what `remote.RemoteJudge` asks, in JSON,
by the same prompts, schemas and parser. `YesNoJudge` asks statement by statement for yes or no, and parses nothing.

Each process holds the whole judge on its own devices and judges its own captions: no process waits for another's
questions. Prompts are padded to a few lengths (`judge.prompt_buckets`), so that each is one compiled program.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax import models
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.parsing import UnusableAnswer, parse_answer
from balcap_jax.judges.chat.types import Answer, Ask
from balcap_jax.judges.chat_judge import RemoteJudge
from balcap_jax.judges.schema import (
    Assertion,
    ChoiceQuestion,
    ChoiceVerdict,
    Failure,
    LinguisticQuestion,
    LinguisticVerdict,
    PrecisionQuestion,
    PrecisionVerdict,
    RecallQuestion,
    RecallVerdict,
    RubricQuestion,
    RubricVerdict,
    Usage,
)
from balcap_jax.models.policy import Params, Policy, Prompt, Wrapped
from balcap_jax.models.prompting import PromptProcessor, PromptTooLong
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Sampling, compile_rollout

YES_NO = ("yes", "no")
MARKS = ("one", "two", "three", "four", "five")
LETTERS = tuple("ABCDEFGHI")
HALF = 0.5  # probability from which yes is the answer
_ASPECTS = ("clarity", "fluency", "coherency")
_SPELLINGS = 6  # of a word, at most: with and without a space, and in three cases


@dataclasses.dataclass(frozen=True)
class Question:
    """A rendered prompt, with the picture that it is about, uint8 [height, width, 3], or None."""

    messages: tuple[Mapping[str, str], ...]
    image: np.ndarray | None = None


class Model:
    """The judge's weights on this process's devices, and its programs, compiled at their first use."""

    def __init__(
        self, policy: Policy, params: Params, processor: PromptProcessor, *, buckets: Sequence[int], batch_size: int
    ):
        """`buckets`: prompt lengths, ascending. `batch_size` is rounded up to what the devices divide."""
        self._policy, self._params, self._processor = policy, params, processor
        self._buckets = tuple(buckets)
        mesh = sharding.mesh_of(params)
        self._mesh = mesh
        parts = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES]))
        self._batch = -(-batch_size // parts) * parts
        self._programs: dict[Any, Callable] = {}
        self.calls = self.tokens_in = self.tokens_out = 0
        self.failures: collections.Counter[str] = collections.Counter()

    # ---- for judges -------------------------------------------------------------------------------------------------

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[str | Failure]:
        """The greedy answer to each question; one that is cut at `max_tokens` is a Failure."""

        def run(bucket: int, prompt: Prompt, policy: Policy) -> list[str | Failure]:
            keys = np.zeros(self._batch, np.uint32)
            scalar = np.zeros((), np.uint32)
            inputs = (*self._put((prompt, keys)), *self._put((scalar, scalar), whole=True))
            key = ("answer", bucket, policy, max_tokens)
            if key not in self._programs:
                sampling = Sampling(1, max_tokens, greedy=True)
                self._programs[key] = compile_rollout(policy, sampling, self._dtype, self._params, *inputs)
            out = jax.device_get(self._programs[key](self._params, *inputs)._replace(image_embeds=None))
            self.tokens_out += int(out.lengths.sum())
            texts = self._processor.decode(out.tokens[:, 0])
            cut = out.truncated[:, 0]
            return [Failure("answer longer than judge.max_tokens") if c else t for t, c in zip(texts, cut, strict=True)]

        return self._in_batches(questions, run)

    def probabilities(self, questions: Sequence[Question], words: Sequence[str]) -> list[np.ndarray | Failure]:
        """Of each question the probabilities [K] that the answer's first word is each of `words`, which add up to 1.

        A word's probability is that of all its spellings that are one token: with and without a space before it, in
        small letters and capitals. Raises UserError for a word without one.
        """
        ids = self.word_ids(words)

        def run(bucket: int, prompt: Prompt, policy: Policy) -> list[np.ndarray | Failure]:
            inputs = (self._put(prompt), self._put(ids, whole=True))
            key = ("words", bucket, policy, ids.shape)
            if key not in self._programs:
                program = jax.jit(functools.partial(_first_words, policy, self._mesh))
                self._programs[key] = program.lower(self._params, *inputs).compile()
            found = jax.device_get(self._programs[key](self._params, *inputs))
            return list(np.exp(found - np.logaddexp.reduce(found, axis=-1, keepdims=True)))

        return self._in_batches(questions, run)

    def word_ids(self, words: Sequence[str]) -> np.ndarray:
        """[K, spellings] int32 token ids of each word, -1 where there are fewer."""
        tokenizer = self._processor.tokenizer
        found = np.full((len(words), _SPELLINGS), -1, np.int32)
        for row, word in enumerate(words):
            cases = dict.fromkeys([word] if word in LETTERS else [word, word.capitalize(), word.upper()])
            spellings = [f"{space}{case}" for case in cases for space in ("", " ")]
            encoded = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
            ids = [one[0] for one in encoded if len(one) == 1 and one[0] != tokenizer.unk_token_id]
            single = list(dict.fromkeys(ids))
            if not single:
                raise UserError(
                    f"config field 'judge.scoring' is yes_no, but the judge's tokenizer has no token for {word!r}; set "
                    "judge.scoring to generate, or choose another judge.path"
                )
            found[row, : len(single)] = single
        return found

    # ---- batches ----------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> str:
        return self._policy.decoder.dtype

    def _in_batches(self, questions: Sequence[Question], run: Callable[[int, Prompt, Policy], list]) -> list:
        """One result per question: those that fit are run in batches of one length, filled up with the last of them."""
        found: list[Any] = [None] * len(questions)
        queues: dict[tuple[int, bool], list[tuple[int, Prompt]]] = {}
        prepared: dict[Any, Any] = {}  # A picture is asked about many times, and its prompts share its pixels.
        for i, question in enumerate(questions):
            laid = self._lay_out(question, prepared)
            if isinstance(laid, Failure):
                found[i] = laid
                self.failures[laid.reason] += 1
            else:
                queues.setdefault((laid[0], question.image is not None), []).append((i, laid[1]))
        for (bucket, sees), queue in sorted(queues.items(), key=lambda item: item[0]):
            policy = self._policy if sees else WithoutImage(self._policy)
            for start in range(0, len(queue), self._batch):
                part = queue[start : start + self._batch]
                rows = [prompt for _, prompt in part] + [part[-1][1]] * (self._batch - len(part))
                prompt = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
                self.tokens_in += sum(int(one.mask.sum()) for _, one in part)
                for (i, _), result in zip(part, run(bucket, prompt, policy), strict=False):
                    found[i] = result
        self.calls += len(questions)
        return found

    def _lay_out(self, question: Question, prepared: dict[Any, Any]) -> tuple[int, Prompt] | Failure:
        """The smallest bucket that holds the prompt, and its arrays [1, ...]; `prepared` keeps those of pictures."""
        # One text, as the models' chat templates have one place for what is asked.
        text = "\n\n".join(message["content"] for message in question.messages)
        try:
            images, pixels = None, question.image
            if pixels is not None:
                place = pixels.ctypes.data, pixels.shape, pixels.strides
                if place not in prepared:
                    prepared[place] = self._processor.prepare_images([pixels])
                images = prepared[place]
            for bucket in self._buckets:
                processor = self._of_length(bucket)
                try:
                    if images is None:
                        return bucket, processor.without_image([text])
                    return bucket, processor.with_prepared(images, [text])
                except PromptTooLong as error:
                    needed = error.needed
        except UserError as error:
            return Failure(str(error))
        return Failure(f"a prompt of {needed} tokens is longer than the last of judge.prompt_buckets")

    @functools.lru_cache(maxsize=32)  # noqa: B019 - one model lives as long as the process
    def _of_length(self, bucket: int) -> PromptProcessor:
        return dataclasses.replace(self._processor, prompt_tokens=bucket)

    def _put(self, tree: Any, *, whole: bool = False) -> Any:
        """Onto the devices by an explicit transfer; `whole`: the same on each."""
        if self._mesh is None:
            return jax.device_put(tree)
        place = sharding.replicated(self._mesh) if whole else sharding.batch_sharding(self._mesh)
        return jax.device_put(tree, place)


def _first_words(policy: Policy, mesh: Any, params: Params, prompt: Prompt, ids: jax.Array) -> jax.Array:
    """Log-probabilities [B, K] of words as the first of the answer; `ids` [K, n] are their spellings, -1 for none."""
    with sharding.layout(mesh, sharding.TRAINING):
        _, logits = policy.prefill(params, prompt, policy.encode(params, prompt.images))
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    of_spellings = jnp.where(ids >= 0, log_probs[:, jnp.maximum(ids, 0)], -jnp.inf)
    return jax.nn.logsumexp(of_spellings, axis=-1)


def _usage(model: Model) -> Usage:
    counts = collections.Counter({f"the judge on the mesh: {reason}": n for reason, n in model.failures.items()})
    return Usage(model.calls, 0, model.tokens_in, model.tokens_out, counts)


# --- written answers --------------------------------------------------------------------------------------------------


class PolicyClient:
    """What `RemoteJudge` asks, answered by the model on the mesh; an answer is parsed and checked as any other."""

    def __init__(self, model: Model, name: str):
        self._model, self.model = model, name

    def ask(self, asks: Sequence[Ask]) -> list[Answer | Failure]:
        """One Answer or Failure per question. An unusable answer is not asked for again: it would be the same."""
        by_length: dict[int, list[int]] = {}
        for i, ask in enumerate(asks):
            by_length.setdefault(ask.max_tokens, []).append(i)
        found: list[Any] = [None] * len(asks)
        for length, places in by_length.items():
            questions = [Question(asks[i].messages, asks[i].image) for i in places]
            for i, text in zip(places, self._model.answer(questions, length), strict=True):
                found[i] = text if isinstance(text, Failure) else self._parsed(text, asks[i])
        return found

    def _parsed(self, text: str, ask: Ask) -> Answer | Failure:
        try:
            return Answer(parse_answer(text, ask.schema, ask.check))
        except UnusableAnswer as error:
            self._model.failures[str(error)] += 1
            return Failure(f"the judge on the mesh: {error}")

    def usage(self) -> Usage:
        return _usage(self._model)

    def close(self) -> None:
        pass


# --- yes and no -------------------------------------------------------------------------------------------------------


class YesNoJudge:
    """Implements `judges.schema.Judge` by probabilities: of yes and no, of marks, of letters; nothing is parsed.

    The statements of a caption are its sentences (`statements`), coarser than assertions that a model would write. A
    statement holds, a unit is covered and a criterion met where yes is at least as likely as no. Each mark is the mean
    of 1 to 5 under their probabilities, and so no whole number.
    """

    def __init__(self, model: Model, name: str):
        self._model = model
        asked = {
            "precision": ("verified", "pointable"),
            "recall": ("covered",),
            "linguistic": ("mark",),
            "choice": ("letter",),
            "rubric": ("passed",),
        }
        texts = {method: ", ".join(map(prompts.name_of, names)) for method, names in asked.items()}
        self.about: Mapping[str, str] = {"model": name} | texts

    def precision(self, questions: Sequence[PrecisionQuestion]) -> list[PrecisionVerdict | Failure]:
        """Raises UserError for a question without a picture."""
        if any(question.image is None for question in questions):
            raise UserError("the judge of precision looks at pictures, which this data set does not have")
        statements = [statements_of(question.caption) for question in questions]
        asked = [(i, text) for i, texts in enumerate(statements) for text in texts]

        def ask(prompt: str, places: Sequence[tuple[int, str]]) -> list[float | Failure]:
            rendered = [
                Question(prompts.render(prompt, caption=questions[i].caption, statement=text), questions[i].image)
                for i, text in places
            ]
            return self._yes(rendered)

        verified = ask("verified", asked)
        looked = [place for place in asked if questions[place[0]].pointability]
        pointable = dict(zip(looked, ask("pointable", looked), strict=True))
        found: list[list[Assertion] | Failure] = [[] for _ in questions]
        for (i, text), is_true in zip(asked, verified, strict=True):
            points = pointable.get((i, text), 1.0)
            failed = next((one for one in (is_true, points) if isinstance(one, Failure)), None)
            if isinstance(found[i], Failure) or failed:
                found[i] = failed or found[i]
                continue
            why = f"yes {is_true:.2f}, pointable {points:.2f}"
            found[i].append(Assertion(text=text, why=why, verified=is_true >= HALF, pointable=points >= HALF))
        return [one if isinstance(one, Failure) else PrecisionVerdict(assertions=one) for one in found]

    def recall(self, questions: Sequence[RecallQuestion]) -> list[RecallVerdict | Failure]:
        return self._lists(
            [(question.caption, question.units) for question in questions],
            lambda caption, unit: prompts.render("covered", caption=caption, unit=unit),
            lambda flags: RecallVerdict(covered=flags),
        )

    def rubric(self, questions: Sequence[RubricQuestion]) -> list[RubricVerdict | Failure]:
        return self._lists(
            [(question.caption, question.criteria) for question in questions],
            lambda caption, criterion: prompts.render("passed", caption=caption, criterion=criterion),
            lambda flags: RubricVerdict(passed=flags),
        )

    def linguistic(self, questions: Sequence[LinguisticQuestion]) -> list[LinguisticVerdict | Failure]:
        asked = [
            Question(prompts.render("mark", caption=question.caption, aspect=aspect))
            for question in questions
            for aspect in _ASPECTS
        ]
        found = iter(self._model.probabilities(asked, MARKS))
        verdicts: list[LinguisticVerdict | Failure] = []
        for question in questions:
            three = [next(found) for _ in _ASPECTS]
            failed = next((one for one in three if isinstance(one, Failure)), None)
            if not question.caption.strip():
                verdicts.append(LinguisticVerdict(clarity=1, fluency=1, coherency=1))
            elif failed:
                verdicts.append(failed)
            else:
                means = [float(np.clip(p @ np.arange(1, len(MARKS) + 1), 1.0, len(MARKS))) for p in three]
                verdicts.append(LinguisticVerdict(**dict(zip(_ASPECTS, means, strict=True))))
        return verdicts

    def choice(self, questions: Sequence[ChoiceQuestion]) -> list[ChoiceVerdict | Failure]:
        """The likeliest of the options' letters."""
        asked = [
            Question(
                prompts.render("letter", caption=q.caption, question=q.question, options=[list(o) for o in q.options])
            )
            for q in questions
        ]
        found = self._model.probabilities(asked, LETTERS)
        verdicts: list[ChoiceVerdict | Failure] = []
        for question, p in zip(questions, found, strict=True):
            if isinstance(p, Failure):
                verdicts.append(p)
            else:
                offered = [letter for letter, _ in question.options]
                verdicts.append(ChoiceVerdict(answer=max(offered, key=lambda letter: p[LETTERS.index(letter)])))
        return verdicts

    def usage(self) -> Usage:
        return _usage(self._model)

    def close(self) -> None:
        pass

    def _yes(self, questions: Sequence[Question]) -> list[float | Failure]:
        """The probability of yes beside no."""
        found = self._model.probabilities(questions, YES_NO)
        return [one if isinstance(one, Failure) else float(one[0]) for one in found]

    def _lists(self, lists: Sequence[tuple[str, Sequence[str]]], render: Callable, verdict: Callable) -> list:
        """A verdict of flags for each (caption, texts); nothing is covered by a caption that says nothing."""
        asked = [(i, text) for i, (caption, texts) in enumerate(lists) if caption.strip() for text in texts]
        answers = iter(self._yes([Question(render(lists[i][0], text)) for i, text in asked]))
        found = []
        for caption, texts in lists:
            if not caption.strip():
                found.append(verdict([False] * len(texts)))
                continue
            yes = [next(answers) for _ in texts]
            failed = next((one for one in yes if isinstance(one, Failure)), None)
            found.append(failed or verdict([one >= HALF for one in yes]))
        return found


# --- building ---------------------------------------------------------------------------------------------------------


def build_judge(config: Mapping[str, Any]) -> RemoteJudge | YesNoJudge:
    """The judge of the config group `judge` with name "policy", on this process's own devices.

    Raises:
      UserError: judge.path is no model, or its tokenizer lacks the words that yes_no needs.
    """
    path = resolved(config["path"])
    if not path.is_dir():
        raise UserError(f"config field 'judge.path': no such folder: {path}; give a directory as model.path takes it")
    mesh = sharding.make_mesh({"replica": 1, "data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())
    policy, params, processor = models.load(path, mesh=mesh, param_dtype=config["dtype"], dtype=config["dtype"])
    if min(config["prompt_buckets"]) <= processor.image_tokens:
        raise UserError(
            f"config field 'judge.prompt_buckets' ({min(config['prompt_buckets'])}) leaves no room for text beside the "
            f"{processor.image_tokens} image tokens of the judge"
        )
    model = Model(policy, params, processor, buckets=config["prompt_buckets"], batch_size=config["batch_size"])
    name = path.resolve().name
    if config["scoring"] == "generate":
        return RemoteJudge(PolicyClient(model, name), config["max_tokens"])
    for words in (YES_NO, MARKS):
        model.word_ids(words)
    return YesNoJudge(model, name)


_END = re.compile(r"(?<=[.!?…。！？])([\"'”’»)\]]*)(\s+|\Z)|;\s+|(?<=[。！？])")


_ITEM = re.compile(r"^\s*(?:[-*•–]|\d{1,3}[.)])\s+")


_SHORT = "mr mrs ms dr prof st vs approx fig inc jr sr ft cm mm km lb oz"


_ABBREVIATIONS = frozenset(_SHORT.split())


_LAST_WORD = re.compile(r"([^\W\d_]+)\.$")


def statements_of(caption: str) -> list[str]:
    """The statements of a caption, in its order; see the module."""
    found: dict[str, str] = {}
    for line in caption.splitlines():
        for sentence in _sentences(_ITEM.sub("", line)):
            if any(character.isalnum() for character in sentence):
                found.setdefault(" ".join(sentence.casefold().split()).rstrip(".!"), sentence)
    return list(found.values())


def _sentences(line: str) -> list[str]:
    parts, start = [], 0
    for end in _END.finditer(line):
        word = _LAST_WORD.search(line, start, end.start())
        if word and (len(word[1]) == 1 or word[1].casefold() in _ABBREVIATIONS) and end.end() < len(line):
            continue
        parts.append(line[start : end.end()].strip().removesuffix(";"))
        start = end.end()
    return [*parts, line[start:].strip()]


class WithoutImage(Wrapped):
    """A policy for prompts of text alone (`PromptProcessor.without_image`): its vision tower does not run."""

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """[B, 1, D] zeros, which no token of such a prompt takes."""
        del params
        config = self.policy.decoder
        return jnp.zeros((images.shape[0], 1, config.width), jnp.dtype(config.dtype))
