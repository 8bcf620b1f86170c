"""Pictures as chat endpoints take them: data URLs of PNG or JPEG."""

import base64
import hashlib
import io

import numpy as np
from PIL import Image

_LARGEST_PNG = 256  # pixels of the longer side: above, a photograph as PNG is several times its JPEG
_QUALITY = 92


def data_url(image: np.ndarray) -> str:
    """uint8 [height, width, 3] as a data URL; the same array gives the same text."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    form, settings = ("PNG", {}) if max(image.shape[:2]) <= _LARGEST_PNG else ("JPEG", {"quality": _QUALITY})
    file = io.BytesIO()
    picture.save(file, format=form, **settings)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_hash(image: np.ndarray) -> str:
    """A name of the pixels and their shape."""
    if image.dtype != np.uint8:
        raise ValueError(f"pictures are uint8 arrays, got {image.dtype}")
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=20)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def picture_tokens(image: np.ndarray | None) -> int:
    """About what models count for a picture: one token per 28 x 28 pixels, and some for its frame."""
    if image is None:
        return 0
    height, width = image.shape[:2]
    return -(-height // 28) * -(-width // 28) + 8
