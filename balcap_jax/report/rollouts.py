"""Captions of training with the advantages of their update: why the policy was moved towards one, and from another.

Of up to STEPS steps, spread over the run, two groups each: the one whose advantages are furthest apart, and the one in
the middle of that ranking.
"""

import statistics
from typing import Any

from balcap_jax.report.run import JudgedCaption, JudgedImage, Run, is_number, mapping

STEPS = 4
_HELD = 2.5  # z-scores that a bar shows at its full length
_SMALL = 0.05  # z-scores that explain nothing


def groups(run: Run) -> list[dict[str, Any]]:
    """{"step", "why", "image", "members"} of the shown groups; members from the highest advantage to the lowest."""
    found = []
    for step in _spread(run.steps):
        ranked = sorted(
            (image for image in run.rollouts(step) if _is_whole(image)), key=lambda image: -_distance(image)
        )
        if not ranked:
            continue
        count = len(ranked)
        chosen = {0: f"of {count} groups the one whose advantages are furthest apart"}
        chosen |= {(count - 1) // 2: f"the middle one of {count} groups in that"} if count > 2 else {}
        for place, why in chosen.items():
            image = ranked[place]
            members = sorted(image.captions, key=lambda caption: -(caption.advantage or 0.0))
            weights = _weights(run, members)
            found.append(
                {
                    "step": step,
                    "why": why if count > 1 else "the only group",
                    "image": image,
                    "members": [_member(caption, weights) for caption in members],
                    "weights": {name: weight for name, weight in weights.items() if weight != 1.0},
                }
            )
    return found


def _spread(steps: list[int]) -> list[int]:
    if len(steps) <= STEPS:
        return steps
    return [steps[round(k * (len(steps) - 1) / (STEPS - 1))] for k in range(STEPS)]


def _is_whole(image: JudgedImage) -> bool:
    return len(image.captions) > 1 and all(caption.advantage is not None for caption in image.captions)


def _distance(image: JudgedImage) -> float:
    return statistics.pstdev(caption.advantage for caption in image.captions)


def _weights(run: Run, members: list[JudgedCaption]) -> dict[str, float]:
    """The weight of each objective, as far as the config says so."""
    names = list(members[0].advantages)
    weights = mapping(run.config.get("rewards")).get("weights")
    if not isinstance(weights, list) or len(weights) != len(names) or not all(map(is_number, weights)):
        weights = [1.0] * len(names)
    return dict(zip(names, map(float, weights), strict=True))


def _member(caption: JudgedCaption, weights: dict[str, float]) -> dict[str, Any]:
    parts = []
    for name, value in caption.advantages.items():
        share = max(-1.0, min(1.0, value / _HELD))
        parts.append({"name": name, "value": value, "reward": caption.rewards.get(name), "share": share})
    steering = {name: weights.get(name, 1.0) * value for name, value in caption.advantages.items()}
    return {"caption": caption, "parts": parts, "why": _why(caption, steering)}


def _why(caption: JudgedCaption, steering: dict[str, float]) -> str:
    """One sentence: which objectives raised the caption's advantage, and which lowered it."""
    up = sorted(((value, name) for name, value in steering.items() if value > _SMALL), reverse=True)
    down = sorted((value, name) for name, value in steering.items() if value < -_SMALL)
    texts = []
    for word, entries in (("raised", up), ("lowered", down)):
        if entries:
            texts.append(f"{word} by " + ", ".join(f"{name} {signed(value)}" for value, name in entries))
    if not texts:
        texts.append("as the mean of its group in each objective")
    if caption.advantages and caption.in_band is False:
        texts.append("out of the length band, so a gated reward counts as 0")
    if caption.failures:
        texts.append("without a score for " + ", ".join(caption.failures))
    return "; ".join(texts)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, and none on a zero."""
    text = f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text if text.strip("+\N{MINUS SIGN}0.") else text[1:]
