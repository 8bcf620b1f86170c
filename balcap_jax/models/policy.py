"""What a policy is: pure functions over a parameter pytree, the same for every model family."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.losses import chunked_log_probs, sampling_logits
from balcap_jax.models import decoder, packing
from balcap_jax.models.decoder import Branch, DecoderConfig, Params, Prefix
from balcap_jax.models.seats import Seats
from balcap_jax.parallel.sharding import batch_parts, constrain


class Prompt(NamedTuple):
    """Static-shape prompts of one batch.

    tokens [B, P] int32 (image placeholders included); mask [B, P] bool, False on padding; positions [B, P] int32
    ([B, P, 3] for M-RoPE); images: what the family's vision tower takes, arrays with a leading B axis (LLaVA: uint8
    [B, S, S, 3]; the Qwen families: `QwenImages`).
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
        """`Prompt.images` -> image embeddings [B, I, D]; once per image.

        With DeepStack [B, I, (1 + n) D]: behind the embeddings lies what the first n decoder layers add to them.
        """
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
        self, params: Params, prefix: Prefix, branch: Branch, tokens: jax.Array, t: jax.Array | Seats
    ) -> tuple[Branch, jax.Array]:
        """Response tokens [B, G] at index t -> the extended branch and logits [B, G, V] (fp32) of index t + 1.

        After `regroup` B and G are lines and the branches of one. With `Seats` B are rows and G is 1.
        """
        x = decoder.embed(self.decoder, params["decoder"], tokens)
        hidden, branch = decoder.decode(self.decoder, params["decoder"], prefix, branch, x, t)
        return branch, self._logits(params, hidden)

    @jax.named_scope("regroup")
    def regroup(
        self, prefix: Prefix, branch: Branch, lines: jax.Array, places: jax.Array, written: jax.Array
    ) -> tuple[Prefix, Branch]:
        """Brings branches to other places, see `decoder.regroup`."""
        return decoder.regroup(prefix, branch, lines, places, written)

    @jax.named_scope("log_probs")
    def log_probs(
        self,
        params: Params,
        prompt: Prompt,
        image_embeds: jax.Array,
        responses: jax.Array,
        *,
        temperature: float = 1.0,
        mask: jax.Array | None = None,
        token_bucket: int = 0,
    ) -> jax.Array:
        """Log-probabilities [B, G, R] (fp32) of `responses` [B, G, R]; no array holds more than a chunk of logits.

        With a `token_bucket`, the tokens that a response has on average, responses run packed (`models.packing`). Then
        `mask` [B, G, R] must be given, True for the first tokens of each response alone, and the others' values are 0.
        Parts with more tokens than the bucket allows are NaN, so that no update takes a part for the whole.
        """
        x = self._prompt_embeddings(params, prompt, image_embeds)
        inputs = self.decoder, params["decoder"], x, prompt.mask, prompt.positions
        if not token_bucket:
            y = decoder.embed(self.decoder, params["decoder"], responses)
            return self._chosen(params, decoder.forward(*inputs, y), responses, temperature)
        if mask is None:
            raise ValueError("a token_bucket needs the mask of the responses")
        length = responses.shape[-1]
        lengths = mask.sum(-1, dtype=jnp.int32).reshape(batch_parts(), -1, mask.shape[1])
        at = packing.places(lengths, length, token_bucket)
        tokens = packing.pack(responses, at)
        y = decoder.embed(self.decoder, params["decoder"], tokens)
        found = self._chosen(params, decoder.forward_packed(*inputs, y, at, length), tokens, temperature)
        found = packing.unpack(found, at, length).reshape(len(at.fits), -1, *responses.shape[1:])
        # A factor, not a selection: the gradient of what does not fit must not be finite either.
        found = (found * jnp.where(at.fits, 1.0, jnp.nan)[:, None, None, None]).reshape(responses.shape)
        return jnp.where(mask, found, 0.0)

    def _chosen(self, params: Params, hidden: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
        """Log-probabilities of `tokens` [...] from the normed hidden states [..., D] that predict them."""
        output = decoder.split_output(params["decoder"])

        def logits(hidden: jax.Array) -> jax.Array:
            hidden = constrain(hidden, "output_rows")
            values = decoder.logits(self.decoder, output, hidden)
            return constrain(values, "output_rows", *(None,) * (values.ndim - 2), "output_vocab")

        chunk = self.logits_chunk * batch_parts()
        return chunked_log_probs(
            hidden, logits, tokens, chunk=chunk, temperature=temperature, forbidden=self._forbidden
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
        """Token embeddings [B, P, D], with the image's embeddings, in order, in the places of the image tokens.

        Where `image_embeds` are [B, I, (1 + n) D], so are these; see `deepstack.split`. Text gains nothing.
        """
        text = decoder.embed(self.decoder, params["decoder"], prompt.tokens)
        text = jnp.pad(text, [(0, 0), (0, 0), (0, image_embeds.shape[-1] - text.shape[-1])])
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
    """Two layers with GELU between, to the decoder's `width`: the projector of LLaVA-1.5, the mergers of Qwen.

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
