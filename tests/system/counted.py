"""Runs a training command and prints, as JSON, what jax traced and compiled by the end of each step.

    python counted.py <arguments of balcap_jax.train>

The last line is a list of [stage, step, bucket, {event: count so far}].
"""

import collections
import json
import sys

import jax

from balcap_jax import train
from balcap_jax.training import stages

counts: collections.Counter = collections.Counter()
buckets, steps = [], []


def count(event: str, duration: float, **_) -> None:
    del duration
    if event.startswith("/jax/core/compile/"):
        counts[event.rpartition("/")[2]] += 1


def watch(stage: type) -> None:
    advance = stage.advance

    def counted(self, state, examples, step):
        done = advance(self, state, examples, step)
        steps.append((stage.__name__, step, buckets[-1], dict(counts)))
        return done

    stage.advance = counted


if __name__ == "__main__":
    jax.monitoring.register_event_duration_secs_listener(count)
    watch(stages.SFTStage)
    watch(stages.RLStage)
    bucket_of = stages.bucket_of
    stages.bucket_of = lambda *given: buckets.append(bucket_of(*given)) or buckets[-1]
    train.main(sys.argv[1:])
    print(json.dumps(steps))
