"""The metrics by name."""

from typing import Any

from balcap_jax.cli.errors import UserError
from balcap_jax.evals import vqa
from balcap_jax.evals.balanced import BCapScore
from balcap_jax.evals.caparena import CapArena
from balcap_jax.evals.captionqa import CaptionQA
from balcap_jax.evals.capture import Capture
from balcap_jax.evals.checklist import Checklist
from balcap_jax.evals.dcscore import DCScore
from balcap_jax.evals.engine import Metric

_CLASSES = {one.name: one for one in (DCScore, CaptionQA, CapArena, BCapScore, Checklist, Capture)}


def metric_of(name: str, **options: Any) -> Metric:
    """The metric, with its defaults where `options` say nothing else. Raises UserError for an unknown name."""
    if name in vqa.BENCHMARKS:
        return vqa.Answers(name)
    if name not in _CLASSES:
        raise UserError(f"unknown metric {name!r}; there are {', '.join((*_CLASSES, *vqa.BENCHMARKS))}")
    return _CLASSES[name](**options)
