"""The four primary claims of the studies, stated with their tests before the runs, and what the seeds say to them.

A claim holds where every part of it does (intersection-union: its p value is the largest of its parts'). A part is a
paired t test over the study's seeds, of greedy captions: others do not count, and before the last of them nothing is
said. Over the claims p values are adjusted by Holm's rule.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from balcap_jax.ablate.statistics import ALPHA, POWER, Paired, detectable, holm, paired, seeds_needed
from balcap_jax.ablate.studies import (
    CHECKED_SCALES,
    GATE,
    PILOT_EFFECT,
    PILOT_SEEDS,
    POINTABILITY,
    RIVALS,
    SPREAD,
    Study,
    scaled,
)
from balcap_jax.ablate.variants import FULL

Values = Mapping[str, Mapping[int, Mapping[str, float]]]  # arm -> seed -> metric -> points


@dataclasses.dataclass(frozen=True)
class Part:
    """That `metric` of `arms` is above that of `against` by more than `-margin`, in one study.

    Of several arms on a side each seed has its worst case, the lowest of them. The lowest of several noisy runs is low
    by chance alone: both sides of a fair comparison have as many.
    """

    study: Study
    metric: str
    against: tuple[str, ...]
    arms: tuple[str, ...] = (FULL,)
    margin: float = 0.0

    def differences(self, values: Values, seeds: Sequence[int]) -> dict[int, float]:
        """{seed: lowest of arms - lowest of against} of those `seeds` that all of them have."""
        shared = [
            seed
            for seed in seeds
            if all(self.metric in values.get(arm, {}).get(seed, {}) for arm in (*self.arms, *self.against))
        ]

        def lowest(arms: Sequence[str], seed: int) -> float:
            return min(values[arm][seed][self.metric] for arm in arms)

        return {seed: lowest(self.arms, seed) - lowest(self.against, seed) for seed in shared}

    def text(self) -> str:
        """What is compared, for tables."""
        sides = (
            arms[0] if len(arms) == 1 else f"the lowest of {', '.join(arms)}" for arms in (self.arms, self.against)
        )
        return " - ".join(sides) + (f", margin {self.margin:g}" if self.margin else "")


@dataclasses.dataclass(frozen=True)
class Claim:
    name: str
    statement: str
    parts: tuple[Part, ...]


PRIMARY = (
    Claim(
        "spread",
        "c-GDPO's worst case over the scales is above GRPO's in b-CapScore",
        (
            Part(
                SPREAD,
                "b_capscore",
                *(tuple(scaled(name, scale) for scale in CHECKED_SCALES) for name in ("grpo", FULL)),
            ),
        ),
    ),
    Claim(
        "pointability",
        "With pointability the arena score is higher where captions pad",
        (Part(POINTABILITY, "arena", ("no_pointability",)),),
    ),
    Claim(
        "gate",
        "The gate raises the share in band, and lowers DCScore and CaptionQA by at most 1 point",
        (
            Part(GATE, "in_band", ("no_gate",)),
            Part(GATE, "dcscore", ("no_gate",), margin=1.0),
            Part(GATE, "captionqa", ("no_gate",), margin=1.0),
        ),
    ),
    Claim(
        "rivals",
        "BalCap is above every rival in the lowest of its three objectives",
        tuple(Part(RIVALS, "lowest", (arm,)) for arm in RIVALS.arms if arm != FULL),
    ),
)


PILOT_RIVALS = ("caprl", "arena")
"""Of the rivals a pilot has a utility reward and an arena reward."""


def piloted(study: Study) -> Study:
    """The study with the arms alone that a primary claim compares; the whole study where none does.

    Of the rivals they are PILOT_RIVALS, for time.
    """
    parts = [part for claim in PRIMARY for part in claim.parts if part.study.name == study.name]
    if study.name == RIVALS.name:
        parts = [part for part in parts if {*part.against} <= {*PILOT_RIVALS}]
    compared = {arm for part in parts for arm in (*part.arms, *part.against)}
    arms = {name: arm for name, arm in study.arms.items() if name in compared}
    return dataclasses.replace(study, arms=arms or study.arms)


@dataclasses.dataclass(frozen=True)
class Assessment:
    """A claim beside its seeds. parts: what was compared, one each; None where no seed has both.

    p: the largest of the parts' p values; None where a part has none. adjusted: by Holm. verdict: "yes", "no" (a part
    goes the other way, by the same rule), "not told apart", or why nothing is said: "2 of 5 seeds", "no spread".
    """

    claim: Claim
    parts: tuple[Paired | None, ...]
    p: float | None
    adjusted: float | None
    verdict: str


def assess(values: Mapping[str, Values], claims: Sequence[Claim] = PRIMARY) -> list[Assessment]:
    """The claims beside `values`, {study: values of its arms}. Holm's rule counts all claims, with or without seeds."""
    parts = [tuple(_compare(part, values, part.study.seeds) for part in claim.parts) for claim in claims]
    supports = [_largest(claim, found) for claim, found in zip(claims, parts, strict=True)]
    opposes = [_against(claim, found) for claim, found in zip(claims, parts, strict=True)]
    adjusted, opposed = (holm([1.0 if p is None else p for p in column]) for column in (supports, opposes))
    result = []
    for claim, found, p, up, down in zip(claims, parts, supports, adjusted, opposed, strict=True):
        seeds, planned = _fewest(claim, found)
        if seeds < planned:
            verdict = f"{seeds} of {planned} seeds"
        elif p is None:
            verdict = "no spread"
        else:
            verdict = "yes" if up <= ALPHA else "no" if down <= ALPHA else "not told apart"
        result.append(Assessment(claim, found, p, None if p is None else up, verdict))
    return result


