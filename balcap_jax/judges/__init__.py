"""Judges decide whether an assertion holds, a unit is covered and a caption reads well."""

from collections.abc import Collection, Mapping
from typing import Any

import jax

from balcap_jax.config.schema import parse_flaws, parse_shares
from balcap_jax.judges.flawed import FlawedJudge
from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.judges.schema import Judge

__all__ = ["Judge", "build", "parse_flaws", "parse_shares", "sees"]


def sees(asks: Collection[str]) -> bool:
    """Whether any of the methods `asks` is about a picture."""
    return not {"precision", "preference"}.isdisjoint(asks)


def build(config: Mapping[str, Any], seed: int, asks: Collection[str] = ()) -> Judge:
    """The judge of the config group `judge`, whose limits all processes of the run share. Close it in the end.

    asks: methods that will be called, so that an endpoint that takes no pictures is an error at the start.

    Raises:
      UserError: an endpoint of a remote judge is down, refuses the key, or does not know the model; or the model of a
        judge on the mesh cannot be loaded or cannot answer.
    """
    if config["name"] == "oracle" and (flaws := parse_flaws(config["flaws"])):
        return FlawedJudge(flaws, config["votes"], seed)
    if config["name"] == "oracle":
        return OracleJudge(failure_rate=config["failure_rate"], seed=seed)
    if config["name"] == "policy":
        from balcap_jax.judges.mesh_judge import build_judge  # The judges know models only where a model judges.

        return build_judge(config, asks)
    from balcap_jax.judges.chat_judge import RemoteJudge, make_client  # HTTP only where it is needed.

    client = make_client(config, seed, jax.process_count())
    try:
        client.connect(sees=sees(asks))
    except BaseException:
        client.close()
        raise
    return RemoteJudge(client, config["max_tokens"])
