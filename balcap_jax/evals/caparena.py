"""CapArena-Auto: pairs of captions, one of the model's and one of a fixed opponent's, compared by a judge (3.3).

Source: njucckevin/CapArena, commit c251cdd, caparena_auto_scores.py.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_json_or_jsonl
from balcap_jax.evals.engine import Item, Metric, mean_of_known, pairs, ratio
from balcap_jax.evals.inputs import Texts, read_document, read_picture
from balcap_jax.judges import prompts
from balcap_jax.judges.chat.types import Ask
from balcap_jax.judges.schema import Failure

ARENA = "arena.v1"
# Ours, and the exact strings that the published script counts, those with or without a full stop; it skips all else.
_VERDICTS = {"caption 1": 1, "caption 2": 2, "tie": 0}
_PUBLISHED = {"Caption 1 is better": 1, "Caption 2 is better": 2, "Tie": 0}
_REMEDY = '--opponents takes {picture: {"captions": {"human": text, name: text, ...}, "ref_model": name}}'


class _Winner(pydantic.BaseModel):
    why: str
    winner: Literal["caption 1", "caption 2", "tie"]


class CapArena(Metric):
    """Items are pictures; their data hold "other" (the opponent's caption), "reference", "path" and "first" (ours is
    shown first). Their category is the opponent.

    A judgement is {"winner": "caption 1" | "caption 2" | "tie"}, or the text of the published result rows. A win is +1,
    a loss -1. Each opponent's sum is scaled to [-100, 100] over its judged pictures, those whose verdict is skipped
    too; the score is the mean over opponents. As on the board, a model that is an opponent itself has 0 against itself
    in that mean.
    """

    name = "caparena"
    prompts = (ARENA,)
    sees = True
    max_tokens = 1500

    def __init__(self, max_tokens: int | None = None, model: str = ""):
        """`model`: a name that the opponents' file knows; its own pictures are skipped."""
        super().__init__(max_tokens)
        self.model = model
        self._opponents: list[str] = []

    def items(self, captions: Mapping[str, str], opponents: Path, folder: Path) -> list[Item]:
        entries = read_document(opponents, _REMEDY)
        if not isinstance(entries, dict):
            raise UserError(f"{opponents} is no JSON object; {_REMEDY}")
        items, rivals, texts = [], set(), Texts.of(captions)
        for name, entry in entries.items():
            entry = entry if isinstance(entry, dict) else {}
            theirs, rival = entry.get("captions"), entry.get("ref_model")
            if not isinstance(theirs, dict) or not isinstance(rival, str) or not isinstance(theirs.get(rival), str):
                raise UserError(f"{opponents}: {name!r} has no caption of its opponent; {_REMEDY}")
            rivals.add(rival)
            if rival == self.model:
                continue
            data = {"other": theirs[rival], "reference": str(theirs.get("human", ""))}
            data |= {"path": folder / name, "first": shown_first(name)}
            items.append(Item(name, texts.find(name), data, rival))
        self._opponents = sorted(rivals)
        return items

    def state(self) -> dict[str, Any]:
        return {"opponents": self._opponents, "model": self.model}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._opponents, self.model = [str(name) for name in state["opponents"]], str(state["model"])

    def question(self, item: Item) -> Ask | Failure:
        picture = read_picture(item.data["path"], item.id)
        if isinstance(picture, Failure):
            return picture
        pair = (item.caption, item.data["other"])
        first, second = pair if item.data["first"] else pair[::-1]
        messages = prompts.render(ARENA, first=first, second=second, reference=item.data["reference"])
        return Ask(ARENA, messages, _Winner, self.max_tokens, picture)

    def judgement(self, item: Item, answer: _Winner) -> dict[str, Any]:
        return answer.model_dump()

    def parts(self, item: Item, judgement: Mapping[str, Any]) -> Sequence[float]:
        """(sum, 1) of each opponent, then skipped ones, texts between spaces, as the board counts words, and 1.

        A verdict that the published script skips is no point for anybody, and is counted.
        """
        winner = verdict_of(judgement["winner"])
        won = 0 if not winner else 1 if (winner == 1) == item.data["first"] else -1
        words = float(len((item.caption or "").split(" ")))
        return (*pairs(self._opponents, item.category, won), float(winner is None), words, 1.0)

    def score(self, sums: np.ndarray) -> np.ndarray:
        return mean_of_known([self._against(sums, k) for k in range(len(self._opponents))])

    def of_category(self, sums: np.ndarray) -> float:
        """Against the one opponent of these items, without the model's own 0."""
        others = [k for k, name in enumerate(self._opponents) if name != self.model]
        return float(mean_of_known([self._against(sums, k) for k in others]))

    def of_item(self, parts: Sequence[float]) -> float:
        """100 for a win, -100 for a loss, whichever opponent it was."""
        return 100.0 * sum(parts[: 2 * len(self._opponents) : 2])

    def figures(self, sums: np.ndarray) -> dict[str, float]:
        against = {f"against/{name}": float(self._against(sums, k)) for k, name in enumerate(self._opponents)}
        return against | {"skipped": float(sums[-3]), "board_words": float(ratio(sums[-2], sums[-1], 1.0))}

    def _against(self, sums: np.ndarray, k: int) -> np.ndarray:
        sums = np.asarray(sums, float)
        if self._opponents[k] == self.model:
            return np.zeros(sums.shape[:-1])
        # The picture of a skipped verdict counts below, as published.
        return ratio(100.0 * sums[..., 2 * k], sums[..., 2 * k + 1], 1.0)


def shown_first(name: str) -> bool:
    """Whether the model's caption is shown first: random, but always the same for a picture."""
    return hashlib.sha256(name.encode(errors="replace")).digest()[0] % 2 == 0


def verdict_of(text: str) -> int | None:
    """1 or 2 for the better caption, 0 for a tie, None for what the published script skips."""
    return _VERDICTS.get(text, _PUBLISHED.get(text.removesuffix(".")))


def read_results(path: Path, model: str) -> dict[str, dict[str, Any]]:
    """Judgements by picture from result rows of the published script ({"img", "source1", "source2", "judge", ...}).

    The file is a JSON list or JSONL. A row without a verdict is a skipped one, as published. `model`: the evaluated
    one's name in them; "" = the one that is not the row's "ref_model".

    Raises:
      UserError: a row of another form, or that is not about the model.
    """
    judgements = {}
    remedy = "--judgements takes items.jsonl, or result rows of CapArena"
    for where, row in read_json_or_jsonl(path, remedy):
        try:
            text, sources, picture = row.get("judge") or "", [row["source1"], row["source2"]], row["img"]
            winner = verdict_of(text)
            if not all(isinstance(one, str) for one in (picture, *sources, row.get("ref_model", ""))):
                raise TypeError
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where} is no result row; {remedy}") from error
        name = model or next((source for source in sources if source != row.get("ref_model")), "")
        if sources.count(name) != 1:
            raise UserError(f"{where} compares {sources[0]!r} with {sources[1]!r}; name the evaluated one with --name")
        if picture in judgements:
            raise UserError(f"{where}: {picture!r} has a verdict already; keep one of them")
        if winner:
            ours_won = sources[winner - 1] == name
            # In the order in which we would have shown them.
            winner = 1 if shown_first(picture) == ours_won else 2
        judgements[picture] = {"winner": text if winner is None else ("tie", "caption 1", "caption 2")[winner]}
    return judgements
