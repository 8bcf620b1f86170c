"""The studies on the embedded world: what each asks, what it trains, and on which seeds.

Every run of every study is the recipe RECIPE with the fields FIELDS; an arm adds variants of the recipe and fields. A
run that two studies name is made once: arms of one world and one name are one run (`Study.label`).
"""

import dataclasses
from collections.abc import Mapping

from balcap_jax.ablate.variants import FULL, LEAVE_ONE_OUTS, VARIANTS

RECIPE = "scenes"
FIELDS: Mapping[str, str] = {"stages.rl.steps": "60", "log.eval_images": "128"}
# They change no result: nobody looks into a run's directory before it is deleted.
QUIET: Mapping[str, str] = {"log.tensorboard": "False", "log.samples_every": "0"}
PARTS = 8
"""Micro-batches of an update: what is computed at once stays in a core's cache. On CPUs the same gradient takes a
quarter less time (docs/performance.md)."""
SEEDS = (0, 1, 2, 3, 4)
PILOT_SEEDS = (100, 101, 102)
"""From the first of these on, seeds are of pilots and count in no result."""
PILOT_EFFECT = 3.0  # points that a study must be able to see


@dataclasses.dataclass(frozen=True)
class World:
    """What the base of a run has learnt: `fields` are those of the captioner that the stage sft imitates."""

    name: str
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)


HABITS = World("habits")
MOODS = World("moods", {"data.captioner": "moods"})
PADDING = World("padding", {"data.captioner": "padding"})


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one run of a study trains, beside the recipe.

    about: what differs, for readers. recipe: variants of the recipe, comma-separated. fields: overrides.
    inverse_std_of: the arm of the same world whose rewards' spread gives the weights: each is 1 over the mean standard
    deviation within groups of that arm's first WARM_UP batches, scaled to a mean of 1.
    """

    about: str
    recipe: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inverse_std_of: str = ""


WARM_UP = 20  # batches


@dataclasses.dataclass(frozen=True)
class Study:
    """One question. `metric` is the headline; `against` the arm that the others are compared with."""

    name: str
    question: str
    world: World
    arms: Mapping[str, Arm]
    metric: str = "b_capscore"
    seeds: tuple[int, ...] = SEEDS
    against: str = FULL

    def label(self, arm: str) -> str:
        """The name of the arm's runs, the same in all studies that have them."""
        return f"{self.world.name}-{arm}"


_FULL = Arm(VARIANTS[FULL].about)


def _variant(name: str) -> Arm:
    """A variant of the recipe by its own name."""
    return Arm(VARIANTS[name].about, name)


