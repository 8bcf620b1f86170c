"""What a policy is: pure functions over a parameter pytree, the same for every model family."""

from typing import Any, NamedTuple, Protocol

import jax

from balcap_jax.models.decoder import Branch, Prefix

Params = dict[str, Any]


class Prompt(NamedTuple):
    """Static-shape prompts of one batch.

    tokens [B, P] int32 (image placeholders included); mask [B, P] bool, False on padding; positions [B, P] int32
    ([B, P, 3] for M-RoPE); images uint8 [B, height, width, 3].
    """

    tokens: jax.Array
    mask: jax.Array
    positions: jax.Array
    images: jax.Array


class Policy(Protocol):
    """A frozen, hashable object; every method is pure and may be called under jit.

    `vocab` is V. `pad_token`, `eos_token` delimit responses. Logits of tokens that a response may never hold (vision,
    padding, beginning of sequence) are masked by the policy itself, in sampling and in `log_probs` alike, so that both
    see one distribution.
    """

    vocab: int
    pad_token: int
    eos_token: int

    def init(self, rng: jax.Array) -> Params: ...

    def features(self, params: Params, images: jax.Array) -> jax.Array:
        """uint8 images [B, height, width, 3] -> the vision tower's features [B, I, width], before the projector."""

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """uint8 images [B, height, width, 3] -> image embeddings [B, I, D]; once per image."""

    def prefill(self, params: Params, prompt: Prompt, image_embeds: jax.Array) -> tuple[Prefix, jax.Array]:
        """-> the un-repeated prefix and the logits [B, V] (fp32) of the first response token."""

    def empty_branch(self, batch: int, group: int, length: int) -> Branch:
        """An unwritten cache for `group` responses of up to `length` tokens per prompt."""

    def decode(
        self, params: Params, prefix: Prefix, branch: Branch, tokens: jax.Array, t: jax.Array
    ) -> tuple[Branch, jax.Array]:
        """Response tokens [B, G] at index t -> the extended branch and logits [B, G, V] (fp32) of index t + 1."""

    def log_probs(
        self,
        params: Params,
        prompt: Prompt,
        image_embeds: jax.Array,
        responses: jax.Array,
        *,
        temperature: float = 1.0,
    ) -> jax.Array:
        """Log-probabilities [B, G, R] (fp32) of `responses` [B, G, R]; no array holds more than a chunk of logits."""
