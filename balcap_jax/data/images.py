"""Reads pictures of any origin: a file becomes an RGB array, or an `ImageError` that names the reason."""

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageMode

from balcap_jax.data import png
from balcap_jax.data.addresses import address

# The only formats that are tried: some of Pillow's other readers start outside programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Endings of the files of a folder that are read.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Endings of pictures that nothing here reads. They are listed all the same, so that a message names them.
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".avifs", ".jxl", ".jxr", ".svg", ".tga", ".ico", ".pcx", ".exr", ".hdr", ".psd"),
    *(".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
)

# Pillow's own limit for decompression bombs, at which it only warns (it refuses at twice that).
MAX_PIXELS = 89_478_485
# Larger JPEGs are shrunk by 2, 4 or 8 while they are decoded. Their shorter side stays at least HUGE_SHORT_SIDE, which
# is several times the input of any vision tower here.
HUGE_PIXELS = 16_000_000
HUGE_SHORT_SIDE = 1536

_PHOTOMETRIC_TAG, _SAMPLE_FORMAT_TAG = 262, 339
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """A file that cannot be read as a picture; the text is the reason, without the file's name."""


def read(path: str | os.PathLike | bytes) -> np.ndarray:
    """The picture in a file, in the bytes of one or in a parquet file, upright, as uint8 [height, width, 3].

    The EXIF orientation is applied, and transparent parts lie over white. Greys of 16 bits and of floating point are
    scaled to 8 bits, and an animation gives its first frame. Colour profiles are not applied, as in the models' own
    processors. Of a PNG, only the chunks that make its pixels or turn them are read.

    Raises:
      ImageError: no such file, no picture, a damaged one, or more than MAX_PIXELS pixels.
    """
    with _opened(_found(path)) as image:
        _shrink_while_decoding(image)
        clear = png.take_transparency(image)
        image.load()  # Before its EXIF data: for those of a PNG, Pillow would load it where errors are forgiven.
        upright = _TRANSPOSITIONS.get(_orientation(image))
        picture = to_rgb(image)
        if clear is not None:
            picture.paste("white", mask=Image.fromarray(clear))
        return np.asarray(picture if upright is None else picture.transpose(upright))


def check(path: str | os.PathLike | bytes) -> None:
    """Raises ImageError for a file that does not even begin as a picture that `read` takes. Decodes nothing.

    Of one in a parquet file only the row is looked for.
    """
    if (found := _found(path, complete=False)) is not None:
        with _opened(found, complete=False):
            pass


def _found(path: str | os.PathLike | bytes, *, complete: bool = True) -> str | os.PathLike | bytes | None:
    """`path`, or for an address in a parquet file the picture there, or its path; None if not `complete`."""
    if isinstance(path, bytes) or not (inside := address(path)) or os.path.lexists(path):
        return path
    from balcap_jax.data import parquet_pictures  # pyarrow takes time to import, and few need it.

    try:
        return parquet_pictures.content(*inside) if complete else parquet_pictures.check(*inside)
    except parquet_pictures.RowError as error:
        raise ImageError(str(error)) from error


def shrunk(picture: np.ndarray, max_pixels: int) -> np.ndarray:
    """A picture [height, width, 3] with at most about `max_pixels` pixels and its own aspect; 0 = as it is."""
    height, width = picture.shape[:2]
    if not max_pixels or height * width <= max_pixels:
        return picture
    scale = (max_pixels / (height * width)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))


def picture_hash(image: np.ndarray) -> str:
    """A name of the pixels and their shape."""
    if image.dtype != np.uint8:
        raise ValueError(f"pictures are uint8 arrays, got {image.dtype}")
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=20)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: str | os.PathLike | bytes, *, complete: bool = True) -> Iterator[Image.Image]:
    """The picture, not yet decoded; every error that it raises inside the block becomes an ImageError.

    If not `complete` it cannot be decoded, and of a PNG only the head is read.
    """
    # TensorFlow Datasets switches this on for all of Pillow: the missing part of a picture would be grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with io.BytesIO(path) if isinstance(path, bytes) else _file(Path(path)) as file:
            is_png = file.read(len(png.SIGNATURE)) == png.SIGNATURE
            file.seek(0)
            with Image.open(png.stripped(file, complete=complete) if is_png else file, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height}"
                    raise ImageError(f"too large: {size} is more than {MAX_PIXELS} pixels; shrink it")
                yield image
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"no picture in a known format ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"too large: more than {MAX_PIXELS} pixels; shrink it") from error
    except MemoryError as error:
        raise ImageError("too large for this machine's memory; shrink it") from error
    # On damaged data decoders raise anything: OSError, SyntaxError, struct.error, EOFError, IndexError, ..
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"damaged: {reason}") from error


def _file(path: Path) -> BinaryIO:
    try:
        if not path.is_file():  # A named pipe would block, and a device may never end.
            missing = "a broken link" if path.is_symlink() else "no such file"
            raise ImageError("no regular file" if path.exists() else missing)
        return path.open("rb")
    except OSError as error:  # A name that is too long, or no permission.
        raise ImageError(f"cannot be looked at: {error.strerror}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS that the installed Pillow knows: AVIF came late."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode as RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if ImageMode.getmode(image.mode).typestr[1:] not in ("b1", "u1"):
        values, tags = np.asarray(image), getattr(image, "tag_v2", {})
        # Of TIFFs with more than 8 bits Pillow takes 32 without a sign for numbers with one, and white for 0 as black.
        if image.mode == "I" and image.format == "TIFF" and tags.get(_SAMPLE_FORMAT_TAG, (1,)) == (1,):
            values = values.view(np.uint32)
        values = _to_8_bits(values)
        image = Image.fromarray(255 - values if tags.get(_PHOTOMETRIC_TAG) == 0 else values)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bits as uint8. Pillow's own conversion would make all above 255 white."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64), posinf=np.inf, neginf=0.0)
        largest = values.max(initial=0.0, where=np.isfinite(values))
        scale = 255.0 if largest <= 1.0 else 1.0 if largest <= 255.0 else 255.0 / largest
    else:  # Values of 16 bits, which some formats keep in 32 bits.
        scale = 255.0 / max(65535, int(values.max(initial=0)))
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Damaged EXIF data is common on the web, and the picture beside it is undamaged.
        return 1


def _shrink_while_decoding(image: Image.Image) -> None:
    if image.format not in ("JPEG", "MPO") or image.width * image.height <= HUGE_PIXELS:
        return
    for factor in (8, 4, 2):
        if min(image.size) >= factor * HUGE_SHORT_SIDE:
            image.draft(None, (image.width // factor, image.height // factor))
            return
