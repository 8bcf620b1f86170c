"""Variants that the recipes of the method share: leave-one-outs, estimators, aggregations, length penalties and other
rewards.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from balcap_jax.cli.errors import UserError

WITHOUT = {"no_precision": (0.0, 1.0, 1.0), "no_recall": (1.0, 0.0, 1.0), "no_linguistic": (1.0, 1.0, 0.0)}
ONLY = {"precision_only": (1.0, 0.0, 0.0), "recall_only": (0.0, 1.0, 0.0), "linguistic_only": (0.0, 0.0, 1.0)}
REWARDS = {"caprl": (1.0,), "rubicap": (1.0,), "feedquill": (1.0, 1.0), "lexical": (1.0,), "arena": (1.0,)}
REWARDS |= {"balcap_arena": (1.0, 1.0, 1.0, 1.0)}
TAU_U = {"tau_1_1": 1.1, "tau_1_5": 1.5, "tau_3": 3.0}
ESTIMATORS = ("grpo", "dr_grpo", "rloo", "best_of")
AGGREGATIONS = ("soft_min", "conflict")
PENALTIES = ("two_sided", "ramp", "ramp_reference")
NAMES = ("no_pointability", "no_gate", "no_batch_norm", *ESTIMATORS, *AGGREGATIONS)
NAMES += (*WITHOUT, *ONLY, *TAU_U, *PENALTIES, *REWARDS)
"""All of these variants, in the order in which messages list them."""

_ONE_OF = ((*WITHOUT, *ONLY, *REWARDS), (*ESTIMATORS, *AGGREGATIONS), (*TAU_U, *PENALTIES, "no_gate"))


def chosen(variant: str, known: Sequence[str], one_of: Sequence[Sequence[str]] = ()) -> list[str]:
    """The names in `variant`, such as "qwen,tiny".

    Raises:
      UserError: one is not `known`, or two are of one group of `one_of`, or of such a group of these variants.
    """
    variants = [part for part in variant.split(",") if part]
    for name in variants:
        if name not in known:
            raise UserError(f"unknown variant {name!r}; there are {', '.join(known)}")
    for group in (*one_of, *_ONE_OF):
        if len(both := [name for name in dict.fromkeys(variants) if name in group]) > 1:
            raise UserError(f"variants {' and '.join(both)} exclude each other")
    return variants


def apply(config: ConfigDict, variants: Sequence[str], length_start: int, length_end: int) -> None:
    """Changes `config` to these variants; other names are passed over.

    The ramp of a length penalty gives 1 up to `length_start` tokens and 0 from `length_end` on.
    """
    for name, weights in (WITHOUT | ONLY | REWARDS).items():
        if name in variants:
            config.rewards.weights = weights
            config.rewards.name = name if name in REWARDS else "balcap"
    for name in PENALTIES:
        if name in variants:
            config.rewards.length = name
            config.rewards.weights = (*config.rewards.weights, 1.0)
            config.rewards.gate = False
            config.rewards.length_start, config.rewards.length_end = length_start, length_end
    if "no_pointability" in variants:
        config.rewards.pointability = False
    if "no_gate" in variants:
        config.rewards.gate = False
    for name, bound in TAU_U.items():
        if name in variants:
            config.rewards.gate_high = bound
    for name in ESTIMATORS:
        if name in variants:
            config.advantage.estimator = name
    if "best_of" in variants:
        config.loss.kl_coef = 0.0  # It is supervised training.
    for name in AGGREGATIONS:
        if name in variants:
            config.advantage.aggregation = name
    if "no_batch_norm" in variants:
        config.advantage.batch_norm = "none"
