"""Batches between their rollout and their update, and judging that runs beside the devices' work (`pipeline.depth` 1).

    depth 0    sample t | judge t | update t | sample t+1 | judge t+1 | update t+1 ...
    depth 1    sample t+1 | update t | sample t+2 | update t+1 ...
               judge t    | judge t+1             | judge t+2 ...

At depth 1 a batch is sampled from the parameters before the update of the batch ahead of it. Its rollout belongs to the
checkpoint of that update, whoever asked for one: the parameters that drew it are gone by then.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import jax

from balcap_jax.models.policy import Prompt
from balcap_jax.rollout import Rollout
from balcap_jax.training.job import Judged


class Judging:
    """`ask()` in a thread of its own, which must touch no collective: only the main thread has an order of those.

    The thread is a daemon: a run that stops does not wait for a judge that hangs.
    """

    def __init__(self, ask: Callable[[], Judged]):
        self._answer: Future[Judged] = Future()
        self._elapsed = self._waited = 0.0
        threading.Thread(target=self._run, args=(ask,), name="judging", daemon=True).start()

    def wait(self) -> Judged:
        """The answer, once it is there; raises what `ask` raised."""
        start = time.perf_counter()
        try:
            return self._answer.result()
        finally:
            self._waited += time.perf_counter() - start

    @property
    def hidden(self) -> float:
        """Seconds of judging that nobody waited for; to be read after `wait`."""
        return max(self._elapsed - self._waited, 0.0)

    def _run(self, ask: Callable[[], Judged]) -> None:
        start = time.perf_counter()
        try:
            with jax.transfer_guard("disallow"):  # The main thread's guard does not hold here.
                judged = ask()
        except BaseException as error:
            self._answer.set_exception(error)
        else:
            self._elapsed = time.perf_counter() - start
            self._answer.set_result(judged)


@dataclasses.dataclass
class Flight:
    """A batch that is sampled and not yet learnt from.

    `prompt` and `out`, with its `image_embeds`, are on the mesh. `samples` is `out` on the host without `image_embeds`,
    in the rows that this process holds, which are those of `examples`.
    """

    examples: Mapping[str, Any]
    prompt: Prompt
    out: Rollout
    samples: Rollout
    judging: Judging | None = None
