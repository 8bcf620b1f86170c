"""Runs a training command and prints, as JSON, what jax traced and compiled by the end of each step.

    python counted.py <arguments of balcap_jax.train>

The last line is a list of [stage, step, [length, token bucket], {event: count so far}].
"""

import collections
import json
import sys

import jax

from balcap_jax import train
from balcap_jax.training import job, stages

counts: collections.Counter = collections.Counter()
shapes, steps = [], []


def count(event: str, duration: float, **_) -> None:
    del duration
    if event.startswith("/jax/core/compile/"):
        counts[event.rpartition("/")[2]] += 1


def watch(stage: type) -> None:
    advance = stage.advance

    def counted(self, state, examples, step):
        done = advance(self, state, examples, step)
        steps.append((stage.__name__, step, shapes[-1][:2], dict(counts)))
        return done

    stage.advance = counted


if __name__ == "__main__":
    jax.monitoring.register_event_duration_secs_listener(count)
    watch(stages.SFTStage)
    watch(stages.RLStage)
    shape_for = job.Stage.shape_for
    job.Stage.shape_for = lambda *given: shapes.append(shape_for(*given)) or shapes[-1]
    train.main(sys.argv[1:])
    print(json.dumps(steps))
