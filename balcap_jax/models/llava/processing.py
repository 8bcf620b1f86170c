"""Images and instructions to static-shape prompts, and tokens back to text, on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from balcap_jax.models.policy import Prompt
from balcap_jax.models.prompting import PromptProcessor, names_of

# The output of LLaVA-1.5's chat template (Vicuna) for one user message of an image and a text; `{image}` stands for the
# image tokens, `{prompt}` for the instruction.
VICUNA_TEMPLATE = "USER: {image}\n{prompt} ASSISTANT:"

# The aspect that images are cut to before the resize: the final crop keeps only their middle anyway. A strip of
# 1 x 50,000 pixels would become 336 x 16,800,000 on the way.
MAX_ASPECT = 64


@dataclasses.dataclass(frozen=True)
class LlavaProcessor(PromptProcessor):
    """`processor(images, prompts)` gives a Prompt of NumPy arrays; `processor.decode(tokens)` gives text."""

    image_size: int
    image_tokens: int

    def with_prepared(self, images: np.ndarray, prompts: Sequence[str], ids: Sequence[str] | None = None) -> Prompt:
        """`__call__` for the images that `prepare_images` gave."""
        tokens, mask = self.encode_prompts(prompts, [self.image_tokens] * len(prompts), names_of(ids, len(prompts)))
        return Prompt(tokens, mask, self.text_positions(mask), images)

    def prepare_images(self, images: Sequence[np.ndarray], ids: Sequence[str] | None = None) -> np.ndarray:
        """The input of the policy's `encode` for B images: uint8 [B, S, S, 3]."""
        return np.stack([fit(image, self.image_size) for image in images])


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """CLIP's geometry: the shorter edge to `size` (bicubic), then a centre crop. uint8 [height, width, 3].

    The pixels equal those of transformers' `CLIPImageProcessorPil`. Beyond MAX_ASPECT the crop may lie one pixel
    further along the longer edge.
    """
    if image.shape[:2] == (size, size):
        return image
    image = _middle(image)
    height, width = image.shape[:2]
    short = min(height, width)
    resized = Image.fromarray(image).convert("RGB")
    resized = resized.resize((width * size // short, height * size // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _middle(image: np.ndarray) -> np.ndarray:
    """The middle of the image, cut at both ends to an aspect of MAX_ASPECT."""
    height, width = image.shape[:2]
    rows, columns = (max(0, a - MAX_ASPECT * b) // 2 for a, b in ((height, width), (width, height)))
    return image[rows : height - rows, columns : width - columns]
