"""DeepStack (Meng et al., arXiv 2406.04334): the first decoder layers add features of an image to what they give.

They travel behind the image embeddings, [B, I, (1 + n) D], and behind the prompt's, [B, P, (1 + n) D]: no part of the
rollout or the update asks how wide an embedding is. Only the prompt has them, since responses hold no image tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from balcap_jax.parallel.sharding import constrain


def split(x: jax.Array, width: int) -> tuple[jax.Array, Callable[[jax.Array, jax.Array | int], jax.Array]]:
    """Input embeddings, and the function that adds the features of a layer to its output.

    Args:
      x: [B, P, (1 + n) D]: for each position its embedding, and what the outputs of layers 0 to n - 1 gain. n may be 0.
      width: D.

    Returns:
      The embeddings [B, P, D], and the function (output of a layer [B, P, D], its number) -> output with its gain.
    """
    x, *gains = jnp.split(x, x.shape[-1] // width, axis=-1)
    if not gains:
        return x, lambda output, number: output
    stacked = jnp.stack(gains)

    def deepen(output: jax.Array, number: jax.Array | int) -> jax.Array:
        gain = jax.lax.dynamic_index_in_dim(stacked, jnp.minimum(number, len(gains) - 1), keepdims=False)
        return constrain(output + jnp.where(number < len(gains), gain, 0), "rows")

    return x, deepen
