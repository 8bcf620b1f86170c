"""What a policy is: pure functions over a parameter pytree, the same for every model family."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.losses import chunked_log_probs, sampling_logits
from balcap_jax.models import decoder
from balcap_jax.models.decoder import Branch, DecoderConfig, Params, Prefix
from balcap_jax.parallel.sharding import batch_parts, constrain


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


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of a family's policy, which adds the tower: `init` and `encode`. It is hashable.

    Every method is pure and may be called under jit.

    `vision` is the configuration of the family's tower. `image_token` marks the placeholders of a prompt, at most I.
    `logits_chunk` is the number of tokens per device whose logits exist at once in `log_probs`.

    A response ends with the first of its tokens that is in `end_tokens`; `pad_token` fills what is behind it. The
    policy itself masks the logits of `forbidden` tokens, which a response may never hold (vision, padding, beginning
    of sequence). It does so in sampling and in `log_probs` alike, so that both see one distribution.
    """

    vision: Any
    decoder: DecoderConfig
    image_token: int
    pad_token: int
    end_tokens: tuple[int, ...]
    forbidden: tuple[int, ...] = ()
    logits_chunk: int = 512

    @property
    def vocab(self) -> int:
        """V."""
        return self.decoder.vocab

    def init(self, rng: jax.Array) -> Params:
        raise NotImplementedError

    def encode(self, params: Params, images: Any) -> jax.Array:
        """`Prompt.images` -> image embeddings [B, I, D]; once per image."""
        raise NotImplementedError

    @jax.named_scope("prefill")
    def prefill(self, params: Params, prompt: Prompt, image_embeds: jax.Array) -> tuple[Prefix, jax.Array]:
        """-> the un-repeated prefix and the logits [B, V] (fp32) of the first response token."""
        x = self._prompt_embeddings(params, prompt, image_embeds)
        hidden, prefix = decoder.prefill(self.decoder, params["decoder"], x, prompt.mask, prompt.positions)
        return prefix, self._logits(params, hidden)

    def empty_branch(self, batch: int, group: int, length: int) -> Branch:
        """An unwritten cache for `group` responses of up to `length` tokens per prompt."""
        return decoder.empty_branch(self.decoder, batch, group, length)

    @jax.named_scope("decode")
    def decode(
        self, params: Params, prefix: Prefix, branch: Branch, tokens: jax.Array, t: jax.Array
    ) -> tuple[Branch, jax.Array]:
        """Response tokens [B, G] at index t -> the extended branch and logits [B, G, V] (fp32) of index t + 1."""
        x = decoder.embed(self.decoder, params["decoder"], tokens)
        hidden, branch = decoder.decode(self.decoder, params["decoder"], prefix, branch, x, t)
        return branch, self._logits(params, hidden)

    @jax.named_scope("log_probs")
    def log_probs(
        self, params: Params, prompt: Prompt, image_embeds: jax.Array, responses: jax.Array, *, temperature: float = 1.0
    ) -> jax.Array:
        """Log-probabilities [B, G, R] (fp32) of `responses` [B, G, R]; no array holds more than a chunk of logits."""
        x = self._prompt_embeddings(params, prompt, image_embeds)
        y = decoder.embed(self.decoder, params["decoder"], responses)
        hidden = decoder.forward(self.decoder, params["decoder"], x, prompt.mask, prompt.positions, y)
        output = decoder.split_output(params["decoder"])

        def logits(hidden: jax.Array) -> jax.Array:
            hidden = constrain(hidden, "output_rows")
            values = decoder.logits(self.decoder, output, hidden)
            return constrain(values, "output_rows", *(None,) * (values.ndim - 2), "output_vocab")

        chunk = self.logits_chunk * batch_parts()
        return chunked_log_probs(
            hidden, logits, responses, chunk=chunk, temperature=temperature, forbidden=self._forbidden
        )

    @property
    def _forbidden(self) -> np.ndarray:
        """[V] bool."""
        mask = np.zeros(self.vocab, bool)
        mask[list(self.forbidden)] = True
        return mask

    def _logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        logits = decoder.logits(self.decoder, params["decoder"], hidden)
        # First where the weight is, then where the sequences are: with the latter alone, XLA would move the weight.
        logits = constrain(constrain(logits, "rows", *(None,) * (logits.ndim - 2), "vocab"), "batch")
        return sampling_logits(logits, forbidden=self._forbidden)

    def _prompt_embeddings(self, params: Params, prompt: Prompt, image_embeds: jax.Array) -> jax.Array:
        """Token embeddings [B, P, D], with the image's embeddings, in order, in the places of the image tokens."""
        text = decoder.embed(self.decoder, params["decoder"], prompt.tokens)
        is_image = prompt.tokens == self.image_token
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_embeds.shape[1] - 1)
        placed = jnp.take_along_axis(image_embeds.astype(text.dtype), index[..., None], axis=1)
        return jnp.where(is_image[..., None], placed, text)


@dataclasses.dataclass(frozen=True)
class TextPolicy(Policy):
    """The decoder alone, for checks against real weights and for benchmarks; `Prompt.images` is `no_images(B)`."""

    vision: None = dataclasses.field(default=None, kw_only=True)
    image_token: int = dataclasses.field(default=-1, kw_only=True)  # No token has this id.

    @staticmethod
    def no_images(batch: int) -> np.ndarray:
        """[B, 0] uint8."""
        return np.zeros((batch, 0), np.uint8)

    def init(self, rng: jax.Array) -> Params:
        return {"decoder": decoder.init(self.decoder, rng)}

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        """[B, 0] -> [B, 1, D] of zeros, which no token takes."""
        return jnp.zeros((images.shape[0], 1, self.decoder.width), jnp.dtype(self.decoder.dtype))


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A policy that hands on every attribute that its class does not define to `policy`."""

    policy: Policy

    def __getattr__(self, name: str) -> Any:
        # `pickle` and `copy` ask an object without fields for its special methods: handing on would never end.
        if name == "policy" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.policy, name)


class Projector(nn.Module):
    """Two layers with GELU between, to the decoder's `width`: the projector of LLaVA-1.5, the merger of Qwen2.5-VL.

    Features [..., F] -> [..., hidden] -> image embeddings [..., width].
    """

    hidden: int
    width: int
    dtype: str

    @nn.compact
    @jax.named_scope("projector")
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        x = nn.gelu(nn.Dense(self.hidden, dtype=dtype, name="first")(x), approximate=False)
        return nn.Dense(self.width, dtype=dtype, name="second")(x)
