"""The LLaVA-1.5 family: CLIP vision tower, GELU projector, Llama decoder. Liu et al., arXiv 2310.03744."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balcap_jax.losses import chunked_log_probs, sampling_logits
from balcap_jax.models import decoder
from balcap_jax.models.decoder import Branch, DecoderConfig, Prefix
from balcap_jax.models.llava import vision
from balcap_jax.models.llava.vision import VisionConfig
from balcap_jax.models.policy import Prompt

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Llava:
    """A policy (see `models.policy.Policy`) of this family.

    `image_token` marks the I placeholders of a prompt. `forbidden` are ids that no response may hold.
    `logits_chunk` is the number of tokens whose logits exist at once in `log_probs`.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    image_token: int
    pad_token: int
    eos_token: int
    forbidden: tuple[int, ...] = ()
    logits_chunk: int = 512

    @property
    def vocab(self) -> int:
        return self.decoder.vocab

    @property
    def image_tokens(self) -> int:
        return self.vision.image_tokens

    def init(self, rng: jax.Array) -> Params:
        tower, projector, language = jax.random.split(rng, 3)
        features = jnp.zeros((1, 1, self.vision.width))
        return {
            "vision": vision.init(self.vision, tower),
            "projector": self._projector.init(projector, features)["params"],
            "decoder": decoder.init(self.decoder, language),
        }

    def features(self, params: Params, images: jax.Array) -> jax.Array:
        return vision.encode(self.vision, params["vision"], images)

    def encode(self, params: Params, images: jax.Array) -> jax.Array:
        return self._projector.apply({"params": params["projector"]}, self.features(params, images))

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
        return chunked_log_probs(
            hidden,
            decoder.head(self.decoder, params["decoder"]),
            responses,
            chunk=self.logits_chunk,
            temperature=temperature,
            forbidden=self._forbidden,
        )

    @property
    def _projector(self) -> vision.Projector:
        return vision.Projector(self.decoder.width, self.decoder.dtype)

    @property
    def _forbidden(self) -> np.ndarray:
        """[V] bool."""
        mask = np.zeros(self.vocab, bool)
        mask[list(self.forbidden)] = True
        return mask

    def _logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        kernel = decoder.head(self.decoder, params["decoder"])
        logits = jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
        return sampling_logits(logits, forbidden=self._forbidden)

    def _prompt_embeddings(self, params: Params, prompt: Prompt, image_embeds: jax.Array) -> jax.Array:
        """Token embeddings with the image's embeddings, in order, in the places of the image tokens. [B, P, D]"""
        text = decoder.embed(self.decoder, params["decoder"], prompt.tokens)
        is_image = prompt.tokens == self.image_token
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_embeds.shape[1] - 1)
        placed = jnp.take_along_axis(image_embeds.astype(text.dtype), index[..., None], axis=1)
        return jnp.where(is_image[..., None], placed, text)
