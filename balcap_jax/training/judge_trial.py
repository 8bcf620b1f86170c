"""Asks a run's judge a few of its questions and times them: how long a step's judging will take, and what hides it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from balcap_jax import data, judges, rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.data.input import examples
from balcap_jax.data.words import count_words
from balcap_jax.judges import cost, prompts
from balcap_jax.judges.budget import MILLION
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat_judge import RemoteJudge, make_client
from balcap_jax.judges.schema import Usage
from balcap_jax.rewards.base import Samples
from balcap_jax.training.evaluation import batches
from balcap_jax.training.job import to_samples
from balcap_jax.training.programs import model_fields
from balcap_jax.training.workdir import readable

QUESTIONS = 96  # about as many are asked at most
_GROUP = 4  # captions of a picture


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a few questions took: {method of the judge: seconds of an answer}, with `at_once` under way at `servers`."""

    usage: Usage
    seconds: Mapping[str, float]
    at_once: int
    servers: int

    @property
    def asked(self) -> int:
        """Questions that were sent."""
        return self.usage.calls - self.usage.cached


class Unanswered(UserError):
    """All questions by one `method` of the judge failed; `usage` has what became of all questions."""

    def __init__(self, text: str, usage: Usage, method: str):
        super().__init__(text)
        self.usage, self.method = usage, method


def trial(config: ConfigDict, rollout: float = 0.0) -> str:
    """The table of `cost.sizing`, from questions about pictures of the data set, whose references stand for captions.

    rollout: seconds of a step's rollout, 0 = not known. Nothing is taken from the cache of answers, or kept there.

    Raises:
      UserError: the data cannot be read, or the judge is down or answers nothing.
    """
    count = pictures_of(config)
    model, _ = model_fields(config)
    splits = data.load(config.data, model.get("image_size", config.model.image_size), tokenizer=False)
    with readable(config.data):
        samples = samples_of(examples(splits.test, count))
    found, judge = ask(config, samples, splits.fields), config.judge
    usage = found.usage
    price = (usage.tokens_in * judge.price_in + usage.tokens_out * judge.price_out) / MILLION
    words = np.mean([count_words(text) for group in samples.captions for text in group])
    head = (
        f"asked {found.asked} questions about {samples.shape[0]} pictures and captions of {words:.0f} words, "
        f"{found.at_once} at once: {usage.tokens_in:,} tokens in, {usage.tokens_out:,} out"
        + (f", cost {price:.4f}" if price else "")
    )
    if usage.failures:
        head += f"; {usage.failures.total()} failed"
    return f"{head}\n{cost.sizing(config, found.seconds, found.at_once, found.servers, rollout)}"


def ask(config: ConfigDict, samples: Samples, fields: Collection[str]) -> Trial:
    """Asks all that the reward asks about `samples`, of a data set with `fields`; no answer is cached.

    Raises:
      UserError: the judge is down; Unanswered: it answers no question of one kind.
    """
    asks = rewards.resolve(config.rewards.name).asks
    judge = config.judge.copy_and_resolve_references()
    with judge.unlocked():
        judge.cache_dir = ""
    client = make_client(judge, config.seed)
    try:
        asked_judge = RemoteJudge(client, judge.max_tokens)
        rewards.check(config.rewards, asked_judge, fields, config.data.name)
        client.connect(sees=judges.sees(asks))
        rewards.build(config.rewards, asked_judge, config.seed)(samples)
        return taken(client, asks)
    finally:
        client.close()


def taken(client: ChatClient, asks: Collection[str]) -> Trial:
    """What all questions of a client have taken. Raises Unanswered where none by one of the methods `asks` is answered.

    As many are reckoned to have been under way at once as the client allows.
    """
    usage, seconds = client.usage(), client.seconds
    named = {method: seconds[prompts.name_of(method)] for method in asks if prompts.name_of(method) in seconds}
    asked = usage.calls - usage.cached
    if len(named) < len(asks):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in usage.failures.most_common(2))
        method = next(method for method in asks if method not in named)
        raise Unanswered(f"of {asked} questions {usage.failures.total()} were not answered ({reasons})", usage, method)
    return Trial(usage, named, min(client.settings.concurrency, asked), len(client.settings.endpoints))


def pictures_of(config: ConfigDict) -> int:
    """How many pictures make about QUESTIONS questions of the reward. Raises UserError where it asks nothing."""
    asks = rewards.resolve(config.rewards.name).asks
    if not asks:
        raise UserError(f"the reward {config.rewards.name!r} asks its judge nothing")
    each = sum(cost.calls_of_step(config, method) for method in asks) / (
        config.stages.rl.batch_size * config.rollout.group_size
    )
    return max(int(QUESTIONS / max(each, 1) / _GROUP), 1)


def samples_of(shown: Sequence[Mapping[str, Any]]) -> Samples:
    """The examples `shown` with `_GROUP` different captions each, made of their references."""
    ((batch, real),) = batches(shown, len(shown))
    captions = [[f"View {g + 1}. {text}" for g in range(_GROUP)] for text in batch["reference"][:real]]
    tokens = np.array([list(map(count_words, group)) for group in captions])
    return to_samples({name: column[:real] for name, column in batch.items()}, captions, tokens)