# ---- (a) spread ------------------------------------------------------------------------------------------------------

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Factors on the linguistic score, as of a judge whose marks have another range, or of a reward that saturates."""


def scaled(name: str, scale: float) -> str:
    """The arm of an estimator at one scale."""
    return name if scale == 1 else f"{name}_s{scale:g}"


def _scaled(name: str, scale: float) -> Arm:
    recipe = "" if name == FULL else name
    if scale == 1:
        return Arm(VARIANTS[name].about, recipe)
    return Arm(f"{name}, the linguistic score times {scale:g}", recipe, {"rewards.scales": f"1,1,{scale:g}"})


CHECKED_SCALES = (0.1, 1.0, 10.0)
"""Those of c-GDPO, in which a scale cancels but for the epsilon beside the standard deviation. Worst cases are taken
over them for GRPO too: the lowest of five noisy runs is low by chance alone."""

SPREAD = Study(
    "spread",
    "Does c-GDPO pay where one objective's scores are on another scale?",
    HABITS,
    {scaled(FULL, scale): _scaled(FULL, scale) for scale in CHECKED_SCALES}
    | {scaled("grpo", scale): _scaled("grpo", scale) for scale in SCALES}
    | {
        "grpo_fixed": Arm(
            f"GRPO with weights fixed to 1/std of the first {WARM_UP} batches; the scale cancels by construction",
            "grpo",
            inverse_std_of="grpo",
        )
    },
)

# ---- (b) moods, (c) pointability, (d) gate ---------------------------------------------------------------------------

_WITHOUT = ("no_precision", "no_recall", "no_linguistic")
MOODS_STUDY = Study(
    "moods",
    "Which rule joins objectives that are at odds?",
    MOODS,
    {FULL: _FULL} | {name: _variant(name) for name in ("grpo", "soft_min", "conflict", *_WITHOUT)},
)
POINTABILITY = Study(
    "pointability",
    "Does asking whether an assertion is pointable unlearn empty remarks?",
    PADDING,
    {FULL: _FULL, "no_pointability": _variant("no_pointability")},
    metric="arena",
)

# A judge that accepts the more the longer the caption is makes precision and recall pay for length, as questions and
# lists of units do. With the exact judge length did not run away, not even with recall at 12 times precision. Captions
# have room for three references.
UTILITY: Mapping[str, str] = {
    "judge.flaws": "length:0.4",
    "rewards.weights": "1,1,2",
    "rollout.max_tokens": "128",
    "rollout.buckets": "128,",
}
_PENALTIES = {
    "two_sided": "max(0, 1 - |rho - 1|) in place of the band",
    "ramp": "a ramp in tokens in place of the band",
    "ramp_reference": "a ramp from the reference's words to twice that in place of the band",
}
GATE = Study(
    "gate",
    "Does the length band keep a reward that pays for length from growing long, and at what price?",
    World("utility"),
    {
        FULL: Arm("a judge that is lenient with long captions, length band 0.5 to 2", fields=UTILITY),
        "no_gate": Arm("the same without band and penalty", "no_gate", UTILITY),
    }
    | {
        name: Arm(about, name, {**UTILITY, "rewards.weights": f"{UTILITY['rewards.weights']},1"})
        for name, about in _PENALTIES.items()
    },
    metric="in_band",
)

# ---- (e) rivals ------------------------------------------------------------------------------------------------------

UTILITY_REWARDS = ("caprl", "rubicap", "feedquill")
RIVALS = Study(
    "rivals",
    "Do utility rewards grow long and noisy, and arena rewards generic, while the balanced one gives up neither?",
    HABITS,
    {
        FULL: _FULL,
        "caprl": Arm("CapRL: accuracy of questions answered from the caption", "caprl"),
        "rubicap": Arm("RubiCap: weighted criteria made from the scene's units", "rubicap"),
        "feedquill": Arm("FEEDQUILL: share and number of verified units", "feedquill"),
        "arena": Arm("preference within the group alone", "arena"),
        "lexical": Arm("ROUGE-L to the reference, no judge", "lexical"),
        "best_of": Arm("best of 8 by BalCap's reward, then supervised; as many judge calls", "best_of"),
    },
    metric="lowest",
)

# ---- (f) judges ------------------------------------------------------------------------------------------------------

FLAWS = {
    "false_accept:0.1": "accepts a tenth of what is wrong",
    "false_accept:0.3": "accepts three tenths of what is wrong",
    "false_accept:0.5": "accepts half of what is wrong",
    "length:0.5": "is the more lenient the longer the caption",
    "praise:0.5": "likes praise",
    "coarse:3": "gives three marks only",
    "picture_noise:0.3": "errs alike for all captions of a picture",
    "failed:0.1": "fails in a tenth of the calls",
    "failed:0.3": "fails in three tenths of the calls",
}
JUDGED = (FULL, "grpo", "no_gate", "soft_min")
"""Methods that the exact judge trains, and those of CROSSED; the others train the first of them alone."""
CROSSED = ("false_accept:0.3", "length:0.5")
VOTED = ("false_accept:0.3", "noise:0.3")
VOTES = 3
_ANY_FAILURES = {"judge.max_failure_rate": "1"}  # These runs are to go on.


def flawed(method: str, flaw: str, votes: int = 1) -> str:
    """The arm of a method under a flawed judge; "" is the exact one."""
    name = f"{method}_{flaw.replace(':', '_')}" if flaw else method
    return name if votes == 1 else f"{name}_votes_{votes}"


def _flawed(method: str, flaw: str, about: str, votes: int = 1) -> Arm:
    fields = {"judge.flaws": flaw} | (_ANY_FAILURES if flaw.startswith("failed") else {})
    if votes > 1:
        fields["judge.votes"], about = str(votes), f"{about}; {votes} votes"
    return Arm(f"{method}; the judge {about}", "" if method == FULL else method, fields)


JUDGES = Study(
    "judges",
    "How good must a judge be, and how many votes repair a bad one?",
    HABITS,
    {method: _FULL if method == FULL else _variant(method) for method in JUDGED}
    | {
        flawed(method, flaw): _flawed(method, flaw, about)
        for flaw, about in FLAWS.items()
        for method in (JUDGED if flaw in CROSSED else (FULL,))
    }
    | {flawed(FULL, "noise:0.3"): _flawed(FULL, "noise:0.3", "errs for each caption on its own")}
    | {flawed(FULL, flaw, VOTES): _flawed(FULL, flaw, f"has {flaw}", VOTES) for flaw in VOTED},
    seeds=SEEDS[:3],
)

# ---- (g) budget ------------------------------------------------------------------------------------------------------

SHARES = (1.0, 0.5, 0.25)
"""Shares of a group's captions that each question is asked about."""


def asked(share: float) -> str:
    return FULL if share == 1 else f"ask_{share:g}"


_QUESTIONS = ("precision", "recall", "linguistic")
BUDGET = Study(
    "budget",
    "How few questions to the judge are enough?",
    HABITS,
    {FULL: _FULL}
    | {
        asked(share): Arm(
            f"each question about {share:.0%} of a group's captions",
            fields={"judge.ask": ",".join(f"{name}:{share:g}" for name in _QUESTIONS)},
        )
        for share in SHARES
        if share != 1
    },
)

LEAVE_ONE_OUT = Study(
    "leave_one_out",
    "What does each part of the method do?",
    HABITS,
    {name: _FULL if name == FULL else _variant(name) for name in LEAVE_ONE_OUTS},
    seeds=SEEDS[:3],
)

STUDIES: Mapping[str, Study] = {
    study.name: study for study in (SPREAD, MOODS_STUDY, POINTABILITY, GATE, RIVALS, JUDGES, BUDGET, LEAVE_ONE_OUT)
}
