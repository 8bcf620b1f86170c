"""What a policy is: pure functions over a parameter pytree, the same for every model family."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.losses import chunked_log_probs, sampling_logits
from balcap_jax.models import decoder
from balcap_jax.models.decoder import Branch, DecoderConfig, Prefix
from balcap_jax.parallel.sharding import batch_parts, constrain

Params = dict[str, Any]


class Prompt(NamedTuple):
    """Static-shape prompts of one batch.

    tokens [B, P] int32 (image placeholders included); mask [B, P] bool, False on padding; positions [B, P] int32
    ([B, P, 3] for M-RoPE); images: what the family's vision tower takes, arrays with a leading B axis (LLaVA: uint8
    [B, S, S, 3]; Qwen2.5-VL: `QwenImages`).
    """

    tokens: jax.Array
    mask: jax.Array
    positions: jax.Array
    images: Any


class Policy(Protocol):
    """A frozen, hashable object; every method is pure and may be called under jit.

    `vocab` is V. A response ends with the first of its tokens that is in `end_tokens`; `pad_token` fills what is behind
    it. Logits of tokens that a response may never hold (vision, padding, beginning of sequence) are masked by the
    policy itself, in sampling and in `log_probs` alike, so that both see one distribution.
    """

    vocab: int
    pad_token: int
    end_tokens: tuple[int, ...]

    def init(self, rng: jax.Array) -> Params: ...

    def features(self, params: Params, images: Any) -> jax.Array:
        """`Prompt.images` -> the vision tower's features [B, I, width] in raster order, before the projector."""

    def encode(self, params: Params, images: Any) -> jax.Array:
        """`Prompt.images` -> image embeddings [B, I, D]; once per image."""

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


class VisionLanguagePolicy:
    """Base of a family's policy, which is a frozen dataclass with (at least) these fields: all that follows the tower.

    `image_token` marks the placeholders of a prompt, of which there are at most I. `forbidden` are ids that no response
    may hold. `logits_chunk` is the number of tokens per device whose logits exist at once in `log_probs`. The methods
    are described in `Policy`.
    """

    decoder: DecoderConfig
    image_token: int
    pad_token: int
    end_tokens: tuple[int, ...]
    forbidden: tuple[int, ...]
    logits_chunk: int

    @property
    def vocab(self) -> int:
        return self.decoder.vocab

    def prefill(self, params: Params, prompt: Prompt, image_embeds: jax.Array) -> tuple[Prefix, jax.Array]:
        x = self._prompt_embeddings(params, prompt, image_embeds)
        hidden, prefix = decoder.prefill(self.decoder, params["decoder"], x, prompt.mask, prompt.positions)
        return prefix, self._logits(params, hidden)

    def empty_branch(self, batch: int, group: int, length: int) -> Branch:
        return decoder.empty_branch(self.decoder, batch, group, length)

    def decode(
        self, params: Params, prefix: Prefix, branch: Branch, tokens: jax.Array, t: jax.Array
    ) -> tuple[Branch, jax.Array]:
        x = decoder.embed(self.decoder, params["decoder"], tokens)
        hidden, branch = decoder.decode(self.decoder, params["decoder"], prefix, branch, x, t)
        return branch, self._logits(params, hidden)

    def log_probs(
        self, params: Params, prompt: Prompt, image_embeds: jax.Array, responses: jax.Array, *, temperature: float = 1.0
    ) -> jax.Array:
        x = self._prompt_embeddings(params, prompt, image_embeds)
        y = decoder.embed(self.decoder, params["decoder"], responses)
        hidden = decoder.forward(self.decoder, params["decoder"], x, prompt.mask, prompt.positions, y)
        output = decoder.split_output(params["decoder"])

        def logits(hidden: jax.Array) -> jax.Array:
            hidden = constrain(hidden, "output_rows")
            found = decoder.logits(self.decoder, output, hidden)
            return constrain(found, "output_rows", *(None,) * (found.ndim - 2), "output_vocab")

        return chunked_log_probs(
            hidden,
            logits,
            responses,
            chunk=self.logits_chunk * batch_parts(),
            temperature=temperature,
            forbidden=self._forbidden,
        )

    @property
    def _forbidden(self) -> np.ndarray:
        """[V] bool."""
        mask = np.zeros(self.vocab, bool)
        mask[list(self.forbidden)] = True
        return mask

    def _logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        logits = decoder.logits(self.decoder, params["decoder"], hidden)
        # First where the weight is, then where the sequences are: told the latter alone, the weight would travel.
        logits = constrain(constrain(logits, "rows", *(None,) * (logits.ndim - 2), "vocab"), "batch")
        return sampling_logits(logits, forbidden=self._forbidden)

    def _prompt_embeddings(self, params: Params, prompt: Prompt, image_embeds: jax.Array) -> jax.Array:
        """Token embeddings with the image's embeddings, in order, in the places of the image tokens. [B, P, D]"""
        text = decoder.embed(self.decoder, params["decoder"], prompt.tokens)
        is_image = prompt.tokens == self.image_token
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_embeds.shape[1] - 1)
        placed = jnp.take_along_axis(image_embeds.astype(text.dtype), index[..., None], axis=1)
        return jnp.where(is_image[..., None], placed, text)
