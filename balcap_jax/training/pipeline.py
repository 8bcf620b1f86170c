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
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from balcap_jax.models.policy import Params, Policy, Prompt
from balcap_jax.parallel import sharding
from balcap_jax.rollout import Rollout, Sampling
from balcap_jax.training.job import Judged


class Judging:
    """`ask()` in a thread of its own, which must touch no collective: only the main thread has an order of those.

    The thread is a daemon: a run that stops does not wait for a judge that hangs.
    """

    def __init__(self, ask: Callable[[], Judged]):
        self._found: Future[Judged] = Future()
        self._taken = self._waited = 0.0
        threading.Thread(target=self._run, args=(ask,), name="judging", daemon=True).start()

    def wait(self) -> Judged:
        """What was found, once it is there; raises what `ask` raised."""
        begun = time.perf_counter()
        try:
            return self._found.result()
        finally:
            self._waited += time.perf_counter() - begun

    @property
    def hidden(self) -> float:
        """Seconds of judging that nobody waited for; to be read after `wait`."""
        return max(self._taken - self._waited, 0.0)

    def _run(self, ask: Callable[[], Judged]) -> None:
        begun = time.perf_counter()
        try:
            with jax.transfer_guard("disallow"):  # The main thread's guard does not hold here.
                found = ask()
        except BaseException as error:
            self._found.set_exception(error)
        else:
            self._taken = time.perf_counter() - begun
            self._found.set_result(found)


@dataclasses.dataclass
class Flight:
    """A batch that is sampled and not yet learnt from.

    prompt and out (its `image_embeds` in particular) are on the mesh; drawn is `out` on the host, without
    `image_embeds`, the rows that this process holds, which are those of `examples`.
    """

    examples: Mapping[str, Any]
    prompt: Prompt
    out: Rollout
    drawn: Rollout
    judging: Judging | None = None


def kept(mesh: Mesh, out: Rollout) -> Rollout:
    """What a checkpoint holds of a rollout, laid out as it is restored: programs are compiled for one layout."""
    return jax.device_put(out, sharding.batch_sharding(mesh))


def abstract_kept(
    mesh: Mesh, policy: Policy, processor: Any, params: Params, batch_size: int, sampling: Sampling
) -> Rollout:
    """Shapes, types and layout of what `kept` returns; `params` may be abstract."""
    blank = processor([np.zeros((64, 64, 3), np.uint8)], [""])
    embeds = jax.eval_shape(policy.encode, params, blank.images)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh))

    branch = (sampling.group_size,)
    tokens = (*branch, sampling.max_tokens)
    return Rollout(
        tokens=of(tokens, jnp.int32),
        mask=of(tokens, bool),
        policy_log_probs=of(tokens, jnp.float32),
        lengths=of(branch, jnp.int32),
        truncated=of(branch, bool),
        image_embeds=of(embeds.shape[1:], embeds.dtype),
    )
