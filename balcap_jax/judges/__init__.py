"""Judges: who says whether an assertion holds, a unit is covered and a caption reads well."""

from collections.abc import Mapping
from typing import Any

from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.judges.schema import Judge


def build(config: Mapping[str, Any], seed: int) -> Judge:
    """The judge of the config group `judge`."""
    return OracleJudge(failure_rate=config["failure_rate"], seed=seed)
