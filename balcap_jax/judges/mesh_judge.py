"""A frozen vision-language model as judge, on the devices that train: for pods without a network.

`Model` holds the weights and the compiled programs: greedy answers by our own rollout, and the probability of given
words as the first word of an answer, one forward pass. `PolicyClient` answers what `chat_judge.RemoteJudge` asks, in
JSON, by the same prompts, schemas and parser. `YesNoJudge` asks statement by statement for yes or no, and parses
nothing.

Each process holds the whole judge on its own devices and judges its own captions: no process waits for another's
questions. Prompts are padded to a few lengths (`judge.prompt_buckets`), so that each is one compiled program.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax import models
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved
from balcap_jax.judges import prompts, schema
from balcap_jax.judges.chat.parsing import UnusableAnswer, parse_answer
from balcap_jax.judges.chat.types import Answer, Ask
from balcap_jax.judges.chat_judge import RemoteJudge
from balcap_jax.judges.schema import (
    ChoiceVerdict,
    Failure,
    Judge,
    LinguisticVerdict,
    PrecisionVerdict,
    PreferenceVerdict,
    Usage,
)
from balcap_jax.models.formats.safetensors import fetch
from balcap_jax.models.policy import Params, Policy, Prompt, Wrapped
from balcap_jax.models.prompting import PromptProcessor, PromptTooLong
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Sampling, compile_rollout

YES_NO = ("yes", "no")
MARKS = ("one", "two", "three", "four", "five")
LETTERS = tuple("ABCDEFGHI")
PREFERENCES = ("tie", "one", "two")  # in the order of PreferenceVerdict.winner
HALF = 0.5  # the probability from which yes is the answer
_ASPECTS = ("clarity", "fluency", "coherency")
_SPELLINGS = 6  # of a word, at most: with and without a space, and in three cases


@dataclasses.dataclass(frozen=True)
class Question:
    """A rendered prompt, and the picture that it is about, uint8 [height, width, 3], or None."""

    messages: tuple[Mapping[str, str], ...]
    image: np.ndarray | None = None


class Model:
    """The judge's weights on this process's devices, and its programs, compiled at their first use."""

    def __init__(
        self, policy: Policy, params: Params, processor: PromptProcessor, *, buckets: Sequence[int], batch_size: int
    ):
        """`buckets`: prompt lengths, ascending. `batch_size` is rounded up to a multiple of the batch's shards."""
        self._policy, self._params, self._processor = policy, params, processor
        self._buckets = tuple(buckets)
        self._mesh = mesh = sharding.mesh_of(params)
        shards = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES]))
        self._batch = -(-batch_size // shards) * shards
        self._programs: dict[Any, Callable] = {}
        self.calls = self.tokens_in = self.tokens_out = 0
        self.failures: collections.Counter[str] = collections.Counter()

    # ---- for judges -------------------------------------------------------------------------------------------------

    def answer(self, questions: Sequence[Question], max_tokens: int) -> list[str | Failure]:
        """The greedy answer to each question; one that is cut at `max_tokens` is a Failure."""

        def run(bucket: int, prompt: Prompt, policy: Policy) -> list[str | Failure]:
            keys = np.zeros(self._batch, np.uint32)
            scalar = np.zeros((), np.uint32)
            inputs = (*self._put((prompt, keys)), *self._put((scalar, scalar), replicated=True))
            key = ("answer", bucket, policy, max_tokens)
            if key not in self._programs:
                sampling = Sampling(1, max_tokens, greedy=True)
                dtype = self._policy.decoder.dtype
                self._programs[key] = compile_rollout(policy, sampling, dtype, self._params, *inputs)
            out = jax.device_get(self._programs[key](self._params, *inputs)._replace(image_embeds=None))
            self.tokens_out += int(out.lengths.sum())
            texts = self._processor.decode(out.tokens[:, 0])
            cut = out.truncated[:, 0]
            return [Failure("answer longer than judge.max_tokens") if c else t for t, c in zip(texts, cut, strict=True)]

        return self._in_batches(questions, run)

    def probabilities(self, questions: Sequence[Question], words: Sequence[str]) -> list[np.ndarray | Failure]:
        """For each question the probabilities [K] that the answer's first word is each of `words`; they add up to 1.

        A word's probability is that of all its spellings that are one token: with and without a space before it, in
        small letters and capitals. Raises UserError for a word without one.
        """
        ids = self.word_ids(words)

        def run(bucket: int, prompt: Prompt, policy: Policy) -> list[np.ndarray | Failure]:
            inputs = (self._put(prompt), self._put(ids, replicated=True))
            key = ("words", bucket, policy, ids.shape)
            if key not in self._programs:
                program = jax.jit(functools.partial(_first_words, policy, self._mesh))
                self._programs[key] = program.lower(self._params, *inputs).compile()
            log_probs = jax.device_get(self._programs[key](self._params, *inputs))
            return list(np.exp(log_probs - np.logaddexp.reduce(log_probs, axis=-1, keepdims=True)))

        return self._in_batches(questions, run)

    def word_ids(self, words: Sequence[str]) -> np.ndarray:
        """[K, spellings] int32 token ids of each word, -1 where there are fewer."""
        tokenizer = self._processor.tokenizer
        ids = np.full((len(words), _SPELLINGS), -1, np.int32)
        for row, word in enumerate(words):
            cases = dict.fromkeys([word] if word in LETTERS else [word, word.capitalize(), word.upper()])
            spellings = [f"{space}{case}" for case in cases for space in ("", " ")]
            encoded = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
            single = [tokens[0] for tokens in encoded if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id]
            single = list(dict.fromkeys(single))
            if not single:
                raise UserError(
                    f"config field 'judge.scoring' is yes_no, but the judge's tokenizer has no token for {word!r}; set "
                    "judge.scoring to generate, or choose another judge.path"
                )
            ids[row, : len(single)] = single
        return ids

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _in_batches(self, questions: Sequence[Question], run: Callable[[int, Prompt, Policy], list]) -> list:
        """One result per question: those that fit run in batches of one length, filled up with the last of them."""
        results: list[Any] = [None] * len(questions)
        queues: dict[tuple[int, bool], list[tuple[int, Prompt]]] = {}
        prepared: dict[Any, Any] = {}  # Many questions are about one picture, and their prompts share its pixels.
        for i, question in enumerate(questions):
            padded = self._pad(question, prepared)
            if isinstance(padded, Failure):
                results[i] = padded
                self.failures[padded.reason] += 1
            else:
                queues.setdefault((padded[0], question.image is not None), []).append((i, padded[1]))
        for (bucket, sees), queue in sorted(queues.items(), key=lambda item: item[0]):
            policy = self._policy if sees else WithoutImage(self._policy)
            for start in range(0, len(queue), self._batch):
                indices, rows = zip(*queue[start : start + self._batch], strict=True)
                self.tokens_in += sum(int(row.mask.sum()) for row in rows)
                rows += rows[-1:] * (self._batch - len(rows))
                prompt = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
                for i, result in zip(indices, run(bucket, prompt, policy), strict=False):
                    results[i] = result
        self.calls += len(questions)
        return results

    def _pad(self, question: Question, prepared: dict[Any, Any]) -> tuple[int, Prompt] | Failure:
        """The smallest bucket that holds the prompt, and its arrays [1, ...]; `prepared` keeps those of pictures."""
        # One text, as the models' chat templates have one place for the question.
        text = "\n\n".join(message["content"] for message in question.messages)
        try:
            images, pixels = None, question.image
            if pixels is not None:
                buffer = pixels.ctypes.data, pixels.shape, pixels.strides
                if buffer not in prepared:
                    prepared[buffer] = self._processor.prepare_images([pixels])
                images = prepared[buffer]
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

    def _put(self, tree: Any, *, replicated: bool = False) -> Any:
        """Puts arrays onto the devices by an explicit transfer: split along the batch, or `replicated`."""
        if self._mesh is None:
            return jax.device_put(tree)
        return jax.device_put(tree, (sharding.replicated if replicated else sharding.batch_sharding)(self._mesh))


def _first_words(policy: Policy, mesh: Any, params: Params, prompt: Prompt, ids: jax.Array) -> jax.Array:
    """Log-probabilities [B, K] of words as the first of the answer; `ids` [K, n] are their spellings, -1 = none."""
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
    """Asks the model on the mesh as a `ChatClient` asks endpoints; an answer is parsed and checked as any other."""

    def __init__(self, model: Model, name: str):
        self._model, self.model = model, name

    def ask(self, asks: Sequence[Ask]) -> list[Answer | Failure]:
        """One Answer or Failure per question. An unusable answer is not asked for again: it would be the same."""
        by_length: dict[int, list[int]] = {}
        for i, ask in enumerate(asks):
            by_length.setdefault(ask.max_tokens, []).append(i)
        answers: list[Any] = [None] * len(asks)
        for length, indices in by_length.items():
            questions = [Question(asks[i].messages, asks[i].image) for i in indices]
            for i, text in zip(indices, self._model.answer(questions, length), strict=True):
                answers[i] = text if isinstance(text, Failure) else self._parsed(text, asks[i])
        return answers

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


class YesNoJudge(Judge):
    """Judges by probabilities: of yes and no, of marks, of letters; nothing is parsed.

    The statements of a caption are its sentences (`statements_of`), coarser than assertions that a model would write.
    A statement holds, a unit is covered and a criterion met where yes is at least as likely as no. Each mark is the
    mean of 1 to 5 under their probabilities, and so no whole number.
    """

    def __init__(self, model: Model, name: str):
        self._model = model
        names = {
            "precision": ("verified", "pointable"),
            "recall": ("covered",),
            "linguistic": ("mark",),
            "choice": ("letter",),
            "rubric": ("passed",),
            "preference": ("better",),
        }
        texts = {method: ", ".join(map(prompts.name_of, of_method)) for method, of_method in names.items()}
        self.about: Mapping[str, str] = {"model": name} | texts

    def precision(self, questions: Sequence[schema.PrecisionQuestion]) -> list[PrecisionVerdict | Failure]:
        """Raises UserError for a question without a picture."""
        if any(question.image is None for question in questions):
            raise UserError("the judge of precision looks at pictures, which this data set does not have")
        statements = [(i, text) for i, q in enumerate(questions) for text in statements_of(q.caption)]

        def ask(prompt: str, places: Sequence[tuple[int, str]]) -> list[float | Failure]:
            rendered = [prompts.render(prompt, caption=questions[i].caption, statement=text) for i, text in places]
            return self._yes([Question(m, questions[i].image) for m, (i, _) in zip(rendered, places, strict=True)])

        verified = ask("verified", statements)
        examined = [place for place in statements if questions[place[0]].pointability]
        pointable = dict(zip(examined, ask("pointable", examined), strict=True))
        assertions: list[list[schema.Assertion | Failure]] = [[] for _ in questions]
        for place, yes in zip(statements, verified, strict=True):
            i, text = place
            points = pointable.get(place, 1.0)
            if failure := _failure_in((yes, points)):
                assertions[i].append(failure)
                continue
            why = f"yes {yes:.2f}, pointable {points:.2f}"
            flags = {"verified": yes >= HALF, "pointable": points >= HALF}
            assertions[i].append(schema.Assertion(text=text, why=why, **flags))
        return [_failure_in(reversed(each)) or PrecisionVerdict(assertions=each) for each in assertions]

    def recall(self, questions: Sequence[schema.RecallQuestion]) -> list[schema.RecallVerdict | Failure]:
        flags = self._flags("covered", "unit", [(question.caption, question.units) for question in questions])
        return [each if isinstance(each, Failure) else schema.RecallVerdict(covered=each) for each in flags]

    def rubric(self, questions: Sequence[schema.RubricQuestion]) -> list[schema.RubricVerdict | Failure]:
        flags = self._flags("passed", "criterion", [(question.caption, question.criteria) for question in questions])
        return [each if isinstance(each, Failure) else schema.RubricVerdict(passed=each) for each in flags]

    def linguistic(self, questions: Sequence[schema.LinguisticQuestion]) -> list[LinguisticVerdict | Failure]:
        rendered = [prompts.render("mark", caption=q.caption, aspect=aspect) for q in questions for aspect in _ASPECTS]
        probabilities = iter(self._model.probabilities([Question(messages) for messages in rendered], MARKS))
        verdicts: list[LinguisticVerdict | Failure] = []
        for question in questions:
            of_aspects = [next(probabilities) for _ in _ASPECTS]
            if not question.caption.strip():
                verdicts.append(LinguisticVerdict(clarity=1, fluency=1, coherency=1))
            elif failure := _failure_in(of_aspects):
                verdicts.append(failure)
            else:
                means = [float(np.clip(p @ np.arange(1, len(MARKS) + 1), 1.0, len(MARKS))) for p in of_aspects]
                verdicts.append(LinguisticVerdict(**dict(zip(_ASPECTS, means, strict=True))))
        return verdicts

    def choice(self, questions: Sequence[schema.ChoiceQuestion]) -> list[ChoiceVerdict | Failure]:
        """The likeliest of the options' letters."""
        rendered = [
            prompts.render("letter", caption=q.caption, question=q.question, options=[list(o) for o in q.options])
            for q in questions
        ]
        probabilities = self._model.probabilities([Question(messages) for messages in rendered], LETTERS)

        def likeliest(question: schema.ChoiceQuestion, p: np.ndarray) -> ChoiceVerdict:
            letters = [letter for letter, _ in question.options]
            return ChoiceVerdict(answer=max(letters, key=lambda letter: p[LETTERS.index(letter)]))

        pairs = zip(questions, probabilities, strict=True)
        return [p if isinstance(p, Failure) else likeliest(question, p) for question, p in pairs]

    def preference(self, questions: Sequence[schema.PreferenceQuestion]) -> list[PreferenceVerdict | Failure]:
        """The likeliest of tie, one and two. Raises UserError for a question without a picture."""
        if any(question.image is None for question in questions):
            raise UserError("the judge of preference looks at pictures, which this data set does not have")
        known = [schema.preferred_unseen(question) for question in questions]
        asked = [question for question, verdict in zip(questions, known, strict=True) if verdict is None]
        rendered = [Question(prompts.render("better", first=q.first, second=q.second), q.image) for q in asked]
        answers = iter(self._model.probabilities(rendered, PREFERENCES) if rendered else [])
        verdicts: list[PreferenceVerdict | Failure] = []
        for verdict in known:
            answer = verdict or next(answers)
            is_known = isinstance(answer, PreferenceVerdict | Failure)
            verdicts.append(answer if is_known else PreferenceVerdict(winner=int(np.argmax(answer))))
        return verdicts

    def usage(self) -> Usage:
        return _usage(self._model)

    def _yes(self, questions: Sequence[Question]) -> list[float | Failure]:
        """The probability of yes beside no."""
        probabilities = self._model.probabilities(questions, YES_NO)
        return [p if isinstance(p, Failure) else float(p[0]) for p in probabilities]

    def _flags(
        self, prompt: str, variable: str, lists: Sequence[tuple[str, Sequence[str]]]
    ) -> list[list[bool] | Failure]:
        """Whether yes holds for each text of (caption, texts); an empty caption covers nothing, and is not asked about.

        `variable` is the prompt's name of a text.
        """
        pairs = [(caption, text) for caption, texts in lists if caption.strip() for text in texts]
        rendered = [prompts.render(prompt, caption=caption, **{variable: text}) for caption, text in pairs]
        answers = iter(self._yes([Question(messages) for messages in rendered]))
        flags: list[list[bool] | Failure] = []
        for caption, texts in lists:
            yes = [next(answers) if caption.strip() else 0.0 for _ in texts]
            flags.append(_failure_in(yes) or [p >= HALF for p in yes])
        return flags


def _failure_in(answers: Iterable[Any]) -> Failure | None:
    """The first Failure among answers."""
    return next((answer for answer in answers if isinstance(answer, Failure)), None)


# --- building ---------------------------------------------------------------------------------------------------------


def build_judge(config: Mapping[str, Any], asks: Collection[str] = ()) -> RemoteJudge | YesNoJudge:
    """The judge of the config group `judge` with name "policy", on this process's own devices.

    Raises:
      UserError: judge.path is no model, or its tokenizer lacks the words that yes_no needs.
    """
    path = fetch(resolved(config["path"]))
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
    for words in (YES_NO, MARKS, *([PREFERENCES] if "preference" in asks else [])):
        model.word_ids(words)
    return YesNoJudge(model, name)


# --- statements -------------------------------------------------------------------------------------------------------

_END = re.compile(r"(?<=[.!?…。！？])([\"'”’»)\]]*)(\s+|\Z)|;\s+|(?<=[。！？])")
_ITEM = re.compile(r"^\s*(?:[-*•–]|\d{1,3}[.)])\s+")
_SHORT = "mr mrs ms dr prof st vs approx fig inc jr sr ft cm mm km lb oz"
_ABBREVIATIONS = frozenset(_SHORT.split())
_LAST_WORD = re.compile(r"([^\W\d_]+)\.$")


def statements_of(caption: str) -> list[str]:
    """The statements of a caption in its order: its sentences, for a judge that does not split it itself.

    A sentence ends
    - at a line's end,
    - at a semicolon that white space follows,
    - at . ! ? or their like, closing quotes and brackets after them included, where white space follows; but not at
      the full stop of an abbreviation (`_ABBREVIATIONS`, or a single letter: "e.g.", "J. Smith").
    The mark of a list item ("- ", "* ", "3. ", "3) ") is left out, and so is a part without a letter or digit. A
    repeated sentence counts once, whatever its case and its full stop.
    """
    statements: dict[str, str] = {}
    for line in caption.splitlines():
        for sentence in _sentences(_ITEM.sub("", line)):
            if any(character.isalnum() for character in sentence):
                statements.setdefault(" ".join(sentence.casefold().split()).rstrip(".!"), sentence)
    return list(statements.values())


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
