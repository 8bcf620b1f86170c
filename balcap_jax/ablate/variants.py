"""The variants of a study by the names that recipes take, and the reports about each.

The reported directions are second-hand (docs/method.md); they are of a 3B model on photographs, against the paper's
full method unless `against` says otherwise. `expected` are claims of the method's argument that have no figure there.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Variant:
    """`about` says what changes. reported, expected: {metric: +1 rises, -1 falls, 0 does not fall}."""

    about: str
    reported: Mapping[str, int] = dataclasses.field(default_factory=dict)
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    against: str = "full"


FULL = "full"
_ALL_FALL = {"dcscore": -1, "captionqa": -1, "arena": -1}
_SINGLE = {"b_capscore": -1}

VARIANTS: dict[str, Variant] = {
    FULL: Variant("the recipe as it is: c-GDPO, three objectives, length band 0.5 to 2"),
    "grpo": Variant("without c-GDPO: vanilla GRPO, the weighted sum is normalised", _ALL_FALL, {"b_capscore": -1}),
    "no_batch_norm": Variant("c-GDPO without its batch step"),
    "dr_grpo": Variant("Dr.GRPO: the weighted sum, centred only"),
    "rloo": Variant("RLOO: the weighted sum against the other members' mean"),
    "no_precision": Variant("without precision", {"dcscore": -1, "arena": 0}),
    "no_recall": Variant("without recall"),
    "no_linguistic": Variant("without linguistic quality", {"dcscore": 1, "captionqa": 1, "arena": -1, "words": 1}),
    "no_pointability": Variant("precision asks only what is true", _ALL_FALL),
    "precision_only": Variant("precision alone", expected=_SINGLE),
    "recall_only": Variant("recall alone", expected=_SINGLE),
    "linguistic_only": Variant("linguistic quality alone, inside the band", expected=_SINGLE),
    "no_gate": Variant("no length band and no penalty", {"dcscore": -1, "words": -1}),
    "two_sided": Variant("a linear length penalty in place of the band", {"dcscore": 1}, against="no_gate"),
    "tau_1_1": Variant("the band ends at 1.1 lengths of the reference", {"dcscore": -1, "captionqa": -1, "arena": 1}),
    "tau_1_5": Variant("the band ends at 1.5", {"dcscore": -1, "captionqa": -1, "arena": 1}),
    "tau_3": Variant("the band ends at 3", {"dcscore": 1, "captionqa": 1, "arena": -1}),
}
LEAVE_ONE_OUTS = tuple(VARIANTS)
"""The variants of a study that names none."""
VARIANTS |= {
    "soft_min": Variant("RVPO: the soft minimum of the objectives' z-scores in place of their sum"),
    "conflict": Variant("GD2PO: captions on which the objectives disagree are dropped"),
}
