"""Attention over whole pictures, a few of them at a time: all at once, their logits are the largest arrays of all."""

from collections.abc import Callable

import jax

from balcap_jax.parallel import sharding

# Bytes of fp32 logits over whole pictures that a device holds at once: those of two pictures of 2,048 patches and 16
# heads, enough rows for any matmul. Those of a part of a batch, 16 pictures, would be larger than its whole cache.
IMAGE_LOGITS = 2**29


def few_at_a_time(attend: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], logits: int) -> jax.Array:
    """`attend` of `arrays` [B, ...], for as many rows at once as have no more than IMAGE_LOGITS on a device.

    logits: how many one row has.
    """
    rows = arrays[0].shape[0]
    here = rows // sharding.batch_parts(rows)
    of_rows = {parts: 4 * logits * (here // parts) for parts in range(1, here + 1) if here % parts == 0}
    fitting = [parts for parts, size in of_rows.items() if size <= IMAGE_LOGITS]
    return sharding.in_parts(attend, arrays, min(fitting, default=here))
