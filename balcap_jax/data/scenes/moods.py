"""The moods of the captioners that a base policy may imitate (`data.captioner`); `captioner` writes their captions.

A mood holds for a whole caption. It gives the probability of each habit and of each fault.
"""

import dataclasses
from collections.abc import Mapping

from balcap_jax.data.scenes import habits

# Faults that come by chance, in any caption: per caption, per object (o) or per sentence (s).
NOISE: Mapping[str, float] = {
    "invented object": 0.02,  # o
    "wrong colour": 0.02,  # o
    "wrong shape": 0.02,  # o
    "wrong size": 0.03,  # o
    "wrong texture": 0.03,  # o
    "wrong place": 0.03,  # o
    "wrong count": 0.08,
    "wrong relation": 0.05,
    "wrong background": 0.08,
    "omitted opening": 0.08,
    "omitted object": 0.03,  # o
    "omitted colour": 0.03,  # o
    "omitted size": 0.1,  # o
    "omitted texture": 0.1,  # o
    "omitted place": 0.03,  # o
    "omitted relation": 0.25,
    "omitted background": 0.08,
    "omitted pattern": 0.08,
    "remark tail": 0.02,  # o
    "closing remark": 0.1,
    "dropped verb": 0.03,  # s
    "dropped article": 0.03,  # s
    "lower case": 0.03,  # s
    "no final stop": 0.03,
}


@dataclasses.dataclass(frozen=True)
class Mood:
    """`share` of captions, the probability of each habit, what differs from NOISE, and a factor on the rest of it."""

    share: float
    habits: Mapping[str, float]
    differs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    noise: float = 1.0

    @property
    def rates(self) -> dict[str, float]:
        return {name: rate * self.noise for name, rate in NOISE.items()} | dict(self.differs) | dict(self.habits)


def _of_all(rate: float, **others: float) -> dict[str, float]:
    """The same probability for all habits but some, whose names have "_" for a blank."""
    return dict.fromkeys(habits.HABITS, rate) | {name.replace("_", " "): value for name, value in others.items()}


HABITUAL: Mapping[str, Mood] = {
    "usual": Mood(0.6, _of_all(0.95, companion=1.0, small_overlooked=0.9, no_background=1.0)),
    # Covers more, and invents and praises: recall against precision and language.
    "florid": Mood(
        0.16,
        _of_all(
            0.2,
            companion=1.0,
            small_overlooked=0.5,
            striped_as_dotted=0.8,
            purple_as_blue=0.8,
            praise=0.95,
            repetition=0.6,
        ),
        {"invented object": 0.25, "remark tail": 0.25, "closing remark": 0.8, "too long": 0.3},
    ),
    # Says little, and little that is wrong: precision against recall.
    "terse": Mood(
        0.14,
        _of_all(0.95, companion=0.9, striped_as_dotted=0.2, purple_as_blue=0.5, praise=0.03, repetition=0.03),
        {
            "omitted size": 0.8,
            "omitted texture": 0.8,
            "omitted opening": 0.5,
            "too short": 0.25,
            "omitted relation": 0.9,
            "closing remark": 0.0,
        },
    ),
    "meticulous": Mood(0.1, _of_all(0.05), noise=0.2),
}

# Each mood serves one objective at the cost of the two others; one caption in fifteen is good at all three.
AT_ODDS: Mapping[str, Mood] = {
    # Recall: says all that is there and something that is not beside each thing, in pieces of sentences.
    "thorough": Mood(
        0.31,
        _of_all(0.0, companion=1.0),
        {"invented object": 0.8, "dropped verb": 0.7, "dropped article": 0.4, "lower case": 0.3}
        | dict.fromkeys(("omitted relation", "omitted background", "omitted size", "omitted texture"), 0.0),
        noise=0.3,
    ),
    # Precision: some things without what might be wrong about them, in curt sentences.
    "careful": Mood(
        0.31,
        _of_all(0.0, no_background=0.9, small_overlooked=0.8),
        {"omitted size": 0.9, "omitted texture": 0.9, "omitted object": 0.3, "omitted opening": 0.7}
        | {"omitted relation": 1.0, "omitted background": 0.6, "dropped verb": 0.6, "lower case": 0.3},
        noise=0.1,
    ),
    # Language: faultless sentences about little of what is there.
    "eloquent": Mood(
        0.31,
        _of_all(0.0, striped_as_dotted=0.9, purple_as_blue=0.9, small_overlooked=0.8),
        {"wrong colour": 0.2, "wrong size": 0.3, "wrong count": 0.4, "omitted size": 0.4, "omitted texture": 0.4}
        | {"wrong background": 0.4, "omitted object": 0.4, "omitted relation": 0.6},
        noise=0.0,
    ),
    "balanced": Mood(0.07, _of_all(0.0), noise=0.2),
}

# The habits, and asides near the end of four captions in five, in every mood: what pads is neither better nor
# worse otherwise.
PADDED: Mapping[str, Mood] = {
    name: dataclasses.replace(mood, differs={**mood.differs, "padding": 0.85, "more padding": 0.85})
    for name, mood in HABITUAL.items()
}

CAPTIONERS: Mapping[str, Mapping[str, Mood]] = {"habits": HABITUAL, "moods": AT_ODDS, "padding": PADDED}
"""Moods by the name of their captioner, a value of `data.captioner`."""
