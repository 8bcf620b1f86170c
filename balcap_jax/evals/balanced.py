"""b-CapScore of captions: precision, recall and language by a judge, and their harmonic mean (method, section 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_jsonl
from balcap_jax.data import photos
from balcap_jax.evals.engine import Item, Metric, ratio
from balcap_jax.evals.inputs import Texts, read_picture
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat_judge import RemoteJudge
from balcap_jax.judges.schema import Failure
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import Samples
from balcap_jax.rewards.bcapscore import OBJECTIVES, harmonic_mean

_REMEDY = '--references takes lines {"image", "caption" (the reference), "reference_units"}, as `recaption` writes them'


class BCapScore(Metric):
    """Items are pictures, with data (path, reference, its units).

    A judgement is {"precision", "recall", "linguistic"} in [0, 1], with the judge's whole answer in "detail".
    """

    name = "bcapscore"
    prompts = tuple(prompts.name_of(name) for name in OBJECTIVES)
    sees = True

    def items(self, captions: Mapping[str, str], references: Path, folder: Path | None) -> list[Item]:
        items, texts = [], Texts.of(captions)
        for where, line in read_jsonl(references, _REMEDY):
            record = photos.read_record(line, where)
            if not record["reference_units"]:
                raise UserError(f"{where} has no reference_units; `recaption --write=units` writes them")
            names = (str(line.get("id", record["image"])), record["image"])
            path = (folder or Path(references).parent) / record["image"]
            items.append(Item(names[0], texts.find(*names), (path, record["captions"][0], record["reference_units"])))
        return items

    def judge(self, client: ChatClient, items: Sequence[Item]) -> list[Mapping[str, Any] | Failure]:
        reward = BalCapReward(RemoteJudge(client, self.max_tokens))
        pictures = {item.id: read_picture(item.data[0], item.data[0].name) for item in items}
        judgements: dict[str, Any] = {name: one for name, one in pictures.items() if isinstance(one, Failure)}
        readable = [item for item in items if item.id not in judgements]
        if readable:
            samples = Samples(
                example_ids=[item.id for item in readable],
                captions=[[item.caption] for item in readable],
                references=[item.data[1] for item in readable],
                reference_units=[item.data[2] for item in readable],
                images=[pictures[item.id] for item in readable],
                metadata=[{}] * len(readable),
            )
            scores = reward(samples)
            for b, item in enumerate(readable):
                detail = scores.detail[b][0]
                if scores.valid[b].all():
                    rewards = dict(zip(OBJECTIVES, map(float, scores.rewards[b, 0]), strict=True))
                    judgements[item.id] = rewards | {"detail": detail}
                else:
                    judgements[item.id] = Failure("; ".join(f"{k}: {why}" for k, why in detail["failures"].items()))
        return [judgements[item.id] for item in items]

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float]:
        scores = [float(judgement[name]) for name in OBJECTIVES]
        if not all(0 <= score <= 1 for score in scores):
            raise ValueError(f"scores beyond [0, 1]: {scores}")
        return (float(harmonic_mean(*scores)), *scores, 1.0)

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        means = {name: float(ratio(sums[k], sums[-1])) for k, name in enumerate(OBJECTIVES, start=1)}
        corpus = 100.0 * float(harmonic_mean(*(value / 100.0 for value in means.values())))
        return means | {"corpus_b_capscore": corpus}