def _compare(part: Part, values: Mapping[str, Values], seeds: Sequence[int]) -> Paired | None:
    differences = part.differences(values.get(part.study.name, {}), seeds)
    return paired(list(differences.values())) if differences else None


def _fewest(claim: Claim, found: Sequence[Paired | None]) -> tuple[int, int]:
    """(seeds, planned seeds) of the part of which most are missing."""
    counts = [(one.n if one else 0, len(part.study.seeds)) for part, one in zip(claim.parts, found, strict=True)]
    return min(counts, key=lambda count: count[0] - count[1])


def _largest(claim: Claim, found: Sequence[Paired | None]) -> float | None:
    """The p value that all parts hold; None where one is not known."""
    each = [one.p_above(-part.margin) if one else None for part, one in zip(claim.parts, found, strict=True)]
    return None if None in each else max(each)


def _against(claim: Claim, found: Sequence[Paired | None]) -> float | None:
    """The p value that one part at least goes the other way, for as many parts as were looked at (Bonferroni)."""
    each = [one.p_below(-part.margin) if one else None for part, one in zip(claim.parts, found, strict=True)]
    return None if None in each else min(1.0, len(each) * min(each))


def planned_seeds(values: Mapping[str, Values], claims: Sequence[Claim] = PRIMARY) -> list[dict[str, Any]]:
    """What a pilot's spread asks for: {part, sd, n, seeds at ALPHA, seeds at ALPHA / number of claims} of each part.

    Seeds are for POWER at an effect of PILOT_EFFECT points. The second level is the first that Holm's rule may ask for.
    """
    found = []
    for claim in claims:
        for part in claim.parts:
            one = _compare(part, values, PILOT_SEEDS)
            if one is None or one.sd is None:
                continue
            levels = [ALPHA, ALPHA / len(claims)]
            seeds = [seeds_needed(one.sd, PILOT_EFFECT, POWER, level) for level in levels]
            seen = detectable(one.sd, len(part.study.seeds), POWER, ALPHA)
            found.append({"part": part, "mean": one.mean, "sd": one.sd, "n": one.n, "seeds": seeds, "detectable": seen})
    return found
