"""Images and instructions to static-shape prompts, and tokens back to text, on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from balcap_jax.errors import UserError
from balcap_jax.models.policy import Prompt

# Prompt template of LLaVA-1.5 (Vicuna); `{image}` stands for the image tokens, `{prompt}` for the instruction.
VICUNA_TEMPLATE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: {image}\n{prompt} ASSISTANT:"
)


@dataclasses.dataclass(frozen=True)
class LlavaProcessor:
    """`processor(images, prompts)` gives a Prompt of NumPy arrays; `processor.decode(tokens)` gives text.

    `prompt_tokens` is P; shorter prompts are padded on the right, longer ones are refused, since cutting one would
    cut image tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    image_size: int
    image_tokens: int
    prompt_tokens: int
    image_token: str = "<image>"
    template: str = VICUNA_TEMPLATE

    def __call__(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], ids: Sequence[str] | None = None
    ) -> Prompt:
        """Builds the prompts of B images.

        Args:
          images: B arrays uint8 [height, width, 3] of any size.
          prompts: B instructions; `ids` names the samples in errors.

        Raises:
          UserError: a prompt needs more than P tokens, or its number of image tokens is not I.
        """
        ids = ids or [f"sample {i}" for i in range(len(prompts))]
        tokens = np.full((len(prompts), self.prompt_tokens), self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, (name, instruction) in enumerate(zip(ids, prompts, strict=True)):
            encoded = self._encode(instruction, name)
            tokens[row, : len(encoded)] = encoded
            mask[row, : len(encoded)] = True
        positions = np.broadcast_to(np.arange(self.prompt_tokens, dtype=np.int32), tokens.shape)
        pixels = np.stack([fit(image, self.image_size) for image in images])
        return Prompt(tokens, mask, np.ascontiguousarray(positions), pixels)

    def encode_responses(self, responses: Sequence[Sequence[str]], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Target texts [B][G] to tokens [B, G, R] ending in the end token, and their mask; longer ones are cut."""
        shape = (len(responses), len(responses[0]), max_tokens)
        tokens = np.full(shape, self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros(shape, bool)
        for row, group in enumerate(responses):
            for column, text in enumerate(group):
                ids = self.tokenizer.encode(self._without_special_tokens(text), add_special_tokens=False)
                ids = [*ids, self.tokenizer.eos_token_id][:max_tokens]
                tokens[row, column, : len(ids)] = ids
                mask[row, column, : len(ids)] = True
        return tokens, mask

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Tokens [..., R] to a flat list of texts, special tokens dropped."""
        return self.tokenizer.batch_decode(tokens.reshape(-1, tokens.shape[-1]), skip_special_tokens=True)

    def _without_special_tokens(self, text: str) -> str:
        """Text of a data set must not be able to bring image placeholders, ends or padding along."""
        for token in (self.image_token, *self.tokenizer.all_special_tokens):
            text = text.replace(token, " ")
        return text

    def _encode(self, instruction: str, name: str) -> list[int]:
        instruction = self._without_special_tokens(instruction)
        text = self.template.format(image=self.image_token * self.image_tokens, prompt=instruction)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None:
            encoded = [bos, *encoded]
        if len(encoded) > self.prompt_tokens:
            raise UserError(
                f"the prompt of {name} needs {len(encoded)} tokens ({self.image_tokens} of them the image's) but "
                f"model.prompt_tokens is {self.prompt_tokens}; raise model.prompt_tokens or shorten the prompt"
            )
        placed = encoded.count(self.tokenizer.convert_tokens_to_ids(self.image_token))
        if placed != self.image_tokens:
            raise UserError(
                f"the prompt of {name} holds {placed} image tokens but the vision tower gives {self.image_tokens}; "
                f"model.template must contain {{image}} exactly once"
            )
        return encoded


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """CLIP's geometry: the shorter edge to `size` (bicubic), then a centre crop. uint8 [height, width, 3]."""
    if image.shape[:2] == (size, size):
        return image
    height, width = image.shape[:2]
    short = min(height, width)
    resized = Image.fromarray(image).convert("RGB")
    resized = resized.resize((width * size // short, height * size // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
