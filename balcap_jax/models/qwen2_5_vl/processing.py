"""Images and instructions to static-shape prompts of the Qwen families, and tokens back to text, on the host."""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from balcap_jax.cli.errors import UserError
from balcap_jax.models.policy import Prompt
from balcap_jax.models.prompting import PromptProcessor, names_of
from balcap_jax.models.qwen2_5_vl.vision import QwenImages, QwenTower
from balcap_jax.models.qwen2_5_vl.windows import MERGE, grid_of, patches_of, plan

# The output of Qwen2.5-VL's chat template for one user message of an image and a text.
CHATML_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclasses.dataclass(frozen=True)
class QwenProcessor(PromptProcessor):
    """`processor(images, prompts)` gives a Prompt of NumPy arrays; `processor.decode(tokens)` gives text.

    An image is resized to as many merged tokens as its size asks for, at least `min_image_tokens` and at most I.
    Images whose longest side is more than `vision.max_aspect` times the shortest get padding to that aspect
    (`wide_images` "letterbox") or an error ("reject"). `counts["wide"]` is their number, `counts["images"]` that of all
    images.
    """

    vision: QwenTower
    min_image_tokens: int
    wide_images: str = "letterbox"
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter, compare=False, repr=False)

    @property
    def image_tokens(self) -> int:
        """I: the most tokens of an image."""
        return self.vision.max_image_tokens

    def with_prepared(self, packed: QwenImages, prompts: Sequence[str], ids: Sequence[str] | None = None) -> Prompt:
        """`__call__` for the images that `prepare_images` gave."""
        counts = packed.token_mask.sum(-1).tolist()
        tokens, mask = self.encode_prompts(prompts, counts, names_of(ids, len(prompts)))
        is_image = tokens == self.tokenizer.convert_tokens_to_ids(self.image_token)
        # The last patch of an image gives the size of its grid.
        grids = packed.positions.max(axis=(1, 2)) // MERGE + 1
        return Prompt(tokens, mask, mrope_positions(is_image, mask, grids), packed)

    def text_positions(self, mask: np.ndarray) -> np.ndarray:
        """[B, P, 3]: text counts up by one on all three axes."""
        return np.repeat(super().text_positions(mask)[..., None], 3, axis=-1)

    def prepare_images(self, images: Sequence[np.ndarray], ids: Sequence[str] | None = None) -> QwenImages:
        """The input of the policy's `encode` for B images.

        Raises:
          UserError: an image is too wide and `wide_images` says to refuse it.
        """
        return QwenImages(*map(np.stack, zip(*map(self._lay_out, images, names_of(ids, len(images))), strict=True)))

    def _lay_out(self, image: np.ndarray, name: str) -> QwenImages:
        """One image, without the B axis."""
        c = self.vision
        picture = self._narrow_enough(Image.fromarray(image).convert("RGB"), name)
        factor, most = MERGE * c.patch_size, c.max_image_tokens
        height, width = picture.height, picture.width
        rows, columns = grid_of(height, width, factor=factor, min_tokens=self.min_image_tokens, max_tokens=most)
        resized = picture.resize((columns * factor, rows * factor), Image.Resampling.BICUBIC)
        where = plan(rows, columns, side=c.window_side, windows=c.windows, tokens=most)
        patches = np.where(
            where.mask[..., None], patches_of(np.asarray(resized), c.patch_size)[where.slot], np.uint8(0)
        )
        return QwenImages(patches, where.mask, where.positions, where.back, where.token_mask)

    def _narrow_enough(self, picture: Image.Image, name: str) -> Image.Image:
        limit = self.vision.max_aspect
        long, short = max(picture.size), min(picture.size)
        self.counts["images"] += 1
        if long <= limit * short:
            return picture
        self.counts["wide"] += 1
        if self.wide_images == "reject":
            raise UserError(
                f"the image of {name} is {picture.width} x {picture.height} pixels, beyond the aspect of "
                f"model.max_aspect = {limit:g}; leave it out, or set model.wide_images to letterbox"
            )
        # Twice the length of any resized picture is enough: a strip's canvas would be its length squared.
        longest = 2 * math.ceil(math.sqrt(self.image_tokens * limit)) * MERGE * self.vision.patch_size
        if long > longest:
            picture = picture.resize(
                [max(1, round(side * longest / long)) for side in picture.size], Image.Resampling.BICUBIC
            )
            long = longest
        # Normalisation maps the pixels' mean to 0.
        colour = tuple(round(255 * float(mean)) for mean in self.vision.PIXEL_MEAN)
        size = tuple(max(length, math.ceil(long / limit)) for length in picture.size)
        padded = Image.new("RGB", size, colour)
        padded.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
        return padded


def mrope_positions(is_image: np.ndarray, mask: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """Rotary positions (time, row, column) of prompts with one image each: int32 [B, P, 3], 0 on padding.

    Text counts up by one on all three axes. The image's tokens share one time; their rows and columns count on from
    the text before them. The text behind goes on after the largest of these (`get_rope_index` of transformers).

    Args:
      is_image, mask: [B, P] bool, padding on either side. grids: [B, 2], rows and columns of the images' tokens.
    """
    positions = np.zeros((*mask.shape, 3), np.int32)
    for out, image, real, (rows, columns) in zip(positions, is_image, mask, grids, strict=True):
        before = int(np.flatnonzero(image)[0] - np.flatnonzero(real)[0])
        after = int(real.sum()) - before - rows * columns
        grid = np.stack(np.broadcast_arrays(0, *np.indices((rows, columns))), axis=-1).reshape(-1, 3) + before
        text = np.arange(after)[:, None] + before + max(rows, columns)
        out[real] = np.concatenate([np.arange(before)[:, None].repeat(3, 1), grid, text.repeat(3, 1)])
    return positions
